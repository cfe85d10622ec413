"""Which requests offer `done`, which replies are enough, and what the client gets of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core import dialects
from kimi_core.attempts import Call, Turn, stage
from kimi_core.attempts.turn import add, together
from kimi_core.dialects import Dialect
from kimi_core.document import Document
from kimi_core.enforcement import Enforcement, prepare
from kimi_core.enforcement.request import INSTRUCTION
from kimi_core.sse import SSE, Event
from playing import (
    assert_one_stream_of_blocks,
    assert_one_stream_of_chunks,
    payloads,
    play,
    rendered,
)
from upstream import Reply, TokenUsage

REMINDER = (
    "The client will not continue unless you reply with a tool call. Use the available tools for "
    'work and call "done" when you are done.'
)
BOTH = pytest.mark.parametrize("dialect", [dialects.OPENAI, dialects.ANTHROPIC], ids=["o", "a"])


# --- the request -----------------------------------------------------------------------

USER = b'{"role":"user","content":"Mend the parser"}'
CHAT_TOOL = b'{"type":"function","function":{"name":"bash", "parameters":{"max":1.0e2}}}'
MESSAGES_TOOL = b'{"name":"bash","input_schema":{"type" : "object"},"cache_control":{}}'
CHAT_CALL = (
    b'{"role":"assistant","tool_calls":[{"id":"a","type":"function",'
    b'"function":{"name":"bash","arguments":"{}"}}]}'
)
CHAT_RESULT = b'{"role":"tool","tool_call_id":"a","content":"ok"}'
CALL = b'{"role":"assistant","content":[{"type":"tool_use","id":"a","name":"bash","input":{}}]}'
RESULT = b'{"role":"user","content":[{"type":"tool_result","tool_use_id":"a","content":"ok"}]}'
RESULT_AND_TEXT = RESULT[:-2] + b',{"type":"text","text":"Go on"}]}'
SAID = b'{"role":"assistant","content":"It is mended."}'


def body_of(dialect: Dialect, *messages: bytes, more: bytes = b"", tools: bytes = b"") -> bytes:
    tools = tools or b"[%s ]" % (CHAT_TOOL if dialect is dialects.OPENAI else MESSAGES_TOOL)
    listed = b" , ".join(messages or (USER,))
    return b'{"model":"m", "tools":%s,"messages":[ %s ],"big":1E+2%s}' % (tools, listed, more)


def prepared(body: bytes, dialect: Dialect) -> tuple[Turn | None, bytes]:
    document = Document(body, dialect.shape)
    made = prepare(document, dialect, 3)
    return (Turn(made) if made else None), document.encode()


def name_of(turn: Turn) -> str:
    (enforcement,) = turn.deciders
    assert isinstance(enforcement, Enforcement)
    return enforcement.name


def again(turn: Turn, body: bytes, dialect: Dialect) -> bytes:
    return asyncio.run(turn.next_body(body, dialect))


@BOTH
def test_done_is_offered_last_and_asked_for_in_a_last_message(dialect: Dialect) -> None:
    body = body_of(dialect)
    turn, sent = prepared(body, dialect)
    assert turn is not None
    assert name_of(turn) == "done"
    asked = json.loads(sent)
    done = asked["tools"].pop()
    if dialect is dialects.OPENAI:
        assert done["type"] == "function"
        assert done["function"]["name"] == "done"
        schema = done["function"]["parameters"]
    else:
        assert done["name"] == "done"
        schema = done["input_schema"]
    assert schema["properties"]["final_answer"]["type"] == "string"
    assert "required" not in schema
    assert asked["messages"].pop() == {"role": "user", "content": INSTRUCTION.format(name="done")}
    assert asked == json.loads(body)
    # All other bytes are what they were.
    tools_end, messages_end = body.index(b" ],"), body.index(b" ],", body.index(b"messages"))
    assert sent.startswith(body[:tools_end] + b",{")
    assert body[tools_end:messages_end] + b",{" in sent
    assert sent.endswith(body[messages_end:])


@pytest.mark.parametrize(
    ("dialect", "messages"),
    [
        (dialects.OPENAI, (USER, CHAT_CALL, CHAT_RESULT)),
        (dialects.OPENAI, (SAID, USER)),
        (dialects.OPENAI, (USER, SAID, USER, CHAT_CALL, CHAT_RESULT)),
        (dialects.ANTHROPIC, (USER, CALL, RESULT)),
        (dialects.ANTHROPIC, (USER, SAID, RESULT_AND_TEXT)),
        (dialects.ANTHROPIC, (SAID, USER)),
    ],
)
def test_a_turn_that_goes_on_is_enforced(dialect: Dialect, messages: Sequence[bytes]) -> None:
    turn, sent = prepared(body_of(dialect, *messages), dialect)
    assert turn is not None
    assert b'"done"' in sent


@pytest.mark.parametrize(
    ("dialect", "messages"),
    [
        (dialects.OPENAI, (USER, SAID)),
        (dialects.OPENAI, (USER, SAID, CHAT_CALL, CHAT_RESULT)),
        (dialects.ANTHROPIC, (USER, SAID)),
        (dialects.ANTHROPIC, (USER, SAID, CALL, RESULT)),
        (dialects.ANTHROPIC, (USER, CALL, RESULT, SAID, RESULT)),
    ],
)
def test_a_turn_that_is_over_is_left_alone(dialect: Dialect, messages: Sequence[bytes]) -> None:
    body = body_of(dialect, *messages)
    turn, sent = prepared(body, dialect)
    assert turn is None
    assert sent is body


CHAT, MESSAGES = dialects.OPENAI, dialects.ANTHROPIC


@pytest.mark.parametrize(
    ("dialect", "more"),
    [
        (CHAT, b',"tool_choice":"none"'),
        (CHAT, b',"tool_choice":{"type":"function","function":{"name":"bash"}}'),
        (CHAT, b',"tool_choice":{"type":"allowed_tools","allowed_tools":{"mode":"auto"}}'),
        (CHAT, b',"n":2'),
        (CHAT, b',"response_format":{"type":"json_object"}'),
        (MESSAGES, b',"tool_choice":{"type":"none"}'),
        (MESSAGES, b',"tool_choice":{"type":"tool","name":"bash"}'),
        (MESSAGES, b',"output_config":{"format":{"type":"json_schema"}}'),
        (MESSAGES, b',"output_format":{"type":"json_schema"}'),
        *(
            (one, more)
            for one in (CHAT, MESSAGES)
            for more in (b',"messages":[]', b',"messages":null')
        ),
        *((one, more) for one in (CHAT, MESSAGES) for more in (b',"tools":[]', b',"tools":null')),
    ],
)
def test_a_request_that_wants_something_else_is_left_alone(dialect: Dialect, more: bytes) -> None:
    body = body_of(dialect, more=more)
    turn, sent = prepared(body, dialect)
    assert turn is None
    assert sent is body


@BOTH
@pytest.mark.parametrize(
    "more",
    [
        b',"tool_choice":"auto","n":1,"response_format":{"type":"text"}',
        b',"tool_choice":{"type":"auto","disable_parallel_tool_use":true}',
        b',"tool_choice":null,"n":null',
    ],
)
def test_what_is_the_default_may_be_said(dialect: Dialect, more: bytes) -> None:
    assert prepared(body_of(dialect, more=more), dialect)[0] is not None


@pytest.mark.parametrize("dialect", [dialects.RESPONSES, dialects.GEMINI])
def test_other_dialects_are_left_alone(dialect: Dialect) -> None:
    assert prepared(body_of(dialects.OPENAI), dialect)[0] is None


def test_a_client_with_a_done_of_its_own_keeps_it() -> None:
    own = b'[{"type":"function","function":{"name":"done"}}]'
    turn, sent = prepared(body_of(dialects.OPENAI, tools=own), dialects.OPENAI)
    assert turn is not None
    assert name_of(turn) == "finish_turn"
    assert not turn.hides("done")
    assert turn.hides("finish_turn")
    asked = json.loads(sent)
    assert [tool["function"]["name"] for tool in asked["tools"]] == ["done", "finish_turn"]
    assert '"finish_turn"' in asked["messages"][-1]["content"]
    both = b'[{"name":"done"},{"type":"custom","name":"finish_turn"}]'
    body = body_of(dialects.ANTHROPIC, tools=both)
    assert prepared(body, dialects.ANTHROPIC) == (None, body)


@pytest.mark.parametrize(
    ("dialect", "more"),
    [
        (dialects.OPENAI, b',"tool_choice":"required"'),
        (dialects.ANTHROPIC, b',"tool_choice":{"type":"any"}'),
    ],
)
def test_where_the_client_requires_a_call_no_way_around_it_is_offered(
    dialect: Dialect, more: bytes
) -> None:
    body = body_of(dialect, more=more)
    turn, sent = prepared(body, dialect)
    assert turn is not None
    assert sent is body
    results = play(turn, dialect, [Reply(text="No"), Reply(tool_calls=(BASH,))])
    assert results.rejected == ["no_tool_call"]
    reminder = json.loads(again(turn, sent, dialect))["messages"][-1]["content"]
    assert reminder in REMINDER.replace("tools for", "tools.")
    assert "done" not in reminder


# --- replies, and what becomes of them ---------------------------------------------------

BASH = ("call_1", "bash", '{"command":"ls"}')
LIST = ("call_2", "list_files", "{}")


def done(arguments: str = "{}", name: str = "done") -> tuple[str, str, str]:
    return ("call_9", name, arguments)


def turn_of(max_attempts: int = 3, *declared: str) -> Turn:
    return Turn(Enforcement("done", declared or ("bash", "list_files"), max_attempts))


STOPS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "content_filter": "refusal",
}
ANSWER = '{"final_answer": "All is well."}'
MANY = 3


@dataclass(frozen=True)
class Case:
    """Replies, and what the client gets: text, calls, OpenAI's finish_reason, rejections."""

    replies: tuple[Reply, ...]
    text: str = ""
    calls: tuple[str, ...] = ()
    finish: str = "stop"
    rejected: tuple[str, ...] = ()


CASES = {
    "a call": Case((Reply(tool_calls=(BASH,)),), "", ("bash",), "tool_calls"),
    "text and two calls": Case(
        (Reply(text="So", tool_calls=(BASH, LIST)),), "So", ("bash", "list_files"), "tool_calls"
    ),
    "no call, then one": Case(
        (Reply(text="I will look."), Reply(tool_calls=(BASH,))),
        "I will look.",
        ("bash",),
        "tool_calls",
        ("no_tool_call",),
    ),
    "text in both": Case(
        (Reply(text="I will look."), Reply(text="Looking.", tool_calls=(BASH,))),
        "I will look.\n\nLooking.",
        ("bash",),
        "tool_calls",
        ("no_tool_call",),
    ),
    "nothing at all, then text and a call": Case(
        (Reply(text=""), Reply(text="Looking.", tool_calls=(BASH,))),
        "Looking.",
        ("bash",),
        "tool_calls",
        ("no_tool_call",),
    ),
    "white space first": Case(
        (Reply(text="A"), Reply(text="\n B", delta_chars=1, tool_calls=(BASH,))),
        "A\n \n\nB",
        ("bash",),
        "tool_calls",
        ("no_tool_call",),
    ),
    "done with an answer": Case((Reply(tool_calls=(done(ANSWER),)),), "All is well."),
    "text, and done": Case((Reply(text="Here you are.", tool_calls=(done(),)),), "Here you are."),
    "text, and done with the same": Case(
        (Reply(text="So: All is well.\n", tool_calls=(done(ANSWER),)),), "So: All is well.\n"
    ),
    "text, and done with more": Case(
        (Reply(text="I tested it.", tool_calls=(done(ANSWER),)),), "I tested it.\n\nAll is well."
    ),
    "text, then done": Case(
        (Reply(text="It is mended."), Reply(tool_calls=(done(),))),
        "It is mended.",
        rejected=("no_tool_call",),
    ),
    "text, then done with the same": Case(
        (Reply(text="All is well."), Reply(tool_calls=(done(ANSWER),))),
        "All is well.",
        rejected=("no_tool_call",),
    ),
    "text, then done with more": Case(
        (Reply(text="It is mended."), Reply(tool_calls=(done(ANSWER),))),
        "It is mended.\n\nAll is well.",
        rejected=("no_tool_call",),
    ),
    "done without an answer, then with one": Case(
        (Reply(tool_calls=(done(),)), Reply(tool_calls=(done(ANSWER),))),
        "All is well.",
        rejected=("no_answer",),
    ),
    "done without an answer, then text": Case(
        (Reply(tool_calls=(done(),)), Reply(text="All.", tool_calls=(done(),))),
        "All.",
        rejected=("no_answer",),
    ),
    "done without an answer, then a call": Case(
        (Reply(tool_calls=(done(),)), Reply(tool_calls=(BASH,))),
        "",
        ("bash",),
        "tool_calls",
        ("no_answer",),
    ),
    "done without an answer, for ever": Case(
        (Reply(tool_calls=(done(),)),) * (MANY + 1), rejected=("no_answer",) * (MANY - 1)
    ),
    "no call, for ever": Case(
        (Reply(text="No."),) * (MANY + 1),
        "No.\n\nNo.\n\nNo.",
        rejected=("no_tool_call",) * (MANY - 1),
    ),
    "a call beside done": Case(
        (Reply(text="Last", tool_calls=(done(), BASH)),), "Last", ("bash",), "tool_calls"
    ),
    "a call between two of done": Case(
        (Reply(tool_calls=(done(), BASH, done(ANSWER), LIST)),),
        "All is well.",
        ("bash", "list_files"),
        "tool_calls",
    ),
    "two of done": Case((Reply(tool_calls=(done(), done(ANSWER))),), "All is well."),
    "cut by its length": Case((Reply(text="I wi", finish_reason="length"),), "I wi", (), "length"),
    "done, cut by its length": Case(
        (Reply(tool_calls=(done(ANSWER),), finish_reason="length"),), "All is well.", (), "length"
    ),
    "filtered": Case((Reply(text="", finish_reason="content_filter"),), "", (), "content_filter"),
    "a bare number": Case((Reply(text="So.", tool_calls=(done(name="3"),)),), "So."),
    "a number with the arguments of a tool": Case(
        (Reply(text="So.", tool_calls=(done('{"command":"ls"}', "3"),)), Reply(tool_calls=(BASH,))),
        "So.",
        ("bash",),
        "tool_calls",
        ("no_tool_call",),
    ),
    "thinking, then a call": Case(
        (Reply(text="", reasoning="Hm."), Reply(reasoning="Ah.", tool_calls=(BASH,))),
        "",
        ("bash",),
        "tool_calls",
        ("no_tool_call",),
    ),
}


@BOTH
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_the_client_gets_of_all_attempts(case: Case, stream: bool, dialect: Dialect) -> None:
    usage = TokenUsage(input=100, output=10, cached=30, cache_write=5)
    replies = [replace(reply, usage=usage) for reply in case.replies]
    for cut in (0, 1) if stream else (0,):
        played = play(turn_of(MANY), dialect, replies, stream=stream, cut=cut)
        attempts = len(case.rejected) + 1
        assert tuple(played.rejected) == case.rejected
        assert played.text == case.text
        assert tuple(name for name, _ in played.calls) == case.calls
        finish = case.finish if dialect is dialects.OPENAI else STOPS[case.finish]
        assert played.read.finish_reason == finish
        assert played.read.complete
        assert not played.read.error
        assert played.read.usage.input_tokens == 100
        assert played.read.usage.output_tokens == 10 * attempts
        assert played.read.usage.cache_read_tokens == 30
        if stream and dialect is dialects.OPENAI:
            assert played.body.endswith(b"data: [DONE]\n\n")
            assert_one_stream_of_chunks(played.body)
        elif stream:
            assert_one_stream_of_blocks(played.body)


@BOTH
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(
    "reply",
    [
        Reply(text="So", reasoning="Hm", tool_calls=(BASH, LIST)),
        Reply(text="cut off", finish_reason="length"),
        Reply(status=500),
        Reply(status=429, body=b"<html>slow down</html>"),
    ],
)
def test_a_reply_that_is_enough_keeps_its_bytes(
    reply: Reply, stream: bool, dialect: Dialect
) -> None:
    body = rendered(reply, dialect, stream=stream)
    is_stream = stream and reply.status < 400
    played = play(turn_of(), dialect, [reply], stream=is_stream, cut=7)
    assert played.body == body
    assert played.rejected == []


@pytest.mark.parametrize(
    "provider",
    ["moonshot", "nvidia", "mistral", "openrouter", "siliconflow", "groq", "cerebras", "gemini"],
)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_what_providers_do_their_own_way(provider: str, stream: bool) -> None:
    usage = TokenUsage(input=100, output=10, cached=30)
    first = Reply(text="I will look.", reasoning="Hm.", usage=usage)
    for last, text, calls in (
        (Reply(text="So.", tool_calls=(done(), BASH)), "I will look.\n\nSo.", ["bash"]),
        (Reply(tool_calls=(BASH,)), "I will look.", ["bash"]),
        (Reply(tool_calls=(done(ANSWER),)), "I will look.\n\nAll is well.", []),
    ):
        replies = [first, replace(last, usage=usage)]
        for cut in (0, 1) if stream else (0,):
            played = play(
                turn_of(), dialects.OPENAI, replies, stream=stream, cut=cut, provider=provider
            )
            assert played.rejected == ["no_tool_call"]
            assert played.text == text
            assert [name for name, _ in played.calls] == calls
            assert played.read.finish_reason == ("tool_calls" if calls else "stop")
            assert played.read.usage.input_tokens == 100
            assert played.read.usage.output_tokens == 20
            assert "".join(played.read.reasoning) == "Hm."


def test_thinking_of_two_attempts_is_kept_apart() -> None:
    replies = [Reply(text="", reasoning="Hm."), Reply(reasoning="Ah.", tool_calls=(BASH,))]
    for stream in (True, False):
        played = play(turn_of(), dialects.OPENAI, replies, stream=stream)
        assert "".join(played.read.reasoning) == "Hm.\n\nAh."
        played = play(turn_of(), dialects.ANTHROPIC, replies, stream=stream)
        assert played.read.reasoning == ["", "Hm.", "", "Ah."] if stream else ["Hm.", "Ah."]


SAYINGS = st.sampled_from(["", "So.", "\n", " two words ", "All is well."])
CALLS = st.sampled_from([BASH, LIST, done(), done(ANSWER), done('{"answer":" "}'), done(name="4")])
REPLIES = st.builds(
    Reply,
    text=SAYINGS,
    reasoning=st.sampled_from(["", "Hm."]),
    tool_calls=st.lists(CALLS, max_size=3).map(tuple),
    finish_reason=st.sampled_from([None, None, None, "length"]),
    usage=st.builds(TokenUsage, input=st.integers(1, 9), output=st.integers(1, 9)),
    delta_chars=st.integers(1, 9),
)


@BOTH
@given(st.lists(REPLIES, min_size=3, max_size=3), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_a_stream_says_what_the_whole_reply_says_however_it_is_cut(
    dialect: Dialect, replies: list[Reply], cut: int
) -> None:
    # Each request begins with the one before it, and so takes no less.
    inputs = sorted(reply.usage.input for reply in replies if reply.usage)
    replies = [
        replace(reply, usage=TokenUsage(taken, reply.usage.output))  # type: ignore[union-attr]
        for reply, taken in zip(replies, inputs, strict=True)
    ]
    at_once = play(turn_of(), dialect, replies, stream=False)
    pieces = play(turn_of(), dialect, replies, cut=cut)
    assert pieces.rejected == at_once.rejected
    assert pieces.text == at_once.text
    assert pieces.calls == at_once.calls
    assert "".join(pieces.read.reasoning) == "".join(at_once.read.reasoning)
    assert pieces.read.finish_reason == at_once.read.finish_reason
    assert pieces.read.usage == at_once.read.usage
    attempts = replies[: len(pieces.rejected) + 1]
    assert pieces.read.usage.input_tokens == inputs[len(attempts) - 1]
    assert pieces.read.usage.output_tokens == sum(reply.usage.output for reply in attempts)  # type: ignore[union-attr]
    real = [call for call in attempts[-1].tool_calls if call.name in ("bash", "list_files")]
    assert [name for name, _ in pieces.calls] == [call.name for call in real]


# --- streams, event by event --------------------------------------------------------------


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    payload = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps(payload | {"choices": [choice]} | more).encode() + b"\n\n"


def piece(index: int, name: str | None = None, arguments: str = "", id: str = "") -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {"index": index, "function": function} | ({"id": id, "type": "function"} if id else {})


DONE = b"data: [DONE]\n\n"


def fed(turn: Turn, *events: bytes) -> list[bytes]:
    """Return what comes out at once for each event, and last what comes at the end."""
    through = stage(turn, dialects.OPENAI)
    out = [
        b"".join(one.raw for event in SSE().feed(raw) for one in through.feed(event))
        for raw in events
    ]
    return [*out, b"".join(one.raw for one in through.end())]


def test_nothing_is_held_back_but_the_end_and_done() -> None:
    comment = b": keep-alive\n\n"
    events = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "Hm"}),
        comment,
        chunk({"content": "So"}),
        chunk({"tool_calls": [piece(0, "bash", id="a")]}),
        chunk({"tool_calls": [piece(0, arguments='{"a":1.0e2}')]}),
        b"data: {broken\n\n",
    ]
    finish = chunk({}, "tool_calls")
    assert fed(turn_of(), *events, finish, DONE) == [*events, b"", b"", finish + DONE]
    call = chunk({"tool_calls": [piece(1, "done", id="b")]})
    assert fed(turn_of(), *events, call, finish, DONE) == [*events, b"", b"", b"", finish + DONE]


def test_calls_are_numbered_as_the_client_gets_them() -> None:
    out = fed(
        turn_of(),
        chunk({"role": "assistant", "tool_calls": [piece(0, "done", id="a")]}),
        chunk({"tool_calls": [piece(1, "bash", id="b"), piece(0, arguments="{}")]}),
        chunk({"tool_calls": [piece(1, arguments="{}"), piece(2, "list_files", "{}", id="c")]}),
        chunk({}, "stop"),
    )
    deltas = [payload["choices"][0]["delta"] for payload in payloads(b"".join(out))]
    assert deltas == [
        {"role": "assistant"},
        {"tool_calls": [piece(0, "bash", id="b")]},
        {"tool_calls": [piece(0, arguments="{}"), piece(1, "list_files", "{}", id="c")]},
        {},
    ]
    assert payloads(out[-1])[0]["choices"][0]["finish_reason"] == "tool_calls"


def test_several_calls_with_one_index_are_several_calls() -> None:
    out = fed(
        turn_of(),
        chunk({"tool_calls": [piece(0, "bash", "{}", id="a")]}),
        chunk({"tool_calls": [piece(0, "done", "{}", id="b")]}),
        chunk({"tool_calls": [piece(0, "bash", "{}", id="c")]}),
        chunk({}, "tool_calls"),
    )
    calls = [
        payload["choices"][0]["delta"].get("tool_calls") for payload in payloads(b"".join(out))
    ]
    assert calls == [[piece(0, "bash", "{}", id="a")], [piece(1, "bash", "{}", id="c")], None]


def test_a_call_waits_for_its_name() -> None:
    first, second = piece(0, arguments="{", id="a"), piece(0, "bash", "}")
    out = fed(turn_of(), chunk({"tool_calls": [first]}), chunk({"tool_calls": [second]}))
    assert out[0] == b""
    assert payloads(out[1])[0]["choices"][0]["delta"] == {"tool_calls": [first, second]}
    turn = turn_of()
    fed(turn, chunk({"tool_calls": [first]}), chunk({}, "tool_calls"))
    assert turn.rejected == "no_tool_call"


def test_the_old_kind_of_call_is_a_call_too() -> None:
    turn = turn_of()
    call = {"function_call": {"name": "bash", "arguments": "{}"}}
    events = [chunk({"role": "assistant"}), chunk(call), chunk({}, "function_call"), DONE]
    assert b"".join(fed(turn, *events)) == b"".join(events)
    message = {"role": "assistant", "content": None, **call}
    choice = {"index": 0, "message": message, "finish_reason": "function_call"}
    body = json.dumps({"choices": [choice]}).encode()
    assert play(turn, dialects.OPENAI, [body], stream=False).body == body
    assert turn.rejected == ""


def test_a_chunk_without_a_choice_passes_once() -> None:
    # Azure begins with what its filter makes of the prompt.
    turn = turn_of()
    filtered = chunk({}, prompt_filter_results=[], choices=[])
    other = b'data: {"object":"other"}\n\n'
    said = [chunk({"role": "assistant"}), chunk({"content": "So"}), chunk({}, "stop"), DONE]
    assert b"".join(fed(turn, filtered, *said)) == b"".join([filtered, *said[:2]])
    assert turn.rejected == "no_tool_call"
    assert b"".join(fed(turn, filtered, other, chunk({}, "length"))) == other + chunk({}, "length")


def test_text_in_parts_is_kept_apart_too() -> None:
    turn = turn_of()
    fed(turn, chunk({"role": "assistant", "content": "So"}), chunk({}, "stop"))
    parts = [{"type": "text", "text": "then"}]
    out = fed(turn, chunk({"content": parts}), chunk({"content": parts}), chunk({}, "stop"))
    deltas = [payload["choices"][0]["delta"] for payload in payloads(b"".join(out))]
    blank = {"type": "text", "text": "\n\n"}
    assert deltas == [{"content": [blank, *parts]}, {"content": parts}]


def test_what_rejected_attempts_took_is_told_even_where_the_end_tells_output_alone() -> None:
    def events(text: str, reason: str, taken: int, made: int) -> bytes:
        usage = {"input_tokens": taken, "cache_read_input_tokens": 4, "output_tokens": 1}
        block = {"type": "text", "text": ""}
        told: list[dict[str, Any]] = [
            {"type": "message_start", "message": {"id": "m", "usage": usage}},
            {"type": "content_block_start", "index": 0, "content_block": block},
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": text},
            },
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": reason},
                "usage": {"output_tokens": made},
            },
            {"type": "message_stop"},
        ]
        return b"".join(SSE().encode(json.dumps(one).encode(), one["type"]) for one in told)

    replies = [events("So", "end_turn", 10, 7), events("So", "max_tokens", 20, 8)]
    played = play(turn_of(), dialects.ANTHROPIC, replies)
    assert payloads(played.body)[-2]["usage"] == {
        "input_tokens": 20,
        "cache_read_input_tokens": 4,
        "output_tokens": 15,
    }
    assert play(turn_of(1), dialects.ANTHROPIC, replies).body == replies[0]


def test_a_last_chunk_that_says_all_at_once_is_taken_apart() -> None:
    said = {"content": "So.", "tool_calls": [piece(0, "done", ANSWER, id="a")]}
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    *_, end = fed(turn_of(), chunk({"role": "assistant"}), chunk(said, "tool_calls", usage=usage))
    chunks = payloads(end)
    assert [one["choices"][0]["delta"] for one in chunks] == [
        {"content": "So."},
        {"content": "\n\nAll is well."},
        {},
    ]
    assert [one["choices"][0]["finish_reason"] for one in chunks] == [None, None, "stop"]
    assert chunks[-1]["usage"] == usage


def test_usage_waits_for_the_last_attempt_wherever_it_stands() -> None:
    turn, out = turn_of(2), b""
    for _ in range(2):
        usage = chunk({}, choices=[], usage={"prompt_tokens": 5, "total_tokens": 5})
        out += b"".join(fed(turn, chunk({"role": "assistant"}), usage, chunk({}, "stop"), DONE))
    told = [payload["usage"] for payload in payloads(out) if payload.get("usage")]
    assert told == [{"prompt_tokens": 5, "total_tokens": 5}]


def test_a_stream_without_a_reason_for_its_end_gets_one() -> None:
    call = chunk({"tool_calls": [piece(0, "done", ANSWER, id="a")]})
    *_, end = fed(turn_of(), chunk({"role": "assistant"}), call, DONE)
    answer, finish = payloads(end)
    assert answer["choices"][0]["delta"] == {"content": "All is well."}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert end.endswith(DONE)


def test_a_stream_that_is_cut_off_is_not_asked_for_again() -> None:
    turn = turn_of()
    out = fed(turn, chunk({"content": "I wi"}))
    assert turn.rejected == ""
    assert out[-1] == b""
    cut = '{"final_answer": "All is w'
    out = fed(turn, chunk({"tool_calls": [piece(0, "done", cut, id="a")]}))
    assert payloads(out[-1])[0]["choices"][0]["delta"] == {"content": "All is w"}


@BOTH
def test_after_an_error_everything_passes_and_nothing_is_asked_for(dialect: Dialect) -> None:
    turn = turn_of()
    error = dialect.error_event(529, "overloaded")
    played = play(turn, dialect, [rendered(Reply(), dialect, stream=True)])
    assert turn.rejected == "no_tool_call"
    through = stage(turn, dialect)
    after = b"data: {}\n\n"
    out = [one.raw for e in SSE().feed(error + after + DONE) for one in through.feed(e)]
    assert [*out, *through.end()] == [error, after, DONE]
    assert turn.rejected == ""
    assert played.rejected == ["no_tool_call"]


def test_a_failure_of_ours_ends_the_enforcement_and_loses_no_event() -> None:
    turn = turn_of()
    through = stage(turn, dialects.OPENAI)
    assert list(through.feed(SSE().feed(chunk({"content": "So"}))[0]))
    with pytest.raises(AttributeError):
        through.feed(Event(1, b"", ""))  # type: ignore[arg-type]
    assert list(through.end()) == []
    assert turn.rejected == ""


# --- asking again ------------------------------------------------------------------------


@BOTH
def test_the_next_request_begins_with_the_bytes_of_the_last(dialect: Dialect) -> None:
    turn, sent = prepared(body_of(dialect), dialect)
    assert turn is not None
    play(turn, dialect, [Reply(text="I will look.", reasoning="Hm.")])
    second = again(turn, sent, dialect)
    end = sent.index(b" ],", sent.index(b"messages"))
    assert second.startswith(sent[:end] + b",{")
    assert second.endswith(sent[end:])
    said, reminder = json.loads(second)["messages"][-2:]
    assert reminder == {"role": "user", "content": REMINDER}
    if dialect is dialects.OPENAI:
        assert said == {
            "role": "assistant",
            "content": "I will look.",
            "reasoning_content": "Hm.",
        }
    else:
        thought = {"type": "thinking", "thinking": "Hm.", "signature": "c2lnbmF0dXJl"}
        text = {"type": "text", "text": "I will look."}
        assert said == {"role": "assistant", "content": [thought, text]}
    # And once more, after a reply that says nothing: such a message would be refused.
    play(turn, dialect, [Reply(text="")], stream=False)
    last = again(turn, second, dialect)
    assert json.loads(last)["messages"] == [
        *json.loads(second)["messages"],
        {"role": "user", "content": REMINDER},
    ]


def test_thinking_goes_back_in_the_field_it_came_in() -> None:
    turn, sent = prepared(body_of(dialects.OPENAI), dialects.OPENAI)
    assert turn is not None
    reply = Reply(text="So.", reasoning="Hm.")
    play(turn, dialects.OPENAI, [reply], stream=False, provider="groq")
    said = json.loads(again(turn, sent, dialects.OPENAI))["messages"][-2]
    assert said == {"role": "assistant", "content": "So.", "reasoning": "Hm."}


@BOTH
def test_a_done_without_an_answer_is_asked_for_the_answer(dialect: Dialect) -> None:
    turn, sent = prepared(body_of(dialect), dialect)
    assert turn is not None
    played = play(turn, dialect, [Reply(tool_calls=(done(),))])
    assert played.rejected == ["no_answer"]
    asked = json.loads(again(turn, sent, dialect))["messages"]
    assert asked[:-1] == json.loads(sent)["messages"]
    assert "answer" in asked[-1]["content"]
    assert asked[-1]["content"] != REMINDER


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_attempts_are_limited(attempts: int) -> None:
    for dialect in (dialects.OPENAI, dialects.ANTHROPIC):
        played = play(turn_of(attempts), dialect, [Reply(text="No.")] * 9)
        assert len(played.rejected) == attempts - 1
        assert played.text == "\n\n".join(["No."] * attempts)


# --- small things ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("done", True),
        ("Done", True),
        ("functions.done:12", True),
        (" final ", True),
        ("final_answer", True),
        ("finishTurn", True),
        ("finish", True),
        ("7", True),
        ("functions.7:7", True),
        ("bash", False),
        ("finish_order", False),
        ("done_list", False),
        ("read7", False),
        ("undeclared", False),
    ],
)
def test_names_that_end_a_turn(name: str, ends: bool) -> None:
    assert turn_of().hides(name) == ends
    assert not turn_of(3, name).hides(name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", ""),
        ("{}", ""),
        ("null", ""),
        ("[]", ""),
        ("17", ""),
        ('{"final_answer": "a"}', "a"),
        ('{"summary": "d", "answer": "c", "final": "b", "final_answer": "a"}', "a"),
        ('{"summary": "d", "answer": "c", "final": " ", "final_answer": null}', "c"),
        ('{"success": true, "message": "m"}', "m"),
        ('{"final_answer": {"text": "x"}}', ""),
        ('"a string"', "a string"),
        ("plain text", "plain text"),
        ('{"final_answer": "cut o', "cut o"),
        ('{"final_answer": "a\nb"}', "a\nb"),
        ('{"final_answer": "a\\nb \\"c\\"", oops', 'a\nb "c"'),
        ("{broken", ""),
        ('{"final_answer": "\\ud800"}', "\ud800"),
    ],
)
def test_answers_are_found(arguments: str, said: str) -> None:
    turn = turn_of()
    call = Call(turn, "done")
    call.add(arguments)
    assert turn.deciders[0].answer([call]) == said


def test_of_several_replies_the_prompt_is_the_last_ones_and_the_output_is_added() -> None:
    first = {
        "prompt_tokens": 30_000,
        "prompt_tokens_details": {"cached_tokens": 29_000},
        "prompt_cache_hit_tokens": 29_000,
        "completion_tokens": 10,
        "completion_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 30_010,
        "cost": 0.25,
    }
    second = first | {"prompt_tokens": 31_000, "prompt_cache_hit_tokens": 0, "total_tokens": 31_010}
    last = {
        "prompt_tokens": 32_000,
        "completion_tokens": 20,
        "completion_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 32_020,
        "cost": 0.5,
    }
    assert together(together(together(None, first), second), last) == {
        "prompt_tokens": 32_000,
        "prompt_tokens_details": {"cached_tokens": 0},
        "prompt_cache_hit_tokens": 0,
        "completion_tokens": 40,
        "completion_tokens_details": {"reasoning_tokens": 9},
        "total_tokens": 32_040,
        "cost": 1.0,
    }


def test_where_the_last_reply_says_nothing_of_its_prompt_the_one_before_does() -> None:
    first = {"input_tokens": 100, "cache_read_input_tokens": 90, "output_tokens": 7}
    assert together(first, {"input_tokens": None, "output_tokens": 8}) == first | {
        "output_tokens": 15
    }


def test_usage_is_added_at_every_depth() -> None:
    one = {"a": 1, "b": {"c": 2, "gone": 3}, "cost": 0.5, "tier": "x", "only": {"d": 1}, "n": 4}
    other = {"a": 2, "b": {"c": 3, "new": 1}, "cost": 0.25, "tier": "y", "n": None, "ok": True}
    assert add(one, other) == {
        "a": 3,
        "b": {"c": 5, "new": 1, "gone": 3},
        "cost": 0.75,
        "tier": "y",
        "n": 4,
        "ok": True,
        "only": {"d": 1},
    }
    assert add(None, other) == other
    assert add({"a": True}, {"a": True}) == {"a": True}
