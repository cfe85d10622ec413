"""Compression on live traffic: what the provider gets before, after, and when it fails."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kimi_core.tokens import tokenizer_for
from proxy import PLANTED, Proxy, wait_until
from upstream import Dialect, Framing, Received, Reply, TokenUsage, Upstream, conversation

RULES = """\
  long: {{context: 40000, targets: [{{provider: nvidia, model: moonshotai/kimi-k2-instruct}}]}}
  claude-long: {{context: 40000, targets: [{{provider: anthropic, model: claude-sonnet-4-5}}]}}
  gem-long: {{context: 40000, targets: [{{provider: gemini, model: gemini-2.5-flash}}]}}
  answers-long: {{context: 40000, targets: [{{provider: openai, model: gpt-4o}}]}}
  "gpt-*": {{context: 40000}}
  ensured:
    ensure_tool_call: true
    context: 40000
    targets: [{{provider: nvidia, model: moonshotai/kimi-k2-instruct}}]
compression: {{auto: {auto}{more}}}
sanitizer: {{threshold: 0, keep: 0, references: false}}
"""
SCRIPTS = ("router.py", "compressor.py", "counter.py", "recorder.py", "stats.py")
TOKEN = "page-token"
OWN_KEY = "sk-the-clients-own-0123456789"
OURS = {"x-kimi-session": "s1", "authorization": "Bearer key-of-s1"}
SAID = "The user wants the parser mended; src/parser.py is open; the tests are next."
MODELS: dict[Dialect, str] = {
    "openai": "long",
    "responses": "answers-long",
    "anthropic": "claude-long",
    "gemini": "gem-long",
}
PATHS: dict[Dialect, str] = {
    "openai": "/v1/chat/completions",
    "responses": "/v1/responses",
    "anthropic": "/v1/messages",
    "gemini": "/v1beta/models/gem-long:{verb}",
}
HISTORY = {
    "openai": "messages",
    "responses": "input",
    "anthropic": "messages",
    "gemini": "contents",
}


@pytest.fixture
def start(provider: Upstream, tmp_path: Path) -> Iterator[Callable[..., Proxy]]:
    """Start a proxy with these settings of compression; each leaves no key and no traceback."""
    started: list[Proxy] = []

    def start(
        auto: bool = True,
        more: str = "",
        scripts: tuple[str, ...] = SCRIPTS,
        rules: str = RULES,
    ) -> Proxy:
        proxy = Proxy(
            tmp_path,
            provider,
            scripts=scripts,
            more_rules=rules.format(auto=str(auto).lower(), more=more and f", {more}"),
            options=(f"stats_port={free_port()}", f"stats_token={TOKEN}"),
        )
        started.append(proxy)
        return proxy.__enter__()

    yield start
    for proxy in started:
        proxy.__exit__(None, None, None)
        for hidden in (PLANTED, OWN_KEY):
            assert hidden not in proxy.output
            assert hidden.encode() not in b"".join(
                p.read_bytes() for p in tmp_path.glob("kimi.db*")
            )
        assert "Traceback" not in proxy.output
        assert "failed:" not in proxy.output


@pytest.fixture(scope="module")
def shared(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy that compresses by itself; each test takes a session and a key of its own."""
    folder = tmp_path_factory.mktemp("shared")
    rules = RULES.format(auto="true", more="")
    with Proxy(folder, provider, scripts=SCRIPTS, more_rules=rules) as proxy:
        yield proxy
    assert PLANTED not in proxy.output
    assert "Traceback" not in proxy.output
    assert "failed:" not in proxy.output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def reach(proxy: Proxy, made: list[dict[str, Any]], name: str = "s1") -> int:
    """Send two requests, of which the second finds its window 85 % full; return its turn."""
    due = turn_at(made, 35_000)
    send(proxy, made[due - 1], name=name)
    send(proxy, made[due], name=name)
    return due


class Page:
    """The API of a proxy's stats page."""

    def __init__(self, proxy: Proxy) -> None:
        wait_until(lambda: "Stats page listening" in proxy.output)
        setting = next(one for one in proxy.command if one.startswith("stats_port="))
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{setting.partition('=')[2]}/api",
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=30,
            trust_env=False,
        )

    def get(self, path: str) -> Any:
        return self.client.get(path).raise_for_status().json()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)


def bodies(
    dialect: Dialect = "openai", turns: int = 120, size: int = 240_000
) -> list[dict[str, Any]]:
    """Return the requests of one user's wish and the rounds of tools that follow."""
    made = list(conversation(turns, size, dialect, model=MODELS[dialect], stream=False))
    history = HISTORY[dialect]
    first = [m for m in made[0][history] if m.get("role") != "system"]
    for body in made:  # one wish alone
        body[history] = [m for m in body[history] if m in first or not _is_wish(m)]
    return made


def _is_wish(message: dict[str, Any]) -> bool:
    parts = message.get("content", message.get("parts"))
    if message.get("role") != "user" or isinstance(parts, str):
        return message.get("role") == "user"
    return all(p.get("type") != "tool_result" and "functionResponse" not in p for p in parts)


def send(
    proxy: Proxy,
    body: dict[str, Any],
    dialect: Dialect = "openai",
    stream: bool = False,
    name: str = "s1",
) -> httpx.Response:
    path = PATHS[dialect].format(verb="streamGenerateContent" if stream else "generateContent")
    if dialect != "gemini":
        body = {**body, "stream": stream}
    headers = {"x-kimi-session": name, "authorization": f"Bearer key-of-{name}"}
    with proxy.base_client(headers=headers) as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def is_summary(received: Received) -> bool:
    return b"You keep the memory of a coding agent" in received.body


def tokens(body: bytes) -> int:
    return tokenizer_for("o200k").count(body.decode())


def summaries(proxy: Proxy, name: str = "s1") -> list[dict[str, Any]]:
    return [row for row in proxy.rows("summaries") if row["session_id"] == name]


def summary_ready(proxy: Proxy, name: str = "s1") -> list[dict[str, Any]]:
    return wait_until(lambda: summaries(proxy, name))


def usual(up: Upstream, summary: Reply | None = None) -> None:
    """Answer summaries so, and all else with the usage that the request's size amounts to."""
    up.script(is_summary, summary or Reply(text=SAID), forever=True)
    up.default = lambda received: Reply(
        text="ok", usage=TokenUsage(input=tokens(received.content), output=5)
    )


def others(up: Upstream) -> list[Received]:
    return [one for one in up.requests if not is_summary(one)]


def turn_at(made: list[dict[str, Any]], least: int) -> int:
    """Return the first turn whose body takes that many tokens."""
    return next(n for n, body in enumerate(made) if tokens(json.dumps(body).encode()) >= least)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", list(MODELS))
def test_a_long_conversation_is_compressed(
    shared: Proxy, up: Upstream, dialect: Dialect, stream: bool
) -> None:
    usual(up)
    made, name = bodies(dialect), f"{dialect}-{stream}"
    soon, due = turn_at(made, 31_000), turn_at(made, 35_000)
    for body in (made[soon], made[soon + 1]):
        send(shared, body, dialect, stream, name)
    summary_ready(shared, name)
    send(shared, made[due], dialect, stream, name)
    send(shared, made[due + 1], dialect, stream, name)
    before, after = others(up)[1], others(up)[3]
    assert tokens(after.content) < 0.4 * tokens(before.content)
    history = after.json()[HISTORY[dialect]]
    assert SAID in json.dumps(history)
    sent = made[due + 1][HISTORY[dialect]]
    kept = len(history) - 3
    assert history[-kept:] == sent[-kept:]


def test_it_is_so_in_the_whole_chain(start: Callable[..., Proxy], up: Upstream) -> None:
    usual(up)
    proxy = start(scripts=("all.py",))
    text = proxy.rules.read_text()
    proxy.rules.write_text(text.replace("threshold: 0, keep: 0", "threshold: 500, keep: 200"))
    made = [{**body, "model": "ensured"} for body in bodies()]
    due = reach(proxy, made)
    summary_ready(proxy)
    for turn in (due + 1, due + 2):
        send(proxy, made[turn])
    messages = next(one for one in others(up) if SAID in one.content.decode()).json()["messages"]
    assert SAID in messages[1]["content"]
    assert [m["role"] for m in messages[2:4]] == ["assistant", "tool"]
    assert messages[2]["tool_calls"][0]["id"] == messages[3]["tool_call_id"]
    proxy.settled()
    (row,) = [row for row in proxy.rows() if row["cache_break_by"] == "compression"]
    assert row["compressed_tokens"] > 10_000


# --- no request waits, and none is harmed ---------------------------------------------


def test_no_request_waits_for_the_summary(shared: Proxy, up: Upstream) -> None:
    hang = threading.Event()
    usual(up, Reply(text=SAID, framing=Framing(hang=hang)))
    made, name = bodies(), "waits"
    try:
        due = reach(shared, made, name)
        up.wait_for(lambda up: any(map(is_summary, up.requests)))
        for body in made[due + 1 : due + 4]:
            send(shared, body, name=name)
            assert others(up)[-1].json()["messages"] == body["messages"]
        assert not summaries(shared, name)
    finally:
        hang.set()
    summary_ready(shared, name)
    send(shared, made[due + 4], name=name)
    assert len(up.requests[-1].json()["messages"]) < 40
    assert sum(map(is_summary, up.requests)) == 1


FAILURES = {
    "an error": Reply(status=503, error="busy"),
    "nothing": Reply(text=""),
    "a cut answer": Reply(text=SAID, finish_reason="length"),
    "more than it replaces": Reply(text="All of it, once more and in full. " * 9000),
    "no JSON": Reply(body=b"<html>"),
}


@pytest.mark.parametrize("reply", FAILURES.values(), ids=FAILURES)
def test_a_failed_summary_changes_no_byte(shared: Proxy, up: Upstream, reply: Reply) -> None:
    usual(up, reply)
    made, name = bodies(), f"fails-{list(FAILURES.values()).index(reply)}"
    due = reach(shared, made, name)
    before = json.dumps(made[due]).encode().replace(b'"long"', b'"moonshotai/kimi-k2-instruct"')
    headers = {"x-kimi-session": name, "authorization": f"Bearer key-of-{name}"}
    with shared.base_client(headers=headers) as client:
        for _ in range(3):
            content = json.dumps(made[due]).encode()
            answer = client.post("/v1/chat/completions", content=content)
            assert answer.status_code == 200
            assert others(up)[-1].content == before
            wait_until(lambda: f"Session {name} is not compressed" in shared.output)
    assert sum(map(is_summary, up.requests)) == 1  # nor asked for again and again
    assert not summaries(shared, name)


def test_a_model_that_refuses_the_settings_is_asked_without_them(
    shared: Proxy, up: Upstream
) -> None:
    refusal = Reply(status=400, error="invalid temperature: only 1 is allowed for this model")
    up.script(lambda r: is_summary(r) and "temperature" in r.json(), refusal, forever=True)
    usual(up)
    reach(shared, bodies(), "bare")
    assert SAID in summary_ready(shared, "bare")[0]["text"]


def test_a_bypassed_request_is_not_compressed(start: Callable[..., Proxy], up: Upstream) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    send(proxy, made[80])
    assert Page(proxy).post("compress/s1", force=True).status_code == 200
    with proxy.base_client(headers={**OURS, "x-kimi-bypass": "1"}) as client:
        client.post("/v1/chat/completions", json=made[81])
    assert up.requests[-1].json()["messages"] == made[81]["messages"]


# --- by itself ------------------------------------------------------------------------


def test_without_auto_nothing_happens_by_itself(start: Callable[..., Proxy], up: Upstream) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    for body in made[-3:]:
        send(proxy, body)
    assert not any(map(is_summary, up.requests))
    assert Page(proxy).post("compaction/auto", enabled=True).json() == {"enabled": True}
    send(proxy, made[-1])
    summary_ready(proxy)


def test_a_number_of_messages_triggers_it_too(start: Callable[..., Proxy], up: Upstream) -> None:
    usual(up)
    proxy, made = start(more="from_messages: 40"), bodies()
    send(proxy, made[15])
    assert not any(map(is_summary, up.requests))
    send(proxy, made[30])
    summary_ready(proxy)
    send(proxy, made[31])
    assert len(up.requests[-1].json()["messages"]) == 2 + 2 * 6


def test_what_was_said_before_is_extended(start: Callable[..., Proxy], up: Upstream) -> None:
    up.script(is_summary, Reply(text="FIRST " + SAID), Reply(text="SECOND " + SAID))
    usual(up)
    proxy, made = start(more="from_messages: 40"), bodies()
    for first in (30, 70):
        send(proxy, made[first])
        wait_until(lambda n=first: len(proxy.rows("summaries")) == 1 + (n > 30))
        send(proxy, made[first + 1])
    asked = [one.content.decode() for one in up.requests if is_summary(one)]
    assert len(asked) == 2
    assert "summary_so_far" not in asked[0]
    assert "FIRST " + SAID in asked[1]
    sent = json.dumps(up.requests[-1].json())
    assert "SECOND" in sent
    assert "FIRST" not in sent


def test_the_rules_name_the_model_that_writes(start: Callable[..., Proxy], up: Upstream) -> None:
    usual(up)
    proxy, made = start(more="model: claude-test, profile: savings"), bodies()
    reach(proxy, made)
    (row,) = summary_ready(proxy)
    asked = next(one for one in up.requests if is_summary(one))
    assert (asked.path, asked.model, asked.key) == ("/v1/messages", "claude-sonnet-4-5", PLANTED)
    assert "at most 150 words" in asked.json()["system"]
    assert (row["model"], row["provider"], row["source"]) == (
        "claude-sonnet-4-5",
        "anthropic",
        "model",
    )
    assert row["input_tokens"] > 0
    assert row["cost_usd"] > 0


def test_a_summary_is_charged_to_the_next_exchange(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up, Reply(text=SAID, usage=TokenUsage(input=5000, output=80)))
    proxy, made = start(more="model: claude-test"), bodies()
    due = reach(proxy, made)
    (row,) = summary_ready(proxy)
    assert (row["input_tokens"], row["output_tokens"]) == (5000, 80)
    send(proxy, made[due + 1])
    exchange = proxy.row(3)
    assert exchange["spent_usd"] == pytest.approx(row["cost_usd"])
    assert exchange["summary_id"] == row["id"]
    assert exchange["compressed_tokens"] == row["tokens_before"] - row["tokens_after"]


def test_the_proxy_stops_while_a_summary_is_awaited(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    hang = threading.Event()
    usual(up, Reply(text=SAID, framing=Framing(hang=hang)))
    proxy, made = start(), bodies()
    try:
        reach(proxy, made)
        up.wait_for(lambda up: any(map(is_summary, up.requests)))
        assert proxy.stop() == 0
    finally:
        hang.set()
    assert "never" not in proxy.output
    assert "destroyed" not in proxy.output


# --- on demand, and back --------------------------------------------------------------


def test_sixty_rounds_after_one_wish_are_compressed_on_demand(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    proxy, made, page = start(auto=False), bodies(turns=62, size=60_000), None
    send(proxy, made[60])
    page = Page(proxy)
    refused = page.post("compress/s1")
    assert refused.status_code == 400
    said = refused.json()
    assert said.keys() == {"error", "current_percentage", "threshold", "hint"}
    assert said["threshold"] == 85
    assert 10 < said["current_percentage"] < 85
    done = page.post("compress/s1", force=True).json()
    assert done["messages_before"] == len(made[60]["messages"])
    assert done["messages_after"] == 2 + 2 * 5
    assert done["tokens_saved"] == done["original_tokens"] - done["compressed_tokens"] > 0
    assert SAID in done["summary"]
    before = up.requests[-2]
    send(proxy, made[61])
    after = up.requests[-1]
    assert done["summary"] in after.json()["messages"][1]["content"]
    assert tokens(after.content) < 0.4 * tokens(before.content)


def test_revoking_gives_back_the_original_bytes(start: Callable[..., Proxy], up: Upstream) -> None:
    usual(up)
    proxy, made = start(more="from_messages: 40"), bodies()
    for turn in (30, 31, 70, 71):
        send(proxy, made[turn])
        wait_until(lambda n=turn: len(proxy.rows("summaries")) == 1 + (n >= 70))
    page = Page(proxy)
    proxy.settled()
    found = page.get("compaction/s1")
    assert [one["revoked_at"] for one in found["summaries"]] == [None, None]
    assert [one["applied"] for one in found["summaries"]] == [1, 2]
    (latest, _) = found["summaries"]
    assert page.post("compaction/other/revoke", id=latest["id"]).status_code == 404
    revoked = page.post("compaction/s1/revoke", id=latest["id"]).json()["revoked"]
    assert set(revoked) == {one["id"] for one in found["summaries"]}
    for turn in (71, 72):
        content = json.dumps(made[turn]).encode()
        with proxy.base_client(headers=OURS) as client:
            client.post("/v1/chat/completions", content=content)
        name = b'"moonshotai/kimi-k2-instruct"'
        assert up.requests[-1].content == content.replace(b'"long"', name)
    proxy.settled()
    assert all(row["revoked_at"] for row in proxy.rows("summaries"))
    # Whoever revoked it does not want the next one.
    assert sum(map(is_summary, up.requests)) == 2
    assert page.post("compaction/s1/revoke", id=latest["id"]).status_code == 404


def test_a_summary_outlives_the_proxy(start: Callable[..., Proxy], up: Upstream) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    send(proxy, made[80])
    Page(proxy).post("compress/s1", force=True)
    send(proxy, made[81])
    sent = up.requests[-1].content
    proxy.settled()
    proxy.stop()
    again = start(auto=False)
    send(again, made[81])
    assert up.requests[-1].content == sent
    (row,) = again.rows("summaries")
    page = Page(again)
    page.post("compaction/s1/revoke", id=row["id"])
    send(again, made[81])
    assert up.requests[-1].json()["messages"] == made[81]["messages"]


def test_another_keys_conversation_is_not_touched(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    send(proxy, made[80])
    Page(proxy).post("compress/s1", force=True)
    with proxy.base_client(headers={"authorization": "Bearer somebody-else"}) as client:
        client.post("/v1/chat/completions", json=made[81])
    assert up.requests[-1].json()["messages"] == made[81]["messages"]


def test_without_a_model_an_extract_stands_in(start: Callable[..., Proxy], up: Upstream) -> None:
    usual(up)
    proxy, made = start(auto=False, more="model: extract"), bodies()
    send(proxy, made[80])
    done = Page(proxy).post("compress/s1", force=True).json()
    assert (done["source"], done["model"], done["cost_usd"]) == ("extract", "", None)
    assert "Files:" in done["summary"]
    assert not any(map(is_summary, up.requests))
    send(proxy, made[81])
    assert done["summary"] in up.requests[-1].json()["messages"][1]["content"]


def test_a_clients_own_key_goes_to_its_provider_with_its_request_alone(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    proxy = start()
    made = [{**body, "model": "gpt-4.1"} for body in bodies()]
    due = turn_at(made, 35_000)
    headers = {
        "authorization": f"Bearer {OWN_KEY}",
        "x-kimi-session": "s1",
        "openai-organization": "org-1",
    }
    with proxy.client(headers=headers) as client:

        def post(turn: int) -> None:
            url = "https://api.openai.com/v1/chat/completions"
            assert client.post(url, json=made[turn]).status_code == 200

        post(due - 1)
        post(due)
        (row,) = summary_ready(proxy)
        asked = next(one for one in up.requests if is_summary(one))
        assert (asked.host, asked.key) == ("api.openai.com", OWN_KEY)
        assert asked.header("openai-organization") == "org-1"
        assert row["source"] == "model"
        post(due + 1)
        assert SAID in up.requests[-1].json()["messages"][1]["content"]
        page = Page(proxy)
        page.post("compaction/s1/revoke", id=row["id"])
        # The request is over, and its key gone with it.
        done = page.post("compress/s1", force=True).json()
        assert done["source"] == "extract"


RUN = """\
import logging
from mitmproxy import ctx, exceptions

def request(flow):
    if told := flow.request.headers.pop("x-run", ""):
        try:
            ctx.master.commands.execute(told)
        except exceptions.CommandError as error:
            logging.warning("%s", error)
"""


def test_commands_compress_and_revoke(
    start: Callable[..., Proxy], up: Upstream, tmp_path: Path
) -> None:
    usual(up)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    proxy, made = start(auto=False, scripts=(*SCRIPTS, str(script))), bodies()

    def run(command: str) -> None:
        with proxy.base_client(headers={"x-run": command}) as client:
            client.post("/v1/chat/completions", json={"model": "none"})

    run("compressor.compress s1")
    wait_until(lambda: "No request of session 's1' has come" in proxy.output)
    send(proxy, made[40])
    run("compressor.compress s1")
    wait_until(lambda: "Session s1 is not compressed" in proxy.output)
    run("compressor.compress s1 true")
    wait_until(lambda: "Session s1 is compressed from" in proxy.output)
    (row,) = summary_ready(proxy)
    send(proxy, made[41])
    assert SAID in up.requests[-1].content.decode()
    run(f"compressor.revoke {row['id']}")
    send(proxy, made[42])
    assert up.requests[-1].json()["messages"] == made[42]["messages"]
    run(f"compressor.revoke {row['id']}")
    wait_until(lambda: "There is no summary" in proxy.output)


# --- with masking ---------------------------------------------------------------------


def verbose(rounds: int, rules: int = 6000) -> dict[str, Any]:
    """Return a request whose tool results are long, and so its system text."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": " ".join(f"rule{n}" for n in range(rules))},
        {"role": "user", "content": "fix it"},
    ]
    for n in range(rounds):
        function = {"name": "run", "arguments": json.dumps({"command": f"cmd {n}"})}
        call = {"id": f"c{n}", "type": "function", "function": function}
        lines = [f"out {n} {line} {(n * 997 + line * 7919) % 10**6}" for line in range(150)]
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{n}", "content": "\n".join(lines)},
        ]
    return {"model": "long", "messages": messages}


def test_a_saving_is_of_what_leaves_after_masking(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    masked = RULES.replace("threshold: 0, keep: 0", "threshold: 400, keep: 200")
    proxy = start(auto=False, more="from_messages: 30", scripts=("all.py",), rules=masked)
    page = Page(proxy)
    send(proxy, verbose(60))
    before = up.requests[-1]
    share = page.get("compaction/s1")["current_percentage"]
    refused = page.post("compress/s1")
    assert refused.status_code == 400
    assert "% of what is sent" in refused.json()["error"]
    done = page.post("compress/s1", force=True).json()
    assert done["original_tokens"] <= tokens(before.content)
    assert 0 <= page.get("compaction/s1")["current_percentage"] < share
    send(proxy, verbose(60))
    fewer = tokens(before.content) - tokens(up.requests[-1].content)
    assert 0.7 * fewer < done["tokens_saved"] <= fewer
    assert 0 < page.get("compaction/s1")["current_percentage"] < share
    page.post("compaction/s1/revoke", id=done["id"])
    assert page.get("compaction/s1")["current_percentage"] < 1.2 * share
    proxy.settled()
    (row,) = [row for row in proxy.rows() if row["compressed_tokens"]]
    assert row["compressed_tokens"] == done["tokens_saved"]


def test_masked_conversations_are_not_compressed_for_little(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    masked = RULES.replace("threshold: 0, keep: 0", "threshold: 400, keep: 200")
    proxy = start(more="from_messages: 30, model: extract", scripts=("all.py",), rules=masked)
    for rounds in range(15, 40, 4):
        send(proxy, verbose(rounds))
        assert len(up.requests[-1].json()["messages"]) == len(verbose(rounds)["messages"])
    proxy.settled()
    assert not summaries(proxy)


# --- what is told is on disk ----------------------------------------------------------


def test_what_is_answered_is_on_disk(start: Callable[..., Proxy], up: Upstream) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    page = Page(proxy)
    send(proxy, made[80])
    done = page.post("compress/s1", force=True).json()
    (row,) = summaries(proxy)
    assert row["used_at"] is not None
    page.post("compaction/s1/revoke", id=done["id"])
    (row,) = summaries(proxy)
    assert row["revoked_at"] is not None


def test_a_killed_proxy_keeps_the_summary_that_requests_left_with(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    send(proxy, made[80])
    Page(proxy).post("compress/s1", force=True)
    send(proxy, made[81])
    sent = up.requests[-1].content
    proxy.stop(signal.SIGKILL)
    again = start(auto=False)
    send(again, made[81])
    assert up.requests[-1].content == sent


def test_a_summary_that_cannot_be_kept_is_not_used(
    start: Callable[..., Proxy], up: Upstream, tmp_path: Path
) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    page = Page(proxy)
    send(proxy, made[80])
    proxy.settled()
    lock = sqlite3.connect(tmp_path / "kimi.db", isolation_level=None)
    try:
        lock.execute("BEGIN IMMEDIATE")
        refused = page.post("compress/s1", force=True)
        assert (refused.status_code, "cannot keep" in refused.text) == (502, True)
        send(proxy, made[81])
        assert up.requests[-1].json()["messages"] == made[81]["messages"]
    finally:
        lock.close()


# --- sessions and side calls ----------------------------------------------------------


def test_a_count_of_tokens_is_no_request_that_left(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies("anthropic")
    send(proxy, made[80], "anthropic")
    Page(proxy).post("compress/s1", force=True)
    asked = {k: v for k, v in made[81].items() if k not in ("stream", "max_tokens")}
    with proxy.base_client(headers=OURS) as client:
        assert client.post("/v1/messages/count_tokens", json=asked).status_code == 200
    assert len(up.requests[-1].json()["messages"]) < 20
    send(proxy, made[81], "anthropic")
    proxy.settled()
    assert [row["applied"] for row in summaries(proxy)] == [1]
    (row,) = [row for row in proxy.rows() if row["cache_break_by"]]
    assert row["cache_break_by"] == "compression"


def test_conversations_of_one_session_are_revoked_apart(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    other = json.loads(json.dumps(made))
    for body in other:
        next(m for m in body["messages"] if m["role"] == "user")["content"] = "Another wish"
    page, done = Page(proxy), []
    for each in (made, other):
        send(proxy, each[80])
        done.append(page.post("compress/s1", force=True).json()["id"])
    assert page.post("compaction/s1/revoke", id=done[0]).json()["revoked"] == [done[0]]
    send(proxy, other[81])
    assert len(up.requests[-1].json()["messages"]) < 20
    send(proxy, made[81])
    assert up.requests[-1].json()["messages"] == made[81]["messages"]


def test_a_summary_can_be_revoked_where_it_applies(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    page = Page(proxy)
    send(proxy, made[80])
    done = page.post("compress/s1", force=True).json()
    headers = {**OURS, "x-kimi-session": "renamed"}
    with proxy.base_client(headers=headers) as client:
        client.post("/v1/chat/completions", json=made[81])
        assert len(up.requests[-1].json()["messages"]) < 20
        assert [one["id"] for one in page.get("compaction/renamed")["summaries"]] == [done["id"]]
        assert page.post("compaction/renamed/revoke", id=done["id"]).status_code == 200
        client.post("/v1/chat/completions", json=made[81])
    assert up.requests[-1].json()["messages"] == made[81]["messages"]


def test_no_header_of_a_client_is_sent_later_but_those_that_name_it(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    names = ("x-litellm-api-key", "helicone-auth", "x-whatever")
    headers = {**OURS, "user-agent": "Agent/1", **dict.fromkeys(names, "a-secret-of-the-client")}
    with proxy.base_client(headers=headers) as client:
        client.post("/v1/chat/completions", json=made[80])
    assert all(up.requests[-1].header(name) for name in names)
    Page(proxy).post("compress/s1", force=True)
    asked = up.requests[-1]
    assert asked.header("user-agent") == "Agent/1"
    assert "a-secret-of-the-client" not in str(asked.headers)


# --- the API --------------------------------------------------------------------------


def test_references_to_what_a_provider_keeps_are_not_compressed(
    start: Callable[..., Proxy], up: Upstream
) -> None:
    usual(up)
    proxy, body = start(auto=False), bodies("responses")[80]
    body["input"].insert(-20, {"type": "item_reference", "id": "rs_1"})
    send(proxy, body, "responses")
    refused = Page(proxy).post("compress/s1", force=True)
    assert (refused.status_code, "the provider keeps" in refused.json()["error"]) == (400, True)


def test_a_session_called_auto_switches_nothing(start: Callable[..., Proxy], up: Upstream) -> None:
    page = Page(start(auto=False))
    refused = page.post("compaction/auto", force=True)
    assert (refused.status_code, "enabled" in refused.json()["error"]) == (400, True)
    assert page.get("compaction/stats")["auto"] is False


def test_what_the_api_tells(start: Callable[..., Proxy], up: Upstream) -> None:
    usual(up)
    proxy, made = start(auto=False), bodies()
    page = Page(proxy)
    unknown = page.post("compress/s1")
    assert (unknown.status_code, unknown.json()["session"]) == (404, "s1")
    send(proxy, made[3])
    few = page.post("compress/s1", force=True)
    assert few.status_code == 400
    assert "fewer than 10 messages" in few.json()["error"]
    send(proxy, made[40])
    assert page.post("compress/s1", force="yes").status_code == 400
    before = page.get("compaction/s1")
    assert (before["can_compress"], before["summaries"]) == (False, [])
    assert "force" in before["hint"]
    page.post("compaction/s1", force=True)
    assert "nothing" in page.post("compress/s1", force=True).json()["error"]
    send(proxy, made[41])
    send(proxy, made[42])
    proxy.settled()
    (row,) = page.get("compress/s1")["summaries"]
    assert page.get("compaction/s1")["current_percentage"] < before["current_percentage"]
    saved = row["tokens_before"] - row["tokens_after"]
    for path in ("compaction/stats", "compress/stats", "compaction/s1/stats", "compress/s1/stats"):
        told = page.get(path)
        assert (told["summaries"], told["requests"], told["tokens_saved"]) == (1, 2, 2 * saved)
    assert page.get("compaction/stats")["threshold"] == 85
    assert page.post("compaction/s1/revoke").status_code == 400
