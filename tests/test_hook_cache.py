"""With the cache the same handlers are called, in the same order, whatever they do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from mitmproxy import exceptions
from mitmproxy.addonmanager import AddonManager
from mitmproxy.proxy.layers.http import HttpRequestHook
from mitmproxy.test import taddons, tflow

from hook_cache import HookCache

Calls = list[str]


class Plain:
    """An addon that notes when it is asked."""

    def __init__(self, name: str, calls: Calls, does: Callable[[], Any] | None = None) -> None:
        self.name = name
        self._calls, self._does = calls, does
        self.addons: list[Any] = []

    def request(self, flow: Any) -> Any:
        self._calls.append(self.name)
        return self._does() if self._does else None


class Deaf:
    """An addon without a handler."""


class _Lookalike:
    """An addon with an attribute that is named like an event."""

    request = "not callable"

    def __repr__(self) -> str:
        return "Lookalike"


def _raise(error: Exception) -> Callable[[], None]:
    def does() -> None:
        raise error

    return does


async def _later(calls: Calls) -> None:
    await asyncio.sleep(0)
    calls.append("later")


def _trigger(addons: list[Any], cached: bool) -> None:
    """Trigger `request` twice through the addons, with or without the cache."""

    async def run() -> None:
        with taddons.context(HookCache(), *addons, loadcore=False) as context:
            manager = context.master.addons
            context.options.hook_cache = cached
            if cached:
                cache = next(a for a in manager.chain if isinstance(a, HookCache))
                cache.running()
            assert ("trigger_event" in vars(manager)) == cached
            for _ in range(2):
                await manager.trigger_event(HttpRequestHook(tflow.tflow()))
            # It hands log records to this loop, which ends here.
            context.master._legacy_log_events.uninstall()

    asyncio.run(run())


def _nested(calls: Calls) -> list[Any]:
    outer = Plain("outer", calls)
    outer.addons = [Plain("first", calls, _raise(ValueError("x"))), Plain("silenced", calls)]
    return [outer, Plain("next", calls)]


@pytest.mark.parametrize(
    "make",
    [
        lambda calls: [Plain("a", calls), Deaf(), Plain("b", calls)],
        lambda calls: [Plain("a", calls, lambda: _later(calls)), Plain("b", calls)],
        lambda calls: [Plain("a", calls, _raise(exceptions.AddonHalt())), Plain("b", calls)],
        lambda calls: [Plain("a", calls, _raise(RuntimeError("oh"))), Plain("b", calls)],
        _nested,
        lambda calls: [_Lookalike(), Plain("a", calls)],
    ],
    ids=[
        "some without a handler",
        "a coroutine",
        "a halt",
        "an error",
        "a script's children",
        "an attribute that is no handler",
    ],
)
def test_the_same_handlers_are_called_as_without(
    make: Callable[[Calls], list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[Calls, list[str]]] = []
    for cached in (False, True):
        calls: Calls = []
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            _trigger(make(calls), cached)
        seen.append((calls, [record.getMessage() for record in caplog.records]))
    assert seen[0] == seen[1]
    assert seen[0][0]


def test_an_addon_that_comes_is_called_and_one_that_goes_is_not() -> None:
    async def run() -> Calls:
        calls: Calls = []
        flow = tflow.tflow()
        with taddons.context(HookCache(), Plain("old", calls)) as context:
            manager: AddonManager = context.master.addons
            next(a for a in manager.chain if isinstance(a, HookCache)).running()
            await manager.trigger_event(HttpRequestHook(flow))
            manager.add(new := Plain("new", calls))
            await manager.trigger_event(HttpRequestHook(flow))
            manager.remove(new)
            await manager.trigger_event(HttpRequestHook(flow))
            context.master._legacy_log_events.uninstall()
        return calls

    assert asyncio.run(run()) == ["old", "old", "new", "old"]


def test_it_can_be_switched_off_while_running() -> None:
    with taddons.context(cache := HookCache()) as context:
        cache.running()
        assert "trigger_event" in vars(context.master.addons)
        context.options.hook_cache = False
        assert (
            not {"trigger_event", "register", "remove", "clear"}
            & vars(context.master.addons).keys()
        )


def test_an_unknown_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mitmproxy.version.VERSION", "99.0.0")
    with taddons.context(cache := HookCache()) as context:
        cache.running()
        assert "trigger_event" not in vars(context.master.addons)
