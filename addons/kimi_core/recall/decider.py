"""When a reply is answered from the store, and with what."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kimi_core import dialects
from kimi_core.attempts import Call, Ending, Message
from kimi_core.attempts.turn import bare
from kimi_core.dialects import Dialect
from kimi_core.exchange import Exchange
from kimi_core.recall.excerpt import Wanted, excerpt
from kimi_core.store import StoreError

logger = logging.getLogger(__name__)

MAX_RECALLS = 5
"""How many replies to one exchange are answered; the next is told that there is no more."""
MAX_CALLS = 5
"""How many calls of one reply are answered with text."""
RECALL = "recall"
"""Why such a reply was not enough, in `Attempt.rejected`."""

Lookup = Callable[[str], Awaitable[str | None]]
"""Returns the text behind a hash; None when nobody, or somebody else, masked such a text.

What it cannot read it may raise as OSError, sqlite3.Error or StoreError.
"""

NO_MORE = (
    "No more can be recalled in this turn. Go on with what you have; to see the text again, use "
    "the tool that first brought it."
)
ONE_BY_ONE = "Not read: too many calls at once. Call again for this one."

_HASH = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")


class Recall:
    """Answers replies whose only calls are recalls.

    `said_once`: no text may follow other text, as where it is JSON. Then a reply that has text
    is enough, and its recalls are dropped.
    """

    def __init__(self, name: str, lookup: Lookup, *, said_once: bool = False) -> None:
        self.name = name
        self._lookup = lookup
        self._said_once = said_once
        self._answered = 0

    def hides(self, name: str) -> bool:
        """Tell whether a call by this name is one for us."""
        return bare(name) == self.name

    def decide(self, ending: Ending) -> str:
        """Return `RECALL` for a reply that has to be answered by us."""
        called = [call for call in ending.calls if call.name]
        if not called or not all(map(self.keeps, called)) or ending.is_stopped:
            return ""
        if self._said_once and ending.says_something:
            return ""
        if self._answered > MAX_RECALLS:  # it was told, and asks on
            return ""
        self._answered += 1
        return RECALL

    def answer(self, calls: Sequence[Call]) -> str:
        return ""

    def keeps(self, call: Call) -> bool:
        """Tell whether a call is one for us: it goes back to the model with its result."""
        return self.hides(call.name)

    async def more(self, kept: Sequence[Call], dialect: Dialect) -> list[Message]:
        """Return the results of recalls, as messages."""
        results = [await self._result(call, place) for place, call in enumerate(kept)]
        if dialect is dialects.ANTHROPIC:
            blocks = [
                {"type": "tool_result", "tool_use_id": call.id, "content": result}
                for call, result in zip(kept, results, strict=True)
            ]
            return [{"role": "user", "content": blocks}]
        return [
            {"role": "tool", "tool_call_id": call.id, "content": result}
            for call, result in zip(kept, results, strict=True)
        ]

    async def _result(self, call: Call, place: int) -> str:
        if self._answered > MAX_RECALLS:
            return NO_MORE
        if place >= MAX_CALLS:
            return ONE_BY_ONE
        given = call.given
        if given is None:
            return "The arguments are no JSON object; call again with the hash."
        hash = _hash(given.get("hash"))
        if not hash:
            return "hash is missing; it is the 16 hex digits of the note where text was left out."
        try:
            wanted = _wanted(given)
        except ValueError as error:
            return str(error)
        try:
            text = await self._lookup(hash)
        except (OSError, sqlite3.Error, StoreError) as error:
            logger.warning("a recall cannot be read: %s", type(error).__name__)
            return "The text cannot be read now; use the tool that first brought it."
        if text is None:
            return (
                f"Nothing is kept under {hash}. Copy the hash exactly as it stands in the note; if "
                "it is right, the text is no longer kept: use the tool that first brought it."
            )
        return await asyncio.to_thread(excerpt, text, wanted)


def _hash(given: Any) -> str:
    found = _HASH.search(given.lower()) if isinstance(given, str) else None
    return found[0] if found else ""


def _wanted(given: dict[str, Any]) -> Wanted:
    """Read what is wanted of the text. Raises ValueError, with what to tell the model."""
    to_line, pattern = given.get("to_line"), given.get("pattern")
    return Wanted(
        from_line=_number(given, "from_line"),
        to_line=None if to_line is None else _number(given, "to_line"),
        from_character=_number(given, "from_character"),
        pattern=pattern if isinstance(pattern, str) else "",
    )


def _number(given: dict[str, Any], name: str) -> int:
    value = given.get(name)
    if value is None or value == "":
        return 1
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is no whole number.")
    return max(1, value)


def recalls(exchange: Exchange) -> int:
    """Return how many replies were answered from the store."""
    return sum(attempt.rejected == RECALL for attempt in exchange.attempts)
