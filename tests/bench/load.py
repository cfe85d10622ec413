"""The clients: raw sockets that are kept open, and requests that were made beforehand."""

import asyncio
import re
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Conversation = Sequence[bytes]
"""The bodies of one conversation, each the next turn."""

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_SENT = re.compile(rb"sent@(\d+)@")
_TIMEOUT_S = 30.0


class BadAnswer(Exception):
    """The proxy did not answer as the provider did, so there is nothing to measure."""


@dataclass(slots=True)
class Answer:
    """A reply as it arrived; times are `time.monotonic_ns()`."""

    asked_ns: int
    pieces: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def first_byte_ms(self) -> float:
        """From the request to the first byte of the reply's body."""
        for at, data in self.pieces:
            # The head may come alone; the provider sends its first event right behind it.
            if b"data: " in data:
                return (at - self.asked_ns) / 1e6
        raise BadAnswer("a stream without an event")

    @property
    def chunk_delays_ms(self) -> list[float]:
        """How long each event with text took from the provider to the client."""
        return [(at - int(sent)) / 1e6 for at, data in self.pieces for sent in _SENT.findall(data)]


class Client(asyncio.Protocol):
    """One connection to a proxy, used as a base URL."""

    def __init__(self, port: int) -> None:
        self._host = b"127.0.0.1:%d" % port
        self._answer: Answer
        self._ended: asyncio.Future[None]
        self._transport: asyncio.Transport
        self._seen = b""
        self._left: int | None = None

    @classmethod
    async def connect(cls, port: int) -> "Client":
        """Return a client of the proxy at `port`. Raises OSError."""
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: cls(port), "127.0.0.1", port)
        return client

    async def ask(self, body: bytes, chunks: str = "") -> Answer:
        """Return the reply to a body; `chunks` is the provider's `N/GAP`, "" for no stream.

        Raises BadAnswer for anything but a whole 200.
        """
        self._ended = asyncio.get_running_loop().create_future()
        self._seen, self._left = b"", None
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: %s\r\nuser-agent: bench/1\r\n"
            b"authorization: Bearer bench-client-key\r\naccept: */*\r\n"
            b"content-type: application/json\r\n%scontent-length: %d\r\n\r\n"
        ) % (
            self._host,
            f"x-bench-chunks: {chunks}\r\n".encode() if chunks else b"",
            len(body),
        )
        message = head + body
        self._answer = Answer(time.monotonic_ns())
        self._transport.write(message)
        await asyncio.wait_for(self._ended, _TIMEOUT_S)
        return self._answer

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._answer.pieces.append((time.monotonic_ns(), data))
        if self._left is None:
            self._seen += data
            end = self._seen.find(b"\r\n\r\n")
            if end < 0:
                return
            if not self._seen.startswith(b"HTTP/1.1 200 "):
                self._fail(f"not a 200: {self._seen[:400]!r}")
                return
            length = _LENGTH.search(self._seen[: end + 2])
            self._left = int(length[1]) if length else -1
            data, self._seen = self._seen[end + 4 :], b""
        if self._left >= 0:
            self._left -= len(data)
            complete = not self._left
        else:
            self._seen = (self._seen + data)[-5:]
            complete = self._seen == b"0\r\n\r\n"
        if complete and not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the proxy closed the connection")

    def _fail(self, why: str) -> None:
        if hasattr(self, "_ended") and not self._ended.done():
            self._ended.set_exception(BadAnswer(why))


async def play(
    port: int, conversations: Iterable[Conversation], connections: int, chunks: str = ""
) -> float:
    """Send all bodies, each conversation in its order, and return how many seconds it took."""
    clients = [await Client.connect(port) for _ in range(connections)]
    waiting = deque(conversations)

    async def work(client: Client) -> None:
        while waiting:
            for body in waiting.popleft():
                await client.ask(body, chunks)

    began = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(work(client))
        return time.perf_counter() - began
    finally:
        for client in clients:
            client.close()
