"""What of a request leaves in another form: once decided, always so."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core import dialects
from kimi_core.context import Context
from kimi_core.dialects import Dialect
from kimi_core.document import Document
from kimi_core.masking.policy import Policy
from kimi_core.masking.requests import OFF, Masker, Plan, originals
from kimi_core.tokens import tokenizer_for

Messages = list[dict[str, Any]]
POLICY = Policy(threshold=200, keep=100)
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def listing(seed: int, lines: int = 60) -> str:
    chosen = random.Random(seed)
    return "\n".join(
        f"{chosen.choice(WORDS)}_{chosen.randrange(1000)} = {chosen.choice(WORDS)}({number})"
        for number in range(lines)
    )


def rounds(texts: Sequence[str]) -> Messages:
    messages: Messages = [
        {"role": "system", "content": "You are an agent."},
        {"role": "user", "content": "Fix the bug in theta.py."},
    ]
    for number, text in enumerate(texts):
        function = {"name": "read", "arguments": json.dumps({"path": f"f{number}.py"})}
        call = {"id": f"call_{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": text})
    return messages


def body_of(messages: Messages, dialect: Dialect = dialects.OPENAI) -> bytes:
    key = "contents" if dialect is dialects.GEMINI else "messages"
    return json.dumps({"model": "m", key: messages, "stream": True}).encode()


def document_of(body: bytes, dialect: Dialect = dialects.OPENAI) -> tuple[Document, Context]:
    document = Document(body, dialect.shape)
    return document, Context(dialect, document)


def sent(
    masker: Masker, messages: Messages, policy: Policy | None = POLICY, owner: str = "me"
) -> tuple[list[bytes], Plan]:
    """Return each message as it leaves."""
    document, context = document_of(body_of(messages))
    plan = masker.plan(context, owner, policy)
    for index, raw in masker.changed(context, plan).items():
        document.set_raw(context.message(index).unit.path, raw)
    body = document.encode()
    json.loads(body)
    return [bytes(raw) for raw in document.elements("messages")], plan


def starts_with(later: list[bytes], earlier: list[bytes]) -> bool:
    return later[: len(earlier)] == earlier


def test_what_was_shown_before_is_pointed_at_and_can_be_had_back() -> None:
    text = listing(1)
    messages = rounds([text, "nothing", text])
    out, plan = sent(Masker(), messages, Policy(threshold=0))
    (mask,) = plan.masks
    assert mask.message == 7
    assert mask.kind == "reference"
    assert mask.new
    assert mask.sent_tokens < mask.tokens / 4
    assert mask.hash in json.loads(out[7])["content"]
    _, context = document_of(body_of(messages))
    assert originals(context, plan.masks) == {mask.hash: text}


def test_what_is_too_long_is_cut() -> None:
    out, plan = sent(Masker(), rounds([listing(1, 400)]))
    (mask,) = plan.masks
    assert mask.kind == "cut"
    counted = tokenizer_for("o200k").count(json.loads(out[3])["content"])
    assert counted == mask.sent_tokens < 200 < mask.tokens


def test_nothing_but_the_masked_message_changes() -> None:
    messages = rounds([listing(1, 400), "short"])
    body = b' {"extra": 1.50, "messages" : ' + json.dumps(messages, indent=1).encode() + b"}"
    document, context = document_of(body)
    masker = Masker()
    plan = masker.plan(context, "me", POLICY)
    for index, raw in masker.changed(context, plan).items():
        document.set_raw(context.message(index).unit.path, raw)
    before, after = json.loads(body), json.loads(document.encode())
    assert [n for n in range(6) if before["messages"][n] != after["messages"][n]] == [3]
    _head, _, _ = body.partition(b"alpha_")
    assert document.encode()[:60] == body[:60]
    assert document.encode().endswith(body[-40:])


def test_the_same_history_gives_the_same_bytes_in_another_process() -> None:
    messages = rounds([listing(n % 3, 150) for n in range(8)])
    growing = Masker()
    for length in range(4, len(messages) + 1, 2):
        last, _ = sent(growing, messages[:length])
    assert sent(Masker(), messages)[0] == last


def test_a_longer_conversation_is_known_as_far_as_it_was_seen() -> None:
    masker = Masker()
    messages = rounds([listing(1, 400), listing(2, 400)])
    first, plan = sent(masker, messages[:4])
    assert plan.known == 0
    assert [mask.new for mask in plan.masks] == [True]
    second, plan = sent(masker, messages)
    assert plan.known == 4
    assert [mask.new for mask in plan.masks] == [False, True]
    assert starts_with(second, first)
    again, plan = sent(masker, messages)
    assert plan.known == len(messages)
    assert not any(mask.new for mask in plan.masks)
    assert again == second
    _, context = document_of(body_of(messages))
    assert masker.unread(context, "me") == (0, True)


def test_a_switch_concerns_new_messages_only() -> None:
    masker = Masker()
    messages = rounds([listing(1, 400), listing(2, 400), listing(3, 400)])
    first, _ = sent(masker, messages[:4])
    second, plan = sent(masker, messages[:6], None)
    assert starts_with(second, first)
    assert [mask.message for mask in plan.masks] == [3]
    third, plan = sent(masker, messages)
    assert starts_with(third, second)
    assert [mask.message for mask in plan.masks] == [3, 7]
    # What another process knows of it is in the store.
    other = Masker()
    known = [(plan.digest, plan.policies[-1][1])]
    for length, policy in ((4, POLICY), (6, None)):
        _, context = document_of(body_of(messages[:length]))
        known.insert(-1, (other.digests(context, "me")[-1], str(policy) if policy else OFF))
    other.remember(known)
    assert sent(other, messages, Policy(threshold=1))[0] == third


def test_deciding_anew_is_for_what_follows_and_holds_from_then_on() -> None:
    masker = Masker()
    messages = rounds([listing(1, 400), listing(2, 400)])
    first, plan = sent(masker, messages)
    _, context = document_of(body_of(messages))
    plan = masker.again(context, "me", None, 5)
    assert [mask.message for mask in plan.masks] == [3]
    second, _ = sent(masker, messages)
    assert second[:5] == first[:5]
    assert second[5] != first[5]
    masker.again(context, "me", None)
    assert sent(masker, messages)[1].masks == []


def test_decisions_are_those_of_one_owner() -> None:
    masker = Masker()
    messages = rounds([listing(1, 400)])
    sent(masker, messages, None, "you")
    assert sent(masker, messages, POLICY, "me")[1].masks
    assert not sent(masker, messages, POLICY, "you")[1].masks


def test_a_text_that_becomes_a_list_of_one_block_leaves_in_the_same_words() -> None:
    # So does Claude Code when it moves cache_control.
    text = listing(1, 400)
    result = {"type": "tool_result", "tool_use_id": "t", "content": text}
    call = {"type": "tool_use", "id": "t", "name": "read", "input": {}}
    messages = [
        {"role": "user", "content": "Read it."},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    masker, found = Masker(), []
    marked = {**result, "cache_control": {"type": "ephemeral"}}
    listed = {**result, "content": [{"type": "text", "text": text}]}
    for one in (result, marked, listed):
        messages[2] = {"role": "user", "content": [one]}
        _document, context = document_of(body_of(messages), dialects.ANTHROPIC)
        plan = masker.plan(context, "me", POLICY)
        (raw,) = masker.changed(context, plan).values()
        content = json.loads(raw)["content"][0]
        assert ("cache_control" in content) == (one is marked)
        said = content["content"]
        found.append(said if isinstance(said, str) else said[0]["text"])
    assert found[0] != text
    assert found[0] == found[1] == found[2]


def test_two_equal_results_in_one_message_are_two() -> None:
    text = listing(1, 100)
    results = [{"type": "tool_result", "tool_use_id": f"t{n}", "content": text} for n in (1, 2)]
    messages: Messages = [{"role": "user", "content": results}]
    _document, context = document_of(body_of(messages), dialects.ANTHROPIC)
    masker = Masker()
    plan = masker.plan(context, "me", Policy(threshold=0))
    (raw,) = masker.changed(context, plan).values()
    first, second = json.loads(raw)["content"]
    assert first["content"] == text
    assert len(second["content"]) < len(text) / 3


TEXTS = st.sampled_from(
    [*(listing(n, 90) for n in range(3)), listing(0, 300), "ok", "", '{"a": [1, 2]}', "x" * 5000]
)
POLICIES = st.sampled_from([POLICY, None, Policy(threshold=0), Policy(references=False)])


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=7),
    policies=st.lists(POLICIES, min_size=7, max_size=7),
    restarts=st.sets(st.integers(0, 6)),
)
def test_each_request_begins_with_the_one_before(
    texts: list[str], policies: list[Policy | None], restarts: set[int]
) -> None:
    messages = rounds(texts)
    masker, stored, before = Masker(), [], []
    for turn in range(len(texts)):
        if turn in restarts:
            masker = Masker()
            masker.remember(stored)
        now, plan = sent(masker, messages[: 4 + 2 * turn], policies[turn])
        stored.append((plan.digest, plan.policies[-1][1]))
        assert starts_with(now, before)
        before = now
    assert [len(before), b"".join(before).count(b'"role"')] == [len(messages)] * 2


@pytest.mark.parametrize("content", [None, 5, {"a": 1}, [], [5], "\ud800" * 900])
def test_what_cannot_be_read_leaves_as_it_is(content: Any) -> None:
    messages = rounds(["ok"])
    messages[3]["content"] = content
    out, plan = sent(Masker(), messages, Policy(threshold=1, keep=0))
    if not plan.masks:
        assert json.loads(out[3])["content"] == content
