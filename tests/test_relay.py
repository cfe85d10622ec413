"""The relay: its client towards providers, its server towards mitmproxy, and both in mitmdump."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import h2.config
import h2.connection
import h2.events
import httpx
import pytest

from kimi_core.relay import (
    DOMAIN,
    Client,
    Job,
    Relay,
    Request,
    Response,
    Settings,
    UpstreamFailed,
    Writer,
)
from proxy import ADDONS, PLANTED, Proxy, wait_until
from upstream import Abort, Framing, Reply, Upstream, ca

CLIENTS = "sk-clients-own-fedcba9876543210"
HELLO = [{"role": "user", "content": "Hello"}]
ASK = {"model": "kimi-k2", "messages": HELLO}
BODY = json.dumps(ASK).encode()
STREAM = json.dumps(ASK | {"stream": True}).encode()


class Way(NamedTuple):
    """A fake provider, and one of the protocols that it speaks."""

    up: Upstream
    url: str
    version: str
    settings: Settings

    def request(self, body: bytes = BODY, **more: Any) -> Request:
        return _request(self.url, body, **more)

    def client(self) -> Client:
        return Client(self.settings)


@pytest.fixture(scope="module")
def without_h2() -> Iterator[Upstream]:
    with Upstream(hosts=("localhost",), alpn=("http/1.1",)) as started:
        yield started


@pytest.fixture(params=["HTTP/1.1", "HTTP/1.1 over TLS", "HTTP/2.0"])
def way(request: pytest.FixtureRequest, up: Upstream, without_h2: Upstream) -> Way:
    if request.param == "HTTP/1.1":
        return Way(up, up.http_url, "HTTP/1.1", Settings())
    if request.param == "HTTP/2.0":
        return Way(up, up.https_url, "HTTP/2.0", Settings(str(up.ca_file), http2=True))
    without_h2.clear()
    without_h2.default = Reply()
    settings = Settings(ca_file=str(without_h2.ca_file))
    return Way(without_h2, without_h2.https_url, "HTTP/1.1", settings)


def _request(url: str, body: bytes = BODY, timeout_s: float = 20.0, **headers: str) -> Request:
    fields = {"authorization": f"Bearer {PLANTED}", "content-type": "application/json", **headers}
    return Request(
        "POST",
        f"{url}/v1/chat/completions",
        tuple((name.encode(), value.encode()) for name, value in fields.items()),
        body,
        timeout_s,
    )


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


def _failure(client: Client, request: Request) -> UpstreamFailed:
    async def fail() -> UpstreamFailed:
        with pytest.raises(UpstreamFailed) as caught:
            async with client.send(request) as answer:
                await answer.read()
        return caught.value

    return asyncio.run(asyncio.wait_for(fail(), 60))


@contextlib.asynccontextmanager
async def _serving(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Yield the URL of a server whose every connection is given to `serve`."""

    async def each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(each, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


class Tunnel:
    """Passes connections on to a port, and counts them; `heads` if they begin with CONNECT."""

    def __init__(self, port: int, connect: bool = False) -> None:
        self.count = 0
        self.heads: list[bytes] = []
        self._port, self._connect = port, connect
        self._tasks: list[asyncio.Future[Any]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        if self._connect:
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        pumps = asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        self._tasks.append(pumps)
        with contextlib.suppress(asyncio.CancelledError):
            await pumps
        far_writer.close()
        writer.close()
        await writer.wait_closed()

    async def close(self) -> None:
        """Close the connections, and return when the client can have noticed."""
        for pumps in self._tasks:
            pumps.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _ in range(10):
            await asyncio.sleep(0)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


async def _read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return head + await reader.readexactly(int(length[1]) if length else 0)


# --- the client: what goes out and what comes back ------------------------------------


def test_a_request_arrives_and_its_answer_comes_back(way: Way) -> None:
    async def work() -> None:
        client = way.client()
        async with client.send(way.request(STREAM)) as answer:
            assert answer.status == 200
            assert answer.header("Content-Type").startswith("text/event-stream")
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        client.close()

    _run(work)
    received = way.up.requests[-1]
    assert received.http_version == way.version
    assert (received.method, received.path) == ("POST", "/v1/chat/completions")
    assert received.body == STREAM
    assert received.key == PLANTED
    assert received.header("content-length") == str(len(STREAM))


def test_a_large_request_arrives_whole(way: Way) -> None:
    body = json.dumps(ASK | {"user": "x" * 1_000_000}).encode()

    async def work() -> None:
        async with way.client().send(way.request(body)) as answer:
            assert answer.status == 200

    _run(work)
    assert way.up.requests[-1].body == body


def test_what_concerns_one_connection_is_not_passed_on(way: Way) -> None:
    request = way.request(
        host="elsewhere.example",
        connection="x-mine, keep-alive",
        te="trailers",
        expect="100-continue",
        **{"x-mine": "1", "transfer-encoding": "chunked", "proxy-authorization": "secret"},
    )

    async def work() -> None:
        async with way.client().send(request) as answer:
            assert answer.status == 200

    _run(work)
    received = way.up.requests[-1]
    assert "elsewhere" not in received.host
    assert received.body == BODY
    dropped = "connection", "te", "expect", "x-mine", "transfer-encoding", "proxy-authorization"
    assert not [name for name in dropped if received.header(name) is not None]


def test_an_answers_connection_headers_are_taken_out_and_its_encoding_is_kept(way: Way) -> None:
    framing = Framing(gzip="whole", connection_close=way.version == "HTTP/1.1")
    way.up.default = Reply(text="squeezed " * 50, framing=framing, headers={"X-Own": "kept"})
    got: list[Response] = []

    async def work() -> None:
        async with way.client().send(way.request(**{"accept-encoding": "gzip"})) as answer:
            got.append(answer)
            assert (await answer.read()).startswith(b"\x1f\x8b")

    _run(work)
    names = {name.lower() for name, _ in got[0].headers}
    assert {b"content-encoding", b"x-own"} <= names
    assert not names & {b"connection", b"transfer-encoding"}
    assert got[0].header("x-own") == "kept"
    assert got[0].header("x-none") == ""


def test_pieces_come_while_the_provider_is_still_writing(way: Way) -> None:
    go_on = threading.Event()
    way.up.default = Reply(text="one two three", framing=Framing(hang=go_on, hang_after=2))

    async def work() -> None:
        async with way.client().send(way.request(STREAM)) as answer:
            async for piece in answer.pieces():
                assert b"[DONE]" not in piece
                break
            go_on.set()
            assert (await answer.read()).endswith(b"[DONE]\n\n"), "it goes on where it was left"

    _run(work)


def test_with_body_puts_the_length_right() -> None:
    request = Request("POST", "http://x/", ((b"Content-Length", b"3"), (b"a", b"b")), b"old", 1)
    assert request.with_body(b"longer") == Request(
        "POST", "http://x/", ((b"Content-Length", b"6"), (b"a", b"b")), b"longer", 1
    )


def test_a_request_and_the_settings_do_not_show_what_is_secret() -> None:
    request = _request(f"http://127.0.0.1/?key={CLIENTS}", PLANTED.encode())
    settings = Settings(proxy="http://127.0.0.1:1", proxy_auth=("me", PLANTED))
    assert PLANTED not in repr(request) + repr(settings)
    assert CLIENTS not in repr(request)


# --- the client: connections ----------------------------------------------------------


def test_a_connection_is_used_again(way: Way) -> None:
    async def work() -> None:
        tunnel = Tunnel(int(way.url.rpartition(":")[2]))
        async with _serving(tunnel) as url:
            client = way.client()
            near = way.url.partition(":")[0] + "://localhost:" + url.rpartition(":")[2]
            for _ in range(3):
                async with client.send(_request(near)) as answer:
                    await answer.read()
            assert tunnel.count == 1
            client.close()

    _run(work)
    assert len(way.up.requests) == 3


def test_a_connection_is_not_kept_for_long(up: Upstream) -> None:
    async def work() -> None:
        tunnel = Tunnel(up.http_port)
        async with _serving(tunnel) as url:
            client = Client(Settings(idle_s=0))
            for number in (1, 2):
                async with client.send(_request(url)) as answer:
                    await answer.read()
                assert tunnel.count == number

    _run(work)


def test_only_so_many_idle_connections_are_kept(up: Upstream) -> None:
    async def work() -> None:
        tunnel = Tunnel(up.http_port)
        async with _serving(tunnel) as url:
            client = Client()

            async def ask(everyone: asyncio.Barrier) -> None:
                async with client.send(_request(url)) as answer:
                    await everyone.wait()
                    await answer.read()

            for _ in range(2):
                everyone = asyncio.Barrier(10)
                await asyncio.gather(*(ask(everyone) for _ in range(10)))
            assert tunnel.count == 12, "eight of the ten were used again"
            client.close()

    _run(work)


def test_requests_at_the_same_time_do_not_share_a_connection(way: Way) -> None:
    async def work() -> None:
        tunnel = Tunnel(int(way.url.rpartition(":")[2]))
        async with _serving(tunnel) as url:
            client = way.client()
            near = way.url.partition(":")[0] + "://localhost:" + url.rpartition(":")[2]
            async with client.send(_request(near)) as one, client.send(_request(near)) as other:
                assert await one.read()
                assert await other.read()
            assert tunnel.count == 2
            client.close()

    _run(work)


def test_leaving_an_answer_early_closes_its_connection(way: Way) -> None:
    go_on = threading.Event()
    way.up.script("/v1/*", Reply(framing=Framing(hang=go_on, hang_after=1)))

    async def work() -> None:
        client = way.client()
        async with client.send(way.request(STREAM)) as answer:
            await anext(aiter(answer.pieces()))
        await asyncio.to_thread(way.up.wait_for, lambda up: up.abandoned)
        async with client.send(way.request(BODY)) as answer:
            assert answer.status == 200
            assert await answer.read()

    _run(work)
    go_on.set()


def test_a_connection_that_was_closed_while_idle_is_not_used(way: Way) -> None:
    async def work() -> None:
        tunnel = Tunnel(int(way.url.rpartition(":")[2]))
        async with _serving(tunnel) as url:
            client = way.client()
            near = way.url.partition(":")[0] + "://localhost:" + url.rpartition(":")[2]
            for number in (1, 2):
                async with client.send(_request(near)) as answer:
                    await answer.read()
                assert tunnel.count == number
                await tunnel.close()
            client.close()

    _run(work)
    assert len(way.up.requests) == 2


def test_a_connection_closed_just_before_it_would_be_used_is_not_used() -> None:
    answered = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    done, closed = threading.Event(), threading.Event()
    requests: list[bytes] = []

    def serve(listening: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listening.accept()
            requests.append(connection.recv(65536))
            connection.sendall(answered)
            done.wait(30)
            connection.close()
            closed.set()

    async def work() -> None:
        client = Client()
        request = _request(f"http://127.0.0.1:{listening.getsockname()[1]}", b"")
        async with client.send(request) as answer:
            assert await answer.read() == b"ok"
        done.set()
        closed.wait(30)  # the event loop has no chance to notice
        async with client.send(request) as answer:
            assert await answer.read() == b"ok"
        client.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = threading.Thread(target=serve, args=(listening,), daemon=True)
        serving.start()
        _run(work)
        serving.join()
    assert len(requests) == 2


@pytest.mark.parametrize("reused", [False, True])
def test_a_request_that_may_have_been_read_is_not_sent_again(reused: bool) -> None:
    requests: list[bytes] = []

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if reused:
            await _read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        requests.append(await _read_request(reader))

    async def work() -> None:
        async with _serving(closing) as url:
            client = Client()
            if reused:
                async with client.send(_request(url)) as answer:
                    assert await answer.read() == b"ok"
            with pytest.raises(UpstreamFailed) as caught:
                async with client.send(_request(url)):
                    pass
            assert caught.value.kind == "cut"

    _run(work)
    assert len(requests) == 1


def test_a_request_that_goaway_says_was_not_read_goes_out_again(tmp_path: Path) -> None:
    ca_file, leaf_file = ca.issue(tmp_path, ["localhost"])
    streams: list[list[int]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own: list[int] = []
        streams.append(own)
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        while data := await reader.read(65536):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.StreamEnded):
                    own.append(event.stream_id)
                    if event.stream_id == 3:
                        connection.close_connection(last_stream_id=1)
                    else:
                        connection.send_headers(event.stream_id, [(":status", "200")])
                        connection.send_data(event.stream_id, b"ok", end_stream=True)
            writer.write(connection.data_to_send())
        writer.close()

    async def work() -> None:
        tls = ca.server_context(leaf_file, ["h2"])
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        client = Client(Settings(str(ca_file), http2=True))
        for _ in range(2):
            async with client.send(_request(url)) as answer:
                assert await answer.read() == b"ok"
        client.close()
        server.close()

    _run(work)
    assert streams == [[1, 3], [1]]


def test_an_answer_that_comes_before_the_request_is_read_counts() -> None:
    async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
        await reader.read()

    async def work() -> None:
        async with (
            _serving(refusing) as url,
            Client().send(_request(url, b"x" * 3_000_000)) as answer,
        ):
            assert answer.status == 413

    _run(work)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_requests_go_through_the_proxy_that_is_set(scheme: str, up: Upstream) -> None:
    tunnel = Tunnel(up.https_port, connect=True)
    seen: list[bytes] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await _read_request(reader))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async def work() -> None:
        async with _serving(tunnel if scheme == "https" else forward) as proxy:
            settings = Settings(
                ca_file=str(up.ca_file), proxy=proxy, proxy_auth=("me", "my-password")
            )
            async with Client(settings).send(_request(f"{scheme}://localhost")) as answer:
                assert answer.status == 200
                assert await answer.read()

    _run(work)
    if scheme == "https":
        assert tunnel.heads[0].startswith(b"CONNECT localhost:443 ")
        assert b"Basic " in tunnel.heads[0]
        assert up.requests[-1].header("proxy-authorization") is None
    else:
        assert seen[0].startswith(b"POST http://localhost/v1/chat/completions ")


def test_a_proxy_of_the_environment_is_not_used(
    up: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async def work() -> None:
        async with Client().send(_request(up.http_url)) as answer:
            assert answer.status == 200

    _run(work)


# --- the client: failures -------------------------------------------------------------


def test_nobody_listening_is_told_as_connect() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        failed = _failure(Client(), _request(f"http://127.0.0.1:{bound.getsockname()[1]}"))
    assert failed.kind == "connect"
    assert "127.0.0.1" in str(failed)


@pytest.mark.parametrize("host", ["provider.invalid", "x" * 64 + ".invalid"])
def test_a_name_that_does_not_resolve_is_told_as_dns(host: str) -> None:
    async def nothing_resolves(*args: Any, **kwargs: Any) -> Any:
        if len(host) < 60:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return socket.getaddrinfo(*args, **kwargs)  # fails before it asks anybody

    async def work() -> None:
        loop: Any = asyncio.get_running_loop()
        loop.getaddrinfo = nothing_resolves
        with pytest.raises(UpstreamFailed) as caught:
            async with Client().send(_request(f"http://{host}")):
                pass
        assert caught.value.kind == "dns"
        assert host in str(caught.value)

    _run(work)


def test_a_certificate_of_an_unknown_authority_is_told_as_tls(up: Upstream) -> None:
    assert _failure(Client(), _request(up.https_url)).kind == "tls"
    assert not up.requests


def test_a_certificate_for_another_host_is_told_as_tls(without_h2: Upstream) -> None:
    client = Client(Settings(ca_file=str(without_h2.ca_file)))
    url = without_h2.https_url.replace("localhost", "127.0.0.1")
    assert _failure(client, _request(url)).kind == "tls"


def test_a_server_that_speaks_no_tls_is_told_as_tls() -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(5)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async def work() -> None:
        async with _serving(plain) as url:
            with pytest.raises(UpstreamFailed) as caught:
                async with Client().send(_request(url.replace("http:", "https:"))):
                    pass
            assert caught.value.kind == "tls"

    _run(work)


def test_authorities_that_cannot_be_read_are_told_as_tls(up: Upstream, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for path in (wrong, tmp_path / "missing.pem"):
        assert _failure(Client(Settings(str(path))), _request(up.https_url)).kind == "tls"


def test_any_certificate_will_do_where_that_is_set(up: Upstream) -> None:
    async def work() -> None:
        async with Client(Settings(insecure=True)).send(_request(up.https_url)) as answer:
            assert answer.status == 200

    _run(work)


def test_settings_may_change_while_connections_are_kept(up: Upstream) -> None:
    async def work() -> None:
        client = Client(Settings(insecure=True))
        async with client.send(_request(up.https_url)) as answer:
            await answer.read()
        client.settings = Settings()
        with pytest.raises(UpstreamFailed):
            async with client.send(_request(up.https_url)):
                pass
        client.close()

    _run(work)


def test_an_answer_that_does_not_begin_in_time_is_told_as_timeout(way: Way) -> None:
    way.up.default = Reply(framing=Framing(hang=threading.Event()))
    failed = _failure(way.client(), way.request(timeout_s=0.2))
    assert failed.kind == "timeout"
    way.up.wait_for(lambda up: up.abandoned)  # and the provider knows that nobody waits


def test_a_connection_that_does_not_come_about_in_time_is_told_as_timeout() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def work() -> None:
        async with _serving(silent) as url:
            slow = _request(url.replace("http:", "https:"))
            request = Request(slow.method, slow.url, slow.headers, slow.body, 30, 0.2)
            with pytest.raises(UpstreamFailed) as caught:
                async with Client().send(request):
                    pass
            assert caught.value.kind == "timeout"

    _run(work)


@pytest.mark.parametrize("how", ["reset", "close", "stream"])
@pytest.mark.parametrize("after", [None, 100])
def test_an_answer_that_breaks_off_is_told_as_cut(way: Way, how: Any, after: int | None) -> None:
    way.up.default = Reply(text="word " * 100, framing=Framing(abort=Abort(after, how)))
    assert _failure(way.client(), way.request(STREAM)).kind == "cut"


def test_a_broken_answer_never_passes_for_a_whole_one(way: Way) -> None:
    way.up.default = Reply(text="word " * 100, framing=Framing(abort=Abort(100, "close")))

    async def work() -> None:
        client = way.client()
        async with client.send(way.request(STREAM)) as answer:
            for _ in range(2):
                with pytest.raises(UpstreamFailed):
                    await answer.read()

    _run(work)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: no\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_told_as_protocol(answer: bytes) -> None:
    async def work() -> None:
        async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _read_request(reader)
            writer.write(answer)
            await reader.read()

        async with _serving(nonsense) as url:
            with pytest.raises(UpstreamFailed) as caught:
                async with Client().send(_request(url)) as got:
                    await got.read()
            assert caught.value.kind == "protocol"

    _run(work)


@pytest.mark.parametrize("url", ["ftp://host/", "nonsense", "http://", "http://ho st:99999/x"])
def test_a_url_that_is_none_is_told_as_protocol(url: str) -> None:
    failed = _failure(Client(), Request("GET", url, (), b"", 5))
    assert failed.kind in ("protocol", "dns")


def test_no_failure_tells_a_secret(up: Upstream, without_h2: Upstream) -> None:
    up.default = Reply(framing=Framing(abort=Abort()))
    urls = [up.http_url, up.https_url, "http://127.0.0.1:1", "ftp://x"]
    for url in urls:
        request = Request(
            "POST",
            f"{url}/v1/x?key={PLANTED}",
            ((b"authorization", PLANTED.encode()),),
            PLANTED.encode(),
            5,
        )
        assert PLANTED not in str(_failure(Client(), request))


# --- the server -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _relay(client: Client | None = None) -> AsyncIterator[Relay]:
    relay = Relay(client or Client())
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()


class Answer:
    """A connection to the relay, with the request sent."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def of(cls, relay: Relay, host: str | None) -> Answer:
        self = cls()
        self.reader, self.writer = await asyncio.open_connection(*relay.address)
        if host is not None:
            relay.expect(host, self.writer.get_extra_info("sockname"))
        self.writer.write(b"POST /v1/x HTTP/1.1\r\nHost: a.provider\r\nContent-Length: 2\r\n\r\n{}")
        return self

    async def rest(self) -> tuple[bytes, bytes]:
        """Return head and body as they came, once the relay has closed."""
        with contextlib.suppress(ConnectionResetError):
            data = await self.reader.read()
        self.writer.close()
        head, _, body = data.partition(b"\r\n\r\n")
        return head.lower(), body


async def _answer(relay: Relay, job: Job) -> tuple[bytes, bytes]:
    return await (await Answer.of(relay, relay.submit(job, "the-flow"))).rest()


def test_a_job_streams_while_it_runs() -> None:
    async def work() -> None:
        go_on = asyncio.Event()

        async def job(client: Client, writer: Writer) -> None:
            assert not writer.started
            await writer.start(203, [(b"X-Own", b"1"), (b"transfer-encoding", b"gzip, chunked")])
            assert writer.started
            await writer.write(b"one")
            await go_on.wait()
            await writer.write(b"")
            await writer.write(b"two")

        async with _relay() as relay:
            answer = await Answer.of(relay, relay.submit(job))
            head = await answer.reader.readuntil(b"\r\n\r\n")
            assert await answer.reader.readexactly(8) == b"3\r\none\r\n"
            go_on.set()
            assert await answer.rest() == (b"3\r\ntwo\r\n0", b"")
        assert head.startswith(b"HTTP/1.1 203 Non-Authoritative Information\r\n")
        assert b"X-Own: 1\r\n" in head
        assert head.lower().count(b"transfer-encoding: chunked") == 1
        assert b"connection" not in head.lower(), "the client's own connection may live on"

    _run(work)


def test_an_answer_of_known_length_is_not_chunked() -> None:
    async def job(client: Client, writer: Writer) -> None:
        await writer.start(200, [(b"Content-Length", b"6")])
        await writer.write(b"one")
        await writer.write(b"two")

    async def work() -> None:
        async with _relay() as relay:
            head, body = await _answer(relay, job)
        assert body == b"onetwo"
        assert b"chunked" not in head

    _run(work)


def test_a_job_answers_by_several_requests(way: Way) -> None:
    way.up.script("/v1/*", Reply(status=529, error="busy"), Reply(text="now it works"))

    async def job(client: Client, writer: Writer) -> None:
        async with client.send(way.request()) as answer:
            assert answer.status == 529
        async with client.send(way.request()) as answer:
            await writer.start(answer.status, answer.headers)
            async for piece in answer.pieces():
                await writer.write(piece)

    async def work() -> None:
        async with _relay(way.client()) as relay:
            head, body = await _answer(relay, job)
        assert head.startswith(b"http/1.1 200 ")
        assert b"now it works" in body

    _run(work)
    assert len(way.up.requests) == 2


async def _never(client: Client, writer: Writer) -> None:
    raise AssertionError("this job is nobody's")


def test_a_connection_without_a_job_gets_404() -> None:
    async def work() -> None:
        async with _relay() as relay:
            host = relay.submit(_never)
            head, _ = await (await Answer.of(relay, None)).rest()
            assert head.startswith(b"http/1.1 404 ")
            reader, writer = await asyncio.open_connection(*relay.address)
            writer.write(f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert (await reader.read()).startswith(b"HTTP/1.1 404 "), "a name alone is no proof"
            writer.close()
            assert relay.waits(host)

    _run(work)


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/9\r\n\r\n"])
def test_what_is_no_http_is_closed(sent: bytes) -> None:
    async def work() -> None:
        async with _relay() as relay:
            reader, writer = await asyncio.open_connection(*relay.address)
            writer.write(sent)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()

    _run(work)


def test_a_job_is_taken_once() -> None:
    async def job(client: Client, writer: Writer) -> None:
        await writer.start(200, [(b"content-length", b"0")])

    async def work() -> None:
        async with _relay() as relay:
            host = relay.submit(job)
            assert relay.waits(host)
            for status in (b"200", b"404"):
                head, _ = await (await Answer.of(relay, host)).rest()
                assert head.startswith(b"http/1.1 " + status)
                assert not relay.waits(host)

    _run(work)


def test_a_job_that_is_forgotten_does_not_begin() -> None:
    async def work() -> None:
        async with _relay() as relay:
            host = relay.submit(_never)
            relay.forget(host)
            assert not relay.waits(host)
            head, _ = await (await Answer.of(relay, host)).rest()
            assert head.startswith(b"http/1.1 404 ")

    _run(work)


def test_a_job_whose_connection_is_closed_before_the_request_does_not_begin() -> None:
    async def work() -> None:
        async with _relay() as relay:
            host = relay.submit(_never)
            reader, writer = await asyncio.open_connection(*relay.address)
            relay.expect(host, writer.get_extra_info("sockname"))
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            assert not relay.waits(host)

    _run(work)


def test_one_time_names_cannot_be_guessed() -> None:
    relay = Relay(Client())
    names = {relay.submit(_never) for _ in range(100)}
    assert len(names) == 100
    assert all(re.fullmatch(r"[0-9a-f]{32}" + re.escape(DOMAIN), name) for name in names)


def test_a_job_that_fails_before_it_answers_gives_502(caplog: pytest.LogCaptureFixture) -> None:
    async def job(client: Client, writer: Writer) -> None:
        raise RuntimeError(PLANTED)

    async def work() -> None:
        async with _relay() as relay:
            head, body = await _answer(relay, job)
        assert head.startswith(b"http/1.1 502 ")
        error = json.loads(body)["error"]
        assert error["type"] == "relay_failed"
        assert "RuntimeError" in error["message"]
        assert PLANTED.encode() not in body

    with caplog.at_level(logging.WARNING):
        _run(work)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert re.search(r"the-flow: .*RuntimeError at test_relay\.py:\d+", caplog.text)
    assert PLANTED not in caplog.text


def test_a_failure_of_the_provider_that_a_job_leaves_alone_gives_502() -> None:
    async def job(client: Client, writer: Writer) -> None:
        async with client.send(_request("http://127.0.0.1:1")):
            pass

    async def work() -> None:
        async with _relay() as relay:
            head, body = await _answer(relay, job)
        assert head.startswith(b"http/1.1 502 ")
        assert json.loads(body)["error"]["type"] == "upstream_connect"

    _run(work)


async def _says_nothing(client: Client, writer: Writer) -> None:
    pass


async def _writes_without_start(client: Client, writer: Writer) -> None:
    await writer.write(b"x")


async def _starts_with_a_header_that_is_none(client: Client, writer: Writer) -> None:
    await writer.start(200, [(b"x", b"a\r\nset-cookie: b")])


@pytest.mark.parametrize(
    "job", [_says_nothing, _writes_without_start, _starts_with_a_header_that_is_none]
)
def test_a_job_that_gives_no_answer_gives_502(job: Job) -> None:
    async def work() -> None:
        async with _relay() as relay:
            head, body = await _answer(relay, job)
        assert head.startswith(b"http/1.1 502 ")
        assert b"set-cookie" not in head
        assert json.loads(body)["error"]["code"] == 502

    _run(work)


def test_a_job_that_fails_while_it_answers_breaks_the_stream_off() -> None:
    async def work() -> None:
        received = asyncio.Event()

        async def job(client: Client, writer: Writer) -> None:
            await writer.start(200, [])
            await writer.write(b"one")
            await received.wait()
            raise RuntimeError("in the middle")

        async with _relay() as relay:
            answer = await Answer.of(relay, relay.submit(job))
            await answer.reader.readuntil(b"3\r\none\r\n")
            received.set()
            assert await answer.rest() == (b"", b""), "not even the end of the chunks"

    _run(work)


@pytest.mark.parametrize("body", [b"short", b"much too long"])
def test_an_answer_of_the_wrong_length_is_no_whole_one(body: bytes) -> None:
    async def job(client: Client, writer: Writer) -> None:
        await writer.start(200, [(b"content-length", b"9")])
        await writer.write(body)

    async def work() -> None:
        async with _relay() as relay:
            _, got = await _answer(relay, job)
        assert len(got) < 9

    _run(work)


def test_a_job_is_cancelled_when_the_client_leaves(way: Way) -> None:
    go_on = threading.Event()
    way.up.default = Reply(framing=Framing(hang=go_on, hang_after=1))

    async def work() -> None:
        ended = asyncio.Event()

        async def job(client: Client, writer: Writer) -> None:
            try:
                async with client.send(way.request(STREAM)) as answer:
                    await writer.start(answer.status, answer.headers)
                    async for piece in answer.pieces():
                        await writer.write(piece)
            except asyncio.CancelledError:
                ended.set()
                raise

        async with _relay(way.client()) as relay:
            answer = await Answer.of(relay, relay.submit(job))
            await answer.reader.readuntil(b"data: ")
            answer.writer.close()
            await ended.wait()
            await asyncio.to_thread(way.up.wait_for, lambda up: up.abandoned)

    _run(work)
    go_on.set()


def test_a_job_is_cancelled_before_the_provider_answers(way: Way) -> None:
    way.up.default = Reply(framing=Framing(hang=threading.Event()))

    async def job(client: Client, writer: Writer) -> None:
        async with client.send(way.request()):
            raise AssertionError("it hangs")

    async def work() -> None:
        async with _relay(way.client()) as relay:
            answer = await Answer.of(relay, relay.submit(job))
            await asyncio.to_thread(way.up.wait_for, lambda up: up.requests)
            answer.writer.close()
            await asyncio.to_thread(way.up.wait_for, lambda up: up.abandoned)

    _run(work)


def test_stopping_cancels_jobs_and_listens_no_longer() -> None:
    async def work() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def job(client: Client, writer: Writer) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        relay = Relay(Client())
        await relay.start()
        answer = await Answer.of(relay, relay.submit(job))
        await begun.wait()
        await relay.stop()
        assert ended.is_set()
        assert await answer.rest() == (b"", b"")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*relay.address)

    _run(work)


def test_a_job_waits_for_a_client_that_does_not_keep_up() -> None:
    piece, number = b"x" * 65536, 2000  # 130 MB: no socket holds that

    async def work() -> None:
        written = 0

        async def job(client: Client, writer: Writer) -> None:
            nonlocal written
            await writer.start(200, [(b"content-length", str(len(piece) * number).encode())])
            for _ in range(number):
                await writer.write(piece)
                written += 1

        async with _relay() as relay:
            answer = await Answer.of(relay, relay.submit(job))
            await answer.reader.readuntil(b"\r\n\r\n")
            for _ in range(100):
                await asyncio.sleep(0)
            assert written < number / 2
            size = 0
            while data := await answer.reader.read(1 << 20):
                size += len(data)
            assert size == len(piece) * number
            answer.writer.close()

    _run(work)


# --- in mitmdump ----------------------------------------------------------------------

TWICE = '''
from kimi_core import flows
from kimi_core.flows import Rank


class Twice:
    """Asks for everything twice, and streams both answers to the client."""

    def load(self, loader):
        flows.join(self, loader)

    def done(self):
        return flows.leave(self)

    @flows.step(Rank.ENFORCE)
    @flows.fail_open
    def request(self, flow):
        exchange = flows.exchange(flow)
        if exchange is not None:
            exchange.job = make

    @flows.step(Rank.ENFORCE)
    @flows.fail_open
    def responseheaders(self, flow):
        pass


def make(request, adapt):
    async def job(client, writer):
        if b"fail at once" in request.body:
            raise RuntimeError(request.body)
        for _ in range(2):
            async with client.send(request) as answer:
                if not writer.started:
                    kept = [(n, v) for n, v in answer.headers if n.lower() != b"content-length"]
                    await writer.start(answer.status, kept)
                async for piece in answer.pieces():
                    await writer.write(piece)
            if b"fail later" in request.body:
                raise RuntimeError(request.body)

    return job


addons = [Twice()]
'''


def _script(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "twice.py"
    script.write_text(TWICE)
    return str(script)


@pytest.fixture(scope="module")
def relayed(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The whole chain, where each exchange takes two upstream requests."""
    folder = tmp_path_factory.mktemp("relayed")
    with Proxy(folder, provider, scripts=("all.py", _script(folder))) as started:
        yield started


class Through(NamedTuple):
    client: httpx.Client
    url: str
    body: dict[str, Any]

    def post(self, **more: Any) -> httpx.Response:
        return self.client.post(self.url, json=self.body | more)


@pytest.fixture(params=["base URL", "HTTPS_PROXY", "HTTPS_PROXY with HTTP/2"])
def through(request: pytest.FixtureRequest, relayed: Proxy, up: Upstream) -> Iterator[Through]:
    if request.param == "base URL":
        with relayed.base_client() as client:
            yield Through(client, "/v1/chat/completions", ASK)
        return
    headers = {"authorization": f"Bearer {CLIENTS}"}
    with relayed.client(http2="HTTP/2" in request.param, headers=headers) as client:
        body = ASK | {"model": "gpt-4o"}
        yield Through(client, "https://api.openai.com/v1/chat/completions", body)


def test_both_answers_reach_the_client(through: Through, up: Upstream) -> None:
    up.script("/v1/*", Reply(text="first one"), Reply(text="second one"))
    answer = through.post(stream=True)
    assert answer.status_code == 200
    assert answer.text.count("[DONE]") == 2
    assert answer.text.index("first") < answer.text.index("second")
    assert len(up.requests) == 2
    assert up.requests[0].body == up.requests[1].body
    assert {request.key for request in up.requests} <= {PLANTED, CLIENTS}
    hosts = {request.authority for request in up.requests}
    assert hosts <= {"integrate.api.nvidia.com", "api.openai.com"}


def test_the_first_piece_reaches_the_client_before_the_provider_has_finished(
    through: Through, up: Upstream
) -> None:
    go_on = threading.Event()
    framing = Framing(hang=go_on, hang_after=2)
    up.script("/v1/*", Reply(text="first", framing=framing), Reply(text="second"))
    body = through.body | {"stream": True}
    with through.client.stream("POST", through.url, json=body) as answer:
        pieces = answer.iter_bytes()
        first = next(pieces)
        assert first
        assert b"[DONE]" not in first
        assert len(up.requests) == 1
        go_on.set()
        assert b"".join([first, *pieces]).count(b"[DONE]") == 2


def test_a_client_that_leaves_is_left_by_the_job_too(through: Through, up: Upstream) -> None:
    up.default = Reply(framing=Framing(hang=threading.Event(), hang_after=2))
    body = through.body | {"stream": True}
    with through.client.stream("POST", through.url, json=body) as answer:
        next(answer.iter_bytes())
    through.client.close()
    up.wait_for(lambda up: up.abandoned)
    assert len(up.requests) == 1


def test_a_job_that_fails_at_once_gives_an_error_to_read(through: Through, up: Upstream) -> None:
    answer = through.post(user="fail at once")
    assert answer.status_code == 502
    assert "RuntimeError" in answer.json()["error"]["message"]
    assert not up.requests


def test_a_job_that_fails_later_breaks_the_stream_off(through: Through, up: Upstream) -> None:
    with pytest.raises(httpx.TransportError):
        through.post(user="fail later", stream=True)
    assert len(up.requests) == 1


def test_a_relayed_connection_of_the_client_is_used_again(relayed: Proxy, up: Upstream) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", relayed.port, timeout=30)
    for _ in range(3):
        connection.request("POST", "/v1/chat/completions", BODY)
        answer = connection.getresponse()
        assert answer.status == 200
        answer.read()
        assert not answer.will_close
        if not _:
            own_port = connection.sock.getsockname()[1]
        assert connection.sock.getsockname()[1] == own_port
    connection.close()
    assert len(up.requests) == 6


def test_many_exchanges_of_one_http2_connection_run_at_once(relayed: Proxy, up: Upstream) -> None:
    go_on = threading.Event()
    before = relayed.output.count("client connect")

    async def work() -> None:
        url, headers = "https://api.openai.com/v1/chat/completions", {"authorization": CLIENTS}
        async with relayed.async_client(http2=True, headers=headers) as client:
            await client.post(url, json=ASK)  # from now on the connection is known to take many
            up.clear()
            up.default = Reply(framing=Framing(hang=go_on))
            asked = [asyncio.create_task(client.post(url, json=ASK)) for _ in range(12)]
            await asyncio.to_thread(up.wait_for, lambda up: up.count == 12)
            go_on.set()
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}

    _run(work)
    assert up.count == 24
    assert relayed.output.count("client connect") == before + 1


def _relay_port(proxy: Proxy) -> int:
    with proxy.base_client() as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    found = wait_until(lambda: re.findall(r"server connect 127\.0\.0\.1:(\d+)\s", proxy.output))
    return int(found[-1])


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nobody_else_gets_to_the_relay(scheme: str, relayed: Proxy, up: Upstream) -> None:
    port = _relay_port(relayed)
    targets = [
        f"anything{DOMAIN}",
        f"{'0' * 32}{DOMAIN.upper()}.",
        f"127.0.0.1:{port}",
        f"localhost:{port}",
    ]
    number, before = len(up.requests), relayed.output.count("killed before connect: kimi-proxy")
    for target in targets:
        with relayed.client() as client:
            try:
                assert client.get(f"{scheme}://{target}/").status_code == 502, target
            except httpx.TransportError:
                assert scheme == "https"
    told = "killed before connect: kimi-proxy"
    wait_until(lambda: relayed.output.count(told) >= before + len(targets))
    assert len(up.requests) == number
    direct = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", trust_env=False)
    assert direct.status_code == 404


@pytest.mark.parametrize(
    "scripts", [("router.py",), ("router.py", "guard.py"), ("guard.py", "router.py")]
)
def test_router_alone_or_in_any_order_finds_the_relay(
    scripts: tuple[str, ...], up: Upstream, tmp_path: Path
) -> None:
    go_on = threading.Event()
    framing = Framing(hang=go_on, hang_after=2)
    up.script("/v1/*", Reply(text="first", framing=framing))
    with Proxy(tmp_path, up, scripts=(*scripts, _script(tmp_path))) as proxy:
        with (
            proxy.base_client() as client,
            client.stream("POST", "/v1/chat/completions", json=ASK | {"stream": True}) as answer,
        ):
            pieces = answer.iter_bytes()
            first = next(pieces)
            go_on.set()
            assert b"".join([first, *pieces]).count(b"[DONE]") == 2
        with proxy.client() as client:
            assert client.get(f"http://127.0.0.1:{_relay_port(proxy)}/").status_code in (404, 502)
            assert client.get(f"http://anything{DOMAIN}/").status_code == 502
    assert "Traceback" not in proxy.output


def test_a_saved_flow_shows_its_provider_and_can_be_replayed(up: Upstream, tmp_path: Path) -> None:
    scripts = ("all.py", _script(tmp_path))
    saved = tmp_path / "flows.mitm"
    broken = Reply(framing=Framing(abort=Abort(100)))
    up.script("/v1/*", Reply(), Reply(), broken)
    options = ["flow_detail=4", "termlog_verbosity=debug"]
    folder = tmp_path / "first"
    with Proxy(folder, up, scripts=scripts, options=options, arguments=["-w", str(saved)]) as proxy:
        with proxy.base_client() as client:
            headers = {"authorization": f"Bearer {CLIENTS}"}
            client.post("/v1/chat/completions", json=ASK, headers=headers)
            with pytest.raises(httpx.TransportError):
                client.post("/v1/chat/completions", json=ASK | {"stream": True}, headers=headers)
            for fault in ("fail later", "fail at once"):  # neither has been sent on before it ends
                answer = client.post("/v1/chat/completions", json=ASK | {"user": fault})
                assert answer.status_code == 502
        proxy.settled()
        hang = Reply(framing=Framing(hang=threading.Event(), hang_after=1))
        up.default = hang
        with (
            proxy.base_client() as client,
            client.stream("POST", "/v1/chat/completions", json=ASK | {"stream": True}) as answer,
        ):
            next(answer.iter_bytes())
            assert proxy.stop() == 0  # with the job still running
    up.wait_for(lambda up: up.abandoned)
    for path in (saved, proxy.log, proxy.store):
        content = path.read_bytes()
        for secret in (PLANTED, CLIENTS):
            assert secret.encode() not in content, path.name
    assert saved.read_bytes().count(b"integrate.api.nvidia.com") >= 5
    assert DOMAIN.encode() not in saved.read_bytes()
    assert DOMAIN not in proxy.output

    up.clear()
    up.default = Reply()
    again = Proxy(tmp_path / "again", up, scripts=scripts, arguments=["-C", str(saved)])
    with again:
        up.wait_for(lambda up: up.count == 7)
    assert {request.authority for request in up.requests} == {"integrate.api.nvidia.com"}
    assert DOMAIN not in again.output


RELOADED = '''
import gc
import sys

sys.path.insert(0, {folder!r})

from mitmproxy.http import HTTPFlow, Response
from router import Dispatch, Router


class Census:
    """Tells how many flows there are; answers some before they reach the relay."""

    def request(self, flow):
        if b"answer" in flow.request.raw_content:
            flow.response = Response.make(203)

    def client_disconnected(self, client):
        gc.collect()
        alive = sum(isinstance(one, HTTPFlow) for one in gc.get_objects())
        print("flows alive:", alive, flush=True)


addons = [Router(), Dispatch(), Census()]
'''


def test_a_reload_of_scripts_leaves_the_running_job_alone(up: Upstream, tmp_path: Path) -> None:
    chain = tmp_path / "chain.py"
    chain.write_text(RELOADED.format(folder=str(ADDONS)))
    go_on = threading.Event()
    up.script("/v1/*", Reply(framing=Framing(hang=go_on, hang_after=2)))
    with (
        Proxy(tmp_path, up, scripts=(str(chain), _script(tmp_path))) as proxy,
        proxy.base_client() as client,
    ):
        with client.stream("POST", "/v1/chat/completions", json=ASK | {"stream": True}) as answer:
            pieces = answer.iter_bytes()
            first = next(pieces)
            chain.write_text(chain.read_text() + "\nprint('loaded again', flush=True)\n")
            os.utime(chain, (2e9, 2e9))
            wait_until(lambda: "loaded again" in proxy.output)
            go_on.set()
            assert b"".join([first, *pieces]).count(b"[DONE]") == 2
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    assert up.count == 4


def test_flows_that_were_relayed_are_not_kept(up: Upstream, tmp_path: Path) -> None:
    census = tmp_path / "chain.py"
    census.write_text(RELOADED.format(folder=str(ADDONS)))
    scripts = (str(census), _script(tmp_path))
    with Proxy(tmp_path, up, scripts=scripts) as proxy:
        with proxy.base_client() as client:
            for user, status in [("me", 200), ("answer me", 203)] * 10:
                body = ASK | {"user": user}
                assert client.post("/v1/chat/completions", json=body).status_code == status
        alive = wait_until(lambda: re.search(r"flows alive: (\d+)", proxy.output))
        assert int(alive[1]) < 5


def test_relayed_requests_go_through_the_proxy_that_mitmproxy_uses(
    up: Upstream, tmp_path: Path
) -> None:
    tunnel = Tunnel(up.https_port, connect=True)

    async def work() -> None:
        async with _serving(tunnel) as url:
            await asyncio.to_thread(talk, url)

    def talk(url: str) -> None:
        arguments = ["--mode", f"upstream:{url}", "--upstream-auth", "me:my-password"]
        scripts = ("all.py", _script(tmp_path))
        with (
            Proxy(tmp_path, up, scripts=scripts, arguments=arguments) as proxy,
            proxy.client(headers={"authorization": f"Bearer {CLIENTS}"}) as client,
        ):
            openai = "https://api.openai.com/v1"
            answer = client.post(f"{openai}/chat/completions", json=ASK | {"stream": True})
            assert answer.text.count("[DONE]") == 2
            assert client.get(f"{openai}/models").status_code == 200  # the direct way

    _run(work)
    relayed, direct = tunnel.heads
    assert relayed.startswith(b"CONNECT integrate.api.nvidia.com:443 ")
    assert direct.startswith(b"CONNECT api.openai.com:443 ")
    for head in (relayed, direct):
        assert b"Proxy-Authorization: Basic " in head


def test_exchanges_from_several_clients_do_not_mix(relayed: Proxy, up: Upstream) -> None:
    up.default = lambda received: Reply(text=received.json()["user"])

    def ask(number: int) -> bool:
        with relayed.base_client() as client:
            for turn in range(5):
                word = f"number-{number}-{turn}-"
                answer = client.post("/v1/chat/completions", json=ASK | {"user": word})
                if answer.text.count(word) != 2 or answer.text.count("number-") != 2:
                    print(word, answer, answer.text)
                    return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(8)))
