"""What a row is on its way to the writer, and the SQL that writes one."""

from __future__ import annotations

from collections.abc import Sequence

Value = str | bytes | int | float | None
Row = tuple[str, tuple[Value, ...]]
"""Which table, and the values in the order of its columns; or what is to be done, and with what."""


def quoted(columns: Sequence[str]) -> str:
    """Return the columns as SQL."""
    return ", ".join(f'"{column}"' for column in columns)


def upsert(table: str, columns: Sequence[str], key: Sequence[str], updates: Sequence[str]) -> str:
    """Return the SQL that inserts a row, or changes the one with its key."""
    marks = ", ".join("?" * len(columns))
    return (
        f"INSERT INTO {table} ({quoted(columns)}) VALUES ({marks}) "
        f"ON CONFLICT ({quoted(key)}) DO UPDATE SET {', '.join(updates)}"
    )


def replace(table: str, columns: Sequence[str], key: Sequence[str]) -> str:
    """Return the SQL that inserts a row, or puts it in the place of the one with its key."""
    updates = [f'"{column}" = excluded."{column}"' for column in columns if column not in key]
    return upsert(table, columns, key, updates)
