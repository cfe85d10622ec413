"""Masks on live traffic: what the provider gets, and that all of it can be had back."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import sqlite3
import threading
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from kimi_core.tokens import tokenizer_for
from proxy import Proxy, wait_until
from test_masking_requests import listing, rounds
from upstream import Upstream

LONG = listing(1, 400)
HASH = re.compile(r"\b[0-9a-f]{16}\b")


def ask(
    proxy: Proxy, messages: list[dict[str, Any]], model: str = "answers", **headers: str
) -> httpx.Response:
    with proxy.base_client(headers=headers) as client:
        answer = client.post("/v1/chat/completions", json={"model": model, "messages": messages})
    assert answer.status_code == 200, answer.text
    return answer


def got(up: Upstream) -> list[dict[str, Any]]:
    """Return the messages of the latest request, as the provider got it."""
    return up.requests[-1].json()["messages"]


def kept(proxy: Proxy) -> dict[str, str]:
    """Return the originals that are on disk, by hash."""
    return {row["hash"]: zlib.decompress(row["original"]).decode() for row in proxy.rows("masks")}


@pytest.mark.parametrize("listed", [False, True])
def test_a_long_result_is_cut_and_kept(up: Upstream, chain: Proxy, listed: bool) -> None:
    messages = rounds([LONG, "ok"])
    if listed:
        messages[3]["content"] = [{"type": "text", "text": LONG}]
    ask(chain, messages)
    out = got(up)
    assert [n for n in range(6) if out[n] != messages[n]] == [3]
    said = out[3]["content"][0]["text"] if listed else out[3]["content"]
    assert tokenizer_for("o200k").count(said) < 1000 < tokenizer_for("o200k").count(LONG)
    (hash,) = set(HASH.findall(said))
    assert kept(chain)[hash] == LONG


def anthropic(text: str, listed: bool) -> dict[str, Any]:
    content = [{"type": "text", "text": text}] if listed else text
    return {
        "model": "claude-test",
        "max_tokens": 100,
        "messages": [
            {"role": "user", "content": "Read it."},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t1", "name": "read", "input": {"p": "x"}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t1", "content": content}],
            },
        ],
    }


def gemini(text: str, listed: bool) -> dict[str, Any]:
    return {
        "contents": [
            {"role": "user", "parts": [{"text": "Read it."}]},
            {"role": "model", "parts": [{"functionCall": {"name": "read", "args": {"p": "x"}}}]},
            {
                "role": "user",
                "parts": [{"functionResponse": {"name": "read", "response": {"output": text}}}],
            },
        ]
    }


def responses(text: str, listed: bool) -> dict[str, Any]:
    output = [{"type": "input_text", "text": text}] if listed else text
    return {
        "model": "answers",
        "input": [
            {"role": "user", "content": "Read it."},
            {"type": "function_call", "call_id": "c", "name": "read", "arguments": '{"p": "x"}'},
            {"type": "function_call_output", "call_id": "c", "output": output},
        ],
    }


@pytest.mark.parametrize(
    ("path", "make"),
    [
        ("/v1/messages", anthropic),
        ("/v1beta/models/gem:generateContent", gemini),
        ("/v1/responses", responses),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_it_is_so_in_every_dialect(
    up: Upstream, chain: Proxy, path: str, make: Any, listed: bool
) -> None:
    with chain.base_client() as client:
        assert client.post(path, json=make(LONG, listed)).status_code == 200
    body = up.requests[-1].content.decode()
    (hash,) = set(HASH.findall(body))
    assert kept(chain)[hash] == LONG
    # Where it stood stands what is sent, and nothing else has changed.
    said = max(_strings(json.loads(body)), key=len)
    assert json.loads(json.dumps(make(said, listed))) == {
        **json.loads(body),
        **({"model": make("", listed)["model"]} if "model" in make("", listed) else {}),
    }


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for one in value for text in _strings(one)] if isinstance(value, list) else []


def test_each_request_begins_with_the_one_before_after_a_restart_too(
    up: Upstream, tmp_path: Path
) -> None:
    messages = rounds([listing(n % 3, 200) for n in range(6)])
    before: list[dict[str, Any]] = []
    for part in (range(4, 10, 2), range(10, 15, 2)):
        with Proxy(tmp_path, up) as proxy:
            for end in part:
                ask(proxy, messages[:end])
                now = got(up)
                assert now[: len(before)] == before
                before = now
    assert sum(HASH.search(str(m.get("content"))) is not None for m in before) >= 3


def test_the_switch_changes_live_traffic_and_only_what_is_new(up: Upstream, tmp_path: Path) -> None:
    messages = rounds([listing(n, 400) for n in range(3)])
    token = "t" * 32
    options = [f"stats_token={token}", "stats_port=0"]
    with Proxy(tmp_path, up, options=[*options, "sanitizer_mask=false"]) as proxy:
        ask(proxy, messages[:4])
        assert got(up) == messages[:4]
    with Proxy(tmp_path, up, options=options) as proxy:
        ask(proxy, messages[:6])
        first = got(up)
        assert first[:4] == messages[:4]
        assert first[5] != messages[5]


@pytest.mark.parametrize("how", ["header", "option", "rule"])
def test_a_bypass_sends_the_clients_own_bytes(up: Upstream, tmp_path: Path, how: str) -> None:
    rule = "  free: {bypass: true, targets: [{provider: openai, model: free}]}"
    options = ["kimi_bypass=true"] if how == "option" else []
    body = {"model": "free" if how == "rule" else "answers", "messages": rounds([LONG])}
    with Proxy(tmp_path, up, options=options, more_rules=rule) as proxy:
        headers = {"x-kimi-bypass": "1"} if how == "header" else {}
        with proxy.base_client(headers=headers) as client:
            client.post("/v1/chat/completions", json=body)
        assert got(up) == body["messages"]
        assert up.requests[-1].header("x-kimi-bypass") is None
        if how == "header":
            ask(proxy, body["messages"], **{"x-kimi-bypass": "false"})
            assert got(up) != body["messages"]


def test_what_cannot_be_kept_is_not_hidden(up: Upstream, tmp_path: Path) -> None:
    messages = rounds([listing(n, 400) for n in range(3)])
    with Proxy(tmp_path, up) as proxy:
        ask(proxy, messages[:4])
        first = got(up)
        assert first != messages[:4]
        proxy.settled()
        with contextlib.closing(sqlite3.connect(proxy.store, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")  # nobody else can write now
            ask(proxy, messages[:6])
            second = got(up)
            assert second[:4] == first
            assert second[4:] == messages[4:6]
            other.execute("ROLLBACK")
        ask(proxy, messages[:6])
        assert got(up) == second  # decided on is decided on
    assert "cannot keep the originals" in proxy.output


def test_what_is_kept_stays_masked_while_nothing_more_can_be(up: Upstream, tmp_path: Path) -> None:
    messages = rounds([listing(n, 400) for n in range(3)])
    with Proxy(tmp_path, up) as proxy:
        ask(proxy, messages[:6])
        first = got(up)
    with Proxy(tmp_path, up) as proxy:
        proxy.settled()
        with contextlib.closing(sqlite3.connect(proxy.store, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            ask(proxy, messages)
            second = got(up)
            other.execute("ROLLBACK")
        ask(proxy, messages)
        assert got(up) == second
    assert second[:6] == first
    assert second[6:] == messages[6:]


def test_a_store_that_was_removed_gets_its_originals_again(up: Upstream, tmp_path: Path) -> None:
    messages = rounds([listing(n, 400) for n in range(3)])
    with Proxy(tmp_path, up) as proxy:
        ask(proxy, messages[:6])
        proxy.settled()
        for path in tmp_path.glob("kimi.db*"):
            path.unlink()
        ask(proxy, messages)  # with this the writer finds out
        ask(proxy, messages)
        sent = set(HASH.findall(up.requests[-1].content.decode()))
        assert len(sent) == 3
        assert sent <= kept(proxy).keys()


def test_another_process_decides_the_same_while_both_run(up: Upstream, tmp_path: Path) -> None:
    messages = rounds([listing(n, 400) for n in range(3)])
    store = tmp_path / "one" / "kimi.db"
    with Proxy(tmp_path / "one", up, options=["sanitizer_mask=false"]) as first:
        second = Proxy(tmp_path / "two", up)
        second.command = [
            f"kimi_store={store}" if word.startswith("kimi_store=") else word
            for word in second.command
        ]
        with second:
            ask(first, messages[:6])
            assert got(up) == messages[:6]
            first.settled()
            ask(second, messages)
            assert got(up)[:6] == messages[:6]
            assert got(up)[7] != messages[7]


def test_a_client_that_edits_its_last_message_finds_the_others_as_they_were(
    up: Upstream, tmp_path: Path
) -> None:
    messages = rounds([listing(n, 400) for n in range(3)])
    messages.append({"role": "assistant", "content": "Shall I go on?"})
    with Proxy(tmp_path, up, options=["sanitizer_mask=false"]) as proxy:
        ask(proxy, [*messages, {"role": "user", "content": "Yes"}])
    with Proxy(tmp_path, up) as proxy:
        ask(proxy, [*messages, {"role": "user", "content": "No"}])
        assert got(up)[: len(messages)] == messages


def test_a_store_that_cannot_be_opened_hides_nothing(up: Upstream, tmp_path: Path) -> None:
    (tmp_path / "kimi.db").mkdir()
    with Proxy(tmp_path, up) as proxy:
        messages = rounds([LONG])
        ask(proxy, messages)
        assert got(up) == messages


def test_whatever_left_is_on_disk_when_the_proxy_is_killed(up: Upstream, tmp_path: Path) -> None:
    seeds = itertools.count()

    def go_on(proxy: Proxy) -> None:
        with contextlib.suppress(httpx.HTTPError), proxy.base_client() as client:
            while True:
                body = {"model": "answers", "messages": rounds([listing(next(seeds), 400)])}
                client.post("/v1/chat/completions", json=body)

    for _ in range(3):
        with Proxy(tmp_path, up) as proxy:
            before = up.count
            threads = [threading.Thread(target=go_on, args=(proxy,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            up.wait_for(lambda provider, least=before + 12: provider.count >= least)
            proxy.stop(signal.SIGKILL)
            for thread in threads:
                thread.join(10)
    sent = {hash for one in up.requests for hash in HASH.findall(one.content.decode())}
    assert len(sent) >= 36
    assert sent <= kept(proxy).keys()


def test_an_original_is_the_keys_that_made_it(up: Upstream, chain: Proxy) -> None:
    text = listing(77, 400)
    for key in ("sk-one-0123456789", "sk-two-0123456789"):
        ask(chain, rounds([text]), authorization=f"Bearer {key}")
    rows = [row for row in chain.rows("masks") if zlib.decompress(row["original"]).decode() == text]
    assert len(rows) == 2
    assert len({row["key_hash"] for row in rows}) == 2
    assert all(re.fullmatch("[0-9a-f]{16}", row["key_hash"]) for row in rows)


def test_what_was_left_out_is_in_the_headers_and_the_row(up: Upstream, tmp_path: Path) -> None:
    with Proxy(tmp_path, up) as proxy:
        answer = ask(proxy, rounds([LONG]))
        row = proxy.row(1)
    assert row["masks"] == 1
    assert row["masked_tokens"] == row["saved_tokens"] > 1000
    assert int(answer.headers["x-kimi-proxy-saved-tokens"]) == row["saved_tokens"]


class _Page:
    """The API of a proxy's stats page."""

    def __init__(self, proxy: Proxy) -> None:
        found = wait_until(
            lambda: re.search(r"Stats page listening at (\S+)\?token=(\S+)", proxy.output)
        )
        headers = {"authorization": f"Bearer {found[2]}"}
        self.client = httpx.Client(base_url=found[1] + "api", headers=headers, trust_env=False)

    def get(self, path: str, status: int = 200) -> Any:
        answer = self.client.get(path)
        assert answer.status_code == status, answer.text
        return answer.json()

    def post(self, path: str, body: dict[str, Any], status: int = 200) -> Any:
        answer = self.client.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()


def test_the_api_shows_masks_switches_masking_and_flushes(up: Upstream, tmp_path: Path) -> None:
    messages = rounds([listing(n, 400) for n in range(3)])
    port = _free_port()
    session = {"x-kimi-session": "mine"}
    with Proxy(tmp_path, up, options=[f"stats_port={port}"]) as proxy:
        page = _Page(proxy)
        assert page.post("/sanitizer/toggle", {"enabled": False}) == {"enabled": False}
        ask(proxy, messages[:4], **session)
        assert got(up) == messages[:4]
        assert page.post("/sanitizer/toggle", {}) == {"enabled": True}
        ask(proxy, messages[:6], **session)
        assert got(up)[:4] == messages[:4]
        assert got(up)[5] != messages[5]
        page.post("/sanitizer/flush", {"session": "mine"})
        # A side call of the session is not what was meant.
        ask(proxy, [{"role": "user", "content": "Write a title."}], **session)
        ask(proxy, messages[:6], **session)
        flushed = got(up)
        assert flushed[3] != messages[3]
        ask(proxy, messages, **session)
        assert got(up)[:6] == flushed
        stats = page.get("/sanitizer/stats")
        assert stats["enabled"] is True
        assert stats["masks"] == 3
        assert stats["tokens_saved"] > 3000
        (hash,) = HASH.findall(flushed[3]["content"])
        one = page.get(f"/mask/{hash}")
        assert one["original_content"] == messages[3]["content"]
        assert one["hash"] == hash
        assert one["token_count"] > 1000
        assert one["tags"]
        assert messages[3]["content"].startswith(one["preview"][:20])
        listed = page.get("/mask?limit=2")
        assert len(listed["masks"]) == 2
        assert listed["next"]
        assert "original_content" not in listed["masks"][0]
        assert page.get("/mask/0000000000000000", 404) == {
            "error": "no such mask",
            "hash": "0000000000000000",
        }
        page.post("/sanitizer/toggle", {"enabled": "yes"}, 400)
        page.post("/sanitizer/flush", {}, 400)
        proxy.row(5)
        rows = proxy.rows()
    assert [row["cache_break_by"] for row in rows] == [None, None, None, "flush", None]


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
