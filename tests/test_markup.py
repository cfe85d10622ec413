"""K2's markup, rule by rule: the same result whole, character by character and cut anywhere."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_core.markup import GRAMMARS, K2, Tools, grammar_of, thinks
from kimi_core.markup.scanner import HOLD_BYTES, MAX_MENDS, Channel

SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
ONE_SECTION, ONE_SECTION_END = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
CALL, ARGUMENTS, CALL_END = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
TURN_END = "<|im_end|>"
MARKERS = (
    *(SECTION, SECTION_END, ONE_SECTION, ONE_SECTION_END),
    *(CALL, ARGUMENTS, CALL_END, TURN_END),
)
TAGS = ("<think>", "</think>", "<thinking>", "</thinking>")


def schema(*required: str, **properties: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": type_} for name, type_ in properties.items()},
        "required": list(required),
    }


TOOLS: dict[str, Any] = {
    "noop": {"type": "object"},
    "search": schema("q", q="string", limit="integer"),
    "read.file-2": schema("path", path="string"),
    "пошук": schema("слово", слово="string"),
}
READ_OR_WRITE = {
    "read": schema("path", path="string"),
    "write": schema("path", "text", path="string", text="string"),
}
ALIKE = {"glob": schema("pattern", pattern="string"), "grep": schema("pattern", pattern="string")}


def call(header: str = "functions.noop:0", arguments: str = '{"k": 1}') -> str:
    return CALL + header + ARGUMENTS + arguments + CALL_END


def section(*calls: str) -> str:
    return SECTION + "".join(calls or (call(),)) + SECTION_END


Call = tuple[str, str, str]
NOOP: Call = ("functions.noop:0", "noop", '{"k": 1}')


def noop(arguments: str, header: str = "functions.noop:0") -> list[Call]:
    return [(header, "noop", arguments)]


@dataclass
class Case:
    """What comes as content, after what came as reasoning, and what shall become of both."""

    text: str
    content: str = ""
    calls: Sequence[Call] = ()
    reasoning: str = ""
    thought: str = ""
    undecided: bool = False
    cut: bool = False
    tools: dict[str, Any] = field(default_factory=lambda: TOOLS)


@dataclass
class Read:
    content: str
    reasoning: str
    calls: list[Call]
    changes: int


Piece = tuple[Channel, str]


def scanner(case: Case) -> K2:
    return K2(Tools(case.tools), undecided=case.undecided and not case.thought)


def read(scan: K2, pieces: Iterable[Piece], *, cut: bool = False) -> Read:
    for channel, text in pieces:
        scan.feed(channel, text)
    scan.end(cut=cut)
    said: dict[str, str] = {"content": "", "reasoning": ""}
    for channel, text in scan.out:
        said[channel] += text
    # Those found in thinking come first, as they do in the reply.
    calls = sorted(scan.calls, key=lambda one: one.channel != "reasoning")
    found = [(one.id, one.name, one.arguments) for one in calls]
    return Read(said["content"], said["reasoning"], found, scan.changes)


def characters(pieces: Iterable[Piece]) -> list[Piece]:
    return [(channel, one) for channel, text in pieces for one in text]


def cut_anywhere(pieces: Iterable[Piece], random: random.Random) -> list[Piece]:
    cut: list[Piece] = []
    for channel, text in pieces:
        at = 0
        while at < len(text):
            length = random.choice((1, 2, 3, 7, 20))
            cut.append((channel, text[at : at + length]))
            at += length
    return cut


RULES: dict[str, Case] = {
    # -- R3: sections
    "text around a section is kept": Case(f"a {section()} b", "a  b", [NOOP]),
    "singular markers": Case(f"a{ONE_SECTION}{call()}{ONE_SECTION_END}b", "ab", [NOOP]),
    "singular and plural mixed": Case(f"{ONE_SECTION}{call()}{SECTION_END}b", "b", [NOOP]),
    "a section that is not closed": Case(f"a{SECTION}{call()}", "a", [NOOP]),
    "a section that was not opened": Case(f"a{call()}{SECTION_END}b", "ab", [NOOP]),
    "no section": Case(f"a{call()}b", "ab", [NOOP]),
    "a section in a section": Case(
        f"{SECTION}{SECTION}{call()}{SECTION_END}{SECTION_END}a", "a", [NOOP]
    ),
    "a section begins anew between calls": Case(
        f"{SECTION}{call()}{SECTION}{call('noop:1')}{SECTION_END}",
        calls=[NOOP, ("noop:1", "noop", '{"k": 1}')],
    ),
    "several sections": Case(
        f"a{section()}b{section(call('noop:1'))}c",
        "abc",
        [NOOP, ("noop:1", "noop", '{"k": 1}')],
    ),
    "an empty section": Case(f"a {SECTION}{SECTION_END} b", "a  b"),
    # -- R4: calls
    "white space around everything": Case(
        f"{SECTION}\n {CALL}\n functions.noop:0 \n{ARGUMENTS}\n\t"
        f'{{"k": 1}} \n{CALL_END}\n {SECTION_END}',
        calls=[NOOP],
    ),
    "a call ends at the next": Case(
        section(f'{CALL}noop:0{ARGUMENTS}{{"a": 1}}', call("noop:1", "{}")),
        calls=[("noop:0", "noop", '{"a": 1}'), ("noop:1", "noop", "{}")],
    ),
    "a call ends with its section": Case(
        f'{SECTION}{CALL}noop:0{ARGUMENTS}{{"a": 1}}{SECTION_END}b',
        "b",
        [("noop:0", "noop", '{"a": 1}')],
    ),
    "a call ends with the text": Case(
        f'a{CALL}noop:0{ARGUMENTS}{{"a": 1}}', "a", [("noop:0", "noop", '{"a": 1}')]
    ),
    "a call ends where another one only begins": Case(
        f'Searching.   {CALL}  noop:42 {ARGUMENTS}  {{"a": 1}}  {CALL}  ',
        "Searching.   ",
        [("noop:42", "noop", '{"a": 1}')],
    ),
    "text follows a call without an end": Case(
        f'{CALL}noop:0{ARGUMENTS}{{"a": 1}}\nText.',
        "\nText.",
        [("noop:0", "noop", '{"a": 1}')],
    ),
    "an end without a call": Case(f"{CALL_END}a{CALL_END}b", "ab"),
    # -- R5: arguments
    **{
        f"arguments kept as they are: {arguments}": Case(
            section(call(arguments=arguments)), calls=noop(arguments)
        )
        for arguments in (
            "{}",
            '{"a": {"b": [{"c": "}"}, []]}, "d": null}',
            '{"a": "\\"}\\\\"}',
            f'{{"a": "{CALL_END}", "b": "x {SECTION_END} {CALL} y"}}',
            '{"a": "<think>x</think> `code` ```"}',
            '{\n  "a": "é🏠",\n  "b": 1e5\n}',
            '{"big": 12345678901234567890123, "a": 1, "a": 2}',
            f'[1, "{CALL_END}"]',
            f'"{CALL_END}"',
            "[1, 2",
            '"a" and text',
            "5",
            "null",
            "plain words",
            "{'a': 1}",
            '{"a": 1,, }',
            '{"a": tru}',
            '{"a": "x',
            '{"a": "b"',
        )
    },
    "arguments with a line break in a string": Case(
        section(call(arguments='{"a": "b\nc"}')), calls=noop('{"a": "b\nc"}')
    ),
    "no arguments": Case(section(call(arguments="")), calls=noop("{}")),
    "blank arguments": Case(section(call(arguments=" \n")), calls=noop("{}")),
    "words behind the object": Case(section(call(arguments='{"a": 1} ok')), calls=noop('{"a": 1}')),
    "two objects": Case(section(call(arguments='{"a": 1}{"b": 2}')), calls=noop('{"a": 1}')),
    "a bracket too many": Case(call(arguments='{"a": 1}}') + "b", "b", noop('{"a": 1}')),
    "what is wrong ends at the first marker, even in a string": Case(
        section(call(arguments=f'{{"a": 1,, "b": "{CALL_END}"}}')), calls=noop('{"a": 1,, "b": "')
    ),
    "a string left open does not eat the next call": Case(
        section(call(arguments='{"a": "x'), call("noop:1", '{"b": "y"}')),
        calls=[*noop('{"a": "x'), ("noop:1", "noop", '{"b": "y"}')],
    ),
    "arguments cut at 8 KiB": Case(
        section(call(arguments='{"a": "' + "x" * 8192)), calls=noop('{"a": "' + "x" * 8192)
    ),
    "long arguments": Case(
        section(call(arguments='{"a": "' + "x" * 9000 + '"}')),
        calls=noop('{"a": "' + "x" * 9000 + '"}'),
    ),
    "arguments cut by the limit": Case(
        f'a{SECTION}{CALL}noop:0{ARGUMENTS}{{"a": "b',
        "a",
        [("noop:0", "noop", '{"a": "b')],
        cut=True,
    ),
    "arguments cut by the limit before they began": Case(
        f"a{SECTION}{CALL}noop:0{ARGUMENTS} ", "a", cut=True
    ),
    "a name cut by the limit": Case(f"a{SECTION}{CALL}functions.no", "a", cut=True),
    # -- R6: headers
    **{
        f"header {header!r} means {name!r}": Case(
            section(call(header, '{"path": "x"}')), calls=[(header, name, '{"path": "x"}')]
        )
        for header, name in (
            ("functions.a.b-c:10", "a.b-c"),
            ("functions.mcp__x__get-y:0", "mcp__x__get-y"),
            ("functions.пошук:3", "пошук"),
            ("a:b:3", "a:b"),
            ("read.file-2", "read.file-2"),
            ("functions.noop", "noop"),
            ("functions.noop :0", "noop"),
            ("functions.noop: 0", "noop"),
            ("Noop:1", "noop"),
            ("functions.noop:x", "noop"),
            ("functionsnoop5", "noop"),
            ("functions.noop5", "noop"),
            ("functions_noop_1", "noop"),
            ("tool_search:0", "tool_search"),
        )
    },
    **{
        f"foreign header {header!r} means what its arguments fit": Case(
            section(call(header, '{"path": "x"}')),
            calls=[(header, "read", '{"path": "x"}')],
            tools=READ_OR_WRITE,
        )
        for header in (
            *("7", ":7", "7:0", ":::0", "call_3", "call_x", "call_7f3a9c2b:0", "toolu_01AkmjoowNg"),
            *(
                "tooltoolu_01KPuJ9wUyn6",
                "chatcmpl-tool-a12b7e6c",
                "0b3d1c2e-4f5a-6b7c-8d9e-0f1a2b3c4d5e",
                "weird@id",
            ),
        )
    },
    **{
        f"nothing tells what {header!r} with {arguments} means": Case(
            f"a{section(call(header, arguments))}", "a", tools=tools
        )
        for header, arguments, tools in (
            ("7", '{"pattern": "x"}', ALIKE),
            ("call_3", '{"pattern": "x"}', ALIKE),
            ("7", '{"other": 1}', READ_OR_WRITE),
            ("7", '{"path": 5}', READ_OR_WRITE),
            ("7", '{"path": "x', READ_OR_WRITE),
            ("7", '["path"]', READ_OR_WRITE),
            ("7", "{}", {"a": {"type": "object"}, "b": {"type": "object"}}),
            ("7", '{"a": 1}', {}),
            ("functions.other.0", "{}", TOOLS),
            ("functions.other", "{}", {"noop": {}}),
            ("word", "{}", {"noop": {}}),
            ("word 7", "{}", {"noop": {}}),
            ("@", "words", {"noop": {}}),
            (":::", "{}", READ_OR_WRITE),
        )
    },
    "the only tool needs no fitting arguments": Case(
        section(call("7", '{"other": 1}'), call("call_x", '{"a": "b')),
        calls=[("7", "read", '{"other": 1}'), ("call_x", "read", '{"a": "b')],
        tools={"read": READ_OR_WRITE["read"]},
    ),
    "a member that only one schema lists": Case(
        section(call("0", '{"city": "x"}')),
        calls=[("0", "weather", '{"city": "x"}')],
        tools={"read": schema(path="string"), "weather": schema(city="string")},
    ),
    "a member that no schema lists": Case(
        section(call("0", '{"path": "x", "more": 1}')),
        calls=[("0", "read", '{"path": "x", "more": 1}')],
        tools=READ_OR_WRITE,
    ),
    "a schema that is none": Case(
        section(call("0", '{"path": "x"}')),
        calls=[("0", "read", '{"path": "x"}')],
        tools={
            "read": READ_OR_WRITE["read"],
            "odd": {"type": 5},
            "no pattern": {"properties": {"path": {"type": 7}}},
            "elsewhere": {"$ref": "https://schema.example/x.json"},
            "around": {"$ref": "#"},
            "unknown": {"$schema": ["x"]},
            "none": False,
        },
    ),
    "a header without arguments does not eat the next call": Case(
        f"a{SECTION}{CALL}functions.search:0{call('noop:1')}{SECTION_END}",
        "a",
        [("noop:1", "noop", '{"k": 1}')],
    ),
    "a header without arguments at the end": Case(f"a{SECTION}{CALL}functions.noop:0", "a"),
    "prose about the marker": Case(
        f"It writes {CALL} and then the name.", "It writes  and then the name."
    ),
    # -- R7: calls without their first marker
    "a call without its first marker": Case(
        f'Hm. noop:0{ARGUMENTS}{{"a": 1}}{CALL_END}{SECTION_END}b',
        "Hm. b",
        [("noop:0", "noop", '{"a": 1}')],
    ),
    "a call without its first marker, run into a word": Case(
        f'Hm.functions.noop:0{ARGUMENTS}{{"a": 1}}', "Hm.", noop('{"a": 1}')
    ),
    "a call without its first marker in a section": Case(
        f"{SECTION}functions.noop:0{ARGUMENTS}{{}}{CALL_END}functions.noop:1{ARGUMENTS}{{}}"
        f"{CALL_END}{SECTION_END}",
        calls=[*noop("{}"), ("functions.noop:1", "noop", "{}")],
    ),
    "a call without its first marker, of no tool": Case(
        f'Hm. other:0{ARGUMENTS}{{"a": 1}}', 'Hm. other:0{"a": 1}'
    ),
    "a call without its second marker": Case(
        f'{CALL}noop:0{{"a": 1}}{CALL_END}b', "b", [("noop:0", "noop", '{"a": 1}')]
    ),
    "names in prose": Case("noop:0 and functions.noop:1 {}", "noop:0 and functions.noop:1 {}"),
    # -- R8: code
    **{
        f"in code, of no tool: {text!r}": Case(text, text)
        for text in (
            f"```\n{call('functions.demo:0')}\n```",
            f"~~~xml\n{section(call('functions.demo:0'))}\n~~~\nText.",
            f"Not closed:\n```\n{call('functions.demo:0')}",
            f"   ```\n{call('functions.demo:0')}\n   ```",
            f"- ```\n  {call('functions.demo:0')}\n  ```\n",
            f"> ```\n> {CALL}\n> ```\n",
            f"`{call('functions.demo:0')}`",
            f"``a ` {CALL} b``",
            "a `<think>` and a `</think>` tag",
            "```html\n<think>a</think>\n```",
            "```a``` is no fence: `<think>`",
            f"`{TURN_END}` ends a turn, and ```{CALL}``` begins a call",
            f"```\n{call('7')}\n```",
            f"```\n{CALL}noop:0{ARGUMENTS}{{broken{CALL_END}\n```",
            f'```\n{CALL}noop:0{ARGUMENTS}{{"a": 1}}\n```',
            f"```\n{SECTION}\n{SECTION_END}\n```",
            f"```\na{TURN_END}{CALL_END}\n```",
            f"````\n```\n{CALL}\n```\n````",
        )
    },
    "in a fence, of a declared tool": Case(f"```\n{section()}\n```\n", "```\n\n```\n", [NOOP]),
    "in a code span, of a declared tool": Case(f"`{call()}`", "``", [NOOP]),
    "in a fence, without its first marker": Case(
        f"```\nnoop:0{ARGUMENTS}{{}}{CALL_END}", "```\n", [("noop:0", "noop", "{}")]
    ),
    "behind a fence": Case(
        f"```\na\n```\n{call('functions.demo:0')}",
        "```\na\n```\n",
        [("functions.demo:0", "demo", '{"k": 1}')],
    ),
    "behind a fence in a list": Case(
        "1. ```\n   a\n   ```\n<think>b</think>c", "1. ```\n   a\n   ```\nc", reasoning="b"
    ),
    "behind a single backtick": Case(
        f"The ` key.{call('functions.demo:0')}",
        "The ` key.",
        [("functions.demo:0", "demo", '{"k": 1}')],
    ),
    "behind a code span": Case("`a` <think>b</think>", "`a` ", reasoning="b"),
    "behind what is no fence": Case("```a``` <think>b</think>c", "```a``` c", reasoning="b"),
    "a fence right behind thinking": Case(
        "<think>a</think>```\n<think>b</think>\n```",
        "```\n<think>b</think>\n```",
        reasoning="a",
    ),
    "thinking leaves no code open": Case("<think>```\n</think>", reasoning="```\n</think>"),
    # -- R9: what is left
    "noise in a section": Case(
        f"a{SECTION} noise <think>x</think> {call()} more {SECTION_END}b", "ab", [NOOP]
    ),
    "noise in a section that is not closed": Case(f"a{SECTION}noise {call()} more", "a", [NOOP]),
    "a section opened in vain": Case(f"{SECTION}The whole answer.", "The whole answer."),
    "orphans": Case(f"a{SECTION_END}b{ONE_SECTION_END}c{CALL_END}d{ARGUMENTS}e", "abcde"),
    "a marker cut in a section": Case(f"a{section()[:-3]}", "a", [NOOP]),
    "a marker cut in an empty section": Case(f"{SECTION}<|tool_ca"),
    "a marker cut after a call": Case(f"a{call()[:-3]}", "a", [NOOP]),
    "a marker cut in the arguments": Case(
        f'{CALL}noop:0{ARGUMENTS}{{"a": 1<|tool_c', calls=[("noop:0", "noop", '{"a": 1')]
    ),
    "a marker cut in text": Case("a <|tool_calls_sec", "a <|tool_calls_sec"),
    "near misses": Case(
        "<|tool_call|> <|tool_calls_begin|> <tool_call> < |tool_call_begin|> <Think> <think/>",
        "<|tool_call|> <|tool_calls_begin|> <tool_call> < |tool_call_begin|> <Think> <think/>",
    ),
    "lone <": Case("a < b and c <", "a < b and c <"),
    "the end of the turn": Case(f"a{TURN_END}", "a"),
    "the end of the turn, twice, and a line": Case(f"a{TURN_END}\n{TURN_END}\n", "a\n\n"),
    "the end of the turn behind a fence": Case(f"```\na\n```{TURN_END}", "```\na\n```"),
    "the end of the turn in a fence left open": Case(f"```\na{TURN_END}", "```\na"),
    "the end of the turn behind a section": Case(f"{section()}{TURN_END}", "", [NOOP]),
    "the end of the turn before a section": Case(f"a{TURN_END}{section()}", "a", [NOOP]),
    "the end of the turn in the arguments": Case(
        f'{CALL}noop:0{ARGUMENTS}{{"a": {TURN_END}', calls=[("noop:0", "noop", '{"a":')]
    ),
    "the end of the turn within text": Case(
        f"A turn ends with {TURN_END}, always.", f"A turn ends with {TURN_END}, always."
    ),
    # -- R10: thinking in the content
    "a block": Case("<think>a</think>b", "b", reasoning="a"),
    "a long tag": Case("<thinking>a</thinking>b", "b", reasoning="a"),
    "tags of both kinds": Case("<think>a</thinking>b", "b", reasoning="a"),
    "several blocks": Case("a<think>b</think>c<think>d</think>e", "ace", reasoning="bd"),
    "an empty block": Case("<think></think>a", "a"),
    "a block that is not closed": Case("a<think>b", "a", reasoning="b"),
    "a block that a call ends": Case(f"<think>a{section()}b", "b", [NOOP], reasoning="a"),
    "a block around a call": Case(f"<think>a{section()}b</think>c", "c", [NOOP], reasoning="ab"),
    "a block around a call in code": Case(
        f"<think>`{call()}`</think>c", "c", [NOOP], reasoning="``"
    ),
    "a block opened twice": Case("<think><think>a</think>b", "b", reasoning="a"),
    "a block opened in the prompt": Case("a</think>b", "b", reasoning="a", undecided=True),
    "a block opened in the prompt, with a backtick": Case(
        "The ` key.</think>b", "b", reasoning="The ` key.", undecided=True
    ),
    "nothing but a closing tag": Case("</think>a", "a", undecided=True),
    "a second closing tag": Case("a</think>b</think>c", "bc", reasoning="a", undecided=True),
    # What was said is said: a model that does not think is not waited for.
    "a closing tag of a model that does not think": Case("a</think>b", "ab"),
    "a closing tag after thinking that came as such": Case(
        "a</think>b", "ab", thought="t", reasoning="t", undecided=True
    ),
    # -- R11, R19: thinking that came as such
    "tags in thinking": Case("c", "c", thought="<think>a</think>b", reasoning="ab"),
    "a call in thinking": Case("c", "c", [NOOP], thought=f"a{section()}b", reasoning="ab"),
    "calls in thinking come first": Case(
        section(call("noop:1")),
        "",
        [NOOP, ("noop:1", "noop", '{"k": 1}')],
        thought=section(),
    ),
    "a call that begins in thinking": Case(
        f"functions.noop:0{ARGUMENTS}{{}}{CALL_END}{SECTION_END}b",
        "b",
        noop("{}"),
        thought=f"a{SECTION}{CALL}",
        reasoning="a",
    ),
    "arguments that begin in thinking": Case(
        f'"k": 1}}{CALL_END}b', "b", noop('{"k": 1}'), "a", f"a{CALL}functions.noop:0{ARGUMENTS}{{"
    ),
    "a section that begins in thinking": Case(
        f"{call()}{SECTION_END}b", "b", [NOOP], thought=f"a{SECTION}", reasoning="a"
    ),
    "a section opened in vain in thinking": Case(
        "The answer.", "The answer.", thought=f"a{SECTION}", reasoning="a"
    ),
    "half a marker in thinking": Case("b", "b", thought="a<|tool_", reasoning="a<|tool_"),
    # -- R12: placeholders
    "a placeholder": Case("(no content)"),
    "placeholders": Case("(no content) (no content)\nHello.", " \nHello."),
    "a placeholder before thinking": Case(
        "(no content)(no content)  a </think>   b", "   b", reasoning="  a ", undecided=True
    ),
    "a placeholder in each channel": Case(
        "(no content)b", "b", thought="(no content)a", reasoning="a"
    ),
    "a placeholder before a call": Case(f"(no content){section()}", "", [NOOP]),
    "a placeholder in prose": Case("Say (no content) now.", "Say (no content) now."),
    "half a placeholder": Case("(no con", "(no con"),
    "nearly a placeholder": Case("(no contents) a", "(no contents) a"),
    # -- R18: what waits
    "a thinking model without a tag": Case("Just text.", "Just text.", undecided=True),
    "a thinking model that calls": Case(f"Fine. {call()}", "Fine. ", [NOOP], undecided=True),
    "a thinking model whose tag comes too late": Case(
        "a" * (HOLD_BYTES + 1) + "</think>b", "a" * (HOLD_BYTES + 1) + "b", undecided=True
    ),
}
LONG = {name for name, case in RULES.items() if len(case.text) > 20_000}


@pytest.mark.parametrize("name", RULES)
def test_a_whole_reply_is_mended(name: str) -> None:
    case = RULES[name]
    got = read(scanner(case), [("reasoning", case.thought), ("content", case.text)], cut=case.cut)
    expected = (case.content, case.reasoning, list(case.calls))
    assert (got.content, got.reasoning, got.calls) == expected
    unchanged = (case.text, case.thought, []) == expected
    assert (got.changes == 0) == unchanged


@pytest.mark.parametrize("name", RULES)
def test_a_streamed_reply_is_mended_alike(name: str) -> None:
    case = RULES[name]
    pieces: list[Piece] = [("reasoning", case.thought), ("content", case.text)]
    whole = read(scanner(case), pieces, cut=case.cut)
    source = random.Random(0)
    cuts = (
        [characters(pieces)]
        if name in LONG
        else [characters(pieces)] + [cut_anywhere(pieces, source) for _ in range(8)]
    )
    for cut in cuts:
        got = read(scanner(case), cut, cut=case.cut)
        assert (got.content, got.reasoning, got.calls) == (
            whole.content,
            whole.reasoning,
            whole.calls,
        )
        assert (got.changes == 0) == (whole.changes == 0)


# -- what leaves at once


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("Text.", "Text."),
        ("a < b", "a < b"),
        ("a <", "a "),
        ("a <|tool_call", "a "),
        ("a <|tool_x", "a <|tool_x"),
        ("a </thin", "a "),
        ("(no", ""),
        ("a (", "a ("),
        ("see functions.no", "see "),
        ("see functions.nope", "see functions.nope"),
        ("see noop:", "see "),
        ("see noop: a", "see noop: a"),
        ("<think>a", "a"),
        (f"a{CALL}x", "a"),
    ],
)
def test_only_what_may_become_markup_is_held_back(text: str, out: str) -> None:
    scan = K2(Tools(TOOLS))
    scan.feed("content", text)
    assert "".join(piece for _, piece in scan.out) == out


def test_content_of_a_thinking_model_waits_until_it_is_told_that_no_thinking_follows() -> None:
    scan = K2(Tools({}), undecided=True)
    scan.feed("content", "Text.")
    assert (scan.out, scan.pending) == ([], True)
    scan.decide()
    assert (scan.out, scan.pending) == ([("content", "Text.")], False)


def test_content_after_thinking_that_came_as_such_waits_for_nothing() -> None:
    scan = K2(Tools({}), undecided=True)
    scan.feed("reasoning", "Hm.")
    scan.feed("content", "Text.")
    assert scan.out == [("reasoning", "Hm."), ("content", "Text.")]


def test_content_waits_for_thinking_only_so_long() -> None:
    scan = K2(Tools({}), undecided=True)
    for _ in range(0, HOLD_BYTES + 1024, 1024):
        scan.feed("content", "x" * 1024)
    assert not scan.pending
    assert sum(len(piece) for _, piece in scan.out) == HOLD_BYTES + 1024


def test_what_was_put_right_is_told() -> None:
    scan = K2(Tools(TOOLS))
    scan.feed("content", f"(no content)<think>a</think>{call()}{CALL_END}{TURN_END}")
    scan.end()
    kinds = [mend.kind for mend in scan.mends]
    assert kinds == ["placeholder", "thinking", "thinking", "tool_call", "marker", "marker"]
    [found] = [mend for mend in scan.mends if mend.kind == "tool_call"]
    assert (found.leaked, found.became) == (call(), 'noop({"k": 1})')


def test_what_is_told_of_mends_is_bounded() -> None:
    scan = K2(Tools(TOOLS))
    scan.feed("content", (CALL_END + "a") * (MAX_MENDS + 10))
    scan.feed("content", call(arguments='{"a": "' + "x" * 100_000 + '"}'))
    scan.end()
    assert scan.changes > len(scan.mends) == MAX_MENDS
    assert max(len(mend.leaked) for mend in scan.mends) < 10_000


def test_ids_and_names_of_several_calls_stay_in_their_order() -> None:
    text = section(call("functions.noop:7"), call("search:8", '{"q": "x"}'), call("functions.x:9"))
    got = read(K2(Tools(TOOLS)), [("content", text)])
    assert [(id, name) for id, name, _ in got.calls] == [
        ("functions.noop:7", "noop"),
        ("search:8", "search"),
        ("functions.x:9", "x"),
    ]


@pytest.mark.parametrize(
    ("model", "grammar", "thinking"),
    [
        ("kimi-k2-0905-preview", "kimi-k2", False),
        ("moonshotai/Kimi-K2-Instruct", "kimi-k2", False),
        ("kimi-k2-thinking", "kimi-k2", True),
        ("moonshotai/kimi-k2-thinking:free", "kimi-k2", True),
        ("moonshot.kimi-k2-thinking", "kimi-k2", True),
        ("Kimi-K2.5", "kimi-k2", True),
        ("moonshotai/kimi-k2.7-code", "kimi-k2", True),
        ("accounts/fireworks/models/kimi-k2p6", "kimi-k2", True),
        ("k2p5", "kimi-k2", True),
        ("kimi-for-coding", "kimi-k2", True),
        ("kimi-k2-0711", "kimi-k2", False),
        ("kimi-k3", "kimi-k3", True),
        ("gpt-4o", "", False),
        ("qwen/qwen3-coder", "", False),
        ("deepseek-r1-thinking", "", False),
        ("", "", False),
    ],
)
def test_a_models_id_tells_its_grammar(model: str, grammar: str, thinking: bool) -> None:
    assert (grammar_of(model), thinks(model)) == (grammar, thinking)


# -- any text

WORDS = (
    *("a", "text ", " ", "\n", "\r\n", "é", "🏠", "\ud83d", "x" * 30),
    *("<", "<|", "|>", "<think", "</think", "<|tool_", "(no", "(no content)"),
    *("`", "``", "```", "```\n", "~~~\n", "- ", "> "),
    *("{", "}", "[", "]", '"', '\\"', "\\", ":", ",", '{"k": 1}', '{"k": 1,,}', '"x "'),
    *(f'{{"k": "{CALL_END}"}}', f'["{SECTION_END}"]', "7", "f", "functions.", "noop", "noop:1"),
    *("functions.noop:0", "functions.x:1", "read.file-2:3", "`<think>`"),
    *(call(), section(), call("functions.demo:0"), f"noop:1{ARGUMENTS}{{}}"),
)
TEXT = st.lists(st.sampled_from((*MARKERS, *MARKERS, *TAGS, *TAGS, *WORDS)), max_size=14).map(
    "".join
)
TURNS = st.lists(st.tuples(st.sampled_from(("reasoning", "content")), TEXT), max_size=5)
ANYTHING = st.one_of(st.text(), st.text(st.characters(categories=["Cs", "Cc", "P"]))).flatmap(
    lambda text: TEXT.map(lambda more: text + more)
)


def joined(turns: Iterable[Piece]) -> list[Piece]:
    """Return the pieces with neighbours of the same channel as one."""
    pieces: list[Piece] = []
    for channel, text in turns:
        if pieces and pieces[-1][0] == channel:
            text = pieces.pop()[1] + text
        if text:
            pieces.append((channel, text))
    return pieces


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TURNS, st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_a_text_means_the_same_however_it_is_cut(
    turns: list[Piece], source: random.Random, undecided: bool, cut: bool
) -> None:
    pieces = joined(turns)
    whole = read(K2(Tools(TOOLS), undecided=undecided), pieces, cut=cut)
    for cuts in (characters(pieces), cut_anywhere(pieces, source)):
        got = read(K2(Tools(TOOLS), undecided=undecided), cuts, cut=cut)
        assert (got.content, got.reasoning, got.calls) == (
            whole.content,
            whole.reasoning,
            whole.calls,
        )
        assert (got.changes == 0) == (whole.changes == 0)
    if whole.changes == 0:
        for channel in ("content", "reasoning"):
            text = "".join(text for where, text in pieces if where == channel)
            assert getattr(whole, channel) == text


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(), st.booleans())
def test_text_without_markup_stays(text: str, undecided: bool) -> None:
    text = text.replace("<", "").replace("(no", "")
    got = read(K2(Tools(TOOLS), undecided=undecided), characters([("content", text)]))
    assert (got.content, got.reasoning, got.calls, got.changes) == (text, "", [], 0)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ANYTHING, st.booleans())
def test_no_text_is_too_odd(text: str, undecided: bool) -> None:
    for pieces in ([("content", text)], characters([("content", text)])):
        got = read(K2(Tools(TOOLS), undecided=undecided), pieces)
        assert len(got.content) + len(got.reasoning) <= len(text)


ORPHANS = (SECTION_END, ONE_SECTION_END, CALL_END, ARGUMENTS, *TAGS)
LOOSE = st.lists(
    st.sampled_from((*ORPHANS, "a", " ", "\n", "<", "|", ">", "<|", "<thi", "é", '"', "{", "}"))
).map("".join)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LOOSE, st.booleans())
def test_of_orphans_and_tags_nothing_else_is_lost_or_doubled(text: str, undecided: bool) -> None:
    orphan = re.compile("|".join(map(re.escape, sorted(ORPHANS, key=len, reverse=True))))
    for pieces in ([("content", text)], characters([("content", text)])):
        scan = K2(Tools(TOOLS), undecided=undecided)
        read(scan, pieces)
        assert "".join(piece for _, piece in scan.out) == orphan.sub("", text)


# -- long texts

SHAPES: dict[str, Callable[[int], str]] = {
    "<": lambda size: "<" * size,
    "<|": lambda size: "<|" * (size // 2),
    "a section left open": lambda size: SECTION + "noise < " * (size // 8),
    "a header left open": lambda size: CALL + " " * size,
    "arguments left open": lambda size: f'{CALL}noop:0{ARGUMENTS}{{"a": "' + "x" * size,
    "arguments that are none": lambda size: f"{CALL}noop:0{ARGUMENTS}" + "x <" * (size // 3),
    "blank arguments": lambda size: f"{CALL}noop:0{ARGUMENTS}" + " " * size,
    "blanks after arguments": lambda size: f"{CALL}noop:0{ARGUMENTS}{{}}" + " }" * (size // 2),
    "quotes in quotes": lambda size: (
        f"{CALL}noop:0{ARGUMENTS}" + '{"a":"{\\"b\\":\\"' * (size // 16)
    ),
    "call markers": lambda size: CALL * (size // len(CALL)),
    "calls": lambda size: section() * (size // len(section())),
    "calls without a name": lambda size: call("7") * (size // len(call("7"))),
    "call markers in a fence": lambda size: "```\n" + CALL * (size // len(CALL)),
    "calls in a fence": lambda size: "```\n" + f'{CALL}noop:0{ARGUMENTS}{{"a": "' * (size // 50),
    "orphans": lambda size: (CALL_END + "a") * (size // 18),
    "ends of the turn": lambda size: (TURN_END + " ") * (size // 11),
    "the end of the turn in a fence": lambda size: f"```\n{TURN_END}" + " " * size,
    "ends of the turn in arguments": lambda size: (
        f"{CALL}noop:0{ARGUMENTS}" + (TURN_END + " x ") * (size // 13)
    ),
    "tags": lambda size: "<think>a</think>b" * (size // 17),
    "placeholders": lambda size: "(no content) " * (size // 13),
    "one line of backticks": lambda size: "` a " * (size // 4),
    "one line of backticks and tags": lambda size: "` <think> " * (size // 10),
    "one backtick and tags": lambda size: "`" + " <think> " * (size // 9),
    "longer and longer runs of backticks": lambda size: "".join(
        "`" * (number % 60 + 1) + "<think>" for number in range(size // 37)
    ),
    "names": lambda size: "functions.noop:0 " * (size // 17),
}


def seconds(text: str, step: int, undecided: bool) -> float:
    """Return the processor time that a text takes in pieces of `step` characters."""
    scan = K2(Tools(TOOLS), undecided=undecided)
    start = time.process_time()
    for at in range(0, len(text), step):
        scan.feed("content", text[at : at + step])
        scan.out.clear()
    scan.end()
    return time.process_time() - start


@pytest.mark.parametrize("step", [16, 1_000_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_time_grows_with_the_length(shape: str, step: int) -> None:
    undecided = shape in ("<", "one line of backticks and tags")
    short, long = (SHAPES[shape](size) for size in (250_000, 1_000_000))
    best = min(seconds(short, step, undecided) for _ in range(2))
    # What takes no time to speak of may take a multiple of it.
    limit = max(8 * best, 1.0)
    assert any(seconds(long, step, undecided) < limit for _ in range(3))


def test_channels_that_alternate_within_a_call_take_no_longer() -> None:
    def took(size: int) -> float:
        scan = K2(Tools(TOOLS))
        start = time.process_time()
        scan.feed("content", f'{SECTION}{CALL}noop:0{ARGUMENTS}{{"a": "x ')
        for number in range(size // 50):
            scan.feed(("reasoning", "content")[number % 2], f"{CALL_END}{CALL}noop:0{ARGUMENTS}")
        scan.end()
        return time.process_time() - start

    limit = max(8 * min(took(250_000) for _ in range(2)), 1.0)
    assert any(took(1_000_000) < limit for _ in range(3))


def test_no_schema_makes_the_proxy_stand_still() -> None:
    evil = {"properties": {"x": {"type": "string", "pattern": "^(a+)+$"}}, "required": ["x"]}
    nested: dict[str, Any] = {
        f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)
    }
    nested["d40"] = {"required": ["y"]}
    tools = Tools({"evil": evil, "deep": {"$defs": nested, "$ref": "#/$defs/d0"}})
    assert tools.by_arguments(json.dumps({"x": "a" * 60 + "!"})) == ""
    tools = Tools({"evil": evil, "other": {"required": ["y"]}})
    assert tools.by_arguments(json.dumps({"x": "a" * 60 + "!"})) == "evil"


PASSING = (
    *("text", "abc def ", " ", "\n", "é", "<", "`", "```\n", "(no content)", "noop:1", "argument"),
    *("<think>", "</think>", "<|tool_call_begin|>", "functions.noop:0", '{"k": 1}'),
    *("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_begin|>"),
    *("<|open|>think<|sep|>", "<|close|>think<|sep|>", "<|open|>response<|sep|>"),
    *("<|close|>response<|sep|>", "<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
)


@pytest.mark.parametrize("grammar", GRAMMARS)
@given(
    thought=st.lists(st.sampled_from(PASSING), max_size=6),
    said=st.lists(st.sampled_from(PASSING), max_size=10),
    undecided=st.booleans(),
)
def test_a_piece_that_passes_is_what_would_have_come_out(
    grammar: str, thought: list[str], said: list[str], undecided: bool
) -> None:
    def read(fast: bool) -> tuple[str, str, object]:
        scanner = GRAMMARS[grammar](Tools({"noop": None}), undecided=undecided)
        texts: dict[Channel, str] = {"reasoning": "", "content": ""}
        pieces: list[tuple[Channel, str]] = [("reasoning", piece) for piece in thought]
        for channel, piece in [*pieces, *(("content", piece) for piece in said)]:
            if fast and scanner.passes(channel, piece):
                texts[channel] += piece
            else:
                scanner.feed(channel, piece)
                for out, text in scanner.out:
                    texts[out] += text
                scanner.out.clear()
        scanner.end()
        for out, text in scanner.out:
            texts[out] += text
        return texts["reasoning"], texts["content"], scanner.calls

    assert read(True) == read(False)


def test_a_response_that_a_host_takes_for_thinking_does_not_pass_as_thinking() -> None:
    scanner = GRAMMARS["kimi-k3"](Tools({}))
    scanner.feed("reasoning", "So.<|open|>response<|sep|>Yes")
    assert not scanner.passes("reasoning", " indeed")
