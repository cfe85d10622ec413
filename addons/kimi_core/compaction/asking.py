"""A summary asked of a model: where, with what, and what became of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from kimi_core import dialects, tokens
from kimi_core.compaction.prompt import TEMPERATURE
from kimi_core.dialects import Dialect
from kimi_core.document import encode
from kimi_core.exchange import Reply, Usage
from kimi_core.pipe import decoder
from kimi_core.relay import Client, Request, Response, UpstreamFailed
from kimi_core.rules import Price

_MAX_OUTPUT_TOKENS = 4096
_MAX_REPLY_BYTES = 4 * 1024 * 1024
# A model that thinks in its text, where nobody mends it.
_THOUGHT = re.compile(r"\A.*</think(?:ing)?>", re.DOTALL)
_CUT = frozenset(("length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "incomplete"))


class SummaryFailed(Exception):
    """No summary came; the text says why, without a word of the conversation or a key.

    `usage` is what the attempt took all the same.
    """

    def __init__(self, why: str, answer: Answer | None = None) -> None:
        super().__init__(why)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask: a provider's base URL for a dialect, and the headers that it wants."""

    provider: str
    model: str
    dialect: Dialect
    base_url: str = field(repr=False)
    headers: tuple[tuple[bytes, bytes], ...] = field(repr=False)
    """With the key, and without those that belong to another request's body."""
    timeout_s: float = 120.0
    connect_timeout_s: float = 10.0
    window: int | None = None
    price: Price | None = None

    @property
    def url(self) -> str:
        name = quote(self.model, safe="/:@")
        return self.base_url.rstrip("/") + _PATHS[self.dialect.name].format(model=name)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and what it took."""

    text: str
    usage: Usage
    """With counts of our own where the provider gave none."""


_PATHS = {
    "openai": "/chat/completions",
    "responses": "/responses",
    "anthropic": "/messages",
    "gemini": "/models/{model}:generateContent",
}


async def ask(client: Client, target: Target, system: str, user: str) -> Answer:
    """Return the model's answer, not streamed. Raises SummaryFailed."""
    request = body(target.dialect, target.model, system, user)
    status, reply = await _send(client, target, request)
    if status in (400, 422):
        # Some models take one temperature only, or want the limit under another name.
        request = body(target.dialect, target.model, system, user, bare=True)
        status, reply = await _send(client, target, request)
    if status != 200:
        raise SummaryFailed(f"{target.provider} answered {status}")
    text = _THOUGHT.sub("", "".join(reply.text)).strip()
    answer = Answer(text, _usage(reply, target.model, system + user))
    if not text:
        raise SummaryFailed(f"{target.model} at {target.provider} said nothing", answer)
    if reply.finish_reason in _CUT:
        raise SummaryFailed(f"{target.model} at {target.provider} did not come to an end", answer)
    return answer


def body(
    dialect: Dialect, model: str, system: str, user: str, *, bare: bool = False
) -> dict[str, Any]:
    """Return the request's body in a dialect; `bare`: with nothing that it could do without."""
    if dialect is dialects.GEMINI:
        settings = {"temperature": TEMPERATURE, "maxOutputTokens": 2 * _MAX_OUTPUT_TOKENS}
        return {
            "systemInstruction": {"parts": [{"text": system}]},
            "contents": [{"role": "user", "parts": [{"text": user}]}],
            **({} if bare else {"generationConfig": settings}),
        }
    made: dict[str, Any] = {"model": model, "stream": False}
    if not bare:
        made["temperature"] = TEMPERATURE
    if dialect is dialects.ANTHROPIC:
        made |= {"system": system, "max_tokens": _MAX_OUTPUT_TOKENS}
        return made | {"messages": [{"role": "user", "content": user}]}
    # What a model thinks counts too.
    limit = {} if bare else {"max_tokens": 2 * _MAX_OUTPUT_TOKENS}
    if dialect is dialects.RESPONSES:
        limit = {} if bare else {"max_output_tokens": 2 * _MAX_OUTPUT_TOKENS}
        content = [{"type": "input_text", "text": user}]
        made |= {"instructions": system, "input": [{"role": "user", "content": content}]}
        return made | {"store": False} | limit
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return made | {"messages": messages} | limit


async def _send(client: Client, target: Target, sent: Mapping[str, Any]) -> tuple[int, Reply]:
    request = Request(
        "POST",
        target.url,
        (
            *target.headers,
            (b"content-type", b"application/json"),
            (b"accept-encoding", b"identity"),
        ),
        encode(sent),
        target.timeout_s,
        target.connect_timeout_s,
    )
    reader = target.dialect.reader()
    try:
        async with asyncio.timeout(2 * target.timeout_s), client.send(request) as response:
            if response.status == 200:
                reader.feed(await _read(response, target))
            return response.status, reader.finish()
    except UpstreamFailed as failure:
        raise SummaryFailed(str(failure)) from None
    except TimeoutError:
        raise SummaryFailed(f"{target.provider} took too long") from None


async def _read(response: Response, target: Target) -> bytes:
    undo = decoder(response.header("content-encoding"))
    if undo is None:
        raise SummaryFailed(f"{target.provider} answered in an encoding that nobody asked for")
    pieces: list[bytes] = []
    size = 0
    async for piece in response.pieces():
        size += len(piece)
        if size > _MAX_REPLY_BYTES:
            raise SummaryFailed(f"{target.provider} answered without end")
        pieces.append(piece)
    return undo(b"".join(pieces))


def _usage(reply: Reply, model: str, asked: str) -> Usage:
    if reply.usage.input_tokens is not None and reply.usage.output_tokens is not None:
        return reply.usage
    count = tokens.tokenizer_for(model).count
    return Usage(
        input_tokens=count(asked), output_tokens=count("".join([*reply.reasoning, *reply.text]))
    )
