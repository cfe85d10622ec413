"""Originals and decisions in the store: kept as they were, safe when it says so, and let go of."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_core.store import Store, StoreError, StoreReader, masks, retention
from kimi_core.store.retention import Limits, prune
from kimi_core.store.schema import connect

T0 = 1_700_000_000.0
HOUR, DAY = 3600.0, 86_400.0
HASH = "0123456789abcdef"
KEY = "feedfeedfeedfeed"


class Clock:
    """The time that a test says it is."""

    def __init__(self) -> None:
        self.now = T0

    def __call__(self) -> float:
        return self.now


def add(store: Store, hash: str = HASH, original: str = "text", **said: Any) -> None:
    given = {
        "key_hash": KEY, "tokens": 3000, "sent_tokens": 500, "label": "open a.py",
        "kinds": "cut", "session_id": "s",
    } | said  # fmt: skip
    store.add_mask(given.pop("key_hash"), hash, original, **given)


def number(of: int) -> str:
    return f"{of:016x}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path / "kimi.db", clock=clock)) as made:
        made.open()
        yield made


@pytest.fixture
def locked(store: Store) -> Iterator[Callable[[], None]]:
    """The store while another program writes; what it gives ends that."""
    with contextlib.closing(
        sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        yield lambda: other.execute("ROLLBACK") and None


def hashes(store: StoreReader) -> list[str]:
    return [row["hash"] for row in store.masks(10_000)]


# -- kept


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_an_original_comes_back_as_it_was_whatever_is_in_it(store: Store, text: str) -> None:
    hash = f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):016x}"
    add(store, hash, text)
    assert store.flush()
    found = store.mask(hash)
    assert found is not None
    assert found["original"] == text


def test_an_original_beside_a_row_that_cannot_be_stored_is_kept_as_it_was(store: Store) -> None:
    text = "half \ud83d pair\r\n\0"
    store.add_exchange({"id": None, "started_at": 1.0})
    add(store, original=text)
    assert not store.flush(), "the row without an id"
    found = store.mask(HASH)
    assert found is not None
    assert found["original"] == text


def test_a_mask_says_what_is_known_of_it(store: Store, clock: Clock) -> None:
    text = "line\n" * 1000
    add(store, original=text, kinds=("reference", "cut"))
    clock.now += 5
    add(store, original=text)
    assert store.flush()
    found = store.mask(HASH, KEY)
    assert found is not None
    assert found.pop("bytes") < 100, "compressed"
    assert found == {
        "hash": HASH,
        "key_hash": KEY,
        "label": "open a.py",
        "kinds": "cut reference",
        "tags": ["cut", "reference"],
        "tokens": 3000,
        "sent_tokens": 500,
        "session_id": "s",
        "created_at": T0,
        "used_at": T0 + 5,
        "preview": text[:100],
        "original": text,
    }
    assert store.mask(number(1)) is None


def test_a_mask_that_is_known_is_only_noted_as_used(store: Store, clock: Clock) -> None:
    add(store)
    add(store, label="later", session_id="other")  # in the same batch
    assert store.flush()
    clock.now += 60
    add(store, label="later still")
    assert store.flush()
    (row,) = store.masks()
    assert (row["label"], row["session_id"]) == ("open a.py", "s")
    assert (row["created_at"], row["used_at"]) == (T0, T0 + 60)


def test_a_mask_belongs_to_the_key_that_made_it(store: Store, clock: Clock) -> None:
    add(store, key_hash="one")
    clock.now += 1
    add(store, key_hash="two")
    add(store, number(5), key_hash="")
    assert store.flush()
    assert store.mask(HASH, "two") is not None
    assert store.mask(HASH, "three") is None
    assert store.mask(HASH, "") is None
    assert store.mask(number(5), "") is not None
    whoever = store.mask(HASH)
    assert whoever is not None
    assert whoever["key_hash"] == "one"
    assert [row["hash"] for row in store.masks(key_hash="one")] == [HASH]


def test_a_mask_that_another_process_removed_meanwhile_is_written_again(store: Store) -> None:
    add(store)
    assert store.flush()
    row = masks.mask_row(KEY, HASH, "", "cut", 1, 1, "s", T0, "text")
    with contextlib.closing(connect(store.path, timeout_s=1)) as db:
        rows = masks.packed(db.conn, [row])
        assert rows == [row], "it is known, so nothing is compressed"
        db.conn.execute("DELETE FROM masks")
        masks.write(db.conn, [values for _, values in rows])
    found = store.mask(HASH)
    assert found is not None
    assert found["original"] == "text"


def test_a_damaged_original_is_an_error_that_names_the_mask(store: Store) -> None:
    add(store)
    assert store.flush()
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as conn:
        conn.execute("UPDATE masks SET original = x'00'")
    with pytest.raises(StoreError, match=HASH):
        store.mask(HASH)
    assert [row["preview"] for row in store.masks()] == [""]


# -- found


def test_hashes_are_found_by_their_first_digits(store: Store) -> None:
    for hash in ("abcdef0000000000", "abcdefffffffffff", "abcdf00000000000"):
        add(store, hash)
        add(store, hash, key_hash="other")
    assert store.flush()
    assert store.find_masks("abcdef") == ["abcdef0000000000", "abcdefffffffffff"]
    assert store.find_masks("ABCDEF0") == ["abcdef0000000000"]
    assert store.find_masks("abcdefffffffffff") == ["abcdefffffffffff"]
    assert store.find_masks("abcdee") == []
    assert store.find_masks("%") == []


def test_masks_are_paged_newest_first_without_their_originals(store: Store, clock: Clock) -> None:
    for of in range(10):
        clock.now += 1
        add(store, number(of), f"text {of}", session_id=f"s{of % 2}")
    assert store.flush()
    seen: list[str] = []
    before = None
    while page := store.masks(4, before):
        seen += [row["hash"] for row in page]
        before = page[-1]["created_at"]
        assert all("original" not in row for row in page)
    assert seen == [number(of) for of in reversed(range(10))]
    assert [row["preview"] for row in store.masks(2, session_id="s1")] == ["text 9", "text 7"]


@pytest.mark.parametrize(
    "text", ["", "a" * 99, "é" * 101, "𝄞" * 300, "".join(map(chr, range(0x4E00, 0x5E00)))]
)
def test_a_preview_is_the_beginning_of_the_original(store: Store, text: str) -> None:
    add(store, original=text)
    assert store.flush()
    (row,) = store.masks()
    assert text.startswith(row["preview"])
    assert len(row["preview"]) >= min(len(text), 90)


def test_totals_count_each_original_once(store: Store) -> None:
    assert store.mask_totals() == {
        "masks": 0,
        "tokens_saved": 0,
        "by_kind": {"reference": 0, "cut": 0},
        "bytes": 0,
    }
    add(store, number(1), tokens=100, sent_tokens=10, kinds="cut")
    add(store, number(1), tokens=100, sent_tokens=10, kinds="cut")
    add(store, number(2), tokens=50, sent_tokens=20, kinds="reference")
    add(store, number(3), tokens=7, sent_tokens=1, kinds="reference")
    assert store.flush()
    totals = store.mask_totals()
    assert (totals["masks"], totals["tokens_saved"]) == (3, 126)
    assert totals["by_kind"] == {"reference": 36, "cut": 90}
    assert totals["bytes"] == sum(row["bytes"] for row in store.masks())


# -- safe


CHILD = """
import asyncio, sys
from kimi_core.store import Store
store = Store(sys.argv[1])
store.open()
async def main():
    for number in range(10_000_000):
        store.add_mask("k", f"{number:016x}", f"original {number} " * 500, tokens=1000,
                       sent_tokens=1, label="", kinds="cut", session_id="s")
        if await store.committed():
            print(number, flush=True)
asyncio.run(main())
"""


def test_an_original_that_was_called_committed_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "kimi.db"
    addons = str(Path(masks.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": addons},
    ) as process:
        assert process.stdout is not None
        reported = [int(process.stdout.readline()) for _ in range(50)][-1]
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.stdout.read().split())])
    reader = StoreReader(path)
    for of in range(reported + 1):
        found = reader.mask(number(of), "k")
        assert found is not None
        assert found["original"] == f"original {of} " * 500


def test_originals_are_on_disk_before_a_commit_returns(store: Store) -> None:
    said: list[int] = []

    class Asking(Store):
        def _tidy(self, db: Any, rows: Any) -> None:
            said.append(db.conn.execute("PRAGMA synchronous").fetchone()[0])

    with contextlib.closing(Asking(store.path)) as asking:
        add(asking)
        assert asking.flush()
    assert set(said) == {2}, "FULL: https://www.sqlite.org/pragma.html#pragma_synchronous"


def test_committed_waits_for_a_mask(store: Store, locked: Callable[[], None]) -> None:
    async def scenario() -> bool:
        add(store)
        assert not await store.committed(0.01)
        assert hashes(store) == []
        waiting = asyncio.create_task(store.committed(10))
        await asyncio.sleep(0)
        locked()
        return await waiting

    assert asyncio.run(scenario())
    assert hashes(store) == [HASH]


def test_a_mask_that_was_dropped_is_not_called_safe(
    tmp_path: Path, store: Store, locked: Callable[[], None]
) -> None:
    with contextlib.closing(Store(store.path, max_pending=5)) as small:
        small.open()
        small.touch_session("in the writer's hands")
        assert not small.flush(0.01)
        add(small)
        for of in range(5):
            small.touch_session(f"s{of}")
        assert small.dropped == 1
        assert not asyncio.run(small.committed(10)), "dropped before somebody asked"
        locked()
        assert small.flush(10)
        assert hashes(small) == []
        add(small)
        assert asyncio.run(small.committed(10)), "what comes after the backlog is safe again"
        assert hashes(small) == [HASH]


def test_a_mask_that_is_dropped_while_somebody_waits_is_not_called_safe(
    store: Store, locked: Callable[[], None]
) -> None:
    with contextlib.closing(Store(store.path, max_pending=5)) as small:
        small.open()
        small.touch_session("in the writer's hands")
        assert not small.flush(0.01)

        async def wait() -> bool:
            add(small)
            safe = asyncio.create_task(small.committed(10))
            await asyncio.sleep(0)
            for of in range(5):
                small.touch_session(f"s{of}")
            locked()
            return await safe

        assert not asyncio.run(wait())


def test_a_closed_store_calls_no_mask_safe(store: Store) -> None:
    assert store.close()
    add(store)
    assert not asyncio.run(store.committed(10))
    assert hashes(store) == []


def test_masks_from_many_threads_are_all_kept(store: Store) -> None:
    def run(start: int) -> None:
        for of in range(start, 400, 4):
            add(store, number(of), f"text {of}")

    threads = [threading.Thread(target=run, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.flush()
    assert sorted(hashes(store)) == [number(of) for of in range(400)]


# -- decisions


def test_decisions_are_remembered_newest_first(store: Store, clock: Clock) -> None:
    for digest, policy in ((b"a", "1"), (b"b", "2"), (b"c", "3"), (b"a", "4")):
        clock.now += 1
        store.add_decision(digest, policy)
    assert store.flush()
    assert store.decisions(2) == [
        {"digest": b"a", "policy": "4", "seen_at": T0 + 4},
        {"digest": b"c", "policy": "3", "seen_at": T0 + 3},
    ]


def test_decisions_are_forgotten_in_the_order_of_the_calls(store: Store) -> None:
    store.add_decision(b"a", "1")
    store.add_decision(b"b", "1")
    store.forget_decisions([b"a", b"b", b"unknown"])
    store.add_decision(b"b", "2")  # all in one batch
    assert store.flush()
    assert [(row["digest"], row["policy"]) for row in store.decisions(9)] == [(b"b", "2")]
    store.forget_decisions(iter([b"b"]))
    assert store.flush()
    assert store.decisions(9) == []


# -- let go of


def left(store: Store, limits: Limits, now: float) -> set[int]:
    """Return which masks are left when nothing more is to be pruned."""
    with contextlib.closing(connect(store.path, timeout_s=1)) as db:
        while prune(db, now, limits):
            pass
    return {int(hash, 16) for hash in hashes(store)}


@pytest.fixture
def hourly(store: Store, clock: Clock) -> Store:
    """Ten masks of one size, each used an hour after the one before."""
    for of in range(10):
        clock.now = T0 + of * HOUR
        add(store, number(of), "x" * 500)
    assert store.flush()
    return store


def test_a_mask_is_kept_for_its_time_after_its_last_use(hourly: Store, clock: Clock) -> None:
    add(hourly, number(0), "x" * 500)
    assert hourly.flush()
    assert left(hourly, Limits(age_s=8 * HOUR), clock.now + 4.5 * HOUR) == {0, 6, 7, 8, 9}


def test_the_longest_unused_go_first_when_there_is_too_much(hourly: Store, clock: Clock) -> None:
    size = hourly.masks(1)[0]["bytes"]
    now = clock.now + DAY
    assert left(hourly, Limits(bytes=10 * size), now) == set(range(10))
    assert left(hourly, Limits(bytes=4 * size + 1), now) == {6, 7, 8, 9}


def test_what_was_used_lately_stays_whatever_the_limits_say(hourly: Store, clock: Clock) -> None:
    assert left(hourly, Limits(age_s=1, bytes=1), clock.now) == {7, 8, 9}


def test_more_than_one_step_holds_is_removed_in_several(store: Store, clock: Clock) -> None:
    count = 2 * retention.STEP_ROWS + 7
    for of in range(count):
        add(store, number(of), "")
        store.add_decision(of.to_bytes(16), "1")
    assert store.flush()
    assert left(store, Limits(), clock.now + DAY) == set(range(count))
    with contextlib.closing(connect(store.path, timeout_s=1)) as db:
        later = clock.now + 100 * DAY
        assert [prune(db, later, Limits()) for _ in range(3)] == [True, True, False]
    assert (hashes(store), store.decisions(9)) == ([], [])


def test_conversations_and_decisions_are_known_for_90_days(store: Store, clock: Clock) -> None:
    store.add_decision(b"old", "1")
    store.add_conversation(b"old", "s", None)
    clock.now += DAY
    store.add_decision(b"new", "1")
    store.add_conversation(b"new", "s", None)
    assert store.flush()
    left(store, Limits(), T0 + 90 * DAY + HOUR)
    assert [row["digest"] for row in store.decisions(9)] == [b"new"]
    assert [row["digest"] for row in store.conversations(9)] == [b"new"]


def settle(store: Store) -> None:
    """Return when the writer has tidied up after what was written before, if it wanted to."""
    store.touch_session("s")
    assert store.flush()


def test_the_store_prunes_when_it_is_opened(hourly: Store, clock: Clock) -> None:
    clock.now += 40 * DAY
    with contextlib.closing(Store(hourly.path, clock=clock)) as again:
        again.open()
        settle(again)
        assert hashes(again) == []


def test_the_store_prunes_after_ten_minutes_and_not_before(hourly: Store, clock: Clock) -> None:
    settle(hourly)
    hourly.limit_masks(HOUR, 10**9)
    clock.now += 599
    settle(hourly)
    settle(hourly)
    assert len(hashes(hourly)) == 10
    clock.now += 2
    settle(hourly)
    settle(hourly)
    assert hashes(hourly) == [number(9), number(8)]


def test_the_store_prunes_after_a_thousand_masks_and_not_before(hourly: Store) -> None:
    settle(hourly)
    hourly.limit_masks(HOUR, 10**9)
    for of in range(1000, 1900):
        add(hourly, number(of), "")
    settle(hourly)
    settle(hourly)
    assert len(hashes(hourly)) == 910
    for of in range(1900, 2000):
        add(hourly, number(of), "")
    settle(hourly)
    settle(hourly)
    assert set(hashes(hourly)) == {number(of) for of in (7, 8, 9, *range(1000, 2000))}


def test_a_database_that_is_locked_is_pruned_later(store: Store, clock: Clock) -> None:
    add(store)
    assert store.flush()
    assert store.state == "ok"
    with contextlib.closing(connect(store.path, timeout_s=0.01)) as db:
        db.conn.execute("PRAGMA busy_timeout = 1")
        with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError):
                prune(db, clock.now, Limits())
            other.execute("ROLLBACK")
        assert not prune(db, clock.now, Limits())
