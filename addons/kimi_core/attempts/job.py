"""The upstream requests of an exchange, one after the other, until a reply is enough."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import replace

from kimi_core import dialects
from kimi_core.attempts.chat import ChatAttempt
from kimi_core.attempts.messages import MessagesAttempt
from kimi_core.attempts.turn import Decider, Turn
from kimi_core.dialects import Dialect
from kimi_core.document import NotJSON, decode
from kimi_core.exchange import Adapt, Attempt, Exchange
from kimi_core.keys import SECRET_HEADERS
from kimi_core.pipe import Pipe, StageFailed, decoder, whole
from kimi_core.relay import Client, Job, Request, Response, UpstreamFailed, Writer
from kimi_core.sse import SSE
from kimi_core.stages import Stage, StageRank

_STAGES = {"openai": ChatAttempt, "anthropic": MessagesAttempt}


def join(exchange: Exchange, decider: Decider, *, asks_again: bool = True) -> None:
    """Let `decider` have a say in whether a reply to the exchange is enough.

    Who joins first decides first. Without `asks_again` it never finds one not to be enough.
    """
    turn = exchange.turn
    if turn is None:
        turn = exchange.turn = Turn()
        stages = exchange.stages
        stages.append((StageRank.ENFORCE, lambda attempt: stage(turn, attempt.dialect)))
    turn.deciders.append(decider)
    if asks_again and exchange.job is None:
        exchange.job = _jobs(exchange, turn)


def stage(turn: Turn, dialect: Dialect) -> Stage:
    """Return what the reply to the next attempt passes through."""
    return _STAGES[dialect.name](turn)


def _jobs(exchange: Exchange, turn: Turn) -> Callable[[Request, Adapt], Job]:
    """Return what makes the relay's job: as many requests as the turn asks for."""
    of = weakref.ref(exchange)  # which will hold what this returns

    def make(request: Request, adapt: Adapt) -> Job:
        exchange = of()
        assert exchange is not None

        async def job(client: Client, writer: Writer) -> None:
            sent = _with_headers(request, accept_encoding="identity")
            while True:
                attempt = exchange.attempt()
                await _Asking(exchange, turn, attempt, writer).run(client, sent)
                attempt.rejected = turn.rejected
                if not turn.rejected:
                    return
                body = await turn.next_body(_plain_body(exchange, sent), attempt.dialect)
                sent = _with_headers(sent, content_encoding="")
                sent = sent.with_body(adapt(body))

        return job

    return make


class _Asking:
    """One upstream request, and what the client gets of the reply."""

    def __init__(self, exchange: Exchange, turn: Turn, attempt: Attempt, writer: Writer) -> None:
        self._exchange = exchange
        self._turn = turn
        self._attempt = attempt
        self._writer = writer
        self._secrets: list[bytes] = []
        made = sorted(exchange.stages, key=lambda entry: entry[0])
        self._stages = [make(attempt) for _, make in made]

    async def run(self, client: Client, request: Request) -> None:
        """Send it. Raises UpstreamFailed when the client has got nothing so far."""
        attempt, exchange = self._attempt, self._exchange
        try:
            self._secrets = _secrets(request)
            async with client.send(request) as response:
                attempt.status = response.status
                if self._can_stream(response):
                    await self._stream(response)
                else:
                    await self._whole(response)
        except UpstreamFailed as failure:
            attempt.error_type = exchange.error_type = "connection"
            self._turn.rejected = ""
            if not self._writer.started:
                raise
            await self._writer.write(exchange.dialect.error_event(502, f"{failure}."))
        finally:
            attempt.error_type = attempt.error_type or attempt.reply.error
            attempt.ended = time.perf_counter()

    def _can_stream(self, response: Response) -> bool:
        kind = response.header("content-type").partition(";")[0].strip().lower()
        if kind != "text/event-stream" or response.status >= 400:
            return False
        # The first reply passes as it is when we cannot decode it; no other can then follow it.
        encoding = response.header("content-encoding")
        return not self._writer.started or decoder(encoding) is not None

    async def _stream(self, response: Response) -> None:
        exchange, writer = self._exchange, self._writer
        encoding = response.header("content-encoding")
        framing = SSE()
        pipe = Pipe(exchange.id, exchange, framing, self._stages, encoding)
        try:
            if not writer.started:
                # Whatever cannot be decoded passes as it is.
                kept = _headers(response) if pipe.edits else response.headers
                await writer.start(response.status, kept)
            async for piece in response.pieces():
                for out in pipe(piece):
                    await writer.write(out)
            for out in pipe(b""):
                await writer.write(out)
        except UpstreamFailed:
            framing.end()  # half an event: the client could not read what follows it
            for out in pipe(b""):
                await writer.write(out)
            if not self._attempt.reply.complete:  # only its connection was cut
                raise

    async def _whole(self, response: Response) -> None:
        exchange, attempt, writer = self._exchange, self._attempt, self._writer
        body, status = await response.read(), response.status
        undo = decoder(response.header("content-encoding"))
        if undo is None:
            exchange.unread = True
        else:
            try:
                body = whole(exchange.id, self._stages, undo(body))
            except StageFailed as failure:
                attempt.error_type = exchange.error_type = "stream_failed"
                message = f"kimi-proxy could not pass this reply on ({failure} failed)."
                body, status = exchange.dialect.error(502, message), 502
        if status >= 400:
            attempt.error_type = attempt.error_type or attempt.reply.error or str(status)
        if self._turn.rejected:
            return
        if writer.started:
            exchange.error_type = attempt.error_type or "no_stream"
            # What has begun to stream is past all who would mask a key in a whole reply.
            for secret in self._secrets:
                body = body.replace(secret, b"***")
            await writer.write(_error_event(exchange.dialect, status, body))
            return
        kept = response.headers if undo is None else _headers(response)
        kept = [field for field in kept if field[0].lower() != b"content-length"]
        await writer.start(status, [*kept, (b"content-length", str(len(body)).encode())])
        await writer.write(body)


def _headers(response: Response) -> list[tuple[bytes, bytes]]:
    """Return the headers of a reply whose body is decoded, and of another length."""
    gone = (b"content-length", b"content-encoding")
    return [field for field in response.headers if field[0].lower() not in gone]


def _secrets(request: Request) -> list[bytes]:
    """Return the keys that a request carries."""
    sent = [value for name, value in request.headers if name.lower() in SECRET_HEADERS]
    return [secret for value in sent if len(secret := value.rpartition(b" ")[2]) >= 8]


def _with_headers(request: Request, **put: str) -> Request:
    """Return the request with other headers; one that is empty is taken out."""
    fresh = {name.replace("_", "-").encode(): value.encode() for name, value in put.items()}
    kept = [field for field in request.headers if field[0].lower() not in fresh]
    added = [field for field in fresh.items() if field[1]]
    return replace(request, headers=(*kept, *added))


def _plain_body(exchange: Exchange, request: Request) -> bytes:
    """Return a request's body as JSON: one that nobody has edited may be compressed."""
    if any(name.lower() == b"content-encoding" for name, _ in request.headers):
        return exchange.document.encode()
    return request.body


def _error_event(dialect: Dialect, status: int, body: bytes) -> bytes:
    """Return a failed request's answer as an event: as it came, if it is one of the dialect's."""
    try:
        value = decode(body)
    except NotJSON:
        value = None
    said = value if isinstance(value, dict) else {}
    if dialect is dialects.ANTHROPIC and said.get("type") == "error":
        return SSE().encode(body, "error")
    if dialect is dialects.OPENAI and said.get("error"):
        return SSE().encode(body)
    told = f"answered {status}" if status >= 400 else "did not answer with a stream"
    return dialect.error_event(502, f"Asked once more, the provider {told}.")
