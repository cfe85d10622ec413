"""A JSON object as its bytes: values are read from it, edits are spliced into it.

Nothing is ever re-encoded as a whole, so unknown fields, the order of keys, big
numbers, escapes and white space keep their bytes.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

Path = tuple[str | int, ...]
Span = tuple[int, int]


class NotJSON(ValueError):
    """The bytes are no JSON object; the text says where they stop being one."""


class Shape:
    """The top-level keys that a dialect reads or edits, for a decoder made for them."""

    def __init__(self, *keys: str, arrays: Sequence[str] = ()) -> None:
        self.keys = frozenset((*keys, *arrays))
        self.arrays = frozenset(arrays)
        fields: list[tuple[str, Any, Any]] = [(key, msgspec.Raw, msgspec.Raw()) for key in keys]
        fields += [(key, list[msgspec.Raw] | None, None) for key in arrays]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Body", fields))

    def decode(self, body: bytes) -> Any:
        return self._decoder.decode(body)


class Document:
    """A JSON object: its values by top-level key, and the same bytes with edits.

    What is read is what stands there now, edits included. Where a key stands twice the
    last one counts, as in every JSON library of the providers.

    Raises NotJSON when `body` is no JSON object.
    """

    def __init__(self, body: bytes, shape: Shape) -> None:
        self.body = body
        """The bytes as they came, without the edits."""
        self._shape = shape
        self._edits: dict[Path, _Edit] = {}
        self._above: set[Path] = set()  # what leads to an edit
        self._values: dict[str, Any] = {}
        self._spans: dict[str, Span] | None = None
        self._base = 0
        self._top: Any = None
        try:
            self._top = shape.decode(body)
            self._base = _address(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            # msgspec refuses NaN, lone surrogates and a byte order mark that json takes, and
            # `messages` that are no list; the exact scanner takes them all.
            value = decode(body)
            if not isinstance(value, dict):
                raise NotJSON(f"expected an object, got {type(value).__name__}") from None
            self._spans = _spans(body)

    def raw(self, key: str) -> bytes:
        """Return the JSON text of a top-level value, empty when there is none."""
        if (key,) in self._edits:
            return self._edits[key,].value
        span = self._span(key)
        if span is None:
            return b""
        text = self.body[slice(*span)]
        if (key,) in self._above:
            below = (edit for path, edit in self._edits.items() if path[0] == key)
            return _edited(text, [edit.moved(-span[0]) for edit in below])
        return text

    def get(self, key: str, default: Any = None) -> Any:
        """Return a top-level value, decoded; `default` when it is missing or null.

        What is nested too deeply to be decoded counts as missing.
        """
        if key not in self._values:
            raw = self.raw(key)
            try:
                self._values[key] = decode(raw) if raw else None
            except NotJSON:
                self._values[key] = None
        value = self._values[key]
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Tell whether the object has the key, null included."""
        return (key,) in self._edits or self._span(key) is not None

    def elements(self, key: str) -> list[bytes | msgspec.Raw]:
        """Return the JSON text of each element of a top-level array; [] when it is none."""
        edited = (key,) in self._edits or (key,) in self._above
        if self._top is not None and key in self._shape.arrays and not edited:
            return list(getattr(self._top, key) or ())
        text = self.raw(key)
        if not text.startswith(b"["):
            return []
        try:
            return list(_LIST.decode(text))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return [text[start:end] for start, end in _items(text, 0)]

    def set(self, path: Path, value: Any) -> None:
        """Put `value` where `path` leads; a missing last key of an object is added.

        Raises KeyError when the path leads nowhere.
        """
        self.set_raw(path, encode(value))

    def set_raw(self, path: Path, value: bytes) -> None:
        """Like `set`, with JSON text."""
        for length in range(1, len(path)):
            if (held := self._edits.get(path[:length])) is not None:
                text = _edited(held.value, [_place(held.value, 0, path[length:], value)])
                self._edits[path[:length]] = held.with_value(text)
                break
        else:
            if path in self._edits:
                self._edits[path] = self._edits[path].with_value(value)
            else:
                self._edits[path] = self._place(path, value)
            if path in self._above:
                inner = [p for p in self._edits if len(p) > len(path) and p[: len(path)] == path]
                for below in inner:
                    del self._edits[below]
            self._above.update(path[:length] for length in range(1, len(path)))
        self._values.pop(str(path[0]), None)

    def set_elements(self, key: str, values: Mapping[int, bytes]) -> None:
        """Put JSON texts in the place of these elements of a top-level array.

        Raises KeyError when it has no such element.
        """
        known = self._top is not None and key in self._shape.arrays and (key,) not in self._above
        if not known or (key,) in self._edits:
            for index, value in values.items():
                self.set_raw((key, index), value)
            return
        elements = getattr(self._top, key) or ()
        for index, value in values.items():
            if index >= len(elements):
                raise KeyError((key, index))
            start = self._offset(elements[index])
            end = start + len(memoryview(elements[index]))
            self._edits[key, index] = _Edit(start, end, value)
        if values:
            self._above.add((key,))
        self._values.pop(key, None)

    def append_raw(self, path: Path, value: bytes) -> None:
        """Add JSON text as the last element of the array at `path`.

        Raises KeyError when no array stands there.
        """
        for length in range(1, len(path) + 1):
            if (held := self._edits.get(path[:length])) is not None:
                added = _element(held.value, 0, path[length:], value)
                self._edits[path[:length]] = held.with_value(_edited(held.value, [added]))
                break
        else:
            end, count = self._last(path)
            while (*path, count) in self._edits:  # what was added before
                count += 1
            self._edits[*path, count] = _Edit(end, end, value, before=b"," if count else b"")
            self._above.update(path[:length] for length in range(1, len(path) + 1))
        self._values.pop(str(path[0]), None)

    @property
    def edited(self) -> bool:
        return bool(self._edits)

    def edits(self) -> Edits:
        """Return the edits made so far, for `restore`."""
        return dict(self._edits), set(self._above)

    def restore(self, edits: Edits) -> None:
        """Undo what was edited since `edits` were taken."""
        self._edits, self._above = dict(edits[0]), set(edits[1])
        self._values.clear()

    def encode(self) -> bytes:
        """Return the body with all edits; the very bytes that came when there are none."""
        return _edited(self.body, self._edits.values()) if self._edits else self.body

    def locate(self, path: Path) -> Span | None:
        """Return where the value at `path` stands in `body`, or None."""
        step = path[1] if len(path) > 1 else None
        if isinstance(step, int) and self._top is not None and path[0] in self._shape.arrays:
            elements = getattr(self._top, str(path[0])) or ()
            if not 0 <= step < len(elements):
                return None
            start = self._offset(elements[step])
            if len(path) == 2:
                return start, start + len(memoryview(elements[step]))
            return locate(self.body, start, path[2:])
        span = self._span(str(path[0]))
        if span is None or len(path) == 1:
            return span
        return locate(self.body, span[0], path[1:])

    def _place(self, path: Path, value: bytes) -> _Edit:
        if (span := self.locate(path)) is not None:
            return _Edit(*span, value)
        start = _start(self.body)
        if len(path) > 1:
            holder = self.locate(path[:-1])
            if holder is None:
                raise KeyError(path)
            start = holder[0]
        return _addition(self.body, start, path, value)

    def _last(self, path: Path) -> tuple[int, int]:
        """Return where the last element of an array ends, and how many there are."""
        if len(path) == 1 and self._top is not None and path[0] in self._shape.arrays:
            elements = getattr(self._top, str(path[0]))
            if elements:
                last = elements[-1]
                return self._offset(last) + len(memoryview(last)), len(elements)
        span = self.locate(path)
        if span is None:
            raise KeyError(path)
        return _last(self.body, span[0], path)

    def _span(self, key: str) -> Span | None:
        if self._spans is not None:
            return self._spans.get(key)
        if key in self._shape.keys:
            value = getattr(self._top, key)
            if key in self._shape.arrays:
                if value:
                    # Between the brackets and the elements there is only white space.
                    start = self.body.rindex(b"[", 0, self._offset(value[0]))
                    last = self._offset(value[-1]) + len(memoryview(value[-1]))
                    return start, self.body.index(b"]", last) + 1
            else:
                size = len(memoryview(value))
                start = self._offset(value) if size else 0
                return (start, start + size) if size else None
        self._spans = _spans(self.body)
        return self._spans.get(key)

    def _offset(self, raw: msgspec.Raw) -> int:
        """Return where `raw` begins in the body.

        A Raw is a view of the bytes it was decoded from, so the distance of the two
        addresses is the offset: exact, and free of a second scan of the body.
        """
        offset = _address(raw) - self._base
        if not 0 <= offset <= len(self.body) - len(memoryview(raw)):  # pragma: no cover
            raise AssertionError("msgspec.Raw is no view of the decoded bytes")
        return offset


def decode(raw: bytes | msgspec.Raw) -> Any:
    """Return the value of JSON text; takes NaN, lone surrogates and bad UTF-8 as they come.

    Raises NotJSON.
    """
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        try:
            return json.loads(_text(bytes(raw).removeprefix(_BOM)), parse_int=_integer)
        except ValueError as error:
            raise NotJSON(str(error)) from None
        except RecursionError:
            raise NotJSON("objects or arrays are nested too deeply") from None


_MAX_REMEMBERED = 65_536
_latest: tuple[bytes, Any] = (b"", None)


def decode_once(raw: bytes) -> Any:
    """Return `decode(raw)`; the value is shared by all who ask for these bytes one after the other.

    It must not be changed. Raises NotJSON.
    """
    global _latest
    known = _latest
    if known[0] is raw:
        return known[1]
    value = decode(raw)
    if len(raw) <= _MAX_REMEMBERED:
        _latest = raw, value
    return value


def encode(value: Any) -> bytes:
    """Return compact JSON text; lone surrogates are escaped, NaN and infinity become null.

    Raises NotJSON for what is nested too deeply.
    """
    try:
        return msgspec.json.encode(value)
    except RecursionError:
        raise NotJSON("objects or arrays are nested too deeply") from None
    except (UnicodeEncodeError, msgspec.MsgspecError, OverflowError):
        return json.dumps(value, separators=(",", ":")).encode()


def splice(raw: bytes, path: Path, value: Any) -> bytes:
    """Return JSON text with the value at `path` replaced, or added to its object.

    Raises KeyError when the path leads nowhere.
    """
    return splice_all(raw, {path: value})


def splice_all(raw: bytes, values: Mapping[Path, Any]) -> bytes:
    """Like `splice`, with several values in one pass; none may stand within another."""
    spans: dict[Path, Span] = {}
    _locate_all(raw, _space(raw, 0), {path: path for path in values if path}, spans)
    edits = [
        _Edit(*spans[path], encode(value)) if path in spans else _place(raw, 0, path, encode(value))
        for path, value in values.items()
    ]
    return _edited(raw, edits)


def _locate_all(text: bytes, at: int, paths: Mapping[Path, Path], spans: dict[Path, Span]) -> None:
    """Find the spans of values below the one at `at`: each path leads to the name of its span."""
    below: dict[str | int, dict[Path, Path]] = {}
    for path, name in paths.items():
        below.setdefault(path[0], {})[path[1:]] = name
    found: dict[str | int, Span] = {}
    if text[at : at + 1] == b"{":
        for key, start, end in _members(text, at):
            if key in below:
                found[key] = start, end
    elif text[at : at + 1] == b"[":
        for index, span in enumerate(_items(text, at)):
            if index in below:
                found[index] = span
    for step, (start, end) in found.items():
        deeper = below[step]
        if (here := deeper.pop((), None)) is not None:
            spans[here] = start, end
        if deeper:
            _locate_all(text, start, deeper, spans)


def locate(text: bytes, at: int, path: Path) -> Span | None:
    """Return the span of the value at `path` below the value that begins at `at`."""
    at = _space(text, at)
    for step in path:
        found: Span | None = None
        if isinstance(step, str):
            if text[at : at + 1] != b"{":
                return None
            for key, start, end in _members(text, at):
                if key == step:
                    found = start, end
        elif text[at : at + 1] == b"[":
            for index, span in enumerate(_items(text, at)):
                if index == step:
                    found = span
                    break
        if found is None:
            return None
        at = found[0]
    return at, _skip(text, at)


_BOM = b"\xef\xbb\xbf"
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
# Possessive throughout: what was taken is never given back, so time is linear.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^\s,\]}]++")
_STRUCTURE = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)


class _Edit:
    """Text that takes the place of `body[start:end]`.

    With a `key` it is a member that is added, with `before` an element after another one.
    """

    __slots__ = ("before", "end", "key", "start", "value")

    def __init__(
        self, start: int, end: int, value: bytes, key: bytes = b"", before: bytes = b""
    ) -> None:
        self.start, self.end, self.value, self.key, self.before = start, end, value, key, before

    def with_value(self, value: bytes) -> _Edit:
        return _Edit(self.start, self.end, value, self.key, self.before)

    def moved(self, by: int) -> _Edit:
        return _Edit(self.start + by, self.end + by, self.value, self.key, self.before)


Edits = tuple[dict[Path, _Edit], set[Path]]


def _edited(text: bytes, edits: Iterable[_Edit]) -> bytes:
    pieces: list[bytes] = []
    at = 0
    ordered = sorted(edits, key=lambda edit: edit.start)
    for index, edit in enumerate(ordered):
        pieces += (text[at : edit.start], edit.before, edit.key, edit.value)
        if edit.key:
            more = index + 1 < len(ordered) and ordered[index + 1].start == edit.start
            after = _space(text, edit.start)
            if more or text[after : after + 1] != b"}":
                pieces.append(b",")
        at = edit.end
    return b"".join([*pieces, text[at:]])


def _place(text: bytes, at: int, path: Path, value: bytes) -> _Edit:
    if (span := locate(text, at, path)) is not None:
        return _Edit(*span, value)
    holder = locate(text, at, path[:-1])
    if holder is None:
        raise KeyError(path)
    return _addition(text, holder[0], path, value)


def _addition(text: bytes, at: int, path: Path, value: bytes) -> _Edit:
    if not isinstance(path[-1], str) or text[at : at + 1] != b"{":
        raise KeyError(path)
    return _Edit(at + 1, at + 1, value, encode(path[-1]) + b":")


def _element(text: bytes, at: int, path: Path, value: bytes) -> _Edit:
    span = locate(text, at, path)
    if span is None:
        raise KeyError(path)
    end, count = _last(text, span[0], path)
    return _Edit(end, end, value, before=b"," if count else b"")


def _last(text: bytes, at: int, path: Path) -> tuple[int, int]:
    """Return where the last element of the array at `at` ends, and how many there are."""
    if text[at : at + 1] != b"[":
        raise KeyError(path)
    items = list(_items(text, at))
    return items[-1][1] if items else at + 1, len(items)


def _start(body: bytes) -> int:
    return _space(body, len(_BOM) if body.startswith(_BOM) else 0)


def _space(text: bytes, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _skip(text: bytes, at: int) -> int:
    """Return the end of the value at `at`. Raises NotJSON."""
    first = text[at : at + 1]
    if first == b'"' or first not in (b"{", b"["):
        match = (_STRING if first == b'"' else _SCALAR).match(text, at)
        if not match:
            raise NotJSON(f"no value at byte {at}")
        return match.end()
    depth = 0
    while True:
        match = _STRUCTURE.match(text, at)
        at = match.end() if match else at
        byte = text[at : at + 1]
        if byte == b'"':
            raise NotJSON(f"a string at byte {at} has no end")
        if not byte:
            raise NotJSON("the text ends inside an object or array")
        depth += 1 if byte in b"{[" else -1
        at += 1
        if not depth:
            return at


def _members(text: bytes, at: int) -> Iterator[tuple[str, int, int]]:
    at = _space(text, at + 1)
    while text[at : at + 1] == b'"':
        end = _skip(text, at)
        key = text[at + 1 : end - 1]
        name = decode(text[at:end]) if b"\\" in key else _text(key)
        at = _space(text, end)
        if text[at : at + 1] != b":":
            raise NotJSON(f"no colon at byte {at}")
        start = _space(text, at + 1)
        end = _skip(text, start)
        yield name, start, end
        at = _space(text, end)
        if text[at : at + 1] != b",":
            return
        at = _space(text, at + 1)


def _items(text: bytes, at: int) -> Iterator[Span]:
    at = _space(text, at + 1)
    while text[at : at + 1] not in (b"]", b""):
        end = _skip(text, at)
        yield at, end
        at = _space(text, end)
        if text[at : at + 1] != b",":
            return
        at = _space(text, at + 1)


def _spans(body: bytes) -> dict[str, Span]:
    """Return the span of each top-level value of an object that a decoder took."""
    return {key: (start, end) for key, start, end in _members(body, _start(body))}


def _text(raw: bytes) -> str:
    try:
        # As json.loads does with bytes: a surrogate that was encoded by itself is kept.
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape")


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # "Exceeds the limit (4300 digits) for integer string conversion"
        return float(digits)


class _Buffer(ctypes.Structure):
    # The stable ABI's Py_buffer: https://docs.python.org/3/c-api/buffer.html (read 2026-11-21)
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


# By item, since functions had as attributes are shared with everyone in the process.
_get_buffer = ctypes.pythonapi["PyObject_GetBuffer"]
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi["PyBuffer_Release"]
_release_buffer.argtypes = (ctypes.POINTER(_Buffer),)
_release_buffer.restype = None


def _address(source: bytes | msgspec.Raw) -> int:
    """Return the address of a buffer's first byte; valid while `source` lives."""
    view = _Buffer()
    _get_buffer(source, view, 0)
    address: int = view.buf or 0
    _release_buffer(view)
    return address
