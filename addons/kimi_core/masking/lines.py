"""The lines of a text as they are compared: without control codes, numbers, trailing space."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

# `  12\t` of cat -n, `12:` of SWE-agent, `12|` and `  12→` of editors' tools.
_NUMBER = re.compile(r"\s{0,12}(\d{1,9})[:|\t→]")
_NUMBER_BELOW = re.compile(rf"\n{_NUMBER.pattern}")
# Colours and cursor movements (CSI), titles (OSC), and what a terminal is switched by.
_CONTROL = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,4096}(?:\x07|\x1b\\)|[()][0-9A-B]|[=>78MDEHc])"
)
_LETTERS = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class Lines:
    """A text line by line."""

    texts: Sequence[str]
    """As they are shown, without trailing white space."""
    hashes: Sequence[int]
    """Of each line without its number; never 0."""
    numbers: Sequence[int]
    """The number that a listing gives the line; -1 where there is none."""

    def __len__(self) -> int:
        return len(self.texts)

    def bare(self, index: int) -> str:
        """Return a line without its number."""
        return bare(self.texts[index], self.numbers[index])


def read(text: str) -> Lines:
    """Return the lines of a text, cleaned of what a terminal would not show."""
    text = clean(text)
    shown = text.split("\n")
    if not _NUMBER.match(text) and not _NUMBER_BELOW.search(text):
        texts = [line.rstrip() for line in shown]
        return Lines(texts, _hashes(texts), [-1] * len(texts))
    numbers, starts = _numbered(shown)
    rests = [line[start:].rstrip() for line, start in zip(shown, starts, strict=True)]
    # An empty line keeps what follows its number.
    texts = [
        line[:start] + rest if start else rest
        for line, start, rest in zip(shown, starts, rests, strict=True)
    ]
    return Lines(texts, _hashes(rests), numbers)


def bare(line: str, number: int) -> str:
    """Return a line without the number that it is known to have, -1 for none."""
    match = _NUMBER.match(line) if number >= 0 else None
    return line[match.end() :] if match else line


def clean(text: str) -> str:
    """Return the text as a terminal shows it: no control codes, no line that was overwritten."""
    if "\x1b" in text:
        text = _CONTROL.sub("", text)
    if "\r" not in text and "\x08" not in text:
        return text
    return "\n".join(map(_settled, text.split("\n")))


def _settled(line: str) -> str:
    """Return what is left of a line that was written over: often the last of many states."""
    pieces = [_rubbed_out(piece) for piece in line.rstrip("\r").split("\r")]
    kept = [
        piece
        for piece, following in itertools.pairwise(pieces)
        # What is about something else was hardly meant to be written over.
        if piece.strip() and _subject(piece) != _subject(following)
    ]
    return "\n".join((*kept, pieces[-1]))


def _subject(piece: str) -> str:
    """Return the first letters: of "Receiving objects: 12 %" and of its next state the same."""
    return "".join(_LETTERS.findall(piece[:200]))[:3]


def _rubbed_out(piece: str) -> str:
    first, *others = piece.split("\x08")
    shown = list(first)
    for other in others:
        del shown[-1:]
        shown += other
    return "".join(shown)


def _numbered(texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the number of each line of a listing, and where the line itself begins.

    A number counts when the line before or after has the one before or after: a time of day or a
    match of grep is no line number.
    """
    matches = [_NUMBER.match(line) for line in texts]
    found = [int(match[1]) if match else -1 for match in matches]
    ends = [match.end() if match else 0 for match in matches]
    last = len(texts) - 1
    numbers = [-1] * len(texts)
    for index, number in enumerate(found):
        if number < 0:
            continue
        before = found[index - 1] if index else -1
        after = found[index + 1] if index < last else -1
        if after == number + 1 or (before == number - 1 and before >= 0):
            numbers[index] = number
        else:
            ends[index] = 0
    return numbers, ends


def _hashes(lines: Sequence[str]) -> list[int]:
    hashed = xxhash.xxh3_64_intdigest
    return [hashed(line.encode("utf-8", "surrogatepass")) or 1 for line in lines]
