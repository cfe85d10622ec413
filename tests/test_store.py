from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from sqlite_utils import Database

from kimi_core import places
from kimi_core import store as store_module
from kimi_core.export import write_csv, write_json
from kimi_core.store import (
    EXCHANGE_COLUMNS,
    Store,
    StoreError,
    StoreReader,
    release,
    shared,
)
from kimi_core.store.schema import (
    APPLICATION_ID,
    ATTEMPT_COLUMNS,
    MIGRATIONS,
    SESSION_COLUMNS,
    TABLES,
    Migration,
    connect,
    migrate,
)

T0 = 1_700_000_000.0


def exchange(number: int, **columns: object) -> dict[str, str | bytes | int | float | None]:
    row: dict[str, object] = {
        "id": f"x{number:06}",
        "session_id": "s",
        "started_at": T0 + number,
        "ended_at": T0 + number + 0.5,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nvidia",
        "gen_ai.request.model": "kimi-k2",
        "gen_ai.usage.input_tokens": 100 + number,
        "gen_ai.usage.output_tokens": 10,
        "context_window": 262_144,
        "cost_usd": 0.25,
        "status": 200,
        "kind": "turn",
    }
    return row | columns  # type: ignore[return-value]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "kimi.db"


@pytest.fixture
def make(path: Path) -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def make_store(where: Path = path, **options: object) -> Store:
        store = Store(where, **options)  # type: ignore[arg-type]
        stores.append(store)
        store.open()
        return store

    yield make_store
    for store in stores:
        store.close(0)


def rows_in(path: Path, table: str = "exchanges") -> int:
    with contextlib.closing(sqlite3.connect(path)) as conn:
        return int(conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def eventually(condition: Callable[[], bool], store: Store, seconds: float = 10) -> bool:
    """Wait in the store's own `flush`, which returns early or after the given time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        store.flush(0.02)
    return condition()


# -- what is written


def test_a_row_comes_back_as_it_went_in(make: Callable[..., Store]) -> None:
    store = make()
    row = {column: f"text of {column}" for column in EXCHANGE_COLUMNS} | exchange(1)
    store.add_exchange(row)
    assert store.flush()
    assert store.exchanges() == [row]
    assert list(store.exchanges()[0]) == list(EXCHANGE_COLUMNS)


def test_missing_columns_are_null_and_a_missing_start_is_now(make: Callable[..., Store]) -> None:
    store = make(clock=lambda: 42.5)
    store.add_exchange({"id": "x"})
    assert store.flush()
    expected = dict.fromkeys(EXCHANGE_COLUMNS) | {"id": "x", "started_at": 42.5}
    assert store.exchanges() == [expected]


def test_a_row_may_be_changed_by_its_caller_after_it_was_queued(make: Callable[..., Store]) -> None:
    store = make()
    row = exchange(1)
    store.add_exchange(row)
    row["status"] = 500
    assert store.flush()
    assert store.exchanges()[0]["status"] == 200


def test_an_unknown_column_is_named_once_and_the_row_is_kept(
    make: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    for number in range(3):
        store.add_exchange(exchange(number, colour="red"))
    store.add_attempt({"exchange_id": "x", "number": 1, "flavour": "sweet"})
    assert store.flush()
    assert rows_in(store.path) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "store: exchanges has no column colour",
        "store: attempts has no column flavour",
    ]


def test_a_value_that_cannot_be_stored_costs_only_itself(
    make: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    store.add_exchange(exchange(1))
    store.add_exchange(exchange(2, status=2**70, client=["a", "list"], project="half \ud83d pair"))
    store.add_exchange(exchange(3, id=None))
    store.add_exchange(exchange(4))
    assert not store.flush(), "one row had to be left out"
    assert [row["id"] for row in store.export()] == ["x000001", "x000002", "x000004"]
    bad = store.exchanges(session_id="s")[1]
    assert (bad["status"], bad["client"], bad["project"]) == (None, None, "half \\ud83d pair")
    assert bad["cost_usd"] == 0.25
    assert store.dropped == 1
    assert store.session("s")["exchanges"] == 3  # type: ignore[index]
    assert "pair" not in caplog.text
    assert "a list" not in caplog.text.replace("a list cannot be stored", "")
    store.add_exchange(exchange(5))
    assert store.flush(), "rows after it are not affected"


def test_a_row_written_twice_counts_once_and_the_later_one_stands(
    make: Callable[..., Store],
) -> None:
    store = make()
    store.add_exchange(exchange(1, cost_usd=None, saved_usd=1.0))
    store.add_exchange(exchange(1, cost_usd=0.5, saved_usd=1.0))  # in the same batch
    assert store.flush()
    store.add_exchange(exchange(1, cost_usd=0.75, saved_usd=2.0, status=500))
    assert store.flush()
    (row,) = store.exchanges()
    assert (row["cost_usd"], row["status"]) == (0.75, 500)
    session = store.session("s")
    assert session is not None
    assert (session["exchanges"], session["input_tokens"], session["output_tokens"]) == (1, 101, 10)
    assert (session["cost_usd"], session["saved_usd"]) == (0.75, 2.0)


def test_a_session_sums_what_saving_lost_and_took(make: Callable[..., Store]) -> None:
    store = make()
    store.add_exchange(exchange(1, saved_usd=0.5, lost_usd=0.25))
    store.add_exchange(exchange(2, saved_usd=-0.125, lost_usd=0.5, spent_usd=0.0625))
    store.add_exchange(exchange(2, saved_usd=-0.25, lost_usd=0.75, spent_usd=0.125))
    assert store.flush()
    store.add_exchange(exchange(1, saved_usd=0.5, lost_usd=0.0))
    assert store.flush()
    session = store.session("s")
    assert session is not None
    money = session["saved_usd"], session["lost_usd"], session["spent_usd"]
    assert money == (0.25, 0.75, 0.125)


def test_an_exchange_that_moves_to_another_session_leaves_the_first(
    make: Callable[..., Store],
) -> None:
    store = make()
    store.add_exchange(exchange(1, session_id="a"))
    assert store.flush()
    store.add_exchange(exchange(1, session_id="b"))
    assert store.flush()
    by_id = {session["id"]: session for session in store.sessions()}
    assert (by_id["a"]["exchanges"], by_id["a"]["cost_usd"]) == (0, 0.0)
    assert (by_id["b"]["exchanges"], by_id["b"]["cost_usd"]) == (1, 0.25)


def test_a_session_sums_its_exchanges_and_shows_the_gauge_of_the_last_turn(
    make: Callable[..., Store],
) -> None:
    store = make(clock=lambda: T0)
    store.touch_session("s", source="header", name="my work", key_hash="0123456789abcdef")
    store.add_exchange(exchange(1, client="claude-cli/2", project="p", saved_tokens=7))
    store.add_exchange(exchange(2, **{"gen_ai.response.model": "moonshotai/kimi-k2"}))
    title = {"gen_ai.usage.input_tokens": 5, "gen_ai.request.model": "haiku"}
    store.add_exchange(exchange(3, kind="background", context_window=1000, **title))
    assert store.flush()
    assert store.session("s") == {
        "id": "s",
        "name": "my work",
        "created_at": T0,
        "last_seen_at": T0 + 3.5,
        "key_hash": "0123456789abcdef",
        "project": "p",
        "client": "claude-cli/2",
        "provider": "nvidia",
        "model": "moonshotai/kimi-k2",
        "source": "header",
        "context_tokens": 102,
        "context_window": 262_144,
        "exchanges": 3,
        "input_tokens": 101 + 102 + 5,
        "output_tokens": 30,
        "cost_usd": 0.75,
        "saved_tokens": 7,
        "saved_usd": None,
        "lost_usd": None,
        "spent_usd": None,
    }
    assert store.session("unknown") is None


def test_the_gauge_shows_the_last_prompt_and_not_the_sum_of_an_exchanges_attempts(
    make: Callable[..., Store],
) -> None:
    store = make()
    for number, tokens in ((1, 30_000), (2, 36_000), (3, None)):
        store.add_attempt({"exchange_id": "x000001", "number": number, "input_tokens": tokens})
    store.add_exchange(exchange(1, attempts=3, **{"gen_ai.usage.input_tokens": 66_000}))
    assert store.flush()
    session = store.session("s")
    assert session is not None
    assert (session["context_tokens"], session["input_tokens"]) == (36_000, 66_000)
    store.add_exchange(exchange(2, attempts=1))
    assert store.flush()
    session = store.session("s")
    assert session is not None
    assert session["context_tokens"] == 102


def test_an_unknown_window_replaces_the_window_of_the_model_before(
    make: Callable[..., Store],
) -> None:
    store = make()
    store.add_exchange(exchange(1))
    store.add_exchange(exchange(2, context_window=None))
    assert store.flush()
    session = store.session("s")
    assert session is not None
    assert (session["context_tokens"], session["context_window"]) == (102, None)


def test_touching_a_session_keeps_what_it_does_not_mention(make: Callable[..., Store]) -> None:
    now = [T0]
    store = make(clock=lambda: now[0])
    store.touch_session("s", source="client", provider="nvidia", model="a")
    now[0] += 60
    store.touch_session("s", model="b", context_tokens=5, context_window=10)
    assert store.flush()
    session = store.session("s")
    assert session is not None
    assert (session["source"], session["provider"], session["model"]) == ("client", "nvidia", "b")
    assert (session["created_at"], session["last_seen_at"]) == (T0, T0 + 60)
    assert (session["context_tokens"], session["context_window"]) == (5, 10)
    assert session["exchanges"] == 0


def test_attempts_of_an_exchange_come_in_their_order(make: Callable[..., Store]) -> None:
    store = make()
    for number in (2, 1):
        store.add_attempt({"exchange_id": "x", "number": number, "status": 400 + number})
    store.add_attempt({"exchange_id": "y", "number": 1})
    store.add_attempt({"exchange_id": "x", "number": 2, "status": 200})
    assert store.flush()
    assert [(row["number"], row["status"]) for row in store.attempts("x")] == [(1, 401), (2, 200)]
    assert list(store.attempts("x")[0]) == list(ATTEMPT_COLUMNS)


def test_conversations_survive_a_restart_newest_first(make: Callable[..., Store]) -> None:
    now = [0.0]
    store = make(clock=lambda: now[0])
    for digest, session, key in (
        (b"\x00one", "s1", "k1"),
        ("two", "s2", None),
        (b"three", "s3", "k3"),
        (b"\x00one", "s9", "k1"),
    ):
        now[0] += 1
        store.add_conversation(digest, session, key)
    assert store.close()
    again = make(clock=lambda: now[0])
    found = [(row["digest"], row["session_id"]) for row in again.conversations(2)]
    assert found == [(b"\x00one", "s9"), (b"three", "s3")]
    assert list(again.conversations(9))[-1] == {
        "digest": "two",
        "session_id": "s2",
        "key_hash": None,
        "seen_at": 2.0,
    }


# -- what is read


def test_exchanges_are_paged_newest_first_with_equal_times(make: Callable[..., Store]) -> None:
    store = make()
    for number in range(25):
        store.add_exchange(exchange(number, started_at=T0 + number // 4))
    assert store.flush()
    seen: list[str] = []
    while page := store.exchanges(limit=4, before=seen[-1] if seen else None):
        seen += [row["id"] for row in page]
    assert seen == [f"x{number:06}" for number in reversed(range(25))]
    store.add_exchange(exchange(99, session_id="other"))
    assert store.flush()
    assert [row["id"] for row in store.exchanges(session_id="other")] == ["x000099"]


def test_sessions_are_paged_and_filtered(make: Callable[..., Store]) -> None:
    store = make()
    for number in range(7):
        store.add_exchange(
            exchange(number, session_id=f"s{number}", ended_at=T0, project=f"p{number % 2}")
        )
    assert store.flush()
    first = store.sessions(limit=4)
    rest = store.sessions(limit=4, before=(first[-1]["last_seen_at"], first[-1]["id"]))
    assert [row["id"] for row in first + rest] == [f"s{number}" for number in reversed(range(7))]
    assert [row["id"] for row in store.sessions(project="p1")] == ["s5", "s3", "s1"]


def test_totals_sum_by_provider_model_and_day(make: Callable[..., Store]) -> None:
    store = make()
    day = 86_400.0
    store.add_exchange(exchange(1, mended=3))
    cheap = {"gen_ai.response.model": "kimi-k2-0905"}
    store.add_exchange(exchange(2, cost_usd=None, mended=0, **cheap))
    groq = {"gen_ai.provider.name": "groq"}
    store.add_exchange(exchange(3, started_at=T0 + 3 * day, mended=1, **groq))
    failed = {"gen_ai.usage.input_tokens": None, "gen_ai.usage.output_tokens": None}
    store.add_exchange(exchange(4, status=429, cost_usd=None, session_id="t", **failed))
    assert store.flush()
    totals = store.totals()
    assert (totals["requests"], totals["errors"], totals["unpriced"]) == (4, 1, 1)
    assert (totals["input_tokens"], totals["output_tokens"]) == (101 + 102 + 103, 30)
    assert totals["cost_usd"] == 0.5
    assert totals["reasoning_tokens"] is None
    assert totals["mended"] == 2, "replies, not things that were mended"
    assert {name: sums["requests"] for name, sums in totals["by_provider"].items()} == {
        "groq": 1,
        "nvidia": 3,
    }
    assert totals["by_model"]["kimi-k2-0905"]["cost_usd"] is None
    assert {
        by: {name: sums["mended"] for name, sums in totals[f"by_{by}"].items()}
        for by in ("provider", "model")
    } == {"provider": {"groq": 1, "nvidia": 1}, "model": {"kimi-k2": 2, "kimi-k2-0905": 0}}
    days = [datetime.fromtimestamp(at).date().isoformat() for at in (T0, T0 + 3 * day)]
    assert list(totals["by_day"]) == days
    assert sum(sums["requests"] for sums in totals["by_day"].values()) == 4
    assert [sums["mended"] for sums in totals["by_day"].values()] == [1, 1]
    assert store.totals(since=T0 + day)["requests"] == 1
    assert store.totals(session_id="t")["cost_usd"] is None
    assert store.totals(session_id="nobody")["requests"] == 0


def test_totals_say_what_was_saved_and_what_it_took(make: Callable[..., Store]) -> None:
    store = make()
    store.add_exchange(
        exchange(1, saved_tokens=90, masked_tokens=90, gross_saved_usd=0.5, saved_usd=0.5, masks=3)
    )
    broken = {"lost_usd": 0.25, "spent_usd": 0.0625, "saved_usd": -0.0625, "cache_break": 0}
    more = {"saved_tokens": 50, "masked_tokens": 10, "compressed_tokens": 40, "recalls": 2}
    groq = {"gen_ai.provider.name": "groq"}
    store.add_exchange(exchange(2, gross_saved_usd=0.25, **broken, **more, **groq))
    store.add_exchange(exchange(3, cache_break=7))
    assert store.flush()
    said = {
        "saved_tokens": 140,
        "masked_tokens": 100,
        "compressed_tokens": 40,
        "gross_saved_usd": 0.75,
        "lost_usd": 0.25,
        "spent_usd": 0.0625,
        "saved_usd": 0.4375,
        "recalls": 2,
        "cache_breaks": 2,
    }
    totals = store.totals()
    assert {name: totals[name] for name in said} == said
    assert totals["by_provider"]["groq"]["saved_usd"] == -0.0625
    assert totals["by_provider"]["nvidia"]["lost_usd"] is None
    assert totals["by_provider"]["nvidia"]["cache_breaks"] == 1


def test_known_models_say_who_served_them(make: Callable[..., Store]) -> None:
    store = make()
    for number in range(3):
        store.add_exchange(exchange(number))
    store.add_exchange(exchange(5, **{"gen_ai.provider.name": "groq"}))
    assert store.flush()
    assert store.known_models() == [
        {"provider": "groq", "model": "kimi-k2", "requests": 1, "last_seen_at": T0 + 5},
        {"provider": "nvidia", "model": "kimi-k2", "requests": 3, "last_seen_at": T0 + 2},
    ]


def test_a_reader_of_a_missing_or_broken_file_says_so_and_makes_none(tmp_path: Path) -> None:
    missing = tmp_path / "missing.db"
    with pytest.raises(StoreError, match=r"missing\.db cannot be read"):
        StoreReader(missing).export()
    assert not missing.exists()
    text = tmp_path / "text.db"
    text.write_text("not a database")
    with pytest.raises(StoreError, match="not a database"):
        StoreReader(text).sessions()


def test_readers_in_many_threads_see_whole_transactions(make: Callable[..., Store]) -> None:
    store = make()
    store.add_exchange(exchange(0))
    assert store.flush()
    done = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not done.is_set():
            before = store.session("s")
            count = sum(1 for _ in store.export("s"))
            after = store.session("s")
            assert before is not None
            assert after is not None
            if not before["exchanges"] <= count <= after["exchanges"]:
                wrong.append((before["exchanges"], count, after["exchanges"]))

    def run() -> None:
        try:
            read()
        except (StoreError, AssertionError) as error:
            wrong.append(error)

    readers = [threading.Thread(target=run) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number in range(1, 400):
        store.add_exchange(exchange(number))
        if number % 20 == 0:
            assert store.flush()
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []


def test_an_export_shows_the_moment_it_was_asked_for(make: Callable[..., Store]) -> None:
    store = make()
    for number in range(300):
        store.add_exchange(exchange(number))
    assert store.flush()
    rows = store.export()
    assert next(rows)["id"] == "x000000"
    store.add_exchange(exchange(300))
    assert store.flush()
    assert sum(1 for _ in rows) == 299
    assert sum(1 for _ in store.export()) == 301


# -- CSV and JSON


def test_csv_has_the_columns_in_order_and_reads_back() -> None:
    row = exchange(1, project='a "b",\nc', client="ümlaut")
    file = io.StringIO(newline="")
    assert write_csv([row], file) == 1
    text = file.getvalue()
    assert text.startswith(",".join(EXCHANGE_COLUMNS) + "\r\n")
    (back,) = csv.DictReader(io.StringIO(text, newline=""))
    assert back["project"] == 'a "b",\nc'
    assert back["client"] == "ümlaut"
    assert back["cost_usd"] == "0.25"
    assert back["key_hash"] == ""


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_csv_defuses_a_formula(text: str) -> None:
    file = io.StringIO(newline="")
    write_csv(
        [{"a": text, "b": -1.5, "c": -2, "d": f"x{text}"}], file, columns=("a", "b", "c", "d")
    )
    _, row = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert row == [f"'{text}", "-1.5", "-2", f"x{text}"]


def test_json_is_one_array_whatever_is_in_it() -> None:
    rows = [exchange(1, project="\ud83d\u2028é"), exchange(2, cost_usd=float("inf"))]
    file = io.StringIO()
    assert write_json(iter(rows), file) == 2
    assert json.loads(file.getvalue()) == [rows[0], rows[1] | {"cost_usd": None}]
    assert file.getvalue().isascii()
    empty = io.StringIO()
    assert write_json([], empty) == 0
    assert json.loads(empty.getvalue()) == []


# -- locked, full, broken


def test_a_locked_database_loses_no_row(
    make: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = make()
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for number in range(700):
            store.add_exchange(exchange(number))
        assert not store.flush(0.1)
        assert eventually(lambda: store.state == "locked", store)
        assert store.exchanges() == [], "readers are not kept waiting"
        for number in range(700, 1000):
            store.add_exchange(exchange(number))
        other.execute("ROLLBACK")
    assert store.flush(10)
    assert store.state == "ok"
    assert [row["id"] for row in store.export()] == [f"x{number:06}" for number in range(1000)]
    assert store.session("s")["exchanges"] == 1000  # type: ignore[index]
    assert store.dropped == 0
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"store {store.path}: locked; rows wait in memory",
        f"store {store.path}: works again",
    ]


def test_a_database_locked_while_it_is_opened_is_opened_later(make: Callable[..., Store]) -> None:
    path = make().path
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        store = make(path)
        assert store.state == "locked"
        store.add_exchange(exchange(1))
        other.execute("ROLLBACK")
    assert store.flush(10)
    assert store.state == "ok"


def test_beyond_the_bound_the_oldest_rows_are_dropped_and_counted(
    make: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    store = make(max_pending=50)
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.add_exchange(exchange(0))
        assert eventually(lambda: store.state == "locked", store)
        for number in range(1, 81):
            store.add_exchange(exchange(number))
        assert store.dropped == 30
        other.execute("ROLLBACK")
    assert store.flush(10), "what is still there is written"
    kept = [0, *range(31, 81)]  # the first was already in the writer's hands
    assert [row["id"] for row in store.export()] == [f"x{number:06}" for number in kept]
    assert caplog.text.count("rows are dropped") == 1


def test_a_wait_for_rows_that_are_then_dropped_is_not_told_they_are_safe(
    make: Callable[..., Store],
) -> None:
    store = make(max_pending=5)

    async def wait() -> bool:
        safe = asyncio.create_task(store.committed(10))
        await asyncio.sleep(0)
        for number in range(20):
            store.add_exchange(exchange(100 + number))
        other.execute("ROLLBACK")
        return await safe

    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.add_exchange(exchange(0))
        assert eventually(lambda: store.state == "locked", store)
        for number in range(1, 4):
            store.add_exchange(exchange(number))
        assert asyncio.run(wait()) is False


def test_a_full_disk_keeps_the_rows_until_there_is_room(
    make: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"max_page_count": 40}
    store = make(pragmas=limits)
    for number in range(1000):
        store.add_exchange(exchange(number, project="x" * 400))
    assert not store.flush(0.3)
    assert store.state == "broken: database or disk is full"
    assert not asyncio.run(store.committed(30)), "and says so at once"
    limits["max_page_count"] = 100_000
    assert store.flush(10)
    assert store.state == "ok"
    assert rows_in(store.path) == 1000
    assert store.session("s")["exchanges"] == 1000  # type: ignore[index]
    assert caplog.text.count("disk is full") == 1


@pytest.mark.parametrize("content", [b"x\n", b"Dear diary,\n" * 500, b"SQLite format 3\0" * 300])
def test_a_file_that_is_no_database_is_left_alone(
    make: Callable[..., Store], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "kimi.db"
    path.write_bytes(content)
    store = make(path)
    assert store.state.startswith("broken: ")
    store.add_exchange(exchange(1))
    assert not store.flush(0.1)
    assert not asyncio.run(store.committed())
    assert not store.close(1)
    assert path.read_bytes() == content


def test_a_database_damaged_in_its_pages_is_broken_and_stays(
    make: Callable[..., Store], path: Path
) -> None:
    first = make()
    for number in range(200):
        first.add_exchange(exchange(number))
    assert first.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    damaged = path.read_bytes()
    store = make()
    store.add_exchange(exchange(1000))
    assert not store.flush(0.2)
    assert store.state.startswith("broken: database disk image is malformed")
    assert not store.close(1)
    assert path.read_bytes() == damaged


def test_a_broken_file_that_is_moved_away_gets_a_successor_with_the_rows(
    make: Callable[..., Store], tmp_path: Path
) -> None:
    path = tmp_path / "kimi.db"
    path.write_text("not a database, but somebody's only copy of a poem\n" * 100)
    store = make(path)
    store.add_exchange(exchange(1))
    assert not store.flush(0.1)
    path.rename(tmp_path / "poem.txt")
    assert store.flush(5)
    assert store.state == "ok"
    assert rows_in(path) == 1


def test_a_database_removed_while_running_is_made_anew(make: Callable[..., Store]) -> None:
    store = make()
    store.add_exchange(exchange(1))
    assert store.flush()
    for file in store.path.parent.iterdir():
        file.unlink()
    store.add_exchange(exchange(2))
    assert store.flush()
    assert [row["id"] for row in store.exchanges()] == ["x000002"]


def test_a_directory_where_the_file_should_be(make: Callable[..., Store], tmp_path: Path) -> None:
    path = tmp_path / "kimi.db"
    path.mkdir()
    store = make(path)
    assert store.state == "broken: unable to open database file"
    store.add_exchange(exchange(1))
    assert not store.close(1)
    assert list(path.iterdir()) == []


def test_a_file_where_the_directory_should_be(make: Callable[..., Store], tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    store = make(tmp_path / "state" / "kimi.db")
    assert store.state == "broken: File exists"


@contextlib.contextmanager
def without_root() -> Iterator[None]:
    """Root may write a read-only file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_read_only_file_is_broken_until_it_may_be_written(
    make: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kimi.db"
    make(path).close()
    before = path.read_bytes()
    path.chmod(0o444)
    tmp_path.chmod(0o777)
    # The folders above it are private to root: name the file from here.
    monkeypatch.chdir(tmp_path)
    with without_root():
        store = make(Path("kimi.db"))
        assert store.state.startswith("broken: ")
        store.add_exchange(exchange(1))
        assert not store.flush(0.1)
    assert path.read_bytes() == before
    path.chmod(0o666)
    assert store.flush(5)
    assert store.state == "ok"
    assert rows_in(path) == 1


# -- migrations


def add_colour(db: Database) -> None:
    db.table("exchanges").add_column("colour", str)


def rename_project(db: Database) -> None:
    db.table("exchanges").transform(rename={"project": "workspace"})


NEWEST = MIGRATIONS[-1]
MINOR = Migration(NEWEST.major, NEWEST.minor + 1, add_colour)
MAJOR = Migration(NEWEST.major + 1, 0, rename_project)


def version_of(path: Path) -> tuple[int, int]:
    with contextlib.closing(sqlite3.connect(path)) as conn:
        return (
            conn.execute("PRAGMA user_version").fetchone()[0],
            conn.execute("PRAGMA application_id").fetchone()[0],
        )


def test_an_empty_file_becomes_the_newest_schema(make: Callable[..., Store], path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    assert make().state == "ok"
    assert version_of(path) == (MIGRATIONS[-1].version, APPLICATION_ID)
    with contextlib.closing(sqlite3.connect(path)) as conn:
        db = Database(conn)
        assert set(db.table_names()) == TABLES.keys()
        for table, columns in TABLES.items():
            assert tuple(db.table(table).columns_dict) == columns
        assert db.journal_mode == "wal"


def test_versions_only_go_up() -> None:
    versions = [migration.version for migration in (*MIGRATIONS, MINOR, MAJOR)]
    assert versions == sorted(set(versions))


def test_an_older_database_is_migrated_step_by_step_and_keeps_its_rows(
    make: Callable[..., Store], path: Path
) -> None:
    old = make()
    for number in range(50):
        old.add_exchange(exchange(number, project=f"p{number}"))
    assert old.close()
    one_step = make(migrations=[*MIGRATIONS, MINOR])
    assert one_step.state == "ok"
    assert version_of(path)[0] == MINOR.version
    assert one_step.close()
    assert make(migrations=[*MIGRATIONS, MINOR, MAJOR]).state == "ok"
    assert version_of(path)[0] == MAJOR.version
    with contextlib.closing(sqlite3.connect(path)) as conn:
        rows = conn.execute("SELECT id, workspace, colour FROM exchanges ORDER BY id").fetchall()
    assert rows == [(f"x{number:06}", f"p{number}", None) for number in range(50)]


ADDED = {
    1: {
        "exchanges": {"mended"},
        "attempts": {
            "rejected",
            "gen_ai.response.finish_reason",
            "gen_ai.usage.cache_read.input_tokens",
        },
    },
    2: {
        "exchanges": {
            "gross_saved_usd",
            "lost_usd",
            "spent_usd",
            "masked_tokens",
            "compressed_tokens",
            "masks",
            "recalls",
            "cache_break",
            "cache_break_by",
            "summary_id",
        },
        "sessions": {"lost_usd", "spent_usd"},
        "masks": set(TABLES["masks"]),
        "decisions": set(TABLES["decisions"]),
        "summaries": set(TABLES["summaries"]),
    },
}
"""By the minor number of the version: the columns that it brought."""


@pytest.fixture(params=[0, 1], ids=["1.0", "1.1"])
def older(request: pytest.FixtureRequest, path: Path) -> Path:
    """A file as an older version left it, with rows."""
    minor: int = request.param
    path.parent.mkdir()
    with contextlib.closing(connect(path, timeout_s=1)) as db:
        migrate(db, MIGRATIONS[: minor + 1])
        assert db.execute("PRAGMA user_version").fetchone()[0] == 1000 + minor
        for number in range(3):
            db.table("exchanges").insert(exchange(number, attempts=1))
            attempt = {"exchange_id": f"x{number:06}", "number": 1, "status": 200}
            db.table("attempts").insert(attempt)
        db.table("sessions").insert({"id": "s", "created_at": T0, "last_seen_at": T0})
        for later in range(minor + 1, 3):
            for table, columns in ADDED[later].items():
                had = set(db.table(table).columns_dict) if db.table(table).exists() else set()
                assert not columns & had
    return path


def test_an_older_file_keeps_its_rows_and_takes_new_ones(
    make: Callable[..., Store], older: Path
) -> None:
    store = make()
    assert store.state == "ok"
    assert version_of(older) == (NEWEST.version, APPLICATION_ID)
    nothing = dict.fromkeys(EXCHANGE_COLUMNS)
    old = [nothing | exchange(number, attempts=1) for number in range(3)]
    assert list(store.export()) == old
    assert store.attempts("x000002") == [
        dict.fromkeys(ATTEMPT_COLUMNS) | {"exchange_id": "x000002", "number": 1, "status": 200}
    ]
    row = exchange(3, mended=2, attempts=2, lost_usd=0.5, cache_break_by="client")
    store.add_exchange(row)
    new: list[dict[str, str | int]] = [
        {"number": 1, "rejected": "no call", "gen_ai.response.finish_reason": "stop"},
        {"number": 2, "gen_ai.usage.cache_read.input_tokens": 90},
    ]
    for attempt in new:
        store.add_attempt({"exchange_id": "x000003", **attempt})
    store.add_decision(b"digest", "1")
    assert store.flush()
    assert list(store.export()) == [*old, nothing | row]
    assert store.attempts("x000003") == [
        dict.fromkeys(ATTEMPT_COLUMNS) | {"exchange_id": "x000003"} | attempt for attempt in new
    ]
    session = store.session("s")
    assert session is not None
    assert (session["exchanges"], session["lost_usd"], session["spent_usd"]) == (1, 0.5, None)
    assert [row["policy"] for row in store.decisions(9)] == ["1"]


def test_an_older_file_that_nobody_migrated_reads_as_if_it_were(older: Path) -> None:
    before = older.read_bytes()
    reader = StoreReader(older)
    rows = list(reader.export())
    assert [tuple(row) for row in rows] == [EXCHANGE_COLUMNS] * 3
    assert rows[0] == dict.fromkeys(EXCHANGE_COLUMNS) | exchange(0, attempts=1)
    assert reader.exchanges(limit=1, before="x000001") == rows[:1]
    assert tuple(reader.attempts("x000001")[0]) == ATTEMPT_COLUMNS
    assert reader.attempts("x000001")[0]["rejected"] is None
    totals = reader.totals()
    assert (totals["requests"], totals["mended"], totals["cache_breaks"]) == (3, 0, 0)
    assert totals["lost_usd"] is None
    (session,) = reader.sessions()
    assert tuple(session) == SESSION_COLUMNS
    assert session["spent_usd"] is None
    assert (reader.mask("0" * 16), reader.masks(), reader.find_masks("0")) == (None, [], [])
    assert reader.mask_totals()["masks"] == 0
    assert (reader.decisions(9), reader.summaries(), reader.summary("a")) == ([], [], None)
    assert older.read_bytes() == before


def test_the_versions_before_write_to_a_file_of_this_one(
    make: Callable[..., Store], path: Path
) -> None:
    assert make().close()
    with contextlib.closing(sqlite3.connect(path)) as conn, conn:
        for table, columns in TABLES.items():
            added = set().union(*(said.get(table, set()) for said in ADDED.values()))
            known = [column for column in columns if column not in added]
            if known:
                names = ", ".join(f'"{column}"' for column in known)
                conn.execute(
                    f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(known))})",
                    [1] * len(known),
                )
    store = make()
    assert store.exchanges()[0]["lost_usd"] is None
    assert store.sessions()[0]["lost_usd"] is None


def test_a_migration_that_fails_changes_nothing(make: Callable[..., Store], path: Path) -> None:
    old = make()
    old.add_exchange(exchange(1))
    assert old.close()

    def fail(db: Database) -> None:
        db.execute("DELETE FROM exchanges")
        db.execute("this is not SQL")

    failing = Migration(NEWEST.major, NEWEST.minor + 2, fail)
    store = make(migrations=[*MIGRATIONS, MINOR, failing])
    assert store.state.startswith("broken: near")
    assert version_of(path)[0] == NEWEST.version
    assert rows_in(path) == 1
    with contextlib.closing(sqlite3.connect(path)) as conn:
        assert "colour" not in Database(conn).table("exchanges").columns_dict


def test_a_newer_database_that_is_compatible_is_used(make: Callable[..., Store]) -> None:
    assert make(migrations=[*MIGRATIONS, MINOR]).close()
    store = make()
    store.add_exchange(exchange(1))
    assert store.flush()
    assert version_of(store.path)[0] == MINOR.version, "and not taken back"


def test_a_newer_database_that_is_not_compatible_is_left_alone(
    make: Callable[..., Store], path: Path
) -> None:
    assert make(migrations=[*MIGRATIONS, MAJOR]).close()
    before = path.read_bytes()
    store = make()
    assert store.state == (
        f"broken: has schema {MAJOR.major}.0, made by a newer kimi-proxy; this one knows "
        f"{NEWEST.major}.{NEWEST.minor}: update it or name another file"
    )
    store.add_exchange(exchange(1))
    assert not store.close(1)
    assert path.read_bytes() == before


def test_the_database_of_another_program_is_left_alone(
    make: Callable[..., Store], tmp_path: Path
) -> None:
    path = tmp_path / "cookies.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.execute("CREATE TABLE sessions (cookie TEXT)")
        conn.execute("INSERT INTO sessions VALUES ('mine')")
        conn.commit()
    before = path.read_bytes()
    store = make(path)
    assert store.state.startswith("broken: is the database of another program")
    store.add_exchange(exchange(1))
    assert not store.flush(0.1)
    assert not store.close(0.1)
    assert path.read_bytes() == before


def test_two_connections_that_migrate_at_once_do_it_once(tmp_path: Path) -> None:
    path = tmp_path / "kimi.db"
    ready = threading.Barrier(4)
    errors: list[object] = []

    def run() -> None:
        db = connect(path, timeout_s=10)
        ready.wait()
        try:
            migrate(db)
        except (sqlite3.Error, StoreError) as error:
            errors.append(error)
        finally:
            db.close()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert version_of(path) == (NEWEST.version, APPLICATION_ID)


# -- life and death


CHILD = """
import sys
from kimi_core.store import Store
store = Store(sys.argv[1])
store.open()
name, count = sys.argv[2], int(sys.argv[3])
for number in range(count):
    store.add_exchange({"id": f"{name}{number}", "session_id": "s", "started_at": float(number),
                        "gen_ai.usage.input_tokens": 1, "cost_usd": 0.5})
    if number % 7 == 6 and store.flush():
        print(number, flush=True)
EXIT = sys.argv[4:]
if EXIT != ["without close"]:
    print(store.close(30), flush=True)
"""


def child(path: Path, *arguments: str) -> subprocess.Popen[str]:
    addons = str(Path(store_module.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": addons},
    )


def test_what_was_reported_as_committed_survives_kill_9(
    make: Callable[..., Store], path: Path
) -> None:
    with child(path, "x", "10000000") as process:
        assert process.stdout is not None
        reported = [int(process.stdout.readline()) for _ in range(40)][-1]
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.stdout.read().split())])
    assert process.returncode == -signal.SIGKILL
    store = make()
    assert store.state == "ok"
    there = {row["id"] for row in store.export()}
    assert there >= {f"x{number}" for number in range(reported + 1)}
    session = store.session("s")
    assert session is not None
    assert session["exchanges"] == session["input_tokens"] == len(there)
    with contextlib.closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.add_exchange(exchange(1))
    assert store.flush()


def test_two_processes_write_at_once(path: Path) -> None:
    with child(path, "a", "600") as one, child(path, "b", "600") as two:
        assert one.stdout is not None
        assert two.stdout is not None
        assert one.stdout.read().split()[-1] == "True"
        assert two.stdout.read().split()[-1] == "True"
    reader = StoreReader(path)
    assert sum(1 for _ in reader.export()) == 1200
    session = reader.session("s")
    assert session is not None
    assert (session["exchanges"], session["cost_usd"]) == (1200, 600.0)


def test_a_process_that_ends_without_closing_keeps_its_rows(path: Path) -> None:
    with child(path, "x", "20", "without close") as process:
        assert process.wait(30) == 0
    assert rows_in(path) == 20


def test_twenty_thousand_rows_from_four_threads(make: Callable[..., Store]) -> None:
    store = make()

    def add(start: int) -> None:
        for number in range(start, 20_000, 4):
            store.add_exchange(exchange(number))

    threads = [threading.Thread(target=add, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.flush(60)
    assert rows_in(store.path) == 20_000
    assert store.session("s")["exchanges"] == 20_000  # type: ignore[index]
    assert (store.dropped, store.state) == (0, "ok")


def test_rows_are_committed_soon_without_anybody_asking(make: Callable[..., Store]) -> None:
    store = make()
    store.add_exchange(exchange(1))
    end = time.monotonic() + 10
    while not store.exchanges() and time.monotonic() < end:
        threading.Event().wait(0.01)
    assert len(store.exchanges()) == 1


def test_committed_waits_for_the_commit_without_blocking_the_loop(
    make: Callable[..., Store],
) -> None:
    store = make()

    async def scenario() -> tuple[bool, int]:
        assert await store.committed(), "nothing waits"
        store.add_exchange(exchange(1))
        first = await store.committed()
        with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            store.add_exchange(exchange(2))
            waiting = asyncio.create_task(store.committed(10))
            given_up = await store.committed(0.01)
            assert not given_up
            assert not waiting.done()
            other.execute("ROLLBACK")
        assert await waiting
        return first, rows_in(store.path)

    assert asyncio.run(scenario()) == (True, 2)


def test_close_writes_what_waits_and_may_be_called_twice(
    make: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    for number in range(1200):
        store.add_exchange(exchange(number))
    assert store.close()
    assert store.close()
    assert rows_in(store.path) == 1200
    assert [file.name for file in store.path.parent.iterdir()] == ["kimi.db"], "no -wal is left"
    store.add_exchange(exchange(5000))
    assert store.dropped == 1
    assert "because it is closed" in caplog.text


def test_close_of_a_store_that_was_never_opened_leaves_no_file(path: Path) -> None:
    store = Store(path)
    assert store.close()
    assert not path.parent.exists()


def test_rows_added_before_open_are_written(path: Path) -> None:
    store = Store(path)
    store.add_exchange(exchange(1))
    assert store.close()
    assert rows_in(path) == 1


def test_close_gives_a_locked_database_its_time_and_then_says_what_is_lost(
    make: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for number in range(3):
            store.add_exchange(exchange(number))
        assert not store.close(0.1)
    assert "3 rows were not written" in caplog.text


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_parents_rows_to_the_parent(make: Callable[..., Store]) -> None:
    store = make()
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.add_exchange(exchange(1))
        assert eventually(lambda: store.state == "locked", store)
        pid = os.fork()
        if pid == 0:
            # The lock is the parent's connection's; the child only may not hang or write twice.
            closed = store.close(1)
            os._exit(0 if closed else 1)
        assert os.waitpid(pid, 0)[1] == 0
        other.execute("ROLLBACK")
    assert store.flush(10)
    assert rows_in(store.path) == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_may_write_rows_of_its_own(make: Callable[..., Store]) -> None:
    store = make()
    store.add_exchange(exchange(1))
    assert store.flush()
    pid = os.fork()
    if pid == 0:
        store.add_exchange(exchange(2))
        os._exit(0 if store.flush(10) and store.close() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    store.add_exchange(exchange(3))
    assert store.flush()
    assert rows_in(store.path) == 3


def test_one_store_per_path_closed_by_the_last_who_releases_it(path: Path) -> None:
    one = shared(path)
    two = shared(str(path.parent / ".." / path.parent.name / path.name))
    assert one is two
    release(one)
    two.add_exchange(exchange(1))
    assert two.flush()
    release(two)
    three = shared(path)
    try:
        assert three is not one
        assert len(three.exchanges()) == 1
    finally:
        release(three)


def test_folder_and_files_are_private(make: Callable[..., Store]) -> None:
    store = make()
    store.add_exchange(exchange(1))
    assert store.flush()
    assert store.path.parent.stat().st_mode & 0o777 == 0o700
    modes = {file.name: file.stat().st_mode & 0o777 for file in store.path.parent.iterdir()}
    assert modes == {"kimi.db": 0o600, "kimi.db-wal": 0o600, "kimi.db-shm": 0o600}


def test_the_default_path_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert places.store() == Path("/var/state/kimi-proxy/kimi.db")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert places.store() == Path("/home/someone/.local/state/kimi-proxy/kimi.db")
