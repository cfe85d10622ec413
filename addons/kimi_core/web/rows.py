"""The store's sessions and exchanges, and their sums."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from kimi_core.api import ApiError
from kimi_core.report import gauge
from kimi_core.web.handler import Api

SUMS_BY = ("by_provider", "by_model", "by_day")


class Sessions(Api):
    async def get(self) -> None:
        limit, last = self.limit(), self.argument("before")
        before = None
        if last is not None:
            found = await self.read(self.site.store.session, last)
            if found is None:
                raise ApiError(400, "before must be the id of a session", before=last)
            before = (found["last_seen_at"], last)
        rows = await self.read(
            self.site.store.sessions, limit, before, project=self.argument("project")
        )
        self.answer(
            {
                "sessions": [_with_gauge(row) for row in rows],
                "next": rows[-1]["id"] if len(rows) == limit else None,
            }
        )


class ActiveSession(Api):
    async def get(self) -> None:
        row = await self.read(self.site.store.active_session)
        self.answer({"session": _with_gauge(row) if row else None})


class Session(Api):
    async def get(self, session_id: str) -> None:
        row = await self.read(self.site.store.session, session_id)
        if row is None:
            raise ApiError(404, "there is no such session", id=session_id)
        self.answer({"session": _with_gauge(row)})


class Exchanges(Api):
    async def get(self) -> None:
        limit = self.limit()
        rows = await self.read(
            self.site.store.exchanges, limit, self.argument("before"), self.argument("session")
        )
        self.answer({"exchanges": rows, "next": rows[-1]["id"] if len(rows) == limit else None})


class Totals(Api):
    """Sums of today, by provider too, and of always; `?period=today` spares the longer sum."""

    async def get(self) -> None:
        session, period = self.argument("session"), self.argument("period") or "all"
        if period not in ("all", "today"):
            raise ApiError(400, "period must be all or today", period=period)
        midnight = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
        today = await self.read(self.site.store.totals, midnight, session)
        answer: dict[str, Any] = {
            "today": _without_groups(today) | {"by_provider": today["by_provider"]}
        }
        if period == "all":
            always = await self.read(self.site.store.totals, None, session)
            answer |= {"all": _without_groups(always)} | {by: always[by] for by in SUMS_BY}
        self.answer(answer)


def _with_gauge(session: Mapping[str, Any]) -> dict[str, Any]:
    return {**session, "gauge": gauge(session)}


def _without_groups(totals: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in totals.items() if name not in SUMS_BY}
