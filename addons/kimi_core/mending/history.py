"""The history of a chat.completions request, as Kimi models need it: ids, arguments, thoughts."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import msgspec
import xxhash

from kimi_core.document import Document, NotJSON, Path, decode, encode, locate
from kimi_core.memo import Memo
from kimi_core.mending import ids

PLACEHOLDER = " "
"""The reasoning of a message whose reasoning nobody knows.

Moonshot answers 400 "reasoning_content is missing in assistant tool call message at index N"
without one; a space is the least that is not empty.
"""


class Thoughts:
    """Reasoning remembered by the ids of the tool calls that it led to.

    What was not asked for lately is forgotten when all of it exceeds `limit` characters.
    An id is what the provider called it, and `functions.bash:0` stands in most
    conversations: an `owner` is one conversation of one client. May be used from several
    threads.
    """

    def __init__(self, limit: int = 16_000_000) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._thoughts: OrderedDict[int, _Thought] = OrderedDict()
        self._of: dict[tuple[str, str], int] = {}
        self._size = 0
        self._count = 0

    def remember(self, owner: str, ids: Iterable[str], reasoning: str) -> None:
        """Keep what led to the calls of one reply; an id that was used before means this now."""
        keys = {(owner, id) for id in ids if id}
        size = len(reasoning) + sum(_KEY_SIZE + len(id) for _, id in keys)
        with self._lock:
            for key in keys:
                self._forget(key)
            if not reasoning or not keys or size > self._limit:
                return
            self._count += 1
            self._thoughts[self._count] = _Thought(reasoning, keys, size)
            self._of.update(dict.fromkeys(keys, self._count))
            self._size += size
            while self._size > self._limit:
                for key in tuple(next(iter(self._thoughts.values())).keys):
                    self._forget(key)

    def recall(self, owner: str, ids: Iterable[str]) -> str:
        """Return what led to the first call whose id is known; "" when none is."""
        with self._lock:
            for id in ids:
                if (number := self._of.get((owner, id))) is not None:
                    self._thoughts.move_to_end(number)
                    return self._thoughts[number].reasoning
        return ""

    def _forget(self, key: tuple[str, str]) -> None:
        if (number := self._of.pop(key, None)) is None:
            return
        thought = self._thoughts[number]
        thought.keys.discard(key)
        if not thought.keys:
            del self._thoughts[number]
            self._size -= thought.size


_REMEMBERED = 4096
"""Messages of which it is known what they say; some kilobytes for each dozen."""
_KEY_SIZE = 256  # what an id costs besides its characters, so that short thoughts are bounded too


@dataclass(slots=True)
class _Thought:
    reasoning: str
    keys: set[tuple[str, str]]
    size: int


def has_calls(document: Document) -> bool:
    """Tell whether somebody may have called a tool so far: without calls nothing is mended."""
    return b'"tool_call' in document.body or b'"tool"' in document.body


def mend_history(
    document: Document,
    *,
    thinking: bool,
    recall: Callable[[Sequence[str]], str],
    owner: str | None = None,
) -> None:
    """Edit what a Kimi model or its host would stumble over in the messages of a request.

    Ids of calls become `functions.NAME:IDX`, in the calls and in their results; a result
    gets the name of its function; arguments become the text of a JSON object; with
    `thinking`, a message with calls gets the reasoning that the client dropped: `recall` is
    given the ids of its calls and returns "" when it knows none.

    What becomes of a message depends on it and on those before it alone, so a request that
    goes on from this one begins with the same bytes. What cannot be read stays as it is.
    With an `owner`, whose thoughts `recall` knows, what became of a conversation is remembered,
    and only what is new in it is looked at.
    """
    raws = document.elements("messages")
    if not raws:
        return
    text = document.raw("messages")
    known, hasher, key = _NOTHING, xxhash.xxh3_128(), b""
    if owner is not None:
        hasher.update(f"{owner} {thinking} ".encode())
        for raw in raws[:2]:
            hasher.update(raw)
        key = hasher.digest()
        found = _mended.get(key)
        hasher.reset()
        if found is not None and found.size < len(text):
            hasher.update(memoryview(text)[: found.size])
            if hasher.digest() == found.digest:
                known = found
            else:
                hasher.reset()
    pieces, calls = [known.text], known.calls.copy()
    done, at = known.size if known.text else 0, known.size or 1
    new = raws[known.length :]
    digests = list(map(xxhash.xxh3_128_digest, new))
    for raw, digest, message in zip(new, digests, _known.get_many(digests), strict=True):
        while text[at] in b", \t\r\n":
            at += 1
        if message is None:
            message = _look(bytes(raw))
            _known.put(digest, message)
        if isinstance(message, _Asking):
            values, has_key = _asking_edits(message, raw, calls, thinking, recall), True
        elif isinstance(message, _Answering):
            values, has_key = _answering_edits(message, calls), bool(message.id)
        else:
            values, has_key = {}, False
        if values:
            for place, value in _placed(raw, digest, values, has_key):
                pieces += (text[done : at + place.start], place.before, value, place.after)
                done = at + place.end
        at += len(memoryview(raw))
    mended = b"".join((*pieces, text[done:at])) if done else b""
    if owner is not None and text[at - 1 : at] == b"}" and at <= _MAX_REMEMBERED:
        hasher.update(memoryview(text)[known.size : at])
        _mended.put(key, _Mended(len(raws), at, hasher.digest(), mended, calls))
    if mended:
        document.set_raw(("messages",), mended + text[at:])


def _asking_edits(
    message: _Asking,
    raw: bytes | msgspec.Raw,
    calls: _Calls,
    thinking: bool,
    recall: Callable[[Sequence[str]], str],
) -> dict[Path, bytes]:
    edits: dict[Path, bytes] = {}
    for call, id in zip(message.calls, calls.ask(message), strict=True):
        if id != call.id:
            edits["tool_calls", call.position, "id"] = encode(id)
        if call.mends_arguments:
            path = ("tool_calls", call.position, "function", "arguments")
            edits[path] = encode(_arguments(bytes(raw), path))
    # Only what follows the last message without calls needs its reasoning. All get it,
    # because taking it out again later would void the cached prefix.
    if thinking and message.lacks_reasoning:
        aliases = [alias for call in message.calls for alias in call.aliases]
        reasoning = _reasoning(bytes(raw)) or (recall(aliases) if aliases else "")
        edits["reasoning_content",] = encode(reasoning or PLACEHOLDER)
    return edits


def _answering_edits(message: _Answering, calls: _Calls) -> dict[Path, bytes]:
    edits: dict[Path, bytes] = {}
    if (asked := calls.answer(message.id)) is not None:
        if asked.id != message.id:
            edits["tool_call_id",] = encode(asked.id)
        if asked.name and not message.has_name:
            edits["name",] = encode(asked.name)
    return edits


class _Asked(msgspec.Struct, frozen=True, gc=False):
    """A call of the conversation, under the id that it leaves with."""

    number: int
    id: str
    name: str


class _Calls:
    """The calls of a conversation so far: gives each its id, and finds the one of a result."""

    def __init__(self) -> None:
        self._count = 0
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}  # by name: from the count up to here no number is free
        self._by_id: dict[str, tuple[_Asked, ...]] = {}  # of the latest message that has the id
        self._latest: tuple[_Asked, ...] = ()
        self._answered: set[int] = set()

    def copy(self) -> _Calls:
        """Return the same calls, of which more can be told without these changing."""
        made = _Calls()
        made._count = self._count
        made._taken = self._taken.copy()
        made._next = self._next.copy()
        made._by_id = self._by_id.copy()
        made._latest = self._latest
        made._answered = self._answered.copy()
        return made

    def ask(self, message: _Asking) -> list[str]:
        """Return the ids of a message's calls. A call without a name keeps what it has."""
        calls = message.calls
        given = [call.canonical if call.fixed or not call.name else "" for call in calls]
        self._taken.update(given)
        if "" in given:
            # Numbers that the ids themselves tell come before those that are made up.
            for place, call in enumerate(calls):
                if not given[place] and call.canonical and call.canonical not in self._taken:
                    given[place] = call.canonical
                    self._taken.add(call.canonical)
            for place, call in enumerate(calls):
                if not given[place] and call.name:
                    given[place] = self._free(call.name, self._count + place)
        self._latest = tuple(
            _Asked(number, id, call.name)
            for number, (call, id) in enumerate(zip(calls, given, strict=True), self._count)
        )
        self._count += len(calls)
        same: dict[str, tuple[_Asked, ...]] = {}
        for call, asked in zip(calls, self._latest, strict=True):
            for id in {call.id, asked.id}:
                same[id] = (*same.get(id, ()), asked)
        self._by_id.update(same)
        return given

    def answer(self, id: str) -> _Asked | None:
        """Return the call that a result with this id belongs to; "" is the next open one."""
        done = self._answered
        if id:
            candidates = self._by_id.get(id, ())
            self._taken.add(id)
        else:
            candidates = tuple(asked for asked in self._latest if asked.number not in done)
        if not candidates:
            return None
        # Calls that share an id are answered in their order.
        asked = next((one for one in candidates if one.number not in done), candidates[-1])
        done.add(asked.number)
        return asked

    def _free(self, name: str, number: int) -> str:
        number = max(number, self._next.get(name, 0))
        while (id := _canonical(name, number)) in self._taken:
            number += 1
        self._next[name] = number + 1
        self._taken.add(id)
        return id


def _canonical(name: str, number: int) -> str:
    return f"functions.{name}:{number}"


@dataclass(frozen=True, slots=True)
class _Mended:
    """What became of the first messages of a conversation, and which calls they made."""

    length: int
    size: int
    """How much of the array's JSON text they take, from its bracket on."""
    digest: bytes
    """Of that text."""
    text: bytes
    """What takes its place; empty when nothing was mended."""
    calls: _Calls


_NOTHING = _Mended(0, 0, b"", b"", _Calls())
# By what a conversation begins with: its latest request, which the next one goes on from.
_mended: Memo[bytes, _Mended] = Memo(24)
_MAX_REMEMBERED = 2_000_000


class _Call(msgspec.Struct, frozen=True, gc=False):
    position: int
    id: str
    """As the client sent it; a number as its digits."""
    name: str
    canonical: str
    """What the id itself says it should be; for a call without a name, what it is."""
    fixed: bool
    """It was canonical at the provider, so it is that whatever other calls are called."""
    aliases: tuple[str, ...]
    """The ids under which the provider may have sent it."""
    mends_arguments: bool


class _Asking(msgspec.Struct, frozen=True, gc=False):
    """An assistant message with calls."""

    calls: tuple[_Call, ...]
    lacks_reasoning: bool


class _Answering(msgspec.Struct, frozen=True, gc=False):
    """A tool message."""

    id: str
    has_name: bool


_Known = _Asking | _Answering | Literal["other"]
_OTHER: Literal["other"] = "other"
# A conversation comes again with every turn; only what is new in it is decoded.
_known: Memo[bytes, _Known] = Memo(_REMEMBERED)


class _Named(msgspec.Struct, gc=False):
    name: str | None = None


class _Function(_Named, gc=False):
    arguments: msgspec.Raw = msgspec.Raw()


class _WireCall(msgspec.Struct, gc=False):
    id: str | None = None
    type: str | None = None
    function: _Function | None = None
    custom: _Named | None = None


class _WireMessage(msgspec.Struct, gc=False):
    role: str | None = None
    tool_calls: list[_WireCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: msgspec.Raw = msgspec.Raw()


class _Object(msgspec.Struct):
    """Any JSON object: without fields there is nothing to be built."""


_MESSAGE = msgspec.json.Decoder(_WireMessage)
_OBJECT = msgspec.json.Decoder(_Object)
_EMPTY = (b"", b"null", b'""')


def _look(text: bytes) -> _Known:
    if b'"tool' not in text:  # the role, tool_calls and tool_call_id all begin so
        return _OTHER
    try:
        message = _MESSAGE.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _look_closely(text)
    if message.role == "tool":
        return _Answering(message.tool_call_id or "", bool(message.name))
    if message.role != "assistant" or not message.tool_calls:
        return _OTHER
    calls = []
    for position, call in enumerate(message.tool_calls):
        if call.type == "custom" or call.function is None:
            name, mends = (call.custom.name if call.custom else None), False
        else:
            name = call.function.name
            mends = not _is_arguments(bytes(call.function.arguments))
        calls.append(_call(position, call.id or "", name or "", mends))
    return _Asking(tuple(calls), bytes(message.reasoning_content) in _EMPTY)


def _look_closely(text: bytes) -> _Known:
    """Do as `_look` where types are wrong, or the text is JSON for Python only (NaN).

    What has a wrong type counts as missing.
    """
    try:
        message = decode(text)
    except NotJSON:
        return _OTHER
    if not isinstance(message, dict):
        return _OTHER
    if message.get("role") == "tool":
        return _Answering(_id(message.get("tool_call_id")), bool(_text(message.get("name"))))
    given = message.get("tool_calls")
    if message.get("role") != "assistant" or not isinstance(given, list):
        return _OTHER
    calls = []
    for position, call in enumerate(given):
        if not isinstance(call, dict):
            continue
        is_custom = call.get("type") == "custom" or not isinstance(call.get("function"), dict)
        holder = call.get("custom" if is_custom else "function")
        function = holder if isinstance(holder, dict) else {}
        arguments = function.get("arguments")
        mends = not is_custom and not (isinstance(arguments, str) and _is_object(arguments))
        calls.append(_call(position, _id(call.get("id")), _text(function.get("name")), mends))
    if not calls:
        return _OTHER
    return _Asking(tuple(calls), message.get("reasoning_content") in (None, ""))


def _call(position: int, id: str, name: str, mends_arguments: bool) -> _Call:
    original = ids.decode(id)
    fixed = ids.is_canonical(original)
    canonical = original if fixed else id if not name else _told(original, name)
    aliases = tuple(dict.fromkeys(one for one in (id, original, canonical) if one))
    return _Call(position, id, name, canonical, fixed, aliases, mends_arguments)


def _told(id: str, name: str) -> str:
    """Return the canonical form of `NAME:N`, which Moonshot's own API gives; else ""."""
    said, _, number = id.strip().removeprefix("functions.").rpartition(":")
    # int() refuses more than 4300 digits, and no conversation has a billion calls.
    is_number = number.isascii() and number.isdigit() and len(number) < 10
    return _canonical(name, int(number)) if is_number and said.strip() == name.strip() else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _id(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value)


def _arguments(message: bytes, path: Path) -> str:
    """Return what takes the place of a call's arguments: the text of a JSON object."""
    span = locate(message, 0, path)
    raw = message[slice(*span)] if span else b""
    if raw.startswith(b'"'):
        text = _text(decode(raw))
    else:
        text = raw.decode("utf-8", "surrogateescape")
        if _is_object(text):
            return text
    if text.strip() in ("", "null"):
        return "{}"
    return encode({"_raw": text}).decode()


def _is_arguments(raw: bytes) -> bool:
    return raw.startswith(b'"') and _is_object(_text(decode(raw)))


def _is_object(text: str) -> bool:
    try:
        _OBJECT.decode(text)
    except msgspec.ValidationError:
        return False
    except RecursionError:
        return True  # nobody can tell
    except (msgspec.MsgspecError, UnicodeEncodeError):
        # Lone surrogates are JSON all the same.
        try:
            return isinstance(json.loads(text, parse_int=str, parse_constant=_refuse), dict)
        except RecursionError:
            return True
        except ValueError:
            return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _reasoning(message: bytes) -> str:
    """Return the reasoning that a message carries in another field, as OpenRouter's do."""
    if b'"reasoning' not in message:
        return ""
    try:
        found = decode(message)
    except NotJSON:
        return ""
    if said := _text(found.get("reasoning")):
        return said
    details = found.get("reasoning_details")
    return "".join(
        _text(detail.get("text"))
        for detail in (details if isinstance(details, list) else ())
        if isinstance(detail, dict) and detail.get("type") == "reasoning.text"
    )


class _Place(msgspec.Struct, frozen=True, gc=False):
    """Where a value goes in a message, and what it needs around it when it is added."""

    start: int
    end: int
    before: bytes = b""
    after: bytes = b""


_Placed = tuple[tuple[_Place, bytes], ...]

# The scan that finds a value costs more than all the rest, and most histories are mended
# in the same places with every turn: Moonshot's own ids are foreign, for one.
_places: Memo[tuple[bytes, tuple[Path, ...]], list[_Place]] = Memo(_REMEMBERED)


def _placed(
    raw: bytes | msgspec.Raw, digest: bytes, edits: dict[Path, bytes], has_key: bool
) -> _Placed:
    """Return a message's edits with their places in it, in order.

    `has_key`: the message is known to have the key of its calls, or of its call's id.
    """
    key = (digest, tuple(edits))
    places = _places.get(key)
    if places is None:
        message = bytes(raw)
        # Where a key may be spelled with escapes, only reading it all tells where it is.
        quick = has_key and message.startswith(b'{"') and b"\\u00" not in message
        places = [(quick and _found(message, path)) or _place(message, path) for path in edits]
        _places.put(key, places)
    return tuple(sorted(zip(places, edits.values(), strict=True), key=lambda pair: pair[0].start))


def _found(message: bytes, path: Path) -> _Place | None:
    """Return the place of a value without reading what stands before it, or None.

    In the text of a string a quote has a backslash before it, so a quoted key that stands in the
    message once is a key, and the one that the message is known to have.
    """
    key = encode(path[0])
    at = message.find(key)
    if path == ("name",):
        return None if at >= 0 else _Place(1, 1, key + b":", b",")
    if path[0] not in ("tool_calls", "tool_call_id") or message.find(key, at + 1) >= 0:
        return None
    at = message.find(b":", at + len(key)) + 1
    span = locate(message, at, path[1:]) if at else None
    return _Place(*span) if span else None


def _place(message: bytes, path: Path) -> _Place:
    if (span := locate(message, 0, path)) is not None:
        return _Place(*span)
    holder = locate(message, 0, path[:-1])
    if holder is None:
        raise KeyError(path)
    at = holder[0] + 1
    is_empty = message[at : holder[1] - 1].isspace() or at == holder[1] - 1
    return _Place(at, at, encode(path[-1]) + b":", b"" if is_empty else b",")
