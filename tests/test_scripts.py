"""The addons alone, together and in any order: the same bytes pass."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from proxy import Proxy
from upstream import Reply, TokenUsage, Upstream

ALL = (
    "hook_cache.py",
    "guard.py",
    "router.py",
    "compressor.py",
    "enforcer.py",
    "normalizer.py",
    "counter.py",
    "recorder.py",
    "stats.py",
    "views.py",
)
BODY = (
    b'{"model": "bare",\n "stream": %s, "n": 1.0e2,'
    b' "messages": [{"role":"user","content":"\\u0041"}]}'
)
LEAKED = (
    "On it.<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0"
    '<|tool_call_argument_begin|>{"at": "here"}<|tool_call_end|><|tool_calls_section_end|>'
)
LEAKY_RULE = """\
  leaky: {ensure_tool_call: true, targets: [{provider: local, model: moonshotai/kimi-k2-0905}]}
"""


def _mended(proxy: Proxy, up: Upstream, stream: bool) -> tuple[list[bytes], bytes]:
    """Return what the provider received, twice, and what the client got for a leaked call."""
    used = TokenUsage(input=31, output=3)
    before = len(up.requests)
    up.script("*", Reply(text="Hm.", usage=used), Reply(text=LEAKED, usage=used))
    body = {
        "model": "leaky",
        "stream": stream,
        "messages": [{"role": "user", "content": "Where is it?"}],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
    }
    with proxy.base_client() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert "<|" not in answer.text
    assert "functions.look:0" in answer.text
    return [one.body for one in up.requests[before:]], _without_ids(answer.content)


def _exchange(proxy: Proxy, up: Upstream, stream: str) -> tuple[bytes, bytes]:
    """Return what the provider received and what the client got."""
    up.default = Reply(text="the same words", usage=TokenUsage(input=31, output=3))
    with proxy.base_client() as client:
        answer = client.post("/v1/chat/completions", content=BODY % stream.encode())
    assert answer.status_code == 200, answer.text
    return up.requests[-1].body, _without_ids(answer.content)


def _without_ids(content: bytes) -> bytes:
    import re

    return re.sub(rb'"(id|created)": ?("[^"]*"|\d+)', b"", content)


def _orders() -> list[Sequence[str]]:
    rng = random.Random(20261121)
    shuffled = [list(ALL) for _ in range(3)]
    for order in shuffled:
        rng.shuffle(order)
    return [("all.py",), ALL, tuple(reversed(ALL)), *shuffled]


_seen: dict[str, tuple[bytes, bytes]] = {}
_seen_mended: dict[bool, tuple[list[bytes], bytes]] = {}


@pytest.mark.parametrize("scripts", _orders(), ids=lambda order: "+".join(p[:3] for p in order))
def test_the_order_of_scripts_changes_no_byte(
    scripts: Sequence[str], up: Upstream, tmp_path: Path
) -> None:
    with Proxy(tmp_path, up, scripts=scripts, more_rules=LEAKY_RULE) as proxy:
        for stream in ("true", "false"):
            sent, got = _exchange(proxy, up, stream)
            expected = BODY.replace(b"bare", b"bare-model") % stream.encode()
            if stream == "true":
                asked = b'{"stream_options":{"include_usage":true},'
                expected = expected.replace(b"{", asked, 1)
                assert b'"usage":{' not in got.replace(b": ", b":")
            assert sent == expected
            assert _seen.setdefault(stream, (sent, got)) == (sent, got)
        rows = [proxy.row(1), proxy.row(2)]
        assert [row["gen_ai.usage.input_tokens"] for row in rows] == [31, 31]
        for streamed in (True, False):
            mended = _mended(proxy, up, streamed)
            assert len(mended[0]) == 2
            assert _seen_mended.setdefault(streamed, mended) == mended
        rows = [proxy.row(3), proxy.row(4)]
        assert [row["gen_ai.usage.input_tokens"] for row in rows] == [62, 62]
        assert [row["attempts"] for row in rows] == [2, 2]
        assert all(row["mended"] for row in rows)
    assert "failed" not in proxy.output
    assert "Traceback" not in proxy.output


@pytest.mark.parametrize("script", ALL)
def test_each_addon_works_alone(script: str, up: Upstream, tmp_path: Path) -> None:
    up.default = Reply(text="alone", usage=TokenUsage(input=17, output=4))
    body = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "x"}]}).encode()
    with Proxy(tmp_path, up, scripts=(script,)) as proxy:
        with proxy.client() as client:
            for stream in (b"", b', "stream": true'):
                content = body[:-1] + stream + b"}"
                answer = client.post(
                    "https://api.openai.com/v1/chat/completions",
                    content=content,
                    headers={"authorization": "Bearer sk-own-key-12345", "x-kimi-session": "s1"},
                )
                assert answer.status_code == 200
                sent = up.requests[-1]
                assert sent.body == content
                assert sent.key == "sk-own-key-12345"
                assert sent.header("x-kimi-session") is None
        if script == "counter.py":
            assert answer.headers["x-kimi-proxy-session"] == "s1"
        if script == "recorder.py":
            assert proxy.row(2)["session_id"] == "s1"
    assert "failed" not in proxy.output
    assert "Traceback" not in proxy.output
