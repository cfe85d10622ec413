"""What of a conversation leaves in another form: references, cuts, and what is never touched."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core import dialects, tokens
from kimi_core.dialects import Unit
from kimi_core.exchange import Message, Part
from kimi_core.masking.conversation import Change, Conversation
from kimi_core.masking.policy import Policy

REFERENCES = Policy(threshold=0)
O200K = tokens.tokenizer_for("o200k")
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


def prose(seed: int, lines: int) -> list[str]:
    chosen = random.Random(seed)
    return [f"{' '.join(chosen.choices(WORDS, k=7))} {number}" for number in range(lines)]


def numbered(lines: Sequence[str], first: int = 1, mark: str = "\t") -> str:
    return "\n".join(f"{number:6}{mark}{line}" for number, line in enumerate(lines, first))


def result(text: str, id: str = "", path: tuple[str | int, ...] = ("content",)) -> Message:
    return Message("tool", (Part("tool_result", "tool_result", text, path, id=id),))


def call(name: str, arguments: Any, id: str) -> Message:
    said = arguments if isinstance(arguments, str) else json.dumps(arguments)
    path = ("tool_calls", 0, "function", "arguments")
    return Message("assistant", (Part("tool_call", "assistant", said, path, name, id),))


def user(text: str) -> Message:
    return Message("user", (Part("text", "user", text, ("content",)),))


def sent(messages: Sequence[Message], policy: Policy | None = REFERENCES) -> list[str]:
    """Return the text of the first part of each message as it leaves."""
    conversation = Conversation()
    found = []
    for message in messages:
        changes = conversation.take(message, policy)
        found.append(changes[0].text if changes else message.parts[0].text)
    return found


def read(path: str, text: str, id: str = "c1") -> list[Message]:
    return [call("read", {"path": path}, id), result(text, id)]


# What a reference says


LINES = prose(1, 40)
FILE = "\n".join(LINES)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (FILE, FILE, "[40 lines: all of result 1 (read a.py) #HASH]"),
        (
            FILE,
            "\n".join(["head", *LINES[10:30], "tail"]),
            f'head\n[20 lines: as in result 1 (read a.py), from line 11 "{LINES[10][:32]}…" #HASH]'
            "\ntail",
        ),
        (
            numbered(LINES),
            numbered(LINES[9:30], 10),
            "[lines 10-30: as in result 1 (read a.py) #HASH]",
        ),
        (
            numbered(LINES),
            numbered(LINES[9:30], 13, ":"),
            "[lines 13-33: as lines 10-30 in result 1 (read a.py) #HASH]",
        ),
        (
            numbered(LINES),
            "\n".join(LINES[9:30]),
            "[21 lines: as lines 10-30 in result 1 (read a.py) #HASH]",
        ),
        (FILE, numbered(LINES, 1, "→"), "[lines 1-40: all of result 1 (read a.py) #HASH]"),
        (FILE, "\r\n".join(LINES) + "  \n", "[40 lines: all of result 1 (read a.py) #HASH]\n"),
        ("ok", "\n".join(["same"] * 90), "same\n[89 lines: the line above 89 times more #HASH]"),
        (
            "ok",
            "\n".join([*LINES[:3] * 9, "end"]),
            "\n".join([*LINES[:3], "[24 lines: the 3 lines above 8 times more #HASH]", "end"]),
        ),
        (
            "ok",
            "\n".join(["head", *LINES, "between", *LINES]),
            "\n".join(
                [
                    "head",
                    *LINES,
                    "between",
                    f'[40 lines: as above, from line 2 "{LINES[0][:32]}…" #HASH]',
                ]
            ),
        ),
    ],
)
def test_lines_that_are_shown_become_one_line(first: str, second: str, said: str) -> None:
    conversation = Conversation()
    for message in (*read("a.py", first), call("read", {"path": "b.py"}, "c2")):
        assert not conversation.take(message, REFERENCES)
    (change,) = conversation.take(result(second, "c2"), REFERENCES)
    assert change.text == said.replace("HASH", change.hash)
    assert change.kinds == ("reference",)
    assert change.original == second
    assert change.label == "read b.py"
    assert (change.tokens, change.sent_tokens) == (O200K.count(second), O200K.count(change.text))


def test_a_source_is_named_in_full_once_in_a_text() -> None:
    text = "\n".join([*LINES[:15], "new", *LINES[20:]])
    *_, said = sent([*read("a.py", FILE), *read("a.py", text, "c2")])
    assert said.count("(read a.py)") == 1
    assert said.count("result 1") == 2


def test_what_the_model_wrote_in_a_call_is_shown() -> None:
    messages = [
        call("write", {"path": "a.py", "text": FILE}, "c1"),
        result("written", "c1"),
        *read("a.py", numbered(LINES), "c2"),
    ]
    assert "all of your write a.py" in sent(messages)[3]


def test_what_the_user_wrote_is_shown() -> None:
    assert "the user's message 1, from line 2" in sent([user("See:\n" + FILE), result(FILE)])[1]


def test_nothing_points_at_a_reference_or_into_what_was_cut() -> None:
    long = "\n".join(prose(3, 300))
    conversation = Conversation()
    policy = Policy(500, 300)
    (cut,) = conversation.take(result(long, "c1"), policy)
    (whole,) = conversation.take(result(long, "c2"), policy)
    shown = set(cut.text.split("\n"))
    for line in long.split("\n"):
        assert line in shown or line in whole.text.split("\n")
    assert "result 2" in conversation.take(result(long, "c3"), policy)[0].text


def test_few_or_worthless_lines_stay() -> None:
    assert sent([result(FILE), result("\n".join(LINES[:2]) + "\nx\n" * 60)])[1].startswith(LINES[0])
    blank = "\n".join(["{", "}", ""] * 5)
    text = "\n".join(prose(2, 30)) + "\n" + blank
    assert sent([result(blank + "\n" + FILE), result(text)])[1] == text


def test_a_time_of_day_is_no_line_number() -> None:
    lines = [f"12:{n % 60:02}:07 {line}" for n, line in enumerate(LINES)]
    other = [f"13:{n % 60:02}:07 {line}" for n, line in enumerate(LINES)]
    assert sent([result("\n".join(lines)), result("\n".join(other))])[1] == "\n".join(other)


def test_without_references_nothing_is_pointed_at() -> None:
    assert sent([result(FILE), result(FILE)], Policy(0, 500, False))[1] == FILE


def test_what_is_sent_as_it_is_can_be_pointed_at() -> None:
    conversation = Conversation()
    assert not conversation.take(result(FILE), None)
    assert conversation.take(result(FILE), REFERENCES)


# What is cut


def test_a_long_text_is_cut_to_about_what_is_kept() -> None:
    text = "\n".join(prose(1, 2000))
    (change,) = Conversation().take(result(text), Policy())
    assert change.kinds == ("cut",)
    assert 400 < change.sent_tokens < 600
    gone = [int(n) for n in re.findall(r"\[… (\d+) lines? cut …\]", change.text)]
    note = f"[kimi-proxy: {sum(gone)} of 2000 lines cut; the whole: kimi-proxy mask {change.hash}]"
    assert change.text.endswith(note)
    assert len(change.text.split("\n")) - len(gone) - 1 + sum(gone) == 2000


def test_a_text_of_the_threshold_stays() -> None:
    text = "\n".join(prose(1, 60))
    assert not Conversation().take(result(text), Policy(O200K.count(text)))
    assert Conversation().take(result(text), Policy(O200K.count(text) - 1, 100))
    assert not Conversation().take(result(text * 50), Policy(0, 500, False))


def test_head_tail_and_errors_stay() -> None:
    lines = prose(1, 1000)
    lines[500] = "ValueError: the cause of it all"
    lines[700:702] = ["src/x.c:12:5: error: expected ';'", "    12 |   return 1"]
    (change,) = Conversation().take(result("\n".join(lines)), Policy())
    for at in (0, 1, 499, 500, 501, 700, 701, 998, 999):
        assert lines[at] in change.text.split("\n")


def test_errors_alike_do_not_push_out_another() -> None:
    lines = [f"warning: file {n}.c:{n}: error in line {n}" for n in range(1000)]
    lines[600] = "Segmentation fault (core dumped)"
    (change,) = Conversation().take(result("\n".join(lines)), Policy())
    assert lines[600] in change.text


def test_what_was_named_before_stays() -> None:
    lines = prose(1, 1000)
    lines[400] = "alpha beta gamma resolve_hostname delta"
    messages = [user("Why does resolve_hostname fail?"), result("\n".join(lines))]
    assert lines[400] in sent(messages, Policy())[1]
    assert lines[400] not in sent(messages[1:], Policy())[0]


def test_a_file_that_was_opened_is_cut_late_and_says_which_lines_went() -> None:
    lines = [f"    value_{n} = compute_{n % 7}(value_{n - 1})" for n in range(600)]
    lines[300] = "def middle(self):"
    assert not Conversation().take(result(numbered(lines[:150])), Policy())
    (change,) = Conversation().take(result(numbered(lines)), Policy())
    assert 3500 < change.sent_tokens < 4100
    assert re.search(r"\[… lines \d+-\d+ cut …\]", change.text)
    assert "   301\tdef middle(self):" in change.text


def test_of_a_diff_its_headers_stay() -> None:
    lines = []
    for file in range(6):
        lines += [f"diff --git a/{file}.py b/{file}.py", f"--- a/{file}.py", f"+++ b/{file}.py"]
        lines += ["@@ -1,30 +1,31 @@", *prose(file, 30), f"+added {file}", *prose(file + 50, 9)]
    (change,) = Conversation().take(result("\n".join(lines)), Policy())
    for file in range(6):
        assert f"diff --git a/{file}.py b/{file}.py" in change.text
        assert f"+added {file}" in change.text


def test_a_long_line_is_cut_within() -> None:
    line = " ".join(prose(1, 900))
    (change,) = Conversation().take(result(line), Policy())
    head, gone, tail = re.split(r"\[… (\d+) characters cut …\]", change.text.split("\n")[0])
    assert line.startswith(head)
    assert line.endswith(tail)
    assert len(head) + int(gone) + len(tail) == len(line)
    assert change.sent_tokens < 600


def test_who_comes_back_for_what_was_cut_gets_it() -> None:
    text = "\n".join(prose(1, 400))
    part = "\n".join(prose(1, 400)[150:350])
    other = "\n".join(prose(2, 400))
    for again, is_cut in ((text, False), (part, False), (other, True)):
        conversation = Conversation()
        conversation.take(result(text, "c1"), Policy())
        changes = conversation.take(result(again, "c2"), Policy())
        assert any("cut" in change.kinds for change in changes) == is_cut


def test_the_same_call_with_another_outcome_is_cut_again() -> None:
    conversation = Conversation()
    lines = prose(1, 400)
    for changed, id in ((5, "c1"), (250, "c2")):
        conversation.take(call("bash", {"command": "make test"}, id), Policy())
        lines[changed] = "ok ok"
        (change,) = conversation.take(result("\n".join(lines), id), Policy())
        assert "cut" in change.kinds


# JSON


def test_the_text_that_json_wraps_is_cut_within_it() -> None:
    given = {"output": "\n".join(prose(1, 400)), "exit_code": 0, "took": 1.50}
    text = json.dumps(given).replace("1.5}", "1.50}")
    (change,) = Conversation().take(result(text), Policy())
    value = json.loads(change.text)
    assert change.text.endswith('"exit_code": 0, "took": 1.50}')
    assert set(value) == set(given)
    assert change.hash in value["output"]
    assert change.sent_tokens < 600


def test_the_text_that_json_wraps_is_pointed_at() -> None:
    first, second = json.dumps({"output": FILE}), json.dumps({"output": FILE, "exit_code": 0})
    said = sent([result(first), result(second)])[1]
    assert json.loads(said)["output"].startswith("[40 lines: all of result 1 #")


@pytest.mark.parametrize("indent", [None, 2])
def test_json_keeps_its_keys_first_items_and_counts(indent: int | None) -> None:
    rows = [{"id": n, "name": f"row {n}", "score": n / 8} for n in range(400)]
    text = json.dumps({"rows": rows, "next": None, "text": "x" * 5000}, indent=indent)
    (change,) = Conversation().take(result(text), Policy())
    value = json.loads(change.text)
    assert list(value) == ["rows", "next", "text", "kimi-proxy"]
    assert value["rows"][0] == rows[0]
    assert value["rows"][-1].endswith(" more")
    assert change.hash in value["kimi-proxy"]
    assert change.sent_tokens < 600
    assert ("\n" in change.text) == (indent is not None)


# What is never touched


LONG = "\n".join(prose(5, 500))
TOUCHED = {
    "openai": {"role": "tool", "tool_call_id": "t", "content": LONG},
    "openai list": {"role": "tool", "content": [{"type": "text", "text": LONG}]},
    "openai function": {"role": "function", "name": "f", "content": LONG},
    "anthropic": {"role": "user", "content": [{"type": "tool_result", "content": LONG}]},
    "anthropic list": {
        "role": "user",
        "content": [{"type": "tool_result", "content": [{"type": "text", "text": LONG}]}],
    },
    "gemini": {"role": "user", "parts": [{"functionResponse": {"response": {"result": LONG}}}]},
    "gemini object": {
        "role": "user",
        "parts": [{"functionResponse": {"response": {"stdout": LONG, "exit_code": 0}}}],
    },
    "responses": {"type": "function_call_output", "call_id": "c", "output": LONG},
    "openai pasted": {"role": "user", "content": f'Fix it\n<file name="a">\n{LONG}\n</file>'},
}
UNTOUCHED = {
    "openai system": {"role": "system", "content": LONG},
    "openai typed": {"role": "user", "content": LONG},
    "openai assistant": {"role": "assistant", "content": LONG, "reasoning_content": LONG},
    "openai fence": {"role": "user", "content": f"```python\n{LONG}\n```"},
    "anthropic thinking": {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": LONG, "signature": "s"}],
    },
    "anthropic server": {
        "role": "assistant",
        "content": [
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"q": LONG}},
            {
                "type": "web_search_tool_result",
                "tool_use_id": "s",
                "content": [{"type": "web_search_result", "encrypted_content": LONG}],
            },
            {"type": "mcp_tool_result", "content": [{"type": "text", "text": LONG}]},
            {"type": "bash_code_execution_tool_result", "content": {"stdout": LONG}},
        ],
    },
    "anthropic image": {
        "role": "user",
        "content": [
            {"type": "tool_result", "content": [{"type": "image", "source": {"data": "A" * 9999}}]}
        ],
    },
    "gemini numbers": {
        "role": "user",
        "parts": [{"functionResponse": {"response": {"a": list(range(3000))}}}],
    },
}


def message_of(name: str, value: Any) -> Message:
    dialect = dialects.DIALECTS[name.split()[0]]
    return dialect.read(Unit("message", json.dumps(value).encode(), ()))


@pytest.mark.parametrize("name", TOUCHED)
def test_results_of_every_dialect_are_masked(name: str) -> None:
    (change,) = Conversation().take(message_of(name, TOUCHED[name]), Policy())
    assert LONG in change.original
    assert change.sent_tokens < 600


@pytest.mark.parametrize("name", UNTOUCHED)
def test_all_else_is_left_alone(name: str) -> None:
    conversation = Conversation()
    conversation.take(result(LONG), None)
    assert not conversation.take(message_of(name, UNTOUCHED[name]), Policy())


def test_what_a_person_typed_round_a_block_keeps_its_bytes() -> None:
    head, tail = "Typed   \r\nbefore\t\n", "\n after \x1b[1m \n"
    text = f"{head}```src/a.py (1-500)\n{LONG}\n```{tail}"
    (change,) = Conversation().take(user(text), Policy())
    assert change.text.startswith(head)
    assert change.text.endswith("\n```" + tail)
    assert change.original == text
    assert change.hash in change.text


def test_lines_of_a_block_are_counted_in_the_whole_message() -> None:
    block = "\n".join(["same"] * 80 + LINES)
    text = f"Look:\n\n```a.log\n{block}\n```\nand <file>{LONG}</file>"
    conversation = Conversation()
    (change,) = conversation.take(user(text), REFERENCES)
    sent = change.text.split("\n")
    (later,) = conversation.take(result("\n".join(LINES)), REFERENCES)
    found = re.search(r"from line (\d+)", later.text)
    assert found
    assert sent[int(found[1]) - 1 :][: len(LINES)] == LINES


# For any conversation


REFERENCE = re.compile(
    r"\[(?:lines? (?P<a>\d+)(?:-\d+)?|(?P<n>\d+) lines?): "
    r"(?:(?P<all>all of )|as in |as lines? (?P<c>\d+)(?:-\d+)? in |as )?"
    r"(?:result (?P<result>\d+)|lines? (?P<up>\d+)(?:-\d+)? above|(?P<above>above)"
    r"|the (?:(?P<period>\d+) lines|line) above (?:(?P<times>\d+) times more|once more))"
    r"(?: \([^()]*\))?(?:, from line (?P<line>\d+)(?: \".*\")?)?(?: #[0-9a-f]{16})?\]"
)
NUMBER = re.compile(r"\s*(\d+)\t")


def bare(line: str) -> str:
    return NUMBER.sub("", line, count=1).rstrip()


def expanded(text: str, results: Sequence[str]) -> list[str]:
    """Return the lines of a text with those that its references point at, numbers apart."""
    lines = text.split("\n")
    made: list[str] = []
    for index, line in enumerate(lines):
        found = REFERENCE.fullmatch(line)
        if not found:
            made.append(bare(line))
            continue
        if found["a"]:
            spans = re.match(r"\[lines? (\d+)(?:-(\d+))?", line)
            assert spans
            count = int(spans[2] or spans[1]) - int(spans[1]) + 1
        else:
            count = int(found["n"])
        if "above " in line and ("more" in line):
            period = int(found["period"] or 1)
            assert count == period * int(found["times"] or 1)
            made += [bare(one) for one in lines[index - period : index]] * (count // period)
            continue
        source = (
            lines[:index] if not found["result"] else results[int(found["result"]) - 1].split("\n")
        )
        if found["line"]:
            start = int(found["line"]) - 1
        elif found["all"]:
            start = 0
            assert len(source) == count
        else:
            wanted = found["c"] or found["up"] or found["a"]
            assert wanted
            start = next(
                at
                for at, one in enumerate(source)
                if (known := NUMBER.match(one)) and known[1] == wanted
            )
        taken = source[start : start + count]
        assert len(taken) == count
        assert not any(map(REFERENCE.fullmatch, taken))
        made += map(bare, taken)
    return made


CHUNKS = [prose(seed, 9) for seed in range(5)] + [["", "}"], ["same line of text"] * 12]
TEXTS = st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=7).flatmap(
    lambda chunks: st.sampled_from(
        [
            "\n".join(line for chunk in chunks for line in chunk),
            numbered([line for chunk in chunks for line in chunk], 7),
        ]
    )
)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_expanding_every_reference_gives_the_original_back(texts: list[str]) -> None:
    results: list[str] = []
    conversation = Conversation()
    for text in texts:
        changes = conversation.take(result(text, f"c{len(results)}"), REFERENCES)
        results.append(changes[0].text if changes else text)
        assert expanded(results[-1], results) == [bare(line) for line in text.split("\n")]
        for change in changes:
            assert change.sent_tokens < change.tokens
            assert change.hash in change.text


ANY = st.one_of(
    TEXTS,
    st.text(max_size=300).map(lambda text: text * 40),
    st.text(alphabet='\r\x08\x1b[]ab1:\n\t {}"\ud800`<>/', max_size=200).map(
        lambda text: text * 30
    ),
    st.recursive(
        st.none() | st.floats() | st.text(max_size=40) | st.integers(),
        lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=9), inner),
        max_leaves=30,
    ).map(lambda value: json.dumps([value] * 40)),
)
POLICIES = st.sampled_from([None, REFERENCES, Policy(150, 60), Policy(1, 0), Policy(100, 300)])
STEPS = st.lists(st.tuples(ANY, st.booleans(), POLICIES), max_size=6)


def taken(conversation: Conversation, steps: Sequence[tuple[str, bool, Policy | None]]) -> Any:
    return [
        conversation.take(user(f"<file>{text}</file>") if typed else result(text), policy)
        for text, typed, policy in steps
    ]


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_any_text_is_decided_on_and_always_alike(
    steps: list[tuple[str, bool, Policy | None]],
) -> None:
    whole = taken(Conversation(), steps)
    half = Conversation()
    taken(half, steps[:2])
    branch = half.copy()
    taken(branch, [("\n".join(prose(9, 90)), False, REFERENCES)])
    assert taken(half, steps[2:]) == whole[2:]
    assert taken(Conversation(), steps) == whole
    for changes, (text, _, _) in zip(whole, steps, strict=True):
        for change in changes:
            assert change.sent_tokens < change.tokens
            assert change.hash in change.text
            assert text in change.original


def test_another_process_decides_the_same() -> None:
    code = (
        "import sys, test_masking as t; from kimi_core.masking.conversation import Conversation\n"
        "c = Conversation()\n"
        "for n in (1, 2, 1): print(c.take(t.result(chr(10).join(t.prose(n, 300))), t.Policy()))"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "addons")]
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(folders), "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert b"Change(" in said.pop()


def test_a_policy_is_read_back() -> None:
    for policy in (Policy(), Policy(0, 5, False)):
        assert Policy.parse(str(policy)) == policy
    for text in ("", "2 1 1 r", "1 a 1 r", "1 1 1 x", "1 1 1"):
        with pytest.raises(ValueError):  # noqa: PT011
            Policy.parse(text)


def test_change_is_what_it_says() -> None:
    (change,) = Conversation().take(result("\n".join(prose(1, 300))), Policy())
    assert isinstance(change, Change)
    assert (change.path, len(change.hash)) == (("content",), 16)
