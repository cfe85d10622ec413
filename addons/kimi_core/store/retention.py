"""What the store lets go of, so that it does not grow for ever."""

from __future__ import annotations

from dataclasses import dataclass

from sqlite_utils import Database

from kimi_core.store.schema import immediate

IN_USE_S = 2 * 3600.0
"""A mask used so lately stays: somebody may hold that it is safe."""
KNOWN_S = 90 * 86_400.0
"""So long a conversation is known again, and what was decided on it."""
STEP_ROWS = 500
"""What one transaction removes of a table at most."""

_UNUSED_MASKS_SQL = (
    "SELECT rowid, used_at, bytes FROM masks WHERE used_at < ? ORDER BY used_at LIMIT ?"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept of what was masked."""

    age_s: float = 30 * 86_400.0
    """Since an original was last used."""
    bytes: int = 1_000_000_000
    """Of all originals, compressed."""


def prune(db: Database, now: float, limits: Limits) -> bool:
    """Remove what is too old or too much, one step of it; tell whether there is more.

    Raises sqlite3.Error.
    """
    with immediate(db):
        steps = (
            _prune_masks(db, now, limits),
            _prune_seen(db, "decisions", now - KNOWN_S),
            _prune_seen(db, "conversations", now - KNOWN_S),
        )
    return any(steps)


def _prune_masks(db: Database, now: float, limits: Limits) -> bool:
    # Only indexed columns: the table itself is as large as all originals.
    size = int(db.conn.execute("SELECT ifnull(sum(bytes), 0) FROM masks").fetchone()[0])
    excess = size - limits.bytes
    unused = db.conn.execute(_UNUSED_MASKS_SQL, (now - IN_USE_S, STEP_ROWS)).fetchall()
    gone: list[tuple[int]] = []
    for rowid, used_at, stored in unused:
        if used_at >= now - limits.age_s and excess <= 0:
            break
        gone.append((rowid,))
        excess -= stored
    db.conn.executemany("DELETE FROM masks WHERE rowid = ?", gone)
    return len(gone) == STEP_ROWS


def _prune_seen(db: Database, table: str, before: float) -> bool:
    found = db.conn.execute(
        f"DELETE FROM {table} WHERE rowid IN "
        f"(SELECT rowid FROM {table} WHERE seen_at < ? ORDER BY seen_at LIMIT {STEP_ROWS})",
        (before,),
    )
    return found.rowcount >= STEP_ROWS
