"""Where conversations are cut, what stands in, and what a summary is made of."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core.compaction import cuts, planning, prompt, rewrite
from kimi_core.compaction.asking import Answer, SummaryFailed, body
from kimi_core.compaction.extract import extract
from kimi_core.compaction.planning import Conversation, NotWorth, Plan, Size, plan
from kimi_core.compaction.summaries import Summaries, Summary, from_row, prefix_id
from kimi_core.compaction.targets import of_client, of_route, of_rules, shown
from kimi_core.context import Context, Counter
from kimi_core.dialects import ANTHROPIC, DIALECTS, GEMINI, OPENAI, RESPONSES, Dialect
from kimi_core.document import Document
from kimi_core.exchange import Message, Route, Usage
from kimi_core.keys import SECRET_HEADERS
from kimi_core.masking.policy import Policy
from kimi_core.masking.requests import Masker
from kimi_core.rules import RulesError, load

JSON = dict[str, Any]
HISTORY = {
    "openai": "messages",
    "responses": "input",
    "anthropic": "messages",
    "gemini": "contents",
}
EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def wish(dialect: Dialect, text: str) -> list[JSON]:
    if dialect is GEMINI:
        return [{"role": "user", "parts": [{"text": text}]}]
    return [{"role": "user", "content": text}]


def said(dialect: Dialect, text: str) -> list[JSON]:
    if dialect is GEMINI:
        return [{"role": "model", "parts": [{"text": text}]}]
    return [{"role": "assistant", "content": text}]


def round_of(
    dialect: Dialect, ids: list[str], result: str = "done", text: str = "I look.", user: str = ""
) -> list[JSON]:
    """Return parallel calls and their results, `user` beside the last of these if it may be."""
    if dialect is OPENAI:
        calls = [
            {"id": i, "type": "function", "function": {"name": "sh", "arguments": '{"cmd": "ls"}'}}
            for i in ids
        ]
        results = [{"role": "tool", "tool_call_id": i, "content": result} for i in ids]
        return [{"role": "assistant", "content": text, "tool_calls": calls}, *results] + (
            wish(dialect, user) if user else []
        )
    if dialect is RESPONSES:
        calls = [
            {"type": "function_call", "call_id": i, "name": "sh", "arguments": '{"cmd": "ls"}'}
            for i in ids
        ]
        results = [{"type": "function_call_output", "call_id": i, "output": result} for i in ids]
        thought = {"type": "reasoning", "id": "r" + ids[0], "encrypted_content": "x", "summary": []}
        return [thought, *calls, *results] + (wish(dialect, user) if user else [])
    if dialect is ANTHROPIC:
        calls = [{"type": "tool_use", "id": i, "name": "sh", "input": {"cmd": "ls"}} for i in ids]
        results = [{"type": "tool_result", "tool_use_id": i, "content": result} for i in ids]
        more = [{"type": "text", "text": user}] if user else []
        return [
            {"role": "assistant", "content": [{"type": "text", "text": text}, *calls]},
            {"role": "user", "content": results + more},
        ]
    calls = [{"functionCall": {"name": "sh", "args": {"cmd": "ls"}}} for _ in ids]
    results = [{"functionResponse": {"name": "sh", "response": {"out": result}}} for _ in ids]
    more = [{"text": user}] if user else []
    return [
        {"role": "model", "parts": [{"text": text}, *calls]},
        {"role": "user", "parts": results + more},
    ]


def conversation_of(dialect: Dialect, messages: list[JSON], **more: Any) -> Conversation:
    raw = json.dumps({"model": "m", HISTORY[dialect.name]: messages, **more}).encode()
    return Conversation(dialect, raw, "owner", "s1")


def context_of(dialect: Dialect, messages: list[JSON], **more: Any) -> Context:
    return Context(dialect, conversation_of(dialect, messages, **more).document())


def rounds(dialect: Dialect, count: int, result: str = "done") -> list[JSON]:
    made = wish(dialect, "Mend the parser")
    for n in range(count):
        made += round_of(dialect, [f"c{n}"], result)
    return made


def cut(given: Context, keep: int = 5, after: int = 0) -> int:
    return cuts.find(given, cuts.messages_of(given), keep, after)


def compressed(conversation: Conversation, end: int, text: str = "SUMMARY") -> list[JSON]:
    document = conversation.document()
    given = Context(conversation.dialect, document)
    made = rewrite.compress(document, given, end, cuts.head(given, end), text)
    history = json.loads(document.encode())[HISTORY[conversation.dialect.name]]
    assert len(made) == len(history)
    return history


def size() -> Size:
    """Return what counts requests that nobody masks."""
    counter = Counter()
    return lambda given: planning.count(given, counter)


def made_plan(dialect: Dialect = OPENAI, base: Summary | None = None, **more: Any) -> Plan:
    conversation = conversation_of(dialect, rounds(dialect, 60, "line of output\n" * 60))
    return plan(conversation, size(), 5, "balanced", base, **more)


# --- where it is cut ------------------------------------------------------------------


@EVERY_DIALECT
def test_sixty_rounds_after_one_wish_are_cut(dialect: Dialect) -> None:
    messages = rounds(dialect, 60)
    end = cut(context_of(dialect, messages))
    per_round = (len(messages) - 1) // 60
    assert end == len(messages) - 5 * per_round


@EVERY_DIALECT
def test_too_few_exchanges_are_not_cut(dialect: Dialect) -> None:
    assert cut(context_of(dialect, rounds(dialect, 5))) == 0
    assert cut(context_of(dialect, rounds(dialect, 6))) > 0
    assert cut(context_of(dialect, rounds(dialect, 2))) == 0
    assert cut(context_of(dialect, [])) == 0


@EVERY_DIALECT
def test_a_further_cut_replaces_an_exchange_more(dialect: Dialect) -> None:
    given = context_of(dialect, rounds(dialect, 20))
    end = cut(given)
    assert cut(given, after=end) == 0
    assert cut(given, after=end - 1) == end


def test_a_late_result_keeps_its_call() -> None:
    messages = rounds(OPENAI, 12)
    assert cut(context_of(OPENAI, messages)) == 15
    (late,) = messages[12:13]
    messages[12:13] = wish(OPENAI, "Well?")
    messages.append(late)
    assert late["tool_call_id"] == messages[11]["tool_calls"][0]["id"]
    assert cut(context_of(OPENAI, messages)) == 11


def test_an_id_that_comes_again_pairs_with_the_call_before_it() -> None:
    messages = wish(OPENAI, "Go")
    for _ in range(12):
        messages += round_of(OPENAI, ["functions.sh:0"])
    assert cut(context_of(OPENAI, messages)) == 1 + 2 * 7


def test_reasoning_stays_with_what_follows_it() -> None:
    messages = rounds(RESPONSES, 10)
    end = cut(context_of(RESPONSES, messages))
    assert messages[end]["type"] == "reasoning"


def test_what_a_provider_sealed_is_not_cut_away() -> None:
    messages = rounds(RESPONSES, 10)
    messages.insert(3, {"type": "compaction", "encrypted_content": "sealed"})
    assert cut(context_of(RESPONSES, messages)) == 0


@pytest.mark.parametrize("key", ["previous_response_id", "conversation"])
def test_a_conversation_that_the_provider_keeps_is_left_alone(key: str) -> None:
    with pytest.raises(NotWorth, match="the provider keeps"):
        plan(
            conversation_of(RESPONSES, rounds(RESPONSES, 60), **{key: "x"}),
            size(),
            5,
            "balanced",
        )


@pytest.mark.parametrize("item", [{"type": "item_reference", "id": "rs_1"}, {"id": "rs_1"}])
def test_a_conversation_that_refers_to_what_the_provider_keeps_is_left_alone(item: JSON) -> None:
    messages = rounds(RESPONSES, 60)
    messages.insert(90, item)
    with pytest.raises(NotWorth, match="the provider keeps"):
        plan(conversation_of(RESPONSES, messages), size(), 5, "balanced")
    messages[90] = said(RESPONSES, 'It is an "item_reference".')[0]
    conversation = conversation_of(RESPONSES, messages)
    assert planning.is_whole(conversation.document(), RESPONSES)


# --- what stands in -------------------------------------------------------------------


def test_a_text_is_continued_and_a_list_gets_a_block() -> None:
    for dialect, block in ((OPENAI, "text"), (ANTHROPIC, "text"), (RESPONSES, "input_text")):
        messages = rounds(dialect, 10)
        assert compressed(conversation_of(dialect, messages), 13)[0]["content"] == (
            "Mend the parser\n\nSUMMARY"
        )
        messages[0]["content"] = [{"type": block, "text": "Mend", "cache_control": None}]
        content = compressed(conversation_of(dialect, messages), 13)[0]["content"]
        assert content == [*messages[0]["content"], {"type": block, "text": "SUMMARY"}]
    parts = [{"text": "Mend the parser"}, {"text": "SUMMARY"}]
    assert compressed(conversation_of(GEMINI, rounds(GEMINI, 10)), 13)[0]["parts"] == parts
    alone = rounds(GEMINI, 10)
    alone[0]["parts"] = alone[0]["parts"][0]
    assert compressed(conversation_of(GEMINI, alone), 13)[0]["parts"] == parts


@EVERY_DIALECT
def test_without_a_users_message_first_one_is_inserted(dialect: Dialect) -> None:
    messages = rounds(dialect, 10)[1:]
    per_round = len(messages) // 10
    history = compressed(conversation_of(dialect, messages), 3 * per_round)
    assert "SUMMARY" in json.dumps(history[0])
    assert history[0]["role"] == "user"
    assert history[1:] == messages[3 * per_round :]


def test_system_messages_stay_wherever_they_stand() -> None:
    system = [{"role": "system", "content": "S"}, {"role": "developer", "content": "D"}]
    late = {"role": "system", "content": "late"}
    messages = [*system, *rounds(OPENAI, 10)]
    messages.insert(6, late)
    history = compressed(conversation_of(OPENAI, messages), 12)
    assert history[:2] == system
    assert history[2]["content"].endswith("SUMMARY")
    assert history[3] == late
    assert history[4:] == messages[12:]


def test_all_that_the_user_began_with_stays() -> None:
    messages = [*wish(RESPONSES, "<environment>"), *rounds(RESPONSES, 10)]
    history = compressed(conversation_of(RESPONSES, messages), 2 + 9)
    assert history[0] == messages[0]
    assert history[1]["content"] == "Mend the parser\n\nSUMMARY"


@EVERY_DIALECT
def test_a_huge_first_message_is_quoted_instead(dialect: Dialect) -> None:
    messages = [*wish(dialect, "Mend this: " + "x" * 50_000 + " by noon"), *rounds(dialect, 10)[1:]]
    given = context_of(dialect, messages)
    head = cuts.head(given, 13)
    text = rewrite.stand_in(given, 13, head, "what was done")
    assert "Mend this: " in text
    assert "by noon" in text
    assert len(text) < 5_000
    history = compressed(conversation_of(dialect, messages), 13, text)
    assert history[1:] == messages[13:]


def test_the_latest_instruction_is_quoted_word_for_word() -> None:
    messages = rounds(OPENAI, 4)
    messages += wish(OPENAI, "Now never touch src/old.py") + rounds(OPENAI, 10)[1:]
    given = context_of(OPENAI, messages)
    text = rewrite.stand_in(given, 18, cuts.head(given, 18), "what was done")
    assert text.endswith("Now never touch src/old.py")
    assert rewrite.summary_in(text) == "what was done"


@EVERY_DIALECT
def test_an_image_that_goes_is_told_of(dialect: Dialect) -> None:
    image: dict[str, JSON] = {
        "openai": {"type": "image_url", "image_url": {"url": "https://x.example/a.png"}},
        "responses": {"type": "input_image", "image_url": "https://x.example/a.png"},
        "anthropic": {"type": "image", "source": {"type": "url", "url": "https://x.example/a"}},
        "gemini": {"inlineData": {"mimeType": "image/png", "data": "QUJD"}},
    }
    text = {"text": "Like this mock:"}
    if dialect is not GEMINI:
        text["type"] = "input_text" if dialect is RESPONSES else "text"
    key = "parts" if dialect is GEMINI else "content"
    messages = rounds(dialect, 4)
    messages.append({"role": "user", key: [text, image[dialect.name]]})
    messages += rounds(dialect, 10)[1:]
    given = context_of(dialect, messages)
    end = cut(given)
    stands = rewrite.stand_in(given, end, cuts.head(given, end), "what was done")
    assert stands.endswith("Like this mock:\n[image, left out]")


def test_a_summary_cannot_close_its_own_bracket() -> None:
    given = context_of(OPENAI, rounds(OPENAI, 10))
    text = rewrite.stand_in(given, 11, cuts.head(given, 11), "one </summary> two <SUMMARY> three")
    assert rewrite.summary_in(text) == "one  two  three"


def test_what_stays_keeps_its_bytes() -> None:
    kept = (
        b'{ "role":"assistant", "content":"\\u00e9 \\ud800", "n": 1.0e2, "n": 123456789012345678 }'
    )
    first = b'{"content" : "\\u0041\\/", "role":"user", "x": 1e400}'
    other = b'{"role":"user","content":"y"},{"role":"assistant","content":"z"}'
    raw = (
        b'{"messages" : [%b ,{"role":"assistant","content":"x"},%b, '
        b'{"role":"user","content":"u"}, %b],"top":NaN}'
    )
    document = Document(raw % (first, other, kept), OPENAI.shape)
    given = Context(OPENAI, document)
    rewrite.compress(document, given, 5, cuts.head(given, 5), "S")
    out = document.encode()
    assert kept in out
    assert b'{"content" : "\\u0041\\/\\n\\nS", "role":"user", "x": 1e400}' in out
    assert out.endswith(b'],"top":NaN}')
    assert b'"x"}' not in out


# --- whatever the conversation --------------------------------------------------------

STEP = st.one_of(
    st.tuples(st.just("wish"), st.text(max_size=20)),
    st.tuples(st.just("said"), st.text(max_size=20)),
    st.tuples(st.just("calls"), st.integers(1, 3)),
    st.tuples(st.just("calls and words"), st.integers(1, 2)),
    st.tuples(st.just("late"), st.just(1)),
    st.tuples(st.just("dangling"), st.just(1)),
    st.tuples(st.just("system"), st.text(max_size=9)),
)


def halves(messages: list[JSON]) -> tuple[list[JSON], list[JSON]]:
    return messages[:-1], messages[-1:]


def built(dialect: Dialect, steps: list[tuple[str, Any]], same_ids: bool) -> list[JSON]:
    messages: list[JSON] = []
    for n, (kind, value) in enumerate(steps):
        ids = (
            [f"c{0 if same_ids else n}.{i}" for i in range(value)] if isinstance(value, int) else []
        )
        if kind == "wish":
            messages += wish(dialect, value)
        elif kind == "said":
            messages += said(dialect, value)
        elif kind == "calls":
            messages += round_of(dialect, ids)
        elif kind == "calls and words":
            messages += round_of(dialect, ids, user="and hurry")
        elif kind == "late":
            call, result = halves(round_of(dialect, ids))
            messages += call + wish(dialect, "And?") + said(dialect, "Soon") + result
        elif kind == "dangling":
            messages += halves(round_of(dialect, ids))[0]
        elif dialect in (OPENAI, RESPONSES):
            messages.append({"role": "developer", "content": value})
    return messages


def parted(given: Context) -> tuple[int, int]:
    """Return how many calls have no result after them, and results no call before them."""
    open_calls: dict[object, int] = {}
    orphans = 0
    for message in cuts.messages_of(given):
        for part in message.parts:
            key = part.id or part.name
            if part.kind == "tool_call":
                open_calls[key] = open_calls.get(key, 0) + 1
            elif part.kind == "tool_result":
                if open_calls.get(key):
                    open_calls[key] -= 1
                else:
                    orphans += 1
    return sum(open_calls.values()), orphans


def twice(messages: list[Message]) -> int:
    """Return how often one side speaks twice in a row."""
    sides = [one.role == "assistant" for one in messages if one.role != "system"]
    return sum(a == b for a, b in itertools.pairwise(sides))


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(list(DIALECTS.values())),
    st.lists(STEP, max_size=25),
    st.integers(1, 6),
    st.booleans(),
)
def test_no_call_is_parted_from_its_result(
    dialect: Dialect, steps: list[tuple[str, Any]], keep: int, same_ids: bool
) -> None:
    messages = built(dialect, steps, same_ids)
    conversation = conversation_of(dialect, messages)
    given_ = Context(dialect, conversation.document())
    read = cuts.messages_of(given_)
    end = cuts.find(given_, read, keep)
    if not end:
        return
    document = conversation.document()
    head = cuts.head(given_, end)
    made = rewrite.compress(document, Context(dialect, document), end, head, "SUMMARY")
    calls, results = parted(made)
    before_calls, before_results = parted(given_)
    assert results <= before_results
    assert calls <= before_calls
    # The tail is the client's own bytes, begins with the model's word, and has its exchanges.
    tail = [bytes(given_.raw(index)) for index in range(end, len(given_))]
    assert [bytes(made.raw(index)) for index in range(len(made))][-len(tail) :] == tail
    assert read[end].role == "assistant"
    assert read[end - 1].role != "assistant"
    sides = [message.role == "assistant" for message in read]
    assert sum(sides[n] and not sides[n - 1] for n in range(end, len(read))) >= keep
    assert twice(cuts.messages_of(made)) <= twice(read)
    (holder,) = [n for n in range(len(made)) if b"SUMMARY" in bytes(made.raw(n))]
    assert holder == rewrite.place(head)
    assert [m.raw for m in read if m.role == "system"] == [
        m.raw for m in cuts.messages_of(made) if m.role == "system"
    ]


# --- whether it is worth it -----------------------------------------------------------


def test_a_plan_says_what_it_saves() -> None:
    found = made_plan()
    assert found.end == 1 + 2 * 55
    assert found.least == int(0.6 * found.sent)
    made = planning.summary(found, "All is well.", size())
    assert made.tokens_before == found.full > 10 * made.tokens_after / 2
    assert (made.messages_before, made.messages_after) == (121, 11)
    assert made.source == "extract"
    assert made.id == prefix_id(found.given.chains, "owner", found.end)


def test_a_saving_that_is_too_small_is_none() -> None:
    short = conversation_of(OPENAI, rounds(OPENAI, 8))
    with pytest.raises(NotWorth, match="longer than what it replaces"):
        plan(short, size(), 5, "balanced")
    messages = rounds(OPENAI, 10, "word " * 600)
    messages[-1]["content"] = "word " * 9000
    heavy_end = conversation_of(OPENAI, messages)
    with pytest.raises(NotWorth, match="% of what is sent"):
        plan(heavy_end, size(), 5, "balanced")
    assert plan(heavy_end, size(), 5, "balanced", least=0.0).end == 11


def masked(policy: Policy) -> Size:
    masker, counted = Masker(), size()
    return lambda given: (
        counted(given)
        - sum(mask.tokens - mask.sent_tokens for mask in masker.plan(given, "owner", policy).masks)
    )


def test_what_masking_leaves_out_is_not_saved_again() -> None:
    messages = [{"role": "system", "content": "rule " * 6000}, *wish(OPENAI, "Go")]
    for n in range(30):
        lines = "\n".join(f"{line} is a line of result {n}" for line in range(400))
        messages += round_of(OPENAI, [f"c{n}"], lines)
    conversation = conversation_of(OPENAI, messages)
    unmasked = plan(conversation, size(), 5, "balanced")
    leaves = masked(Policy(400, 200, references=False))
    with pytest.raises(NotWorth, match="% of what is sent"):
        plan(conversation, leaves, 5, "balanced")
    found = plan(conversation, leaves, 5, "balanced", least=0.1)
    made = planning.summary(found, "All is well.", leaves)
    assert made.tokens_before == leaves(found.given) < unmasked.full / 3
    assert made.saved < 30 * 400


def test_a_summary_that_only_waits_saves_nothing_yet() -> None:
    conversation = conversation_of(OPENAI, rounds(OPENAI, 60, "line of output\n" * 60))
    given_, counted = Context(OPENAI, conversation.document()), size()
    first = plan(
        conversation_of(OPENAI, rounds(OPENAI, 30, "line of output\n" * 60)), counted, 5, "balanced"
    )
    base = planning.summary(first, "THE FIRST", counted)
    found = plan(conversation, counted, 5, "balanced", base)
    assert found.sent == found.full == counted(given_)
    used = Summaries().use(base, 1.0)
    found = plan(conversation, counted, 5, "balanced", used, used)
    assert found.sent == counted(planning.as_sent(conversation, given_, used))
    assert found.full == found.sent + base.saved


def test_a_result_that_will_be_cut_is_estimated_at_what_stays() -> None:
    result = cuts.messages_of(context_of(OPENAI, rounds(OPENAI, 1, "word " * 4000)))[-1]
    assert planning.estimated(result) > 4000
    assert planning.estimated(result, Policy(1000, 500)) == 500
    assert planning.estimated(result, Policy(0, 500)) > 4000


@pytest.mark.parametrize("text", ["", "  \n", "word " * 9000])
def test_nonsense_is_no_summary(text: str) -> None:
    with pytest.raises(SummaryFailed):
        planning.summary(made_plan(), text, size())


def test_a_failed_summary_says_what_it_took() -> None:
    answer = Answer("word " * 9000, Usage(input_tokens=7, output_tokens=9000))
    with pytest.raises(SummaryFailed) as caught:
        planning.summary(made_plan(), answer.text, size(), answer=answer)
    assert caught.value.answer is answer


def test_an_earlier_summary_is_extended_and_its_messages_not_told_again() -> None:
    def numbered(count: int) -> Conversation:
        messages = wish(OPENAI, "Go")
        for n in range(count):
            messages += round_of(OPENAI, [f"c{n}"], f"result-{n}. " + "filling words " * 100)
        return conversation_of(OPENAI, messages)

    counted = size()
    first = planning.summary(plan(numbered(20), counted, 5, "balanced"), "THE FIRST", counted)
    used = Summaries().use(first, 1.0)
    found = plan(numbered(60), counted, 5, "balanced", used, used)
    assert found.sent == found.full - first.saved
    _, user = planning.asked(found, "balanced", None)
    assert "<summary_so_far>\nTHE FIRST\n</summary_so_far>" in user
    assert "result-14." not in user
    assert "result-15." in user
    assert "result-54." in user
    assert "result-55." not in user
    assert "THE FIRST" in extract(found.replaced, found.earlier, "balanced")


# --- what a model is given ------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["wish", "said", "calls"]), st.integers(0, 4000)), max_size=40
    ),
    st.integers(500, 20_000),
)
def test_a_transcript_keeps_to_its_size(steps: list[tuple[str, int]], size: int) -> None:
    messages: list[JSON] = []
    for n, (kind, length) in enumerate(steps):
        text = f"{n} " + "x" * length
        if kind == "calls":
            messages += round_of(OPENAI, [f"c{n}"], text)
        else:
            messages += (wish if kind == "wish" else said)(OPENAI, text)
    text = prompt.transcript(cuts.messages_of(context_of(OPENAI, messages)), size)
    assert len(text) <= size + 4 * len(messages)


def test_a_transcript_cuts_results_first_and_the_users_words_last() -> None:
    messages = wish(OPENAI, "The wish") + said(OPENAI, "Old talk " * 100)
    for n in range(20):
        messages += round_of(OPENAI, [f"c{n}"], "out " * 2000)
    read = cuts.messages_of(context_of(OPENAI, messages))
    roomy = prompt.transcript(read, 40_000)
    assert "Old talk" in roomy
    assert roomy.count("Call: sh") == 20
    tight = prompt.transcript(read, 1_000)
    assert tight.startswith("User: The wish\n[…]\n")
    assert "Old talk" not in tight
    assert tight.endswith("…]\n" + ("out " * 7)[:-1]) or "Result: out" in tight


@EVERY_DIALECT
def test_the_question_is_in_the_models_dialect(dialect: Dialect) -> None:
    asked = body(dialect, "m", "the system", "the question")
    document = Document(json.dumps(asked).encode(), dialect.shape)
    units = [dialect.read(unit) for unit in dialect.units(document)]
    assert [unit.role for unit in units] == ["system", "user"]
    assert [part.text for unit in units for part in unit.parts] == ["the system", "the question"]
    assert 0.3 in (asked.get("temperature"), asked.get("generationConfig", {}).get("temperature"))
    assert "0.3" not in json.dumps(body(dialect, "m", "s", "u", bare=True))
    assert not dialect.streams(document, "/v1/x")


def test_a_profile_says_how_long() -> None:
    assert [
        f"at most {words} words" in prompt.instructions(profile)
        for profile, words in (("quality", 600), ("balanced", 300), ("savings", 150))
    ] == [True, True, True]


# --- without a model ------------------------------------------------------------------


def read_of(messages: list[JSON]) -> list[Message]:
    return cuts.messages_of(context_of(OPENAI, messages))


def call(name: str, arguments: JSON, result: str) -> list[JSON]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c", "content": result},
    ]


def test_an_extract_tells_what_can_be_read_off() -> None:
    messages = [
        *wish(OPENAI, "Mend the parser"),
        *call("read", {"file_path": "src/parser.py"}, "def parse(): ..."),
        *call("bash", {"command": "pytest -q"}, "ok\nE   ValueError: bad token\n1 failed"),
        *said(OPENAI, "The tokenizer drops the last line."),
    ]
    text = extract(read_of(messages), "", "balanced")
    assert "The user said:\nMend the parser" in text
    assert "src/parser.py (read)" in text
    assert "pytest -q" in text
    assert "E   ValueError: bad token" in text
    assert "The tokenizer drops the last line." in text
    assert text == extract(read_of(messages), "", "balanced")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=3000), max_size=60), st.text(max_size=9000))
def test_an_extract_is_bounded(texts: list[str], earlier: str) -> None:
    messages: list[JSON] = []
    for text in texts:
        messages += wish(OPENAI, text) + said(OPENAI, text)
        messages += call("bash", {"command": text, "path": text}, text)
    assert len(extract(read_of(messages), earlier, "balanced")) < 2 * 300 * 7


# --- which requests it belongs to -----------------------------------------------------


def summary_of(given_: Context, end: int, **more: Any) -> Summary:
    values: JSON = {
        "id": prefix_id(given_.chains, "owner", end),
        "owner": "owner",
        "session": "s1",
        "messages": end,
        "text": "T",
        "source": "model",
        "model": "m",
        "provider": "p",
        "input_tokens": 1,
        "output_tokens": 1,
        "cost_usd": None,
        "tokens_before": 100,
        "tokens_after": 10,
        "messages_before": 20,
        "messages_after": 5,
        "created_at": 1.0,
    }
    return Summary(**(values | more))


def test_the_longest_beginning_that_fits_comes_first() -> None:
    given_, known = context_of(OPENAI, rounds(OPENAI, 20)), Summaries()
    for end in (11, 21, 31):
        known.put(summary_of(given_, end))
    assert [one.messages for one in known.matching(given_.chains, "owner")] == [31, 21, 11]
    assert known.matching(given_.chains, "another") == []
    branched = rounds(OPENAI, 20)
    branched[25]["content"] = "something else"
    fitting = known.matching(context_of(OPENAI, branched).chains, "owner")
    assert [one.messages for one in fitting] == [21, 11]
    whole = context_of(OPENAI, rounds(OPENAI, 15))
    assert [one.messages for one in known.matching(whole.chains, "owner")] == [21, 11]


def test_it_is_recognised_wherever_cache_control_stands() -> None:
    messages = rounds(ANTHROPIC, 20)
    known = Summaries()
    known.put(summary_of(context_of(ANTHROPIC, messages), 21))
    messages[4]["content"][0]["cache_control"] = {"type": "ephemeral"}
    assert known.matching(context_of(ANTHROPIC, messages).chains, "owner")


def test_revoking_takes_the_line_and_is_told_once() -> None:
    given_, known = context_of(OPENAI, rounds(OPENAI, 20)), Summaries()
    for end in (11, 21):
        known.put(summary_of(given_, end, used_at=1.0))
    assert len(known.revoke(prefix_id(given_.chains, "owner", 21))) == 2
    assert known.revoke(prefix_id(given_.chains, "owner", 21)) == []
    assert known.matching(given_.chains, "owner") == []
    assert not known.was_revoked(given_.chains, "another")
    assert [known.was_revoked(given_.chains, "owner") for _ in range(3)] == [True, False, False]


def test_revoking_leaves_other_conversations_alone() -> None:
    given_, known = context_of(OPENAI, rounds(OPENAI, 20)), Summaries()
    messages = rounds(OPENAI, 20)
    messages[0]["content"] = "Another wish"
    other = context_of(OPENAI, messages)
    first = summary_of(given_, 11, used_at=1.0, base="")
    second = summary_of(given_, 21, used_at=1.0, base=first.id)
    apart = summary_of(other, 11, used_at=1.0, base="")
    for one in (first, second, apart):
        known.put(one)
    assert known.revoke(second.id, [other.chains]) == [first, second]
    assert known.matching(other.chains, "owner") == [apart]
    known.revoke(apart.id)
    assert known.was_revoked(other.chains, "owner")
    assert known.was_revoked(given_.chains, "owner")


def test_what_the_store_alone_knows_is_revoked_by_a_request_of_it() -> None:
    given_, known = context_of(OPENAI, rounds(OPENAI, 20)), Summaries()
    messages = rounds(OPENAI, 20)
    messages[0]["content"] = "Another wish"
    apart = summary_of(context_of(OPENAI, messages), 11)
    line = [summary_of(given_, 11), summary_of(given_, 21)]
    for one in (*line, apart):
        known.put(one)
    assert known.revoke(line[0].id, [given_.chains]) == line


def test_a_summary_comes_back_from_its_row() -> None:
    given_ = context_of(OPENAI, rounds(OPENAI, 20))
    made, known = summary_of(given_, 11, used_at=2.0, applied=3), Summaries()
    assert from_row(made.row()) == made
    known.load(
        [made.row() | {"revoked_at": None}, summary_of(given_, 21).row() | {"revoked_at": 9}]
    )
    assert known.matching(given_.chains, "owner") == [made]


def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    given_, known = context_of(OPENAI, rounds(OPENAI, 20)), Summaries()
    for number in range(5000):
        known.put(summary_of(given_, 11, id=f"{number:032x}"))
    assert len(known) == 2048


# --- whom to ask ----------------------------------------------------------------------

RULES = """\
version: 1
providers:
  nv: {api: openai, base_url: "https://nv.example/v1", key: "${NV_KEY}", timeout: 90}
  ant: {api: anthropic, base_url: "https://ant.example/v1", key: "${ANT_KEY}"}
  gem: {api: gemini, base_url: "https://gem.example/v1beta", key: "${NV_KEY}"}
  local: {api: openai, base_url: "http://127.0.0.1:11434/v1"}
models:
  small: {targets: [{provider: ant, model: claude}, {provider: gem, model: flash}]}
  mine: {targets: [{provider: local, model: llama}]}
  none: {targets: [{provider: ant, model: claude}]}
"""


@pytest.fixture
def rules(tmp_path: Any) -> Any:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return load(path, {"NV_KEY": "nv-secret-key"})


def route(rules: Any, name: str, keep: bool = False, **more: Any) -> Route:
    provider = rules.providers[name]
    return Route(
        name,
        "m",
        provider.api,
        provider.base_url,
        key=provider.key,
        keep_client_key=keep,
        source=provider,
        **more,
    )


FIELDS = (
    (b"User-Agent", b"KimiCLI/1.5"),
    (b"Authorization", b"Bearer own-secret-key"),
    (b"Cookie", b"session=own-secret-key"),
    (b"Content-Length", b"12"),
    (b"Accept-Encoding", b"br"),
    (b"Idempotency-Key", b"once"),
    (b"anthropic-beta", b"oauth"),
    (b"X-Stainless-Lang", b"js"),
    (b"X-Our-Gateway", b"own-secret-key"),
)


def test_a_client_is_shown_without_its_secrets() -> None:
    assert shown(FIELDS) == (
        (b"User-Agent", b"KimiCLI/1.5"),
        (b"anthropic-beta", b"oauth"),
        (b"X-Stainless-Lang", b"js"),
    )


@pytest.mark.parametrize("name", ["x-litellm-api-key", "helicone-auth", "cf-aig-authorization"])
def test_a_gateways_key_is_one(name: str) -> None:
    assert name.encode() in SECRET_HEADERS


def test_a_providers_key_goes_to_it_alone(rules: Any) -> None:
    found = of_route(route(rules, "nv", context=1000), OPENAI, FIELDS, rules)
    assert found is not None
    assert found.url == "https://nv.example/v1/chat/completions"
    assert dict(found.headers)[b"authorization"] == b"Bearer nv-secret-key"
    assert b"own-secret-key" not in b"".join(value for _, value in found.headers)
    assert (found.timeout_s, found.window) == (90, 1000)
    assert "secret" not in repr(found)
    assert of_route(route(rules, "nv", keep=True), OPENAI, FIELDS, rules) is None
    local = of_route(route(rules, "local"), OPENAI, FIELDS, rules)
    assert local is not None
    assert b"authorization" not in dict(local.headers)


def test_a_clients_own_key_goes_where_it_sent_it(rules: Any) -> None:
    own = Route("ant.example", "claude", "anthropic")
    direct = of_client(own, ANTHROPIC, FIELDS, "k", "https://ant.example/v1", for_us=False)
    assert direct is not None
    assert direct.url == "https://ant.example/v1/messages"
    assert (b"Authorization", b"Bearer own-secret-key") in direct.headers
    assert b"Cookie" not in dict(direct.headers)
    assert "secret" not in repr(direct)
    ours = of_client(route(rules, "ant", keep=True), ANTHROPIC, FIELDS, "sk-ant-1", "", for_us=True)
    assert ours is not None
    assert dict(ours.headers)[b"x-api-key"] == b"sk-ant-1"
    assert b"Authorization" not in dict(ours.headers)
    query = of_client(own, GEMINI, (), "AIza", "https://gem.example/v1beta", for_us=False)
    assert query is not None
    assert query.headers == ((b"x-goog-api-key", b"AIza"),)
    assert query.url == "https://gem.example/v1beta/models/claude:generateContent"


def test_a_named_model_is_asked_where_there_is_a_key(rules: Any) -> None:
    found = of_rules(rules, "small")
    assert found is not None
    assert (found.provider, found.dialect, found.model) == ("gem", GEMINI, "flash")
    assert found.url == "https://gem.example/v1beta/models/flash:generateContent"
    assert of_rules(rules, "none") is None


@pytest.mark.parametrize("name", ["smal", "gpt-5"])
def test_a_summariser_that_nobody_serves_is_an_error(tmp_path: Any, name: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES + f"compression: {{model: {name}}}\n")
    with pytest.raises(RulesError, match=f'compression.model: "{name}" is a model that no rule'):
        load(path, {})
