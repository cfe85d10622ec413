"""What recalls took, once the attempts of an exchange are counted and priced."""

from __future__ import annotations

from itertools import pairwise

from kimi_core.exchange import Attempt, Exchange, Spending
from kimi_core.recall.decider import RECALL


def recalls(exchange: Exchange) -> int:
    """Return how many replies were answered from the store."""
    return sum(attempt.rejected == RECALL for attempt in exchange.attempts)


def spendings(exchange: Exchange) -> list[Spending]:
    """Return each further request that a recall took, with all that the model went on to say."""
    attempts = pairwise(exchange.attempts)
    return [_spending(later) for one, later in attempts if one.rejected == RECALL]


def _spending(attempt: Attempt) -> Spending:
    return Spending(
        "recall", attempt.input_tokens or 0, attempt.output_tokens or 0, attempt.cost_usd
    )
