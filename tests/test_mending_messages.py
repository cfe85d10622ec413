"""Mended replies in Anthropic's shape: the same blocks whole and streamed, however they are cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_core.exchange import Mend
from kimi_core.markup import GRAMMARS, Scanner, Tools
from kimi_core.markup.scanner import Channel
from kimi_core.mending.messages import MendMessages
from kimi_core.sse import SSE, Event

Block = dict[str, Any]
Cut = Literal["block", "character"] | Sequence[int]

READ = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
TOOLS = {"read": READ, "bash": None}

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


def call(name: str = "read", number: int = 0, arguments: str = '{"path": "a.py"}') -> str:
    return (
        f"<|tool_call_begin|>functions.{name}:{number}"
        f"<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
    )


def leak(*calls: str) -> str:
    return BEGIN + "".join(calls or (call(),)) + END


def text(said: str, **more: Any) -> Block:
    return {"type": "text", "text": said, **more}


def thinking(said: str, signature: str = "c2ln") -> Block:
    return {"type": "thinking", "thinking": said, "signature": signature}


def tool_use(id: str = "toolu_1", name: str = "read", input: Any = None) -> Block:
    return {"type": "tool_use", "id": id, "name": name, "input": input or {}}


SEARCH: tuple[Block, ...] = (
    {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "q"}},
    {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
)
FOUND = tool_use("kimi_functions-2eread-3a0", "read", {"path": "a.py"})


# --- a reply, whole and streamed ---------------------------------------------------------


def stage(*, thinks: bool = False, grammar: str = "kimi-k2") -> MendMessages:
    return MendMessages(lambda model: GRAMMARS[grammar](Tools(TOOLS), undecided=thinks))


def body(*blocks: Any, stop: str | None = "end_turn") -> Event:
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "kimi-for-coding",
        "content": blocks,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": 9, "output_tokens": 5},
    }
    data = json.dumps(message).encode()
    return Event(data, data, "body")


def event(type: str, newline: str = "\n", **fields: Any) -> Event:
    data = json.dumps({"type": type, **fields})
    return Event(
        data.encode(), f"event: {type}{newline}data: {data}{newline}{newline}".encode(), type
    )


PING = event("ping")
COMMENT = Event(b"", b": keep-alive\r\n\r\n")


def opening(model: str = "kimi-for-coding") -> Event:
    usage = {"input_tokens": 9, "output_tokens": 1}
    return event("message_start", message={"model": model, "content": [], "usage": usage})


def start(index: int, block: Block) -> Event:
    return event("content_block_start", index=index, content_block=block)


def delta(index: int, type: str, **fields: Any) -> Event:
    return event("content_block_delta", index=index, delta={"type": type, **fields})


def said(index: int, text: str) -> Event:
    return delta(index, "text_delta", text=text)


def stop(index: int) -> Event:
    return event("content_block_stop", index=index)


def closing(reason: str | None = "end_turn") -> list[Event]:
    why = {"stop_reason": reason, "stop_sequence": None}
    return [
        event("message_delta", delta=why, usage={"output_tokens": 5}),
        event("message_stop"),
    ]


def pieces(said: str, cut: Cut) -> list[str]:
    if cut == "block":
        return [said]
    if cut == "character":
        return list(said)
    points = sorted({point % (len(said) + 1) for point in cut if isinstance(point, int)})
    return [said[a:b] for a, b in pairwise([0, *points, len(said)])]


def events(*blocks: Block, stop_reason: str | None = "end_turn", cut: Cut = "block") -> list[Event]:
    """Return a stream as Anthropic's endpoint would send it."""
    return [opening(), *_block_events(blocks, cut), *closing(stop_reason)]


def _block_events(blocks: Iterable[Block], cut: Cut) -> Iterator[Event]:
    for index, block in enumerate(blocks):
        kind = block["type"]
        if kind in ("text", "thinking"):
            beside = {"signature": ""} if kind == "thinking" else {}
            yield start(index, {**block, kind: "", **beside, **_uncited(block)})
            if index == 0:
                yield PING
            for piece in pieces(block[kind], cut):
                yield delta(index, f"{kind}_delta", **{kind: piece})
            for citation in block.get("citations") or ():
                yield delta(index, "citations_delta", citation=citation)
            if signature := block.get("signature"):
                yield delta(index, "signature_delta", signature=signature)
        elif "input" in block:
            yield start(index, {**block, "input": {}})
            for piece in pieces(json.dumps(block["input"]), cut):
                yield delta(index, "input_json_delta", partial_json=piece)
        else:
            yield start(index, block)
        yield stop(index)


def _uncited(block: Block) -> Block:
    return {"citations": []} if "citations" in block else {}


@dataclass
class Message:
    """A reply as a client puts it together."""

    content: list[Block]
    stop_reason: str | None
    usage: Any


def run(mend: MendMessages, given: Iterable[Event]) -> list[Event]:
    out = [one for event in given for one in mend.feed(event)]
    return [*out, *mend.end()]


def put_together(given: Iterable[Event], *, cut_off: bool = False) -> Message:
    """Read a stream, and insist on its form."""
    message = Message([], None, None)
    inputs: dict[int, str] = {}
    opened = -1
    for one in given:
        payload = json.loads(one.data) if one.data else {}
        block = message.content[opened] if opened >= 0 else {}
        match payload.get("type"):
            case "content_block_start":
                assert (opened, payload["index"]) == (-1, len(message.content))
                opened = payload["index"]
                message.content.append(dict(payload["content_block"]))
            case "content_block_delta":
                assert payload["index"] == opened
                what = payload["delta"]
                match what["type"]:
                    case "text_delta" | "thinking_delta":
                        block[block["type"]] += what[block["type"]]
                    case "signature_delta":
                        block["signature"] = what["signature"]
                    case "citations_delta":
                        block["citations"] = [*block.get("citations", ()), what["citation"]]
                    case "input_json_delta":
                        inputs[opened] = inputs.get(opened, "") + what["partial_json"]
            case "content_block_stop":
                assert payload["index"] == opened
                if opened in inputs and not cut_off:
                    block["input"] = json.loads(inputs[opened])
                opened = -1
            case "message_delta":
                message.stop_reason = payload["delta"]["stop_reason"]
                message.usage = payload["usage"]
    assert opened < 0 or cut_off
    return message


@dataclass(frozen=True)
class Mended:
    content: list[Block]
    stop_reason: str | None
    mends: list[Mend]

    @property
    def kinds(self) -> list[str]:
        return [mend.kind for mend in self.mends]


Ask = Callable[..., Mended]


@pytest.fixture(params=["whole", "block", "character"])
def mended(request: pytest.FixtureRequest) -> Ask:
    """Mend a reply of blocks, in each way in which it may come."""

    def ask(
        *blocks: Block,
        stop: str | None = "end_turn",
        thinks: bool = False,
        grammar: str = "kimi-k2",
    ) -> Mended:
        mend = stage(thinks=thinks, grammar=grammar)
        if request.param == "whole":
            [out] = run(mend, [body(*blocks, stop=stop)])
            found = json.loads(out.data)
            message = Message(found["content"], found["stop_reason"], found["usage"])
        else:
            message = put_together(run(mend, events(*blocks, stop_reason=stop, cut=request.param)))
        assert message.usage["output_tokens"] == 5
        assert mend.turn is not None
        return Mended(message.content, message.stop_reason, mend.turn.scanner.mends)

    return ask


# --- calls


def test_a_call_in_the_text_becomes_a_tool_use_block(mended: Ask) -> None:
    got = mended(text(f"I'll look.{leak()}"))
    assert got.content == [text("I'll look."), FOUND]
    assert got.stop_reason == "tool_use"
    assert got.kinds == ["tool_call"]


def test_a_call_in_the_thinking_leaves_the_signature_as_it_came(mended: Ask) -> None:
    got = mended(thinking(f"Read it.{leak()}"), text("I'll look."))
    assert got.content == [thinking("Read it."), text("I'll look."), FOUND]
    assert got.stop_reason == "tool_use"


def test_thinking_that_was_nothing_but_a_call_leaves_no_block(mended: Ask) -> None:
    assert mended(thinking(leak()), text("So.")).content == [text("So."), FOUND]


def test_a_call_may_begin_in_the_thinking_and_go_on_in_the_text(mended: Ask) -> None:
    head, tail = leak()[:50], leak()[50:]
    got = mended(thinking(f"Read it.{head}"), text(f"{tail}I'll look."))
    assert got.content == [thinking("Read it."), text("I'll look."), FOUND]


def test_calls_found_come_last_those_of_the_thinking_first(mended: Ask) -> None:
    native = tool_use("toolu_1", "bash", {"command": "ls"})
    in_thought, in_text = call("bash", 0, '{"command": "pwd"}'), call("read", 1)
    got = mended(thinking(f"Hm.{in_thought}"), text(f"So.{in_text}"), native, stop="tool_use")
    assert [(block["type"], block.get("id")) for block in got.content] == [
        ("thinking", None),
        ("text", None),
        ("tool_use", "toolu_1"),
        ("tool_use", "kimi_functions-2ebash-3a0"),
        ("tool_use", "kimi_functions-2eread-3a1"),
    ]
    assert got.stop_reason == "tool_use"


def test_a_call_that_also_came_as_such_is_made_once(mended: Ask) -> None:
    native = tool_use("toolu_1", "read", {"path": "a.py"})
    assert mended(text(f"So.{leak()}"), native).content == [text("So."), native]
    bare = tool_use("toolu_1", "bash")
    assert mended(text(f"So.{call('bash', 0, '{}')}"), bare).content == [text("So."), bare]


@pytest.mark.parametrize("arguments", ['{"path": "a.p', "[1]", '"a.py"', "a.py"])
def test_an_input_is_an_object_whatever_the_arguments_are(mended: Ask, arguments: str) -> None:
    got = mended(text(call(arguments=arguments)))
    assert got.content[0]["input"] == {"_raw": arguments}


def test_a_reply_cut_by_its_limit_keeps_its_stop_reason(mended: Ask) -> None:
    got = mended(text(f"So.{leak()[:-50]}"), stop="max_tokens")
    assert got.stop_reason == "max_tokens"
    assert [block["type"] for block in got.content] == ["text", "tool_use"]


@pytest.mark.parametrize("reason", [None, "end_turn", "stop_sequence", "stop"])
def test_a_turn_that_ends_in_calls_says_so(mended: Ask, reason: str | None) -> None:
    native = tool_use("toolu_1", "read", {"path": "a.py"})
    got = mended(native, stop=reason)
    assert (got.content, got.stop_reason) == ([native], "tool_use")
    assert got.kinds == ["finish_reason"]
    assert mended(text(leak()), stop=reason).stop_reason == "tool_use"


@pytest.mark.parametrize(
    "reason", ["max_tokens", "refusal", "pause_turn", "model_context_window_exceeded"]
)
def test_any_other_stop_reason_stays(mended: Ask, reason: str) -> None:
    assert mended(text(f"So.{leak()}"), stop=reason).stop_reason == reason


# --- ids and names of calls that came as such


def test_ids_that_came_stay_unless_they_are_repeated_or_missing(mended: Ask) -> None:
    given = [tool_use(id, "bash", {"command": id}) for id in ("functions.bash:0", "x-1", "x-1", "")]
    got = mended(*given)
    assert got.content[:2] == given[:2]
    ids = [block["id"] for block in got.content]
    assert len(set(ids)) == 4
    assert all(id.replace("-", "").replace("_", "").isalnum() for id in ids[2:])
    assert [block["input"] for block in got.content] == [block["input"] for block in given]


def test_an_id_that_was_found_is_unlike_those_that_came(mended: Ask) -> None:
    native = tool_use(FOUND["id"], "bash", {"command": "ls"})
    got = mended(text(f"So.{leak()}"), native)
    ids = [block["id"] for block in got.content[1:]]
    assert ids[0] == FOUND["id"]
    assert ids[1] != ids[0]
    made = mended(tool_use("", "read"), tool_use(FOUND["id"], "bash")).content
    assert made[0]["id"] != made[1]["id"]


def test_a_name_with_what_belongs_to_its_id_is_repaired(mended: Ask) -> None:
    got = mended(tool_use("toolu_1", "functions.read:3", {"path": "a.py"}), stop="tool_use")
    assert got.content == [tool_use("toolu_1", "read", {"path": "a.py"})]
    assert got.kinds == ["name"]


# --- thinking, placeholders, dumps


def test_thinking_in_the_text_becomes_a_block_before_the_text(mended: Ask) -> None:
    got = mended(text("<think>Hm.</think>So."))
    assert got.content == [thinking("Hm.", ""), text("So.")]
    assert got.stop_reason == "end_turn"


def test_a_closing_tag_alone_ends_the_thinking_of_a_model_that_thinks(mended: Ask) -> None:
    got = mended(text(f"Hm.</think>So.{leak()}"), thinks=True)
    assert got.content == [thinking("Hm.", ""), text("So."), FOUND]


def test_an_empty_block_does_not_end_the_wait_for_a_closing_tag(mended: Ask) -> None:
    got = mended(thinking("", ""), text("Hm.</think>So."), thinks=True)
    assert got.content[-2:] == [thinking("Hm.", ""), text("So.")]


def test_no_thinking_follows_a_call(mended: Ask) -> None:
    got = mended(tool_use("toolu_1", "bash"), text("Hm.</think>So."), thinks=True, stop="tool_use")
    assert got.content == [tool_use("toolu_1", "bash"), text("Hm.So.")]


def test_blocks_of_white_space_are_never_made(mended: Ask) -> None:
    got = mended(text(f"\n\n{leak()}\n"), text(" "), text(f"So.\n{call('bash', 1, '{}')}\n"))
    assert [block.get("text") for block in got.content] == ["So.\n\n", None, None]
    assert mended(text("<think> </think>\n<think>Hm.</think>")).content == [thinking("Hm.", "")]


def test_thinking_without_words_keeps_its_signature(mended: Ask) -> None:
    got = mended(text("(no content)So."), thinking(""), text("."))
    assert got.content == [text("So."), thinking(""), text(".")]


def test_a_placeholder_for_nothing_is_taken_out(mended: Ask) -> None:
    got = mended(text("(no content)"), text("(no content)So."))
    assert got.content == [text("So.")]
    assert got.kinds == ["placeholder", "placeholder"]
    assert mended(text("(no content)")).content == []


DUMP = "(Empty response: {'thinking': 'Hm.', 'signature': 'c2ln'})"


def test_a_text_that_dumps_an_empty_response_is_suppressed(mended: Ask) -> None:
    got = mended(thinking("Hm."), text(DUMP), tool_use("toolu_1", "bash"), stop="tool_use")
    assert got.content == [thinking("Hm."), tool_use("toolu_1", "bash")]
    assert got.mends == [Mend("dropped", DUMP, "")]


@pytest.mark.parametrize("said", ["(Empty response", "(Empty response: none)", f"Look: {DUMP}"])
def test_a_text_that_only_speaks_of_it_stays(mended: Ask, said: str) -> None:
    got = mended(text(said))
    assert (got.content, got.mends) == ([text(said)], [])


# --- other blocks


def test_other_blocks_keep_their_place_and_are_numbered_anew(mended: Ask) -> None:
    redacted = {"type": "redacted_thinking", "data": "c2VjcmV0"}
    unknown = {"type": "unheard_of", "value": [1]}
    others = (redacted, *SEARCH, unknown)
    got = mended(thinking(leak()), *others, text("So."))
    assert got.content == [*others, text("So."), FOUND]


def test_citations_stay_with_their_text(mended: Ask) -> None:
    cited = text("So it is.", citations=[{"cited_text": "so"}, {"cited_text": "is"}])
    got = mended(text(f"Hm.{leak()}"), cited, {**cited, "text": f"So it is.{call('bash', 1)}"})
    assert got.content[:3] == [text("Hm."), cited, cited]


def test_markup_is_not_put_together_from_two_texts(mended: Ask) -> None:
    given = [text("a <|tool_call"), text(f"_begin|>{call()[len('<|tool_call_begin|>') :]}")]
    got = mended(*given)
    assert got.content[0] == given[0]
    assert got.content[1] == text("_begin|>")
    assert mended(text("<"), text("|im_end|>")).mends == []


def test_other_grammars_are_mended_alike(mended: Ask) -> None:
    tag = "<|open|>{}<|sep|>{}<|close|>{}<|sep|>".format
    argument = tag('argument key="path" type="string"', "a.py", "argument")
    leaked = tag("tools", tag('call tool="read" index="1"', argument, "call"), "tools")
    got = mended(text(f"So.{leaked}"), grammar="kimi-k3")
    assert got.content[0] == text("So.")
    assert got.content[1]["input"] == {"path": "a.py"}


# --- what needs no change leaves byte for byte

NEAR_MISSES = (
    "a < b",
    "<|tool_calls",
    "<|tool_call_begin",
    "f(x) and functions.",
    "read:0",
    "`<|tool_call_begin|>` begins a call",
    "(no content) is a placeholder"[1:],
    "```\n<think>\n```\n",
    "(no",
    "é漢🎉 \\u00e9 \"'",
    "\n",
    "",
)


@pytest.mark.parametrize("cut", ["block", "character"])
@pytest.mark.parametrize("near", NEAR_MISSES)
@pytest.mark.parametrize("thinks", [False, True])
def test_a_stream_without_markup_keeps_its_bytes(near: str, thinks: bool, cut: Cut) -> None:
    blocks = [thinking(near), text(near), *SEARCH, tool_use(), text("So."), text(near)]
    plain = events(*blocks, stop_reason="tool_use", cut=cut)
    crlf = [event(newline="\r\n", **json.loads(one.data)) for one in plain]
    given = [one for event in crlf for one in (COMMENT, PING, event)]
    mend = stage(thinks=thinks)
    assert run(mend, given) == given
    assert mend.turn is not None
    assert mend.turn.scanner.changes == 0


@pytest.mark.parametrize("near", NEAR_MISSES)
def test_a_whole_reply_without_markup_keeps_its_bytes(near: str) -> None:
    said = json.dumps([thinking(near), text(near), tool_use()], indent=2)
    data = (
        '\ufeff{ "type" : "message","model":"kimi-k2", "big": 123456789012345678901234567890,\n'
        f'"content":{said}, "stop_reason":"tool_use", "twice": 1, "twice": 1.0e2}}\r\n'
    ).encode()
    given = Event(data, data, "body")
    assert run(stage(), [given]) == [given]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b'"message"',
        b"<html>",
        b'{"type": "error", "error": {"type": "overloaded_error"}}',
        b'{"type": "message", "content": "no list"}',
        b'{"type": "message"}',
        b'{"choices": [{"message": {"content": "<think>"}}]}',
        b'{"type": "message", "content": [{"type": "tool_use", "input": ' + b"[" * 9999 + b"]}]}",
        b'{"type": "message", "content": [' + b'{"a":' * 9999 + b"1" + b"}" * 9999 + b"]}",
    ],
)
def test_a_body_that_is_no_message_passes(data: bytes) -> None:
    given = Event(data, data, "body")
    assert run(stage(), [given]) == [given]


def test_what_is_not_mended_keeps_its_bytes_in_a_mended_body() -> None:
    native = b'{ "type":"tool_use", "id":"toolu_1","name":"bash","input":{"n":1.0e2, "n":1E400}}'
    said = json.dumps(text(f"So.{leak()}")).encode()
    data = b'{"type":"message", "content":[ %b , %b],"usage": {"x": 1.50}}' % (native, said)
    [out] = run(stage(), [Event(data, data, "body")])
    assert native in out.raw
    assert b'"usage": {"x": 1.50}' in out.raw
    assert json.loads(out.raw)["content"][1:] == [text("So."), FOUND]


def test_what_passed_before_the_first_change_keeps_its_bytes() -> None:
    given = events(text("So."), tool_use("toolu_1", "bash"), stop_reason="end_turn")
    out = run(stage(), given)
    changed = [(a, b) for a, b in zip(given, out, strict=True) if a != b]
    [(before, after)] = changed
    assert json.loads(before.data)["delta"]["stop_reason"] == "end_turn"
    assert json.loads(after.data) == {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {"output_tokens": 5},
    }
    assert after.raw == b"event: message_delta\ndata: " + after.data + b"\n\n"


def test_a_reply_that_is_not_to_be_mended_passes() -> None:
    given = events(text(leak()))
    assert run(MendMessages(lambda model: None), given) == given
    assert run(MendMessages(lambda model: None), [body(text(leak()))]) == [body(text(leak()))]


def test_the_model_of_the_reply_may_decide() -> None:
    asked: list[str] = []

    def scanners(model: str) -> Scanner | None:
        asked.append(model)
        return GRAMMARS["kimi-k2"](Tools(TOOLS)) if "kimi" in model else None

    given = [opening("gpt-4o"), *events(text(leak()))[1:]]
    assert run(MendMessages(scanners), given) == given
    out = run(MendMessages(scanners), [opening("kimi-k2"), *given[1:]])
    assert put_together(out).content == [FOUND]
    assert asked == ["gpt-4o", "kimi-k2"]


# --- when things leave


def fed(mend: MendMessages, *given: Event) -> list[list[Event]]:
    return [list(mend.feed(one)) for one in given]


def test_text_leaves_at_once_and_only_what_may_become_markup_waits() -> None:
    given = [opening(), start(0, text("")), said(0, "Well, "), said(0, "a <"), said(0, " c")]
    assert fed(stage(), *given) == [[given[0]], [], given[1:3], [], given[3:]]


def test_text_before_markup_leaves_before_the_markup_is_whole() -> None:
    mend = stage()
    given = [opening(), start(0, text("")), said(0, f"Well.{BEGIN}"), said(0, call()[:30]), PING]
    out = fed(mend, *given)
    assert put_together([one for some in out[:3] for one in some], cut_off=True).content == [
        text("Well.")
    ]
    assert out[3:] == [[], [PING]], "what is no text does not wait for the markup"


def test_thinking_leaves_at_once() -> None:
    given = [opening(), start(0, thinking("", "")), delta(0, "thinking_delta", thinking="Hm, ")]
    assert fed(stage(thinks=True), *given) == [[given[0]], [], given[1:]]


def test_what_comes_while_text_waits_keeps_its_place() -> None:
    given = [opening(), start(0, text("")), said(0, "a <"), PING, COMMENT, said(0, " c"), PING]
    assert fed(stage(), *given) == [[given[0]], [], [], [], [], given[1:6], [PING]]
    out = run(stage(), [*given[:5], said(0, f"|im_end|>{leak()}"), PING, stop(0), *closing()])
    assert out.count(PING) == 2
    assert out.index(COMMENT) > out.index(PING)
    assert put_together(out).content == [text("a "), FOUND]


# --- streams that go wrong


@pytest.mark.parametrize("leaked", [leak(), call(), f"{BEGIN}{call()}"])
def test_before_an_error_goes_what_waited(leaked: str) -> None:
    error = event("error", error={"type": "overloaded_error", "message": "later"})
    given = [opening(), start(0, text("")), said(0, "a <"), error]
    assert run(stage(), given) == given
    out = run(stage(), [*given[:2], said(0, f"So.{leaked}"), error, PING])
    assert out[-2:] == [error, PING]
    assert put_together(out[:-2]).content == [text("So."), FOUND]


def test_a_stream_without_its_last_event_is_whole_all_the_same() -> None:
    out = run(stage(), events(text(f"So.{leak()}"))[:-1])
    message = put_together(out)
    assert (message.content, message.stop_reason) == ([text("So."), FOUND], "tool_use")


def test_a_stream_without_a_stop_reason_gets_one_with_the_usage_that_was_told() -> None:
    given = events(text(f"So.{leak()}"), stop_reason=None)
    for usage, lacking in (
        ({"output_tokens": 5}, given),
        ({"input_tokens": 9, "output_tokens": 1}, given[:-2] + given[-1:]),
    ):
        out = run(stage(), lacking)
        message = put_together(out)
        assert (message.content, message.stop_reason) == ([text("So."), FOUND], "tool_use")
        assert message.usage == usage
        assert out[-1] == given[-1]


def test_usage_that_is_told_on_the_way_does_not_end_the_turn() -> None:
    usage = event("message_delta", delta={}, usage={"output_tokens": 2})
    given = [opening(), start(0, text("")), said(0, "So"), usage, said(0, "."), stop(0), *closing()]
    assert run(stage(), given) == given
    leaked = [*given[:5], said(0, leak()), *given[5:]]
    out = [one for one in run(stage(), leaked) if one is not usage]
    assert put_together(out).content == [text("So."), FOUND]


def test_stops_that_a_host_leaves_out_are_put_in() -> None:
    blocks = (text(leak()), text("So."), thinking("Hm."), SEARCH[0])
    lacking = [one for one in events(*blocks) if b"block_stop" not in one.data]
    message = put_together(run(stage(), lacking))
    assert message.content == [*blocks[1:4], FOUND]


def test_a_stop_that_is_left_out_ends_a_text_all_the_same() -> None:
    given = [
        opening(),
        start(0, text("")),
        said(0, f"{leak()}So <"),
        start(1, tool_use("a", "bash")),
    ]
    message = put_together(run(stage(), [*given, stop(1), *closing()]))
    assert message.content == [text("So <"), tool_use("a", "bash"), FOUND]
    message = put_together(run(stage(), [*given, *closing()]))
    assert message.content == [text("So <"), tool_use("a", "bash"), FOUND]


def test_calls_that_stream_side_by_side_pass() -> None:
    native = [start(n, tool_use(f"t{n}", "bash")) for n in (1, 2)]
    native += [delta(n, "input_json_delta", partial_json="{}") for n in (1, 2)]
    native += [stop(1), stop(2)]
    first = [opening(), start(0, text("")), said(0, leak()), stop(0)]
    out = run(stage(), [*first, *native, *closing()])
    payloads = [json.loads(one.data) for one in out]
    numbers = [payload["index"] for payload in payloads if "index" in payload]
    assert numbers == [0, 1, 0, 1, 0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"{",
        b"null",
        b"[DONE]",
        b'{"type": 5}',
        b'{"type": "unheard_of", "index": 0}',
        b'{"type": "content_block_start"}',
        b'{"type": "content_block_start", "index": 0, "content_block": "text"}',
        b'{"type": "content_block_delta", "index": 7, "delta": {"type": "text_delta"}}',
        b'{"type": "content_block_delta", "index": {}, "delta": {"type": "text_delta"}}',
        b'{"type": "content_block_delta", "index": 0, "delta": [1]}',
        b'{"type": "content_block_stop", "index": [1]}',
        b'{"type": "message_delta", "delta": "end"}',
        b'{"type": "message_start", "message": 1}',
        b"\xff\xfe",
    ],
)
def test_an_event_that_nobody_knows_passes_in_its_place(odd: bytes) -> None:
    unknown = Event(odd, b"data: " + odd + b"\n\n")
    given = [opening(), start(0, text("")), said(0, "a <"), unknown, said(0, "b"), stop(0)]
    assert run(stage(), [*given, *closing()]) == [*given, *closing()]
    out = run(stage(), [*given[:2], said(0, f"a{leak()}"), unknown, *given[4:], *closing()])
    assert out.count(unknown) == 1
    assert put_together(one for one in out if one is not unknown).content == [text("ab"), FOUND]


def test_what_was_sent_as_it_came_is_not_sent_again() -> None:
    cited = delta(0, "citations_delta", citation={"cited_text": "so"})
    given = [opening(), start(0, text("", citations=[])), said(0, "So."), cited, said(0, leak())]
    message = put_together(run(stage(), [*given, stop(0), *closing()]))
    assert message.content == [text("So.", citations=[{"cited_text": "so"}]), FOUND]


def test_a_block_that_was_cut_off_ends_before_what_waited() -> None:
    given = [opening(), start(0, text("")), said(0, f"{BEGIN}Well."), stop(0)]
    out = run(stage(), [*given, start(1, tool_use("a", "bash"))])
    assert put_together(out).content == [tool_use("a", "bash"), text("Well.")]


def test_a_stream_without_a_beginning_is_read_from_its_first_block() -> None:
    out = run(stage(), events(text(f"So.{leak()}"))[1:])
    assert put_together(out).content == [text("So."), FOUND]


class Breaking(GRAMMARS["kimi-k2"]):
    """Fails when it is told to."""

    def feed(self, channel: Channel, text: str) -> None:
        if "fail" in text:
            raise RuntimeError("told to")
        super().feed(channel, text)


def test_what_waited_goes_as_it_came_when_reading_fails() -> None:
    mend = MendMessages(lambda model: Breaking(Tools(TOOLS)))
    given = [opening(), start(0, text("")), said(0, "a <"), PING]
    assert fed(mend, *given)[1:] == [[], [], []]
    with pytest.raises(RuntimeError):
        mend.feed(said(0, "fail"))
    assert list(mend.end()) == given[1:]


def test_the_turn_tells_what_was_thought_before_which_calls() -> None:
    given = events(thinking("Hm. <"), text(f"So.{leak()}"), tool_use("toolu_1", "bash"))
    for mend, replies in (
        (stage(), given),
        (stage(), [body(thinking("Hm. <"), text(f"So.{leak()}"), tool_use("toolu_1", "bash"))]),
    ):
        run(mend, replies)
        [turn] = mend.all_turns
        assert "".join(turn.reasoning) == "Hm. <"
        assert turn.ids == ["toolu_1", "functions.read:0"]


# --- whatever comes

LEAKS = (
    BEGIN,
    END,
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "functions.read:0",
    "bash:2",
    '{"path": "a"}',
    '{"path": "b<|tool_call_end|>"}',
    '{"pa',
    leak(),
    call("bash", 1, "{}"),
    "<|im_end|>",
    "<think>",
    "</think>",
    "(no content)",
    DUMP,
    "(Empty",
    "`",
    "```\n",
    "\n",
    "<",
    "<|",
    "f",
    "Well, ",
    "é🎉",
    "\ud83d",
)
LEAKING = st.lists(st.sampled_from(LEAKS), max_size=6).map("".join)
TEXT = st.builds(text, LEAKING)
NATIVE = st.builds(
    tool_use,
    st.sampled_from(["toolu_1", "toolu_2", "functions.read:0", FOUND["id"], ""]),
    st.sampled_from(["read", "Read", "functions.bash:0"]),
    st.sampled_from([{}, {"path": "a"}]),
)
BLOCKS = st.lists(
    st.one_of(
        TEXT,
        TEXT,
        st.builds(thinking, LEAKING, st.sampled_from(["", "c2ln"])),
        NATIVE,
        st.just({"type": "redacted_thinking", "data": "c2VjcmV0"}),
        st.just(SEARCH[0]),
    ),
    max_size=4,
)
CUTS: st.SearchStrategy[Any] = st.just("character") | st.lists(st.integers(0, 300), max_size=9)
REASONS = st.sampled_from(["end_turn", "max_tokens", "tool_use", None])
_THOROUGHLY = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@given(BLOCKS, REASONS, CUTS, st.booleans())
@_THOROUGHLY
def test_a_stream_says_what_the_whole_reply_says_however_it_is_cut(
    blocks: list[Block], reason: str | None, cut: Cut, thinks: bool
) -> None:
    whole, streamed = stage(thinks=thinks), stage(thinks=thinks)
    reply, given = body(*blocks, stop=reason), events(*blocks, stop_reason=reason, cut=cut)
    [mended_reply] = run(whole, [reply])
    out = run(streamed, given)
    message, expected = put_together(out), json.loads(mended_reply.data)
    assert message.content == expected["content"]
    assert message.stop_reason == expected["stop_reason"]
    assert whole.turn is not None
    assert streamed.turn is not None
    assert streamed.turn.scanner.mends == whole.turn.scanner.mends
    if not whole.turn.scanner.changes:
        assert mended_reply is reply
        assert out == given
    else:
        ids = [block["id"] for block in message.content if block["type"] == "tool_use"]
        assert len(set(ids)) == len(ids)


@given(BLOCKS, CUTS, st.integers(0, 60), st.booleans())
@_THOROUGHLY
def test_a_stream_may_break_off_anywhere(
    blocks: list[Block], cut: Cut, length: int, fails: bool
) -> None:
    given = events(*blocks, cut=cut)[:length]
    if fails:
        given.append(event("error", error={"type": "overloaded_error"}))
    mend = stage()
    out = run(mend, given)
    put_together(out, cut_off=True)
    if mend.turn is None or not mend.turn.scanner.changes:
        assert out == given
    assert not fails or out[-1] == given[-1]


ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 3),
    st.sampled_from(["text", "thinking", "tool_use", "text_delta", "end_turn", "read", leak()]),
    st.just([]),
)
FIELDS = st.sampled_from(["type", "text", "thinking", "id", "name", "input", "partial_json"])
ODDER = st.one_of(
    TEXT,
    st.builds(lambda said: {"type": "text_delta", "text": said}, LEAKING),
    st.just(thinking("")),
    NATIVE,
    st.just({"stop_reason": "end_turn"}),
    st.dictionaries(FIELDS, ODD, max_size=4),
    ODD,
)
TYPES = st.sampled_from(
    ["message_start", "message_delta", "message_stop", "ping", "error", "unheard_of"]
    + 2 * ["content_block_start", "content_block_delta", "content_block_stop"]
)


@given(
    st.lists(
        st.builds(
            lambda type, index, block, delta: event(
                type, index=index, content_block=block, delta=delta, message=block, usage=delta
            ),
            TYPES,
            st.integers(0, 2) | ODD,
            ODDER,
            ODDER,
        ),
        max_size=10,
    )
)
@_THOROUGHLY
def test_events_that_make_no_sense_never_break_the_stream(given: list[Event]) -> None:
    mend = stage()
    out = run(mend, given)
    if mend.turn is None or not mend.turn.scanner.changes:
        assert out == given
    read = SSE()
    assert [found.data for one in out for found in read.feed(one.raw)] == [one.data for one in out]


def test_what_is_let_pass_at_a_glance_would_have_passed() -> None:
    said = b'{"type":"message_start","message":{"content":[],"id":"m"}}'
    start = b"event: message_start\ndata: " + said + b"\n\n"
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    mending = stage()
    assert mending.lets_pass(start)
    for other in (ping, start + ping, start[:-1], start.replace(b"[]", b"[1]")):
        assert not mending.lets_pass(other)
    (event,) = SSE().feed(start)
    assert [out.raw for out in mending.feed(event)] == [start]
