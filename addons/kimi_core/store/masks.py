"""Masks: the texts that were left out of requests, by hash, and what was decided on."""

from __future__ import annotations

import itertools
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from kimi_core.store.reading import Reading, matching
from kimi_core.store.rows import Row, Value, quoted, replace, upsert
from kimi_core.store.schema import DECISION_COLUMNS, MASK_COLUMNS, StoreError

KINDS = ("reference", "cut")
PREVIEW = 100
"""How many characters of an original stand in a list."""

_FOUND = 10
_AT_ONCE = 500  # SQLite takes 999 values in a statement, or more
Key = TypeVar("Key", str, bytes)
_KEY = ("hash", "key_hash")
_AT = {column: index for index, column in enumerate(MASK_COLUMNS)}
_HASH, _KEY_HASH, _USED_AT = _AT["hash"], _AT["key_hash"], _AT["used_at"]
_BYTES, _ORIGINAL = _AT["bytes"], _AT["original"]
_LISTED = quoted([column for column in MASK_COLUMNS if column != "original"])

_KNOWN_SQL = "SELECT 1 FROM masks WHERE hash = ? AND key_hash = ?"
_USE_SQL = "UPDATE masks SET used_at = max(used_at, ?) WHERE hash = ? AND key_hash = ?"
_MASK_SQL = upsert("masks", MASK_COLUMNS, _KEY, ["used_at = excluded.used_at"])
_DECISION_SQL = replace("decisions", DECISION_COLUMNS, ("digest",))
_FORGET_SQL = "DELETE FROM decisions WHERE digest = ?"


# --- writing --------------------------------------------------------------------------


def mask_row(
    key_hash: str,
    hash: str,
    label: str,
    kinds: str,
    tokens: int,
    sent_tokens: int,
    session_id: str,
    now: float,
    original: str,
) -> Row:
    """Return a mask for the writer, which compresses the original."""
    text = original.encode("utf-8", "surrogatepass")
    return "masks", (
        hash, key_hash, label, kinds, tokens, sent_tokens, session_id, now, now, None, text,
    )  # fmt: skip


def packed(conn: sqlite3.Connection, rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows with the originals compressed that the table has not yet.

    Done before the transaction, since others wait while that lasts.
    """
    if not any(table == "masks" for table, _ in rows):
        return rows
    return [
        (table, _pack(values) if table == "masks" and not _is_known(conn, values) else values)
        for table, values in rows
    ]


def write(conn: sqlite3.Connection, rows: Iterable[tuple[Value, ...]]) -> None:
    """Write masks within a transaction; of a known one only when it was used."""
    for values in rows:
        key = values[_HASH], values[_KEY_HASH]
        if not conn.execute(_USE_SQL, (values[_USED_AT], *key)).rowcount:
            # Another process may have pruned what was there a moment ago.
            conn.execute(_MASK_SQL, values if values[_BYTES] is not None else _pack(values))


def write_decisions(conn: sqlite3.Connection, rows: Iterable[tuple[Value, ...]]) -> None:
    """Write decisions within a transaction; without a policy one is forgotten."""
    latest = {values[0]: values for values in rows}
    conn.executemany(_FORGET_SQL, [(key,) for key, (_, policy, _) in latest.items() if not policy])
    conn.executemany(_DECISION_SQL, [values for values in latest.values() if values[1]])


def _is_known(conn: sqlite3.Connection, values: tuple[Value, ...]) -> bool:
    key = values[_HASH], values[_KEY_HASH]
    return conn.execute(_KNOWN_SQL, key).fetchone() is not None


def _pack(values: tuple[Value, ...]) -> tuple[Value, ...]:
    text = values[_ORIGINAL]
    assert isinstance(text, bytes)
    small = zlib.compress(text)
    return (*values[:_BYTES], len(small), small)


# --- reading --------------------------------------------------------------------------


class MaskReader(Reading):
    """What is known of masks and decisions."""

    def mask(self, hash: str, key_hash: str | None = None) -> dict[str, Any] | None:
        """Return one mask with its `original`, or None; without `key_hash` whoever made it.

        Keys: the columns, `tags` (a list of its kinds) and `preview`, its first characters. Only
        `original` may hold halves of surrogate pairs, which UTF-8 has not.
        """
        where, values = matching({"hash": hash, "key_hash": key_hash})
        found = self._one(
            f"SELECT {_LISTED}, original FROM masks WHERE {where} ORDER BY created_at LIMIT 1",
            values,
        )
        if found is None:
            return None
        try:
            text = zlib.decompress(found.pop("original")).decode("utf-8", "surrogatepass")
        except (zlib.error, ValueError) as error:
            raise StoreError(f"{self.path}: mask {hash} cannot be read: {error}") from error
        preview = text[:PREVIEW].encode("utf-8", "replace").decode()
        return _tagged(found) | {"preview": preview, "original": text}

    def find_masks(self, prefix: str) -> list[str]:
        """Return the hashes that begin with these hex digits, ten at most."""
        digits = prefix.lower()
        # "g" comes after every hex digit: a range, where LIKE would not use the index.
        rows = self._query(
            f"SELECT DISTINCT hash FROM masks WHERE hash >= ? AND hash < ? LIMIT {_FOUND}",
            (digits, f"{digits}g"),
        )
        return [row["hash"] for row in rows]

    def masks(
        self,
        limit: int = 50,
        before: float | None = None,
        *,
        session_id: str | None = None,
        key_hash: str | None = None,
    ) -> list[dict[str, Any]]:
        """Return masks, newest first; `before` is `created_at` of the last one already had.

        Keys as in `mask`, without `original`.
        """
        where, values = matching({"session_id": session_id, "key_hash": key_hash})
        if before is not None:
            where, values = f"{where} AND created_at < ?", (*values, before)
        rows = self._query(
            f"SELECT {_LISTED}, substr(original, 1, {4 * PREVIEW}) AS start FROM masks "
            f"WHERE {where} ORDER BY created_at DESC, hash LIMIT ?",
            (*values, limit),
        )
        for row in rows:
            row["preview"] = _preview(row.pop("start"))
        return [_tagged(row) for row in rows]

    def mask_totals(self) -> dict[str, Any]:
        """Return `masks`, `tokens_saved`, `bytes`, and `by_kind`: tokens saved by each kind.

        Each original counts once, however often it was left out; one of both kinds counts under
        "cut reference". `bytes` are compressed ones.
        """
        by_kind = dict.fromkeys(KINDS, 0)
        count = 0
        for row in self._query(
            "SELECT kinds, count(*) AS count, sum(tokens - sent_tokens) AS saved "
            "FROM masks GROUP BY kinds"
        ):
            by_kind[row["kinds"]] = row["saved"] or 0
            count += row["count"]
        (size,) = self._query("SELECT ifnull(sum(bytes), 0) AS bytes FROM masks")
        saved = sum(by_kind.values())
        return {"masks": count, "tokens_saved": saved, "by_kind": by_kind, **size}

    def kept(self, key_hash: str, hashes: Iterable[str]) -> set[str]:
        """Return which of these originals are on disk."""
        return {
            row["hash"]
            for some in _batched(hashes)
            for row in self._query(
                f"SELECT hash FROM masks WHERE key_hash = ? AND hash IN ({_marks(some)})",
                (key_hash, *some),
            )
        }

    def decisions_of(self, digests: Iterable[bytes]) -> dict[bytes, str]:
        """Return the policies by which these conversations are masked, as far as any is known."""
        return {
            bytes(row["digest"]): row["policy"]
            for some in _batched(digests)
            for row in self._query(
                f"SELECT digest, policy FROM decisions WHERE digest IN ({_marks(some)})", some
            )
        }

    def decisions(self, limit: int) -> list[dict[str, Any]]:
        """Return digest, policy and seen_at of decisions, newest first."""
        return self._query(
            f"SELECT {quoted(DECISION_COLUMNS)} FROM decisions ORDER BY seen_at DESC LIMIT ?",
            (limit,),
        )


def _batched(values: Iterable[Key]) -> Iterator[tuple[Key, ...]]:
    """Yield the values in tuples that a statement can take."""
    rest = iter(values)
    while some := tuple(itertools.islice(rest, _AT_ONCE)):
        yield some


def _marks(values: Sequence[object]) -> str:
    """Return a question mark for each value."""
    return ", ".join("?" * len(values))


def _tagged(row: dict[str, Any]) -> dict[str, Any]:
    row["tags"] = (row["kinds"] or "").split()
    return row


def _preview(start: bytes) -> str:
    """Return the first characters of an original, of which only the first bytes are here."""
    try:
        text = zlib.decompressobj().decompress(start, 4 * PREVIEW)
    except zlib.error:
        return ""
    return text.decode("utf-8", "replace")[:PREVIEW].rstrip("\ufffd")
