"""Flows of all four dialects read as conversations, in the view itself and in a real mitmweb."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mitmproxy import contentviews, http
from mitmproxy.io import FlowReader, FlowWriter
from mitmproxy.test import taddons, tflow
from mitmproxy.utils.emoji import emoji

from kimi_core import context, flows
from kimi_core.exchange import Attempt, Mend, Saving
from kimi_core.tokens import tokenizer_for
from proxy import PLANTED, Proxy, wait_until
from upstream import Abort, Framing, Received, Reply, TokenUsage, ToolCall, Upstream, conversation
from upstream.render import render
from views import MARK, Views

VIEW = "LLM conversation"
ASKED = "Where is the parser?"
THOUGHT = "I must look at the tree."
ARGUMENTS = '{"path": "src/parse.py"}'
RESULT = "1  def parse(): ..."

_FUNCTION = {"name": "read_file", "arguments": ARGUMENTS}
REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "openai": (
        "api.openai.com",
        "/v1/chat/completions",
        {
            "model": "gpt-4o",
            "tools": [
                {"type": "function", "function": {"name": "read_file", "description": "Reads."}}
            ],
            "messages": [
                {"role": "system", "content": "You help."},
                {"role": "user", "content": [{"type": "text", "text": ASKED}]},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": THOUGHT,
                    "tool_calls": [{"id": "call_1", "type": "function", "function": _FUNCTION}],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": RESULT},
            ],
        },
    ),
    "responses": (
        "api.openai.com",
        "/v1/responses",
        {
            "model": "gpt-4o",
            "instructions": "You help.",
            "tools": [{"type": "function", "name": "read_file", "description": "Reads."}],
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": ASKED}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]},
                {"type": "function_call", "call_id": "call_1", **_FUNCTION},
                {"type": "function_call_output", "call_id": "call_1", "output": RESULT},
            ],
        },
    ),
    "anthropic": (
        "api.anthropic.com",
        "/v1/messages",
        {
            "model": "claude-sonnet-4-5",
            "max_tokens": 100,
            "system": [{"type": "text", "text": "You help."}],
            "tools": [{"name": "read_file", "description": "Reads.", "input_schema": {}}],
            "messages": [
                {"role": "user", "content": ASKED},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": THOUGHT, "signature": "x"},
                        {
                            "type": "tool_use",
                            "id": "call_1",
                            "name": "read_file",
                            "input": json.loads(ARGUMENTS),
                        },
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "call_1", "content": RESULT}
                    ],
                },
            ],
        },
    ),
    "gemini": (
        "generativelanguage.googleapis.com",
        "/v1beta/models/gemini-2.5-flash:generateContent",
        {
            "systemInstruction": {"parts": [{"text": "You help."}]},
            "tools": [{"functionDeclarations": [{"name": "read_file", "description": "Reads."}]}],
            "contents": [
                {"role": "user", "parts": [{"text": ASKED}]},
                {
                    "role": "model",
                    "parts": [
                        {"text": THOUGHT, "thought": True},
                        {"functionCall": {"name": "read_file", "args": json.loads(ARGUMENTS)}},
                    ],
                },
                {
                    "role": "user",
                    "parts": [
                        {"functionResponse": {"name": "read_file", "response": {"output": RESULT}}}
                    ],
                },
            ],
        },
    ),
}
REPLY = Reply(
    text="It is in src/parse.py.",
    reasoning="The result says so.",
    tool_calls=(ToolCall("call_2", "read_file", '{"path": "src/tree.py"}'),),
    usage=TokenUsage(input=1234, output=56, cached=1000),
    delta_chars=5,
)
each_dialect = pytest.mark.parametrize("dialect", REQUESTS)
streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@pytest.fixture
def viewing(tmp_path: Path) -> Iterator[taddons.context]:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "version: 1\nproviders:\n"
        '  openai: {api: openai, base_url: "https://api.openai.com/v1"}\n'
        '  anthropic: {api: anthropic, base_url: "https://api.anthropic.com/v1"}\n'
        '  gemini: {api: gemini, base_url: "https://generativelanguage.googleapis.com/v1beta"}\n'
    )
    with taddons.context(loadcore=False) as entered:
        addon = Views()
        entered.master.addons.add(addon)
        entered.options.update(kimi_rules=str(rules), kimi_store=str(tmp_path / "kimi.db"))
        yield entered
        entered.master.addons.remove(addon)
        entered.master._legacy_log_events.uninstall()
    entered.master.event_loop.close()


def shown(flow: http.HTTPFlow, message: http.Message, view: str = "auto") -> tuple[str, str]:
    """Return the name of the view and its text, by the API of the mitmproxy that runs."""
    if hasattr(contentviews, "prettify_message"):
        result = contentviews.prettify_message(message, flow, view)
        return result.view_name or "", result.text
    description, lines, error = contentviews.get_message_content_view(view, message, flow)
    assert not error
    return description, "\n".join("".join(text for _, text in line) for line in lines)


def exchanged(dialect: str, stream: bool, body: bytes | None = None) -> http.HTTPFlow:
    host, path, asked = REQUESTS[dialect]
    if stream and dialect == "gemini":
        path = path.replace(":generate", ":streamGenerate") + "?alt=sse"
    elif stream:
        asked = asked | {"stream": True, "stream_options": {"include_usage": True}}
    flow = tflow.tflow()
    flow.request = http.Request.make(
        "POST",
        f"https://{host}{path}",
        body or json.dumps(asked).encode(),
        {"content-type": "application/json"},
    )
    bare, _, query = path.partition("?")
    headers = [("host", host)]
    received = Received(
        "POST", "https", host, bare, query, headers, flow.request.content or b"", "HTTP/1.1"
    )
    rendered = render(received, REPLY, 1)
    flow.response = http.Response.make(
        rendered.status,
        rendered.body if rendered.events is None else b"".join(rendered.events),
        dict(rendered.headers),
    )
    return flow


def heads(text: str) -> list[str]:
    """Return the headings of a conversation: what stands between the rules."""
    return [line.strip("─ ") for line in text.splitlines() if line.startswith("──")]


# --- the view


@each_dialect
def test_a_request_reads_as_a_conversation(viewing: taddons.context, dialect: str) -> None:
    flow = exchanged(dialect, stream=False)
    name, text = shown(flow, flow.request)
    assert name.lower() == VIEW.lower()
    found = [re.sub(r" · \d+ tokens$", "", head) for head in heads(text)]
    expected = {
        "openai": ["tools", "1 system", "2 user", "3 assistant", "4 tool"],
        "responses": ["system", "tools", "1 user", "2 assistant", "3 assistant", "4 tool"],
        "anthropic": ["tools", "system", "1 user", "2 assistant", "3 tool"],
        "gemini": ["system", "tools", "1 user", "2 assistant", "3 tool"],
    }
    assert found == expected[dialect]
    for words in (
        "read_file: Reads.",
        "You help.",
        ASKED,
        f"[thinking]\n{THOUGHT}",
        "[calls] read_file",
        '"path": "src/parse.py"',
        "[result]",
        RESULT,
    ):
        assert words in text
    sizes = [int(size) for size in re.findall(r"· (\d+) tokens ─", text)]
    assert len(sizes) == len(found)
    assert all(sizes)
    assert f"{sum(sizes)} tokens" in text.splitlines()[0]
    assert REQUESTS[dialect][2].get("model", "gemini-2.5-flash") in text.splitlines()[0]


@each_dialect
@streamed_or_not
def test_a_reply_reads_as_a_conversation(
    viewing: taddons.context, dialect: str, stream: bool
) -> None:
    flow = exchanged(dialect, stream)
    assert flow.response is not None
    name, text = shown(flow, flow.response)
    assert name.lower() == VIEW.lower()
    first = text.splitlines()[0]
    assert "1,234 in" in first
    assert "1,000 cached" in first
    assert "56 out" in first
    assert "cut off" not in first
    assert heads(text)[-1].startswith("calls read_file")
    assert "It is in src/parse.py." in text
    assert '"path": "src/tree.py"' in text
    assert text.index("The result says so.") < text.index("It is in src/parse.py.")
    assert "thinking" in heads(text)[0]


@each_dialect
def test_a_long_conversation_numbers_its_messages(viewing: taddons.context, dialect: Any) -> None:
    *_, last = conversation(12, 40_000, dialect)
    flow = exchanged(dialect, stream=False, body=json.dumps(last).encode())
    _, text = shown(flow, flow.request)
    numbers = [int(head.split()[0]) for head in heads(text) if head[0].isdigit()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert f"{len(numbers)} messages" in text.splitlines()[0]


def test_a_reply_that_was_compressed_or_cut_still_reads(viewing: taddons.context) -> None:
    flow = exchanged("openai", stream=True)
    assert flow.response is not None
    whole = flow.response.content or b""
    flow.response.headers["content-encoding"] = "gzip"
    flow.response.raw_content = gzip.compress(whole)
    assert "It is in src/parse.py." in shown(flow, flow.response)[1]
    del flow.response.headers["content-encoding"]
    flow.response.raw_content = whole[: whole.index(b'finish_reason":"tool_calls')]
    assert "cut off" in shown(flow, flow.response)[1].splitlines()[0]


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("https://api.openai.com/v1/files", b'{"model": "m"}'),
        ("https://example.com/index", b"<html></html>"),
        ("https://api.openai.com/v1/chat/completions", b"no JSON"),
        ("https://api.openai.com/v1/chat/completions", b""),
    ],
)
def test_what_is_no_conversation_is_left_to_the_other_views(
    viewing: taddons.context, url: str, body: bytes
) -> None:
    flow = tflow.tflow()
    flow.request = http.Request.make("POST", url, body)
    name, text = shown(flow, flow.request)
    assert name.lower() != VIEW.lower()
    assert body.decode() in text


@pytest.mark.parametrize(
    "body", [b'{"model": 5, "messages": {"a": 1}}', b'{"messages": [1, null]}', b"{}"]
)
def test_odd_requests_render_too(viewing: taddons.context, body: bytes) -> None:
    flow = exchanged("openai", stream=False, body=body)
    name, text = shown(flow, flow.request)
    assert name.lower() == VIEW.lower()
    assert text


HOSTILE = {
    "ANSI": "\x1b[2J\x1b]0;owned\x07\x9b31m red",
    "HTML": "<script>alert(1)</script>&amp;",
    "a long line": "x" * 1_000_000,
    "direction": "\u202egnp.exe",
    "surrogate": "cut \ud83d here",
    "markers": "── 9 system ──────\ndata: [DONE]\n\n",
}


@pytest.mark.parametrize("name", HOSTILE)
@each_dialect
def test_hostile_content_renders_as_text(viewing: taddons.context, dialect: str, name: str) -> None:
    said = HOSTILE[name]
    body = json.dumps(REQUESTS[dialect][2]).replace(json.dumps(ASKED)[1:-1], json.dumps(said)[1:-1])
    flow = exchanged(dialect, stream=False, body=body.encode())
    assert flow.response is not None
    reply = (flow.response.content or b"").replace(
        b"It is in src/parse.py.", json.dumps(said)[1:-1].encode()
    )
    flow.response.content = reply
    for message in (flow.request, flow.response):
        view, text = shown(flow, message)
        assert view.lower() == VIEW.lower()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
        text.encode()
        if name in ("HTML", "a long line"):
            assert said in text
        if name == "ANSI":
            assert " red" in text


# --- what was mended

LEAK = '<|tool_call_begin|>functions.read:0<|tool_call_argument_begin|>{"p": "a"}<|tool_call_end|>'


def mended(*mends: Mend) -> str:
    return json.dumps([dataclasses.asdict(mend) for mend in mends])


@each_dialect
@streamed_or_not
def test_a_mended_reply_ends_with_what_leaked_in_a_saved_flow_too(
    viewing: taddons.context, dialect: str, stream: bool
) -> None:
    flow = exchanged(dialect, stream)
    assert flow.response is not None
    plain = shown(flow, flow.response)[1]
    flow.metadata["kimi.leaked"] = mended(
        Mend("tool_call", LEAK, 'read({"p": "a"})'), Mend("marker", "<|im_end|>", "")
    )
    file = io.BytesIO()
    FlowWriter(file).add(flow)
    file.seek(0)
    (saved,) = FlowReader(file).stream()
    assert isinstance(saved, http.HTTPFlow)
    assert saved.response is not None
    asked, answered = shown(saved, saved.request)[1], shown(saved, saved.response)[1]
    assert answered.startswith(plain)
    assert heads(answered) == [*heads(plain), "mended · 2 things"]
    for line in (f"   - {LEAK}", '   + read({"p": "a"})', "   - <|im_end|>", "   (taken out)"):
        assert line in answered.splitlines()
    assert asked == shown(flow, flow.request)[1]
    assert "<|" not in asked


@pytest.mark.parametrize("value", [None, 5, "", "[{", "[{}]", ["x"]])
def test_a_malformed_list_of_mends_is_left_out(viewing: taddons.context, value: object) -> None:
    flow = exchanged("openai", stream=False)
    assert flow.response is not None
    plain = shown(flow, flow.response)
    flow.metadata["kimi.leaked"] = value
    assert shown(flow, flow.response) == plain


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_markup_renders_as_text(viewing: taddons.context, name: str) -> None:
    flow = exchanged("openai", stream=False)
    assert flow.response is not None
    said = HOSTILE[name]
    flow.metadata["kimi.leaked"] = mended(Mend("marker", said, said))
    view, text = shown(flow, flow.response)
    assert view.lower() == VIEW.lower()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
    assert heads(text)[-1] == "mended · 1 thing"
    first = re.split(r"[\x00-\x1f\u202e\ud83d]", said)[0]
    assert f"   - {first}" in text
    assert f"   + {first}" in text


# --- what was left out

CUT = (
    "src/parse.py:1\n[… 99 lines cut …]\n"
    f"[kimi-proxy: 99 of 100 lines cut; the whole: kimi-proxy mask {'ab' * 8}]"
)


def with_result(dialect: str, result: str) -> bytes:
    """Return the request of a dialect with another result of its call."""
    return json.dumps(REQUESTS[dialect][2]).replace(json.dumps(RESULT), json.dumps(result)).encode()


@each_dialect
@pytest.mark.parametrize("failed", [False, True], ids=["answered", "failed"])
def test_a_masked_request_shows_what_was_left_out_in_a_saved_flow_too(
    viewing: taddons.context, dialect: str, failed: bool
) -> None:
    flow = exchanged(dialect, stream=False, body=with_result(dialect, CUT))
    exchange = flows.exchange(flow)
    assert exchange is not None
    last = len(context.context(exchange)) - 1
    exchange.savings = [Saving("cut", last, 3400, "ab" * 8, new=True)]
    addon = next(a for a in viewing.master.addons.chain if isinstance(a, Views))
    (addon.error if failed else addon.response)(flow)
    file = io.BytesIO()
    FlowWriter(file).add(flow)
    file.seek(0)
    (saved,) = FlowReader(file).stream()
    assert isinstance(saved, http.HTTPFlow)
    for each in (flow, saved):
        text = shown(each, each.request)[1]
        assert re.search(rf"^── {last + 1} tool · \d+ tokens · 3,400 left out ─", text, re.M)
        assert "✂ [… 99 lines cut …]" in text.splitlines()
        assert heads(text)[-1] == "saved · 3,400 tokens of o200k not sent"
        line = text.splitlines()[-1]
        size = tokenizer_for("o200k").count(CUT)
        told = f"1. message {last + 1} · cut · {3400 + size:,} → {size:,} tokens · {'ab' * 8}"
        assert line.startswith(told)
        assert "read_file" in line


def test_of_a_request_that_left_whole_nothing_is_noted(viewing: taddons.context) -> None:
    flow = exchanged("openai", stream=False)
    addon = next(a for a in viewing.master.addons.chain if isinstance(a, Views))
    addon.response(flow)
    assert "kimi.saved" not in flow.metadata
    assert "saved" not in shown(flow, flow.request)[1]


@pytest.mark.parametrize("value", [None, 5, "", "[{", "[{}]", ["x"]])
def test_a_malformed_list_of_savings_is_left_out(viewing: taddons.context, value: object) -> None:
    flow = exchanged("openai", stream=False)
    plain = shown(flow, flow.request)
    flow.metadata["kimi.saved"] = value
    assert shown(flow, flow.request) == plain


def test_the_comment_and_the_mark_tell_of_mends_and_attempts(viewing: taddons.context) -> None:
    addon = next(a for a in viewing.master.addons.chain if isinstance(a, Views))

    def ended(mends: int, attempts: int, mark: str = "") -> http.HTTPFlow:
        flow = exchanged("openai", stream=False)
        exchange = flows.exchange(flow)
        assert exchange is not None
        exchange.mends = [Mend("id", "", "call_1")] * mends
        exchange.attempts = [Attempt("openai", "gpt-4o", exchange.dialect)] * attempts
        exchange.output_tokens = 7
        flow.marked = mark
        addon.response(flow)
        return flow

    told = [(flow.comment, flow.marked) for flow in (ended(0, 1), ended(2, 3), ended(1, 1, ":x:"))]
    assert told == [
        ("7 out", ""),
        ("7 out · mended 2 · 3 attempts", MARK),
        ("7 out · mended 1", ":x:"),
    ]
    assert MARK in emoji


# --- mitmweb


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Web:
    """mitmweb's own HTTP API."""

    def __init__(self, proxy: Proxy, port: int) -> None:
        self.proxy = proxy
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"authorization": "Bearer test-password"},
            trust_env=False,
            timeout=30,
        )

    def flows(self) -> list[dict[str, Any]]:
        try:
            answer = self.client.get("/flows")
        except httpx.ConnectError:
            return []
        answer.raise_for_status()
        return list(answer.json())

    def finished(self, number: int) -> list[dict[str, Any]]:
        def done() -> list[dict[str, Any]] | None:
            found = [flow for flow in self.flows() if flow["comment"]]
            return found if len(found) >= number else None

        return wait_until(done)  # type: ignore[return-value]

    def content(self, flow: str, message: str, view: str = "auto") -> str:
        answer = self.client.get(f"/flows/{flow}/{message}/content/{view}.json")
        answer.raise_for_status()
        assert answer.headers["content-type"].startswith("application/json")
        shown = answer.json()
        if "text" in shown:
            return str(shown["text"])
        return "\n".join("".join(text for _, text in line) for line in shown["lines"])


def _mitmweb(folder: Path, upstream: Upstream, *options: str) -> tuple[Proxy, int]:
    port = _free_port()
    settings = [f"web_port={port}", "web_open_browser=false", *options]
    if hasattr(contentviews, "Contentview"):  # mitmproxy 12 wants a password
        settings.append("web_password=test-password")
    return Proxy(folder, upstream, program="mitmweb", options=settings), port


@pytest.fixture(scope="module")
def web(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    proxy, port = _mitmweb(tmp_path_factory.mktemp("web"), provider)
    with proxy:
        yield Web(proxy, port)
    assert "Traceback" not in proxy.output


NAMES = {"openai": "gpt-4o", "responses": "answers", "anthropic": "claude-test"}


def _send(proxy: Proxy, dialect: str, stream: bool) -> None:
    _, path, body = REQUESTS[dialect]
    if dialect == "gemini":
        path = path.replace("gemini-2.5-flash", "gem")
        path = path.replace(":generate", ":streamGenerate") + "?alt=sse" if stream else path
    else:
        body = body | {"model": NAMES[dialect], "stream": stream}
    with proxy.base_client() as client:
        assert client.post(path, json=body).status_code == 200


@each_dialect
@streamed_or_not
@pytest.mark.parametrize("view", ["auto", "LLM%20conversation"])
def test_mitmweb_shows_conversations(
    web: Web, up: Upstream, dialect: str, stream: bool, view: str
) -> None:
    up.default = REPLY
    known = {flow["id"] for flow in web.flows()}
    _send(web.proxy, dialect, stream)
    [flow] = [flow for flow in web.finished(len(known) + 1) if flow["id"] not in known]
    asked = web.content(flow["id"], "request", view)
    for words in (ASKED, f"[thinking]\n{THOUGHT}", "[calls] read_file", RESULT, " tokens "):
        assert words in asked
    answered = web.content(flow["id"], "response", view)
    assert "It is in src/parse.py." in answered
    assert "The result says so." in answered
    assert '"path": "src/tree.py"' in answered
    assert flow["comment"].startswith("1,234 in (1,000 cached) · 56 out · $0.00"), flow["comment"]
    assert PLANTED not in json.dumps(flow)


def test_mitmweb_shows_what_came_of_a_stream_that_was_cut(web: Web, up: Upstream) -> None:
    up.default = Reply(text="word " * 100, framing=Framing(abort=Abort(after=2000)))
    known = {flow["id"] for flow in web.flows()}
    with web.proxy.base_client() as client, pytest.raises(httpx.HTTPError):
        client.post(
            "/v1/chat/completions",
            json={
                "model": "kimi-k2",
                "stream": True,
                "messages": [{"role": "user", "content": "x"}],
            },
        )
    [flow] = [flow for flow in web.finished(len(known) + 1) if flow["id"] not in known]
    assert "cut off" in flow["comment"]
    shown = web.content(flow["id"], "response")
    assert "cut off" in shown.splitlines()[0]
    assert "word word" in shown


def test_a_refusal_says_so_beside_the_flow(web: Web, up: Upstream) -> None:
    known = {flow["id"] for flow in web.flows()}
    with web.proxy.base_client() as client:
        client.post("/v1/chat/completions", json={"model": "unheard-of", "messages": []})
    [flow] = [flow for flow in web.finished(len(known) + 1) if flow["id"] not in known]
    assert flow["comment"].startswith("refused: No rule names the model 'unheard-of'")


def test_mitmweb_shows_what_leaked_in_a_file_of_flows(up: Upstream, tmp_path: Path) -> None:
    flow = exchanged("openai", stream=True)
    flow.comment, flow.marked = "mended 1", MARK
    flow.metadata["kimi.leaked"] = mended(Mend("tool_call", LEAK, 'read({"p": "a"})'))
    file = tmp_path / "saved.flows"
    with file.open("wb") as opened:
        FlowWriter(opened).add(flow)
    proxy, port = _mitmweb(tmp_path, up, f"rfile={file}")
    with proxy:
        web = Web(proxy, port)
        [listed] = web.finished(1)
        assert (listed["comment"], listed["marked"]) == ("mended 1", emoji[MARK])
        answered = web.content(listed["id"], "response").splitlines()
    assert f"   - {LEAK}" in answered
    assert '   + read({"p": "a"})' in answered


def test_views_keep_bounds_the_list_and_kills_no_live_flow(up: Upstream, tmp_path: Path) -> None:
    go_on = threading.Event()
    slow = Reply(text="slow " * 20, framing=Framing(hang=go_on, hang_after=5))
    up.default = Reply(text="quick")
    up.script(lambda received: b"please wait" in received.body, slow, slow)
    proxy, port = _mitmweb(tmp_path, up, "views_keep=20")
    body = {"model": "bare", "messages": [{"role": "user", "content": "please wait"}]}
    with proxy, proxy.base_client() as client, proxy.base_client() as other:
        web = Web(proxy, port)
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
            pieces = answer.iter_bytes()
            got = next(pieces)
            for number in range(60):
                quick = {"model": "bare", "messages": [{"role": "user", "content": f"{number}"}]}
                assert other.post("/v1/chat/completions", json=quick).status_code == 200
            listed = web.flows()
            assert 20 <= len(listed) <= 23
            assert listed[0]["comment"] == "", "the live one is the oldest and still there"
            go_on.set()
            got += b"".join(pieces)
        assert got.decode().rstrip().endswith("data: [DONE]")
        wait_until(lambda: web.flows()[0]["comment"])
    assert len(proxy.rows()) == 61


def test_views_keep_0_keeps_all(viewing: taddons.context) -> None:
    from mitmproxy.addons.view import View

    view = View()
    viewing.master.addons.add(view)
    addon = next(a for a in viewing.master.addons.chain if isinstance(a, Views))
    made = [tflow.tflow(resp=True) for _ in range(50)]
    for flow in made:
        flow.live = False
    view.add(made)
    viewing.options.update(views_keep=0)
    addon._bound()
    assert len(view._store) == 50
    viewing.options.update(views_keep=10)
    made[0].live = True
    addon._bound()
    assert list(view._store) == [flow.id for flow in (made[0], *made[-10:])]


def test_a_comment_of_the_user_stays(viewing: taddons.context) -> None:
    flow = exchanged("openai", stream=False)
    flow.comment = "my own words"
    addon = next(a for a in viewing.master.addons.chain if isinstance(a, Views))
    addon.response(flow)
    assert flow.comment == "my own words"
    other = exchanged("openai", stream=False)
    addon.response(other)
    assert flows.exchange(other) is not None
    assert "my own words" not in other.comment
