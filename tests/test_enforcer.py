"""A model is asked again until it makes a call, and its client gets one reply, as it comes."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from mitmproxy import http
from mitmproxy.io import FlowReader

from kimi_core.sse import SSE
from proxy import PLANTED, Proxy, wait_until
from upstream import Abort, Framing, Reply, TokenUsage, Upstream

REMINDER = (
    "The client will not continue unless you reply with a tool call. Use the available tools for "
    'work and call "done" when you are done.'
)
RULES = """\
  ensured: {ensure_tool_call: true, targets: [{provider: openai, model: gpt-4o}]}
  claude-ensured:
    ensure_tool_call: true
    targets: [{provider: anthropic, model: claude-sonnet-4-5}]
  kimi-ensured:
    ensure_tool_call: true
    targets: [{provider: nvidia, model: moonshotai/kimi-k2-instruct}]
  "sent-*": {ensure_tool_call: true}
"""
SCRIPTS = ("router.py", "enforcer.py", "normalizer.py", "counter.py", "recorder.py")
BASH = ("call_1", "bash", '{"command":"ls"}')
USAGE = TokenUsage(input=100, output=10)
WISH = "Mend the parser"


@pytest.fixture(scope="module")
def proxy(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("enforcer")
    with Proxy(
        folder,
        provider,
        scripts=SCRIPTS,
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
    request_id: str = ""


def tool(name: str) -> dict[str, Any]:
    return {"name": name, "description": "Run it", "input_schema": {"type": "object"}}


def chat_tool(name: str) -> dict[str, Any]:
    function = {"name": name, "description": "Run it", "parameters": {"type": "object"}}
    return {"type": "function", "function": function}


def ask_openai(proxy: Proxy, *, stream: bool, model: str = "ensured", **more: Any) -> Got:
    with openai.OpenAI(
        base_url=f"{proxy.url}/v1",
        api_key="any",
        max_retries=0,
    ) as client:
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": WISH}],
            "tools": [chat_tool("bash")],
            **more,
        }
        if stream:
            options = {"include_usage": True}
            with client.chat.completions.stream(**asked, stream_options=options) as events:
                for _ in events:
                    pass
                reply = events.get_final_completion()
        else:
            reply = client.chat.completions.create(**asked)
    choice = reply.choices[0]
    calls = choice.message.tool_calls or []
    return Got(
        choice.message.content or "",
        [(call.function.name, json.loads(call.function.arguments)) for call in calls],
        choice.finish_reason,
        (reply.usage.prompt_tokens, reply.usage.completion_tokens),
        reply.id,
    )


def ask_anthropic(proxy: Proxy, *, stream: bool, model: str = "claude-ensured", **more: Any) -> Got:
    with anthropic.Anthropic(
        base_url=proxy.url,
        api_key="any",
        max_retries=0,
    ) as client:
        asked = {
            "model": model,
            "max_tokens": 1000,
            "messages": [{"role": "user", "content": WISH}],
            "tools": [tool("bash")],
            **more,
        }
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
        reply.id,
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


def done(arguments: str = "{}") -> Reply:
    return Reply(tool_calls=(("call_9", "done", arguments),))


def row_of(proxy: Proxy, before: int) -> dict[str, Any]:
    return wait_until(lambda: proxy.rows()[before:])[0]


def attempts_of(proxy: Proxy, row: dict[str, Any]) -> list[dict[str, Any]]:
    return wait_until(
        lambda: [one for one in proxy.rows("attempts") if one["exchange_id"] == row["id"]]
    )


# --- enough or not -----------------------------------------------------------------------


@EVERY_WAY
def test_a_reply_without_a_call_is_asked_for_again(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    before = proxy.settled()
    script(up, Reply(text="I will look."), Reply(text="Looking.", tool_calls=(BASH,)))
    got = ask(proxy, stream=stream)
    assert got.text == "I will look.\n\nLooking."
    assert got.calls == [("bash", {"command": "ls"})]
    assert got.finish == FINISH[ask]["call"]
    assert got.usage == (100, 20)
    assert up.count == 2
    row = row_of(proxy, before)
    assert row["attempts"] == 2
    assert row["gen_ai.usage.input_tokens"] == 200
    assert row["gen_ai.usage.output_tokens"] == 20
    definitions = json.dumps(up.requests[0].json()["tools"])
    assert row["tools_tokens"] == pytest.approx(len(definitions) / 4, rel=0.4)  # `done` with them
    assert row["cost_usd"] > 0
    assert not row["error_type"]
    first, second = attempts_of(proxy, row)
    assert [first["number"], second["number"]] == [1, 2]
    assert [first["rejected"], second["rejected"]] == ["no_tool_call", None]
    assert [first["status"], second["status"]] == [200, 200]
    for attempt in (first, second):
        assert attempt["input_tokens"] == 100
        assert attempt["output_tokens"] == 10
        assert attempt["cost_usd"] == pytest.approx(row["cost_usd"] / 2)
        assert attempt["duration_s"] > 0


@EVERY_WAY
def test_the_next_request_is_the_last_with_messages_at_its_end(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    script(up, Reply(text="I will look."), Reply(tool_calls=(BASH,)))
    ask(proxy, stream=stream)
    first, second = up.requests
    assert (first.host, first.path) == (second.host, second.path)
    assert first.key == second.key == PLANTED
    assert second.header("content-length") == str(len(second.body))
    start = first.body.index(b'"messages"')
    end = first.body.index(b"]", first.body.index(b"answer to the user", start))
    assert second.body.startswith(first.body[:end])
    assert second.body.endswith(first.body[end:])
    asked, again = first.json(), second.json()
    assert asked["messages"][0] == {"role": "user", "content": WISH}
    assert '"done"' in asked["messages"][1]["content"]
    assert len(asked["tools"]) == 2
    assert again["messages"][-1] == {"role": "user", "content": REMINDER}
    assert again["messages"][-2]["role"] == "assistant"
    assert "I will look." in json.dumps(again["messages"][-2])
    assert again["messages"][:-2] == asked["messages"]
    asked.pop("messages"), again.pop("messages")
    assert asked == again


@EVERY_WAY
def test_the_answer_of_done_is_the_reply(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    script(up, done('{"final_answer": "All is well."}'))
    got = ask(proxy, stream=stream)
    assert got.text == "All is well."
    assert got.calls == []
    assert got.finish == FINISH[ask]["stop"]
    assert got.usage == (100, 10)
    assert up.count == 1


@EVERY_WAY
def test_a_done_without_an_answer_is_asked_for_it(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    before = proxy.settled()
    script(up, done(), done(), done('{"answer": "All is well."}'))
    got = ask(proxy, stream=stream)
    assert (got.text, got.calls, got.finish) == ("All is well.", [], FINISH[ask]["stop"])
    assert got.usage == (100, 30)
    rejected = [one["rejected"] for one in attempts_of(proxy, row_of(proxy, before))]
    assert rejected == ["no_answer", "no_answer", None]
    assert "answer" in up.requests[2].json()["messages"][-1]["content"]


@EVERY_WAY
def test_after_the_last_attempt_the_reply_passes_as_it_is(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    script(up, *(Reply(text=f"No {number}.") for number in range(1, 6)))
    got = ask(proxy, stream=stream)
    assert got.text == "No 1.\n\nNo 2.\n\nNo 3."
    assert (got.calls, got.finish) == ([], FINISH[ask]["stop"])
    assert got.usage == (100, 30)
    assert up.count == 3


@EVERY_WAY
def test_a_call_is_enough_and_nothing_is_added_to_the_reply(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    script(up, Reply(text="Looking.", tool_calls=(BASH,)))
    got = ask(proxy, stream=stream)
    assert got == Got(
        "Looking.",
        [("bash", {"command": "ls"})],
        FINISH[ask]["call"],
        (100, 10),
        got.request_id,
    )
    assert up.count == 1


# --- failures ----------------------------------------------------------------------------


@EVERY_WAY
def test_an_error_of_the_next_attempt_ends_it(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    before = proxy.settled()
    script(up, Reply(text="I will look."), Reply(status=500, error="The engine is on fire."))
    with pytest.raises((openai.APIError, anthropic.APIError), match="The engine is on fire") as no:
        ask(proxy, stream=stream)
    assert up.count == 2
    if not stream:
        assert isinstance(no.value, openai.APIStatusError | anthropic.APIStatusError)
        assert no.value.status_code == 500
    row = row_of(proxy, before)
    assert row["error_type"] in ("server_error", "api_error")
    first, second = attempts_of(proxy, row)
    assert (first["status"], first["rejected"]) == (200, "no_tool_call")
    assert (second["status"], second["rejected"]) == (500, None)
    assert second["error_type"] in ("server_error", "api_error")
    assert second["input_tokens"] is None
    assert row["gen_ai.usage.input_tokens"] == 100


@EVERY_WAY
def test_an_error_of_the_first_attempt_passes_as_it_came(
    proxy: Proxy, up: Upstream, ask: Ask, stream: bool
) -> None:
    script(up, Reply(status=429, error="Slow down.", headers={"retry-after": "7"}))
    with pytest.raises((openai.RateLimitError, anthropic.RateLimitError)) as no:
        ask(proxy, stream=stream)
    assert no.value.response.headers["retry-after"] == "7"
    assert "Slow down." in str(no.value)
    assert up.count == 1


@pytest.mark.parametrize("ask", [ask_openai, ask_anthropic])
def test_a_connection_that_breaks_ends_it_with_an_error_in_the_stream(
    proxy: Proxy, up: Upstream, ask: Ask
) -> None:
    before = proxy.settled()
    broken = Framing(abort=Abort(after=1500))
    text = "It goes on and on, " * 20
    script(up, Reply(text="I will look."), Reply(text=text, framing=broken))
    with pytest.raises((openai.APIError, anthropic.APIError), match="broke off"):
        ask(proxy, stream=True)
    assert up.count == 2
    row = row_of(proxy, before)
    assert row["error_type"] == "connection"
    first, second = attempts_of(proxy, row)
    assert (first["error_type"], second["error_type"]) == (None, "connection")
    assert 0 < second["output_tokens"] < len(text)


@pytest.mark.parametrize("ask", [ask_openai, ask_anthropic])
def test_an_error_within_the_stream_ends_it(proxy: Proxy, up: Upstream, ask: Ask) -> None:
    script(up, Reply(text="I will look."), Reply(text="So", stream_error="overloaded now"))
    with pytest.raises((openai.APIError, anthropic.APIError), match="overloaded now"):
        ask(proxy, stream=True)
    assert up.count == 2


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(status=503, body=b"<html>gone</html>"), "answered 503"),
        (Reply(status=503, body=b'{"message":"gone"}'), "answered 503"),
        (Reply(body=b'{"message":"what?"}'), "did not answer with a stream"),
        (Reply(headers={"content-encoding": "unheard-of"}), "did not answer with a stream"),
    ],
)
@pytest.mark.parametrize("ask", [ask_openai, ask_anthropic])
def test_an_answer_that_no_stream_can_carry_ends_it_with_an_error(
    proxy: Proxy, up: Upstream, ask: Ask, reply: Reply, said: str
) -> None:
    script(up, Reply(text="I will look."), reply, Reply(tool_calls=(BASH,)))
    with pytest.raises((openai.APIError, anthropic.APIError), match=said):
        ask(proxy, stream=True)
    assert up.count == 2


def test_a_provider_that_streams_nothing_is_enforced_all_the_same(
    proxy: Proxy, up: Upstream
) -> None:
    def whole(message: dict[str, Any]) -> Reply:
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return Reply(body=json.dumps({"id": "x", "choices": [choice]}).encode())

    call = {"id": "a", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
    script(up, whole({"content": "I will look."}), whole({"tool_calls": [call]}))
    with proxy.base_client() as client, stream_of(proxy, client, "ensured") as response:
        message = json.loads(response.read())["choices"][0]["message"]
    assert message == {"content": "I will look.", "tool_calls": [call]}


def test_a_reply_in_an_unknown_coding_passes_as_it_is(proxy: Proxy, up: Upstream) -> None:
    for stream in (True, False):
        up.clear()
        coded = Reply(text="I will look.", headers={"content-encoding": "unheard-of"})
        script(up, coded, Reply(tool_calls=(BASH,)))
        body = {
            "model": "ensured",
            "stream": stream,
            "messages": [{"role": "user", "content": WISH}],
            "tools": [chat_tool("bash")],
        }
        with proxy.base_client() as client:
            reply = client.post("/v1/chat/completions", json=body)
        assert reply.headers["content-encoding"] == "unheard-of"
        assert "look" in reply.text
        assert up.count == 1


def test_a_request_that_came_compressed_can_be_made_again(proxy: Proxy, up: Upstream) -> None:
    script(up, Reply(text="I will look."), Reply(tool_calls=(BASH,)))
    body = {
        "model": "sent-compressed",  # no rule renames it
        "messages": [{"role": "user", "content": WISH}],
        "tools": [chat_tool("bash")],
        "tool_choice": "required",  # nothing is added
    }
    packed = gzip.compress(json.dumps(body).encode())
    with proxy.client() as client:
        reply = client.post(
            "https://api.openai.com/v1/chat/completions",
            content=packed,
            headers={"content-encoding": "gzip", "content-type": "application/json"},
        )
    assert reply.json()["choices"][0]["message"]["tool_calls"]
    first, second = up.requests
    assert first.body == packed
    assert second.header("content-encoding") is None
    assert second.json()["messages"][:1] == body["messages"]
    assert len(second.json()["messages"]) == 3


# --- streaming ---------------------------------------------------------------------------


def stream_of(proxy: Proxy, client: httpx.Client, model: str) -> Any:
    path = "/v1/messages" if model.startswith("claude") else "/v1/chat/completions"
    body = {
        "model": model,
        "stream": True,
        "max_tokens": 100,
        "messages": [{"role": "user", "content": WISH}],
        "tools": [tool("bash") if model.startswith("claude") else chat_tool("bash")],
    }
    return client.stream("POST", path, json=body)


@pytest.mark.parametrize("model", ["ensured", "claude-ensured"])
def test_text_reaches_the_client_before_the_next_attempt_begins(
    proxy: Proxy, up: Upstream, model: str
) -> None:
    go_on = threading.Event()
    waiting = Framing(hang=go_on, hang_after=5)
    script(up, Reply(text="I will look into it all.", framing=waiting), Reply(tool_calls=(BASH,)))
    framing, seen = SSE(), b""
    with proxy.base_client() as client, stream_of(proxy, client, model) as response:
        assert response.status_code == 200
        pieces = response.iter_bytes()
        while b"I will look" not in seen:
            seen += next(pieces)
        assert up.count == 1
        go_on.set()
        seen += b"".join(pieces)
    assert up.count == 2
    assert b'"bash"' in seen
    assert all(event.data for event in framing.feed(seen))


def test_a_client_that_leaves_is_not_asked_for(proxy: Proxy, up: Upstream) -> None:
    before = proxy.settled()
    up.clear()
    never = threading.Event()
    script(up, Reply(text="I will look."), Reply(framing=Framing(hang=never)), Reply())
    with proxy.base_client() as client, stream_of(proxy, client, "ensured") as response:
        pieces = response.iter_bytes()
        while b"look" not in next(pieces):
            pass
        up.wait_for(lambda up: up.count == 2)
    up.wait_for(lambda up: len(up.abandoned) == 1)
    row = row_of(proxy, before)
    assert row["attempts"] == 2
    assert row["error_type"] == "connection"
    assert up.count == 2


def test_usage_that_the_client_did_not_ask_for_is_counted_and_not_shown(
    proxy: Proxy, up: Upstream
) -> None:
    before = proxy.settled()
    script(up, Reply(text="I will look."), Reply(tool_calls=(BASH,)))
    with proxy.base_client() as client, stream_of(proxy, client, "ensured") as response:
        body = response.read()
    assert b'"prompt_tokens"' not in body
    assert body.endswith(b"data: [DONE]\n\n")
    assert row_of(proxy, before)["gen_ai.usage.output_tokens"] == 20


@pytest.mark.parametrize("ask", [ask_openai, ask_anthropic])
@pytest.mark.parametrize("stream", [True, False])
def test_compressed_replies_are_read(proxy: Proxy, up: Upstream, ask: Ask, stream: bool) -> None:
    packed = Framing(gzip="pieces", gzip_unasked=True, pieces=50)
    script(
        up, Reply(text="I will look.", framing=packed), Reply(tool_calls=(BASH,), framing=packed)
    )
    got = ask(proxy, stream=stream)
    assert (got.text, got.calls) == ("I will look.", [("bash", {"command": "ls"})])
    assert [request.header("accept-encoding") for request in up.requests] == ["identity"] * 2


# --- together with the others -------------------------------------------------------------


def leaked(name: str, arguments: str) -> str:
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0"
        f"<|tool_call_argument_begin|>{arguments}<|tool_call_end|><|tool_calls_section_end|>"
    )


@pytest.mark.parametrize("stream", [True, False])
def test_calls_that_leaked_into_the_text_are_calls(
    proxy: Proxy, up: Upstream, stream: bool
) -> None:
    script(up, Reply(text="Looking. " + leaked("bash", '{"command":"ls"}')))
    got = ask_openai(proxy, stream=stream, model="kimi-ensured")
    assert got.calls == [("bash", {"command": "ls"})]
    assert up.count == 1
    up.clear()
    script(up, Reply(text="So"), Reply(text=leaked("done", '{"final_answer":"All is well."}')))
    got = ask_openai(proxy, stream=stream, model="kimi-ensured")
    assert (got.text, got.calls, got.finish) == ("So\n\nAll is well.", [], "stop")
    assert up.count == 2


def test_a_flow_shows_its_provider_and_how_often_it_was_asked(proxy: Proxy, up: Upstream) -> None:
    script(up, Reply(text="I will look."), done(), Reply(tool_calls=(BASH,)))
    session = "a-flow-of-its-own"
    ask_openai(proxy, stream=True, extra_headers={"x-kimi-session": session})

    def flow_of_session() -> http.HTTPFlow | None:
        with proxy.flows.open("rb") as file:
            for flow in FlowReader(file).stream():
                if flow.metadata.get("gen_ai.conversation.id") == session:
                    assert isinstance(flow, http.HTTPFlow)
                    return flow
        return None

    flow = wait_until(flow_of_session)
    assert flow.request.pretty_url == "https://api.openai.com/v1/chat/completions"
    assert flow.metadata["kimi.attempts"] == 2
    assert flow.metadata["kimi.rejected"] == "no_tool_call"


@pytest.mark.parametrize("stream", [True, False])
def test_a_model_that_a_rule_speaks_of_is_enforced_by_https_proxy_too(
    proxy: Proxy, up: Upstream, stream: bool
) -> None:
    for model in ("sent-by-client", "ensured"):
        up.clear()
        script(up, Reply(text="I will look."), Reply(tool_calls=(BASH,)))
        body = {
            "model": model,
            "stream": stream,
            "messages": [{"role": "user", "content": WISH}],
            "tools": [chat_tool("bash")],
        }
        with proxy.client() as client:
            reply = client.post(
                "https://api.openai.com/v1/chat/completions",
                json=body,
                headers={"authorization": "Bearer sk-mine"},
            )
        assert reply.status_code == 200
        assert '"bash"' in reply.text
        assert [request.host for request in up.requests] == ["api.openai.com"] * 2
        assert {request.key for request in up.requests} <= {"sk-mine", PLANTED}
        assert up.requests[0].model == ("gpt-4o" if model == "ensured" else model)


@pytest.mark.parametrize(
    ("model", "more", "headers"),
    [
        ("answers", {}, {}),
        ("ensured", {}, {"x-kimi-bypass": "1"}),
        ("ensured", {"tool_choice": "none"}, {}),
        ("ensured", {"messages": [{"role": "user", "content": WISH}, {"role": "assistant"}]}, {}),
    ],
)
def test_what_is_not_enforced_goes_once_and_as_it_is(
    proxy: Proxy, up: Upstream, model: str, more: dict[str, Any], headers: dict[str, str]
) -> None:
    script(up, Reply(text="I will look."), Reply(tool_calls=(BASH,)))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": WISH}],
        "tools": [chat_tool("bash")],
        **more,
    }
    with proxy.base_client(headers=headers) as client:
        reply = client.post("/v1/chat/completions", json=body)
    assert reply.json()["choices"][0]["message"]["content"] == "I will look."
    assert up.count == 1
    assert up.requests[0].json() == {**body, "model": "gpt-4o"}


def test_the_number_of_attempts_is_a_setting(up: Upstream, tmp_path: Path) -> None:
    for number in (1, 5):
        up.clear()
        with Proxy(
            tmp_path / str(number),
            up,
            scripts=SCRIPTS,
            more_rules=RULES,
            environment={"ENSURE_TOOL_CALL_MAX_ATTEMPTS": str(number)},
        ) as proxy:
            script(up, *[Reply(text="No.")] * 6)
            got = ask_openai(proxy, stream=True)
            assert got.text == "\n\n".join(["No."] * number)
            assert up.count == number
            if number == 1:  # `done` is offered all the same, and stripped
                assert len(up.requests[0].json()["tools"]) == 2
                up.clear()
                script(up, done('{"final_answer": "All is well."}'))
                got = ask_openai(proxy, stream=False)
                assert (got.text, got.calls, got.finish) == ("All is well.", [], "stop")
                assert wait_until(lambda: proxy.rows()[1:])[0]["attempts"] == 1


def test_a_key_in_the_error_of_a_later_attempt_does_not_reach_the_client(
    proxy: Proxy, up: Upstream
) -> None:
    script(up, Reply(text="Hm."), Reply(status=401, error=f"bad key {PLANTED} given"))
    body = {
        "model": "ensured",
        "stream": True,
        "messages": [{"role": "user", "content": "Go."}],
        "tools": [chat_tool("look")],
    }
    with proxy.base_client() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert "bad key *** given" in answer.text
    assert PLANTED not in answer.text
