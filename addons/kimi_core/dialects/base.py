"""What a dialect can tell of a request and a reply, and how it says no."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from msgspec import Raw

from kimi_core.document import Document, NotJSON, Shape, decode, encode
from kimi_core.exchange import Category, Message, Operation, Part, Reply, Role, ToolCall
from kimi_core.usage import UsageReader

UnitKind = Literal["system", "tools", "message"]


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of a request's context as JSON text: what is counted and recognised as one."""

    kind: UnitKind
    raw: bytes | Raw
    path: tuple[str | int, ...]
    """Where it stands in the request's body."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that the rules offer to clients."""

    id: str
    provider: str
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """What a request's path says: which dialect and operation, and what stands in the path."""

    dialect: Dialect
    operation: Operation
    provider: str = ""
    model: str = ""
    rest: str = ""
    """The path below the provider's base URL, as this dialect appends it."""


class Dialect(ABC):
    """A provider API's wire format: reading requests and replies, and answering in it."""

    name: ClassVar[str]
    shape: ClassVar[Shape]

    @abstractmethod
    def units(self, document: Document) -> Iterator[Unit]:
        """Yield the request's context in the order in which the model reads it."""

    @abstractmethod
    def read(self, unit: Unit) -> Message:
        """Return a unit as a message. Raises NotJSON; unknown shapes become `other` parts."""

    @abstractmethod
    def reader(self) -> ReplyReader:
        """Return a new reader for one reply, streamed or whole."""

    @abstractmethod
    def error(self, status: int, message: str, type: str = "") -> bytes:
        """Return the body of an error in this dialect."""

    @abstractmethod
    def models(self, offers: Sequence[Offer]) -> bytes:
        """Return the body that lists models in this dialect."""

    def error_event(self, status: int, message: str, type: str = "") -> bytes:
        """Return the bytes of an error in the middle of a stream."""
        return b"data: " + self.error(status, message, type) + b"\n\n"

    def model(self, document: Document, path_model: str) -> str:
        """Return the model that the client asks for, empty when it names none."""
        value = document.get("model")
        return value if isinstance(value, str) else ""

    def streams(self, document: Document, path: str) -> bool:
        """Tell whether the client asked for a stream."""
        return document.get("stream") is True

    def asks_usage(self, document: Document) -> bool:
        """Tell whether a stream will carry usage without our asking."""
        return True

    def client_session(self, document: Document) -> str:
        """Return the client's own id of the conversation, empty when it sends none."""
        return ""

    def key(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str:
        """Return the key that the client sent, empty when there is none."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""

    def authorization(self, key: str) -> tuple[str, str]:
        """Return the header by which this dialect's providers take a key."""
        return "authorization", f"Bearer {key}"


class ReplyReader(ABC):
    """Reads one reply into a Reply: `feed` takes a whole body or one event's payload."""

    def __init__(self) -> None:
        self.reply = Reply()
        self._usage = UsageReader()
        self._calls: dict[Any, tuple[list[str], str, str]] = {}

    def feed(self, data: bytes) -> None:
        """Take one payload; what is no JSON object, and every unknown event, is ignored."""
        if not data.startswith(b"{"):
            if data.strip() == b"[DONE]":
                self.reply.complete = True
                return
            if not data.lstrip().startswith((b"{", b"[")):
                return
        try:
            payload = decode(data)
        except NotJSON:
            return
        for item in payload if isinstance(payload, list) else (payload,):
            if isinstance(item, dict):
                self._usage.feed(item)
                self.take(item)

    def finish(self) -> Reply:
        """Return the reply as far as it came."""
        self.reply.usage = self._usage.usage
        self.reply.tool_calls = [
            ToolCall(name, "".join(pieces), id) for pieces, name, id in self._calls.values()
        ]
        return self.reply

    @abstractmethod
    def take(self, payload: dict[str, Any]) -> None:
        """Take one payload, a dict that a provider sent."""

    def _call(self, key: Any, name: Any = "", id: Any = "", arguments: Any = "") -> None:
        pieces, known_name, known_id = self._calls.get(key, ([], "", ""))
        if arguments:
            pieces.append(arguments if isinstance(arguments, str) else json_text(arguments))
        self._calls[key] = (pieces, known_name or text(name), known_id or text(id))

    def _identify(self, payload: Mapping[str, Any], model: str = "model", id: str = "id") -> None:
        if not self.reply.model and isinstance(value := payload.get(model), str):
            self.reply.model = value
        if not self.reply.id and isinstance(value := payload.get(id), str):
            self.reply.id = value

    def _fail(self, error: Any, *names: str) -> None:
        found = ""
        if isinstance(error, Mapping):
            found = next((str(error[name]) for name in names if error.get(name)), "")
        self.reply.error = self.reply.error or found or "error"


def text(value: Any) -> str:
    """Return `value` when it is a string, else the empty string."""
    return value if isinstance(value, str) else ""


def json_text(value: Any) -> str:
    """Return a decoded value as compact JSON text."""
    return encode(value).decode("utf-8", "replace")


def mappings(value: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (index, element) for each object in a list; nothing for anything else."""
    if isinstance(value, list):
        for index, element in enumerate(value):
            if isinstance(element, dict):
                yield index, element


def tools_message(raw: bytes | Raw) -> Message:
    """Return tool definitions as a message with one part."""
    content = bytes(raw)
    return Message("system", (Part("other", "tools", content.decode("utf-8", "replace")),), content)


CATEGORY_OF: dict[Role, Category] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool_result",
}
