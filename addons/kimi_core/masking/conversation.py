"""A conversation read in its order, and what of each message leaves in another form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kimi_core.document import NotJSON, Path, decode
from kimi_core.exchange import Message, Part, SavingKind
from kimi_core.masking import json_shape, lines, observed, pasted
from kimi_core.masking.cut import Cutter, is_code, is_listing
from kimi_core.masking.lines import Lines
from kimi_core.masking.policy import Policy
from kimi_core.masking.references import Line, plain, refer
from kimi_core.masking.relevance import Named
from kimi_core.masking.shown import Shown, Source
from kimi_core.tokens import tokenizer_for

_MIN_TOKENS = 100
"""Shorter texts are sent as they are."""
_MIN_CHARS = 150
_MIN_SAVED = 20
_MAX_LABEL = 40
_LABELS = 256
_CODE_SLACK = 2
"""Code may be so many times longer than the threshold before it is cut to that."""
_LISTED = 4
"""Of a numbered listing so many times the threshold stays: a file was opened to be edited, and what
is cut of it is paid for when it is opened again."""
_ATTEMPTS = 4
_MANY_LINES = 20_000
_HIDDEN_SHARE = 0.5
"""When so much of a text was cut before, the model has come back for it."""
_NOTE_TOKENS = 60


@dataclass(frozen=True, slots=True)
class Change:
    """One text of a message that leaves in another form."""

    path: Path
    """As in its part."""
    text: str
    """What is sent."""
    original: str
    hash: str
    """The first 16 hex digits of the SHA-256 of `original`; it stands in `text` too."""
    label: str
    """What it is the result of."""
    kinds: tuple[SavingKind, ...]
    tokens: int
    """Of `original` by o200k."""
    sent_tokens: int


@dataclass(frozen=True, slots=True)
class _Masked:
    """A text as it is sent."""

    text: str
    lines: Sequence[Line]
    kinds: tuple[SavingKind, ...]
    counts: tuple[int, int] | None = None
    """Tokens before and after, where it is the whole of its part."""


class Conversation:
    """What the model has before it, as far as it was taken.

    What becomes of a message is a function of the messages taken before it, their policies,
    itself and its policy: nothing here depends on time, or on the order of a set.
    """

    def __init__(self) -> None:
        self._shown = Shown()
        self._hidden = Shown()
        self._named = Named()
        self._labels: dict[str, str] = {}
        self._cut: dict[str, str] = {}  # what was cut by what it was the result of
        self._results = 0
        self._users = 0
        self._asked: str | None = None  # the text of the model's message, if that was the last

    def copy(self) -> Conversation:
        """Return a conversation that goes on from here by itself."""
        made = Conversation()
        made._shown = self._shown.copy()
        made._hidden = self._hidden.copy()
        made._named = self._named.copy()
        made._labels, made._cut = dict(self._labels), dict(self._cut)
        made._results, made._users = self._results, self._users
        made._asked = self._asked
        return made

    def take(self, message: Message, policy: Policy | None) -> tuple[Change, ...]:
        """Decide on the next message; None: it is sent as it is, but read all the same."""
        if message.role == "assistant":
            self._named.turn()
        elif message.role == "user":
            self._users += 1
        changes: list[Change] = []
        raw = _Raw(message)
        last: object = None
        results = self._observed(message)
        for index, part in enumerate(message.parts):
            if part.kind == "tool_call":
                self._take_call(part, message)
            elif part.kind == "tool_result":
                one = part.id or part.path[:2]
                self._results += one != last
                last = one
                may_change = policy is not None and _is_long(part.text) and raw.is_text(part)
                changes += self._take_result(part, policy if may_change else None)
            elif part.kind == "text" and message.role == "assistant":
                self._named.read(part.text)
            elif index in results:
                self._results += 1
                may_change = policy is not None and _is_long(part.text) and raw.is_text(part)
                given = policy if may_change else None
                changes += self._take_result(part, given, results[index])
            elif part.kind == "text" and message.role == "user" and part.category != "system":
                may_change = policy is not None and _is_long(part.text) and raw.is_text(part)
                changes += self._take_user(part, policy if may_change else None)
        return tuple(changes)

    def _observed(self, message: Message) -> dict[int, str]:
        """Return which parts of a user's message are results, by their labels."""
        asked, self._asked = self._asked, None
        if message.role == "assistant":
            self._asked = "\n".join(part.text for part in message.parts if part.kind == "text")
        if message.role != "user" or asked is None:
            return {}
        texts = [part.text if part.kind == "text" else "" for part in message.parts]
        return observed.results(asked, texts)

    def _take_call(self, part: Part, message: Message) -> None:
        value = _arguments(part.text)
        label = _label(part.name, value)
        key = part.id or part.name
        self._labels.pop(key, None)
        # Gemini's calls have no ids: which of two of one name brought a result is not known.
        is_known = part.id or sum(other.name == part.name for other in message.parts) == 1
        self._labels[key] = label if is_known else part.name
        if len(self._labels) > _LABELS:
            del self._labels[next(iter(self._labels))]
        for member in _texts(value):
            self._named.read(member)
            if member.count("\n") > 2:
                self._show_all(Source("call", 0, label), lines.read(member))

    def _take_result(
        self, part: Part, policy: Policy | None, label: str | None = None
    ) -> Iterator[Change]:
        if label is None:
            label = self._labels.get(part.id or part.name) or part.name
        source = Source("result", self._results, label)
        value = json_shape.parse(part.text)
        inner = json_shape.wrapped(part.text, value) if value is not None else None
        hash = _hash(part.text) if policy else ""
        text = inner[1] if inner else part.text
        given = lines.read(text)
        if policy is None:
            self._show_all(source, given)
            return
        if policy.threshold and self._wanted(label, hash, given):
            policy = replace(policy, threshold=0)
        masked = self._masked(text, given, policy, hash, value if inner is None else None)
        if masked is not None and inner is not None:
            outer = json_shape.rewrapped(part.text, inner[0], masked.text)
            masked = _Masked(outer, masked.lines, masked.kinds) if outer is not None else None
        change = _change(part, masked, hash, label)
        if masked is None or change is None:
            self._show_all(source, given)
            return
        self._show(source, masked.lines)
        if "cut" in masked.kinds:
            self._hide(source, given, masked.lines)
            self._cut.pop(label, None)
            self._cut[label] = hash
            if len(self._cut) > _LABELS:
                del self._cut[next(iter(self._cut))]
        yield change

    def _wanted(self, label: str, hash: str, given: Lines) -> bool:
        """Tell whether a result is asked for because of what was cut from an earlier one.

        What the same call brings now, and did not before, is its outcome after a change.
        """
        if not self._cut:
            return False
        if hash in self._cut.values():
            return True
        if label and label in self._cut:
            return False
        hidden = len(self._hidden.known(given.hashes))
        return hidden > _HIDDEN_SHARE * len(given)

    def _take_user(self, part: Part, policy: Policy | None) -> Iterator[Change]:
        source = Source("user", self._users, "")
        pieces: list[str] = []
        shown: list[Line] = []
        kinds: list[SavingKind] = []
        at = 0
        found = list(pasted.blocks(part.text)) if policy else []
        hash = _hash(part.text) if found else ""
        hidden: list[tuple[Lines, Sequence[Line]]] = []
        self._named.read(_between(part.text, found))
        for start, end, _ in found:
            block = part.text[start:end]
            if policy is None or not _is_long(block):
                continue
            given = lines.read(block)
            # "Above" would be above in the block, or in the message?
            masked = self._masked(block, given, policy, hash, None, above=False)
            if masked is None:
                continue
            before = part.text[at:start]
            pieces += before, masked.text
            shown = _glued(_glued(shown, plain(lines.read(before))), masked.lines)
            kinds += masked.kinds
            hidden.append((given, masked.lines))
            at = end
        if pieces:
            rest = part.text[at:]
            text = "".join((*pieces, rest))
            shown = _glued(shown, plain(lines.read(rest)))
            masked = _Masked(text, shown, tuple(dict.fromkeys(kinds)))
            change = _change(part, masked, hash, "the user's message")
            if change is not None:
                self._show(source, masked.lines)
                for given, made in hidden:
                    self._hide(source, given, made)
                yield change
                return
        self._show_all(source, lines.read(part.text))

    def _masked(
        self,
        text: str,
        given: Lines,
        policy: Policy,
        hash: str,
        value: Any,
        *,
        above: bool = True,
    ) -> _Masked | None:
        """Return how a text is sent, None as it is."""
        count = _TOKENIZER.count
        tokens = count(text)
        if tokens < _MIN_TOKENS:
            return None
        # So long a text will be cut, and then nothing in it may point at what is.
        above = above and len(given) <= _MANY_LINES
        referred = refer(given, self._shown, count, above=above) if policy.references else None
        joined = _joined(referred) if referred else "\n".join(given.texts)
        left = count(joined) if joined != text else tokens
        if tokens - left < _MIN_SAVED and (policy.threshold <= 0 or left <= policy.threshold):
            return None
        made = referred or plain(given)
        is_referred = len(made) < len(given)
        is_short = policy.threshold <= 0 or left <= policy.threshold
        listed = not is_short and is_listing(made)
        code = not is_short and is_code(made)
        slack = _LISTED if listed else _CODE_SLACK if code else 1
        if is_short or left <= slack * policy.threshold:
            if tokens - left < _MIN_SAVED:
                return None
            noted = _noted(made, hash)
            text = _joined(noted)
            return _Masked(text, noted, ("reference",), (tokens, count(text)))
        if value is not None and not is_referred:
            note = f"cut; the whole: kimi-proxy mask {hash}"
            most = policy.keep + _NOTE_TOKENS
            shape = json_shape.shaped(text, value, lambda made: count(made) <= most, note)
            if shape is not None:
                return _Masked(shape, (), ("cut",), (tokens, count(shape)))
        if any(line.is_above for line in made):
            made = refer(given, self._shown, count, above=False) or plain(given)
        limit = policy.keep
        if listed or code:
            limit = max(limit, (_LISTED if listed else 1) * policy.threshold - _NOTE_TOKENS)
        return self._shortened(given, made, limit, hash, tokens)

    def _shortened(
        self, given: Lines, made: Sequence[Line], limit: int, hash: str, tokens: int
    ) -> _Masked:
        is_referred = len(made) < len(given)
        cutter = Cutter(made, self._named, _TOKENIZER.count_many)
        budget = limit
        for _ in range(_ATTEMPTS):
            kept = cutter.keep(budget)
            sent = [*kept, Line(_note(kept, len(given), hash), 0, -1, len(given), 0)]
            text = _joined(sent)
            left = _TOKENIZER.count(text)
            if left <= limit + _NOTE_TOKENS:
                break
            budget = int(0.9 * budget * limit / left)
        kinds: tuple[SavingKind, ...] = ("reference", "cut") if is_referred else ("cut",)
        return _Masked(text, sent, kinds, (tokens, left))

    def _show_all(self, source: Source, given: Lines) -> None:
        self._shown.add(source, given.hashes, given.numbers)

    def _show(self, source: Source, made: Sequence[Line]) -> None:
        hashes: list[int] = []
        numbers: list[int] = []
        for line in made:
            hashes.append(line.hash)
            numbers.append(line.number)
            # A repeated run stands in one line with its repetition, but is shown as several.
            if not line.hash and (more := line.text.count("\n")):
                hashes += [0] * more
                numbers += [-1] * more
        self._shown.add(source, hashes, numbers)

    def _hide(self, source: Source, given: Lines, made: Sequence[Line]) -> None:
        for line in made:
            if line.is_cut:
                span = slice(line.start, line.start + line.length)
                self._hidden.add(source, given.hashes[span], given.numbers[span])


class _Raw:
    """A message's own JSON, read when it is asked for."""

    def __init__(self, message: Message) -> None:
        self._message = message
        self._value: Any = None
        self._is_read = False

    def is_text(self, part: Part) -> bool:
        """Tell whether a part's text is a string there, and no server's own tool's result."""
        if not self._message.raw:
            return True
        if not self._is_read:
            self._is_read = True
            try:
                self._value = decode(self._message.raw)
            except NotJSON:
                self._value = None
        value = self._value
        for key in part.path:
            if isinstance(value, dict):
                type_ = value.get("type")
                if isinstance(type_, str) and type_.endswith("_tool_result"):
                    return False
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return False
        return isinstance(value, str)


_TOKENIZER = tokenizer_for("o200k")


def _is_long(text: str) -> bool:
    return len(text) >= _MIN_CHARS


def _between(text: str, blocks: Sequence[tuple[int, int, str]]) -> str:
    pieces: list[str] = []
    at = 0
    for start, end, _ in blocks:
        pieces.append(text[at:start])
        at = end
    return "".join((*pieces, text[at:]))


def _glued(first: Sequence[Line], second: Sequence[Line]) -> list[Line]:
    """Return the lines of two texts of which the second goes on in the first one's last line."""
    if not first or not second:
        return [*first, *second]
    last, following = first[-1], second[0]
    if not last.text:
        return [*first[:-1], *second]
    if not following.text:
        return [*first, *second[1:]]
    both = following._replace(text=last.text + following.text, hash=0, number=-1)
    return [*first[:-1], both, *second[1:]]


def _joined(made: Sequence[Line]) -> str:
    return "\n".join([line.text for line in made])


def _note(kept: Sequence[Line], lines: int, hash: str) -> str:
    gone = sum(line.length for line in kept if line.is_cut and not line.is_part)
    what = f"{gone} of {lines} lines" if gone else "long lines"
    return f"[kimi-proxy: {what} cut; the whole: kimi-proxy mask {hash}]"


def _noted(made: Sequence[Line], hash: str) -> list[Line]:
    """Return the lines with the hash in the first reference, or in a line of its own."""
    noted = list(made)
    for index, line in enumerate(noted):
        if not line.hash and line.text.endswith("]"):
            text = f"{line.text[:-1]} #{hash}]"
            noted[index] = Line(text, 0, line.number, line.start, line.length)
            return noted
    return [*noted, Line(f"[control codes left out #{hash}]", 0, -1, len(noted), 0)]


def _change(part: Part, masked: _Masked | None, hash: str, label: str) -> Change | None:
    if masked is None:
        return None
    tokens, sent = masked.counts or _TOKENIZER.count_many((part.text, masked.text))
    if tokens - sent < _MIN_SAVED:
        return None
    return Change(part.path, masked.text, part.text, hash, label, masked.kinds, tokens, sent)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _texts(value: Any) -> Iterator[str]:
    """Yield the strings of a call's arguments."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += reversed(one.values())
        elif isinstance(one, list):
            waiting += reversed(one)


def _label(name: str, value: Any) -> str:
    words = [name]
    for member in _texts(value):
        if member and "\n" not in member:
            words.append(" ".join(member.split()))
            if len(words) == 3:
                break
    label = " ".join(words)
    return label if len(label) <= _MAX_LABEL else label[: _MAX_LABEL - 1] + "…"
