"""The tables of the store, the migrations that make them, and the check that a file is ours.

`PRAGMA user_version` holds the schema's version as `major * 1000 + minor`. A migration that older
code can live with (a new table, a new column that may be null) raises the minor number; one that
would make older code write wrong rows raises the major number. `PRAGMA application_id` marks the
file, so that another program's database is never touched.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlite_utils import Database

APPLICATION_ID = int.from_bytes(b"KIMI", "big")

# What a migration created is history: never edit these, add a migration and build the tuples
# below from both.
_EXCHANGES_1_0: dict[str, type] = {
    "id": str,
    "session_id": str,
    "started_at": float,
    "ended_at": float,
    "gen_ai.operation.name": str,
    "gen_ai.provider.name": str,
    "gen_ai.request.model": str,
    "gen_ai.response.model": str,
    "gen_ai.request.stream": int,
    "gen_ai.response.finish_reason": str,
    "gen_ai.usage.input_tokens": int,
    "gen_ai.usage.output_tokens": int,
    "gen_ai.usage.cache_read.input_tokens": int,
    "gen_ai.usage.cache_creation.input_tokens": int,
    "gen_ai.usage.reasoning.output_tokens": int,
    "input_source": str,
    "output_source": str,
    "partial": int,
    "system_tokens": int,
    "tools_tokens": int,
    "user_tokens": int,
    "assistant_tokens": int,
    "tool_result_tokens": int,
    "memory_tokens": int,
    "context_window": int,
    "cost_usd": float,
    "cost_source": str,
    "saved_tokens": int,
    "saved_usd": float,
    "time_to_first_chunk_s": float,
    "duration_s": float,
    "status": int,
    "error_type": str,
    "dialect": str,
    "kind": str,
    "client": str,
    "key_hash": str,
    "project": str,
    "messages": int,
    "request_bytes": int,
    "response_bytes": int,
    "attempts": int,
}
_ATTEMPTS_1_0: dict[str, type] = {
    "exchange_id": str,
    "number": int,
    "provider": str,
    "model": str,
    "started_at": float,
    "duration_s": float,
    "status": int,
    "error_type": str,
    "input_tokens": int,
    "output_tokens": int,
    "cost_usd": float,
}
_SESSIONS_1_0: dict[str, type] = {
    "id": str,
    "name": str,
    "created_at": float,
    "last_seen_at": float,
    "key_hash": str,
    "project": str,
    "client": str,
    "provider": str,
    "model": str,
    "source": str,
    "context_tokens": int,
    "context_window": int,
    "exchanges": int,
    "input_tokens": int,
    "output_tokens": int,
    "cost_usd": float,
    "saved_tokens": int,
    "saved_usd": float,
}
_CONVERSATIONS_1_0: dict[str, type] = {
    "digest": bytes,
    "session_id": str,
    "key_hash": str,
    "seen_at": float,
}
_EXCHANGES_1_1: dict[str, type] = {"mended": int}
_ATTEMPTS_1_1: dict[str, type] = {
    "rejected": str,
    "gen_ai.response.finish_reason": str,
    "gen_ai.usage.cache_read.input_tokens": int,
}

_EXCHANGES_1_2: dict[str, type] = {
    "gross_saved_usd": float,
    "lost_usd": float,
    "spent_usd": float,
    "masked_tokens": int,
    "compressed_tokens": int,
    "masks": int,
    "recalls": int,
    "cache_break": int,
    "cache_break_by": str,
    "summary_id": str,
}
_SESSIONS_1_2: dict[str, type] = {"lost_usd": float, "spent_usd": float}
_MASKS_1_2: dict[str, type] = {
    "hash": str,
    "key_hash": str,
    "label": str,
    "kinds": str,
    "tokens": int,
    "sent_tokens": int,
    "session_id": str,
    "created_at": float,
    "used_at": float,
    "bytes": int,
    # The last one: SQLite reads a row from its start, and most questions are not for this.
    "original": bytes,
}
_DECISIONS_1_2: dict[str, type] = {"digest": bytes, "policy": str, "seen_at": float}
_SUMMARIES_1_2: dict[str, type] = {
    "id": str,
    "key_hash": str,
    "session_id": str,
    "messages": int,
    "text": str,
    "model": str,
    "source": str,
    "provider": str,
    "input_tokens": int,
    "output_tokens": int,
    "cost_usd": float,
    "tokens_before": int,
    "tokens_after": int,
    "messages_before": int,
    "messages_after": int,
    "created_at": float,
    "used_at": float,
    "applied": int,
    "revoked_at": float,
}

EXCHANGE_COLUMNS: tuple[str, ...] = (*_EXCHANGES_1_0, *_EXCHANGES_1_1, *_EXCHANGES_1_2)
ATTEMPT_COLUMNS: tuple[str, ...] = (*_ATTEMPTS_1_0, *_ATTEMPTS_1_1)
SESSION_COLUMNS: tuple[str, ...] = (*_SESSIONS_1_0, *_SESSIONS_1_2)
CONVERSATION_COLUMNS: tuple[str, ...] = tuple(_CONVERSATIONS_1_0)
MASK_COLUMNS: tuple[str, ...] = tuple(_MASKS_1_2)
DECISION_COLUMNS: tuple[str, ...] = tuple(_DECISIONS_1_2)
SUMMARY_COLUMNS: tuple[str, ...] = tuple(_SUMMARIES_1_2)
TABLES: Mapping[str, tuple[str, ...]] = {
    "exchanges": EXCHANGE_COLUMNS,
    "attempts": ATTEMPT_COLUMNS,
    "sessions": SESSION_COLUMNS,
    "conversations": CONVERSATION_COLUMNS,
    "masks": MASK_COLUMNS,
    "decisions": DECISION_COLUMNS,
    "summaries": SUMMARY_COLUMNS,
}


class StoreError(Exception):
    """The store cannot be used; the text says which file, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema, forward only; `apply` runs inside a transaction."""

    major: int
    minor: int
    apply: Callable[[Database], None]

    @property
    def version(self) -> int:
        return self.major * 1000 + self.minor


def _first_tables(db: Database) -> None:
    db.table("exchanges").create(
        _EXCHANGES_1_0, pk="id", not_null={"id", "started_at"}
    ).create_index(["started_at", "id"]).create_index(["session_id", "started_at", "id"])
    db.table("attempts").create(_ATTEMPTS_1_0, pk=("exchange_id", "number"))
    db.table("sessions").create(
        _SESSIONS_1_0,
        pk="id",
        not_null={"id", "created_at", "last_seen_at"},
        defaults={"exchanges": 0, "input_tokens": 0, "output_tokens": 0, "saved_tokens": 0},
    ).create_index(["last_seen_at", "id"])
    db.table("conversations").create(
        _CONVERSATIONS_1_0, pk="digest", not_null={"digest", "session_id", "seen_at"}
    ).create_index(["seen_at"])


def _mends_and_attempts(db: Database) -> None:
    _add_columns(db, "exchanges", _EXCHANGES_1_1)
    _add_columns(db, "attempts", _ATTEMPTS_1_1)


def _savings(db: Database) -> None:
    _add_columns(db, "exchanges", _EXCHANGES_1_2)
    _add_columns(db, "sessions", _SESSIONS_1_2)
    # A mask belongs to the key that made it; people name it by its hash alone, so that is first.
    # The sums and the oldest are then read from an index: the table is as large as its originals.
    masks = db.table("masks").create(
        _MASKS_1_2,
        pk=("hash", "key_hash"),
        not_null={"hash", "key_hash", "original", "bytes", "created_at", "used_at"},
    )
    masks.create_index(["used_at", "bytes"])
    masks.create_index(["kinds", "tokens", "sent_tokens"])
    masks.create_index(["created_at"])
    masks.create_index(["session_id", "created_at"])
    db.table("decisions").create(
        _DECISIONS_1_2, pk="digest", not_null={"digest", "policy", "seen_at"}
    ).create_index(["seen_at"])
    db.table("summaries").create(
        _SUMMARIES_1_2,
        pk="id",
        not_null={"id", "text", "created_at"},
        defaults={"applied": 0},
    ).create_index(["session_id", "created_at"]).create_index(["created_at"])


def _add_columns(db: Database, table: str, columns: Mapping[str, type]) -> None:
    for name, kind in columns.items():
        db.table(table).add_column(name, kind)


MIGRATIONS: tuple[Migration, ...] = (
    Migration(1, 0, _first_tables),
    Migration(1, 1, _mends_and_attempts),
    Migration(1, 2, _savings),
)


def check(db: Database, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Return when this code may read and write the database; only reads.

    Raises StoreError for another program's database, and for one whose major version is newer.
    """
    application_id, version = _pragma(db, "application_id"), _pragma(db, "user_version")
    if (application_id, version) == (0, 0) and not db.table_names():
        return
    if application_id != APPLICATION_ID:
        raise StoreError(
            "is the database of another program; it is left as it is, name another file"
        )
    newest = migrations[-1]
    if version // 1000 > newest.major:
        raise StoreError(
            f"has schema {version // 1000}.{version % 1000}, made by a newer kimi-proxy; "
            f"this one knows {newest.major}.{newest.minor}: update it or name another file"
        )


def migrate(db: Database, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring the database to the newest schema; all steps or, when one fails, none.

    Raises StoreError as `check` does, sqlite3.Error when the database cannot be written.
    """
    if _pragma(db, "user_version") >= migrations[-1].version:
        check(db, migrations)
        return
    with immediate(db):
        # Another process may have migrated while this one waited for the lock.
        check(db, migrations)
        version = _pragma(db, "user_version")
        for migration in migrations:
            if migration.version > version:
                migration.apply(db)
                db.execute(f"PRAGMA user_version = {migration.version}")
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")


@contextmanager
def immediate(db: Database) -> Iterator[None]:
    """A transaction that takes the write lock at once.

    A deferred one that has read and then writes fails without waiting when somebody else has
    written in between: SQLITE_BUSY_SNAPSHOT, https://www.sqlite.org/rescode.html#busy_snapshot
    """
    db.conn.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.conn.execute("COMMIT")
    except BaseException:
        # SQLITE_FULL and its like may have rolled back already.
        if db.conn.in_transaction:
            db.conn.execute("ROLLBACK")
        raise


def connect(path: Path, *, timeout_s: float, read_only: bool = False) -> Database:
    """Return a new connection in autocommit mode.

    A read-only one may move between threads, and creates no file. Raises sqlite3.Error.
    """
    conn = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
        uri=True,
        timeout=timeout_s,
        isolation_level=None,
        check_same_thread=not read_only,
    )
    db = Database(conn, recursive_triggers=False, execute_plugins=False)
    if read_only:
        db.execute("PRAGMA query_only = on")
    return db


def widen(db: Database) -> None:
    """Let a file that nobody has migrated yet be read as if it were: what it lacks is null.

    Without this a quoted column that is not there would be read as a text, its own name.
    -- https://www.sqlite.org/quirks.html#double_quoted_string_literals_are_accepted
    """
    version = _pragma(db, "user_version")
    if version >= MIGRATIONS[-1].version:
        return
    db.execute("PRAGMA query_only = off")
    for table, columns in TABLES.items():
        have = {row[1] for row in db.execute(f"PRAGMA table_info({table})").fetchall()}
        lacking = [f'NULL AS "{column}"' for column in columns if column not in have]
        if lacking and (have or version):
            # A temporary view belongs to the connection, and its name goes before the table's.
            those = f"*, {', '.join(lacking)} FROM main.{table}" if have else ", ".join(lacking)
            db.execute(f"CREATE TEMP VIEW {table} AS SELECT {those}{'' if have else ' WHERE 0'}")
    db.execute("PRAGMA query_only = on")


def _pragma(db: Database, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])
