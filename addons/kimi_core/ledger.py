"""What saving brings and what it costs, each exchange against the same traffic without us.

The model of an exchange without us:

- The client's messages would have left as they are, so the prompt would be longer by what was left
  out. Of that, what stands in messages that had been sent before would have been read from the
  provider's cache as far as the rest of the prompt was. Everything else would have been plain
  input, or written to the cache where the reply reports writes.
- `gross_saved_usd`: the bill for that prompt less the bill for the one that left, both with all in
  the cache that would be there without us.
- `lost_usd`: what it cost that it was not there. Where we rewrote what had been sent before, this
  is the price of reading anew what would have been read from the cache.
- `spent_usd`: summaries, and recalls: the further request's prompt, and the call that asked for it.
  What the model says after a recall it would have said without one. Where the further request
  failed, nobody has anything of the asking one: all that it took is spent.

Where the numbers come from: the prompt and its cached part from the provider's usage; what was left
out from o200k, an estimate for other models, times what the provider counted of the prompt over
what we counted of it (between 0.5 and 2); prices as the exchange's own, by the difference of two
bills, so that tiers hold and what a provider says it took is the measure.

Its limits: replies, and what the client asks next, are taken to be the same without us, and a
window is taken to have no end. A cache that we broke is taken to live on, even if it would have
expired. An exchange of several attempts saves once, on the first that was billed. The first request
of a conversation after a start is compared with nothing. A history that the provider keeps
(`previous_response_id`) is not seen, nor is what Dispatch does to a request after all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from weakref import WeakKeyDictionary

from kimi_core.breaks import Breaks, Request, Step
from kimi_core.context import Piece, sent
from kimi_core.exchange import Attempt, Breaker, Exchange, Saving, Spending, Usage
from kimi_core.recall import RECALL

Price = Callable[[Attempt, Usage], float | None]
"""Returns the US dollars that an attempt would have cost with this usage; None: unknown."""
Count = Callable[[Piece], int]
"""Returns the tokens of a piece of the context by the tokenizer for the exchange's model."""

_ALL = 0.9
"""The share of a prompt that is as good as all of it: caches hold whole blocks."""


class Ledger:
    """Keeps the account of each exchange: `leaves` at its request, `settle` after its reply.

    For one thread. What it remembers is lost with the process.
    """

    def __init__(self) -> None:
        self._breaks = Breaks()
        self._steps: WeakKeyDictionary[Exchange, Step] = WeakKeyDictionary()

    def leaves(self, exchange: Exchange) -> None:
        """Set what is known when a request leaves: its tokens saved, and where the cache broke."""
        exchange.saved_tokens = sum(saving.tokens for saving in exchange.savings)
        if exchange.operation != "chat" or not exchange.session_id or _is_continued(exchange):
            return
        step = self._steps[exchange] = self._breaks.leaves(exchange)
        exchange.cache_break, exchange.cache_break_by = step.message, step.by

    def settle(self, exchange: Exchange, price: Price, count: Count) -> None:
        """Set what the exchange saved, lost and spent, once it is counted and priced.

        When nothing had changed and yet the reply reports no cached tokens, where there had been
        some, the cache had expired. That is no break of ours or the client's: `cache_break`
        stays None, and `cache_break_by` is "provider".
        """
        step = self._steps.pop(exchange, None)
        exchange.spendings += _recalls(exchange.attempts, price)
        billed = None if exchange.blocked else _first_billed(exchange.attempts)
        if step is not None:
            self._breaks.settle(exchange, step, arrived=billed is not None)
        exchange.gross_saved_usd, exchange.lost_usd = 0.0, 0.0
        if billed is None:  # refused, and it would have been without us
            exchange.saved_tokens = 0
            exchange.cache_break, exchange.cache_break_by = None, ""
        else:
            if step is not None and _has_expired(step, billed):
                exchange.cache_break_by = "provider"
            if exchange.savings or (step is not None and step.is_ours):
                _account(exchange, step, billed, price, count)
            if step is not None:
                _learn(step, billed)
        exchange.spent_usd = _sum(spending.cost_usd for spending in exchange.spendings)
        gross, lost, spent = exchange.gross_saved_usd, exchange.lost_usd, exchange.spent_usd
        if gross is None or lost is None or spent is None:
            exchange.saved_usd = None
        else:
            exchange.saved_usd = gross - lost - spent


def broken(exchange: Exchange) -> str:
    """Return where the provider's cache broke and by whom; empty when it did not."""
    by = exchange.cache_break_by
    if exchange.cache_break:
        return f"message {exchange.cache_break}, by {_WHO.get(by, by)}"
    return _BEFORE_MESSAGES.get(by, by)


_WHO: dict[Breaker, str] = {
    "client": "the client",
    "compression": "a compression",
    "revocation": "a revocation",
    "flush": "a flush",
    "bypass": "a bypass",
    "proxy": "kimi-proxy",
}
_BEFORE_MESSAGES: dict[Breaker, str] = {
    "tools": "the tools, by the client",
    "system": "the system prompt, by the client",
    "model": "another model",
    "bypass": "the tools, by a bypass",
    "proxy": "the tools, by kimi-proxy",
    "provider": "expired at the provider",
}


def _is_continued(exchange: Exchange) -> bool:
    """Tell whether the provider puts messages before those that are sent."""
    if exchange.dialect.name != "responses":
        return False
    document = exchange.document
    return bool(document.get("previous_response_id") or document.get("conversation"))


def _first_billed(attempts: Iterable[Attempt]) -> Attempt | None:
    return next((attempt for attempt in attempts if attempt.input_tokens is not None), None)


def _has_expired(step: Step, billed: Attempt) -> bool:
    before, usage = step.before, billed.reply.usage
    if step.by or before is None or not before.reach or usage.input_tokens is None:
        return False
    return not usage.cache_read_tokens and step.now.left.startswith(before.left)


def _learn(step: Step, billed: Attempt) -> None:
    """Note what the provider's cache holds by now."""
    now, usage = step.now, billed.reply.usage
    before = step.before if step.before and step.before.target == now.target else None
    read, write = usage.cache_read_tokens or 0, usage.cache_write_tokens or 0
    now.tokens = billed.input_tokens or 0
    now.writes = bool(write or (before and before.writes))
    if usage.input_tokens is None:
        now.reach = min(now.tokens, before.reach) if before else 0
    elif now.writes:
        now.reach = read + write
    elif read or (before and before.reach):
        now.reach = now.tokens


# -- the account of one exchange


def _account(
    exchange: Exchange, step: Step | None, billed: Attempt, price: Price, count: Count
) -> None:
    """Set `gross_saved_usd` and `lost_usd`; None when no price is known."""
    usage = replace(
        billed.reply.usage, input_tokens=billed.input_tokens, output_tokens=billed.output_tokens
    )
    tokens = _Tokens(exchange, step, billed, count)
    unbroken = _with_read(usage, tokens.read_anew())
    longer = _longer(unbroken, usage, *tokens.left_out())
    paid = _by_list(billed, usage, price)
    best = paid if unbroken is usage else price(billed, unbroken)
    without = best if longer == unbroken else price(billed, longer)
    if paid is None or best is None or without is None or billed.cost_usd is None:
        exchange.gross_saved_usd, exchange.lost_usd = None, None
        return
    # What the provider says it took may be another price than the list's, or none.
    share = billed.cost_usd / paid if paid else 1.0
    exchange.gross_saved_usd = share * (without - best)
    exchange.lost_usd = share * (paid - best)


def _by_list(attempt: Attempt, usage: Usage, price: Price) -> float | None:
    """Return what an attempt took by the list of prices, whatever its provider says it took."""
    return attempt.cost_usd if usage.cost_usd is None else price(attempt, usage)


class _Tokens:
    """How many tokens of an exchange a cache would have held without us."""

    def __init__(
        self, exchange: Exchange, step: Step | None, billed: Attempt, count: Count
    ) -> None:
        self._before = step.before if step is not None else None
        self._known = step.known if step is not None else 0
        self._breaks = bool(step is not None and step.by)
        self._is_ours = step is not None and step.is_ours
        self._savings = exchange.savings
        self._leaving = sent(exchange)
        self._count = count
        self._usage = billed.reply.usage
        self._prompt = billed.input_tokens or 0
        counted = sum(exchange.context_tokens.values())
        self._scale = min(2.0, max(0.5, self._prompt / counted)) if counted else 1.0

    def left_out(self) -> tuple[int, int]:
        """Return the tokens left out that would have been read from the cache, and the others."""
        old = [saving for saving in self._savings if self._was_sent(saving)]
        end = self._end() if old else 0
        if 0 < end < math.inf:
            starts = self._starts()
            old = [saving for saving in old if starts[saving.message] < end]
        cached = sum(saving.tokens for saving in old) if end else 0
        total = sum(saving.tokens for saving in self._savings)
        return round(cached * self._scale), round((total - cached) * self._scale)

    def read_anew(self) -> int:
        """Return the tokens that would have been read from the cache, had we not rewritten them."""
        if not self._is_ours:
            return 0
        pieces = [self._leaving.message(at) for at in range(self._known, len(self._leaving))]
        fresh = sum(map(self._count, pieces)) * self._scale
        held = min(self._prompt - fresh, _held(self._before))
        return max(0, round(held) - (self._usage.cache_read_tokens or 0))

    def _was_sent(self, saving: Saving) -> bool:
        # With nothing to compare with, as after a start, masking still knows what it masked before.
        return saving.message < self._known if self._before is not None else not saving.new

    def _end(self) -> float:
        """Return how many tokens, of those that left, would have been read without us."""
        if self._is_ours or self._usage.input_tokens is None:
            return _held(self._before)
        read = self._usage.cache_read_tokens or 0
        whole = self._prompt
        if self._before is not None and not self._breaks:
            whole = min(whole, self._before.tokens or whole)
        return math.inf if read and read >= _ALL * whole else read

    def _starts(self) -> list[float]:
        """Return before how many tokens each message that left begins."""
        leaving, scale = self._leaving, self._scale
        heads = sum(map(self._count, leaving.heads))
        counts = (self._count(leaving.message(at)) for at in range(len(leaving)))
        return [start * scale for start in accumulate(counts, initial=heads)]


def _held(before: Request | None) -> float:
    """Return how many tokens, from its beginning, a cache held of a request; infinite: all."""
    if before is None or not before.reach:
        return 0
    return math.inf if before.reach >= _ALL * before.tokens else before.reach


def _with_read(usage: Usage, anew: int) -> Usage:
    """Return the usage with more of the prompt read from the cache, and so less written."""
    if not anew:
        return usage
    read = (usage.cache_read_tokens or 0) + anew
    write = min(usage.cache_write_tokens or 0, (usage.input_tokens or 0) - read)
    hour = min(usage.cache_write_1h_tokens or 0, write)
    return replace(
        usage, cache_read_tokens=read, cache_write_tokens=write, cache_write_1h_tokens=hour
    )


def _longer(usage: Usage, said: Usage, cached: int, other: int) -> Usage:
    """Return the usage for a longer prompt; `said` tells whether the provider bills its cache."""
    write, hour = said.cache_write_tokens or 0, said.cache_write_1h_tokens or 0
    written = other if write else 0
    return replace(
        usage,
        input_tokens=(usage.input_tokens or 0) + cached + other,
        cache_read_tokens=(usage.cache_read_tokens or 0) + cached,
        cache_write_tokens=(usage.cache_write_tokens or 0) + written,
        cache_write_1h_tokens=(usage.cache_write_1h_tokens or 0)
        + (written * hour // write if write else 0),
    )


# -- what saving itself took


def _recalls(attempts: Sequence[Attempt], price: Price) -> list[Spending]:
    spendings: list[Spending] = []
    failed = False
    for asking, further in reversed(list(pairwise(attempts))):
        # With it fail those that led to it.
        failed = further.input_tokens is None or (failed and further.rejected == RECALL)
        if asking.rejected == RECALL:
            spendings.append(_in_vain(asking) if failed else _recall(asking, further, price))
    return spendings[::-1]


def _in_vain(asking: Attempt) -> Spending:
    return Spending("recall", asking.input_tokens or 0, asking.output_tokens or 0, asking.cost_usd)


def _recall(asking: Attempt, further: Attempt, price: Price) -> Spending:
    usage = replace(
        further.reply.usage,
        input_tokens=further.input_tokens,
        output_tokens=further.output_tokens,
    )
    paid = _by_list(further, usage, price)
    taken = price(further, replace(usage, output_tokens=asking.output_tokens))
    cost = further.cost_usd
    if cost is not None and paid is not None and taken is not None:
        cost = cost * taken / paid if paid else cost
    return Spending("recall", further.input_tokens or 0, asking.output_tokens or 0, cost)


def _sum(costs: Iterable[float | None]) -> float | None:
    """Return the sum, None when one of them is not known."""
    known = 0.0
    for cost in costs:
        if cost is None:
            return None
        known += cost
    return known
