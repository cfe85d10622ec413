"""Which provider and model an exchange goes to, and what of the request goes there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from proxy import PLANTED, Proxy
from upstream import Framing, Reply, Upstream

HELLO = [{"role": "user", "content": "Hello"}]
NVIDIA, MOONSHOT, ROUTER = "integrate.api.nvidia.com", "api.moonshot.ai", "openrouter.ai"
OWN_OPENAI, OWN_ANTHROPIC = "sk-own-0123456789", "sk-ant-own-0123456789"

PROVIDERS = """\
  openrouter:
    api: openai
    base_url: "https://openrouter.ai/api/v1"
    key: "${PLANTED_KEY}"
    vendor_names: true
  kimi-code:
    api: openai
    base_url: "https://api.kimi.com/coding/v1"
    also: {anthropic: "https://api.kimi.com/coding/v1"}
    key: "${PLANTED_KEY}"
  elsewhere: {api: openai, base_url: "https://api.moonshot.cn/v1", key: "${PLANTED_KEY}"}
  groq: {api: openai, base_url: "https://api.groq.com/openai/v1", key: "${UNSET_GROQ_KEY}"}
  cerebras: {api: openai, base_url: "https://api.cerebras.ai/v1", key: "${UNSET_CEREBRAS_KEY}"}
models:
"""
_PAIR = "{provider: nvidia, model: a/b}, {provider: moonshot, model: c, weight: 4}"
MODELS = f"""\
  first: {{strategy: first, targets: [{_PAIR}]}}
  turns: {{strategy: round_robin, targets: [{_PAIR}]}}
  chance: {{strategy: random, targets: [{_PAIR}]}}
  weighted: {{strategy: weighted_random, targets: [{_PAIR}]}}
  best: {{strategy: best, targets: [{{provider: mistral}}, {{provider: elsewhere}}]}}
  one-key: {{targets: [{{provider: groq}}, {{provider: moonshot}}, {{provider: cerebras}}]}}
  no-key: {{targets: [{{provider: groq}}, {{provider: cerebras}}]}}
  mixed: {{targets: [{{provider: nvidia}}, {{provider: anthropic, model: claude-x}}]}}
  both: {{targets: [{{provider: kimi-code, model: kimi-for-coding}}]}}
  "nvidia/*": {{targets: [{{provider: nvidia}}]}}
  "openai/*": {{targets: [{{provider: openai}}]}}
  "kimi-*-preview": {{targets: [{{provider: moonshot, model: kimi-latest}}]}}
  "kimi-very-long-*": {{targets: [{{provider: openrouter}}]}}
"""


_clients: dict[str, httpx.Client] = {}


@contextmanager
def running(folder: Path, upstream: Upstream, top: str = "") -> Iterator[Proxy]:
    """A proxy with the rules above, and one client for all that the tests ask it."""
    with _proxy(folder, upstream, top) as proxy, proxy.base_client() as client:
        _clients[proxy.url] = client
        yield proxy
    assert "failed" not in proxy.output


def _proxy(folder: Path, upstream: Upstream, top: str = "") -> Proxy:
    proxy = Proxy(folder, upstream, more_rules=MODELS)
    rules = proxy.rules.read_text()
    assert rules.count("\nmodels:\n") == 1
    rules = rules.replace("\nmodels:\n", f"\n{PROVIDERS}")
    proxy.rules.write_text(rules.replace("version: 1\n", f"version: 1\n{top}"))
    return proxy


@pytest.fixture(scope="module")
def sticky(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with running(tmp_path_factory.mktemp("sticky"), provider) as started:
        yield started


@pytest.fixture(scope="module")
def fickle(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Chooses anew for each request, and has a default model."""
    top = "sticky: false\ndefault_model: first\n"
    with running(tmp_path_factory.mktemp("fickle"), provider, top) as started:
        yield started


def chat(
    proxy: Proxy,
    model: str,
    path: str = "/v1/chat/completions",
    *,
    session: str = "",
    key: str = "",
    **headers: str,
) -> httpx.Response:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if session:
        headers["x-kimi-session"] = session
    if key:
        headers["authorization"] = f"Bearer {key}"
    body = {"model": model, "messages": HELLO}
    return _clients[proxy.url].post(path, json=body, headers=headers)


def went(up: Upstream) -> list[tuple[str, str | None]]:
    return [(request.host, request.model) for request in up.requests]


A, B = (NVIDIA, "a/b"), (MOONSHOT, "c")


# --- strategies


def test_first_takes_the_first(fickle: Proxy, up: Upstream) -> None:
    for number in range(6):
        assert chat(fickle, "first", session=f"{number}").status_code == 200
    assert went(up) == [A] * 6


def test_round_robin_takes_turns(fickle: Proxy, up: Upstream) -> None:
    for number in range(6):
        chat(fickle, "turns", session=f"{number}")
    assert went(up) in ([A, B] * 3, [B, A] * 3)


@pytest.mark.parametrize(("model", "least", "most"), [("chance", 12, 48), ("weighted", 34, 59)])
def test_random_choices_follow_the_weights(
    fickle: Proxy, up: Upstream, model: str, least: int, most: int
) -> None:
    # 60 draws of 1/2 and of 4/5: outside these bounds once in 300,000 times at most.
    for _ in range(60):
        chat(fickle, model, session="one")
    drawn = Counter(went(up))
    assert set(drawn) == {A, B}
    assert least <= drawn[B] <= most


SLOW, QUICK = ("api.mistral.ai", "best"), ("api.moonshot.cn", "best")


def test_best_tries_what_nobody_has_tried(fickle: Proxy, up: Upstream) -> None:
    for number in range(3):
        chat(fickle, "best", session=f"{number}")
    assert set(went(up)) == {SLOW, QUICK}


def test_best_takes_the_fast_one_of_those_it_has_seen(fickle: Proxy, up: Upstream) -> None:
    up.script("api.mistral.ai", Reply(framing=Framing(first_delay_s=0.5)), forever=True)
    for name in ("mistral", "elsewhere"):
        for _ in range(3):
            chat(fickle, "best", f"/{name}/v1/chat/completions")
    up.clear()
    for number in range(5):
        chat(fickle, "best", session=f"{number}")
    assert went(up) == [QUICK] * 5


@pytest.mark.parametrize("model", ["turns", "chance", "weighted", "best"])
def test_a_choice_holds_for_its_session(sticky: Proxy, up: Upstream, model: str) -> None:
    for session in range(16):
        up.clear()
        for _ in range(3):
            chat(sticky, model, session=f"{model}-{session}")
        assert len(set(went(up))) == 1


def test_sessions_share_the_targets(sticky: Proxy, up: Upstream) -> None:
    for model in ("turns", "chance"):
        up.clear()
        for session in range(24):
            chat(sticky, model, session=f"share-{session}")
        assert set(went(up)) == {A, B}, model


def test_a_conversation_without_a_header_keeps_its_target(sticky: Proxy, up: Upstream) -> None:
    for start in range(8):
        up.clear()
        messages: list[dict[str, str]] = [{"role": "user", "content": f"begin {start}"}]
        for turn in range(3):
            body = {"model": "turns", "messages": messages}
            _clients[sticky.url].post("/v1/chat/completions", json=body)
            messages += [
                {"role": "assistant", "content": f"said {turn}"},
                {"role": "user", "content": f"next {turn}"},
            ]
        assert len(set(went(up))) == 1


def test_a_random_choice_of_a_session_is_the_same_after_a_restart(
    up: Upstream, provider: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seen = []
    for _ in range(2):
        up.clear()
        with running(tmp_path_factory.mktemp("again"), provider) as proxy:
            for session in range(12):
                chat(proxy, "chance", session=f"restart-{session}")
        seen.append(went(up))
    assert seen[0] == seen[1]


# --- names


@pytest.mark.parametrize(
    ("model", "goes"),
    [
        ("nvidia/meta/llama-4", (NVIDIA, "meta/llama-4")),
        ("openai/gpt-4o", ("api.openai.com", "gpt-4o")),
        ("kimi-k3-preview", (MOONSHOT, "kimi-latest")),
        ("kimi-very-long-preview", (ROUTER, "kimi-very-long-preview")),
        ("kimi-k2", (NVIDIA, "moonshotai/kimi-k2-instruct")),
    ],
)
def test_patterns(sticky: Proxy, up: Upstream, model: str, goes: tuple[str, str]) -> None:
    answer = chat(sticky, model)
    assert answer.status_code == 200, answer.text
    assert went(up) == [goes]


@pytest.mark.parametrize(
    ("path", "model", "goes"),
    [
        ("/openrouter/v1/chat/completions", "openai/gpt-oss-120b", (ROUTER, "openai/gpt-oss-120b")),
        ("/openrouter/chat/completions", "nvidia/nemotron", (ROUTER, "nvidia/nemotron")),
        ("/moonshot/v1/chat/completions", "kimi-new", (MOONSHOT, "kimi-new")),
        ("/moonshot/v1/chat/completions", "turns", (MOONSHOT, "c")),
        ("/moonshot/v1/chat/completions", "kimi-k2", (MOONSHOT, "kimi-k2")),
        ("/moonshot/v1/chat/completions", "gpt-4o", (MOONSHOT, "gpt-4o")),
        ("/nvidia/v1/chat/completions", "nvidia/meta/llama", (NVIDIA, "meta/llama")),
    ],
)
def test_a_provider_in_the_path_is_where_it_goes(
    sticky: Proxy, up: Upstream, path: str, model: str, goes: tuple[str, str]
) -> None:
    assert chat(sticky, model, path).status_code == 200
    assert went(up) == [goes]
    assert up.requests[-1].key == PLANTED


def test_openrouters_own_names_stay_there_by_https_proxy(sticky: Proxy, up: Upstream) -> None:
    with sticky.client() as client:
        client.post(
            "https://openrouter.ai/api/v1/chat/completions",
            json={"model": "openai/gpt-oss-120b", "messages": HELLO},
            headers={"authorization": "Bearer sk-or-own"},
        )
    [sent] = up.requests
    assert (sent.host, sent.path) == (ROUTER, "/api/v1/chat/completions")
    assert (sent.model, sent.key) == ("openai/gpt-oss-120b", "sk-or-own")


@pytest.mark.parametrize(
    ("model", "key", "goes"),
    [
        ("gpt-5-new", "", "api.openai.com"),
        ("gpt-5-new", OWN_ANTHROPIC, "api.openai.com"),
        ("some-model", OWN_OPENAI, "api.openai.com"),
    ],
)
def test_a_provider_found_by_model_prefix_then_by_the_form_of_the_key(
    sticky: Proxy, up: Upstream, model: str, key: str, goes: str
) -> None:
    assert chat(sticky, model, key=key).status_code == 200
    assert went(up) == [(goes, model)]
    assert up.requests[-1].key == PLANTED, "the key of rules.yaml goes before the client's"


def test_the_longest_form_of_a_key_counts(sticky: Proxy, up: Upstream) -> None:
    answer = chat(sticky, "some-model", "/v1/messages", key=OWN_ANTHROPIC)
    assert answer.status_code == 200
    assert went(up) == [("api.anthropic.com", "some-model")]


@pytest.mark.parametrize(("key", "status"), [("", 404), ("unknown-form", 404)])
def test_a_model_that_nothing_tells_is_no_guess(
    sticky: Proxy, up: Upstream, key: str, status: int
) -> None:
    answer = chat(sticky, "unheard-of", key=key)
    assert answer.status_code == status
    assert "unheard-of" in answer.json()["error"]["message"]
    assert up.count == 0


def test_a_default_model_takes_what_nothing_else_tells(fickle: Proxy, up: Upstream) -> None:
    answer = chat(fickle, "unheard-of")
    assert answer.status_code == 200
    assert went(up) == [A]
    assert answer.headers["x-kimi-proxy-model"] == "a/b"
    up.clear()
    chat(fickle, "gpt-4o")
    chat(fickle, "unheard-of", "/moonshot/v1/chat/completions")
    assert went(up) == [("api.openai.com", "gpt-4o"), (MOONSHOT, "unheard-of")]


@pytest.mark.parametrize("written", ["gem", "g%65m"])
def test_geminis_model_in_the_path_is_replaced(sticky: Proxy, up: Upstream, written: str) -> None:
    with sticky.base_client() as client:
        answer = client.post(f"/v1beta/models/{written}:generateContent", json={"contents": []})
    assert answer.status_code == 200
    assert up.requests[-1].path == "/v1beta/models/gemini-2.5-flash:generateContent"


# --- what is sent


def test_host_sni_and_path_follow_the_provider(sticky: Proxy, up: Upstream) -> None:
    chat(sticky, "both")
    chat(sticky, "openai/gpt-4o", "/openrouter/v1/chat/completions")
    first, second = up.requests
    assert (first.host, first.sni, first.path) == (
        "api.kimi.com",
        "api.kimi.com",
        "/coding/v1/chat/completions",
    )
    assert (second.host, second.sni, second.path) == (ROUTER, ROUTER, "/api/v1/chat/completions")
    assert first.scheme == "https"
    assert first.authority == "api.kimi.com"


def test_a_provider_on_another_port_is_named_with_it(sticky: Proxy, up: Upstream) -> None:
    chat(sticky, "bare")
    assert up.requests[-1].authority == f"127.0.0.1:{up.http_port}"
    assert up.requests[-1].sni is None


def test_a_second_dialect_of_a_provider_takes_the_key_as_its_first(
    sticky: Proxy, up: Upstream
) -> None:
    answer = chat(sticky, "both", "/v1/messages", x_api_key="dummy")
    assert answer.status_code == 200
    sent = up.requests[-1]
    assert sent.path == "/coding/v1/messages"
    assert sent.header("authorization") == f"Bearer {PLANTED}"
    assert sent.header("x-api-key") is None


def test_the_query_is_kept(sticky: Proxy, up: Upstream) -> None:
    chat(sticky, "claude-test", "/v1/messages?beta=true&x=a%20b&empty=")
    assert up.requests[-1].query == "beta=true&x=a%20b&empty="


def test_a_key_in_the_query_is_replaced_and_the_rest_of_it_stays(
    sticky: Proxy, up: Upstream
) -> None:
    with sticky.base_client() as client:
        answer = client.post(
            "/v1beta/models/gem:streamGenerateContent?alt=sse&key=AIza-own&x=a%20b",
            json={"contents": []},
        )
    assert answer.status_code == 200
    sent = up.requests[-1]
    assert sent.query == "alt=sse&x=a%20b"
    assert sent.header("x-goog-api-key") == PLANTED


def test_a_keys_name_in_another_parameter_is_no_key(sticky: Proxy, up: Upstream) -> None:
    chat(sticky, "kimi-k2", "/v1/chat/completions?monkey=1&keys=2&key=3")
    assert up.requests[-1].query == "monkey=1&keys=2"


def test_the_clients_headers_are_kept_and_those_for_the_proxy_dropped(
    sticky: Proxy, up: Upstream
) -> None:
    chat(
        sticky,
        "kimi-k2",
        key="dummy",
        user_agent="claude-cli/2.1 (external, cli)",
        anthropic_beta="a,b",
        x_stainless_lang="python",
        accept="application/json",
        proxy_authorization="Basic cHJveHk6c2VjcmV0",
        proxy_connection="keep-alive",
        cookie="session=private",
        x_api_key="dummy-too",
        x_kimi_session="mine",
    )
    sent = up.requests[-1]
    assert sent.header("user-agent") == "claude-cli/2.1 (external, cli)"
    assert sent.header("anthropic-beta") == "a,b"
    assert sent.header("x-stainless-lang") == "python"
    assert sent.header("accept") == "application/json"
    for name in (
        "proxy-authorization",
        "proxy-connection",
        "cookie",
        "x-api-key",
        "x-kimi-session",
    ):
        assert sent.header(name) is None, name
    assert [v for k, v in sent.headers if k.lower() == "authorization"] == [f"Bearer {PLANTED}"]
    assert len([v for k, v in sent.headers if k.lower() in ("host", ":authority")]) <= 1


def test_a_list_of_models_takes_the_providers_key_and_nothing_for_the_proxy(
    sticky: Proxy, up: Upstream
) -> None:
    with sticky.base_client() as client:
        answer = client.get(
            "/openrouter/v1/models",
            headers={"authorization": "Bearer dummy", "proxy-authorization": "Basic c2VjcmV0"},
        )
    assert answer.status_code == 200
    sent = up.requests[-1]
    assert (sent.host, sent.path, sent.key) == (ROUTER, "/api/v1/models", PLANTED)
    assert sent.header("proxy-authorization") is None


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-goog-api-key", "api-key"])
def test_a_provider_without_a_key_gets_none(sticky: Proxy, up: Upstream, name: str) -> None:
    with sticky.base_client() as client:
        answer = client.post(
            "/v1/chat/completions",
            json={"model": "bare", "messages": HELLO},
            headers={name: f"Bearer {OWN_OPENAI}" if name == "authorization" else OWN_OPENAI},
        )
    assert answer.status_code == 200
    sent = up.requests[-1]
    assert sent.key is None
    assert OWN_OPENAI not in str(sent.headers)


# --- what cannot be sent


@pytest.mark.parametrize(
    ("path", "model", "says"),
    [
        ("/v1/messages", "turns", ["nvidia speaks openai", "moonshot speaks openai"]),
        ("/v1/responses", "kimi-k2", ["nvidia speaks openai"]),
        ("/v1/chat/completions", "claude-test", ["anthropic speaks anthropic"]),
        ("/v1/chat/completions", "gem", ["gemini speaks gemini"]),
        ("/v1beta/models/both:generateContent", "", ["kimi-code speaks openai, anthropic"]),
        ("/anthropic/v1/chat/completions", "any", ["anthropic speaks anthropic"]),
    ],
)
def test_a_target_that_speaks_another_dialect_is_a_clear_400(
    sticky: Proxy, up: Upstream, path: str, model: str, says: list[str]
) -> None:
    answer = chat(sticky, model, path)
    assert answer.status_code == 400
    for words in says:
        assert words in answer.json()["error"]["message"]
    assert up.count == 0


@pytest.mark.parametrize(
    ("path", "host"), [("/v1/chat/completions", NVIDIA), ("/v1/messages", "api.anthropic.com")]
)
def test_of_several_targets_the_one_that_speaks_the_dialect_is_taken(
    sticky: Proxy, up: Upstream, path: str, host: str
) -> None:
    for session in range(3):
        assert chat(sticky, "mixed", path, session=f"{path}{session}").status_code == 200
    assert {request.host for request in up.requests} == {host}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/groq/v1/chat/completions"])
def test_a_model_whose_providers_have_no_key_is_a_401_that_names_them(
    sticky: Proxy, up: Upstream, path: str
) -> None:
    # A key that came with a provider's name in the path would be that provider's own.
    answer = chat(sticky, "no-key", path, key="" if path.startswith("/groq") else "dummy")
    assert answer.status_code == 401
    message = answer.json()["error"]["message"]
    names = ["groq", "UNSET_GROQ_KEY"]
    if not path.startswith("/groq"):
        names += ["cerebras", "UNSET_CEREBRAS_KEY"]
    for name in names:
        assert name in message
    assert up.count == 0


def test_a_target_without_a_key_is_passed_over(sticky: Proxy, up: Upstream) -> None:
    for session in range(4):
        answer = chat(sticky, "one-key", session=f"one-key-{session}", key="dummy")
        assert answer.status_code == 200, answer.text
    assert {request.host for request in up.requests} == {MOONSHOT}
