"""A conversation turn by turn: what was sent, what it costs, and what of it can be had back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import ne
from typing import Protocol

from bench.evidence import Read, Reader, Use, uses, visible
from bench.traces import Trace
from kimi_core.dialects import OPENAI, Unit
from kimi_core.document import NotJSON, decode, splice_all

CACHED, WRITTEN = 0.1, 1.25
"""What a token costs that the provider's cache holds, and one that it reads and then holds."""

_HASH = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")


class Sender(Protocol):
    """Sends a conversation's requests one after the other."""

    def send(self, trace: Trace, count: int) -> Sequence[bytes]:
        """Return the first `count` messages of a conversation as they leave."""

    def afresh(self, trace: Trace, count: int) -> Sequence[bytes]:
        """Return what another process would send that has seen nothing of the conversation."""

    def original(self, hash: str) -> str | None:
        """Return what the store holds by this hash."""


class PrefixCache:
    """A provider's cache: it holds every prefix of what one conversation has sent."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._held: dict[tuple[int, bytes], int] = {}
        self._prefixes = 0

    def cost(self, messages: Sequence[bytes]) -> tuple[int, float]:
        """Return the tokens of a request and what they cost; the cache holds it afterwards."""
        total, cached, prefix, is_held = 0, 0, 0, True
        for message in messages:
            size = self._read(message).tokens
            total += size
            # A prefix is known by the one before it and its last message, byte for byte.
            following = self._held.get((prefix, message))
            is_held = is_held and following is not None
            if following is None:
                self._prefixes += 1
                following = self._held[prefix, message] = self._prefixes
            prefix = following
            cached += size if is_held else 0
        return total, CACHED * cached + WRITTEN * (total - cached)


@dataclass(slots=True)
class Figures:
    """What the replay of one or more conversations came to."""

    conversations: int = 0
    requests: int = 0
    tokens_before: int = 0
    """Of all requests together, as the client sent them."""
    tokens_sent: int = 0
    cost_before: float = 0.0
    """In tokens at full price."""
    cost_sent: float = 0.0
    words_used: int = 0
    words_visible: int = 0
    lines_used: int = 0
    lines_visible: int = 0
    masked_texts: int = 0
    masked_bytes: int = 0
    recovered_bytes: int = 0
    unstable: int = 0
    """Requests that did not begin with the one before, as sent."""
    differing: int = 0
    """Messages that another process would have sent in another form."""

    def add(self, other: Figures) -> None:
        for field in fields(self):
            summed = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, summed)

    @property
    def tokens_saved(self) -> float:
        return _share(self.tokens_before - self.tokens_sent, self.tokens_before, 0.0)

    @property
    def money_saved(self) -> float:
        return _share(self.cost_before - self.cost_sent, self.cost_before, 0.0)

    @property
    def words(self) -> float:
        return _share(self.words_visible, self.words_used, 1.0)

    @property
    def lines(self) -> float:
        return _share(self.lines_visible, self.lines_used, 1.0)

    @property
    def recovered(self) -> float:
        return _share(self.recovered_bytes, self.masked_bytes, 1.0)


def _share(part: float, whole: float, of_nothing: float) -> float:
    return part / whole if whole else of_nothing


def replay(trace: Trace, sender: Sender) -> Figures:
    """Return the figures of one conversation, each of its requests sent in turn."""
    read = Reader()
    with_us, without_us = PrefixCache(read), PrefixCache(read)
    head = (trace.tools,) if trace.tools else ()
    used = {use.message: use for use in uses(trace.messages, trace.roles, read)}
    figures = Figures(conversations=1)
    before: Sequence[bytes] = ()
    for count in trace.requests():
        given, sent = trace.messages[:count], tuple(sender.send(trace, count))
        figures.requests += 1
        total, cost = without_us.cost(head + given)
        figures.tokens_before += total
        figures.cost_before += cost
        total, cost = with_us.cost(head + sent)
        figures.tokens_sent += total
        figures.cost_sent += cost
        figures.unstable += sent[: len(before)] != before
        _count_evidence(figures, used[count], sent, read)
        before = sent
    if figures.requests:
        again = sender.afresh(trace, count)
        figures.differing = sum(map(ne, before, again)) + abs(len(before) - len(again))
        _count_recovered(figures, given, before, sender)
    return figures


def _count_evidence(figures: Figures, use: Use, sent: Sequence[bytes], read: Read) -> None:
    words, lines = visible(use, sent, read)
    figures.words_used += len(use.words)
    figures.words_visible += words
    figures.lines_used += len(use.lines)
    figures.lines_visible += lines


def _count_recovered(
    figures: Figures, given: Sequence[bytes], sent: Sequence[bytes], sender: Sender
) -> None:
    """Count what is masked in the last request, and what of it the hashes in it give back.

    Earlier requests are its beginnings, or counted as unstable.
    """
    if len(given) != len(sent):
        figures.masked_bytes += sum(map(len, given))
        return
    for raw, left in zip(given, sent, strict=True):
        if raw == left:
            continue
        masked, recovered, texts = restored(raw, left, sender)
        figures.masked_bytes += masked
        figures.recovered_bytes += recovered
        figures.masked_texts += texts


def restored(raw: bytes, sent: bytes, sender: Sender) -> tuple[int, int, int]:
    """Return the masked bytes of a message, those had back by hash, and in how many texts.

    Nothing counts as had back when the message differs in more than its masked texts.
    """
    original, left = (OPENAI.read(Unit("message", each, ())) for each in (raw, sent))
    masked = recovered = texts = 0
    back: dict[tuple[str | int, ...], str] = {}
    for was, part in zip(original.parts, left.parts, strict=False):
        if was.text == part.text:
            continue
        texts += 1
        back[part.path] = was.text
        size = len(was.text.encode("utf-8", "surrogatepass"))
        masked += size
        if any(sender.original(found) == was.text for found in _HASH.findall(part.text)):
            recovered += size
    try:
        is_all = bool(back) and decode(splice_all(sent, back)) == decode(raw)
    except (KeyError, NotJSON):
        is_all = False
    return (masked, recovered, texts) if is_all else (max(masked, len(raw)), 0, texts)
