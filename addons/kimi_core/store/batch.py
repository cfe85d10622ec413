"""What one transaction of the store's writer does with the rows that were queued."""

from __future__ import annotations

import logging
import operator
import sqlite3
from collections.abc import Sequence

from sqlite_utils import Database

from kimi_core.store import masks, summaries
from kimi_core.store.rows import Row, Value, replace, upsert
from kimi_core.store.schema import (
    ATTEMPT_COLUMNS,
    CONVERSATION_COLUMNS,
    EXCHANGE_COLUMNS,
    SESSION_COLUMNS,
    immediate,
)

logger = logging.getLogger(__name__)

_COUNTED = ("exchanges", "input_tokens", "output_tokens", "saved_tokens")
_MONEY = ("cost_usd", "saved_usd", "lost_usd", "spent_usd")

# What one value that cannot be stored raises. IntegrityError: null where it must not be;
# ProgrammingError and InterfaceError: a type that SQLite has not; TypeError: an unhashable id.
_BAD_VALUE = (
    sqlite3.IntegrityError,
    sqlite3.ProgrammingError,
    sqlite3.InterfaceError,
    sqlite3.DataError,
    OverflowError,
    TypeError,
    UnicodeEncodeError,
)


_EXCHANGE_SQL = replace("exchanges", EXCHANGE_COLUMNS, ("id",))
_ATTEMPT_SQL = replace("attempts", ATTEMPT_COLUMNS, ("exchange_id", "number"))
_CONVERSATION_SQL = replace("conversations", CONVERSATION_COLUMNS, ("digest",))
_SESSION_SQL = upsert(
    "sessions",
    SESSION_COLUMNS,
    ("id",),
    [
        "created_at = min(created_at, excluded.created_at)",
        "last_seen_at = max(last_seen_at, excluded.last_seen_at)",
        # The gauge's two numbers belong to one exchange: an unknown window is not the old one.
        "context_window = CASE WHEN excluded.context_tokens IS NULL "
        "THEN context_window ELSE excluded.context_window END",
        "context_tokens = ifnull(excluded.context_tokens, context_tokens)",
        *(
            f"{column} = ifnull(excluded.{column}, {column})"
            for column in ("name", "key_hash", "project", "client", "provider", "model", "source")
        ),
        *(f"{column} = {column} + excluded.{column}" for column in _COUNTED),
        # Null until a price is known: 0 would say that it cost nothing.
        *(
            f"{column} = CASE WHEN excluded.{column} IS NULL THEN {column} "
            f"ELSE ifnull({column}, 0) + excluded.{column} END"
            for column in _MONEY
        ),
    ],
)
_AT = {column: index for index, column in enumerate(EXCHANGE_COLUMNS)}
_ID, _SESSION = _AT["id"], _AT["session_id"]
_FOR_SESSION = operator.itemgetter(
    *(
        _AT[column]
        for column in (
            "session_id",
            "started_at",
            "ended_at",
            "key_hash",
            "project",
            "client",
            "gen_ai.operation.name",
            "kind",
            "gen_ai.provider.name",
            "gen_ai.request.model",
            "gen_ai.response.model",
            "context_window",
            "gen_ai.usage.input_tokens",
            "gen_ai.usage.output_tokens",
            "cost_usd",
            "saved_tokens",
            "saved_usd",
            "lost_usd",
            "spent_usd",
        )
    )
)
_OLD_SQL = (
    'SELECT session_id, "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", saved_tokens, '
    "cost_usd, saved_usd, lost_usd, spent_usd FROM exchanges "
    "WHERE session_id IS NOT NULL AND id IN ({})"
)
_LAST_PROMPT_SQL = (
    "SELECT input_tokens FROM attempts WHERE exchange_id = ? AND input_tokens IS NOT NULL "
    "ORDER BY number DESC LIMIT 1"
)
_UNCOUNT_SQL = (
    "UPDATE sessions SET exchanges = exchanges - 1, "
    "input_tokens = input_tokens - ifnull(?2, 0), "
    "output_tokens = output_tokens - ifnull(?3, 0), "
    "saved_tokens = saved_tokens - ifnull(?4, 0), "
    "cost_usd = cost_usd - ifnull(?5, 0), saved_usd = saved_usd - ifnull(?6, 0), "
    "lost_usd = lost_usd - ifnull(?7, 0), spent_usd = spent_usd - ifnull(?8, 0) WHERE id = ?1"
)


def write(db: Database, rows: Sequence[Row]) -> int:
    """Commit the rows in one transaction and return how many had to be left out.

    A value that SQLite cannot hold becomes null, with a warning, and costs no other row anything;
    a row is left out only when it is useless without that value. A row with a known key replaces
    the old one, and its session's totals follow, so that writing a row twice is harmless.
    Raises sqlite3.Error when the database cannot be written; then nothing is.
    """
    try:
        rows = masks.packed(db.conn, rows)
        with immediate(db):
            _apply(db, rows)
    except _BAD_VALUE:
        return _write_one_by_one(db, rows)
    return 0


def _write_one_by_one(db: Database, rows: Sequence[Row]) -> int:
    left_out = 0
    with immediate(db):
        for table, values in rows:
            row = (table, tuple(_storable(table, value) for value in values))
            try:
                with db.atomic():
                    _apply(db, [row])
            except _BAD_VALUE as error:
                left_out += 1
                logger.warning("store: a row of %s was left out: %s", table, error)
    return left_out


def _storable(table: str, value: object) -> Value:
    if isinstance(value, str):
        # A client may send half a surrogate pair as \ud800 in its JSON.
        return value.encode("utf-8", "backslashreplace").decode()
    if value is None or isinstance(value, (bytes, float)):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    logger.warning("store: a %s cannot be stored in %s", type(value).__name__, table)
    return None


def _apply(db: Database, rows: Sequence[Row]) -> None:
    conn = db.conn
    tables: dict[str, list[tuple[Value, ...]]] = {}
    for table, values in rows:
        tables.setdefault(table, []).append(values)
    if "attempts" in tables:  # the gauge of their exchange is read from them
        conn.executemany(_ATTEMPT_SQL, tables["attempts"])
    sessions = tables.get("sessions", [])
    if "exchanges" in tables:
        sessions = sessions + _write_exchanges(conn, tables["exchanges"])
    conn.executemany(_SESSION_SQL, sessions)
    if "conversations" in tables:
        conn.executemany(_CONVERSATION_SQL, tables["conversations"])
    if "masks" in tables:
        masks.write(conn, tables["masks"])
    if "decisions" in tables:
        masks.write_decisions(conn, tables["decisions"])
    if not tables.keys().isdisjoint(summaries.SQL):
        # What becomes of a summary depends on what was done to it before.
        for table, values in rows:
            if table in summaries.SQL:
                conn.execute(summaries.SQL[table], values)


def _write_exchanges(
    conn: sqlite3.Connection, rows: Sequence[tuple[Value, ...]]
) -> list[tuple[Value, ...]]:
    """Write the exchanges, and return what they add to their sessions."""
    exchanges = {values[_ID]: values for values in rows}
    ids = list(exchanges)
    old = conn.execute(_OLD_SQL.format(",".join("?" * len(ids))), ids).fetchall()
    conn.executemany(_UNCOUNT_SQL, old)
    conn.executemany(_EXCHANGE_SQL, list(exchanges.values()))
    return [
        _session_of(values, _last_prompt(conn, values))
        for values in exchanges.values()
        if values[_SESSION] is not None
    ]


def _last_prompt(conn: sqlite3.Connection, values: tuple[Value, ...]) -> Value:
    """Return the tokens of an exchange's last prompt that was answered: of one, not of all."""
    attempts = values[_AT["attempts"]]
    if isinstance(attempts, int) and attempts > 1:
        found = conn.execute(_LAST_PROMPT_SQL, (values[_ID],)).fetchone()
        if found is not None:
            prompt: Value = found[0]
            return prompt
    return values[_AT["gen_ai.usage.input_tokens"]]


def _session_of(values: tuple[Value, ...], context_tokens: Value) -> tuple[Value, ...]:
    """Return what an exchange adds to its session, in the order of SESSION_COLUMNS."""
    (session_id, started_at, ended_at, key_hash, project, client, operation, kind, provider,
     asked, answered, window, input_tokens, output_tokens, cost_usd, saved_tokens, saved_usd,
     lost_usd, spent_usd,
    ) = _FOR_SESSION(values)  # fmt: skip
    model: Value = answered or asked
    # A title made by a small model, or a subagent with its own context, is not where the
    # conversation stands; neither is a question for a count.
    if kind in ("background", "subagent") or operation not in ("chat", None):
        provider = model = context_tokens = window = None
    return (
        session_id, None, started_at, started_at if ended_at is None else ended_at, key_hash,
        project, client, provider, model, None, context_tokens, window, 1, input_tokens or 0,
        output_tokens or 0, cost_usd, saved_tokens or 0, saved_usd, lost_usd, spent_usd,
    )  # fmt: skip
