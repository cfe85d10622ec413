"""Call only the addons that have a handler: mitmproxy asks each of some fifty for every event."""

import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from mitmproxy import ctx, exceptions, hooks, version
from mitmproxy.addonmanager import AddonManager, Loader, safecall

from kimi_core import flows

logger = logging.getLogger(__name__)

KNOWN_VERSIONS = ("11.0.", "12.2.")
"""Where `AddonManager` was read, line by line: what follows replaces one of its methods."""

_CHANGES = ("register", "remove", "clear")

Handlers = list[list[Callable[..., Any]]]
"""For one event: the handlers of each addon of the chain that has any, its children's included."""


class HookCache:
    """Remembers for each event which addons handle it, until an addon comes or goes.

    No flow is changed and no order: the same handlers are called with the same arguments, and one
    that raises silences the rest of its script, as before. About half of what mitmproxy spends on
    a request goes into asking addons for handlers that they do not have.
    """

    def __init__(self) -> None:
        self._manager: AddonManager | None = None
        self._handlers: dict[str, Handlers] = {}

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)
        loader.add_option(
            "hook_cache",
            bool,
            True,
            "Remember which addons handle an event, in mitmproxy versions where that was tried.",
        )

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)
        if "hook_cache" in updated:
            if not ctx.options.hook_cache:
                self._restore()
            elif self._manager is not None:
                self.running()

    def running(self) -> None:
        manager = ctx.master.addons
        if not ctx.options.hook_cache or "trigger_event" in vars(manager):
            return
        if not version.VERSION.startswith(KNOWN_VERSIONS):
            logger.info("hook_cache is off: mitmproxy %s is not one it knows", version.VERSION)
            return
        self._manager = manager
        self._handlers.clear()
        # Instance attributes: the class, and any other manager, stay as they are.
        setattr(manager, "trigger_event", self._trigger_event)  # noqa: B010
        for name in _CHANGES:
            setattr(manager, name, self._forgetting(getattr(manager, name)))

    def done(self) -> Awaitable[None]:
        self._restore()
        return flows.leave(self)

    def _restore(self) -> None:
        if self._manager is not None:
            for name in ("trigger_event", *_CHANGES):
                vars(self._manager).pop(name, None)

    def _forgetting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def forget(*args: Any) -> Any:
            self._handlers.clear()
            try:
                return method(*args)
            finally:
                self._handlers.clear()

        return forget

    def _find(self, event: hooks.Hook) -> Handlers:
        """Return the event's handlers, found as AddonManager finds them."""
        assert self._manager is not None
        of_each = (
            [handler for _, handler in self._manager._iter_hooks(addon, event)]
            for addon in self._manager.chain
        )
        return [handlers for handlers in of_each if handlers]

    async def _trigger_event(self, event: hooks.Hook) -> None:
        """Take the place of AddonManager.trigger_event."""
        found = self._handlers.get(event.name)
        if found is None:
            assert self._manager is not None
            try:
                found = self._handlers[event.name] = self._find(event)
            except exceptions.AddonManagerError:
                # An attribute that only looks like a handler: mitmproxy's own way says so.
                await AddonManager.trigger_event(self._manager, event)
                return
        args = event.args()
        for handlers in found:
            try:
                with safecall():
                    for handler in handlers:
                        result = handler(*args)
                        if result is not None and inspect.isawaitable(result):
                            await result
            except exceptions.AddonHalt:
                return


addons = [HookCache()]
