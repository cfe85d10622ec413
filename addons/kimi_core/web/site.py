"""The server of the stats page: where it listens, and whom it wakes when there is news."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tornado import web
from tornado.httpserver import HTTPServer

from kimi_core.rules import Rules
from kimi_core.store import Store
from kimi_core.web.exports import Export
from kimi_core.web.handler import Handler
from kimi_core.web.models import AllModels, Models, Providers
from kimi_core.web.mounted import Mounted
from kimi_core.web.page import FILES, File, Page
from kimi_core.web.rows import ActiveSession, Exchanges, Session, Sessions, Totals
from kimi_core.web.state import Events, Health, Status

MAX_BODY_BYTES = 1024 * 1024
EVENT_GAP_S = 0.25  # a busy proxy wakes the page no more often
STOP_S = 1.0

# In the order in which they are tried.
ROUTES: tuple[tuple[str, type[Handler]], ...] = (
    (r"/", Page),
    (rf"/({'|'.join(map(re.escape, FILES))})", File),
    (r"/health", Health),
    (r"/api/status", Status),
    (r"/api/events", Events),
    (r"/api/sessions", Sessions),
    (r"/api/sessions/active", ActiveSession),
    (r"/api/sessions/([^/]+)", Session),
    (r"/api/exchanges", Exchanges),
    (r"/api/totals", Totals),
    (r"/api/providers", Providers),
    (r"/api/models", Models),
    (r"/api/models/all", AllModels),
    (r"/api/export/(csv|json)", Export),
    (r".*", Mounted),
)


class Proxy(Protocol):
    """The proxy that the page is about."""

    @property
    def store(self) -> Store: ...

    @property
    def rules(self) -> Rules: ...

    @property
    def hosts(self) -> frozenset[str]:
        """Further names, with or without a port, by which it is reached."""

    @property
    def members(self) -> Sequence[object]:
        """The addons that are loaded; each may have `endpoints`."""

    @property
    def confdir(self) -> str: ...

    def addresses(self) -> list[tuple[str, int]]:
        """Return where it listens."""

    def live(self) -> int:
        """Return how many exchanges have not ended."""

    def is_local(self, host: str, listening: str = "") -> bool:
        """Tell whether `host` is this machine's loopback or the address that is listened on."""


class Site:
    """Serves the page of a proxy from `folder`, to whom knows the token."""

    def __init__(self, proxy: Proxy, folder: Path) -> None:
        self.proxy = proxy
        self.folder = folder
        self.token = secrets.token_urlsafe(32)
        self.host = ""
        self.port = 0
        self.version = ""
        self._server: HTTPServer | None = None
        self._listeners: set[asyncio.Event] = set()
        self._news: asyncio.Task[None] | None = None
        self._stale = False

    @property
    def store(self) -> Store:
        return self.proxy.store

    @property
    def url(self) -> str:
        """Return the address of the page, without the token."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"

    def listen(self, host: str, port: int) -> None:
        """Begin to serve. Raises OSError when the address cannot be used."""
        self.host, self.port = host, port
        routes: list[Any] = [(pattern, handler, {"site": self}) for pattern, handler in ROUTES]
        application = web.Application(
            routes,
            log_function=lambda handler: None,  # a logged URL would show the token
        )
        server = HTTPServer(application, max_header_size=64 * 1024, max_body_size=MAX_BODY_BYTES)
        server.listen(port, host)
        self._server = server

    def close(self) -> None:
        """Take no new connection from now on."""
        if self._server is not None:
            self._server.stop()

    async def stop(self) -> bool:
        """End the server; tell whether all of its connections have ended in time."""
        server, self._server = self._server, None
        if self._news is not None:
            self._news.cancel()
        if server is None:
            return True
        server.stop()
        try:
            async with asyncio.timeout(STOP_S):
                await server.close_all_connections()
        except TimeoutError:
            return False
        return True

    # -- live events

    @contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """An event that is set each time there is something new to read."""
        changed = asyncio.Event()
        self._listeners.add(changed)
        try:
            yield changed
        finally:
            self._listeners.discard(changed)

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    def announce(self) -> None:
        """Wake the pages that are open when the rows that wait now are in the store."""
        if not self._listeners:
            return
        self._stale = True
        if self._news is None or self._news.done():
            self._news = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        while self._stale and self._listeners:
            self._stale = False
            await self.store.committed()
            for listener in self._listeners:
                listener.set()
            await asyncio.sleep(EVENT_GAP_S)
