"""The writer: rows go in from any thread at once, one thread commits them in batches.

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
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from sqlite_utils import Database

from kimi_core.store import batch
from kimi_core.store.rows import Row
from kimi_core.store.schema import Migration, StoreError, check, connect, immediate, migrate

logger = logging.getLogger(__name__)

BATCH_ROWS = 500  # commit at once when so many are waiting
BATCH_WAIT_S = 0.15  # commit the first of them after this at the latest
TRANSACTION_ROWS = 500  # of a backlog, so many at a time
BUSY_TIMEOUT_S = 0.25
LOCKED_RETRY_S = 0.05
BROKEN_RETRY_S = (0.1, 10.0)  # first, longest; doubled in between


class Writer:
    """One thread that writes the database at `path`, and the rows that wait for it.

    Rows are written in the order they came. At most `max_pending` wait in memory; beyond that the
    oldest are dropped, with one warning, and counted in `dropped`.

    `state` is "ok", "locked" (another process writes), or "broken: …" with the reason.
    """

    path: Path

    def __init__(
        self,
        *,
        max_pending: int,
        migrations: Sequence[Migration],
        pragmas: Mapping[str, int],
    ) -> None:
        """Nothing is opened yet. `pragmas` are set on each new connection of the writer."""
        self.state = "ok"
        self.dropped = 0
        self.openings = 0
        """How often the writer has opened a file; another one may lack what was committed."""
        self._max_pending = max_pending
        self._migrations = migrations
        self._pragmas = pragmas
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._pending: deque[Row] = deque()
        self._batch: list[Row] = []  # taken from _pending, not yet committed
        self._queued = 0  # rows accepted, and of these
        self._settled = 0  # committed, dropped or left out
        self._mask_lost = False  # one was dropped, of the backlog that is still there
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

    def _add(self, row: Row) -> None:
        dropped, lost = "", row
        with self._lock:
            if self._deadline is not None and self._thread is None:
                dropped = "it is closed"
            elif len(self._pending) >= self._max_pending:
                lost = self._pending.popleft()
                dropped = f"more than {self._max_pending} rows wait"
            if dropped:
                self._mask_lost |= lost[0] == "masks"
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

        False at once when the store is broken or a mask among it was dropped, and after `timeout`
        seconds when it is locked.
        """
        if self.state not in ("ok", "locked") or self._mask_lost:
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
                    rows = self._batch
                    left_out = batch.write(db, rows) if rows else 0
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
                    self._tidy(db, rows)
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
            self.openings += 1
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
            if self._settled >= self._queued:
                self._mask_lost = False
            done = [waiter for waiter in self._waiters if waiter[0] <= self._settled]
            self._waiters = [waiter for waiter in self._waiters if waiter[0] > self._settled]
            dropped = self.dropped
        for _, dropped_before, future in done:
            _resolve(future, dropped == dropped_before)

    def _tidy(self, db: Database, rows: Sequence[Row]) -> None:
        """Called in the writer's thread when a batch, perhaps an empty one, is on disk."""

    def _busy(self) -> bool:
        """Whether the writer has something better to do than to tidy up."""
        return bool(self._pending) or self._deadline is not None

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
