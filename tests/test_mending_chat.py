"""Mended replies in OpenAI's shape, through the pipe that serves them, streamed and whole."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_core import dialects
from kimi_core.document import Document
from kimi_core.exchange import Exchange
from kimi_core.markup import K2, Channel, Scanner, Tools
from kimi_core.mending.chat import MendChat
from kimi_core.pipe import Pipe, whole
from kimi_core.sse import SSE, Event

JSON = dict[str, Any]

SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
READ = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
FIND = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TOOLS = {"noop": {"type": "object", "properties": {}}, "read": READ, "find": FIND}
MODEL = "moonshotai/kimi-k2-thinking"


def leaked(header: str = "functions.noop:0", arguments: str = '{"k": 1}') -> str:
    return SECTION + CALL + header + ARGUMENTS + arguments + CALL_END + SECTION_END


def stage(*, thinks: bool = False, tools: JSON = TOOLS) -> MendChat:
    def scanner(model: str) -> Scanner | None:
        return None if model.startswith("gpt") else K2(Tools(tools), undecided=thinks)

    return MendChat(scanner)


# -- what a provider sends


def native(index: Any = 0, id: Any = "call_1", name: Any = "noop", arguments: Any = "{}") -> JSON:
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": id, "type": "function", "function": function}


def choice(delta: Any = None, finish: Any = None, index: int = 0, **more: Any) -> JSON:
    return {"index": index, "delta": delta or {}, "finish_reason": finish, **more}


def chunk(*choices: JSON, **more: Any) -> str:
    about = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return json.dumps({**about, "choices": choices, **more})


def said(content: Any = None, finish: Any = None, **more: Any) -> str:
    delta = more if content is None else {"content": content, **more}
    return chunk(choice(delta, finish))


DONE = "[DONE]"
ROLE = chunk(choice({"role": "assistant", "content": ""}))
STOP = chunk(choice({}, "stop"))
USAGE = chunk(usage={"prompt_tokens": 9, "completion_tokens": 2, "cached_tokens": 4})


def stream(*data: str) -> bytes:
    return "".join(f"data: {one}\n\n" for one in data).encode()


def body(finish: Any = "stop", **message: Any) -> bytes:
    one = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return json.dumps({"id": "chatcmpl-1", "model": MODEL, "choices": [one], "usage": {}}).encode()


# -- what a client gets


def piped(raw: bytes, of: MendChat | None = None, cuts: Sequence[int] | None = None) -> bytes:
    """Send a stream through the pipe, in one piece or cut at some offsets."""
    shape = dialects.OPENAI.shape
    exchange = Exchange("x", dialects.OPENAI, "chat", Document(b"{}", shape))
    pipe = Pipe("x", exchange, SSE(), [of or stage()])
    bounds = [0, *(cuts or ()), len(raw)]
    out = [b"".join(pipe(raw[a:b])) for a, b in pairwise(bounds) if a < b]
    return b"".join((*out, *pipe(b"")))


def events(raw: bytes) -> list[JSON]:
    read = SSE()
    data = [event.data for event in (*read.feed(raw), *read.end())]
    return [json.loads(one) for one in data if one.startswith(b"{")]


@dataclass
class Seen:
    """A choice of a reply, as an SDK puts it together."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    finish: str | None = None


def seen(raw: bytes, index: int = 0) -> Seen:
    all = Seen()
    calls: dict[int, list[str]] = {}
    for event in events(raw):
        for one in event.get("choices", ()):
            if one["index"] != index:
                continue
            delta = one.get("delta") or {}
            all.content += delta.get("content") or ""
            all.reasoning += delta.get("reasoning_content") or ""
            all.finish = one.get("finish_reason") or all.finish
            for call in delta.get("tool_calls") or ():
                if call["index"] not in calls:
                    assert call["index"] == len(calls)
                    assert call["id"]
                    assert call["type"] == "function"
                    calls[call["index"]] = [call["id"], call["function"]["name"], ""]
                calls[call["index"]][2] += call["function"].get("arguments") or ""
    all.calls = [(id, name, arguments) for id, name, arguments in calls.values()]
    assert len({id for id, _, _ in all.calls}) == len(all.calls)
    return all


def seen_whole(raw: bytes, index: int = 0) -> Seen:
    one = json.loads(raw)["choices"][index]
    message = one["message"]
    calls = [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or ()
    ]
    reasoning = message.get("reasoning_content") or ""
    return Seen(message.get("content") or "", reasoning, calls, one["finish_reason"])


def mended(of: MendChat | None = None, **message: Any) -> Seen:
    return seen_whole(whole("x", [of or stage()], body(**message)))


NOOP = ("functions.noop:0", "noop", '{"k": 1}')

# -- nothing to change

ALONE: dict[str, bytes] = {
    "text": stream(ROLE, said("Hi."), STOP, USAGE, DONE),
    "without the last words": stream(ROLE, said("Hi.")),
    "without a blank line at the end": stream(ROLE, said("Hi."), STOP).rstrip(),
    "line ends of Windows": stream(ROLE, said("Hi."), STOP, DONE).replace(b"\n", b"\r\n"),
    "line ends of old Macs": stream(ROLE, said("Hi."), DONE).replace(b"\n", b"\r"),
    "comments": b": OPENROUTER PROCESSING\n\n" + stream(ROLE, said("a <")) + b":\n\n"
    b": more\ndata: " + said(" b").encode() + b"\n\n" + stream(STOP, DONE),
    "a byte order mark": b"\xef\xbb\xbf" + stream(said("Hi."), DONE),
    "other fields of events": b"event: x\nid: 1\nretry: 5\ndata: "
    + said("Hi.").encode()
    + b"\n\n"
    + stream(DONE),
    "data in lines": b'data: {"choices": [{"index": 0,\ndata: "delta": {"content": "a"}}]}\n\n',
    "odd JSON": stream(
        '{"big": 12345678901234567890123, "e": 1.0e2, "s": "\\u00e9\\/", "choices":'
        '[ {"delta":{"content":"a <","x":null} ,"index":0} ], "a":1, "a":2}',
        '  {"choices": [{"index": 0, "delta": {"content": "b"}}]}',
    ),
    "nulls": stream(
        chunk(choice({"role": "assistant", "content": None, "tool_calls": None})),
        chunk({"index": 0, "delta": None}),
        chunk({"index": 0}),
        said(""),
        said("a"),
        STOP,
    ),
    "no choices": stream('{"choices": null}', '{"object": "ping"}', "{}", chunk(), USAGE),
    "choices that are none": stream('{"choices": [1, null]}', '{"choices": {"a": 1}}'),
    "no JSON": stream("{broken", "[1]", "hello", said("a"), '"x"', DONE),
    "an error": stream(ROLE, said("a"), '{"error": {"message": "busy"}}'),
    "thinking": stream(ROLE, said(reasoning_content="Hm."), said("a"), STOP, DONE),
    "thinking in two fields": stream(said(reasoning_content="Hm.", reasoning="Hm."), STOP, DONE),
    "calls": stream(
        ROLE,
        said(tool_calls=[native(arguments="")]),
        said(tool_calls=[{"index": 0, "function": {"arguments": '{"a":'}}]),
        said(tool_calls=[{"index": 0, "function": {"arguments": " 1}"}}]),
        said(tool_calls=[native(1, "call_2")]),
        chunk(choice({}, "tool_calls")),
        DONE,
    ),
    "calls cut by the limit": stream(
        said(tool_calls=[native(arguments='{"a')]), chunk(choice({}, "length")), DONE
    ),
    "two choices": stream(
        chunk(choice({"content": "a <"}, index=1)),
        chunk(choice({"content": "b"}), choice({"content": " c"}, index=1)),
        chunk(choice({}, "stop"), choice({}, "stop", index=1)),
        DONE,
    ),
    "near misses": stream(*map(said, ("a <", "|tool", "_call", "> b (no", " cont")), STOP, DONE),
    "a marker in code": stream(*map(said, ("```\n", CALL, "functions.x:0", "\n```")), STOP, DONE),
    "parts": stream(said([{"type": "text", "text": "a <"}]), said([]), STOP, DONE),
    "words after the end": stream(said("a"), STOP, said("<think>"), DONE),
    "content filter": stream(said("a"), chunk(choice({}, "content_filter")), DONE),
}


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("name", ALONE)
def test_a_stream_that_needs_nothing_keeps_its_bytes(name: str, thinks: bool) -> None:
    raw = ALONE[name]
    source = random.Random(0)
    for cuts in ([], range(1, len(raw)), sorted(source.sample(range(1, len(raw)), 9))):
        assert piped(raw, stage(thinks=thinks), cuts) == raw


@pytest.mark.parametrize(
    "raw",
    [
        b'{\n "choices": [{"message" : {"content":"a < b", "role":"assistant"}}],"big":1e400 }\n',
        body(content="Hi.", reasoning_content="Hm.", refusal=None),
        body(content=None, reasoning=None, reasoning_details=[], tool_calls=None),
        body("tool_calls", content=None, tool_calls=[native()]),
        body("length", content=None, tool_calls=[native(arguments='{"a')]),
        body(None, content="Hi."),
        body(content=[{"type": "text", "text": "Hi."}]),
        body(content=f"```\n{CALL}functions.x:0\n```"),
        b'{"error": {"message": "<think>"}}',
        b'{"object": "list", "data": [{"id": "kimi-k2"}]}',
        b'{"choices": [{"text": "<think>"}]}',
        b'{"choices": [null, {"message": null}, {"message": "<think>"}]}',
        b'{"choices": "<think>"}',
        b'[{"choices": []}]',
        b"<think>",
        b"",
    ],
)
def test_a_whole_reply_that_needs_nothing_keeps_its_bytes(raw: bytes) -> None:
    assert whole("x", [stage()], raw) == raw
    assert whole("x", [stage(thinks=True)], raw) == raw


def test_other_models_are_left_alone() -> None:
    one = chunk(choice({"content": f"<think>a</think>{leaked()}"})).replace(MODEL, "gpt-4o")
    raw = stream(one, one, STOP.replace(MODEL, "gpt-4o"), DONE)
    assert piped(raw) == raw
    raw = body(content=f"<think>a</think>{leaked()}").replace(MODEL.encode(), b"gpt-4o")
    assert whole("x", [stage()], raw) == raw


# -- what changes, and what stays around it


def test_a_leaked_call_becomes_one() -> None:
    raw = stream(ROLE, *map(said, f"Sure. {leaked()}"), STOP, DONE)
    assert seen(piped(raw)) == Seen("Sure. ", "", [NOOP], "tool_calls")
    assert mended(content=f"Sure. {leaked()}") == Seen("Sure. ", "", [NOOP], "tool_calls")


def test_a_whole_reply_of_nothing_but_a_call_has_no_content() -> None:
    out = json.loads(whole("x", [stage()], body(content=f"(no content)\n{leaked()}\n")))
    [one] = out["choices"]
    assert one["message"]["content"] is None
    assert "index" not in one["message"]["tool_calls"][0]


def test_a_byte_order_mark_is_no_obstacle() -> None:
    raw = b"\xef\xbb\xbf" + body(content=leaked())
    assert seen_whole(whole("x", [stage()], raw)) == Seen("", "", [NOOP], "tool_calls")
    raw = b"\xef\xbb\xbf" + stream(said(leaked()), STOP)
    assert seen(piped(raw)) == Seen("", "", [NOOP], "tool_calls")


def test_only_what_changes_of_an_event_does() -> None:
    data = (
        '{ "x_groq" : {"id":"é"},"big":12345678901234567890123,"choices":[ {"index":0, '
        '"delta" : {"content":"<think>a</think>b","extra":[1.50]},"finish_reason":null,'
        '"logprobs":{"a": 1e2}} ],"system_fingerprint":"fp" ,"usage":null}'
    )
    [event] = piped(stream(data)).strip().split(b"\n\n")
    text = event.decode()
    assert text.startswith('data: { "x_groq" : {"id":"é"},"big":12345678901234567890123,"choices"')
    assert text.endswith(
        ',"finish_reason":null,"logprobs":{"a": 1e2}} ],"system_fingerprint":"fp" ,"usage":null}'
    )
    delta = json.loads(text.removeprefix("data: "))["choices"][0]["delta"]
    assert delta == {"content": "b", "reasoning_content": "a", "extra": [1.5]}


def test_an_event_keeps_its_type() -> None:
    raw = b"event: chunk\n" + stream(said("<think>a"))
    assert piped(raw).startswith(b"event: chunk\ndata: ")


def test_events_that_say_nothing_any_more_are_left_out() -> None:
    raw = stream(ROLE, *(said(one) for one in ("a", SECTION, CALL, "functions.noop:0")))
    assert [event["choices"][0]["delta"] for event in events(piped(raw))] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
    ]


def test_what_waits_leaves_in_its_order() -> None:
    raw = stream(said("a <|tool")) + b": keep-alive\n\n" + stream(said(""), USAGE, said("_x|> b"))
    assert piped(raw) == raw
    changed = piped(raw + stream(said("<think>c")))
    assert changed.startswith(raw)


def test_what_waits_is_sent_as_soon_as_it_is_text() -> None:
    mend = stage()
    read = SSE()
    held: list[int] = []
    for one in (said("a <"), said("|tool"), said("_x"), said(" b")):
        [event] = read.feed(stream(one))
        held.append(len(list(mend.feed(event))))
    assert held == [0, 0, 3, 1]


def test_text_that_waits_at_the_end_is_sent() -> None:
    raw = stream(said("<think>a</think>b <|tool_"), STOP, DONE)
    assert seen(piped(raw)) == Seen("b <|tool_", "a", [], "stop")


def test_content_that_waits_for_thinking_is_sent_when_a_call_comes() -> None:
    mend = stage(thinks=True)
    [text, call] = SSE().feed(stream(said("a"), said(tool_calls=[native()])))
    assert mend.feed(text) == []
    assert mend.feed(call) == [text, call]


def test_the_finish_comes_after_the_calls_and_usage_last() -> None:
    raw = stream(ROLE, said(f"a{leaked()}"), STOP, USAGE, DONE)
    out = piped(raw)
    shown = [
        "usage"
        if event.get("usage")
        else event["choices"][0]["finish_reason"] or "".join(event["choices"][0]["delta"])
        for event in events(out)
    ]
    assert shown == ["rolecontent", "content", "tool_calls", "tool_calls", "usage"]
    assert out.endswith(stream(USAGE, DONE))


def test_everything_in_one_chunk_comes_in_its_order() -> None:
    one = chunk(
        choice({"role": "assistant", "content": f"<think>t</think>a{leaked()}"}, "stop"),
        usage={"total_tokens": 7},
    )
    out = events(piped(stream(one, DONE)))
    deltas = [event["choices"][0]["delta"] for event in out]
    assert deltas[0] == {"role": "assistant", "content": "a", "reasoning_content": "t"}
    assert [call["id"] for call in deltas[1]["tool_calls"]] == ["functions.noop:0"]
    assert [event.get("usage") for event in out] == [None, None, {"total_tokens": 7}]
    assert [event["choices"][0]["finish_reason"] for event in out] == [None, None, "tool_calls"]


def test_usage_in_the_choice_is_kept() -> None:
    last = chunk(choice({"content": CALL_END}, usage={"total_tokens": 7}))
    [*_, event] = events(piped(stream(said("a"), last)))
    assert event["choices"][0]["usage"] == {"total_tokens": 7}


def test_a_finish_that_is_said_twice_is_mended_twice() -> None:
    again = chunk(choice({"content": ""}, "stop"), usage={"total_tokens": 7})
    out = piped(stream(said(leaked()), STOP, again, DONE))
    assert seen(out).finish == "tool_calls"
    assert events(out)[-1]["usage"] == {"total_tokens": 7}


def test_choices_are_mended_each_for_itself() -> None:
    raw = stream(
        chunk(choice({"content": "<think>"}), choice({"content": SECTION + CALL}, index=1)),
        chunk(choice({"content": "a</think>b"})),
        chunk(choice({"content": f"functions.noop:0{ARGUMENTS}{{}}{CALL_END}"}, index=1)),
        chunk(choice({}, "stop", index=1)),
        chunk(choice({"content": "c <"})),
        chunk(choice({}, "stop")),
        DONE,
    )
    out = piped(raw)
    assert seen(out) == Seen("bc <", "a", [], "stop")
    assert seen(out, 1) == Seen("", "", [("functions.noop:0", "noop", "{}")], "tool_calls")
    both = [
        {"index": at, "message": {"content": text}, "finish_reason": "stop"}
        for at, text in enumerate(("<think>a</think>b", leaked()))
    ]
    out = whole("x", [stage()], json.dumps({"model": MODEL, "choices": both}).encode())
    assert seen_whole(out) == Seen("b", "a", [], "stop")
    assert seen_whole(out, 1) == Seen("", "", [NOOP], "tool_calls")


def test_content_in_parts_stays_in_parts() -> None:
    parts = [{"type": "text", "text": "<think>a</thi"}, {"type": "text", "text": "nk>b"}]
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    out = json.loads(whole("x", [stage()], body(content=[*parts, image])))
    message = out["choices"][0]["message"]
    assert message["content"] == [{"type": "text", "text": "b"}, image]
    assert message["reasoning_content"] == "a"
    [event] = events(piped(stream(said(parts))))
    delta = event["choices"][0]["delta"]
    assert (delta["content"], delta["reasoning_content"]) == ([{"type": "text", "text": "b"}], "a")


# -- thinking


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": "a<think>b"},
        {"reasoning_content": "a<think>b", "reasoning": "a<think>b"},
        {"reasoning_content": "a<think>b", "reasoning": None},
        {"reasoning_content": "", "reasoning": "a<think>b"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "a<think>b"}]},
        {
            "reasoning": "a<think>b",
            "reasoning_details": [
                {"type": "reasoning.encrypted", "data": "x"},
                {"type": "reasoning.text", "text": "a<thi", "signature": "s"},
                {"type": "reasoning.text", "text": "nk>b"},
            ],
        },
    ],
)
def test_each_field_of_thinking_says_the_same(fields: JSON) -> None:
    out = json.loads(whole("x", [stage()], body(content="c", **fields)))["choices"][0]["message"]
    [event] = events(piped(stream(said("c", **fields))))
    for message in (out, event["choices"][0]["delta"]):
        assert (message["content"], message["reasoning_content"]) == ("c", "ab")
        assert message.get("reasoning") in (None, "ab")
        if details := message.get("reasoning_details"):
            assert "".join(one.get("text", "") for one in details) == "ab"
            assert [one.keys() for one in details] == [
                one.keys() for one in fields["reasoning_details"]
            ]


def test_thinking_in_the_content_may_take_several_events() -> None:
    raw = stream(*map(said, ("<think>", "a", "b", "</think>", "c", "d")), STOP, DONE)
    assert seen(piped(raw)) == Seen("cd", "ab", [], "stop")


def test_the_answer_after_a_section_opened_in_vain_comes_at_the_end() -> None:
    raw = stream(said(reasoning_content=f"a{SECTION}"), said("b"), said("c"), STOP, DONE)
    assert seen(piped(raw)) == Seen("bc", "a", [], "stop")


def test_thinking_of_another_field_only_is_said_as_reasoning_content_too() -> None:
    raw = stream(said(reasoning="a"), said(reasoning="b"), said("c"), STOP, DONE)
    assert seen(piped(raw)) == Seen("c", "ab", [], "stop")
    assert mended(reasoning="ab", content="c") == Seen("c", "ab", [], "stop")


def test_a_client_that_reads_another_field_of_thinking_gets_all_of_it() -> None:
    raw = stream(said(reasoning="a <|to"), said("</think>b"), STOP, DONE)
    deltas = [event["choices"][0]["delta"] for event in events(piped(raw))]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "a <|to"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "a <|to"


def test_thinking_and_ids_are_kept_for_the_next_request() -> None:
    mend = stage()
    raw = stream(said(reasoning_content="a"), said(f"<think>b</think>{leaked()}"), STOP, DONE)
    piped(raw, mend)
    [turn] = mend.all_turns
    assert ("".join(turn.reasoning), turn.ids) == ("ab", ["functions.noop:0"])


# -- calls that came as such


def test_calls_that_came_as_such_come_first_and_all_are_numbered() -> None:
    raw = stream(
        said("a" + leaked("functions.read:7", '{"path": "x"}')),
        said(tool_calls=[native(3, "functions.noop:3")]),
        said(tool_calls=[{"index": 3, "function": {"arguments": ""}}, native(5, "c5")]),
        STOP,
        DONE,
    )
    assert seen(piped(raw)) == Seen(
        "a",
        "",
        [
            ("functions.noop:3", "noop", "{}"),
            ("c5", "noop", "{}"),
            ("functions.read:7", "read", '{"path": "x"}'),
        ],
        "tool_calls",
    )


def test_ids_are_made_and_repeated_ones_are_changed() -> None:
    calls = [native(0, ""), native(1, None), native(2, "x"), native(3, "x"), native(4, "noop:1")]
    text = leaked("noop:1") + leaked("noop:1") + leaked("noop:2") + leaked("toolu_1", "{}")
    whole_reply = mended(content=text, tool_calls=calls)
    streamed = seen(
        piped(stream(*(said(tool_calls=[call]) for call in calls), said(text), STOP, DONE))
    )
    assert [id for id, _, _ in whole_reply.calls] == [
        *("functions.noop:0", "functions.noop:1", "x", "x-2", "noop:1"),
        *("noop:3", "noop:4", "noop:2"),
    ]
    assert streamed.calls == whole_reply.calls


def test_many_calls_of_one_id_take_no_long_time() -> None:
    got = mended(content=SECTION + leaked() * 5000)
    assert len({id for id, _, _ in got.calls}) == 5000


@pytest.mark.parametrize(
    ("leaks", "arguments"),
    [
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}'),
        ('{"a": "é"}', '{"a":"\\u00e9"}'),
        ("{}", ""),
        ("", "{}"),
        ('{"a": b}', ' {"a": b} '),
        ('{"a": {"b": 1}}', {"a": {"b": 1}}),
    ],
)
def test_a_copy_of_a_call_that_came_as_such_is_dropped(leaks: str, arguments: Any) -> None:
    calls = [native(0, "c1", arguments=arguments), native(1, "c2", arguments=arguments)]
    text = f"a{leaked(arguments=leaks)}"
    expected = arguments if isinstance(arguments, str) else '{"a":{"b":1}}'
    both = [("c1", "noop", expected), ("c2", "noop", expected)]
    assert mended(content=text, tool_calls=calls) == Seen("a", "", both, "tool_calls")
    for order in ((said(text), said(tool_calls=calls)), (said(tool_calls=calls), said(text))):
        assert seen(piped(stream(*order, STOP, DONE))) == Seen("a", "", both, "tool_calls")


def test_other_calls_are_no_copies() -> None:
    calls = [native(arguments='{"k": 2}'), native(1, "c2", "read", '{"k": 1}')]
    got = mended(content=leaked(), tool_calls=calls)
    assert [name for _, name, _ in got.calls] == ["noop", "read", "noop"]


def test_calls_without_an_index_or_all_with_the_same_are_told_apart() -> None:
    calls = [native(None, "a"), native(None, "b", arguments='{"k"'), native(None, "c")]
    rest = {"index": None, "function": {"arguments": ": 1}"}}
    raw = stream(*(said(tool_calls=[call]) for call in calls[:2]), said(tool_calls=[rest]), STOP)
    assert seen(piped(raw)).calls == [("a", "noop", "{}"), ("b", "noop", '{"k": 1}')]
    raw = stream(said(tool_calls=[{**call, "index": 0} for call in calls[::2]]), STOP, DONE)
    assert [id for id, _, _ in seen(piped(raw)).calls] == ["a", "c"]


def test_odd_pieces_of_calls_pass() -> None:
    odd = [None, "x", {}, {"index": 0}, {"index": 0, "function": {"arguments": "{}"}}]
    raw = stream(said(tool_calls=odd), STOP, DONE)
    assert piped(raw) == raw
    raw = body("tool_calls", tool_calls=odd)
    assert whole("x", [stage()], raw) == raw


@pytest.mark.parametrize(
    ("name", "arguments", "tools", "expected"),
    [
        ("functions.read:0", '{"path": "x"}', TOOLS, "read"),
        ("Read", "{}", TOOLS, "read"),
        ("15", '{"path": "x"}', TOOLS, "read"),
        (15, '{"path": "x"}', TOOLS, "read"),
        ("15", '{"path": "x", "name": "y"}', TOOLS, "15"),
        (15, "{", TOOLS, "15"),
        ("15", "", {"read": READ}, "read"),
        ("other", '{"path": "x"}', TOOLS, "other"),
        ("15", "{}", {"15": None, "read": READ}, "15"),
    ],
)
def test_a_name_that_is_none_is_mended(
    name: Any, arguments: str, tools: JSON, expected: str
) -> None:
    first, rest = arguments[:3], arguments[3:]
    calls = [
        [native(0, "c1", name, first), native(1, "c2", "noop")],
        [{"index": 0, "function": {"arguments": rest}}],
    ]
    raw = stream(ROLE, *(said(tool_calls=some) for some in calls), STOP, DONE)
    got = seen_in_any_order(piped(raw, stage(tools=tools)))
    assert got == [("c1", expected, arguments), ("c2", "noop", "{}")]
    of = stage(tools=tools)
    got = mended(of, tool_calls=[native(0, "c1", name, arguments), native(1, "c2", "noop")]).calls
    assert got == [("c1", expected, arguments), ("c2", "noop", "{}")]


def seen_in_any_order(raw: bytes) -> list[tuple[str, str, str]]:
    """Return the calls by their index: one may wait for its name while others pass."""
    calls: dict[int, list[str]] = {}
    for event in events(raw):
        for call in event["choices"][0]["delta"].get("tool_calls") or ():
            if call["index"] not in calls:
                calls[call["index"]] = [call["id"], call["function"]["name"], ""]
            calls[call["index"]][2] += call["function"].get("arguments") or ""
    assert sorted(calls) == list(range(len(calls)))
    return [(calls[at][0], calls[at][1], calls[at][2]) for at in sorted(calls)]


# -- how it ends


@pytest.mark.parametrize(
    ("came", "leaves"),
    [
        ("stop", "tool_calls"),
        (None, "tool_calls"),
        ("", "tool_calls"),
        ("tool_calls", "tool_calls"),
        ("length", "length"),
        ("content_filter", "content_filter"),
    ],
)
@pytest.mark.parametrize("as_such", [False, True])
def test_the_reason_to_finish_fits_the_calls(came: Any, leaves: str, as_such: bool) -> None:
    message: JSON = {"tool_calls": [native()]} if as_such else {"content": leaked()}
    assert mended(finish=came, **message).finish == leaves
    raw = stream(ROLE, said(**message), chunk(choice({}, came)), DONE)
    assert seen(piped(raw)).finish == leaves


@pytest.mark.parametrize("came", ["stop", "length", None])
def test_the_reason_to_finish_stays_without_calls(came: Any) -> None:
    assert mended(finish=came, content="<think>a</think>b").finish == came
    raw = stream(said("<think>a</think>b"), chunk(choice({}, came)), DONE)
    assert seen(piped(raw)).finish == came


def test_a_call_cut_by_the_limit_keeps_what_came_of_it() -> None:
    text = f'a{SECTION}{CALL}functions.noop:0{ARGUMENTS}{{"k": "va'
    expected = Seen("a", "", [("functions.noop:0", "noop", '{"k": "va')], "length")
    assert mended(finish="length", content=text) == expected
    assert seen(piped(stream(*map(said, text), chunk(choice({}, "length")), DONE))) == expected


@pytest.mark.parametrize("last", [[], [DONE]])
def test_a_stream_that_does_not_say_why_it_ends(last: list[str]) -> None:
    raw = stream(ROLE, said(f"a{leaked()}"), *last)
    assert seen(piped(raw)) == Seen("a", "", [NOOP], "tool_calls")
    raw = stream(ROLE, said("a <"), *last)
    assert piped(raw) == raw
    raw = stream(ROLE, said(tool_calls=[native()]), *last)
    assert seen(piped(raw)).finish == "tool_calls"


def test_a_stream_that_breaks_off_within_a_call_does_not_end_with_it() -> None:
    text = f'a{SECTION}{CALL}functions.noop:0{ARGUMENTS}{{"k": "va'
    got = seen(piped(stream(ROLE, said(text))))
    assert (got.content, got.finish) == ("a", None)
    raw = stream(ROLE, said(tool_calls=[native(arguments='{"k')]))
    assert piped(raw) == raw


def test_what_is_added_at_the_end_stands_apart_from_an_event_that_has_lost_its_own() -> None:
    raw = stream(said(tool_calls=[native()]))
    for end in (b"\n", b"", b"\r"):
        assert seen(piped(raw.rstrip() + end)).finish == "tool_calls"
    torn = stream(said(leaked())) + b'data: {"id": "chat'
    out = piped(torn)
    assert seen(out.removesuffix(b'data: {"id": "chat')) == Seen("", "", [NOOP], "tool_calls")


def test_an_event_too_large_to_be_read_passes_in_its_pieces() -> None:
    raw = stream(said("a"), said("b" * 5000), said("c"), STOP, DONE)
    mend, read = stage(), SSE(max_bytes=1000)
    out = b""
    for at in range(0, len(raw), 100):
        out += b"".join(
            out.raw for event in read.feed(raw[at : at + 100]) for out in mend.feed(event)
        )
    assert out == raw


def test_an_error_ends_what_was_said_before() -> None:
    error = '{"error": {"message": "overloaded"}}'
    out = piped(stream(ROLE, said("<think>a</think>b <|to"), error))
    assert seen(out) == Seen("b <|to", "a", [], None)
    assert out.endswith(stream(error))
    assert seen(piped(stream(said(leaked()), error))).finish is None


EVERYTHING = b": hello\r\n\r\n" + stream(
    ROLE,
    said("(no content)"),
    said(reasoning_content="Hm. <th"),
    said(reasoning_content="ink>é🏠"),
    said("<think>a</think>b `x` < c"),
    said(tool_calls=[native(2, "", "15", '{"path"')]),
    said(tool_calls=[{"index": 2, "function": {"arguments": ': "x"}'}}]),
    *map(said, leaked("functions.noop:7")),
    said("d"),
    chunk(choice({"content": "<|im_end|>"}, "stop"), usage={"total_tokens": 7}),
    USAGE,
    DONE,
)


def test_a_stream_may_be_cut_anywhere() -> None:
    source = random.Random(0)
    expected = Seen(
        "b `x` < cd",
        "Hm. é🏠a",
        [
            ("functions.15:0", "read", '{"path": "x"}'),
            ("functions.noop:7", "noop", '{"k": 1}'),
        ],
        "tool_calls",
    )
    for thinks in (False, True):
        for cuts in ([], range(1, len(EVERYTHING)), source.sample(range(len(EVERYTHING)), 20)):
            assert seen(piped(EVERYTHING, stage(thinks=thinks), sorted(cuts))) == expected
    for end in range(0, len(EVERYTHING), 89):
        out = piped(EVERYTHING[:end])
        got = seen(out[: out.rfind(b"\n\n") + 2])
        for all, part in (
            (expected.content, got.content),
            (expected.reasoning, got.reasoning),
        ):
            assert all.startswith(re.sub(r"<[^ ]*$", "", part))  # it may end with half a marker


class Failing(K2):
    """Fails on a word, as a mistake of ours would."""

    def feed(self, channel: Channel, text: str) -> None:
        if "boom" in text:
            raise RuntimeError("boom")
        super().feed(channel, text)

    def passes(self, channel: Channel, text: str) -> bool:
        if "boom" in text:
            raise RuntimeError("boom")
        return super().passes(channel, text)


def failing(*, thinks: bool = False) -> MendChat:
    return MendChat(lambda model: Failing(Tools(TOOLS), undecided=thinks))


@pytest.mark.parametrize("thinks", [False, True])
def test_when_mending_fails_all_passes_as_it_came(thinks: bool) -> None:
    raw = stream(said("a"), said(" <|tool"), USAGE, said("boom"), said(leaked()), STOP, DONE)
    for cuts in ([], range(1, len(raw))):
        assert piped(raw, failing(thinks=thinks), cuts) == raw
    assert whole("x", [failing()], body(content=f"boom {leaked()}")) == body(
        content=f"boom {leaked()}"
    )


def test_when_mending_fails_after_a_change_the_rest_passes_as_it_came() -> None:
    rest = stream(said("boom"), said("<think>"), STOP, DONE)
    out = piped(stream(said("<think>a</think>b")) + rest, failing())
    assert out.endswith(rest)
    assert seen(out).content == "bboom<think>"


# -- streamed and whole

WORDS = (
    *("a", "b ", "\n", "é", "<", "<|", "(no content)", "`", "```\n", "<|im_end|>", "<|tool_"),
    *("<think>", "</think>", SECTION, SECTION_END, CALL, CALL_END, ARGUMENTS, "functions.noop:0"),
    *(leaked(), leaked("functions.read:1", '{"path": "x"}'), leaked("7"), leaked(arguments="{")),
    *("noop:1", '{"a": "', '"}'),
)
SAID = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(("c1", "", "functions.noop:0")),
        st.sampled_from(("noop", "functions.read:0", "7")),
        st.sampled_from(("{}", '{"k": 1}', '{"path": "x"}', '{"a')),
    ),
    max_size=3,
).map(lambda calls: [native(at, *call) for at, call in enumerate(calls)])


ODD = st.sampled_from(
    (
        *(None, True, 0, 1.5, 10**30, "", "x", "<think>a", leaked(), [], {}, [None], ["x"], [1]),
        *({"a": 1}, [{"text": "<think>"}], [{"text": 5}], {"index": "x"}, {"content": leaked()}),
        *([{"type": "reasoning.text", "text": "a<think>"}], [{"type": "reasoning.text"}]),
        *([native()], [native(None, None, None, None)], [native([], {}, [], {})]),
    )
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": ODD,
        "content": ODD,
        "reasoning_content": ODD,
        "reasoning": ODD,
        "reasoning_details": ODD,
        "tool_calls": ODD,
    },
)
CHOICE = st.fixed_dictionaries(
    {},
    optional={
        "index": st.sampled_from((0, 1, None, "0", True, -1)),
        "delta": MESSAGE | ODD,
        "message": MESSAGE | ODD,
        "finish_reason": st.sampled_from(("stop", "length")) | ODD,
    },
)
PAYLOAD = st.fixed_dictionaries(
    {"choices": st.lists(CHOICE | ODD, max_size=3) | ODD},
    optional={"model": ODD, "usage": ODD, "error": ODD},
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PAYLOAD, max_size=5), st.booleans())
def test_no_reply_is_too_odd(payloads: list[JSON], thinks: bool) -> None:
    data = [json.dumps(payload) for payload in payloads]
    mend, read = stage(thinks=thinks), SSE()
    out = [out for event in read.feed(stream(*data, DONE)) for out in mend.feed(event)]
    out += mend.end()
    assert out[-1].data == DONE.encode()
    events(b"".join(event.raw for event in out))
    for one in data:
        [event] = stage(thinks=thinks).feed(Event(one.encode(), one.encode(), "body"))
        json.loads(event.data)


def deltas(source: random.Random, key: str, text: str) -> Iterable[JSON]:
    at = 0
    while at < len(text):
        length = source.choice((0, 1, 2, 5, 30))
        yield {key: text[at : at + length]}
        at += length
        if source.random() < 0.1:
            yield {"content": None, "tool_calls": None}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    SAID,
    SAID,
    CALLS,
    st.sampled_from(("stop", "length", "tool_calls", None)),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_a_streamed_reply_is_the_whole_one(
    thought: str,
    text: str,
    calls: list[JSON],
    finish: str | None,
    source: random.Random,
    thinks: bool,
) -> None:
    message = {"reasoning_content": thought, "content": text, "tool_calls": calls}
    came = body(finish, **message)
    out = whole("x", [stage(thinks=thinks)], came)
    sent = [
        *deltas(source, "reasoning_content", thought),
        *deltas(source, "content", text),
        *({"tool_calls": [call]} for call in calls),
    ]
    raw = stream(ROLE, *(chunk(choice(delta)) for delta in sent), chunk(choice({}, finish)), DONE)
    streamed = piped(raw, stage(thinks=thinks))
    expected = seen_whole(out)
    got = Seen(calls=seen_in_any_order(streamed), finish=None)
    for event in events(streamed):
        [one] = event["choices"]
        got.content += one["delta"].get("content") or ""
        got.reasoning += one["delta"].get("reasoning_content") or ""
        got.finish = one["finish_reason"] or got.finish
    if not expected.content:  # nothing but white space next to calls is none
        got.content = got.content.strip()
    assert got == expected
    if all(call["function"]["name"] != "7" for call in calls):  # it waits for its arguments
        assert (out == came) == (streamed == raw)


def test_a_call_found_gets_an_id_that_the_conversation_has_not_used() -> None:
    def scanner(model: str) -> Scanner:
        made = K2(Tools(TOOLS))
        made.earlier = lambda: ["functions.noop:0", "functions.noop:1"]
        return made

    out = whole("x", [MendChat(scanner)], body(content=leaked()))
    (call,) = json.loads(out)["choices"][0]["message"]["tool_calls"]
    assert call["id"] == "functions.noop:2"


WHO = (
    *('{"role":"assistant"}', '{"role":"assistant","content":""}', '{"role": "assistant"}'),
    *('{"role":"assistant","content":null,"reasoning_content":""}', '{"content":"Hi"}', "{}"),
    *('{"role":"assistant","content":"<|tool"}', '{"role":"assistant","tool_calls":[]}'),
)


@pytest.mark.parametrize("delta", WHO)
@pytest.mark.parametrize("finish", ["", ',"finish_reason":null', ',"finish_reason":"stop"'])
@pytest.mark.parametrize("usage", ["", ',"usage":null', ',"usage":{"prompt_tokens":1}'])
def test_what_is_let_pass_at_a_glance_would_have_passed(
    delta: str, finish: str, usage: str
) -> None:
    choice = f'{{"index":0,"delta":{delta}{finish}}}'
    raw = f'data: {{"id":"x","model":"kimi-k2","choices":[{choice}]{usage}}}\n\n'.encode()
    stage = MendChat(lambda model: K2(Tools({})))
    says_who = delta in WHO[:4] and "stop" not in finish and "tokens" not in usage
    assert stage.lets_pass(raw) == says_who
    assert not stage.lets_pass(raw[:-1])
    assert not stage.lets_pass(raw + raw)
    if says_who:
        (event,) = SSE().feed(raw)
        assert [out.raw for out in stage.feed(event)] == [raw]
        assert not stage.turns
