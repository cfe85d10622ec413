"""The vocabulary of a scenario: what was received, and what shall be answered."""

import gzip
import json
import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs

import msgspec

from .routes import Route, route
from .tokens import TokenUsage, filler, input_tokens, output_tokens


class _Asked(msgspec.Struct):
    model: Any = None
    stream: Any = False
    stream_options: Any = None


@dataclass(frozen=True)
class Received:
    """A request as it arrived; `headers` in their order and, on HTTP/1.1, in their own case."""

    method: str
    scheme: str
    authority: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes
    http_version: str
    sni: str | None = None

    @cached_property
    def host(self) -> str:
        """The Host header or `:authority`, lower case and without a port."""
        name, _, port = self.authority.lower().rpartition(":")
        return name if name and port.isdigit() else self.authority.lower()

    @cached_property
    def route(self) -> Route | None:
        return route(self.path)

    def header(self, name: str) -> str | None:
        """Return the first value of a header, whatever its case."""
        name = name.lower()
        return next((v for k, v in self.headers if k.lower() == name), None)

    @property
    def content(self) -> bytes:
        """The body without its gzip coding, if it has one."""
        return (
            gzip.decompress(self.body) if self.header("content-encoding") == "gzip" else (self.body)
        )

    def json(self) -> Any:
        """Return the parsed body. Raises ValueError."""
        return json.loads(self.content)

    @cached_property
    def asked(self) -> _Asked | None:
        # Typed decoding skips the messages: reading 200 KB costs a fifth of json.loads.
        try:
            return msgspec.json.decode(self.content, type=_Asked)
        except (msgspec.DecodeError, UnicodeError):
            pass
        try:
            return msgspec.convert(self.json(), _Asked)
        except (ValueError, msgspec.ValidationError):
            return None

    @property
    def model(self) -> str | None:
        """The model that the path or the body names."""
        if self.route and self.route.model:
            return self.route.model
        return self.asked.model if self.asked and isinstance(self.asked.model, str) else None

    @property
    def stream(self) -> bool:
        """Whether a stream is asked for: by the path for Gemini, by the body elsewhere."""
        if self.route and self.route.stream is not None:
            return self.route.stream
        return bool(self.asked and self.asked.stream is True)

    @property
    def include_usage(self) -> bool:
        options = self.asked.stream_options if self.asked else None
        return isinstance(options, dict) and options.get("include_usage") is True

    @property
    def key(self) -> str | None:
        """The API key, wherever a dialect carries it."""
        scheme, _, token = (self.header("authorization") or "").partition(" ")
        if scheme.lower() == "bearer":
            return token
        for name in ("x-api-key", "x-goog-api-key"):
            if value := self.header(name):
                return value
        return next(iter(parse_qs(self.query).get("key", ())), None)


class ToolCall(NamedTuple):
    id: str
    name: str
    arguments: str
    """JSON text, as the OpenAI dialect carries it; may be invalid on purpose there."""


@dataclass(frozen=True)
class Abort:
    """Break the reply off once `after` bytes of its (encoded) body are sent; None: before any.

    `reset` sends a TCP RST, `close` closes the connection in order but without the end of the
    body, `stream` resets the one HTTP/2 stream (on HTTP/1.1 the same as `close`).
    """

    after: int | None = None
    how: Literal["reset", "close", "stream"] = "reset"


@dataclass(frozen=True)
class Framing:
    """How the bytes of a reply reach the wire.

    `pieces`: one write (HTTP/1.1: one chunk, HTTP/2: one or more DATA frames) per event, for the
    whole body, per n bytes, or between the given cut points; cut points may split a character.
    `first_delay_s` passes before the status line, `delay_s` before each piece but the first.
    `hang`: wait for this event once `hang_after` pieces are out; None means before the status
    line.
    `gzip`: `pieces` compresses and flushes each piece, `whole` compresses once and cuts the
    result. Applied if the client accepts gzip, or always with `gzip_unasked`.
    `newline`: of the event stream; None is the dialect's own (Gemini: CRLF).
    `length`: `auto` sends content-length, and chunks where it is a stream; `chunked` always
    chunks; `close` sends neither and ends the body by closing. `connection_close` closes after
    the reply and says so. These two are HTTP/1.1's.
    """

    pieces: Literal["event", "whole"] | int | tuple[int, ...] = "event"
    first_delay_s: float = 0.0
    delay_s: float = 0.0
    hang: threading.Event | None = None
    hang_after: int | None = None
    gzip: Literal["pieces", "whole"] | None = None
    gzip_unasked: bool = False
    newline: Literal["\n", "\r\n", "\r"] | None = None
    length: Literal["auto", "chunked", "close"] = "auto"
    connection_close: bool = False
    abort: Abort | None = None


@dataclass(frozen=True)
class Reply:
    """What the fake provider answers; every default gives a plain, correct answer.

    `text`: None gives `size` characters of prose, or nothing beside tool calls.
    `delta_chars`: length of a text, reasoning or arguments delta. A huge event is one large delta.
    `finish_reason`: in OpenAI's words, translated for the dialect; words unknown to it stay.
    `usage`: None is counted by `input_tokens` and `output_tokens`.
    `status` from 400 on gives an error body in the dialect, with `error` as its message.
    `stream_error`: an error event in a stream that began with 200, after `stream_error_after`
    events.
    `provider`: whose quirks; None looks the host up in `routes.PROVIDERS`.
    `body` and `events` replace what would be rendered; `events` are sent as they are.
    `malformed`: `invalid_json` puts an event with cut JSON in the middle, `half_event` ends the
    stream within its last event, `no_end` leaves out the dialect's closing event ([DONE],
    message_stop, response.completed) and keeps the rest.
    """

    text: str | None = None
    size: int = 120
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    usage: TokenUsage | None = None
    delta_chars: int = 16
    status: int = 200
    error: str | None = None
    error_type: str | None = None
    stream_error: str | None = None
    stream_error_after: int = 3
    headers: dict[str, str] = field(default_factory=dict)
    provider: str | None = None
    body: bytes | None = None
    events: tuple[bytes, ...] | None = None
    malformed: frozenset[Literal["invalid_json", "half_event", "no_end"]] = frozenset()
    framing: Framing = Framing()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tool_calls", tuple(ToolCall(*c) for c in self.tool_calls))

    @cached_property
    def said(self) -> str:
        """The text that goes out: the scripted one, or prose of the set size."""
        if self.text is None:
            return "" if self.tool_calls else filler(self.size)
        return self.text

    @property
    def finish(self) -> str:
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")

    def usage_for(self, received: Received) -> TokenUsage:
        """Return the usage this reply reports for that request."""
        if self.usage:
            return self.usage
        reasoning = output_tokens(self.reasoning)
        calls = sum(output_tokens(c.name + c.arguments) for c in self.tool_calls)
        return TokenUsage(
            input=input_tokens(received.body),
            output=output_tokens(self.said) + calls + reasoning,
            reasoning=reasoning,
        )
