"""Which of a model's targets an exchange goes to."""

from __future__ import annotations

import random
import time
from collections import deque

from kimi_core.exchange import Exchange
from kimi_core.memo import Memo
from kimi_core.rules import Match, Score, Target, choose

_WEIGHT = 0.2
"""How much the newest measurement counts in what is remembered of a provider."""


class Balancer:
    """Chooses targets, and holds a choice for its session so that prompt caches keep hitting."""

    def __init__(self) -> None:
        self._chosen: Memo[tuple[str, str], tuple[str, str]] = Memo(5000)
        self._counters: dict[str, int] = {}
        self._seen: dict[str, _Seen] = {}
        self._open: list[Exchange] = []

    def choose(
        self, match: Match, targets: tuple[Target, ...], session: str, sticky: bool
    ) -> Target:
        """Return one of `targets`, which are the usable ones of `match`."""
        self._learn()
        if len(targets) == 1:
            return targets[0]
        key = (session, match.model)
        if sticky and session and (held := self._chosen.get(key)):
            for target in targets:
                if (target.provider.name, target.model) == held:
                    return target
        counter = self._counters.get(match.rule.name, 0)
        self._counters[match.rule.name] = counter + 1
        # Drawn from the session itself, a random choice is the same after a restart.
        rng = random.Random(f"{session}/{match.model}") if sticky and session else random.Random()
        target = choose(
            targets,
            match.strategy,
            rng=rng,
            counter=counter,
            scores={t.provider.name: self._score(t) for t in targets},
        )
        if match.strategy == "best":
            # Whoever was never tried goes first, else nothing would ever be known of it.
            untried = (t for t in targets if t.provider.name not in self._seen)
            target = next(untried, target)
        if session:
            self._chosen.put(key, (target.provider.name, target.model))
        return target

    def watch(self, exchange: Exchange) -> None:
        """Learn from an exchange once it has ended, before the next choice."""
        self._open.append(exchange)

    def _learn(self) -> None:
        ended = [exchange for exchange in self._open if exchange.ended is not None]
        self._open = [exchange for exchange in self._open if exchange.ended is None]
        for exchange in ended:
            self.note(exchange)

    def note(self, exchange: Exchange) -> None:
        """Learn from an ended exchange what its provider is like."""
        route = exchange.route
        if route is None or not route.url or exchange.blocked:
            return
        seen = self._seen.setdefault(route.provider, _Seen())
        seen.requests.append(time.monotonic())
        if exchange.error_type or (exchange.status or 0) >= 400:
            # A provider that is full says so at once; that is no speed.
            seen.latency_s = _mean(seen.latency_s, route.source.timeout if route.source else 120)
        elif exchange.first_chunk is not None:
            seen.latency_s = _mean(seen.latency_s, exchange.first_chunk - exchange.started)
        tokens = (exchange.input_tokens or 0) + (exchange.output_tokens or 0)
        if exchange.cost_usd is not None and tokens:
            seen.usd_per_mtok = _mean(seen.usd_per_mtok, exchange.cost_usd / tokens * 1e6)

    def _score(self, target: Target) -> Score:
        seen = self._seen.get(target.provider.name)
        if seen is None:
            return Score()
        while seen.requests and seen.requests[0] < time.monotonic() - 60:
            seen.requests.popleft()
        rpm = target.provider.rpm
        capacity = max(0.0, 1 - len(seen.requests) / rpm) if rpm else None
        return Score(capacity, seen.usd_per_mtok, seen.latency_s)


class _Seen:
    """What was measured of one provider."""

    def __init__(self) -> None:
        self.requests: deque[float] = deque(maxlen=10_000)
        self.latency_s: float | None = None
        self.usd_per_mtok: float | None = None


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _WEIGHT * (value - before)
