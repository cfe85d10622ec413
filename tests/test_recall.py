"""Which requests offer a recall, which replies are answered, and what the client gets of them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core import dialects, recall
from kimi_core.attempts import Turn, join
from kimi_core.context import Counter, context, sent
from kimi_core.dialects import Dialect
from kimi_core.document import Document
from kimi_core.enforcement import Enforcement
from kimi_core.exchange import Attempt, Exchange, Operation, Route
from kimi_core.recall import MAX_RECALLS, NAME, Recall
from kimi_core.recall.decider import MAX_CALLS, NO_MORE, ONE_BY_ONE
from kimi_core.store import StoreError
from playing import (
    Played,
    assert_one_stream_of_blocks,
    assert_one_stream_of_chunks,
    play,
    rendered,
)
from upstream import Reply, TokenUsage

CHAT, MESSAGES = dialects.OPENAI, dialects.ANTHROPIC
BOTH = pytest.mark.parametrize("dialect", [CHAT, MESSAGES], ids=["o", "a"])
EACH_WAY = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])

HASH = "0123456789abcdef"
ORIGINAL = "first\nsecond\nthird"
SHOWN = "Lines 1 to 3 of 3:\nfirst\nsecond\nthird"
USER = {"role": "user", "content": "Mend the parser"}
BASH = ("call_1", "bash", '{"command":"ls"}')


async def lookup(hash: str) -> str | None:
    return {HASH: ORIGINAL}.get(hash)


def tool(dialect: Dialect, name: str) -> dict[str, Any]:
    if dialect is CHAT:
        return {"type": "function", "function": {"name": name, "parameters": {}}}
    return {"name": name, "input_schema": {"type": "object"}}


def body_of(dialect: Dialect, **more: Any) -> bytes:
    asked = {"model": "m", "tools": [tool(dialect, "bash")], "messages": [USER], "big": 1}
    return json.dumps(asked | more).replace('"big": 1', '"big":1E+2').encode()


def exchange_of(
    body: bytes, dialect: Dialect, *, operation: Operation = "chat", routed: bool = True
) -> Exchange:
    made = Exchange("x", dialect, operation, Document(body, dialect.shape))
    made.route = Route("provider", "m", dialect.name) if routed else None
    return made


def recalled(arguments: str = json.dumps({"hash": HASH}), id: str = "call_7") -> Any:
    return (id, NAME, arguments)


def asks(*calls: Any, **more: Any) -> Reply:
    return Reply(tool_calls=calls or (recalled(),), **more)


# --- the request -----------------------------------------------------------------------


@BOTH
def test_the_tool_is_offered_after_those_of_the_client(dialect: Dialect) -> None:
    body = body_of(dialect)
    exchange = exchange_of(body, dialect)
    assert recall.prepare(exchange, lookup)
    sent = exchange.document.encode()
    asked = json.loads(sent)
    offered = asked["tools"].pop()
    assert asked == json.loads(body)
    told = offered["function"] if dialect is CHAT else offered
    assert told["name"] == NAME
    schema = told["parameters"] if dialect is CHAT else told["input_schema"]
    assert schema["required"] == ["hash"]
    assert {"hash", "from_line", "to_line", "pattern"} <= schema["properties"].keys()
    assert "kimi-proxy mask" in told["description"]
    end = body.index(b"], ", body.index(b"tools"))
    assert sent.startswith(body[:end] + b",{")
    assert sent.endswith(body[end:])
    assert exchange.job is not None
    assert len(exchange.stages) == 1


@BOTH
def test_the_same_bytes_are_added_whatever_the_conversation_says(dialect: Dialect) -> None:
    added = set()
    for messages in ([USER], [USER, {"role": "assistant", "content": "So"}, USER]):
        exchange = exchange_of(body_of(dialect, messages=messages), dialect)
        recall.prepare(exchange, lookup)
        added.add(exchange.document.raw("tools"))
    assert len(added) == 1


@BOTH
@pytest.mark.parametrize(
    "more",
    [
        {"tools": []},
        {"tools": None},
        {"messages": []},
    ],
)
def test_a_request_that_can_take_no_recall_is_left_alone(
    dialect: Dialect, more: dict[str, Any]
) -> None:
    exchange = exchange_of(body := body_of(dialect, **more), dialect)
    assert not recall.prepare(exchange, lookup)
    assert exchange.document.encode() is body
    assert exchange.job is None
    assert exchange.stages == []


def test_several_choices_are_left_alone_as_nobody_would_find_a_call_in_them() -> None:
    exchange = exchange_of(body := body_of(CHAT, n=2), CHAT)
    assert not recall.prepare(exchange, lookup)
    assert exchange.document.encode() is body
    assert (exchange.job, exchange.stages, exchange.sent) == (None, [], None)


@BOTH
@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": "none"},
        {"tool_choice": {"type": "none"}},
        {"response_format": {"type": "json_object"}, "output_format": {"type": "json_schema"}},
        {"output_config": {"format": {"type": "json_schema"}}, "response_format": {"type": "x"}},
        {"tool_choice": "none", "n": 2},
    ],
)
def test_what_a_request_wants_of_this_reply_leaves_the_tools_as_they_were(
    dialect: Dialect, more: dict[str, Any]
) -> None:
    usual, exchange = (exchange_of(body_of(dialect, **one), dialect) for one in ({}, more))
    assert recall.prepare(usual, lookup)
    assert recall.prepare(exchange, lookup)
    assert exchange.document.raw("tools") == usual.document.raw("tools")
    several = dialect is CHAT and "n" in more
    assert (exchange.turn is None) is several


@BOTH
def test_the_context_that_leaves_has_the_tool_and_the_clients_has_not(dialect: Dialect) -> None:
    exchange = exchange_of(body_of(dialect), dialect)
    recall.prepare(exchange, lookup)
    (client,), (leaving,) = context(exchange).heads, sent(exchange).heads
    assert NAME.encode() not in bytes(client.unit.raw)
    assert bytes(leaving.unit.raw) == exchange.document.raw("tools")
    counter = Counter()
    assert counter.count(exchange, "m")["tools"] > 100 + sum(
        counter.count_in(context(exchange), "m")[kind] for kind in ("tools",)
    )


@BOTH
@EACH_WAY
def test_text_in_json_is_never_followed_by_other_text(stream: bool, dialect: Dialect) -> None:
    turn = Turn(Recall(NAME, lookup, said_once=True))
    replies = [asks(), asks(text='{"a": 1}'), Reply(text='{"b": 2}')]
    played = play(turn, dialect, replies, stream=stream)
    assert (played.text, played.calls) == ('{"a": 1}', [])
    assert played.rejected == ["recall"]
    assert NAME.encode() not in played.body


@BOTH
def test_a_client_with_such_a_tool_of_its_own_keeps_it(dialect: Dialect) -> None:
    body = body_of(dialect, tools=[tool(dialect, NAME)])
    exchange = exchange_of(body, dialect)
    assert not recall.prepare(exchange, lookup)
    assert exchange.document.encode() is body


def test_where_nobody_would_ask_again_nothing_is_offered() -> None:
    for dialect in (dialects.RESPONSES, dialects.GEMINI):
        assert not recall.prepare(exchange_of(body_of(CHAT), dialect), lookup)
    counting = exchange_of(body_of(MESSAGES), MESSAGES, operation="count_tokens")
    assert not recall.prepare(counting, lookup)
    assert not recall.prepare(exchange_of(body_of(CHAT), CHAT, routed=False), lookup)


@pytest.mark.parametrize(
    ("dialect", "choice"),
    [
        (CHAT, "required"),
        (CHAT, {"type": "function", "function": {"name": "bash"}}),
        (MESSAGES, {"type": "any"}),
        (MESSAGES, {"type": "tool", "name": "bash"}),
    ],
)
def test_what_the_client_says_of_its_choice_stays(dialect: Dialect, choice: Any) -> None:
    exchange = exchange_of(body_of(dialect, tool_choice=choice), dialect)
    assert recall.prepare(exchange, lookup)
    assert exchange.document.get("tool_choice") == choice


# --- replies, and what becomes of them ---------------------------------------------------

STOPS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
DONE = ("call_9", "done", '{"final_answer": "All is well."}')


def turn_of(*, enforced: bool = False) -> Turn:
    enforcement = [Enforcement("done", ["bash", NAME], 3)] if enforced else []
    return Turn(Recall(NAME, lookup), *enforcement)


@dataclass(frozen=True)
class Case:
    """Replies, and what the client gets: text, calls, OpenAI's finish_reason, rejections."""

    replies: tuple[Reply, ...]
    text: str = ""
    calls: tuple[str, ...] = ()
    finish: str = "stop"
    rejected: tuple[str, ...] = ()
    enforced: bool = False


CASES = {
    "no recall": Case((Reply(text="So.", tool_calls=(BASH,)),), "So.", ("bash",), "tool_calls"),
    "text alone": Case((Reply(text="So."),), "So."),
    "a recall, then text": Case((asks(), Reply(text="So.")), "So.", rejected=("recall",)),
    "text and a recall, then text": Case(
        (asks(text="Let me see."), Reply(text="So.")), "Let me see.\n\nSo.", rejected=("recall",)
    ),
    "a recall, then a call": Case(
        (asks(), Reply(tool_calls=(BASH,))), "", ("bash",), "tool_calls", ("recall",)
    ),
    "thinking and a recall": Case(
        (asks(reasoning="Hm."), Reply(reasoning="Ah.", text="So.")), "So.", rejected=("recall",)
    ),
    "two recalls at once": Case(
        (asks(recalled(), recalled(id="call_8")), Reply(text="So.")), "So.", rejected=("recall",)
    ),
    "recalls one after the other": Case(
        (asks(text="A"), asks(text="B"), asks(), Reply(text="C")),
        "A\n\nB\n\nC",
        rejected=("recall",) * 3,
    ),
    "a recall beside a call": Case(
        (asks(recalled(), BASH, recalled(id="call_8"), text="So."),),
        "So.",
        ("bash",),
        "tool_calls",
    ),
    "a recall, cut by its length": Case(
        (asks(finish_reason="length", text="So."),), "So.", (), "length"
    ),
    "recalls for ever": Case(
        (asks(),) * (MAX_RECALLS + 3), "", (), "stop", ("recall",) * (MAX_RECALLS + 1)
    ),
    "as Kimi names it": Case(
        (asks(("functions.kimi_recall:0", f"functions.{NAME}:0", "{}")), Reply(text="So.")),
        "So.",
        rejected=("recall",),
    ),
    "no call, a recall, and a call": Case(
        (Reply(text="A"), asks(text="B"), Reply(text="C", tool_calls=(BASH,))),
        "A\n\nB\n\nC",
        ("bash",),
        "tool_calls",
        ("no_tool_call", "recall"),
        enforced=True,
    ),
    "a recall, no call, and done": Case(
        (asks(), Reply(text="A"), Reply(tool_calls=(DONE,))),
        "A\n\nAll is well.",
        rejected=("recall", "no_tool_call"),
        enforced=True,
    ),
    "a recall beside done": Case((asks(recalled(), DONE),), "All is well.", enforced=True),
    "recalls do not count as attempts": Case(
        (asks(), asks(), asks(), Reply(text="A"), asks(), Reply(text="B"), Reply(text="C")),
        "A\n\nB\n\nC",
        rejected=("recall",) * 3 + ("no_tool_call", "recall", "no_tool_call"),
        enforced=True,
    ),
    "recalls for ever are no calls": Case(
        (asks(),) * (MAX_RECALLS + 4),
        rejected=("recall",) * (MAX_RECALLS + 1) + ("no_tool_call",) * 2,
        enforced=True,
    ),
}


@BOTH
@EACH_WAY
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_the_client_gets_of_all_attempts(case: Case, stream: bool, dialect: Dialect) -> None:
    usage = TokenUsage(input=100, output=10, cached=30, cache_write=5)
    replies = [replace(reply, usage=usage) for reply in case.replies]
    for cut in (0, 1) if stream else (0,):
        turn = turn_of(enforced=case.enforced)
        played = play(turn, dialect, replies, stream=stream, cut=cut)
        attempts = len(case.rejected) + 1
        assert tuple(played.rejected) == case.rejected
        assert played.text == case.text
        assert tuple(name for name, _ in played.calls) == case.calls
        assert NAME.encode() not in played.body
        finish = case.finish if dialect is CHAT else STOPS[case.finish]
        assert played.read.finish_reason == finish
        assert played.read.complete
        assert not played.read.error
        assert played.read.usage.input_tokens == 100
        assert played.read.usage.output_tokens == 10 * attempts
        assert played.read.usage.cache_read_tokens == 30
        if stream and dialect is CHAT:
            assert_one_stream_of_chunks(played.body)
        elif stream:
            assert_one_stream_of_blocks(played.body)


@BOTH
@EACH_WAY
def test_a_reply_without_a_recall_keeps_its_bytes(stream: bool, dialect: Dialect) -> None:
    reply = Reply(text="So", reasoning="Hm", tool_calls=(BASH,))
    played = play(turn_of(), dialect, [reply], stream=stream, cut=7)
    assert played.body == rendered(reply, dialect, stream=stream)


CALLS = st.sampled_from([BASH, recalled(), recalled("{}"), recalled("[broken", "call_8"), DONE])
REPLIES = st.builds(
    Reply,
    text=st.sampled_from(["", "So.", "\n", " two words "]),
    reasoning=st.sampled_from(["", "Hm."]),
    tool_calls=st.lists(CALLS, max_size=3).map(tuple),
    finish_reason=st.sampled_from([None, None, None, "length"]),
    usage=st.builds(TokenUsage, input=st.integers(1, 9), output=st.integers(1, 9)),
    delta_chars=st.integers(1, 9),
)


@given(st.lists(REPLIES, min_size=9, max_size=9), st.integers(0, 40), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_stream_says_what_the_whole_reply_says_however_it_is_cut(
    replies: list[Reply], cut: int, enforced: bool
) -> None:
    asked = body_of(CHAT)
    at_once = play(turn_of(enforced=enforced), CHAT, replies, stream=False, asked=asked)
    pieces = play(turn_of(enforced=enforced), CHAT, replies, cut=cut, asked=asked)
    assert pieces.rejected == at_once.rejected
    assert pieces.text == at_once.text
    assert pieces.calls == at_once.calls
    assert pieces.read.finish_reason == at_once.read.finish_reason
    assert pieces.read.usage == at_once.read.usage
    assert pieces.asked == at_once.asked
    assert NAME.encode() not in pieces.body
    last = replies[len(pieces.rejected)]
    real = [call.name for call in last.tool_calls if call.name in ("bash", "done")]
    if not enforced:
        assert [name for name, _ in pieces.calls] == real


# --- the next request ----------------------------------------------------------------------


def results(played: Played, dialect: Dialect, number: int = 1) -> list[str]:
    """Return what the model was told in one of the requests."""
    messages = json.loads(played.asked[number])["messages"]
    if dialect is CHAT:
        latest = max(n for n, one in enumerate(messages) if one["role"] == "assistant")
        return [message["content"] for message in messages[latest + 1 :]]
    return [block["content"] for block in messages[-1]["content"]]


@BOTH
@EACH_WAY
def test_the_next_request_is_the_last_with_the_call_and_its_result(
    stream: bool, dialect: Dialect
) -> None:
    asked = body_of(dialect)
    first = asks(text="Let me see.", reasoning="Hm.")
    played = play(turn_of(), dialect, [first, Reply(text="So.")], stream=stream, asked=asked)
    end = asked.index(b"], ", asked.index(b"messages"))
    assert played.asked[1].startswith(asked[:end] + b",{")
    assert played.asked[1].endswith(asked[end:])
    before, said, *after = json.loads(played.asked[1])["messages"]
    assert before == USER
    given = {"hash": HASH}
    if dialect is CHAT:
        function = {"name": NAME, "arguments": json.dumps(given)}
        assert said == {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "call_7", "type": "function", "function": function}],
        }
        assert after == [{"role": "tool", "tool_call_id": "call_7", "content": SHOWN}]
    else:
        thinking, text, call = said["content"]
        signed = {"type": "thinking", "thinking": "Hm.", "signature": "c2lnbmF0dXJl"}
        assert thinking == signed
        assert text == {"type": "text", "text": "Let me see."}
        assert call == {"type": "tool_use", "id": "call_7", "name": NAME, "input": given}
        result = {"type": "tool_result", "tool_use_id": "call_7", "content": SHOWN}
        assert after == [{"role": "user", "content": [result]}]


@BOTH
def test_each_call_gets_its_result_and_an_id_of_its_own(dialect: Dialect) -> None:
    missing = json.dumps({"hash": "f" * 16})
    reply = asks(recalled(), recalled(missing, "call_8"), recalled(missing, "call_7"))
    played = play(turn_of(), dialect, [reply, Reply(text="So.")], asked=body_of(dialect))
    _, said, *after = json.loads(played.asked[1])["messages"]
    if dialect is CHAT:
        calls = [call["id"] for call in said["tool_calls"]]
        answered = [message["tool_call_id"] for message in after]
    else:
        calls = [block["id"] for block in said["content"]]
        answered = [block["tool_use_id"] for block in after[0]["content"]]
    assert calls == answered
    assert len(set(calls)) == 3
    found, *others = results(played, dialect)
    assert found == SHOWN
    assert all("Nothing is kept under ffffffffffffffff" in other for other in others)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hash": HASH, "from_line": 2, "to_line": 2}, "Line 2 of 3:\nsecond"),
        ({"hash": HASH, "from_line": "2", "to_line": 3.0}, "Lines 2 to 3 of 3:\nsecond\nthird"),
        ({"hash": HASH, "from_line": None, "pattern": "TH"}, "3: third"),
        ({"hash": f"kimi-proxy mask {HASH.upper()}"}, SHOWN),
        ({"hash": HASH, "from_line": "last"}, "from_line is no whole number."),
        ({"hash": HASH, "to_line": True}, "to_line is no whole number."),
    ],
)
def test_what_is_asked_for_is_what_comes(dialect: Dialect, arguments: Any, said: str) -> None:
    reply = asks(recalled(json.dumps(arguments)))
    played = play(turn_of(), dialect, [reply, Reply(text="So.")], asked=body_of(dialect))
    assert results(played, dialect) == [said]


@pytest.mark.parametrize("arguments", ["", "{}", '{"hash": 17}', '{"hash": "0123"}'])
def test_a_call_without_a_hash_is_told_so(arguments: str) -> None:
    reply = asks(recalled(arguments))
    for dialect in (CHAT, MESSAGES):
        played = play(turn_of(), dialect, [reply, Reply(text="So.")], asked=body_of(dialect))
        assert "hash is missing" in results(played, dialect)[0]


def test_arguments_that_are_none_are_not_sent_again() -> None:
    played = play(
        turn_of(), CHAT, [asks(recalled('{"hash": ')), Reply(text="So.")], asked=body_of(CHAT)
    )
    call = json.loads(played.asked[1])["messages"][1]["tool_calls"][0]
    assert call["function"]["arguments"] == "{}"
    assert "no JSON object" in results(played, CHAT)[0]


@BOTH
def test_after_the_last_recall_the_model_is_told_that_there_is_no_more(dialect: Dialect) -> None:
    replies = [asks()] * (MAX_RECALLS + 1) + [Reply(text="So.")]
    played = play(turn_of(), dialect, replies, asked=body_of(dialect, tool_choice={"type": "auto"}))
    assert played.text == "So."
    told = [results(played, dialect, n)[-1] for n in range(1, MAX_RECALLS + 2)]
    assert told == [SHOWN] * MAX_RECALLS + [NO_MORE]
    assert json.loads(played.asked[-1])["tool_choice"] == {"type": "auto"}


def test_only_so_many_calls_of_a_reply_are_answered() -> None:
    calls = [recalled(id=f"call_{n}") for n in range(MAX_CALLS + 2)]
    played = play(turn_of(), CHAT, [asks(*calls), Reply(text="So.")], asked=body_of(CHAT))
    assert results(played, CHAT) == [SHOWN] * MAX_CALLS + [ONE_BY_ONE] * 2


@pytest.mark.parametrize(
    "error", [OSError("gone"), sqlite3.OperationalError("locked"), StoreError("no")]
)
def test_a_store_that_cannot_be_read_is_said(error: Exception) -> None:
    async def failing(hash: str) -> str | None:
        raise error

    turn = Turn(Recall(NAME, failing))
    played = play(turn, CHAT, [asks(), Reply(text="So.")], asked=body_of(CHAT))
    assert played.text == "So."
    assert "cannot be read now" in results(played, CHAT)[0]


def test_what_a_provider_wants_to_be_told_again_is_kept() -> None:
    signature = {"google": {"thought_signature": "c2ln"}}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"

    def detail(**more: Any) -> dict[str, Any]:
        return {"reasoning_details": [{"type": "reasoning.text", "index": 0, **more}]}

    function = {"name": NAME, "arguments": json.dumps({"hash": HASH})}
    call = {"index": 0, "id": "a", "function": function, "extra_content": signature}
    stream = (
        chunk({"role": "assistant", **detail(text="Hm")})
        + chunk(detail(text=", so."))
        + chunk(detail(signature="s"))
        + chunk({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}] * 2})
        + chunk({"tool_calls": [call]}, "tool_calls")
        + b"data: [DONE]\n\n"
    )
    played = play(turn_of(), CHAT, [stream, Reply(text="So.")], asked=body_of(CHAT))
    said = json.loads(played.asked[1])["messages"][1]
    assert said["content"] is None
    assert said["tool_calls"][0]["extra_content"] == signature
    assert "index" not in said["tool_calls"][0]
    assert said["reasoning_details"] == [
        {"type": "reasoning.text", "index": 0, "text": "Hm, so.", "signature": "s"},
        {"type": "reasoning.encrypted", "data": "x"},
        {"type": "reasoning.encrypted", "data": "x"},
    ]


@EACH_WAY
def test_blocks_of_other_kinds_go_back_as_they_came(stream: bool) -> None:
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}
    found = {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"url": "u"}]}
    hidden = {"type": "redacted_thinking", "data": "abc"}
    cite = {"type": "web_search_result_location", "url": "u", "encrypted_index": "e"}
    blocks: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "Hm.", "signature": "sig"},
        hidden,
        search,
        found,
        {"type": "text", "text": "It says", "citations": [cite]},
        {"type": "text", "text": "\n"},
        {"type": "tool_use", "id": "t", "name": NAME, "input": {"hash": HASH}, "caller": "direct"},
    ]
    message = {"id": "m", "type": "message", "role": "assistant", "usage": {"input_tokens": 1}}
    ending = {"stop_reason": "tool_use"}
    body = json.dumps(message | ending | {"content": blocks}).encode()
    if stream:
        body = _streamed(message, blocks, ending)
    played = play(
        turn_of(), MESSAGES, [body, Reply(text="So.")], stream=stream, asked=body_of(MESSAGES)
    )
    assert played.rejected == ["recall"]
    said = json.loads(played.asked[1])["messages"][1]
    # A blank text would be refused.
    assert said == {"role": "assistant", "content": [*blocks[:5], blocks[6]]}
    assert NAME.encode() not in played.body


def _streamed(message: dict[str, Any], blocks: Sequence[Any], ending: dict[str, Any]) -> bytes:
    """Return a message as Anthropic streams it."""
    told: list[dict[str, Any]] = [{"type": "message_start", "message": message | {"content": []}}]

    def delta(index: int, type: str, **more: Any) -> None:
        told.append(
            {"type": "content_block_delta", "index": index, "delta": {"type": type, **more}}
        )

    for index, block in enumerate(blocks):
        begun = {**block}
        for key, empty in (("text", ""), ("thinking", ""), ("signature", ""), ("input", {})):
            if key in begun:
                begun[key] = empty
        if "citations" in begun:
            begun["citations"] = []
        told.append({"type": "content_block_start", "index": index, "content_block": begun})
        if "input" in block:
            pieces = json.dumps(block["input"])
            delta(index, "input_json_delta", partial_json=pieces[:4])
            delta(index, "input_json_delta", partial_json=pieces[4:])
        if "text" in block:
            delta(index, "text_delta", text=block["text"])
        if "thinking" in block:
            delta(index, "thinking_delta", thinking=block["thinking"])
            delta(index, "signature_delta", signature=block["signature"])
        for citation in block.get("citations", ()):
            delta(index, "citations_delta", citation=citation)
        told.append({"type": "content_block_stop", "index": index})
    told.append({"type": "message_delta", "delta": ending, "usage": {"output_tokens": 2}})
    told.append({"type": "message_stop"})
    return b"".join(
        b"event: %s\ndata: %s\n\n" % (one["type"].encode(), json.dumps(one).encode())
        for one in told
    )


# --- several on one exchange, and what it took ---------------------------------------------


def test_who_joins_an_exchange_shares_its_turn() -> None:
    exchange = exchange_of(body_of(CHAT), CHAT)
    recall.prepare(exchange, lookup)
    job = exchange.job
    join(exchange, Enforcement("done", ["bash"], 1), asks_again=False)
    assert exchange.turn is not None
    assert [type(one) for one in exchange.turn.deciders] == [Recall, Enforcement]
    assert len(exchange.stages) == 1
    assert exchange.job is job


def test_who_never_asks_again_needs_no_job() -> None:
    exchange = exchange_of(body_of(CHAT), CHAT)
    join(exchange, Enforcement("done", ["bash"], 1), asks_again=False)
    assert exchange.job is None
    assert len(exchange.stages) == 1


def test_recalls_are_the_replies_that_were_answered() -> None:
    exchange = exchange_of(body_of(CHAT), CHAT)
    said = ("recall", "no_tool_call", "recall", "")
    exchange.attempts = [Attempt("p", "m", CHAT, rejected=one) for one in said]
    assert recall.recalls(exchange) == 2
