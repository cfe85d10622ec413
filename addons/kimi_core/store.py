"""The store: rows go in from any thread at once, one thread commits them in batches.

A database that is locked, full or broken never reaches the caller: rows wait in memory, `state`
says why, and the writer keeps trying.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal

from sqlite_utils import Database

from kimi_core import store_batch
from kimi_core.store_batch import Row, Value
from kimi_core.store_read import StoreReader
from kimi_core.store_schema import (
    ATTEMPT_COLUMNS,
    EXCHANGE_COLUMNS,
    MIGRATIONS,
    SESSION_COLUMNS,
    Migration,
    StoreError,
    check,
    connect,
    immediate,
    migrate,
)

__all__ = [
    "ATTEMPT_COLUMNS",
    "EXCHANGE_COLUMNS",
    "SESSION_COLUMNS",
    "Store",
    "StoreError",
    "StoreReader",
    "release",
    "shared",
]

logger = logging.getLogger(__name__)

BATCH_ROWS = 500  # commit at once when so many are waiting
BATCH_WAIT_S = 0.15  # commit the first of them after this at the latest
TRANSACTION_ROWS = 500  # of a backlog, so many at a time
BUSY_TIMEOUT_S = 0.25
LOCKED_RETRY_S = 0.05
BROKEN_RETRY_S = (0.1, 10.0)  # first, longest; doubled in between

SessionSource = Literal["header", "client", "conversation", "key"]

_EXCHANGE_SET = frozenset(EXCHANGE_COLUMNS)
_ATTEMPT_SET = frozenset(ATTEMPT_COLUMNS)
_STARTED_AT = EXCHANGE_COLUMNS.index("started_at")


class Store(StoreReader):
    """The database at `path`, with one thread that writes it.

    `add_…` and `touch_session` take microseconds, may be called from any thread and raise nothing.
    Rows are written in the order they came. At most `max_pending` wait in memory; beyond that the
    oldest are dropped, with one warning, and counted in `dropped`.

    `state` is "ok", "locked" (another process writes), or "broken: …" with the reason.
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
        super().__init__(path)
        self.state = "ok"
        self.dropped = 0
        self._clock = clock
        self._max_pending = max_pending
        self._migrations = migrations
        self._pragmas = pragmas or {}
        self._unknown_columns: set[str] = set()
        self._start_afresh()
        _stores.add(self)

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._pending: deque[Row] = deque()
        self._batch: list[Row] = []  # taken from _pending, not yet committed
        self._queued = 0  # rows accepted, and of these
        self._settled = 0  # committed, dropped or left out
        self._waiters: list[tuple[int, int, Future[bool]]] = []  # _queued, dropped, when asked
        self._thread: threading.Thread | None = None
        self._first_try = threading.Event()
        self._idle = True  # the writer waits for a row, or is not running
        self._retry_now = False  # somebody waits, or this is the end
        self._last_try = False
        self._deadline: float | None = None  # monotonic; set by close()
        self._inode: tuple[int, int] | None = None

    def _after_fork(self) -> None:
        """Leave the parent's rows, thread and connection to the parent."""
        self._start_afresh()

    # -- writing, any thread

    def open(self, timeout: float = 1.0) -> None:
        """Start the writer and wait until it has tried to open the database; raises nothing.

        `state` says how it went. Makes the folder (0700) and the file (0600) where missing.
        """
        with self._lock:
            self._start_writer()
        self._first_try.wait(timeout)

    def add_exchange(self, row: Mapping[str, Value]) -> None:
        """Queue the row of one client request, by column name; missing columns are null.

        A second row with the same id replaces the first. The session's totals follow.
        """
        values = tuple(map(row.get, EXCHANGE_COLUMNS))
        if not _EXCHANGE_SET.issuperset(row):
            self._warn_of_columns("exchanges", row.keys() - _EXCHANGE_SET)
        if values[_STARTED_AT] is None:
            now = self._clock()
            values = (*values[:_STARTED_AT], now, *values[_STARTED_AT + 1 :])
        self._add(("exchanges", values))

    def add_attempt(self, row: Mapping[str, Value]) -> None:
        """Queue the row of one upstream request; `exchange_id` and `number` are its key."""
        if not _ATTEMPT_SET.issuperset(row):
            self._warn_of_columns("attempts", row.keys() - _ATTEMPT_SET)
        self._add(("attempts", tuple(map(row.get, ATTEMPT_COLUMNS))))

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
            context_tokens, context_window, 0, 0, 0, None, 0, None,
        )  # fmt: skip
        self._add(("sessions", values))

    def _add(self, row: Row) -> None:
        dropped = ""
        with self._lock:
            if self._deadline is not None and self._thread is None:
                dropped = "it is closed"
            elif len(self._pending) >= self._max_pending:
                self._pending.popleft()
                dropped = f"more than {self._max_pending} rows wait"
            if dropped:
                warn = not self.dropped
                self.dropped += 1
                self._settled += 1
            self._queued += 1
            if dropped != "it is closed":
                self._pending.append(row)
            if self._idle:
                self._idle = False
                self._start_writer()
                self._wake.notify()
            elif len(self._pending) == BATCH_ROWS:
                self._wake.notify()
        if dropped and warn:
            logger.warning("store %s: rows are dropped, because %s", self.path, dropped)

    def _warn_of_columns(self, table: str, columns: set[str]) -> None:
        new = columns - self._unknown_columns
        if new:
            self._unknown_columns |= new
            logger.warning("store: %s has no column %s", table, ", ".join(sorted(new)))

    # -- waiting for commits

    def flush(self, timeout: float = 5.0) -> bool:
        """Return True when all that was queued before the call is committed; blocks.

        False after `timeout` seconds, or when one of these rows had to be dropped.
        """
        future = self._when_settled()
        try:
            return future.result(timeout)
        except TimeoutError:
            return False

    async def committed(self, timeout: float = 2.0) -> bool:
        """Return True when all that was queued before the call is committed.

        False at once when the store is broken, and after `timeout` seconds when it is locked.
        """
        if self.state not in ("ok", "locked"):
            return False
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.wrap_future(self._when_settled())
        except TimeoutError:
            return False

    def _when_settled(self) -> Future[bool]:
        future: Future[bool] = Future()
        with self._lock:
            if self._settled >= self._queued:
                future.set_result(True)
            elif self._deadline is not None and self._thread is None:
                future.set_result(False)
            else:
                self._waiters.append((self._queued, self.dropped, future))
                self._retry_now = True
                self._wake.notify()
        return future

    def close(self, timeout: float = 5.0) -> bool:
        """Commit what waits, stop the writer, and return whether nothing was left.

        A locked database is waited for until `timeout` seconds have passed, a broken one is tried
        once more. A second call, and one in a forked child, has nothing to do.
        """
        with self._lock:
            if self._deadline is None:
                self._deadline = time.monotonic() + timeout
            thread = self._thread
            start = thread is None and bool(self._pending)
            self._retry_now = True
            self._wake.notify()
        if thread is not None:
            thread.join(timeout + 2 * BUSY_TIMEOUT_S)
        elif start:
            # No thread can be started while the interpreter exits.
            self._write_until_closed()
        atexit.unregister(self.close)
        with self._lock:
            left = len(self._pending) + len(self._batch)
        return not left

    # -- the writer's thread

    def _start_writer(self) -> None:
        """Call with the lock held."""
        if self._thread is not None or self._deadline is not None:
            return
        thread = threading.Thread(target=self._write_until_closed, name="store", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the interpreter exits: close() will write
            logger.debug("store %s: %s", self.path, error)
            return
        self._thread = thread
        atexit.unregister(self.close)
        atexit.register(self.close)

    def _write_until_closed(self) -> None:
        db: Database | None = None
        failures = 0
        try:
            while self._next_batch(opened=db is not None, failures=failures):
                try:
                    if db is not None and self._file_changed():
                        db.close()
                        db = None
                    if db is None:
                        db = self._connect()
                    left_out = store_batch.write(db, self._batch) if self._batch else 0
                except (sqlite3.Error, OSError, StoreError) as error:
                    failures += 1
                    self._set_state(_state_of(error))
                    if db is not None and self.state != "locked":
                        db.close()
                        db = None
                else:
                    failures = 0
                    self._set_state("ok")
                    self._settle(left_out)
                self._first_try.set()
        finally:
            if db is not None:
                db.close()
            self._end()

    def _next_batch(self, *, opened: bool, failures: int) -> bool:
        """Wait until there is something to do, put it in `_batch`; False: the end."""
        with self._lock:
            if failures:
                self._wake.wait_for(lambda: self._retry_now, self._retry_s(failures))
                self._retry_now = False
                if self._given_up():
                    return False
            elif opened:
                while not self._pending and self._deadline is None:
                    self._idle = True
                    self._wake.wait()
                self._idle = False
                # Collect a batch, unless somebody waits or there are enough.
                self._wake.wait_for(
                    lambda: (
                        bool(self._waiters)
                        or self._deadline is not None
                        or len(self._pending) >= BATCH_ROWS
                    ),
                    BATCH_WAIT_S,
                )
            if not self._batch:
                size = min(len(self._pending), TRANSACTION_ROWS)
                self._batch = [self._pending.popleft() for _ in range(size)]
            return bool(self._batch) or self._deadline is None

    def _retry_s(self, failures: int) -> float:
        if self.state == "locked":
            return LOCKED_RETRY_S
        first, longest = BROKEN_RETRY_S
        return min(first * 2.0 ** min(failures - 1, 30), longest)

    def _given_up(self) -> bool:
        if self._deadline is None:
            return False
        if self.state == "locked":
            return time.monotonic() >= self._deadline
        given_up, self._last_try = self._last_try, True
        return given_up

    def _connect(self) -> Database:
        self._make_file()
        db = connect(self.path, timeout_s=BUSY_TIMEOUT_S)
        try:
            check(db, self._migrations)
            db.enable_wal()
            # NORMAL would lose the last commits with the power, and a mask is only safe on disk.
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA journal_size_limit = 16777216")
            for name, value in self._pragmas.items():
                db.execute(f"PRAGMA {name} = {value:d}")
            migrate(db, self._migrations)
            with immediate(db):
                pass  # says now, not at the first row, when it is read-only or locked
            self._inode = self._identity()
        except BaseException:
            db.close()
            raise
        return db

    def _make_file(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # O_EXCL, since closing a descriptor of a file that SQLite has open drops SQLite's locks.
        # -- https://www.sqlite.org/howtocorrupt.html section 2.2
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def _identity(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None
        return stat.st_dev, stat.st_ino

    def _file_changed(self) -> bool:
        """Whether the file was moved or removed: SQLite would go on writing to the old one."""
        return self._identity() != self._inode

    def _set_state(self, state: str) -> None:
        if state == self.state:
            return
        self.state = state
        if state == "ok":
            logger.info("store %s: works again", self.path)
        else:
            logger.warning("store %s: %s; rows wait in memory", self.path, state)

    def _settle(self, left_out: int) -> None:
        with self._lock:
            self._settled += len(self._batch)
            self._batch = []
            self.dropped += left_out
            done = [waiter for waiter in self._waiters if waiter[0] <= self._settled]
            self._waiters = [waiter for waiter in self._waiters if waiter[0] > self._settled]
            dropped = self.dropped
        for _, dropped_before, future in done:
            _resolve(future, dropped == dropped_before)

    def _end(self) -> None:
        with self._lock:
            self._thread = None
            self._idle = True
            waiters, self._waiters = self._waiters, []
            left = len(self._pending) + len(self._batch)
        self._first_try.set()
        for _, _, future in waiters:
            _resolve(future, False)
        if left:
            logger.warning("store %s: %d rows were not written", self.path, left)


def _resolve(future: Future[bool], value: bool) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def _state_of(error: sqlite3.Error | OSError | StoreError) -> str:
    # The extended code's low byte is the primary one. -- https://www.sqlite.org/rescode.html
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "locked"
    if isinstance(error, OSError):
        return f"broken: {error.strerror}"
    return f"broken: {error}"


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
