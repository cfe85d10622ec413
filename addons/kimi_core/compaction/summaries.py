"""The summaries that are in force, found by the conversations whose beginning they replace."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import xxhash

from kimi_core.compaction.cuts import Head, head
from kimi_core.context import Context

MAX_REMEMBERED = 2_048

Source = Literal["model", "extract"]


@dataclass(frozen=True, slots=True)
class Summary:
    """What stands for the first `messages` messages of a conversation.

    Numbers of tokens are those of a whole request by o200k, masked as it leaves: without any
    summary, and with this.
    """

    id: str
    owner: str
    """Whose conversation it is, a key's hash."""
    session: str
    messages: int
    text: str
    """As it is sent."""
    source: Source
    model: str
    provider: str
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    tokens_before: int
    tokens_after: int
    messages_before: int
    messages_after: int
    created_at: float
    used_at: float | None = None
    """None: it is ready, and waits until it is needed."""
    applied: int = 0
    """How many requests left with it."""
    base: str | None = None
    """The id of the summary that it extends; None: not known, for the store does not keep it."""

    @property
    def saved(self) -> int:
        """Return how many tokens fewer leave with each request."""
        return self.tokens_before - self.tokens_after

    def fits(self, chains: Sequence[bytes], owner: str) -> bool:
        """Tell whether a request begins with the messages that it replaces."""
        return (
            self.owner == owner
            and self.messages < len(chains)
            and prefix_id(chains, owner, self.messages) == self.id
        )

    def row(self) -> dict[str, Any]:
        """Return it as a row of the store."""
        row = asdict(self)
        del row["base"]
        return row | {"key_hash": row.pop("owner"), "session_id": row.pop("session")}


def from_row(row: Mapping[str, Any]) -> Summary:
    """Return a row of the store as a summary."""
    return Summary(
        id=row["id"],
        owner=row["key_hash"] or "",
        session=row["session_id"] or "",
        messages=row["messages"] or 0,
        text=row["text"] or "",
        source=row["source"] or "model",
        model=row["model"] or "",
        provider=row["provider"] or "",
        input_tokens=row["input_tokens"] or 0,
        output_tokens=row["output_tokens"] or 0,
        cost_usd=row["cost_usd"],
        tokens_before=row["tokens_before"] or 0,
        tokens_after=row["tokens_after"] or 0,
        messages_before=row["messages_before"] or 0,
        messages_after=row["messages_after"] or 0,
        created_at=row["created_at"],
        used_at=row["used_at"],
        applied=row["applied"] or 0,
    )


def prefix_id(chains: Sequence[bytes], owner: str, end: int) -> str:
    """Return by what the first `end` messages of a conversation are recognised.

    `chains` are those of a request, see `Context`.
    """
    return xxhash.xxh3_128_hexdigest(owner.encode() + chains[end - 1])


class Summaries:
    """What is known of summaries: those in force, and those that were until they were revoked."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Summary] = OrderedDict()
        self._lengths: dict[str, dict[int, int]] = {}
        """By owner, how many messages the known ones replace, and how many do."""
        self._revoked: dict[str, Summary] = {}
        self._heads: dict[str, Head] = {}

    def __len__(self) -> int:
        return len(self._known)

    def load(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows of the store, newest first; those that were revoked are none."""
        fresh = [row for row in rows if row["revoked_at"] is None and row["messages"]]
        for row in reversed(fresh[:MAX_REMEMBERED]):
            self.put(from_row(row))

    def put(self, summary: Summary) -> None:
        """Keep a summary, in the place of one of the same beginning."""
        if self._known.pop(summary.id, None) is None:
            self._count(summary, 1)
        self._revoked.pop(summary.id, None)
        self._known[summary.id] = summary
        while len(self._known) > MAX_REMEMBERED:
            self._forget(next(iter(self._known)))

    def get(self, summary_id: str) -> Summary | None:
        return self._known.get(summary_id)

    def matching(self, chains: Sequence[bytes], owner: str) -> list[Summary]:
        """Return those that fit the beginning of a request, the longest first."""
        lengths = self._lengths.get(owner)
        if not lengths:
            return []
        fitting = (
            self._known.get(prefix_id(chains, owner, length))
            for length in sorted(lengths, reverse=True)
            if length < len(chains)
        )
        return [summary for summary in fitting if summary is not None]

    def head(self, given: Context, summary: Summary) -> Head:
        """Return what stays before the cut of a request that `summary` fits."""
        found = self._heads.get(summary.id)
        if found is None:
            found = self._heads[summary.id] = head(given, summary.messages)
        return found

    def use(self, summary: Summary, now: float, *, applied: bool = True) -> Summary:
        """Put a summary into force, and note that a request leaves with it."""
        used = replace(summary, used_at=now, applied=summary.applied + applied)
        self._known[summary.id] = used
        return used

    def revoke(self, summary_id: str, requests: Iterable[Sequence[bytes]] = ()) -> list[Summary]:
        """Take a summary out of force, and with it those that it extends or that extend it.

        What was said before would else be missing, or said by another. Which these are is read
        off `requests` of the conversation, the chains of each. Without one, what the store alone
        knows of the session is taken for one conversation.
        """
        found = self._known.get(summary_id)
        if found is None:
            return []
        line = self._line(found, requests)
        for one in line:
            self._forget(one.id)
            if one.used_at is not None:
                self._revoked[one.id] = one
        return line

    def was_revoked(self, chains: Sequence[bytes], owner: str) -> bool:
        """Tell, once, whether a request leaves with bytes again that a summary stood for."""
        fitting = [one.id for one in self._revoked.values() if one.fits(chains, owner)]
        for summary_id in fitting:
            del self._revoked[summary_id]
        return bool(fitting)

    def _line(self, found: Summary, requests: Iterable[Sequence[bytes]]) -> list[Summary]:
        owner = found.owner
        seen = [chains for chains in requests if found.fits(chains, owner)]
        taken = {found.id} | {one.id for chains in seen for one in self.matching(chains, owner)}
        if not seen:
            taken |= {
                one.id
                for one in self._known.values()
                if one.base is None and (one.session, one.owner) == (found.session, found.owner)
            }
        grown = 0
        while len(taken) > grown:
            grown = len(taken)
            taken |= {one.id for one in self._known.values() if one.base in taken}
            taken |= {one.base for one in self._known.values() if one.id in taken and one.base}
        return [one for one in self._known.values() if one.id in taken]

    def _forget(self, summary_id: str) -> None:
        self._heads.pop(summary_id, None)
        self._count(self._known.pop(summary_id), -1)

    def _count(self, summary: Summary, change: int) -> None:
        lengths = self._lengths.setdefault(summary.owner, {})
        lengths[summary.messages] = lengths.get(summary.messages, 0) + change
        if not lengths[summary.messages]:
            del lengths[summary.messages]
