"""What every dialect needs to write one reply, and the bytes of an event."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from .reply import Received, Reply
from .tokens import TokenUsage, output_tokens, split

CREATED = 1_760_000_000
"""The `created` of every reply (unix seconds), fixed so that bodies can be compared."""

Json = dict[str, Any]

encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Answer:
    """One reply to one request. `number` makes ids unique within a fake provider."""

    reply: Reply
    received: Received
    number: int
    provider: str

    @cached_property
    def model(self) -> str:
        return self.received.model or "unnamed"

    @cached_property
    def usage(self) -> TokenUsage:
        return self.reply.usage_for(self.received)

    def id(self, prefix: str) -> str:
        """Return an id such as `chatcmpl-000000000007`."""
        return f"{prefix}{self.number:012x}"

    def deltas(self, text: str) -> list[str]:
        return split(text, self.reply.delta_chars)

    def spent(self, text: str) -> int:
        """Return the output tokens of what has been sent so far, never above the final number."""
        return min(output_tokens(text), self.usage.output)


def event(data: Json, name: str | None = None) -> bytes:
    """Return one server-sent event, with its blank line."""
    head = b"event: " + name.encode() + b"\ndata: " if name else b"data: "
    return head + encode(data) + b"\n\n"


def loads_object(arguments: str) -> Json:
    """Return a tool call's arguments for the dialects that carry them as an object.

    Raises ValueError for what only the string-typed dialects can carry.
    """
    value = json.loads(arguments or "{}")
    if not isinstance(value, dict):
        raise ValueError(f"tool arguments must be a JSON object, not {arguments!r}")
    return value
