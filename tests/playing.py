"""Replies that come one after the other to one exchange, and what its client gets of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kimi_core import dialects
from kimi_core.attempts import Turn, stage
from kimi_core.dialects import Dialect
from kimi_core.exchange import Reply as Read
from kimi_core.pipe import whole
from kimi_core.sse import SSE
from upstream import Received, Reply
from upstream.render import render

_PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}


@dataclass
class Played:
    """What the client got of a number of attempts, and why each but the last was rejected."""

    body: bytes
    rejected: list[str]
    read: Read
    asked: list[bytes] = field(default_factory=list)
    """The bodies of the requests."""

    @property
    def calls(self) -> list[tuple[str, str]]:
        return [(call.name, call.arguments or "{}") for call in self.read.tool_calls]

    @property
    def text(self) -> str:
        return "".join(self.read.text)


def rendered(
    reply: Reply, dialect: Dialect, *, stream: bool, number: int = 0, provider: str = ""
) -> bytes:
    """Return the bytes of a reply as the provider sends them."""
    asked: dict[str, Any] = {"model": "m", "stream": stream}
    if provider != "mistral":  # which refuses it, and tells usage unasked
        asked["stream_options"] = {"include_usage": True}
    received = Received(
        method="POST",
        scheme="https",
        authority="api.anthropic.com" if dialect is dialects.ANTHROPIC else "api.openai.com",
        path=_PATHS[dialect.name],
        query="",
        headers=[],
        body=json.dumps(asked).encode(),
        http_version="HTTP/1.1",
    )
    made = render(received, replace(reply, provider=provider or None), number)
    return made.body if made.events is None else b"".join(made.events)


def play(
    turn: Turn,
    dialect: Dialect,
    replies: Sequence[Reply | bytes],
    *,
    stream: bool = True,
    cut: int = 0,
    provider: str = "",
    asked: bytes = b"",
) -> Played:
    """Let the replies come one after the other, for as long as they are asked for.

    Given the body that asks for the first, those that ask for the others are made too.
    """
    bodies = [asked]
    out: list[bytes] = []
    rejected: list[str] = []
    for number, reply in enumerate(replies):
        body = reply
        if isinstance(reply, Reply):
            body = rendered(reply, dialect, stream=stream, number=number, provider=provider)
        assert isinstance(body, bytes)
        through = stage(turn, dialect)
        if stream:
            framing = SSE()
            pieces = [body] if not cut else [body[i : i + cut] for i in range(0, len(body), cut)]
            events = [event for piece in pieces for event in framing.feed(piece)]
            events += framing.end()
            out += [one.raw for event in events for one in through.feed(event)]
            out += [one.raw for one in through.end()]
        else:
            out.append(whole("x", [through], body))
        if not turn.rejected:
            break
        rejected.append(turn.rejected)
        if asked:
            bodies.append(asyncio.run(turn.next_body(bodies[-1], dialect)))
    reader = dialect.reader()
    if stream:
        for event in SSE().feed(b"".join(out)):
            reader.feed(event.data)
    else:
        reader.feed(b"".join(out))
    return Played(b"".join(out), rejected, reader.finish(), bodies)


def payloads(body: bytes) -> list[Any]:
    events = [event for event in SSE().feed(body) if event.data and event.data != b"[DONE]"]
    return [json.loads(event.data) for event in events]


def assert_one_stream_of_chunks(body: bytes) -> None:
    chunks = payloads(body)
    assert len({(c["id"], c["model"], c["created"], c["object"]) for c in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["delta"].get("role") for choice in choices][1:].count("assistant") == 0
    assert choices[0]["delta"]["role"] == "assistant"
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [
        choices[-1]["finish_reason"]
    ]
    assert [bool(chunk.get("usage")) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    indexes = [call["index"] for c in choices for call in c["delta"].get("tool_calls", ())]
    assert sorted(set(indexes)) == list(range(len(set(indexes))))
    assert indexes == sorted(indexes)


def assert_one_stream_of_blocks(body: bytes) -> None:
    events = [event for event in payloads(body) if event["type"] != "ping"]
    types = [event["type"] for event in events]
    assert types[0] == "message_start"
    assert types[-2:] == ["message_delta", "message_stop"]
    assert {types.count(name) for name in ("message_start", "message_delta", "message_stop")} == {1}
    open_block, number = False, -1
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not open_block
            open_block, number = True, number + 1
        assert open_block
        assert event["index"] == number
        if event["type"] == "content_block_stop":
            open_block = False
    assert not open_block
    for event in SSE().feed(body):
        assert event.type == json.loads(event.data)["type"]
