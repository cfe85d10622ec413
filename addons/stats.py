"""The stats page: what the store knows, as a page, a JSON API and live events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import urlencode

from mitmproxy import ctx, exceptions, http
from mitmproxy.addonmanager import Loader

from kimi_core import flows
from kimi_core.flows import Rank
from kimi_core.rules import Rules
from kimi_core.store import Store
from kimi_core.web.site import Site

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("stats_page")


class Stats:
    """Serves the stats page on a port of its own; a flow passes it unchanged.

    An exchange that has ended, and what another addon announces, wakes the pages that are open;
    with none open it costs nothing.
    What other addons offer in `endpoints` is part of its API.
    """

    def __init__(self) -> None:
        self._running = False
        self._task: asyncio.Task[None] | None = None
        self.proxy: _Proxy
        self.site: Site

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)
        self.proxy = _Proxy(flows.suite())
        self.site = Site(self.proxy, PAGE)
        self._random_token = self.site.token
        self.proxy.suite.on_change = self.site.announce
        loader.add_option(
            "stats_port", int, 8082, "Port of the stats page and its API; 0 turns them off."
        )
        loader.add_option("stats_host", str, "127.0.0.1", "Address the stats page listens on.")
        loader.add_option(
            "stats_token",
            str,
            "",
            "Token that opens the stats page; empty makes a new one at each start.",
        )

    def configure(self, updated: set[str]) -> None:
        self.proxy.suite.configure(updated)
        if "stats_port" in updated and not 0 <= ctx.options.stats_port <= 65535:
            raise exceptions.OptionsError(
                f"stats_port is {ctx.options.stats_port}; write a port from 1 to 65535, or 0"
            )
        if "stats_token" in updated:
            self.site.token = ctx.options.stats_token or self._random_token
        if self._running:
            self.site.announce()  # an option of another addon's may be a switch on the page
        if self._running and updated & {"stats_port", "stats_host"}:
            self._task = asyncio.create_task(self._restart())

    # Both return a task instead of being `async def`: mitmproxy calls them from synchronous code
    # when a script is reloaded or unloaded, and refuses coroutine functions there.

    def running(self) -> Awaitable[None]:
        self._running = True
        self.proxy.store = self.proxy.suite.store
        self._task = asyncio.create_task(self._start())
        return self._task

    def done(self) -> Awaitable[None]:
        self._running = False
        if self.proxy.suite.on_change == self.site.announce:
            self.proxy.suite.on_change = None
        self.site.close()  # at once, since a reloaded script wants the port
        self._task = asyncio.create_task(self._leave())
        return self._task

    @flows.step(Rank.SHOW)
    @flows.fail_open
    def response(self, flow: http.HTTPFlow) -> None:
        self._ended(flow)

    @flows.step(Rank.SHOW)
    @flows.fail_open
    def error(self, flow: http.HTTPFlow) -> None:
        self._ended(flow)

    def _ended(self, flow: http.HTTPFlow) -> None:
        if self.site.listeners and flows.exchange(flow) is not None:
            self.site.announce()

    async def _start(self) -> None:
        host, port = ctx.options.stats_host.strip("[] "), ctx.options.stats_port
        if not port:
            return
        site = self.site
        site.version = await asyncio.to_thread(version)
        try:
            site.listen(host, port)
        except OSError as error:
            # Anything worse than a warning in `running` would end the whole proxy.
            logger.warning(
                "No stats page, because port %s of %s cannot be used: %s. Traffic flows; "
                "set stats_port to another port, or to 0.",
                port,
                host,
                error.strerror or error,
            )
            return
        if ctx.options.stats_token:
            logger.info("Stats page listening at %s", site.url)
        else:
            logger.info("Stats page listening at %s?%s", site.url, urlencode({"token": site.token}))

    async def _stop(self) -> None:
        if not await self.site.stop():
            logger.debug("The stats page still had connections when it was stopped")

    async def _restart(self) -> None:
        await self._stop()
        await self._start()

    async def _leave(self) -> None:
        await self._stop()
        await flows.leave(self)


class _Proxy:
    """What the page's server asks of the proxy that runs."""

    def __init__(self, suite: flows.Suite) -> None:
        self.suite = suite
        self.store: Store  # of the time when the page was started; asked later, it might be closed

    @property
    def rules(self) -> Rules:
        return self.suite.rules

    @property
    def hosts(self) -> frozenset[str]:
        return self.suite.hosts

    @property
    def members(self) -> Sequence[object]:
        return tuple(self.suite.members)

    @property
    def confdir(self) -> str:
        return str(ctx.options.confdir)

    def addresses(self) -> list[tuple[str, int]]:
        server = ctx.master.addons.get("proxyserver")
        return [address[:2] for address in server.listen_addrs()] if server else []

    def live(self) -> int:
        return len(flows.live_exchanges())

    def is_local(self, host: str, listening: str = "") -> bool:
        return flows.is_our_host(host, listening)


def version() -> str:
    """Return the version of the installed package; a bare checkout has none."""
    try:
        return metadata.version("kimi-proxy")
    except metadata.PackageNotFoundError:
        return "unknown"


addons = [Stats()]
