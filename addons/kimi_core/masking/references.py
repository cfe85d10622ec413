"""Runs of lines that the conversation shows already, and the line that stands for each."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kimi_core.masking.lines import Lines
from kimi_core.masking.shown import Shown, Source

Count = Callable[[str], int]

_MIN_LINES = 3
_MIN_TOKENS = 60
"""What a run of fewer lines must come to: one long line is worth it, two short ones are not."""
_MIN_SAVED = 8
_MIN_SAID = 5
"""What stands for a run has so many tokens at least: it has as many words."""
_COUNTED_CHARS = 1_200
"""A longer run saves in any case."""
_MAX_PERIOD = 8
_SHORT = 4
_QUOTED_LINES, _MIN_QUOTED, _QUOTED_CHARS = 6, 6, 32
_RECENT = 3


class Line(NamedTuple):
    """A line as it is sent, and which of the original's lines it stands for."""

    text: str
    hash: int
    """0 when it is no line of the original."""
    number: int
    start: int
    length: int = 1
    is_cut: bool = False
    """Something is left out here, and it says so."""
    is_part: bool = False
    """What is left out is the middle of this line."""
    is_above: bool = False
    """It points at other lines of its own text."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Lines that stand elsewhere in the conversation, or above in their own text."""

    start: int
    length: int
    at: int
    """In `Shown`, or the line of this text."""
    is_above: bool = False
    period: int = 0
    """So many lines before it are repeated, again and again."""


def plain(lines: Lines, start: int = 0, end: int | None = None) -> list[Line]:
    """Return the lines from `start` to `end`, all unless told otherwise, as they are."""
    span = slice(start, end)
    texts, hashes, numbers = lines.texts[span], lines.hashes[span], lines.numbers[span]
    return list(map(Line, texts, hashes, numbers, range(start, len(lines))))


def refer(lines: Lines, shown: Shown, count: Count, *, above: bool = True) -> list[Line] | None:
    """Return the lines with a reference in the place of each run that is shown already.

    None when there is no such run.
    Without `above` none points into the text itself, so that any of its lines may be left out;
    what is repeated then stands in one line with its repetition.
    """
    return _Referrer(lines, shown, count, above).lines()


class _Referrer:
    def __init__(self, lines: Lines, shown: Shown, count: Count, above: bool) -> None:
        self._given = lines
        self._shown = shown
        self._count = count
        self._above = above
        self._visible = bytearray(b"\1") * len(lines)
        self._repeated = {hash for hash, times in Counter(lines.hashes).items() if times > 1}
        self._recent: dict[int, list[int]] = {}
        self._named: set[tuple[str, int, str]] = set()

    def lines(self) -> list[Line] | None:
        every = self._find()
        if not every:
            return None
        made: list[Line] = []
        saved: list[tuple[int, int]] = []  # up to which line, how many stand for more
        at = 0
        for found in every:
            made += plain(self._given, at, found.start)
            at = found.start + found.length
            if found.period and not self._above:
                first = found.start - found.period
                texts = [line.text for line in made[len(made) - found.period :]]
                del made[len(made) - found.period :]
                text = "\n".join([*texts, self._said(found, 0)])
                made.append(Line(text, 0, -1, first, found.period + found.length))
                continue
            place = found.at
            if found.is_above and (before := bisect_right(saved, (found.at, len(self._given)))):
                place -= saved[before - 1][1]
            text = self._said(found, place)
            made.append(Line(text, 0, -1, found.start, found.length, is_above=found.is_above))
            saved.append((at, at - len(made)))
        return [*made, *plain(self._given, at)]

    def _find(self) -> list[_Found]:
        found: list[_Found] = []
        hashes = self._given.hashes
        end = floor = 0
        for index in self._beginnings():
            if index < end:
                continue
            one = self._best(index, floor)
            if one is not None and self._saves(one):
                found.append(one)
                end = floor = one.start + one.length
                self._visible[one.start : end] = bytes(one.length)
                continue
            # A run that saves nothing holds none that does, but perhaps the start of another.
            end = max(index + 1, one.start + one.length if one else 0)
            for seen in range(index, end):
                if hashes[seen] in self._repeated and len(self._given.texts[seen]) >= _SHORT:
                    recent = self._recent.setdefault(hashes[seen], [])
                    recent.append(seen)
                    del recent[:-_RECENT]
        return found

    def _beginnings(self) -> list[int]:
        """Return the lines that stand elsewhere, so that a run may begin there."""
        hashes, known = self._given.hashes, self._shown.known(self._given.hashes)
        if not self._repeated:
            return known
        again = [index for index, hash in enumerate(hashes) if hash in self._repeated]
        return sorted({*known, *again})

    def _best(self, index: int, floor: int) -> _Found | None:
        if len(self._given.texts[index]) < _SHORT:
            # A brace begins no run worth a reference but that of many of them.
            if index > floor and self._given.hashes[index] == self._given.hashes[index - 1]:
                return self._within(index, index - 1)
            return None
        run = self._shown.longest(self._given, index, floor)
        best = _Found(run.start, run.length, run.at) if run else None
        for at in reversed(self._recent.get(self._given.hashes[index], ())):
            one = self._within(index, at)
            if one is not None and (best is None or one.length > best.length):
                best = one
        return best

    def _within(self, index: int, at: int) -> _Found | None:
        """Return the run that begins here and stands at `at` of the same text, if any."""
        hashes, numbers, visible = self._given.hashes, self._given.numbers, self._visible
        if not visible[at]:
            return None
        period, shift = index - at, numbers[at] - numbers[index]
        is_numbered = numbers[index] >= 0
        length = 0
        while (
            index + length < len(hashes)
            and hashes[index + length] == hashes[at + length]
            and (at + length >= index or visible[at + length])
            and (numbers[index + length] >= 0) == is_numbered == (numbers[at + length] >= 0)
            and numbers[at + length] - numbers[index + length] == shift
        ):
            length += 1
        if length > period:
            if period > _MAX_PERIOD:
                length = period
            else:
                return _Found(index, length // period * period, at, True, period)
        return _Found(index, length, at, True) if self._above and length else None

    def _saves(self, found: _Found) -> bool:
        if found.length < _MIN_LINES and not found.period:
            needed = _MIN_TOKENS
        else:
            needed = _MIN_SAVED + _MIN_SAID
        texts = self._given.texts[found.start : found.start + found.length]
        if sum(map(len, texts)) >= _COUNTED_CHARS:
            return True
        text = "\n".join(texts)
        # A text has no more tokens than bytes.
        if len(text) < needed and text.isascii():
            return False
        tokens = self._count(text)
        if tokens < needed:
            return False
        said = self._said(found, found.at, keep=False)
        if said.isascii() and tokens - len(said) >= _MIN_SAVED:
            return True
        return tokens - self._count(said) >= _MIN_SAVED

    def _said(self, found: _Found, place: int, *, keep: bool = True) -> str:
        """Return the line that stands for a run; `place` is that of its source in the same text."""
        given = self._given
        first = given.numbers[found.start]
        head = _span(first, found.length) if first >= 0 else _lines(found.length)
        if found.period:
            times = found.length // found.period
            again = f"{times} times more" if times > 1 else "once more"
            return f"[{head}: the {_lines(found.period, above=True)} {again}]"
        if found.is_above:
            number = given.numbers[found.at]
            if number >= 0:
                return f"[{head}: as {_span(number, found.length)} above]"
            return f"[{head}: as above, from line {place + 1}{self._quoted(found)}]"
        source, line, size = self._shown.source(found.at)
        number = self._shown.number(found.at)
        where = self._where(source, keep)
        if number >= 0:
            if number == first:
                return f"[{head}: as in {where}]"
            return f"[{head}: as {_span(number, found.length)} in {where}]"
        if found.length == size:
            return f"[{head}: all of {where}]"
        return f"[{head}: as in {where}, from line {line + 1}{self._quoted(found)}]"

    def _where(self, source: Source, keep: bool) -> str:
        key = (source.kind, source.number, source.label)
        named = key in self._named
        if keep:
            self._named.add(key)
        if source.kind == "call":
            return f"your {source.label}"
        if source.kind == "user":
            return f"the user's message {source.number}"
        if named or not source.label:
            return f"result {source.number}"
        return f"result {source.number} ({source.label})"

    def _quoted(self, found: _Found) -> str:
        if found.length < _QUOTED_LINES:
            return ""
        text = self._given.bare(found.start).strip()
        if len(text) < _MIN_QUOTED:
            return ""  # nobody finds a brace by what it looks like
        return f' "{text[:_QUOTED_CHARS]}…"' if len(text) > _QUOTED_CHARS else f' "{text}"'


def _span(first: int, length: int) -> str:
    return f"lines {first}-{first + length - 1}" if length > 1 else f"line {first}"


def _lines(count: int, *, above: bool = False) -> str:
    if above:
        return f"{count} lines above" if count > 1 else "line above"
    return f"{count} lines" if count > 1 else "1 line"
