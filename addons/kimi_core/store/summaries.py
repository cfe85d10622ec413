"""Summaries: what stands for the beginning of a conversation, by the hash of that."""

from __future__ import annotations

from typing import Any

from kimi_core.store.reading import Reading, matching
from kimi_core.store.rows import quoted, replace
from kimi_core.store.schema import SUMMARY_COLUMNS

SQL = {
    "summaries": replace("summaries", SUMMARY_COLUMNS, ("id",)),
    "summary uses": "UPDATE summaries SET used_at = ?, applied = applied + 1 WHERE id = ?",
    "summary revocations": "UPDATE summaries SET revoked_at = ? WHERE id = ?",
}
"""What the writer can be asked to do."""


class SummaryReader(Reading):
    """What is known of summaries."""

    def summaries(
        self, session_id: str | None = None, include_revoked: bool = True
    ) -> list[dict[str, Any]]:
        """Return summaries, newest first."""
        where, values = matching({"session_id": session_id})
        if not include_revoked:
            where += " AND revoked_at IS NULL"
        return self._query(
            f"SELECT {quoted(SUMMARY_COLUMNS)} FROM summaries WHERE {where} "
            "ORDER BY created_at DESC, id",
            values,
        )

    def summary(self, summary_id: str) -> dict[str, Any] | None:
        """Return one summary, or None."""
        return self._one(
            f"SELECT {quoted(SUMMARY_COLUMNS)} FROM summaries WHERE id = ?", (summary_id,)
        )
