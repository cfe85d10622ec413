import hashlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kimi_core.context import Counter, context
from kimi_core.dialects import ANTHROPIC, GEMINI, OPENAI, RESPONSES, Dialect
from kimi_core.document import Document, encode
from kimi_core.exchange import CATEGORIES, Exchange
from kimi_core.sessions import Sessions
from kimi_core.store import Store

KEY = "0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "kimi.db")
    found.open()
    yield found
    found.close()


@pytest.fixture
def sessions(store: Store) -> Sessions:
    return Sessions(store)


def exchange(
    body: dict[str, Any], dialect: Dialect = OPENAI, key: str = KEY, **headers: str
) -> Exchange:
    return Exchange(
        id=uuid.uuid4().hex,
        dialect=dialect,
        operation="chat",
        document=Document(encode(body), dialect.shape),
        headers={f"x-kimi-{name}": value for name, value in headers.items()},
        client_key_hash=key,
    )


def assigned(
    sessions: Sessions,
    messages: list[Any],
    dialect: Dialect = OPENAI,
    key: str = KEY,
    **fields: Any,
) -> str:
    made = exchange({"messages": messages, **fields}, dialect, key)
    sessions.assign(made)
    assert made.session_id
    return made.session_id


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def model(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "You are a coding agent."}


# --- which session -----------------------------------------------------------------------------


def test_the_clients_header_names_the_session(sessions: Sessions) -> None:
    named = exchange({"messages": [user("a")], "prompt_cache_key": "c"}, session=" my work\t\x00\n")
    sessions.assign(named)
    assert named.session_id == "my work"
    long = exchange({"messages": [user("a")]}, session="x" * 5000)
    sessions.assign(long)
    assert long.session_id == "x" * 200
    blank = exchange({"messages": [user("a")]}, session=" \t")
    sessions.assign(blank)
    assert blank.session_id.strip()


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        (OPENAI, {"messages": [user("a")], "prompt_cache_key": "the-id"}),
        (RESPONSES, {"input": "a", "prompt_cache_key": "the-id"}),
        (RESPONSES, {"input": "a", "conversation": {"id": "the-id"}}),
        (ANTHROPIC, {"messages": [user("a")], "metadata": {"user_id": "the-id"}}),
    ],
)
def test_the_clients_own_id_is_the_session_and_is_not_shown(
    sessions: Sessions, dialect: Dialect, body: dict[str, Any]
) -> None:
    made = exchange(body, dialect)
    sessions.assign(made)
    assert made.session_id == hashlib.sha256(b"the-id").hexdigest()[:16]


def test_a_conversation_that_goes_on_stays_one_session(sessions: Sessions) -> None:
    talk: list[Any] = [SYSTEM, user("one")]
    first = assigned(sessions, talk)
    for turn in range(5):
        talk += [model(f"answer {turn}"), user(f"question {turn}")]
        assert assigned(sessions, talk) == first


def test_tool_results_go_on_with_the_conversation(sessions: Sessions) -> None:
    first = assigned(sessions, [user("one")])
    call = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}
    result = {"role": "tool", "tool_call_id": "c", "content": "x"}
    assert assigned(sessions, [user("one"), call, result]) == first
    assert assigned(sessions, [user("one"), call, result, model("b"), user("c")]) == first


@pytest.mark.parametrize(
    ("dialect", "first", "more"),
    [
        (
            RESPONSES,
            {"input": [user("one")]},
            [{"type": "reasoning", "summary": []}, {"type": "function_call_output", "output": ""}],
        ),
        (
            RESPONSES,
            {"input": [user("one")]},
            [{"type": "web_search_call", "id": "ws"}, user("two")],
        ),
        (
            GEMINI,
            {"contents": [{"role": "user", "parts": [{"text": "one"}]}]},
            [{"role": "model", "parts": [{"text": "a"}]}, {"parts": [{"text": "b"}]}],
        ),
        (ANTHROPIC, {"messages": [user("one")]}, [model("a"), user("b")]),
    ],
)
def test_conversations_of_every_dialect_go_on(
    sessions: Sessions, dialect: Dialect, first: dict[str, Any], more: list[Any]
) -> None:
    before = exchange(first, dialect)
    sessions.assign(before)
    after = exchange({key: value + more for key, value in first.items()}, dialect)
    sessions.assign(after)
    assert after.session_id == before.session_id


def test_an_edited_last_question_stays_in_its_session(sessions: Sessions) -> None:
    first = assigned(sessions, [SYSTEM, user("one")])
    assert assigned(sessions, [SYSTEM, user("one"), model("a"), user("two")]) == first
    assert assigned(sessions, [SYSTEM, user("one"), model("a"), user("edited")]) == first
    assert assigned(sessions, [SYSTEM, user("one"), model("b"), user("asked again")]) == first


def test_a_repeated_request_is_the_same_session(sessions: Sessions) -> None:
    talk = [SYSTEM, user("one")]
    assert assigned(sessions, talk) == assigned(sessions, talk)


def test_conversations_that_share_only_their_system_message_are_two(sessions: Sessions) -> None:
    one = assigned(sessions, [SYSTEM, user("one")])
    two = assigned(sessions, [SYSTEM, user("two")])
    assert one != two
    assert assigned(sessions, [SYSTEM, user("two"), model("a"), user("b")]) == two
    # Not even where the system message was once sent by itself.
    alone = assigned(sessions, [SYSTEM])
    assert assigned(sessions, [SYSTEM, user("three")]) not in (alone, one, two)


def test_another_question_after_the_same_start_is_another_session(sessions: Sessions) -> None:
    one = assigned(sessions, [user("one")])
    assert assigned(sessions, [user("one"), user("at once another")]) != one


def test_another_key_never_joins(sessions: Sessions) -> None:
    mine = assigned(sessions, [SYSTEM, user("one")])
    for key in ("fedcba9876543210", ""):
        assert assigned(sessions, [SYSTEM, user("one")], key=key) != mine
        talk = [SYSTEM, user("one"), model("a"), user("b")]
        assert assigned(sessions, talk, key=key) != mine


def test_a_request_without_messages_belongs_to_its_key(sessions: Sessions) -> None:
    assert assigned(sessions, []) == KEY
    assert assigned(sessions, [], key="") == "anonymous"


CACHED = {"type": "ephemeral"}


def block(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text, **more}]}


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        (block("one", cache_control=CACHED), block("one")),
        (block("one", cache_control={**CACHED, "ttl": "1h"}), block("one", cache_control=CACHED)),
        (block("one", cache_control=CACHED), user("one")),  # so Claude Code does it
        (user('say "cache_control":{"a":1} \\'), block('say "cache_control":{"a":1} \\')),
        (
            {"role": "user", "content": [{"cache_control": CACHED, "type": "text", "text": "one"}]},
            block("one"),
        ),
        (
            {"role": "user", "content": "one", "cache_control": CACHED},
            {"role": "user", "content": "one"},
        ),
    ],
)
def test_a_cache_control_that_moved_changes_no_session(
    sessions: Sessions, marked: dict[str, Any], plain: dict[str, Any]
) -> None:
    first = assigned(sessions, [marked], ANTHROPIC)
    later = [plain, model("a"), block("two", cache_control=CACHED)]
    assert assigned(sessions, later, ANTHROPIC) == first
    latest = [plain, model("a"), block("two"), model("b"), block("three", cache_control=CACHED)]
    assert assigned(sessions, latest, ANTHROPIC) == first


def test_a_text_about_cache_control_is_no_cache_control(sessions: Sessions) -> None:
    said = [user('{"cache_control":{"type":"' + word + '"}}') for word in ("one", "two")]
    first, second = (assigned(sessions, [message], ANTHROPIC) for message in said)
    assert first != second


def test_a_restart_forgets_no_conversation(tmp_path: Path) -> None:
    store = Store(tmp_path / "kimi.db")
    store.open()
    before = Sessions(store)
    talk = [SYSTEM, user("one")]
    first = assigned(before, talk)
    assert assigned(before, [*talk, model("a"), user("b")]) == first
    assert store.flush()
    store.close()

    store = Store(tmp_path / "kimi.db")
    store.open()
    after = Sessions(store)
    assert assigned(after, [*talk, model("a"), user("b"), model("c"), user("d")]) == first
    assert assigned(after, [*talk, model("else"), user("e")]) == first
    assert assigned(after, [SYSTEM, user("new")]) != first
    assert assigned(after, talk, key="fedcba9876543210") != first
    store.close()


def test_a_store_that_cannot_be_read_stops_no_session(tmp_path: Path) -> None:
    (tmp_path / "kimi.db").write_bytes(b"this is no database at all" * 100)
    store = Store(tmp_path / "kimi.db")
    sessions = Sessions(store)
    talk = [user("one")]
    first = assigned(sessions, talk)
    assert assigned(sessions, [*talk, model("a"), user("b")]) == first
    store.close()


def test_a_session_is_stored_with_where_its_name_is_from(store: Store, sessions: Sessions) -> None:
    named = exchange({"messages": [user("a")]}, session="mine", project="kimi")
    sessions.assign(named)
    by_client = exchange({"messages": [user("a")], "prompt_cache_key": "c"})
    sessions.assign(by_client)
    by_talk = exchange({"messages": [user("a")]})
    sessions.assign(by_talk)
    assert store.flush()
    rows = {row["id"]: row for row in store.sessions()}
    assert rows["mine"]["source"] == "header"
    assert rows["mine"]["project"] == "kimi"
    assert rows["mine"]["key_hash"] == KEY
    assert rows[by_client.session_id]["source"] == "client"
    assert rows[by_talk.session_id]["source"] == "conversation"


# --- what kind of request -----------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "edit"}}]
OTHER_TOOLS = [{"type": "function", "function": {"name": "search"}}]


def kind(sessions: Sessions, messages: list[Any], tools: Any = None, session: str = "s") -> str:
    body: dict[str, Any] = {"messages": messages, **({"tools": tools} if tools else {})}
    made = exchange(body, session=session)
    sessions.assign(made)
    return made.kind


def test_turns_are_told_from_side_calls(sessions: Sessions) -> None:
    talk = [SYSTEM, user("fix it")]
    assert kind(sessions, talk, TOOLS) == "turn"
    assert kind(sessions, [SYSTEM, user("Write a title for: fix it")]) == "background"
    assert kind(sessions, [SYSTEM, user("Find all callers")], OTHER_TOOLS) == "subagent"
    assert kind(sessions, [*talk, model("a"), user("b")], TOOLS) == "turn"
    assert kind(sessions, [*talk, model("a"), user("b")], OTHER_TOOLS) == "turn"
    assert kind(sessions, [SYSTEM, user("Summary of the talk so far")], TOOLS) == "turn"


def test_a_title_that_is_asked_for_first_does_not_become_the_conversation(
    sessions: Sessions,
) -> None:
    assert kind(sessions, [user("Write a title")]) == "turn"
    assert kind(sessions, [SYSTEM, user("fix it")], TOOLS) == "turn"
    assert kind(sessions, [user("Write a title")]) == "background"
    assert kind(sessions, [user("Write a title")], session="another") == "turn"


# --- what a context is made of --------------------------------------------------------------------


def counted(counter: Counter, made: Exchange, name: str = "gpt-4o") -> dict[str, int]:
    found = counter.count(made, name)
    assert tuple(found) == CATEGORIES
    return {category: count for category, count in found.items() if count}


def long_talk(turns: int) -> list[Any]:
    talk: list[Any] = [SYSTEM]
    for turn in range(turns):
        talk += [user(f"question {turn} " * 20), model(f"answer {turn} " * 20)]
    return [*talk, user("last")]


def test_each_category_gets_its_own_tokens() -> None:
    counter = Counter()
    body = {
        "messages": [
            SYSTEM,
            user("word " * 100),
            {
                "role": "assistant",
                "content": "word " * 200,
                "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "word " * 300},
        ],
        "tools": TOOLS,
    }
    found = counted(counter, exchange(body))
    assert 100 <= found["user"] <= 110
    assert 200 <= found["assistant"] <= 215
    assert 300 <= found["tool_result"] <= 310
    assert 0 < found["system"] < 30
    assert 0 < found["tools"] < 50
    assert "memory" not in found


def test_memory_is_counted_apart_from_the_message_that_holds_it() -> None:
    counter = Counter()
    memory = "<mcp-memory>" + "remember this " * 50 + "</mcp-memory>"
    plain = counted(counter, exchange({"messages": [user("hello")]}))
    both = counted(counter, exchange({"messages": [user("hello" + memory)]}))
    assert 100 <= both["memory"] <= 120
    assert abs(both["user"] - plain["user"]) <= 3
    only = counted(counter, exchange({"messages": [user(memory)]}))
    assert all(count >= 0 for count in only.values())


def test_a_next_turn_counts_only_what_is_new() -> None:
    counter = Counter()
    first = exchange({"messages": long_talk(20)})
    everything = counter.missing(first, "gpt-4o")
    assert everything > 9000
    counter.count(first, "gpt-4o")
    assert counter.missing(first, "gpt-4o") == 0
    again = exchange({"messages": [*long_talk(20), model("yes"), user("new")]})
    new = sum(len(encode(message)) for message in (model("yes"), user("new")))
    assert counter.missing(again, "gpt-4o") == new


def test_a_count_does_not_depend_on_what_was_counted_before() -> None:
    talk = long_talk(5)
    fresh = counted(Counter(), exchange({"messages": talk, "tools": TOOLS}))
    counter = Counter()
    for size in (1, 3, 2, len(talk)):
        counter.count(exchange({"messages": talk[:size]}), "gpt-4o")
        counter.count(exchange({"messages": talk[size:]}), "gpt-4o")
    assert counted(counter, exchange({"messages": talk, "tools": TOOLS})) == fresh
    for name in ("kimi-k2-thinking", "claude-sonnet-4-5", "gemini-2.5-pro"):
        counted(counter, exchange({"messages": talk}), name)
    assert counted(counter, exchange({"messages": talk, "tools": TOOLS})) == fresh


def test_the_same_bytes_count_as_what_they_are_in_each_place() -> None:
    counter = Counter()
    text = "word " * 100
    as_system = {"instructions": text, "input": [user("a")]}
    as_input = {"instructions": "a", "input": text}
    first = counted(counter, exchange(as_system, RESPONSES))
    second = counted(counter, exchange(as_input, RESPONSES))
    assert first["system"] > 100 > first["user"]
    assert second["user"] > 100 > second["system"]


def test_the_same_bytes_have_their_role_in_each_dialect() -> None:
    counter = Counter()
    message = {"role": "developer", "content": "word " * 100}
    chat = counted(counter, exchange({"messages": [message]}, OPENAI))
    claude = counted(counter, exchange({"messages": [message]}, ANTHROPIC))
    assert chat["system"] > 100
    assert claude["user"] > 100


def test_an_image_costs_what_its_model_takes_for_it() -> None:
    pixel = "iVBORw0KGgoAAAANSUhEUgAABAAAAAQACAYAAAB/HSuDAAAA"
    url = {"url": f"data:image/png;base64,{pixel}"}
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}
    counter = Counter()
    in_any_order = ["gpt-4o", "gpt-4o-mini", "claude-sonnet-4-5", "gpt-4o"]
    found = [counted(counter, exchange(body), name)["user"] for name in in_any_order]
    assert found == [counted(Counter(), exchange(body), name)["user"] for name in in_any_order]
    assert found[0] < 3000  # its base64 is no text


@pytest.mark.parametrize("dialect", [OPENAI, RESPONSES, ANTHROPIC, GEMINI], ids=lambda d: d.name)
def test_an_odd_request_is_counted_all_the_same(dialect: Dialect) -> None:
    odd = [None, 7, "x", [], [7], {}, {"role": 7}, [{"role": "user", "content": [[]]}]]
    for value in odd:
        body = dict.fromkeys(("messages", "input", "contents", "tools", "system"), value)
        found = Counter().count(exchange(body, dialect), "gpt-4o")
        assert all(count >= 0 for count in found.values())


def test_the_last_of_many_turns_costs_little_more_than_the_first() -> None:
    counter = Counter()
    talk = long_talk(400)
    counter.count(exchange({"messages": talk}), "gpt-4o")
    grown = exchange({"messages": [*talk, model("yes"), user("new")]})
    before = time.process_time()
    context(grown)
    counter.count(grown, "gpt-4o")
    assert time.process_time() - before < 0.1
