"""What is known of the attempts of one exchange, and who decides whether a reply is enough."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from kimi_core.dialects import Dialect
from kimi_core.document import Document, NotJSON, Path, decode, encode
from kimi_core.sse import SSE, Event
from kimi_core.stages import StageRank

Message = dict[str, Any]
"""A message of a request, in the dialect of the attempt."""

# These replies were stopped, and would be again.
_STOPPED = frozenset(
    [
        *("length", "content_filter", "error"),
        *("max_tokens", "model_context_window_exceeded", "refusal", "pause_turn", "stop_sequence"),
    ]
)


class Text:
    """Text as it comes, in pieces."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.is_blank = True

    def add(self, piece: str) -> None:
        self._pieces.append(piece)
        self.is_blank = self.is_blank and not piece.strip()

    def __str__(self) -> str:
        return "".join(self._pieces)


@dataclass(frozen=True, slots=True)
class Ending:
    """A reply that has come to its end."""

    calls: Sequence[Call]
    finish_reason: str
    """In the dialect's own words."""
    says_something: bool
    """It has text, or a reply before it had."""

    @property
    def is_stopped(self) -> bool:
        return self.finish_reason in _STOPPED


class Decider(Protocol):
    """Decides whether a reply is enough, and says what the model is told when it is not."""

    def hides(self, name: str) -> bool:
        """Tell whether a call by this name is for us: the client does not get it."""
        ...

    def decide(self, ending: Ending) -> str:
        """Return why a reply is not enough; empty when it is, as far as this one knows."""
        ...

    def answer(self, calls: Sequence[Call]) -> str:
        """Return what the calls that the client does not get say to the user; mostly nothing."""
        ...

    def keeps(self, call: Call) -> bool:
        """Tell whether a call goes back to the model, because `more` has its result."""
        ...

    async def more(self, kept: Sequence[Call], dialect: Dialect) -> list[Message]:
        """Return what follows the rejected reply in the next request."""
        ...


class Turn:
    """One exchange, whatever number of attempts it takes: what was said, and what it cost.

    When a reply has ended, `rejected` says why it was not enough; `next_body` then makes the
    body of the next request out of that of the last.
    """

    def __init__(self, *deciders: Decider) -> None:
        self.deciders = list(deciders)
        """The first that finds a reply not to be enough has its way."""
        self.rejected = ""
        self.streamed = False
        """The client has got the beginning of a stream."""
        self.history: list[Message] = []
        """The latest rejected reply, as messages."""
        self.kept: list[Call] = []
        """Its calls that are in `history`."""
        self.said: defaultdict[str, Text] = defaultdict(Text)
        """What rejected replies have said, by field, as the client got it."""
        self.usage: dict[Path, Any] = {}
        """The usage of rejected replies, by the place where it stood."""
        self.identity: dict[str, Any] = {}
        """Which members make events of chat.completions those of one reply."""
        self.parts: list[dict[str, Any]] = []
        """What the content of rejected replies had beside text, where it came whole."""
        self.blocks = 0
        """How many content blocks of Anthropic's have begun."""
        self.whole_blocks: list[bytes] = []
        """The content blocks of rejected replies that were not streamed, as JSON text."""
        self._rejecting: Decider | None = None

    def begin(self) -> None:
        """Another attempt begins."""
        self.rejected = ""

    def hides(self, name: str) -> bool:
        """Tell whether a call by this name is for us."""
        return any(one.hides(name) for one in self.deciders)

    def decide(self, calls: Sequence[Call], finish_reason: str, says_something: bool) -> None:
        """Settle whether a reply that has come to its end is enough."""
        said = says_something or not self.said["content"].is_blank
        ending = Ending(calls, finish_reason, said)
        for one in self.deciders:
            if reason := one.decide(ending):
                self.rejected, self._rejecting = reason, one
                self.kept = [call for call in calls if one.keeps(call)]
                _name_each(self.kept)
                return

    async def next_body(self, body: bytes, dialect: Dialect) -> bytes:
        """Return the next request's body: the last one's bytes, with messages at their end."""
        assert self._rejecting is not None
        more = await self._rejecting.more(self.kept, dialect)
        document = Document(body, dialect.shape)
        for message in (*self.history, *more):
            document.append_raw(("messages",), encode(message))
        return document.encode()

    def finish_reason(self, calls: Sequence[Call], said: str, *, call: str, stop: str) -> str:
        """Return the reason that the client gets, in the dialect's words for the two."""
        if said in _STOPPED:
            return said
        if any(one.is_real for one in calls):
            return call
        return stop if calls else said

    def spaced(self, field: str, piece: str) -> str:
        """Return the first text of an attempt with a blank line before it, if other text is."""
        if self.said[field].is_blank or not piece.strip():
            return piece
        first = piece.lstrip()
        return piece[: len(piece) - len(first)] + "\n\n" + first

    def untold(self, calls: Sequence[Call], said: str) -> str:
        """Return the answer as text to be added to what was said; empty if it was said there."""
        found = next((found for one in self.deciders if (found := one.answer(calls))), "")
        told = (str(self.said["content"]) + said).rstrip()
        if not found or told.endswith(found.strip()):
            return ""
        return "\n\n" + found if told else found

    def with_usage(self, path: Path, usage: Any) -> Any:
        """Return usage that stands at `path` as that of the rejected replies and this one."""
        return together(self.usage.get(path), usage)


class Call:
    """A call in a reply, as far as it has come."""

    __slots__ = ("_arguments", "_turn", "extra", "id", "name", "number", "waiting")

    def __init__(self, turn: Turn, name: str = "", id: str = "") -> None:
        self._turn = turn
        self._arguments: list[str] = []
        self.name = name
        self.id = id
        self.extra: dict[str, Any] = {}
        """What a provider says of it beyond the dialect, and wants to be told again."""
        self.number: int | None = None
        """Its place among the calls that the client gets."""
        self.waiting: list[dict[str, Any]] = []
        """What came of it and was not sent."""

    def add(self, arguments: str) -> None:
        self._arguments.append(arguments)

    @property
    def arguments(self) -> str:
        return "".join(self._arguments)

    @property
    def given(self) -> dict[str, Any] | None:
        """The arguments as an object, {} when there are none; None when they are none."""
        said = self.arguments.strip()
        try:
            value = decode(said.encode("utf-8", "surrogatepass")) if said else {}
        except NotJSON:
            return None
        return value if isinstance(value, dict) else None

    @property
    def is_real(self) -> bool:
        """It is for the client. One without a name is for nobody."""
        return bool(self.name) and not self._turn.hides(self.name)


def _name_each(calls: Iterable[Call]) -> None:
    """Give calls that share an id, or have none, one of their own: results go by them."""
    taken: set[str] = set()
    for number, call in enumerate(calls):
        if not call.id or call.id in taken:
            call.id = f"call_{number}_{call.id}".rstrip("_")
        taken.add(call.id)


def bare(name: str) -> str:
    """Return a tool's name without what Kimi models put round it."""
    return re.sub(r"^functions\.|:\d+$", "", name.strip())


def together(one: Any, other: Any) -> Any:
    """Return the usage of a reply, `other`, and of those before it as that of one reply.

    The prompt is the last one's: by it clients see how full the window is, and each request
    begins with those before it. All else is added.
    """
    if not isinstance(one, dict) or not isinstance(other, dict):
        return add(one, other)
    both = add(one, other)
    if _is_number(other.get(_TOTAL)) and _is_number(one.get(_TOTAL)):
        both[_TOTAL] -= next((one[key] for key in _PROMPTS if _is_number(one.get(key))), 0)
    last = {key: value for key, value in other.items() if _in_prompt(key) and value is not None}
    before = {key: value for key, value in one.items() if _in_prompt(key)}
    if last:  # what it does not say there was none of
        before = {key: _none_of(value) for key, value in before.items()}
    return both | before | last


# What usage says of the prompt, in any provider's words.
_IN_PROMPT = re.compile(r"^(prompt|input)_tokens|cache.*_tokens|^cache_creation$")
_PROMPTS = ("prompt_tokens", "input_tokens")
_TOTAL = "total_tokens"


def _in_prompt(key: str) -> bool:
    return _IN_PROMPT.search(key) is not None


def _none_of(value: Any) -> Any:
    """Return 0 for a number, at every depth."""
    if isinstance(value, dict):
        return {key: _none_of(held) for key, held in value.items()}
    return 0 if _is_number(value) else value


def add(one: Any, other: Any) -> Any:
    """Return `other` with the numbers of `one` added, at every depth."""
    if isinstance(other, dict) or (other is None and isinstance(one, dict)):
        mine, theirs = one if isinstance(one, dict) else {}, other or {}
        both = {key: add(mine.get(key), value) for key, value in theirs.items()}
        alone = {key: add(value, None) for key, value in mine.items() if key not in theirs}
        return both | {key: value for key, value in alone.items() if value is not None}
    if _is_number(one) and (other is None or _is_number(other)):
        return one + (other or 0)
    return other


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class AttemptStage(ABC):
    """Passes a reply on as it comes, but for its end, and for calls that are for us.

    When it is over the Turn decides. What is enough gets its end; what is not stays open for
    the reply to the next attempt.
    """

    rank: int = StageRank.ENFORCE
    reads_only = False
    on_failure: Literal["pass", "end"] = "pass"

    def __init__(self, turn: Turn) -> None:
        turn.begin()
        self._turn = turn
        self._continues = turn.streamed
        """The client takes the events for more of the reply that it is getting."""
        self._left_alone = False
        """What comes now passes as it is: nothing is held back, and nothing decided."""
        self._finish_reason = ""
        self._is_over = False
        """The reply has said that it is, with or without a reason."""

    def feed(self, event: Event) -> Iterable[Event]:
        if self._left_alone or not event.data:
            return (event,)
        if event.data.strip() == b"[DONE]":
            return self._done(event)
        try:
            payload = decode(event.data)
        except NotJSON:
            return (event,)
        if not isinstance(payload, dict):
            return (event,)
        if event.type == "body":
            return self._whole(event, payload)
        self._turn.streamed = True
        return self._event(event, payload)

    def end(self) -> Iterable[Event]:
        if self._left_alone:
            return ()
        if not self._finish_reason and not self._is_over:  # cut off, or `feed` has raised
            return self._cut()
        return self._end()

    @abstractmethod
    def _event(self, event: Event, payload: dict[str, Any]) -> Iterable[Event]:
        """Take an event of a stream."""

    @abstractmethod
    def _end(self) -> Iterable[Event]:
        """Return the end of a stream that is enough, or what else was held back."""

    @abstractmethod
    def _cut(self) -> Iterable[Event]:
        """Return what was held back of a stream that has no end."""

    @abstractmethod
    def _whole(self, event: Event, payload: dict[str, Any]) -> Iterable[Event]:
        """Take a whole reply; return it if it is enough."""

    def _done(self, event: Event) -> Iterable[Event]:
        return (event,)


_sse = SSE()


def made(data: bytes, type: str = "") -> Event:
    """Return an event of a stream with `data`."""
    return Event(data, _sse.encode(data, type), type)
