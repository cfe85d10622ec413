"""What lines a conversation shows, and where: found by their hashes, in a few bytes each."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kimi_core.masking.lines import Lines

SourceKind = Literal["result", "call", "user"]

_FIRST_SLOTS = 1 << 10
_STEPS, _CANDIDATES = 24, 6
"""How far back equal lines are looked for: a blank line stands in a thousand places."""
_BACKWARDS = 16
"""How many lines a run may begin before the one by which it was found."""


@dataclass(frozen=True, slots=True)
class Source:
    """A text that lines stand in."""

    kind: SourceKind
    number: int
    """Which result or message it is, from 1; of a call 0."""
    label: str


@dataclass(frozen=True, slots=True)
class Run:
    """Lines of a new text that stand elsewhere in the same order."""

    start: int
    length: int
    at: int
    """Where they stand, in what `Shown` holds."""


class Shown:
    """The lines of a conversation as sent, in their order. An append-only index like zlib's.

    `hashes` holds each line's, 0 for one that is a reference or a cut and between two texts, so
    that no run goes on across it; `_heads` the last line of each slot, `_before` the one before it.
    """

    def __init__(self) -> None:
        self.hashes = array("Q", [0])
        self.numbers = array("i", [-1])
        self._before = array("i", [0])
        self._heads = array("i", bytes(4 * _FIRST_SLOTS))
        self._starts: list[int] = []
        self._sources: list[Source] = []

    def copy(self) -> Shown:
        made = Shown()
        made.hashes = self.hashes[:]
        made.numbers = self.numbers[:]
        made._before = self._before[:]
        made._heads = self._heads[:]
        made._starts = self._starts[:]
        made._sources = self._sources[:]
        return made

    def add(self, source: Source, hashes: Sequence[int], numbers: Sequence[int]) -> None:
        """Show a text; a hash of 0 is a line that stands for others."""
        first = len(self.hashes)
        self._starts.append(first)
        self._sources.append(source)
        self.hashes.extend(hashes)
        self.hashes.append(0)
        self.numbers.extend(numbers)
        self.numbers.append(-1)
        self._before.extend(bytes(len(hashes) + 1))
        if len(self.hashes) > len(self._heads):
            size = len(self._heads)
            while size < len(self.hashes):
                size *= 2
            self._heads = array("i", bytes(4 * size))
            first = 1
        self._link(first)

    def _link(self, first: int) -> None:
        heads, before, mask = self._heads, self._before, len(self._heads) - 1
        for at, known in enumerate(self.hashes[first:], first):
            if known:
                slot = known & mask
                before[at] = heads[slot]
                heads[slot] = at

    def source(self, at: int) -> tuple[Source, int, int]:
        """Return the text that a line stands in, which line it is there, and of how many."""
        index = bisect_right(self._starts, at) - 1
        start = self._starts[index]
        last = index + 1 == len(self._starts)
        end = len(self.hashes) if last else self._starts[index + 1]
        return self._sources[index], at - start, end - start - 1

    def number(self, at: int) -> int:
        return self.numbers[at]

    def known(self, hashes: Sequence[int]) -> list[int]:
        """Return which of these lines are shown, as far as that is found soon."""
        heads, before, shown = self._heads, self._before, self.hashes
        mask = len(heads) - 1
        found: list[int] = []
        for index, hash in enumerate(hashes):
            at, steps = heads[hash & mask], _STEPS
            while at and steps and shown[at] != hash:
                at = before[at]
                steps -= 1
            if at and steps:
                found.append(index)
        return found

    def longest(self, lines: Lines, index: int, floor: int) -> Run | None:
        """Return the longest run with this line in it that begins at `floor` or after."""
        best: Run | None = None
        for at in self._places(lines.hashes[index]):
            run = self._extended(lines, index, at, floor)
            if best is None or run.length > best.length:
                best = run
        return best

    def _places(self, wanted: int) -> list[int]:
        hashes, before = self.hashes, self._before
        at = self._heads[wanted & (len(self._heads) - 1)]
        found: list[int] = []
        for _ in range(_STEPS):
            if not at or len(found) == _CANDIDATES:
                break
            if hashes[at] == wanted:
                found.append(at)
            at = before[at]
        return found

    def _extended(self, lines: Lines, index: int, at: int, floor: int) -> Run:
        hashes, shown = lines.hashes, self.hashes
        here, there = lines.numbers, self.numbers
        is_here, is_there = here[index] >= 0, there[at] >= 0
        shift, offset = there[at] - here[index], at - index
        is_shifted = is_here and is_there

        def continues(a: int) -> bool:
            b = a + offset
            if (here[a] >= 0) != is_here or (there[b] >= 0) != is_there:
                return False
            return not is_shifted or there[b] - here[a] == shift

        first, last = index, index + 1
        lowest, end = max(floor, index - _BACKWARDS), len(hashes)
        while (
            first > lowest
            and hashes[first - 1] == shown[first - 1 + offset]
            and continues(first - 1)
        ):
            first -= 1
        while last < end and hashes[last] == shown[last + offset] and continues(last):
            last += 1
        return Run(first, last - first, first + offset)
