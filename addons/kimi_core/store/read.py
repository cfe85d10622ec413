"""Questions to the store, answered from any thread on connections of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kimi_core.store.masks import MaskReader
from kimi_core.store.reading import matching
from kimi_core.store.rows import quoted
from kimi_core.store.schema import (
    ATTEMPT_COLUMNS,
    CONVERSATION_COLUMNS,
    EXCHANGE_COLUMNS,
    SESSION_COLUMNS,
)
from kimi_core.store.summaries import SummaryReader

_MODEL = 'coalesce("gen_ai.response.model", "gen_ai.request.model")'
# Rows of an older schema, or of a proxy without Counter, say nothing of savings at all.
_IN_LEDGER = (
    "masks IS NOT NULL "
    'AND coalesce("gen_ai.usage.input_tokens", gross_saved_usd, spent_usd) IS NOT NULL'
)
# Key in `totals` -> SQL. Null, not 0, where no row says anything; a number of rows is never null.
_SUMS = {
    "requests": "count(*)",
    "errors": "sum(error_type IS NOT NULL OR ifnull(status, 0) >= 400)",
    "partial": "sum(ifnull(partial, 0))",
    "mended": "sum(ifnull(mended, 0) > 0)",
    "unpriced": 'sum(cost_usd IS NULL AND "gen_ai.usage.output_tokens" IS NOT NULL)',
    "input_tokens": 'sum("gen_ai.usage.input_tokens")',
    "output_tokens": 'sum("gen_ai.usage.output_tokens")',
    "cache_read_tokens": 'sum("gen_ai.usage.cache_read.input_tokens")',
    "cache_write_tokens": 'sum("gen_ai.usage.cache_creation.input_tokens")',
    "reasoning_tokens": 'sum("gen_ai.usage.reasoning.output_tokens")',
    "cost_usd": "sum(cost_usd)",
    "saved_tokens": "sum(saved_tokens)",
    "masked_tokens": "sum(masked_tokens)",
    "compressed_tokens": "sum(compressed_tokens)",
    "saved_usd": "sum(saved_usd)",
    "gross_saved_usd": "sum(gross_saved_usd)",
    "lost_usd": "sum(lost_usd)",
    "spent_usd": "sum(spent_usd)",
    "unpriced_savings": f"sum(gross_saved_usd IS NULL AND {_IN_LEDGER})",
    "unpriced_spendings": f"sum(spent_usd IS NULL AND {_IN_LEDGER})",
    "recalls": "sum(recalls)",
    "cache_breaks": "sum(cache_break IS NOT NULL)",
}
_COUNTS = (
    "requests",
    "errors",
    "partial",
    "mended",
    "unpriced",
    "unpriced_savings",
    "unpriced_spendings",
    "cache_breaks",
)


class StoreReader(MaskReader, SummaryReader):
    """Read access to the database at `path`, whoever writes it.

    Every method opens and closes its own connection, so any thread may call it and nothing is held
    between calls; all raise StoreError when the database cannot be read. They block for
    milliseconds: call them off the event loop.
    """

    def sessions(
        self,
        limit: int = 50,
        before: tuple[float, str] | None = None,
        *,
        project: str | None = None,
        key_hash: str | None = None,
    ) -> list[dict[str, Any]]:
        """Return sessions, last used first; `before`: last_seen_at and id of the last one had."""
        where, values = matching({"project": project, "key_hash": key_hash})
        if before is not None:
            where, values = f"{where} AND (last_seen_at, id) < (?, ?)", (*values, *before)
        return self._query(
            f"SELECT {quoted(SESSION_COLUMNS)} FROM sessions WHERE {where} "
            "ORDER BY last_seen_at DESC, id DESC LIMIT ?",
            (*values, limit),
        )

    def session(self, session_id: str) -> dict[str, Any] | None:
        """Return one session, or None."""
        sql = f"SELECT {quoted(SESSION_COLUMNS)} FROM sessions WHERE id = ?"
        return self._one(sql, (session_id,))

    def active_session(self) -> dict[str, Any] | None:
        """Return the session used last of which a request was sent, or begins just now."""
        # A request that was refused may have been of no conversation that anybody has.
        found = self._query(
            f"SELECT {quoted(SESSION_COLUMNS)} FROM sessions WHERE sessions.exchanges = 0 "
            "OR EXISTS (SELECT 1 FROM exchanges WHERE exchanges.session_id = sessions.id "
            "AND ifnull(attempts, 1) > 0) ORDER BY last_seen_at DESC, id DESC LIMIT 1"
        )
        return found[0] if found else None

    def exchanges(
        self, limit: int = 50, before: str | None = None, session_id: str | None = None
    ) -> list[dict[str, Any]]:
        """Return exchanges, newest first; `before` is the id of the last one already had."""
        where, values = matching({"session_id": session_id})
        if before is not None:
            where += " AND (started_at, id) < (SELECT started_at, id FROM exchanges WHERE id = ?)"
            values = (*values, before)
        return self._query(
            f"SELECT {quoted(EXCHANGE_COLUMNS)} FROM exchanges WHERE {where} "
            "ORDER BY started_at DESC, id DESC LIMIT ?",
            (*values, limit),
        )

    def attempts(self, exchange_id: str) -> list[dict[str, Any]]:
        """Return the upstream requests of one exchange, in their order."""
        return self._query(
            f"SELECT {quoted(ATTEMPT_COLUMNS)} FROM attempts WHERE exchange_id = ? ORDER BY number",
            (exchange_id,),
        )

    def totals(
        self,
        since: float | None = None,
        session_id: str | None = None,
    ) -> dict[str, Any]:
        """Return sums over the exchanges that started at or after `since` (Unix seconds).

        Keys: those of `_SUMS`, and `by_provider`, `by_model` and `by_day` (local date, ISO), each a
        dict of name -> the same sums. A sum is None where no exchange had the number; `unpriced`
        says how many requests with tokens are missing from `cost_usd`, `mended` in how many
        replies something was mended. `saved_usd` is net: `gross_saved_usd` without `lost_usd` and
        `spent_usd`. `unpriced_savings` says how many requests are missing from `gross_saved_usd`
        and `lost_usd`, `unpriced_spendings` how many from `spent_usd`.
        """
        where, values = matching({"session_id": session_id})
        if since is not None:
            where, values = f"{where} AND started_at >= ?", (*values, since)
        groups = self._query(
            f"SELECT ifnull(\"gen_ai.provider.name\", '') AS provider, "
            f"ifnull({_MODEL}, '') AS model, "
            "date(started_at, 'unixepoch', 'localtime') AS day, "
            + ", ".join(f"{sql} AS {name}" for name, sql in _SUMS.items())
            + f" FROM exchanges WHERE {where} GROUP BY 1, 2, 3",
            values,
        )
        totals: dict[str, Any] = _no_sums()
        by: dict[str, dict[str, dict[str, Any]]] = {"provider": {}, "model": {}, "day": {}}
        for group in groups:
            _add(totals, group)
            for kind, named in by.items():
                _add(named.setdefault(str(group[kind]), _no_sums()), group)
        return totals | {f"by_{kind}": dict(sorted(named.items())) for kind, named in by.items()}

    def export(self, session_id: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield exchanges, oldest first, keys in the order of EXCHANGE_COLUMNS.

        The rows are those of the moment of the call, read as they are asked for.
        """
        where, values = matching({"session_id": session_id})
        return self._stream(
            f"SELECT {quoted(EXCHANGE_COLUMNS)} FROM exchanges WHERE {where} "
            "ORDER BY started_at, id",
            values,
        )

    def conversations(self, limit: int) -> Iterator[dict[str, Any]]:
        """Yield digest, session_id, key_hash and seen_at of known conversations, newest first."""
        return self._stream(
            f"SELECT {quoted(CONVERSATION_COLUMNS)} FROM conversations "
            "ORDER BY seen_at DESC LIMIT ?",
            (limit,),
        )

    def known_models(self) -> list[dict[str, Any]]:
        """Return provider, model, requests and last_seen_at of all that was used, newest first."""
        return self._query(
            f'SELECT "gen_ai.provider.name" AS provider, {_MODEL} AS model, '
            "count(*) AS requests, max(started_at) AS last_seen_at FROM exchanges "
            f"WHERE {_MODEL} IS NOT NULL GROUP BY 1, 2 ORDER BY last_seen_at DESC"
        )


def _no_sums() -> dict[str, Any]:
    return dict.fromkeys(_SUMS) | dict.fromkeys(_COUNTS, 0)


def _add(sums: dict[str, Any], group: dict[str, Any]) -> None:
    for name in _SUMS:
        if group[name] is not None:
            sums[name] = (sums[name] or 0) + group[name]
