"""Server-sent events and streamed JSON arrays: bytes to events and back, incrementally.

Implements https://html.spec.whatwg.org/multipage/server-sent-events.html (read 2026-11-21).
Each event keeps the bytes it came in, so that what nobody changed leaves as it came.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

MAX_EVENT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream, or (`type` "body") a whole reply.

    `data` is the payload, lines joined by a line feed; `raw` the bytes as received: those of
    all events, joined, are the stream. An event without data (a comment, a keep-alive, a
    piece of an event that is too large to be read) is passed on and otherwise ignored.
    """

    data: bytes
    raw: bytes
    type: str = ""


class Framing(Protocol):
    """Cuts a reply's bytes into events: the same ones, wherever the bytes are cut."""

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that `data` completes.

        An event larger than the framing's `max_bytes` comes in pieces without data.
        """
        ...

    def end(self) -> list[Event]:
        """Return what is left when the stream ends, complete or not."""
        ...

    def encode(self, data: bytes, type: str = "") -> bytes:
        """Return `data` as the bytes of one event."""
        ...


class SSE:
    """Text/event-stream, whatever the line ends and wherever the bytes are cut."""

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()  # to grow by small pieces in linear time
        self._scanned = 0  # no blank line begins before this offset
        self._returns = False  # the stream has a \r somewhere
        self._first = True
        self._too_large = False

    def feed(self, data: bytes) -> list[Event]:
        self._returns = self._returns or b"\r" in data
        buffer = self._buffer
        buffer += data
        events: list[Event] = []
        start, scan = 0, self._scanned
        while (end := self._blank_line(scan)) >= 0:
            events.append(self._event(bytes(buffer[start:end])))
            start = scan = end
        if start:
            del buffer[:start]
        # All but the last byte of "\r\n\r\n" may have come.
        self._scanned = max(0, len(buffer) - 3)
        if self._scanned and (self._too_large or len(buffer) > self._max_bytes):
            self._too_large = True
            self._first = False
            events.append(Event(b"", bytes(buffer[: self._scanned])))
            del buffer[: self._scanned]
            self._scanned = 0
        return events

    def end(self) -> list[Event]:
        # "Once the end of the file is reached, any pending data must be discarded", but providers
        # leave out the last blank line, and what was paid for must be counted.
        rest, self._buffer = bytes(self._buffer), bytearray()
        self._scanned = 0
        return [self._event(rest)] if rest else []

    def encode(self, data: bytes, type: str = "") -> bytes:
        head = b"event: " + type.encode() + b"\n" if type else b""
        return head + b"".join(b"data: " + line + b"\n" for line in _lines(data)) + b"\n"

    def _blank_line(self, scan: int) -> int:
        """Return where the next blank line ends, or -1."""
        if not self._returns:
            at = self._buffer.find(b"\n\n", scan)
            return at + 2 if at >= 0 else -1
        found = _BLANK_LINE.search(self._buffer, scan)
        return found.end() if found else -1

    def _event(self, raw: bytes) -> Event:
        if self._too_large or len(raw) > self._max_bytes:
            self._too_large = self._first = False
            return Event(b"", raw)
        text = raw
        if self._first:
            self._first = False
            text = text.removeprefix(b"\xef\xbb\xbf")
        # One line of data, as nearly always.
        one_line = text.endswith(b"\n\n") and text.find(b"\n") == len(text) - 2
        if one_line and text.startswith(b"data: ") and b"\r" not in text:
            return Event(text[6:-2], raw)
        data: list[bytes] = []
        type_ = ""
        for line in _lines(text):
            name, colon, value = line.partition(b":")
            if colon and value.startswith(b" "):
                value = value[1:]
            # "If the line starts with a U+003A COLON character (:) Ignore the line."
            if name == b"data":
                data.append(value)
            elif name == b"event":
                type_ = value.decode("utf-8", "replace")
        return Event(b"\n".join(data), raw, type_)


# Two line ends in a row; one is \n, \r\n or \r, and a \r in the last place may yet become \r\n.
_BLANK_LINE = re.compile(rb"(?:\r\n?+|\n)(?:\r\n|\n|\r(?=[^\n]))")


def _lines(text: bytes) -> list[bytes]:
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return text.split(b"\n")


class JSONArray:
    """A JSON array whose elements come one by one: `[{...},` newline `{...}]`.

    Gemini streams so without `alt=sse`. Each object or array in it is an event; brackets,
    commas and white space around it travel in its `raw`. A stream that is one object
    and no array is one event.
    """

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._at = 0  # what stands before this offset has been read
        self._depth = 0
        self._outside = -1  # the depth at which no element is open; -1: nothing was read yet
        self._string = False
        self._start = -1
        self._too_large = False

    def feed(self, data: bytes) -> list[Event]:
        buffer = self._buffer
        buffer += data
        events: list[Event] = []
        taken = 0
        at = self._at
        while at < len(buffer):
            if self._string:
                at = _match_end(_IN_STRING, buffer, at)
                if buffer[at : at + 1] != b'"':
                    break  # the end, or half an escape
                self._string = False
                at += 1
            at = _match_end(_BETWEEN, buffer, at)
            byte = bytes(buffer[at : at + 1])
            if byte == b'"':
                self._string = True
            elif byte in (b"{", b"["):
                if self._outside < 0:
                    self._outside = 1 if byte == b"[" else 0
                if self._depth == self._outside:
                    self._start = at
                self._depth += 1
            elif byte:
                self._depth -= 1
                if self._depth == self._outside and self._start >= 0:
                    events.append(self._event(taken, at + 1))
                    taken = at + 1
            at += len(byte)
        if len(buffer) - taken > self._max_bytes or (self._too_large and at > taken):
            self._too_large = True
            events.append(Event(b"", bytes(buffer[taken:at])))
            taken = at
        del buffer[:taken]
        self._at = at - taken
        if self._start >= 0:
            self._start = max(0, self._start - taken)
        return events

    def end(self) -> list[Event]:
        rest = bytes(self._buffer)
        events = [self._event(0, len(rest))] if rest else []
        self._buffer, self._at = bytearray(), 0
        return events

    def encode(self, data: bytes, type: str = "") -> bytes:
        return b",\n" + data

    def _event(self, taken: int, end: int) -> Event:
        raw = bytes(self._buffer[taken:end])
        data = raw[self._start - taken :] if self._start >= 0 else b""
        if self._too_large or len(raw) > self._max_bytes:
            self._too_large, data = False, b""
        self._start = -1
        return Event(data, raw)


# Possessive: what was taken is never given back, so time is linear.
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_BETWEEN = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)


def _match_end(pattern: re.Pattern[bytes], text: bytearray, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


__all__ = ["SSE", "Event", "Framing", "JSONArray"]
