"""The last request of each session, for a compression that somebody asks for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kimi_core.compaction.planning import Conversation
from kimi_core.compaction.targets import Fields
from kimi_core.exchange import Attempt, Route

LIMIT_BYTES = 32_000_000


@dataclass(slots=True)
class Took:
    """What a request took of its model's window, known once its reply has been counted."""

    attempts: list[Attempt]
    """The exchange's own list, which fills when it is sent."""
    saved: int = 0
    """Tokens that a summary left out."""

    @property
    def full(self) -> int | None:
        """Return the tokens that it would have taken without a summary."""
        first = self.attempts[0].input_tokens if self.attempts else None
        return first + self.saved if first else None


@dataclass(frozen=True, slots=True)
class Last:
    """A session's last request: what it said, and where it went. No client's key is in it."""

    conversation: Conversation
    route: Route
    headers: Fields
    took: Took
    chains: Sequence[bytes]
    """By which each beginning of it is recognised, see `Context`."""


class Latest:
    """The last requests, those of the latest sessions, in a bounded memory."""

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self._limit = limit
        self._size = 0
        self._known: OrderedDict[str, Last] = OrderedDict()

    def put(self, last: Last) -> None:
        self._drop(last.conversation.session)
        self._known[last.conversation.session] = last
        self._size += len(last.conversation.body)
        while self._size > self._limit:
            self._drop(next(iter(self._known)))

    def get(self, session: str) -> Last | None:
        return self._known.get(session)

    def all(self) -> list[Last]:
        return list(self._known.values())

    def _drop(self, session: str) -> None:
        if (old := self._known.pop(session, None)) is not None:
            self._size -= len(old.conversation.body)
