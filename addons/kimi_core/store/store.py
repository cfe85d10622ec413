"""The store: what is kept, in SQLite, written by one thread and read from any."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from sqlite_utils import Database

from kimi_core.store import retention
from kimi_core.store.masks import mask_row
from kimi_core.store.read import StoreReader
from kimi_core.store.retention import Limits
from kimi_core.store.rows import Row, Value
from kimi_core.store.schema import MIGRATIONS, TABLES, Migration
from kimi_core.store.writer import Writer

logger = logging.getLogger(__name__)

TIDY_AFTER_S = 600.0
TIDY_AFTER_MASKS = 1000

SessionSource = Literal["header", "client", "conversation", "key"]

_SETS = {table: frozenset(columns) for table, columns in TABLES.items()}
_STARTED_AT = TABLES["exchanges"].index("started_at")


class Store(Writer, StoreReader):
    """The database at `path`, with one thread that writes it.

    What adds, touches, revokes or forgets takes microseconds, may be called from any thread and
    raises nothing. How it is written: see Writer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Callable[[], float] = time.time,
        max_pending: int = 100_000,
        migrations: Sequence[Migration] = MIGRATIONS,
        pragmas: Mapping[str, int] | None = None,
    ) -> None:
        """Nothing is opened yet. `pragmas` are set on each new connection of the writer."""
        StoreReader.__init__(self, path)
        Writer.__init__(self, max_pending=max_pending, migrations=migrations, pragmas=pragmas or {})
        self._clock = clock
        self._unknown_columns: set[str] = set()
        self._limits = Limits()
        self._tidy_at = 0.0
        self._masks_since = 0
        _stores.add(self)

    def add_exchange(self, row: Mapping[str, Value]) -> None:
        """Queue the row of one client request, by column name; missing columns are null.

        A second row with the same id replaces the first. The session's totals follow.
        """
        values = self._values("exchanges", row)
        if values[_STARTED_AT] is None:
            now = self._clock()
            values = (*values[:_STARTED_AT], now, *values[_STARTED_AT + 1 :])
        self._add(("exchanges", values))

    def add_attempt(self, row: Mapping[str, Value]) -> None:
        """Queue the row of one upstream request; `exchange_id` and `number` are its key."""
        self._add(("attempts", self._values("attempts", row)))

    def add_conversation(self, digest: bytes | str, session_id: str, key_hash: str | None) -> None:
        """Queue that the conversation with this digest belongs to the session, as of now."""
        self._add(("conversations", (digest, session_id, key_hash, self._clock())))

    def touch_session(
        self,
        session_id: str,
        *,
        name: str | None = None,
        key_hash: str | None = None,
        project: str | None = None,
        client: str | None = None,
        provider: str | None = None,
        model: str | None = None,
        source: SessionSource | None = None,
        context_tokens: int | None = None,
        context_window: int | None = None,
    ) -> None:
        """Queue that the session is in use now, and what is known of it; None changes nothing."""
        now = self._clock()
        values: tuple[Value, ...] = (  # SESSION_COLUMNS
            session_id, name, now, now, key_hash, project, client, provider, model, source,
            context_tokens, context_window, 0, 0, 0, None, 0, None, None, None,
        )  # fmt: skip
        self._add(("sessions", values))

    def add_mask(
        self,
        key_hash: str,
        hash: str,
        original: str,
        *,
        tokens: int,
        sent_tokens: int,
        label: str,
        kinds: str | Iterable[str],
        session_id: str,
    ) -> None:
        """Queue the text that a mask stands for; one that is known is only noted as used now.

        `tokens` and `sent_tokens` are those of the original and of what is sent instead of it.
        It is safe when a later `committed` says so.
        """
        kinds = kinds if isinstance(kinds, str) else " ".join(sorted(kinds))
        now = self._clock()
        self._add(
            mask_row(key_hash, hash, label, kinds, tokens, sent_tokens, session_id, now, original)
        )

    def limit_masks(self, age_s: float, max_bytes: int) -> None:
        """Keep originals for so long after their last use, and no more of them, compressed.

        What was used in the last hours stays, whatever the limits say.
        """
        self._limits = Limits(age_s, max_bytes)

    def add_decision(self, digest: bytes, policy: str) -> None:
        """Queue by which policy the conversation with this digest is masked, as of now."""
        self._add(("decisions", (digest, policy, self._clock())))

    def forget_decisions(self, digests: Iterable[bytes]) -> None:
        """Queue that nothing was decided on these conversations."""
        for digest in digests:
            self._add(("decisions", (digest, None, None)))

    def add_summary(self, row: Mapping[str, Value]) -> None:
        """Queue a summary by column name; a second one with the same id replaces the first.

        Without `created_at` it is made now, without `applied` it was never applied. Half a
        surrogate pair in its text does not come back as it was.
        """
        now = {"created_at": self._clock(), "applied": 0}
        self._add(("summaries", self._values("summaries", {**now, **row})))

    def touch_summary(self, summary_id: str) -> None:
        """Queue that a request left with this summary now."""
        self._add(("summary uses", (self._clock(), summary_id)))

    def revoke_summary(self, summary_id: str) -> None:
        """Queue that this summary is no longer applied, as of now."""
        self._add(("summary revocations", (self._clock(), summary_id)))

    def _values(self, table: str, row: Mapping[str, Value]) -> tuple[Value, ...]:
        if not _SETS[table].issuperset(row):
            self._warn_of_columns(table, row.keys() - _SETS[table])
        return tuple(map(row.get, TABLES[table]))

    def _warn_of_columns(self, table: str, columns: set[str]) -> None:
        new = columns - self._unknown_columns
        if new:
            self._unknown_columns |= new
            logger.warning("store: %s has no column %s", table, ", ".join(sorted(new)))

    def _tidy(self, db: Database, rows: Sequence[Row]) -> None:
        self._masks_since += sum(table == "masks" for table, _ in rows)
        if self._masks_since < TIDY_AFTER_MASKS and self._clock() < self._tidy_at:
            return
        try:
            # In steps, so that rows that come meanwhile are committed soon.
            while retention.prune(db, self._clock(), self._limits):
                if self._busy():
                    return
        except sqlite3.Error as error:
            logger.debug("store %s: nothing is pruned: %s", self.path, error)
        self._tidy_at, self._masks_since = self._clock() + TIDY_AFTER_S, 0


_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_shared: dict[str, tuple[Store, int]] = {}
_shared_lock = threading.Lock()


def shared(path: str | os.PathLike[str]) -> Store:
    """Return the process's one store of `path`, opened; `release` it when done."""
    key = os.path.realpath(os.path.expanduser(path))
    with _shared_lock:
        store, users = _shared.get(key) or (Store(key), 0)
        _shared[key] = (store, users + 1)
    store.open()
    return store


def release(store: Store, timeout: float = 5.0) -> None:
    """Give back what `shared` returned; the last one closes it."""
    with _shared_lock:
        for key, (known, users) in list(_shared.items()):
            if known is not store:
                continue
            if users > 1:
                _shared[key] = (store, users - 1)
                return
            del _shared[key]
    store.close(timeout)


def _after_fork() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()
    for store in list(_stores):
        store._after_fork()


os.register_at_fork(after_in_child=_after_fork)
