"""How the proxy is: for monitors, for the page, and as events while it changes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from time import time
from typing import Any

from tornado.iostream import StreamClosedError

from kimi_core.report import gauge
from kimi_core.store import StoreError
from kimi_core.web.handler import Api, Handler

KEEPALIVE_S = 15.0
ACTIVE_S = 300.0  # a session that was used within this time is not idle


class Health(Api):
    """For a monitor, which has no token: states and counts, nothing that names anybody."""

    needs_token = False

    async def get(self) -> None:
        store = self.site.store
        # The rest of the state may name files.
        state = store.state.partition(":")[0]
        live = self.site.proxy.live()
        try:
            session = _session_state(await asyncio.to_thread(store.active_session), live)
        except StoreError:
            session = {"state": "unknown", "percentage": None, "color": None}
        self.answer(
            {
                "status": "ok" if state == "ok" and not store.dropped else "degraded",
                "version": self.site.version,
                "live_exchanges": live,
                "session": session,
                "store": {"state": state, "dropped": store.dropped},
                "log_watcher": None,
                "rate_limit": None,
            }
        )


def _session_state(newest: Mapping[str, Any] | None, live: int) -> dict[str, Any]:
    if newest is None:
        return {"state": "none", "percentage": None, "color": None}
    used = gauge(newest)
    active = live or time() - newest["last_seen_at"] < ACTIVE_S
    return {
        "state": "active" if active else "idle",
        "percentage": used["percentage"],
        "color": used["color"],
    }


class Status(Api):
    """What the page needs to know of the proxy it belongs to."""

    async def get(self) -> None:
        proxy = self.site.proxy
        self.answer(
            {
                "version": self.site.version,
                "listening": [{"host": host, "port": port} for host, port in proxy.addresses()],
                "confdir": proxy.confdir,
                "store": {
                    "path": str(self.site.store.path),
                    "state": self.site.store.state,
                    "dropped": self.site.store.dropped,
                },
                "listeners": self.site.listeners,
            }
        )


class Events(Handler):
    """Server-sent events: `change` whenever the page has something new to show."""

    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        with self.site.listening() as changed:
            self._changed = changed
            try:
                self.write("retry: 2000\n\n")
                await self.flush()
                while not self._gone:
                    self.write(await self._next(changed))
                    await self.flush()
            except StreamClosedError:
                return

    _changed: asyncio.Event | None = None
    _gone = False

    async def _next(self, changed: asyncio.Event) -> str:
        try:
            async with asyncio.timeout(KEEPALIVE_S):
                await changed.wait()
        except TimeoutError:
            return ":\n\n"
        changed.clear()
        return "event: change\ndata: {}\n\n"

    def on_connection_close(self) -> None:
        self._gone = True
        if self._changed is not None:
            self._changed.set()
