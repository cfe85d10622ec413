"""HTTP/1.1 by hand over asyncio streams, HTTP/2 by the h2 library; both give a `Wire`."""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal, Protocol
from urllib.parse import urlsplit

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

from .reply import Received

Headers = list[tuple[str, str]]
_WINDOW = 16 * 1024 * 1024


class ClientGone(ConnectionError):
    """The client closed the connection or reset the stream before the reply was complete."""


class Wire(Protocol):
    """One reply on its way out."""

    async def start(
        self, status: int, headers: Headers, length: int | None, *, chunked: bool, close: bool
    ) -> None:
        """Send status and headers; on HTTP/1.1 `chunked` frames the body, `close` ends it all."""

    async def send(self, piece: bytes) -> None:
        """Send a piece of the body. Raises ClientGone."""

    async def end(self) -> None:
        """End the body in order."""

    def gone(self) -> bool:
        """Whether the client has left; a client that only half-closed counts as gone."""

    async def abort(self, how: Literal["reset", "close", "stream"]) -> None:
        """Break off."""


Handler = Callable[[Received, Wire], Awaitable[None]]


@dataclass(frozen=True)
class Connection:
    """An accepted connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    scheme: Literal["http", "https"]
    sni: str | None

    async def abort(self, how: Literal["reset", "close"]) -> None:
        """Close once everything written so far has left this process."""
        transport = self.writer.transport
        transport.set_write_buffer_limits(high=1, low=0)  # asyncio's TLS never resumes from 0
        with contextlib.suppress(OSError):
            await self.writer.drain()
        if how == "close":
            transport.close()
            return
        if (sock := self.writer.get_extra_info("socket")) is not None:
            # "If l_onoff is not zero and l_linger is zero, close() discards and resets."
            # -- https://man7.org/linux/man-pages/man7/socket.7.html
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()


async def serve(connection: Connection, handle: Handler) -> None:
    """Answer the requests of one connection until either side ends it."""
    tls: ssl.SSLObject | None = connection.writer.get_extra_info("ssl_object")
    http2 = tls is not None and tls.selected_alpn_protocol() == "h2"
    try:
        await (_Http2(connection, handle).run() if http2 else _serve_http1(connection, handle))
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        pass  # the peer went away (TLS reports that as an OSError), or does not speak HTTP
    finally:
        connection.writer.close()


class _Http1Wire:
    def __init__(self, connection: Connection, *, head_only: bool, close: bool) -> None:
        self.connection = connection
        self.head_only = head_only
        self.close = close
        self._chunked = False

    async def start(
        self, status: int, headers: Headers, length: int | None, *, chunked: bool, close: bool
    ) -> None:
        self.close |= close
        self._chunked = chunked
        lines = [f"HTTP/1.1 {status} {_reason(status)}", *(f"{k}: {v}" for k, v in headers)]
        if length is not None:
            lines.append(f"content-length: {length}")
        elif chunked:
            lines.append("transfer-encoding: chunked")
        if self.close:
            lines.append("connection: close")
        self._write("\r\n".join([*lines, "\r\n"]).encode("latin-1"))

    async def send(self, piece: bytes) -> None:
        if self.head_only or not piece:
            return
        self._write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
        await self.connection.writer.drain()

    async def end(self) -> None:
        if self._chunked and not self.head_only:
            self._write(b"0\r\n\r\n")
        await self.connection.writer.drain()

    def gone(self) -> bool:
        reader, writer = self.connection.reader, self.connection.writer
        return reader.at_eof() or reader.exception() is not None or writer.is_closing()

    async def abort(self, how: Literal["reset", "close", "stream"]) -> None:
        self.close = True
        await self.connection.abort("close" if how == "stream" else how)

    def _write(self, data: bytes) -> None:
        if self.connection.writer.is_closing():
            raise ClientGone("the client closed the connection")
        self.connection.writer.write(data)


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


async def _serve_http1(connection: Connection, handle: Handler) -> None:
    reader = connection.reader
    close = False
    while not close:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        try:
            method, target, version = first.split(" ")
        except ValueError:
            connection.writer.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")
            return
        headers = [(name, value.strip()) for name, _, value in (x.partition(":") for x in lines)]
        by_name = {name.lower(): value for name, value in headers}
        if by_name.get("expect", "").lower() == "100-continue":
            connection.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in by_name.get("transfer-encoding", "").lower():
            body = await _read_chunks(reader)
        else:
            body = await reader.readexactly(int(by_name.get("content-length", 0)))
        parts = urlsplit(target)
        received = Received(
            method=method,
            scheme=connection.scheme,
            authority=parts.netloc or by_name.get("host", ""),
            path=parts.path,
            query=parts.query,
            headers=headers,
            body=body,
            http_version=version,
            sni=connection.sni,
        )
        close = "close" in by_name.get("connection", "").lower() or version == "HTTP/1.0"
        wire = _Http1Wire(connection, head_only=method == "HEAD", close=close)
        await handle(received, wire)
        close = wire.close


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass  # trailers
    return bytes(body)


class _Http2Wire:
    def __init__(self, http2: "_Http2", stream: int, *, head_only: bool) -> None:
        self.http2 = http2
        self.stream = stream
        self.head_only = head_only
        self.reset = False

    async def start(
        self, status: int, headers: Headers, length: int | None, *, chunked: bool, close: bool
    ) -> None:
        # "All header field names MUST be lowercase", and there is no `connection`.
        # -- https://www.rfc-editor.org/rfc/rfc9113#section-8.2
        fields = [(":status", str(status)), *((k.lower(), v) for k, v in headers)]
        if length is not None:
            fields.append(("content-length", str(length)))
        self._check()
        self.http2.h2.send_headers(self.stream, fields, end_stream=self.head_only)
        await self.http2.flush()

    async def send(self, piece: bytes) -> None:
        h2_ = self.http2.h2
        while piece and not self.head_only:
            self._check()
            room = min(h2_.local_flow_control_window(self.stream), h2_.max_outbound_frame_size)
            if room <= 0:
                await self.http2.window_opened()
                continue
            h2_.send_data(self.stream, piece[:room])
            piece = piece[room:]
            await self.http2.flush()

    async def end(self) -> None:
        if not self.head_only:
            self._check()
            self.http2.h2.end_stream(self.stream)
            await self.http2.flush()

    def gone(self) -> bool:
        connection = self.http2.connection
        return self.reset or connection.reader.at_eof() or connection.writer.is_closing()

    async def abort(self, how: Literal["reset", "close", "stream"]) -> None:
        if how != "stream":
            await self.http2.connection.abort(how)
            return
        self._check()
        self.http2.h2.reset_stream(self.stream, error_code=2)  # INTERNAL_ERROR
        await self.http2.flush()

    def _check(self) -> None:
        if self.gone():
            raise ClientGone("the client reset the stream")


class _Http2:
    def __init__(self, connection: Connection, handle: Handler) -> None:
        self.connection = connection
        self.handle = handle
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: _WINDOW,
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 200,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: 1 << 16,
            },
        )
        self._wires: dict[int, _Http2Wire] = {}
        self._heads: dict[int, Headers] = {}
        self._bodies: dict[int, bytearray] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened = asyncio.Event()

    async def run(self) -> None:
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(_WINDOW)
        try:
            await self.flush()
            while data := await self.connection.reader.read(1 << 16):
                try:
                    events = self.h2.receive_data(data)
                except h2.exceptions.ProtocolError:
                    await self.flush()
                    break
                for event in events:
                    self._on(event)
                await self.flush()
        finally:
            for wire in self._wires.values():
                wire.reset = True
            self._open()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def flush(self) -> None:
        if data := self.h2.data_to_send():
            self.connection.writer.write(data)
            await self.connection.writer.drain()

    async def window_opened(self) -> None:
        await self._opened.wait()

    def _open(self) -> None:
        self._opened.set()
        self._opened = asyncio.Event()

    def _on(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=stream, headers=headers):
                self._heads[stream] = [(str(k), str(v)) for k, v in headers]
                self._bodies[stream] = bytearray()
            case h2.events.DataReceived(stream_id=stream, data=data):
                self._bodies[stream] += data
                if event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, stream)
            case h2.events.StreamEnded(stream_id=stream):
                task = asyncio.create_task(self._answer(stream))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case h2.events.StreamReset(stream_id=stream):
                self._heads.pop(stream, None)
                self._bodies.pop(stream, None)
                if wire := self._wires.get(stream):
                    wire.reset = True
                    self._open()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                self._open()

    async def _answer(self, stream: int) -> None:
        fields = self._heads.pop(stream)
        pseudo = {k: v for k, v in fields if k.startswith(":")}
        headers = [(k, v) for k, v in fields if not k.startswith(":")]
        host = next((v for k, v in headers if k == "host"), "")
        parts = urlsplit(pseudo.get(":path", "/"))
        received = Received(
            method=pseudo.get(":method", ""),
            scheme=pseudo.get(":scheme", self.connection.scheme),
            authority=pseudo.get(":authority", host),
            path=parts.path,
            query=parts.query,
            headers=headers,
            body=bytes(self._bodies.pop(stream)),
            http_version="HTTP/2.0",
            sni=self.connection.sni,
        )
        wire = _Http2Wire(self, stream, head_only=received.method == "HEAD")
        self._wires[stream] = wire
        try:
            await self.handle(received, wire)
        except (OSError, h2.exceptions.ProtocolError):
            pass  # this stream or the whole connection is gone; the reader sees to the rest
        finally:
            self._wires.pop(stream, None)
