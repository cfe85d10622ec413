"""Where a provider's cache of a conversation ends, and who is to blame.

A provider reads from its cache what begins as a request before did. So each request is compared,
as it leaves, with those that left lately in the same session: by digests, nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kimi_core.context import Context, context, read, sent
from kimi_core.exchange import Breaker, Exchange
from kimi_core.memo import Memo

_SIZE = 16
"""Bytes of a digest."""
_SESSIONS = 256
_REQUESTS = 8
"""How many conversations of a session are kept apart: branches, subagents side by side."""


Heads = tuple[tuple[str, bytes], ...]
"""Kinds and digests."""


@dataclass(slots=True, eq=False)
class Request:
    """What left in a conversation, as digests, and what the reply said of the cache."""

    target: tuple[str, str]
    heads: Heads
    """What left before the messages."""
    own_heads: Heads
    """The same as the client sent it."""
    own: bytes
    """The digests of the client's messages, one after the other."""
    left: bytes
    """Those of the messages that left."""
    bypassed: bool
    tokens: int = 0
    """Of the whole request; 0 as long as that is not known."""
    reach: int = 0
    """How many of them the provider had in its cache then; 0: no sign of a cache."""
    writes: bool = False
    """The provider says what it writes to its cache: no more than that is in it."""


class Step(NamedTuple):
    """A request beside the one that it goes on from."""

    now: Request
    before: Request | None = None
    known: int = 0
    """How many of the messages that left the provider would have in its cache without us."""
    message: int | None = None
    by: Breaker = ""
    is_ours: bool = False
    """What had been sent before was sent in another way by us."""


class Breaks:
    """Compares each request of a session with those before it. For one thread."""

    def __init__(self) -> None:
        self._lately: Memo[tuple[str, ...], list[Request]] = Memo(_SESSIONS)

    def leaves(self, exchange: Exchange) -> Step:
        """Return what a request goes on from, and where it departs from that.

        A request that the provider has been sent the beginning of breaks nothing, wherever
        `cache_control` stands; neither does a part of an earlier one, nor a new conversation.
        """
        now, lately = _request(exchange), self._requests(exchange)
        step = _step(exchange, now, lately)
        lately.append(now)
        del lately[:-_REQUESTS]
        return step

    def settle(self, exchange: Exchange, step: Step, arrived: bool) -> None:
        """Keep a request that `arrived` in the place of the one it goes on from; forget another."""
        lately, (now, before) = self._requests(exchange), step[:2]
        if not arrived:
            if now in lately:
                lately.remove(now)
        # What was branched off from is still in the provider's cache, and may be gone on from.
        elif before in lately and not step.by and now.left.startswith(before.left):
            lately.remove(before)

    def _requests(self, exchange: Exchange) -> list[Request]:
        # Side calls of a kind are compared with each other only.
        key = (exchange.session_id, exchange.kind, exchange.dialect.name, exchange.client_key_hash)
        lately = self._lately.get(key)
        if lately is None:
            self._lately.put(key, lately := [])
        return lately


def _request(exchange: Exchange) -> Request:
    client, leaving, route = context(exchange), sent(exchange), exchange.route
    own = b"".join(client.digests)
    return Request(
        target=(route.provider, route.model) if route else ("", exchange.model),
        heads=_heads(leaving),
        own_heads=_heads(client),
        own=own,
        left=own if leaving.digests is client.digests else b"".join(leaving.digests),
        bypassed=exchange.rewrite == "bypass",
    )


def _heads(given: Context) -> Heads:
    return tuple((head.unit.kind, head.digest) for head in given.heads)


def _step(exchange: Exchange, now: Request, lately: Sequence[Request]) -> Step:
    before, most = None, -1
    for one in lately:
        if one.target == now.target and one.heads == now.heads:
            size = min(len(one.left), len(now.left))
            if size > most and one.left[:size] == now.left[:size]:
                before, most = one, size
    if before is not None:
        return Step(now, before, most // _SIZE)
    if not lately:
        return Step(now)
    systems = _systems(context(exchange))
    akin = [one for one in reversed(lately) if _is_akin(one, now, systems)]
    if not akin:
        return Step(now)
    best = max(akin, key=lambda one: (one.target == now.target, _common(one.left, now.left)))
    return _broken(exchange, now, best, systems)


def _broken(exchange: Exchange, now: Request, before: Request, systems: int) -> Step:
    """Return who made a request depart from the one before, and where."""
    if before.target != now.target:
        return Step(now, before, 0, 0, "model")
    at, theirs = _common(before.left, now.left), _common(before.own, now.own)
    # A summary stands in for messages, so that the same one has another number in what leaves.
    fewer = (len(now.own) - len(now.left)) // _SIZE
    known = max(0, theirs - fewer)
    if before.heads != now.heads:
        if before.own_heads == now.own_heads:
            by: Breaker = "bypass" if now.bypassed or before.bypassed else "proxy"
            return Step(now, before, known, 0, by, is_ours=True)
        tools = [[head for head in one.own_heads if head[0] == "tools"] for one in (before, now)]
        return Step(now, before, 0, 0, "system" if tools[0] == tools[1] else "tools")
    changed = theirs * _SIZE < min(len(before.own), len(now.own))
    rewrite = exchange.rewrite or ("bypass" if before.bypassed else "")
    if not changed or (rewrite and at < theirs - fewer):
        return Step(now, before, known, at + 1, rewrite or "proxy", is_ours=True)
    if theirs < systems:
        return Step(now, before, at, 0, "system")
    return Step(now, before, at, at + 1, "client")


def _is_akin(one: Request, now: Request, systems: int) -> bool:
    """Tell whether two requests are of one conversation, of which some was changed or dropped."""
    skip = systems * _SIZE  # any two conversations with a client begin with its system prompt
    if _common(one.own[skip:], now.own[skip:]):
        return True
    # One message alone may be the same by chance: "go on".
    end = one.own[skip:][-2 * _SIZE :]
    return len(end) == 2 * _SIZE and end in now.own


def _systems(given: Context) -> int:
    """Return how many system messages stand first."""
    for index in range(len(given)):
        if read(given.dialect, given.message(index).unit).role != "system":
            return index
    return len(given)


def _common(one: bytes, other: bytes) -> int:
    """Return how many digests two rows of them have in common at their beginning."""
    size = min(len(one), len(other))
    # The first bit that differs, without a loop in Python.
    differ = int.from_bytes(one[:size], "big") ^ int.from_bytes(other[:size], "big")
    return (size - (differ.bit_length() + 7) // 8) // _SIZE


__all__: Sequence[str] = ("Breaks", "Request", "Step")
