"""Real clients through a real mitmdump with the whole chain, to a fake provider."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from typing import Any

import anthropic
import httpx
import openai
import pytest
from google import genai
from google.genai import types as genai_types

from proxy import PLANTED, Proxy
from upstream import Abort, Framing, Reply, TokenUsage, ToolCall, Upstream

HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
def rows_before(chain: Proxy) -> int:
    return chain.settled()


def openai_client(chain: Proxy, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{chain.url}/v1", api_key="dummy", max_retries=0, **options)


# --- clients by base URL


def test_the_openai_sdk_gets_a_reply_and_the_provider_our_key(
    chain: Proxy, up: Upstream, rows_before: int
) -> None:
    usage = TokenUsage(input=120, output=30, cached=100)
    up.default = Reply(text="Hi.", usage=usage)
    done = openai_client(chain).chat.completions.with_raw_response.create(
        model="kimi-k2", messages=HELLO
    )
    assert done.parse().choices[0].message.content == "Hi."
    sent = up.requests[-1]
    assert sent.host == "integrate.api.nvidia.com"
    assert sent.path == "/v1/chat/completions"
    assert sent.sni == "integrate.api.nvidia.com"
    assert sent.key == PLANTED
    assert sent.json()["model"] == "moonshotai/kimi-k2-instruct"
    assert done.headers["x-kimi-proxy-provider"] == "nvidia"
    assert done.headers["x-kimi-proxy-input-tokens"] == "120"
    assert done.headers["x-kimi-proxy-output-tokens"] == "30"
    row = chain.row(rows_before + 1)
    assert row["gen_ai.usage.input_tokens"] == 120
    assert row["gen_ai.usage.cache_read.input_tokens"] == 100
    assert row["input_source"] == row["output_source"] == "usage"
    assert row["gen_ai.request.model"] == "kimi-k2"
    assert row["context_window"] == 262144
    assert row["session_id"] == done.headers["x-kimi-proxy-session"]
    assert row["user_tokens"] > 0


def test_a_stream_is_counted_by_usage_that_the_client_does_not_see(
    chain: Proxy, up: Upstream, rows_before: int
) -> None:
    up.default = Reply(text="streamed words", usage=TokenUsage(input=77, output=9))
    chunks = list(
        openai_client(chain).chat.completions.create(model="kimi-k2", messages=HELLO, stream=True)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "streamed words"
    assert all(chunk.choices for chunk in chunks), "the usage chunk was not asked for"
    assert up.requests[-1].json()["stream_options"] == {"include_usage": True}
    row = chain.row(rows_before + 1)
    assert (row["gen_ai.usage.input_tokens"], row["gen_ai.usage.output_tokens"]) == (77, 9)
    assert row["gen_ai.request.stream"] == 1
    assert row["partial"] == 0
    assert 0 < row["time_to_first_chunk_s"] <= row["duration_s"]


def test_usage_that_the_client_asked_for_reaches_it(chain: Proxy, up: Upstream) -> None:
    up.default = Reply(text="x", usage=TokenUsage(input=5, output=6))
    chunks = list(
        openai_client(chain).chat.completions.create(
            model="kimi-k2", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 5


def test_a_provider_that_refuses_stream_options_is_not_sent_them(
    chain: Proxy, up: Upstream, rows_before: int
) -> None:
    chunks = list(
        openai_client(chain).chat.completions.create(model="small", messages=HELLO, stream=True)
    )
    assert chunks
    assert "stream_options" not in up.requests[-1].json()
    assert chain.row(rows_before + 1)["input_source"] == "usage", "Mistral says it unasked"


def test_tool_calls_stream_through_unchanged(chain: Proxy, up: Upstream) -> None:
    call = ToolCall("functions.read:0", "read", '{"path": "a/b.py"}')
    up.default = Reply(tool_calls=(call,))
    chunks = openai_client(chain).chat.completions.create(
        model="kimi-k2", messages=HELLO, stream=True
    )
    name = arguments = ""
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or []:
            name += (delta.function and delta.function.name) or ""
            arguments += (delta.function and delta.function.arguments) or ""
    assert (name, json.loads(arguments)) == ("read", {"path": "a/b.py"})


@pytest.mark.parametrize("stream", [False, True])
def test_the_responses_api(chain: Proxy, up: Upstream, rows_before: int, stream: bool) -> None:
    up.default = Reply(text="answer", usage=TokenUsage(input=40, output=4))
    client = openai_client(chain)
    if stream:
        said = "".join(
            event.delta
            for event in client.responses.create(model="answers", input="hi", stream=True)
            if event.type == "response.output_text.delta"
        )
    else:
        said = client.responses.create(model="answers", input="hi").output_text
    assert said == "answer"
    assert up.requests[-1].path == "/v1/responses"
    row = chain.row(rows_before + 1)
    assert (row["gen_ai.usage.input_tokens"], row["dialect"]) == (40, "responses")
    assert row["cost_usd"] == pytest.approx((40 * 2.5 + 4 * 10) / 1e6)


@pytest.mark.parametrize("stream", [False, True])
def test_the_anthropic_sdk(chain: Proxy, up: Upstream, rows_before: int, stream: bool) -> None:
    up.default = Reply(text="bonjour", usage=TokenUsage(input=50, output=5))
    client = anthropic.Anthropic(base_url=chain.url, api_key="dummy", max_retries=0)
    if stream:
        with client.messages.stream(model="claude-test", max_tokens=50, messages=HELLO) as streamed:
            said = "".join(streamed.text_stream)
    else:
        message = client.messages.create(model="claude-test", max_tokens=50, messages=HELLO)
        said = message.content[0].text
    assert said == "bonjour"
    sent = up.requests[-1]
    assert (sent.host, sent.header("x-api-key")) == ("api.anthropic.com", PLANTED)
    assert sent.header("authorization") is None
    assert sent.json()["model"] == "claude-sonnet-4-5"
    row = chain.row(rows_before + 1)
    assert (row["gen_ai.usage.input_tokens"], row["gen_ai.usage.output_tokens"]) == (50, 5)
    assert row["cost_usd"] == pytest.approx((50 * 3 + 5 * 15) / 1e6)


def test_count_tokens_goes_to_the_provider_and_counts_as_no_tokens(
    chain: Proxy, up: Upstream, rows_before: int
) -> None:
    client = anthropic.Anthropic(base_url=chain.url, api_key="dummy", max_retries=0)
    counted = client.messages.count_tokens(model="claude-test", messages=HELLO)
    assert counted.input_tokens > 0
    row = chain.row(rows_before + 1)
    assert row["gen_ai.operation.name"] == "count_tokens"
    assert row["gen_ai.usage.input_tokens"] is None
    assert row["cost_usd"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_the_google_sdk(chain: Proxy, up: Upstream, rows_before: int, stream: bool) -> None:
    up.default = Reply(text="ciao", usage=TokenUsage(input=60, output=6))
    client = genai.Client(api_key="dummy", http_options=genai_types.HttpOptions(base_url=chain.url))
    if stream:
        said = "".join(
            chunk.text or ""
            for chunk in client.models.generate_content_stream(model="gem", contents="hi")
        )
    else:
        said = client.models.generate_content(model="gem", contents="hi").text or ""
    assert said == "ciao"
    sent = up.requests[-1]
    assert "/models/gemini-2.5-flash:" in sent.path
    assert sent.header("x-goog-api-key") == PLANTED
    row = chain.row(rows_before + 1)
    assert (row["gen_ai.usage.input_tokens"], row["dialect"]) == (60, "gemini")
    assert row["gen_ai.request.model"] == "gem"


def test_models_are_listed_in_the_clients_dialect(chain: Proxy) -> None:
    offered = {"kimi-k2", "small", "bare", "answers", "claude-test", "gem"}
    assert {m.id for m in openai_client(chain).models.list()} == offered
    listed = anthropic.Anthropic(base_url=chain.url, api_key="dummy").models.list()
    assert {m.id for m in listed} == offered
    client = genai.Client(api_key="x", http_options=genai_types.HttpOptions(base_url=chain.url))
    assert {m.name for m in client.models.list()} == {f"models/{name}" for name in offered}


def test_a_provider_named_in_the_path(chain: Proxy, up: Upstream) -> None:
    with chain.base_client() as client:
        answer = client.post(
            "/moonshot/v1/chat/completions", json={"model": "kimi-new", "messages": HELLO}
        )
    assert answer.status_code == 200
    sent = up.requests[-1]
    assert (sent.host, sent.json()["model"]) == ("api.moonshot.ai", "kimi-new")


def test_a_base_url_over_tls(chain: Proxy, up: Upstream) -> None:
    with httpx.Client(verify=str(chain.ca_file), trust_env=False) as client:
        answer = client.post(
            f"https://localhost:{chain.port}/v1/chat/completions",
            json={"model": "kimi-k2", "messages": HELLO},
        )
    assert answer.status_code == 200
    assert up.requests[-1].host == "integrate.api.nvidia.com"


# --- clients by HTTPS_PROXY


@pytest.mark.parametrize("http2", [False, True])
def test_a_client_by_https_proxy_on_either_http_version(
    chain: Proxy, up: Upstream, rows_before: int, http2: bool
) -> None:
    up.default = Reply(text="via proxy", usage=TokenUsage(input=11, output=2))
    with chain.client(http2=http2) as http_client:
        answer = http_client.post(
            "https://api.openai.com/v1/chat/completions",
            headers={"authorization": "Bearer sk-the-clients-own"},
            json={"model": "gpt-4o", "messages": HELLO},
        )
    assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    assert answer.json()["choices"][0]["message"]["content"] == "via proxy"
    assert up.requests[-1].key == "sk-the-clients-own"
    row = chain.row(rows_before + 1)
    assert row["gen_ai.provider.name"] == "openai"
    assert row["cost_usd"] == pytest.approx((11 * 2.5 + 2 * 10) / 1e6)


@pytest.fixture
def proxied(chain: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that `kimi-proxy run` and the README give to a client."""
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, chain.url)
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, str(chain.ca_file))


@pytest.mark.usefixtures("proxied")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sdk", ["openai", "responses", "anthropic", "google"])
def test_the_sdks_by_https_proxy(
    chain: Proxy, up: Upstream, rows_before: int, sdk: str, stream: bool
) -> None:
    up.default = Reply(text="through the tunnel", usage=TokenUsage(input=21, output=4))
    key = "the-clients-own-key"
    said = ""
    if sdk == "openai":
        chat = openai.OpenAI(api_key=key, max_retries=0).chat.completions
        if stream:
            options: Any = {"include_usage": True}
            for chunk in chat.create(
                model="gpt-4o", messages=HELLO, stream=True, stream_options=options
            ):
                said += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        else:
            said = chat.create(model="gpt-4o", messages=HELLO).choices[0].message.content or ""
    elif sdk == "responses":
        responses = openai.OpenAI(api_key=key, max_retries=0).responses
        if stream:
            for event in responses.create(model="gpt-4o", input="hi", stream=True):
                said += event.delta if event.type == "response.output_text.delta" else ""
        else:
            said = responses.create(model="gpt-4o", input="hi").output_text
    elif sdk == "anthropic":
        messages = anthropic.Anthropic(api_key=key, max_retries=0).messages
        if stream:
            with messages.stream(
                model="claude-sonnet-4-5", max_tokens=9, messages=HELLO
            ) as streamed:
                said = "".join(streamed.text_stream)
        else:
            created = messages.create(model="claude-sonnet-4-5", max_tokens=9, messages=HELLO)
            said = created.content[0].text
    else:
        google = genai.Client(api_key=key)  # closes itself when nobody holds it
        if stream:
            for piece in google.models.generate_content_stream(
                model="gemini-2.5-pro", contents="hi"
            ):
                said += piece.text or ""
        else:
            said = google.models.generate_content(model="gemini-2.5-pro", contents="hi").text or ""
    assert said == "through the tunnel"
    assert up.requests[-1].key == key
    row = chain.row(rows_before + 1)
    assert (row["gen_ai.usage.input_tokens"], row["gen_ai.usage.output_tokens"]) == (21, 4)
    assert row["input_source"] == "usage"
    assert row["cost_usd"] > 0
    assert row["gen_ai.request.stream"] == int(stream)


def test_a_model_that_no_rule_names_leaves_as_it_came(chain: Proxy, up: Upstream) -> None:
    body = (
        b'{ "model":"gpt-4o",  "stream":true, "big":123456789012345678901234567890,'
        b' "messages":[{"role":"user","content":"\\u00e9\\/"}] }'
    )
    with chain.client() as client:
        client.post(
            "https://api.openai.com/v1/chat/completions?x=1",
            headers={"authorization": "Bearer sk-own", "content-type": "application/json"},
            content=body,
        )
    sent = up.requests[-1]
    assert sent.body == body
    assert (sent.query, sent.key) == ("x=1", "sk-own")


def test_a_named_model_goes_to_its_provider_whatever_host_was_addressed(
    chain: Proxy, up: Upstream
) -> None:
    with chain.client() as client:
        client.post(
            "https://api.openai.com/v1/chat/completions",
            headers={"authorization": "Bearer sk-own", "cookie": "session=private"},
            json={"model": "kimi-k2", "messages": HELLO},
        )
    sent = up.requests[-1]
    assert (sent.host, sent.key) == ("integrate.api.nvidia.com", PLANTED)
    assert sent.header("cookie") is None


def test_other_hosts_are_tunnelled_with_their_own_certificate(chain: Proxy, up: Upstream) -> None:
    own = ssl.create_default_context(cafile=str(up.ca_file))
    with httpx.Client(proxy=chain.url, verify=own, trust_env=False) as client:
        answer = client.post("https://tunnelled.example/v1/chat/completions", json={"model": "m"})
    assert answer.status_code == 200
    assert "x-kimi-proxy-session" not in answer.headers
    assert up.requests[-1].host == "tunnelled.example"


def test_other_traffic_of_a_model_host_passes_untouched(
    chain: Proxy, up: Upstream, rows_before: int
) -> None:
    up.script("/v1/telemetry", Reply(body=b'{"ok": 1}'))
    with chain.client() as client:
        answer = client.post("https://api.anthropic.com/v1/telemetry", content=b"\x00not json")
    assert answer.content == b'{"ok": 1}'
    assert up.requests[-1].body == b"\x00not json"
    assert chain.settled() == rows_before + 1, "only the sentinel"


# --- what goes wrong


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/nothing/here", b"{}", 404, "/v1/chat/completions"),
        ("/v1/chat/completions", b"{", 400, "JSON"),
        ("/v1/chat/completions", b"[1]", 400, "object"),
        ("/v1/chat/completions", b"", 400, "JSON"),
        ("/v1/chat/completions", b'{"messages": []}', 400, "model"),
        ("/v1/chat/completions", b'{"model": "unheard-of"}', 404, "unheard-of"),
        ("/v1/messages", b'{"model": "kimi-k2"}', 400, "nvidia speaks openai"),
        ("/nowhere/v1/chat/completions", b'{"model": "m"}', 404, "nowhere"),
    ],
)
def test_a_base_url_request_that_cannot_be_sent(
    chain: Proxy, up: Upstream, path: str, body: bytes, status: int, says: str
) -> None:
    with chain.base_client() as client:
        answer = client.post(path, content=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    assert up.count == 0


@pytest.mark.parametrize("body", [b"{", b"[1]", b"", b"\xff\xfe", b'{"model": "gpt-4o"'])
def test_a_body_that_does_not_parse_passes_by_https_proxy(
    chain: Proxy, up: Upstream, body: bytes
) -> None:
    with chain.client() as client:
        client.post("https://api.openai.com/v1/chat/completions", content=body)
    assert up.requests[-1].body == body


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "kimi-k2", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "kimi-k2", "messages": [{"role": "user", "content": "\\ud83d cut"}]}',
        b'{"model": "kimi-k2", "messages": "no list"}',
        b'{"model": "kimi-k2", "messages": [1, null, {"role": 5, "content": {"a": []}}]}',
        b'{"model": "kimi-k2", "unknown": {"deep": [1e999]}, "messages": []}',
    ],
)
def test_odd_json_reaches_the_provider_with_only_the_model_changed(
    chain: Proxy, up: Upstream, body: bytes
) -> None:
    up.script("*/chat/completions", Reply(body=b'{"choices": []}'))
    with chain.base_client() as client:
        answer = client.post("/v1/chat/completions", content=body)
    assert answer.status_code == 200
    assert up.requests[-1].body == body.replace(b"kimi-k2", b"moonshotai/kimi-k2-instruct")


def test_a_50_mb_body(chain: Proxy, up: Upstream, rows_before: int) -> None:
    text = "word " * 10_000_000
    with chain.base_client() as client:
        answer = client.post(
            "/v1/chat/completions",
            json={"model": "kimi-k2", "messages": [{"role": "user", "content": text}]},
            timeout=60,
        )
    assert answer.status_code == 200
    assert len(up.requests[-1].body) > 50_000_000
    assert chain.row(rows_before + 1, 60)["request_bytes"] > 50_000_000


def test_an_error_of_the_provider_reaches_the_client_and_costs_nothing(
    chain: Proxy, up: Upstream, rows_before: int
) -> None:
    up.default = Reply(status=429, error="slow down", headers={"retry-after": "3"})
    with pytest.raises(openai.RateLimitError) as raised:
        openai_client(chain).chat.completions.create(model="kimi-k2", messages=HELLO)
    assert raised.value.response.headers["retry-after"] == "3"
    row = chain.row(rows_before + 1)
    assert (row["status"], row["cost_usd"]) == (429, None)
    assert row["gen_ai.usage.input_tokens"] is None
    assert row["error_type"]


def test_a_provider_that_does_not_resolve(chain: Proxy, up: Upstream, rows_before: int) -> None:
    # The name is none of the fake provider's, so it does not resolve in the proxy's process.
    chain.rules.write_text(
        chain.rules.read_text().replace("https://api.moonshot.ai/v1", "https://gone.invalid/v1")
    )
    try:
        with chain.base_client() as client:
            answer = _until_rules(client, "/moonshot/v1/chat/completions", 502)
    finally:
        chain.rules.write_text(
            chain.rules.read_text().replace("https://gone.invalid/v1", "https://api.moonshot.ai/v1")
        )
    assert answer.status_code == 502
    assert "gone.invalid" in answer.text


def _until_rules(client: httpx.Client, path: str, status: int) -> httpx.Response:
    from proxy import wait_until

    def ask() -> httpx.Response | None:
        answer = client.post(path, json={"model": "m", "messages": HELLO})
        return answer if answer.status_code == status else None

    return wait_until(ask)  # type: ignore[return-value]


def test_rules_that_go_wrong_while_running_leave_the_old_ones(chain: Proxy, up: Upstream) -> None:
    from proxy import wait_until

    good = chain.rules.read_text()
    chain.rules.write_text(good + "\nnonsense: 1\n")
    try:
        with chain.base_client() as client:

            def warned() -> bool:
                answer = client.post(
                    "/v1/chat/completions", json={"model": "kimi-k2", "messages": HELLO}
                )
                assert answer.status_code == 200
                return "nonsense" in chain.output

            wait_until(warned)
    finally:
        chain.rules.write_text(good)
    assert "The old rules stay in force" in chain.output


def test_a_stream_cut_by_the_provider_is_counted_and_marked(
    chain: Proxy, up: Upstream, rows_before: int
) -> None:
    up.default = Reply(text="word " * 200, framing=Framing(abort=Abort(after=3000)))
    with chain.base_client() as client, pytest.raises(httpx.HTTPError):
        client.post(
            "/v1/chat/completions", json={"model": "bare", "stream": True, "messages": HELLO}
        )
    row = chain.row(rows_before + 1)
    assert row["partial"] == 1
    assert row["gen_ai.usage.output_tokens"] > 0
    assert row["output_source"] in ("tokenizer", "estimate")


def test_a_stream_that_the_client_leaves_is_counted_and_marked(
    chain: Proxy, up: Upstream, rows_before: int
) -> None:
    import threading

    go_on = threading.Event()
    up.default = Reply(text="word " * 50, framing=Framing(hang=go_on, hang_after=10))
    with (
        chain.base_client() as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            json={"model": "kimi-k2", "stream": True, "messages": HELLO},
        ) as answer,
    ):
        next(answer.iter_bytes())
    try:
        row = chain.row(rows_before + 1)
    finally:
        go_on.set()
    assert row["partial"] == 1
    assert row["gen_ai.usage.output_tokens"] > 0


@pytest.mark.parametrize("pieces", [1, 7, "whole"])
def test_any_cutting_of_the_stream_gives_the_same_bytes(
    chain: Proxy, up: Upstream, pieces: Any
) -> None:
    up.default = Reply(text="naïve 漢字 🎉", framing=Framing(pieces=pieces))
    body = {"model": "kimi-k2", "stream": True, "messages": HELLO}
    with chain.base_client() as client:
        answer = client.post("/v1/chat/completions", json=body)
    said = [
        json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        for line in answer.text.splitlines()
        if line.startswith("data: {")
    ]
    assert "".join(said) == "naïve 漢字 🎉"
    assert answer.text.rstrip().endswith("data: [DONE]")


# --- who may come in


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0"])
def test_no_proxied_client_reaches_our_own_port(chain: Proxy, host: str) -> None:
    with socket.create_connection(("127.0.0.1", chain.port), timeout=10) as connection:
        target = f"{host}:{chain.port}"
        connection.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET / HTTP/1.1\r\nHost: tunnelled.example\r\n\r\n")
        answer = connection.recv(1000)
    assert b"200 OK" not in answer


@pytest.mark.parametrize(
    "headers",
    [{"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}],
)
def test_a_web_page_cannot_spend_the_users_money(
    chain: Proxy, up: Upstream, headers: dict[str, str]
) -> None:
    with chain.base_client() as client:
        answer = client.post(
            "/v1/chat/completions", json={"model": "kimi-k2", "messages": HELLO}, headers=headers
        )
    assert answer.status_code == 403
    assert up.count == 0


def test_a_name_that_points_here_is_not_us(chain: Proxy, up: Upstream) -> None:
    with httpx.Client(trust_env=False) as client:
        answer = client.post(
            f"{chain.url}/v1/chat/completions",
            json={"model": "kimi-k2", "messages": HELLO},
            headers={"host": f"rebound.example:{chain.port}"},
        )
    assert answer.status_code == 502
    assert up.count == 0


def test_our_own_headers_are_read_and_not_passed_on(
    chain: Proxy, up: Upstream, rows_before: int
) -> None:
    with chain.base_client() as client:
        client.post(
            "/v1/chat/completions",
            json={"model": "kimi-k2", "messages": HELLO},
            headers={"x-kimi-session": "monday", "x-kimi-project": "shop", "x-kimi-bypass": "1"},
        )
    assert not [name for name, _ in up.requests[-1].headers if name.lower().startswith("x-kimi")]
    row = chain.row(rows_before + 1)
    assert (row["session_id"], row["project"]) == ("monday", "shop")


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"\x1f\x8bno gzip at all", {"content-encoding": "gzip"}),
        (b"<html>busy</html>", {"content-type": "text/html"}),
        (b'{"choices": [{"message": {"content": "hal', {}),
    ],
)
def test_a_reply_that_nobody_can_read_has_no_output_and_no_price(
    chain: Proxy, up: Upstream, rows_before: int, body: bytes, headers: dict[str, str]
) -> None:
    up.script("*/chat/completions", Reply(body=body, headers=headers))
    with chain.base_client() as client, contextlib.suppress(httpx.DecodingError):
        client.post("/v1/chat/completions", json={"model": "kimi-k2", "messages": HELLO})
    row = chain.row(rows_before + 1)
    assert row["status"] == 200
    assert row["gen_ai.usage.output_tokens"] is None
    assert row["cost_usd"] is None
    assert row["gen_ai.usage.input_tokens"] > 0
