"""Summaries in the store: what is said of one, and what was done with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_core.store import Store
from kimi_core.store.schema import SUMMARY_COLUMNS

T0 = 1_700_000_000.0


class Clock:
    """The time that a test says it is."""

    def __init__(self) -> None:
        self.now = T0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path / "kimi.db", clock=clock)) as made:
        made.open()
        yield made


def test_a_summary_comes_back_as_it_went_in(store: Store) -> None:
    row = {column: f"text of {column}" for column in SUMMARY_COLUMNS} | {
        "id": "a",
        "messages": 12,
        "cost_usd": 0.25,
        "created_at": T0 - 5,
        "used_at": None,
        "applied": 3,
        "revoked_at": None,
    }
    store.add_summary(row)
    assert store.flush()
    assert store.summary("a") == row
    assert store.summaries() == [row]
    assert store.summary("b") is None


def test_what_is_not_said_of_a_new_summary(store: Store) -> None:
    store.add_summary({"id": "a", "text": "so far"})
    assert store.flush()
    said = {"id": "a", "text": "so far", "created_at": T0, "applied": 0}
    assert store.summary("a") == dict.fromkeys(SUMMARY_COLUMNS) | said


def test_an_unknown_column_is_named_and_the_summary_is_kept(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.add_summary({"id": "a", "text": "", "colour": "red"})
    assert store.flush()
    assert store.summary("a") is not None
    assert "summaries has no column colour" in caplog.text


def test_each_use_is_counted(store: Store, clock: Clock) -> None:
    store.add_summary({"id": "a", "text": ""})
    for _ in range(3):
        clock.now += 1
        store.touch_summary("a")
    store.touch_summary("unknown")
    assert store.flush()
    found = store.summary("a")
    assert found is not None
    assert (found["applied"], found["used_at"]) == (3, T0 + 3)


def test_a_revoked_summary_can_still_be_seen(store: Store, clock: Clock) -> None:
    for summary in "ab":
        store.add_summary({"id": summary, "text": ""})
    clock.now += 1
    store.revoke_summary("a")
    assert store.flush()
    assert [(row["id"], row["revoked_at"]) for row in store.summaries()] == [
        ("a", T0 + 1),
        ("b", None),
    ]
    assert [row["id"] for row in store.summaries(include_revoked=False)] == ["b"]


def test_a_summary_that_is_made_again_is_a_new_one(store: Store, clock: Clock) -> None:
    store.add_summary({"id": "a", "text": "first", "model": "m"})
    store.touch_summary("a")
    store.revoke_summary("a")
    clock.now += 1
    store.add_summary({"id": "a", "text": "second"})
    store.touch_summary("a")  # all in one batch
    assert store.flush()
    (found,) = store.summaries()
    assert (found["text"], found["model"], found["revoked_at"]) == ("second", None, None)
    assert (found["created_at"], found["applied"]) == (T0 + 1, 1)


def test_summaries_of_a_session_come_newest_first(store: Store, clock: Clock) -> None:
    for summary, session in (("a", "s"), ("b", "t"), ("c", "s")):
        clock.now += 1
        store.add_summary({"id": summary, "text": "", "session_id": session})
    assert store.flush()
    assert [row["id"] for row in store.summaries("s")] == ["c", "a"]
    assert [row["id"] for row in store.summaries()] == ["c", "b", "a"]
