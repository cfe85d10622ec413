"""What all grammars of leaked markup share: a turn's text in, clean text and calls out.

A scanner takes the text of one reply as it comes, in pieces cut anywhere, from its two
channels. The reply that results is the same wherever the pieces were cut: a whole reply is
one piece. It knows no wire format; `kimi_core.mending` puts its results into one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from kimi_core.exchange import Mend, MendKind
from kimi_core.markup.code import Code
from kimi_core.markup.tools import Tools

Channel = Literal["reasoning", "content"]

HOLD_BYTES = 256 * 1024
"""How much of a reply may wait for the closing tag that would make it thinking."""
MAX_MENDS = 200
MAX_SHOWN = 4000
PLACEHOLDER = b"(no content)"

_SPACE = re.compile(rb"\s*+")


@dataclass(frozen=True, slots=True)
class Found:
    """A call found in text: `id` is its header as the model wrote it, maybe empty."""

    id: str
    name: str
    arguments: str
    channel: Channel


class Markup:
    """The tokens of a grammar: what begins like one at the end of a text may become one."""

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        tails = b"|".join(re.escape(token[1:]) for token in longest_first)
        # Each begins with "<": that is searched for, and nothing else is looked at.
        self.search = re.compile(b"<(?:" + tails + b")").search
        self.match = re.compile(b"<(?:" + tails + b")").match
        self._beginnings = frozenset(t[:n] for t in tokens for n in range(1, len(t)))
        self._longest = max(map(len, tokens))

    def tail(self, text: bytes | bytearray, start: int = 0) -> int:
        """Return where the beginning of a token stands at the end of `text`, else its length."""
        at = text.rfind(b"<", max(start, len(text) - self._longest))
        return at if at >= 0 and bytes(text[at:]) in self._beginnings else len(text)

    def could_begin(self, text: bytes) -> bool:
        """Tell whether `text` is nothing, or the beginning of a token."""
        return not text or text in self._beginnings


class Scanner(ABC):
    """Reads one turn. Feed it, take `out`, and after `end` take `calls`.

    `changes` counts what was not passed on as it came; while it stays the same and nothing is
    `pending`, what came out is what went in. `undecided`: the model thinks, and may have begun
    without an opening tag, so that content waits for the closing one (R18 of facts on Kimi).
    """

    name: ClassVar[str]

    def __init__(self, tools: Tools, *, undecided: bool = False) -> None:
        self.tools = tools
        self.out: list[tuple[Channel, str]] = []
        self.calls: list[Found] = []
        self.mends: list[Mend] = []
        self.changes = 0
        self.earlier: Callable[[], Iterable[str]] = tuple
        """Gives the ids of calls that the conversation has used already."""
        self._undecided = undecided
        self._cut = False
        self._channel: Channel = "content"  # of the buffer's first byte
        # Where it changes within open markup, counted from the first byte that ever came.
        self._switches: deque[tuple[int, Channel]] = deque()
        self._removed = 0  # bytes that stood before the buffer
        self._thinking = False  # inside a block of thinking in the content
        self._buffer = bytearray()
        self._at = 0  # in plain text: what stands before has been looked through
        self._last = 0  # the byte of text before the buffer; 0 where text begins anew
        self._noted = 0  # what stands before has been told to the code tracker
        self._code: dict[Channel, Code] = {"reasoning": Code(), "content": Code()}
        self._leading: dict[Channel, bytes | None] = {"reasoning": b"", "content": b""}
        self._said = False
        self._section = False  # a section of calls is open
        self._dropped: list[bytes] = []  # what stands in it outside of calls

    def feed(self, channel: Channel, text: str) -> None:
        """Take the next piece of a channel."""
        if not text:
            return
        if channel != (self._switches[-1][1] if self._switches else self._channel):
            self._switch(channel)
        if self._engaged:
            self.changes += 1  # it is read as markup, and will not be passed on
        self._buffer += text.encode("utf-8", "surrogatepass")
        self._run(False)

    def passes(self, channel: Channel, text: str) -> bool:
        """Take a piece that nothing is held back of and nothing is changed in, as most are.

        False: it was not taken, and has to be fed.
        """
        if self._buffer or self._undecided or self._engaged or channel != self._channel:
            return False
        if self._thinking or self._leading[channel] is not None or "<" in text:
            return False
        raw = text.encode("utf-8", "surrogatepass")
        if not raw or self._reads(raw):
            return False
        self._code[channel].note(raw)
        self._last = raw[-1]
        self._said = self._said or (channel == "content" and not text.isspace())
        return True

    @abstractmethod
    def _reads(self, text: bytes) -> bool:
        """Tell whether a text must be read though it has no "<", outside of all markup."""

    def end(self, *, cut: bool = False) -> None:
        """The turn is over; `cut`: its length was limited, so that a call may not be whole."""
        self._cut = cut
        if self._engaged:
            self.changes += 1  # it may be said after all
        self._run(True)
        self._finish()
        for channel in self._leading:
            self._end_of_leading(channel)

    def decide(self) -> None:
        """Something came that no thinking follows: content that waits is content."""
        if self._undecided:
            self._undecided = False
            self._run(False)

    def break_off(self) -> None:
        """A text is over, another may follow: what waits is text, unless markup has begun."""
        if not self._engaged:
            self._pass_on()
            self._code[self._channel] = Code()

    @property
    def pending(self) -> bool:
        """Whether text waits that may be passed on as it came."""
        return (bool(self._buffer) and not self._engaged) or any(self._leading.values())

    @property
    @abstractmethod
    def _engaged(self) -> bool:
        """Whether the scanner is inside markup for certain."""

    @abstractmethod
    def _run(self, final: bool) -> None:
        """Read the buffer as far as can be; with `final`, nothing more comes."""

    def _finish(self) -> None:
        # What stands in a section outside of calls is noise, unless it is all there is.
        if self._section and not self.calls and not self._said:
            self._thinking = False
            self._emit("content", b"".join(self._dropped).strip())

    # -- text on its way out

    def _release(self, length: int) -> None:
        """Pass the buffer's first bytes on as text."""
        if length <= 0:
            return
        text = bytes(self._buffer[:length])
        if length > self._noted:
            self._code[self._channel].note(text[self._noted :])
        self._remove(length)
        self._last = text[-1]
        if self._thinking and self._channel == "content":
            self.changes += 1
        self._emit("reasoning" if self._thinking else self._channel, text)

    def _remove(self, length: int) -> None:
        """Take the buffer's first bytes out."""
        self._last = 0
        del self._buffer[:length]
        self._at = max(0, self._at - length)
        self._noted = max(0, self._noted - length)
        self._removed += length
        while self._switches and self._switches[0][0] <= self._removed:
            self._channel = self._switches.popleft()[1]

    def _emit(self, channel: Channel, text: bytes) -> None:
        held = self._leading[channel]
        if held is not None:
            text = self._without_placeholder(channel, held + text)
        if text:
            self._said = self._said or (channel == "content" and not text.isspace())
            self.out.append((channel, text.decode("utf-8", "surrogatepass")))

    def _without_placeholder(self, channel: Channel, text: bytes) -> bytes:
        """Return what can be passed on of a channel's beginning."""
        kept: list[bytes] = []
        at = 0
        while True:
            found = _SPACE.match(text, at)
            end = found.end() if found else at
            kept.append(text[at:end])
            if not text.startswith(PLACEHOLDER, end):
                break
            at = end + len(PLACEHOLDER)
            self.changed("placeholder", PLACEHOLDER)
        rest = text[end:]
        if PLACEHOLDER.startswith(rest):
            self._leading[channel] = rest
        else:
            self._leading[channel] = None
            kept.append(rest)
        return b"".join(kept)

    def _end_of_leading(self, channel: Channel) -> None:
        held = self._leading[channel]
        if held:
            self._leading[channel] = None
            self._emit(channel, held)

    def _switch(self, channel: Channel) -> None:
        if channel == "reasoning":
            self._undecided = False
        if self._engaged:
            self._switches.append((self._removed + len(self._buffer), channel))
            return
        self._pass_on()
        self._channel = channel

    def _pass_on(self) -> None:
        """Pass on what waits: nothing that could make it markup follows."""
        if self._buffer:
            self._run(True)
        self._last = 0
        for channel in self._leading:
            self._end_of_leading(channel)

    def _again(self) -> None:
        """Back in plain text: read the rest of the buffer channel by channel."""
        if not self._switches:
            return
        rest, begin, channel = bytes(self._buffer), self._removed, self._channel
        switches = [(at - begin, following) for at, following in self._switches]
        self._switches.clear()
        self._remove(len(rest))
        start = 0
        for end, following in [*switches, (len(rest), channel)]:
            self.feed(channel, rest[start:end].decode("utf-8", "surrogatepass"))
            channel, start = following, end

    def _inside_code(self, place: int) -> bool:
        code = self._code[self._channel]
        code.note(bytes(self._buffer[self._noted : place]))
        self._noted = max(self._noted, place)
        return code.inside()

    def changed(self, kind: MendKind, leaked: bytes, became: str = "") -> None:
        """Count a change, and keep what it was for those who look."""
        self.changes += 1
        if len(self.mends) < MAX_MENDS:
            shown = leaked[:MAX_SHOWN].decode("utf-8", "replace")
            self.mends.append(Mend(kind, shown, became[:MAX_SHOWN]))


Grammar = Callable[..., Scanner]
