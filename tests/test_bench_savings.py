"""The benchmark of savings: what it reads, what it counts, and when it says no."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench import savings, traces
from bench.direct import Direct
from bench.evidence import Reader, Reading, lines_of, uses, visible, words_of
from bench.live import Live
from bench.replay import Figures, PrefixCache, replay, restored
from bench.traces import Trace, Unreadable
from kimi_core.document import encode
from kimi_core.masking.policy import Policy

LISTING = "\n".join(f"{n}:    total_{n} = compute_total_{n}(order_{n})" for n in range(1, 41))
HASH = "0123456789abcdef"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **arguments: str) -> dict[str, Any]:
    if not arguments:
        return {"role": "assistant", "content": text}
    function = {"name": "run", "arguments": json.dumps(arguments)}
    calls = [{"id": "c1", "type": "function", "function": function}]
    return {"role": "assistant", "content": text, "tool_calls": calls}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "c1"}


def trace(*messages: dict[str, Any]) -> Trace:
    roles = tuple(message["role"] for message in messages)
    return Trace("made", tuple(map(encode, messages)), roles)


TWICE = (
    user("Sum the orders."),
    assistant("", command="cat orders.py"),
    result(LISTING),
    assistant("", command="cat orders.py"),
    result(LISTING),
    assistant("", edit="total_7 = compute_total_7(order_7)"),
)


@dataclass
class Scripted:
    """Sends each message as `forms` has it, by the number of the request and its own."""

    form: Callable[[int, int, bytes], bytes]
    store: dict[str, str] = field(default_factory=dict)
    request: int = 0

    def send(self, given: Trace, count: int) -> Sequence[bytes]:
        self.request += 1
        return self.afresh(given, count)

    def afresh(self, given: Trace, count: int) -> Sequence[bytes]:
        return [self.form(self.request, n, raw) for n, raw in enumerate(given.messages[:count])]

    def original(self, hash: str) -> str | None:
        return self.store.get(hash)


def masking(text: str) -> Callable[[int, int, bytes], bytes]:
    """Return what sends `text` as the content of the first result."""
    return lambda request, number, raw: encode(result(text)) if number == 2 else raw


# --- reading ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("one.json", lambda talk: json.dumps({"messages": talk})),
        ("bare.json", json.dumps),
        ("list.json", lambda talk: json.dumps([{"messages": talk}])),
        ("tau.json", lambda talk: json.dumps([{"task_id": 1, "traj": talk}])),
        ("lines.jsonl", lambda talk: json.dumps({"messages": talk}) + "\n\n"),
        ("column.jsonl", lambda talk: json.dumps({"messages": json.dumps(talk)})),
        ("run.traj", lambda talk: json.dumps({"trajectory": [{"action": "ls"}], "history": talk})),
    ],
)
def test_every_layout_of_a_conversation_is_read(
    tmp_path: Path, name: str, made: Callable[[list[dict[str, Any]]], str]
) -> None:
    (tmp_path / name).write_text(made(list(TWICE)))
    [read] = traces.read(tmp_path / name).traces
    assert read == Trace(name, trace(*TWICE).messages, trace(*TWICE).roles)
    assert list(read.requests()) == [1, 3, 5]


def test_what_a_recorder_added_is_left_out_and_a_result_names_its_call(tmp_path: Path) -> None:
    told = {"role": "tool", "content": "x", "tool_call_ids": ["c9"], "agent": "main"}
    (tmp_path / "run.traj").write_text(json.dumps({"history": [user("go"), told, assistant("a")]}))
    [read] = traces.read(tmp_path / "run.traj").traces
    assert json.loads(read.messages[1]) == {"role": "tool", "content": "x", "tool_call_id": "c9"}


def test_text_actions_become_calls_and_observations_their_results_when_asked(
    tmp_path: Path,
) -> None:
    acted = {"role": "assistant", "content": "Look.", "action": "cat x"}
    talk = {"history": [user("go"), acted, user("seen"), {**acted, "action": ""}, user("typed")]}
    (tmp_path / "run.traj").write_text(json.dumps(talk))
    [plain] = traces.read(tmp_path / "run.traj").traces
    assert plain.roles == ("user", "assistant", "user", "assistant", "user")
    [turned] = traces.read(tmp_path / "run.traj", observations=True).traces
    assert turned.roles == ("user", "assistant", "tool", "assistant", "user")
    [call] = json.loads(turned.messages[1])["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"command": "cat x"}
    assert json.loads(turned.messages[2])["tool_call_id"] == call["id"]


def test_conversations_of_one_file_are_numbered_and_what_is_none_is_counted(tmp_path: Path) -> None:
    talk = [user("hello"), assistant("yes")]
    path = tmp_path / "many.json"
    path.write_text(json.dumps([{"messages": talk}, {"other": 1}, {"messages": [user("alone")]}]))
    source = traces.read(path)
    assert [read.name for read in source.traces] == ["many.json #1"]
    assert source.skipped == 2


def test_tools_of_a_conversation_are_part_of_what_is_sent(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"messages": [user("hi"), assistant("yes")], "tools": [{"type": "function"}]})
    )
    [read] = traces.read(tmp_path / "a.json").traces
    assert read.tools == b'[{"type":"function"}]'
    assert (
        replay(read, Direct(None)).tokens_before
        > replay(Trace("a", read.messages, read.roles), Direct(None)).tokens_before
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"messages": []}', '[{"role": "user"}]'])
def test_a_file_without_a_conversation_is_unreadable(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Unreadable):
        traces.read(tmp_path / "a.json")


def test_folders_are_walked_for_files_that_may_hold_conversations(tmp_path: Path) -> None:
    names = ["b/run.traj", "a.json", "b/c/lines.jsonl", "ORIGIN.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = traces.files([tmp_path, tmp_path / "a.json", tmp_path / "ORIGIN.md"])
    assert sorted(str(path.relative_to(tmp_path)) for path in found) == sorted(names)


# --- the cache -------------------------------------------------------------------------


def sized(raw: bytes) -> Reading:
    return Reading(len(raw), frozenset(), frozenset())


def test_what_was_sent_before_costs_a_tenth_and_the_rest_is_written() -> None:
    cache = PrefixCache(sized)
    assert cache.cost([b"a" * 100]) == (100, 125.0)
    assert cache.cost([b"a" * 100, b"b" * 20]) == (120, 10.0 + 25.0)
    assert cache.cost([b"a" * 100, b"b" * 20]) == (120, 12.0)


def test_from_the_first_message_that_differs_all_is_written_again() -> None:
    cache = PrefixCache(sized)
    cache.cost([b"a" * 10, b"b" * 10, b"c" * 10])
    assert cache.cost([b"a" * 10, b"B" * 10, b"c" * 10]) == (30, 1.0 + 25.0)


def test_a_prefix_of_any_earlier_request_is_still_held() -> None:
    cache = PrefixCache(sized)
    cache.cost([b"a" * 10, b"b" * 10])
    cache.cost([b"a" * 10, b"x" * 10])
    assert cache.cost([b"a" * 10, b"b" * 10, b"c" * 10]) == (30, 2.0 + 12.5)


# --- evidence --------------------------------------------------------------------------


def test_words_are_identifiers_and_paths() -> None:
    assert words_of("if a.b_cd(x9) in ./src/my-app/x.py: # see 1234") == {
        "b_cd",
        "src/my-app/x.py",
    }
    assert words_of("the src/main.py of src") == {"src/main.py", "main"}


@pytest.mark.parametrize(
    "shown",
    [
        "total = compute(a)",
        "  12\ttotal = compute(a) ",
        "12:    total = compute(a)\r",
        "12|total = compute(a)",
        "  12→total = compute(a)",
    ],
)
def test_line_numbers_and_outer_white_space_do_not_count(shown: str) -> None:
    assert lines_of(f"{shown}\n") == {"total = compute(a)"}


def test_short_lines_do_not_count() -> None:
    assert lines_of("12345678901\n123456789012\n 7:return x[0]\n") == {"123456789012"}


def test_only_what_a_result_was_first_to_bring_and_a_later_message_uses_counts() -> None:
    talk = trace(
        user("Mend parser in lexer.py"),
        assistant("", command="cat lexer.py"),
        result("parser = Lexer()\n12:    offset = start_offset(parser)\nunused_name = None"),
        assistant("", edit="a\n    offset = start_offset(parser)\nb"),
        result("offset again; trailing_word"),
        assistant("trailing_word and offset"),
    )
    found = uses(talk.messages, talk.roles, Reader())
    assert [(use.message, use.words, use.lines) for use in found] == [
        (1, frozenset(), frozenset()),
        (3, {"offset", "start_offset"}, {"offset = start_offset(parser)"}),
        (5, {"trailing_word"}, frozenset()),
    ]


def test_observations_of_an_agent_that_writes_its_actions_as_text_count_as_results() -> None:
    talk = trace(user("Mend it"), assistant("cat x"), user("lost_name"), assistant("lost_name"))
    assert uses(talk.messages, talk.roles, Reader())[-1].words == {"lost_name"}
    spoken = trace(*TWICE[:3], assistant("so"), user("typed_name"), assistant("typed_name"))
    assert uses(spoken.messages, spoken.roles, Reader())[-1].words == frozenset()


def test_lines_within_json_are_lines() -> None:
    inside = json.dumps({"output": "first line here\nsecond line here"})
    talk = trace(user("go"), assistant("x"), result(inside), assistant("first line here"))
    assert uses(talk.messages, talk.roles, Reader())[-1].lines == {"first line here"}


def test_a_line_is_visible_wherever_it_stands_in_the_request() -> None:
    talk = trace(*TWICE)
    use = uses(talk.messages, talk.roles, Reader())[-1]
    assert use.lines == {"total_7 = compute_total_7(order_7)"}
    assert use.words == {"total_7", "compute_total_7", "order_7"}
    sent = list(talk.messages[:5])
    sent[4] = encode(result("[40 lines as in result 1]"))
    assert visible(use, sent, Reader()) == (3, 1)
    sent[2] = encode(result("total_7 compute_total_7"))
    assert visible(use, sent, Reader()) == (2, 0)


# --- replay ----------------------------------------------------------------------------


def test_without_masking_nothing_is_saved_or_lost() -> None:
    figures = replay(trace(*TWICE), Scripted(lambda request, number, raw: raw))
    assert figures.requests == 3
    assert figures.tokens_before == figures.tokens_sent > 0
    assert figures.cost_before == figures.cost_sent
    assert (figures.words, figures.lines, figures.recovered) == (1.0, 1.0, 1.0)
    assert (figures.masked_bytes, figures.unstable, figures.differing) == (0, 0, 0)


def test_a_text_left_out_saves_its_tokens_in_every_request_and_its_price_once_written() -> None:
    talk, text = trace(*TWICE), f"[cut {HASH}]"
    sender = Scripted(masking(text), {HASH: LISTING})
    figures, read = replay(talk, sender), Reader()
    less = read(talk.messages[2]).tokens - read(encode(result(text))).tokens
    assert figures.tokens_before - figures.tokens_sent == 2 * less
    assert figures.cost_before - figures.cost_sent == pytest.approx((1.25 + 0.1) * less)
    assert (figures.masked_texts, figures.masked_bytes) == (1, len(LISTING))
    assert figures.recovered == 1.0
    assert figures.lines == 1.0  # the second result still shows it


def test_a_mask_that_changes_an_old_message_is_unstable_and_costs_more() -> None:
    def late(request: int, number: int, raw: bytes) -> bytes:
        return encode(result("gone")) if number == 2 and request == 3 else raw

    figures = replay(trace(*TWICE, assistant("done")), Scripted(late))
    assert figures.unstable == 2  # there, and back again
    assert figures.cost_sent > figures.cost_before


def test_what_another_process_would_send_otherwise_is_counted() -> None:
    class Forgetful(Scripted):
        def afresh(self, given: Trace, count: int) -> Sequence[bytes]:
            return [b"{}", *given.messages[1:count]]

        def send(self, given: Trace, count: int) -> Sequence[bytes]:
            return given.messages[:count]

    assert replay(trace(*TWICE), Forgetful(lambda request, number, raw: raw)).differing == 1


@pytest.mark.parametrize(
    ("sent", "store"),
    [
        (f"[cut {HASH}]", {}),
        (f"[cut {HASH}]", {HASH: LISTING + "\n"}),
        ("[cut]", {HASH: LISTING}),
        (f"[cut {HASH}0]", {HASH: LISTING}),
    ],
    ids=["not kept", "another text", "no hash", "a longer hash"],
)
def test_what_the_hash_does_not_give_back_is_lost(sent: str, store: dict[str, str]) -> None:
    figures = replay(trace(*TWICE), Scripted(masking(sent), store))
    assert figures.masked_bytes == len(LISTING)
    assert figures.recovered == 0.0


def test_a_message_that_differs_in_more_than_its_texts_is_lost() -> None:
    raw, sender = encode(result(LISTING)), Scripted(masking(""), {HASH: LISTING})
    assert restored(raw, encode(result(HASH)), sender) == (len(LISTING), len(LISTING), 1)
    other = encode({**result(HASH), "tool_call_id": "c2"})
    assert restored(raw, other, sender) == (len(raw), 0, 1)


def test_figures_of_several_conversations_are_weighed_by_what_they_cost() -> None:
    both = Figures(cost_before=100.0, cost_sent=50.0)
    both.add(Figures(cost_before=900.0, cost_sent=900.0, conversations=1))
    assert both.money_saved == 0.05
    assert both.conversations == 1


def test_the_sanitizers_own_functions_save_without_losing_anything() -> None:
    talk = trace(*TWICE)
    figures = replay(talk, Direct(Policy(threshold=0)))
    assert figures.money_saved > 0.2
    assert (figures.words, figures.lines, figures.recovered) == (1.0, 1.0, 1.0)
    assert figures.masked_bytes >= len(LISTING)
    assert (figures.unstable, figures.differing) == (0, 0)
    assert replay(talk, Direct(None)).money_saved == 0.0


def test_a_real_proxy_sends_what_the_functions_say_and_keeps_the_originals(tmp_path: Path) -> None:
    policy, talk = Policy(threshold=400, keep=200), trace(*TWICE)
    with Live(tmp_path, policy) as live:
        figures = replay(talk, live)
        complaints = live.complaints
    assert figures == replay(talk, Direct(policy))
    assert figures.masked_bytes >= len(LISTING)
    assert (figures.recovered, figures.unstable, figures.differing) == (1.0, 0, 0)
    assert complaints == []


# --- the command -----------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "orders.traj").write_text(json.dumps({"history": TWICE}))
    talk = [{"messages": [user("hi"), assistant("yes"), user("bye"), assistant("so long")]}]
    (tmp_path / "runs" / "talk.json").write_text(json.dumps(talk))
    return tmp_path / "runs"


def test_a_run_shows_each_file_and_both_totals(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    code = savings.main([str(recorded), "--policy", "references", "--gate", "--json", str(figures)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    for name in ("orders.traj", "talk.json", "coding", "total"):
        assert sum(line.startswith(f"{name} ") for line in shown.splitlines()) == 2
    made = json.loads(figures.read_text())
    assert made["coding"]["requests"] == 3
    assert made["total"]["requests"] == 5
    assert made["total"]["worst_name"] == "talk.json"
    assert made["coding"]["references_saved"] == pytest.approx(made["coding"]["money_saved"])
    assert made["coding"]["money_saved"] > made["total"]["money_saved"] > 0
    assert all(gate["ok"] for gate in made["gates"])


def test_files_of_one_name_are_told_apart(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recorded / "again").mkdir()
    (recorded / "again" / "talk.json").write_bytes((recorded / "talk.json").read_bytes())
    savings.main([str(recorded)])
    shown = capsys.readouterr().out
    assert "\ntalk.json " in shown
    assert "\nagain/talk.json " in shown


def test_a_gate_that_is_missed_fails_the_run_only_when_asked(recorded: Path) -> None:
    arguments = [str(recorded), "--policy", "none"]
    assert savings.main(arguments) == 0
    assert savings.main([*arguments, "--gate"]) == 1
    # Without coding runs nothing need be saved.
    assert savings.main([str(recorded / "talk.json"), "--policy", "none", "--gate"]) == 0
    assert savings.main([*arguments[:1], "--policy", "none", "--gate", "--coding"]) == 1


def test_what_cannot_be_read_is_named(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text("{")
    assert savings.main([str(tmp_path / "bad.json"), str(recorded)]) == 0
    assert "bad.json: skipped, no JSON" in capsys.readouterr().err
    assert savings.main([str(tmp_path / "bad.json"), str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert "nowhere: skipped" in said
    assert "Nothing could be read." in said
