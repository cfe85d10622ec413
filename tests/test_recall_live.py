"""A model reads on its own what was left out, and its client gets one reply, as it comes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from mitmproxy import http
from mitmproxy.io import FlowReader

from kimi_core.recall import MAX_RECALLS, NAME
from proxy import PLANTED, Proxy, wait_until
from upstream import Framing, Reply, TokenUsage, Upstream

HASH = "0123456789abcdef"
ORIGINAL = "first\nsecond\nthe third line, which was cut"
RULES = """\
  ensured: {ensure_tool_call: true, targets: [{provider: openai, model: gpt-4o}]}
  claude-ensured:
    ensure_tool_call: true
    targets: [{provider: anthropic, model: claude-sonnet-4-5}]
"""
# What makes requests of their own texts is not what is tried here: the texts are in a file.
ADDON = """\
import asyncio
from pathlib import Path

from kimi_core import flows, recall
from kimi_core.flows import Rank


class Recaller:
    def load(self, loader):
        flows.join(self, loader)

    def configure(self, updated):
        flows.suite().configure(updated)

    def done(self):
        return flows.leave(self)

    @flows.step(Rank.MASK)
    @flows.fail_open
    def request(self, flow):
        exchange = flows.exchange(flow)
        if exchange is None or flow.response or flow.error:
            return

        async def lookup(hash):
            file = Path(__file__).with_name(hash)
            return await asyncio.to_thread(file.read_text) if file.exists() else None

        recall.prepare(exchange, lookup)

    @flows.step(Rank.MASK)
    @flows.fail_open
    def responseheaders(self, flow):
        pass

    @flows.step(Rank.MASK)
    @flows.fail_open
    def response(self, flow):
        flow.metadata["kimi.recalls"] = recall.recalls(flows.exchange(flow))


addons = [Recaller()]
"""
USAGE = TokenUsage(input=100, output=10)
WISH = "Mend the parser"
BASH = ("call_1", "bash", '{"command":"ls"}')


@pytest.fixture(scope="module")
def proxy(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("recall")
    script = folder / "recaller.py"
    script.write_text(ADDON)
    script.with_name(HASH).write_text(ORIGINAL)
    scripts = ("router.py", str(script), "enforcer.py", "normalizer.py", "counter.py")
    with Proxy(
        folder,
        provider,
        scripts=(*scripts, "recorder.py"),
        more_rules=RULES,
        arguments=["-w", str(folder / "flows.mitm")],
    ) as started:
        yield started
    assert "Traceback" not in started.output
    assert PLANTED not in started.output


@dataclass
class Got:
    """What a client made of a reply."""

    text: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    finish: str | None = None
    usage: tuple[int, int] = (0, 0)


def ask_openai(proxy: Proxy, *, stream: bool, model: str = "answers", **more: Any) -> Got:
    function = {"name": "bash", "parameters": {"type": "object"}}
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": WISH}],
        "tools": [{"type": "function", "function": function}],
        **more,
    }
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="any", max_retries=0) as client:
        if stream:
            options = {"include_usage": True}
            with client.chat.completions.stream(**asked, stream_options=options) as events:
                for _ in events:
                    pass
                reply = events.get_final_completion()
        else:
            reply = client.chat.completions.create(**asked)
    choice = reply.choices[0]
    return Got(
        choice.message.content or "",
        [
            (call.function.name, json.loads(call.function.arguments))
            for call in choice.message.tool_calls or []
        ],
        choice.finish_reason,
        (reply.usage.prompt_tokens, reply.usage.completion_tokens),
    )


def ask_anthropic(proxy: Proxy, *, stream: bool, model: str = "claude-test", **more: Any) -> Got:
    asked = {
        "model": model,
        "max_tokens": 1000,
        "messages": [{"role": "user", "content": WISH}],
        "tools": [{"name": "bash", "input_schema": {"type": "object"}}],
        **more,
    }
    with anthropic.Anthropic(base_url=proxy.url, api_key="any", max_retries=0) as client:
        if stream:
            with client.messages.stream(**asked) as events:
                reply = events.get_final_message()
        else:
            reply = client.messages.create(**asked)
    return Got(
        "".join(block.text for block in reply.content if block.type == "text"),
        [(block.name, block.input) for block in reply.content if block.type == "tool_use"],
        reply.stop_reason,
        (reply.usage.input_tokens, reply.usage.output_tokens),
    )


Ask = Callable[..., Got]
EVERY_WAY = pytest.mark.parametrize(
    ("ask", "stream"),
    [(ask_openai, True), (ask_openai, False), (ask_anthropic, True), (ask_anthropic, False)],
    ids=["openai streamed", "openai whole", "anthropic streamed", "anthropic whole"],
)
FINISH = {
    ask_openai: {"stop": "stop", "call": "tool_calls"},
    ask_anthropic: {"stop": "end_turn", "call": "tool_use"},
}


def script(up: Upstream, *replies: Reply) -> None:
    up.script("*", *(replace(reply, usage=USAGE) for reply in replies))


def recalled(id: str = "call_7", **arguments: Any) -> tuple[str, str, str]:
    return (id, NAME, json.dumps({"hash": HASH, **arguments}))


def names(request: Any) -> list[str]:
    return [tool.get("function", tool)["name"] for tool in request.json()["tools"]]


@EVERY_WAY
def test_a_model_gets_what_it_asks_for_and_its_client_sees_one_reply(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    before = proxy.settled()
    script(
        up,
        Reply(text="Let me see.", tool_calls=(recalled(),)),
        Reply(text="It was cut.", tool_calls=(BASH,)),
    )
    got = ask(proxy, stream=stream)
    assert got.text == "Let me see.\n\nIt was cut."
    assert got.calls == [("bash", {"command": "ls"})]
    assert got.finish == FINISH[ask]["call"]
    assert got.usage == (100, 20)
    first, second = up.requests
    assert names(first) == names(second) == ["bash", NAME]
    assert (first.host, first.path, first.key) == (second.host, second.path, second.key)
    assert second.header("content-length") == str(len(second.body))
    assert "the third line, which was cut" in json.dumps(second.json()["messages"][-1])
    assert second.json()["messages"][:-2] == first.json()["messages"]
    row = wait_until(lambda: proxy.rows()[before:])[0]
    assert row["attempts"] == 2
    assert row["gen_ai.usage.input_tokens"] == 200
    gauges = {one["id"]: one["context_tokens"] for one in proxy.rows("sessions")}
    assert gauges[row["session_id"]] == 100
    attempts = wait_until(
        lambda: [one for one in proxy.rows("attempts") if one["exchange_id"] == row["id"]]
    )
    assert [one["rejected"] for one in attempts] == ["recall", None]
    for attempt in attempts:
        assert (attempt["input_tokens"], attempt["output_tokens"]) == (100, 10)
        assert attempt["cost_usd"] == pytest.approx(row["cost_usd"] / 2)
        assert attempt["cost_usd"] > 0


@EVERY_WAY
def test_a_recall_beside_a_call_is_dropped(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    script(up, Reply(text="So.", tool_calls=(recalled(), BASH)))
    got = ask(proxy, stream=stream)
    assert (got.text, got.calls) == ("So.", [("bash", {"command": "ls"})])
    assert got.finish == FINISH[ask]["call"]
    assert up.count == 1


@EVERY_WAY
def test_a_model_that_asks_for_ever_is_stopped(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    script(up, *[Reply(tool_calls=(recalled(),))] * (MAX_RECALLS + 3))
    got = ask(proxy, stream=stream)
    assert (got.text, got.calls, got.finish) == ("", [], FINISH[ask]["stop"])
    assert up.count == MAX_RECALLS + 2
    last = json.dumps(up.requests[-1].json()["messages"][-1])
    assert "No more can be recalled" in last


@pytest.mark.parametrize(
    ("ask", "model"), [(ask_openai, "ensured"), (ask_anthropic, "claude-ensured")]
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_model_that_must_call_may_recall_too(
    proxy: Proxy, up: Upstream, ask: Ask, model: str, stream: bool
) -> None:
    before = proxy.settled()
    script(
        up,
        Reply(tool_calls=(recalled(hash="f" * 16),)),
        Reply(text="I will look."),
        Reply(tool_calls=(recalled(pattern="third"),)),
        Reply(tool_calls=(("call_9", "done", '{"final_answer":"All is well."}'),)),
    )
    got = ask(proxy, stream=stream, model=model)
    assert (got.text, got.calls) == ("I will look.\n\nAll is well.", [])
    assert got.finish == FINISH[ask]["stop"]
    assert got.usage == (100, 40)
    assert names(up.requests[0]) == ["bash", NAME, "done"]
    assert "Nothing is kept" in json.dumps(up.requests[1].json()["messages"][-1])
    assert "3: the third" in json.dumps(up.requests[3].json()["messages"][-1])
    row = wait_until(lambda: proxy.rows()[before:])[0]
    attempts = wait_until(
        lambda: [one for one in proxy.rows("attempts") if one["exchange_id"] == row["id"]]
    )
    assert [one["rejected"] for one in attempts] == ["recall", "no_tool_call", "recall", None]


@pytest.mark.parametrize("ask", [ask_openai, ask_anthropic])
def test_text_reaches_the_client_before_the_recall_is_answered(
    proxy: Proxy, up: Upstream, ask: Ask
) -> None:
    go_on = threading.Event()
    waiting = Framing(hang=go_on, hang_after=5)
    script(
        up,
        Reply(text="Let me look into it all.", tool_calls=(recalled(),), framing=waiting),
        Reply(text="So."),
    )
    path, body = (
        "/v1/chat/completions",
        {
            "model": "answers",
            "stream": True,
            "messages": [{"role": "user", "content": WISH}],
            "tools": [{"type": "function", "function": {"name": "bash"}}],
        },
    )
    if ask is ask_anthropic:
        path = "/v1/messages"
        body |= {"model": "claude-test", "max_tokens": 9}
        body["tools"] = [{"name": "bash", "input_schema": {"type": "object"}}]
    seen = b""
    with proxy.base_client() as client, client.stream("POST", path, json=body) as response:
        pieces = response.iter_bytes()
        while b"Let me look" not in seen:
            seen += next(pieces)
        assert up.count == 1
        go_on.set()
        seen += b"".join(pieces)
    assert up.count == 2
    assert b"So." in seen
    assert NAME.encode() not in seen


@pytest.mark.parametrize("stream", [True, False])
def test_calls_that_a_kimi_model_leaked_are_answered_in_its_own_form(
    proxy: Proxy, up: Upstream, stream: bool
) -> None:
    given = json.dumps({"hash": HASH})
    leaked = (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{NAME}:1"
        f"<|tool_call_argument_begin|>{given}<|tool_call_end|><|tool_calls_section_end|>"
    )
    script(
        up,
        Reply(text="Let me see. " + leaked),
        Reply(tool_calls=(recalled("chatcmpl-8"),)),
        Reply(text="So."),
    )
    call = {"id": "a", "type": "function", "function": {"name": "bash", "arguments": ""}}
    messages = [
        {"role": "user", "content": WISH},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "cut"},
    ]
    got = ask_openai(proxy, stream=stream, model="kimi-k2", messages=messages)
    assert (got.text.split(), got.calls) == (["Let", "me", "see.", "So."], [])
    assert got.finish == "stop"
    assert up.count == 3
    bodies = [request.json()["messages"] for request in up.requests]
    assert bodies[1][:3] == bodies[0]
    assert bodies[2][:5] == bodies[1]
    ids = [call["id"] for message in bodies[2] for call in message.get("tool_calls", ())]
    assert ids == ["functions.bash:0", f"functions.{NAME}:1", f"functions.{NAME}:2"]
    answers = [message for message in bodies[2] if message["role"] == "tool"]
    assert [message["tool_call_id"] for message in answers] == ids
    assert answers[2]["name"] == NAME
    assert "the third line" in answers[1]["content"]


def test_an_error_of_the_next_request_reaches_the_client(proxy: Proxy, up: Upstream) -> None:
    for ask in (ask_openai, ask_anthropic):
        for stream in (True, False):
            up.clear()
            script(
                up,
                Reply(text="So.", tool_calls=(recalled(),)),
                Reply(status=500, error="The engine is on fire."),
            )
            with pytest.raises((openai.APIError, anthropic.APIError), match="on fire"):
                ask(proxy, stream=stream)
            assert up.count == 2


def test_a_flow_says_how_often_it_was_answered(proxy: Proxy, up: Upstream) -> None:
    script(up, Reply(tool_calls=(recalled(),)), Reply(text="So."))
    session = "a-flow-of-its-own"
    ask_openai(proxy, stream=True, extra_headers={"x-kimi-session": session})

    def flow_of_session() -> http.HTTPFlow | None:
        with Path(proxy.flows).open("rb") as file:
            for flow in FlowReader(file).stream():
                if flow.metadata.get("gen_ai.conversation.id") == session:
                    assert isinstance(flow, http.HTTPFlow)
                    return flow
        return None

    flow = wait_until(flow_of_session)
    assert flow.metadata["kimi.recalls"] == 1
    assert flow.metadata["kimi.rejected"] == "recall"
    assert NAME not in (flow.response.get_text() if flow.response else NAME)
