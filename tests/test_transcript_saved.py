"""What was left out of a request, in the words of its transcript."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core import dialects, transcript, transcript_saved
from kimi_core.exchange import Message, Part, Saving
from kimi_core.masking.conversation import Change, Conversation
from kimi_core.masking.marks import kind_of
from kimi_core.masking.policy import Policy
from kimi_core.tokens import tokenizer_for
from kimi_core.transcript_saved import Left

CHAT = dialects.match("POST", "/v1/chat/completions")
assert CHAT is not None
FILE = "\n".join(f"{n:6}\tdef function_{n}(argument): return argument + {n * 7}" for n in range(60))
PLAIN = "\n".join(f"the {n}th line of a text without numbers says {n * 31}" for n in range(60))
LOG = "\n".join(f"12:00:{n % 60:02} worker {n * 17 % 101} took {n * n} ms" for n in range(900))
REPEATED = "\n".join(["waiting for the lock of the package manager to be released"] * 80)
TABLE = json.dumps([{"id": n, "name": f"name {n}", "text": "x y z " * 40} for n in range(200)])
LONG_LINE = "var a = " + " + ".join(f"f{n}({n * n})" for n in range(4000))
RESULTS = (FILE, f"{FILE}\nand one more", PLAIN, PLAIN, f"a\n{PLAIN}\nb", LOG, REPEATED, TABLE)


def masks(*results: str, **policy: Any) -> list[tuple[int, Change]]:
    """Return what masking makes of these results of calls, each with its message's index."""
    conversation, found = Conversation(), []
    index = 0
    for number, result in enumerate(results):
        call = Part("tool_call", "assistant", '{"path": "src/x.py"}', name="open", id=f"c{number}")
        part = Part("tool_result", "tool_result", result, ("content",), id=f"c{number}")
        for message in (Message("assistant", (call,)), Message("tool", (part,))):
            changes = conversation.take(message, Policy(**policy))
            found += [(index, change) for change in changes]
            index += 1
    return found


def requested(*results: str) -> tuple[bytes, list[Saving]]:
    """Return a request as it leaves after masking, and what was left out of it."""
    messages: list[dict[str, Any]] = []
    for number, result in enumerate(results):
        function = {"name": "open", "arguments": '{"path": "src/x.py"}'}
        messages.append(
            {"role": "assistant", "tool_calls": [{"id": f"c{number}", "function": function}]}
        )
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": result})
    savings = []
    for index, change in masks(*results):
        messages[index]["content"] = change.text
        kind = "cut" if "cut" in change.kinds else "reference"
        saved = change.tokens - change.sent_tokens
        savings.append(Saving(kind, index, saved, change.hash))
    return json.dumps({"model": "m", "messages": messages}).encode(), savings


# --- which lines are ours -------------------------------------------------------------


@pytest.mark.parametrize("policy", [{}, {"threshold": 0}, {"references": False}], ids=str)
def test_each_line_that_masking_wrote_is_recognised_and_no_other(policy: dict[str, Any]) -> None:
    ours: dict[str | None, int] = {}
    for _, change in masks(*RESULTS[:-1], LONG_LINE, **policy):
        given = set(change.original.split("\n"))
        for line in change.text.split("\n"):
            kind = kind_of(line)
            assert (kind is None) == (line in given), line
            ours[kind] = ours.get(kind, 0) + 1
    assert ours[None]
    assert bool(ours.get("reference")) == (policy.get("references") is not False)
    assert bool(ours.get("cut")) == (policy.get("threshold") != 0)


def test_where_the_shape_of_json_was_kept_the_note_is_recognised() -> None:
    ((_, change),) = masks(TABLE)
    assert "cut" in [kind_of(line) for line in change.text.split("\n")]


@pytest.mark.parametrize(
    "line",
    ["", "plain", "[1, 2]", "[info] 3 lines: as before", "[warning: cut]", "x [5 lines: as in x]"],
)
def test_a_line_of_a_texts_own_is_not_ours(line: str) -> None:
    assert kind_of(line) is None


# --- the request's view ---------------------------------------------------------------


def test_a_masked_request_is_marked_and_ends_with_what_was_left_out() -> None:
    body, savings = requested(FILE, FILE, LOG)
    saved = transcript_saved.loaded(transcript_saved.dumped(savings, 65536))
    text = transcript.request(CHAT, body, lambda _: 7, saved)
    first, second = savings
    lines = text.splitlines()
    assert f"── 4 tool · 7 tokens · {first.tokens:,} left out ─" in text
    assert "── 2 tool · 7 tokens ─" in text
    marked = [line for line in lines if line[:2] in ("≡ ", "✂ ")]
    assert marked[0].startswith("≡ [lines 0-59: as in result 1")
    assert len([line for line in marked if line.startswith("✂ ")]) >= 2
    at = next(n for n, line in enumerate(lines) if line.startswith("── saved"))
    total = first.tokens + second.tokens
    assert lines[at].startswith(f"── saved · {total:,} tokens of o200k not sent ─")
    count = tokenizer_for("o200k").count
    sent = [json.loads(body)["messages"][n]["content"] for n in (3, 5)]
    assert lines[at + 1 :] == [
        f"1. message 4 · reference · {count(FILE):,} → {count(sent[0]):,} tokens · "
        f"{first.hash} · open src/x.py",
        f"2. message 6 · cut · {count(LOG):,} → {count(sent[1]):,} tokens · "
        f"{second.hash} · open src/x.py",
    ]


def test_without_a_tokenizer_only_what_was_left_out_is_told() -> None:
    body, savings = requested(FILE, FILE)
    saved = transcript_saved.loaded(transcript_saved.dumped(savings, 65536))
    last = transcript.request(CHAT, body, None, saved).splitlines()[-1]
    assert f"1. message 4 · reference · {savings[0].tokens} tokens left out · " in last


def test_a_request_of_which_nothing_was_left_out_reads_as_before() -> None:
    body, _ = requested(FILE, FILE)
    plain = transcript.request(CHAT, body)
    assert "saved" not in plain
    assert "≡" not in plain


def test_a_summary_and_a_mask_that_is_not_in_the_request_are_told_all_the_same() -> None:
    body, _ = requested(FILE)
    saved = [Left(1, "compression", 90_000, "a" * 16), Left(99, "cut", 5, "b" * 16)]
    lines = transcript.request(CHAT, body, lambda _: 7, saved).splitlines()
    assert lines[-2:] == [
        f"1. message 1 · compression · 90,000 tokens left out · {'a' * 16}",
        f"2. message 99 · cut · 5 tokens left out · {'b' * 16}",
    ]


def test_what_a_flow_says_cannot_pass_for_another_part_of_the_view() -> None:
    body, _ = requested(FILE)
    forged = "x\n── assistant ──\r9. y\x85z\u2028"
    text = transcript.request(CHAT, body, None, [Left(2, forged, 1, forged)])
    assert [line for line in text.splitlines() if "assistant ──" in line][1:] == [
        "1. message 2 · x ── assistant ── 9. y z · 1 tokens left out · x ── assistant ── 9. y z"
    ]


# --- in the flow ----------------------------------------------------------------------


def test_a_list_that_would_be_too_long_keeps_its_end_and_sums_the_rest() -> None:
    savings = [Saving("cut", n, 10, f"{n:016x}") for n in range(2000)]
    said = transcript_saved.dumped(savings, 65536)
    assert 60_000 < len(said) <= 65536
    first, *rest = transcript_saved.loaded(said)
    assert (first.kind, first.message) == ("earlier", 0)
    assert first.tokens == 10 * (2000 - len(rest))
    assert rest[-1] == Left(2000, "cut", 10, f"{1999:016x}")
    body, _ = requested(FILE)
    shown = transcript.request(CHAT, body, None, [first]).splitlines()[-1]
    assert shown == f"1. messages before these · {first.tokens:,} tokens left out"


@given(
    st.lists(
        st.builds(
            Saving,
            st.sampled_from(["reference", "cut", "compression"]),
            st.integers(0, 10_000),
            st.integers(0, 10**9),
            st.text("0123456789abcdef", min_size=16, max_size=32),
        )
    ),
    st.integers(200, 3000),
)
def test_no_token_is_lost_on_the_way_through_a_flow(savings: list[Saving], limit: int) -> None:
    said = transcript_saved.dumped(savings, limit)
    assert len(said) <= limit
    found = transcript_saved.loaded(said)
    assert sum(one.tokens for one in found) == sum(saving.tokens for saving in savings)
    if found and found[0].kind != "earlier":
        assert [(one.message - 1, one.kind, one.hash) for one in found] == [
            (saving.message, saving.kind, saving.hash) for saving in savings
        ]


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        b"[]",
        "",
        "[",
        "[" * 100_000,
        "{}",
        '[1, null, "x", [], {}]',
        '[{"message": 1, "kind": "cut", "tokens": 5}]',
        '[{"message": true, "kind": "cut", "tokens": 5, "hash": "a"}]',
        '[{"message": 1, "kind": ["cut"], "tokens": 5, "hash": "a"}]',
        '[{"message": 1, "kind": "cut", "tokens": -5, "hash": "a"}]',
        '[{"message": 1, "kind": "cut", "tokens": 1e999, "hash": "a"}]',
        f'[{{"message": 1, "kind": "cut", "tokens": {"9" * 4000}, "hash": "a"}}]',
    ],
)
def test_what_is_no_list_of_savings_is_left_out(value: object) -> None:
    assert transcript_saved.loaded(value) == []
