"""A provider that costs next to nothing: `python tests/bench/provider.py` prints its port.

It answers each POST the same way, whatever the body says: JSON, or, if the request's
`x-bench-chunks: N/GAP` asks for it, a stream of N events, GAP milliseconds apart, each with the
`time.monotonic_ns()` of its sending. It ends with its standard input.
"""

import asyncio
import os
import re
import time

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKS = re.compile(rb"\r\nx-bench-chunks: *(\d+)/(\d+)", re.IGNORECASE)

_USAGE = b'"usage":{"prompt_tokens":1200,"completion_tokens":80,"total_tokens":1280}'
_BODY = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1763700000,"model":"bench",'
    b'"choices":[{"index":0,"message":{"role":"assistant","content":"'
    + b"The totals are right now; the test that failed before passes. " * 8
    + b'"},"finish_reason":"stop"}],'
    + _USAGE
    + b"}"
)
_PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(_BODY),
    _BODY,
)
_STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
_EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1763700000,'
    b'"model":"bench","choices":[%s]%s}\n\n'
)
_DELTA = b'{"index":0,"delta":{"content":" sent@%d@"},"finish_reason":null}'
_WHO = b'{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}'
_FINISH = b'{"index":0,"delta":{},"finish_reason":"stop"}'
_END = _EVENT % (_FINISH, b"") + _EVENT % (b"", b"," + _USAGE) + b"data: [DONE]\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Provider(asyncio.Protocol):
    """One connection; requests come one after the other."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._left:
            self._left -= len(data)
        else:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._head)
            body = int(length[1]) if length else 0
            self._left = body - (len(self._head) - end - 4)
        if not self._left:
            self._answer()

    def _answer(self) -> None:
        asked, self._head = _CHUNKS.search(self._head), b""
        if asked is None:
            self._transport.write(_PLAIN)
            return
        # What vLLM, SGLang and the makers' own APIs begin with comes before the first word.
        self._transport.write(_STREAM + _chunk(_EVENT % (_WHO, b"")))
        gap_s = int(asked[2]) / 1000
        asyncio.get_running_loop().call_later(gap_s, self._next, int(asked[1]), gap_s)

    def _next(self, left: int, gap_s: float) -> None:
        if self._transport.is_closing():
            return
        if not left:
            self._transport.write(_chunk(_END) + b"0\r\n\r\n")
            return
        self._transport.write(_chunk(_EVENT % (_DELTA % time.monotonic_ns(), b"")))
        asyncio.get_running_loop().call_later(gap_s, self._next, left - 1, gap_s)


async def main() -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(Provider, "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop.add_reader(0, lambda: None if os.read(0, 4096) else ended.set())
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(main())
