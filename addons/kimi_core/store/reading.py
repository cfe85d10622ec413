"""How a question reaches the store: on a connection of its own, and what it raises."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from kimi_core.store.schema import StoreError, connect, widen

READ_TIMEOUT_S = 0.25


class Reading:
    """Rows of the database at `path`, as dicts.

    Each question opens and closes its own connection, so any thread may ask and nothing is held
    between calls. StoreError is raised when the database cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()

    def _query(self, sql: str, values: Sequence[object] = ()) -> list[dict[str, Any]]:
        return list(self._stream(sql, values))

    def _one(self, sql: str, values: Sequence[object] = ()) -> dict[str, Any] | None:
        return next(iter(self._query(sql, values)), None)

    def _stream(self, sql: str, values: Sequence[object]) -> Iterator[dict[str, Any]]:
        # Not a generator itself, so that a database that cannot be read fails at the call, before
        # the caller has sent a header.
        with self._errors():
            db = connect(self.path, timeout_s=READ_TIMEOUT_S, read_only=True)
            try:
                widen(db)
                rows = db.query(sql, values)
            except BaseException:
                db.close()
                raise
        return self._rows(db, rows)

    def _rows(self, db: Database, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        try:
            with self._errors():
                yield from rows
        finally:
            db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error


def matching(filters: Mapping[str, object]) -> tuple[str, tuple[object, ...]]:
    """Return a condition and its values: each column has its value, None asks nothing of it."""
    wanted = {column: value for column, value in filters.items() if value is not None}
    return " AND ".join(["1", *(f"{column} = ?" for column in wanted)]), tuple(wanted.values())
