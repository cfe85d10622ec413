"""Keys stay where they belong, and our own ports stay closed to proxied clients."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from proxy import PLANTED, Proxy, wait_until
from upstream import Abort, Framing, Reply, Upstream

CLIENTS = "sk-clients-own-fedcba9876543210"
HELLO = [{"role": "user", "content": "Hello"}]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def guarded(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("guarded")
    with Proxy(folder, provider, options=[f"stats_port={_free_port()}"]) as started:
        wait_until(lambda: _answers(_stats_port(started)))
        yield started


def _stats_port(proxy: Proxy) -> int:
    return next(int(o.partition("=")[2]) for o in proxy.command if o.startswith("stats_port="))


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_no_key_is_found_in_flows_store_or_log(up: Upstream, tmp_path: Path) -> None:
    """All that can go well or wrong, then the whole folder is searched."""
    saved = tmp_path / "flows.mitm"
    up.keys["api.anthropic.com"] = "another key"
    up.echo_key = True
    options = ["flow_detail=4", "termlog_verbosity=debug"]
    with Proxy(tmp_path, up, options=options, arguments=["-w", str(saved)]) as proxy:
        headers = {"authorization": f"Bearer {CLIENTS}"}
        body = {"model": "kimi-k2", "messages": HELLO}
        with proxy.base_client() as client:
            for stream in (False, True):
                client.post("/v1/chat/completions", json=body | {"stream": stream}, headers=headers)
            up.default = Reply(status=500, error="broken")
            client.post("/v1/chat/completions", json=body, headers=headers)
            client.post("/v1/chat/completions", json={"model": "unheard-of"}, headers=headers)
            client.post(f"/v1beta/models/gem:generateContent?key={CLIENTS}", json={"contents": []})
            echoed = client.post(
                "/v1/messages", json=body | {"model": "claude-test"}, headers=headers
            )
            assert echoed.status_code == 401
            assert PLANTED not in echoed.text, "our key is not the client's to see"
            up.echo_key = False
            up.keys.clear()
            told = Reply(status=401, error=f"bad key {PLANTED}", framing=Framing(gzip="whole"))
            up.script("*/chat/completions", told)
            squeezed = client.post("/v1/chat/completions", json=body, headers=headers)
            assert squeezed.headers["content-encoding"] == "gzip"
            assert "bad key" in squeezed.text
            assert PLANTED not in squeezed.text
            up.default = Reply(framing=Framing(abort=Abort()))
            client.post("/v1/chat/completions", json=body | {"stream": True}, headers=headers)
        with proxy.client() as client:
            up.default = Reply()
            client.post(
                f"https://generativelanguage.googleapis.com/v1beta/models/other:generateContent?key={CLIENTS}",
                json={"contents": []},
            )
            assert f"key={CLIENTS}" in up.requests[-1].query
            client.get("https://api.openai.com/v1/anything", headers=headers)
            assert up.requests[-1].key == CLIENTS
            client.post("https://api.openai.com/v1/chat/completions", json=body, headers=headers)
        assert PLANTED in {request.key for request in up.requests}
        proxy.settled()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert saved in files
    assert saved.stat().st_size > 1000
    assert proxy.store in files
    for path in files:
        content = path.read_bytes()
        for key in (PLANTED, CLIENTS):
            assert key.encode() not in content, f"{path.name} holds a key"


def test_a_flow_still_open_when_the_proxy_stops_is_saved_without_keys(
    up: Upstream, tmp_path: Path
) -> None:
    import threading

    go_on = threading.Event()
    saved = tmp_path / "flows.mitm"
    up.default = Reply(text="word " * 50, framing=Framing(hang=go_on, hang_after=5))
    up.script("*/models", Reply(framing=Framing(hang=go_on)))
    waiting = threading.Thread(target=lambda: _list_models(proxy), daemon=True)
    try:
        with Proxy(tmp_path, up, arguments=["-w", str(saved)]) as proxy:
            with (
                proxy.base_client() as client,
                client.stream(
                    "POST",
                    "/v1/chat/completions",
                    json={"model": "kimi-k2", "stream": True, "messages": HELLO},
                ) as answer,
            ):
                pieces, came = answer.iter_bytes(), b""
                while b"word" not in came:
                    came += next(pieces)
                waiting.start()  # no exchange, and our key is in it all the same
                up.wait_for(lambda provider: provider.count == 2)
                assert proxy.stop() == 0
            row = proxy.row(1)
    finally:
        go_on.set()
    assert row["partial"] == 1
    assert row["gen_ai.usage.output_tokens"] > 0
    assert saved.stat().st_size > 500
    assert PLANTED.encode() not in saved.read_bytes()


def _list_models(proxy: Proxy) -> None:
    with proxy.base_client() as client, contextlib.suppress(httpx.TransportError):
        client.get("/moonshot/v1/models")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "127.1.2.3"])
@pytest.mark.parametrize("through", ["CONNECT", "absolute"])
def test_no_proxied_client_reaches_our_ports(guarded: Proxy, host: str, through: str) -> None:
    stats_port = _stats_port(guarded)
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        target = f"{host}:{stats_port}"
        if through == "CONNECT":
            connection.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            connection.sendall(f"GET /health HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        else:
            connection.sendall(
                f"GET http://{target}/health HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()
            )
        answer = connection.recv(4000)
    assert not answer.startswith(b"HTTP/1.1 200")
    assert b"version" not in answer


def test_a_name_that_resolves_to_this_machine_is_no_way_in(guarded: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        target = f"{socket.gethostname()}:{_stats_port(guarded)}"
        connection.sendall(
            f"GET http://{target}/health HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()
        )
        assert not connection.recv(4000).startswith(b"HTTP/1.1 200")


def test_a_base_url_that_leads_back_is_refused(up: Upstream, tmp_path: Path) -> None:
    mirror = "  mirror: {targets: [{provider: local}]}"
    with Proxy(tmp_path, up, more_rules=mirror) as proxy:
        rules = proxy.rules.read_text()
        here = rules.replace(f"{up.http_url}/v1", f"http://localhost:{proxy.port}/v1")
        proxy.rules.write_text(here)
        with proxy.base_client() as client:

            def refused() -> httpx.Response | None:
                answer = client.post(
                    "/v1/chat/completions", json={"model": "mirror", "messages": HELLO}
                )
                return answer if answer.status_code == 508 else None

            answer = wait_until(refused)
    assert "leads back" in answer.json()["error"]["message"]


def test_non_llm_hosts_keep_their_certificate_and_are_not_recorded(
    guarded: Proxy, up: Upstream
) -> None:
    own = ssl.create_default_context(cafile=str(up.ca_file))
    with httpx.Client(proxy=guarded.url, verify=own, trust_env=False) as client:
        assert client.get("https://other.example/v1/models").status_code == 200
    assert "https://other.example" not in guarded.output


def test_plain_tcp_through_connect_passes(guarded: Proxy, up: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
            connection.sendall(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            connection.sendall(b"SSH-2.0-test\r\n")
            server.settimeout(10)
            peer, _ = server.accept()
            with peer:
                assert peer.recv(100) == b"SSH-2.0-test\r\n"
                peer.sendall(b"SSH-2.0-other\r\n")
                assert connection.recv(100) == b"SSH-2.0-other\r\n"


@pytest.mark.parametrize(
    ("key", "model", "status"),
    [
        ("sk-ant-own-key-0123", "claude-x", 200),
        ("sk-or-own-key-01234", "claude-x", 401),
        ("", "claude-x", 401),
    ],
)
def test_a_clients_own_key_goes_to_its_own_provider_only(
    up: Upstream, tmp_path: Path, key: str, model: str, status: int
) -> None:
    with (
        Proxy(tmp_path, up, environment={"ANTHROPIC_TEST_KEY": ""}) as proxy,
        proxy.base_client() as client,
    ):
        answer = client.post(
            "/v1/messages",
            json={"model": model, "messages": HELLO},
            headers={"x-api-key": key} if key else {},
        )
    assert answer.status_code == status, answer.text
    if status == 200:
        assert up.requests[-1].header("x-api-key") == key
    else:
        assert up.count == 0
        assert "anthropic" in answer.json()["error"]["message"]
        assert "ANTHROPIC_TEST_KEY" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("key", "passes"),
    [
        ("sk-moonshots-or-whoever", True),  # `sk-` begins the keys of several providers
        ("a-key-without-a-form", True),
        ("sk-ant-api03-anthropics", False),
        ("AIza-googles-key", True),  # these rules know no such form
    ],
)
def test_a_key_of_another_providers_form_stays_behind_whatever_the_path_says(
    up: Upstream, tmp_path: Path, key: str, passes: bool
) -> None:
    with (
        Proxy(tmp_path, up, environment={"PLANTED_KEY": ""}) as proxy,
        proxy.base_client() as client,
    ):
        headers = {"authorization": f"Bearer {key}", "x-api-key": "sk-or-another", "cookie": "a=b"}
        chat = client.post(
            "/moonshot/v1/chat/completions?key=AIza-too",
            json={"model": "kimi-k2-turbo", "messages": HELLO},
            headers=headers,
        )
        listed = client.get("/moonshot/v1/models?key=AIza-too", headers={"x-api-key": key})
    assert [chat.status_code, listed.status_code] == ([200, 200] if passes else [401, 401])
    for sent in up.requests:
        assert sent.key == key
        assert sent.query == ""
        assert sent.header("x-api-key") is None
        assert sent.header("cookie") is None


def test_a_key_that_is_no_utf_8_is_a_key_like_any_other(up: Upstream, tmp_path: Path) -> None:
    with Proxy(tmp_path, up) as proxy:
        body = b'{"model": "kimi-k2", "messages": []}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{proxy.port}\r\n"
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as connection:
            connection.sendall(
                head.encode()
                + b"Authorization: Bearer abc\xff\r\nContent-Length: %d\r\n\r\n" % len(body)
                + body
            )
            assert connection.recv(4000).startswith(b"HTTP/1.1 200")
        row = proxy.row(1)
    assert up.requests[-1].key == PLANTED
    assert row["status"] == 200
