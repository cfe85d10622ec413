"""The piece of a text that a recall asks for: some of its lines, or those that match."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import regex

from kimi_core import tokens

MAX_TOKENS = 4000
"""How much of a text one recall brings, by o200k."""
SEARCH_S = 0.5
"""How long a pattern may take: who writes one may write one that never ends."""
MAX_PATTERN = 500

_MAX_CHARS = MAX_TOKENS * 12
_AROUND = 200


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines of a text, from 1; `to_line` is one of them."""

    from_line: int = 1
    to_line: int | None = None
    from_character: int = 1
    """Where in the first line to begin: some lines are too long to be shown at once."""
    pattern: str = ""


def excerpt(text: str, wanted: Wanted) -> str:
    """Return what is wanted of a text, as far as it fits, and how to ask for what does not."""
    lines = text.split("\n")
    if len(lines) > 1 and not lines[-1]:
        del lines[-1]
    first, last = max(1, wanted.from_line), min(wanted.to_line or len(lines), len(lines))
    if first > len(lines):
        return f"The text has {_lines(len(lines))}; there is no line {first}."
    if last < first:
        return f"to_line {wanted.to_line} is before from_line {first}."
    if wanted.pattern:
        return _matches(lines, first, last, wanted.pattern)
    return _range(lines, first, last, max(1, wanted.from_character))


def _range(lines: list[str], first: int, last: int, character: int) -> str:
    begun = lines[first - 1][character - 1 :]
    if character > 1 and not begun:
        return f"Line {first} has {len(lines[first - 1])} characters."
    pieces, size = [begun], len(begun)
    for line in lines[first:last]:
        if size > _MAX_CHARS:
            break
        pieces.append(line)
        size += len(line) + 1
    whole = "\n".join(pieces)
    shown = _fitting(whole, MAX_TOKENS)
    if cut := len(shown) < len(whole):
        # At a line's end, unless that throws most of it away.
        end = shown.rfind("\n")
        if whole[len(shown)] == "\n":
            shown += "\n"
        elif end > len(shown) // 2:
            shown = shown[: end + 1]
    cut = cut or len(pieces) <= last - first
    if not cut:
        return f"{_heading(lines, first, last, character)}\n{shown}"
    number = first + shown.count("\n")
    at_start = shown.endswith("\n")
    following = 1 if at_start else len(shown) - shown.rfind("\n")
    if number == first:
        following += character - 1
    end = number - 1 if at_start else number
    rest = f"from_line {number}" + ("" if at_start else f" and from_character {following}")
    ending = shown.removesuffix("\n")
    return (
        f"{_heading(lines, first, end, character)}\n{ending}\n"
        f"[kimi-proxy: this is as much as fits; for more call again with {rest}]"
    )


def _heading(lines: list[str], first: int, last: int, character: int) -> str:
    since = f", from character {character}" if character > 1 else ""
    return f"{_which(first, last).capitalize()} of {len(lines)}{since}:"


def _matches(lines: list[str], first: int, last: int, pattern: str) -> str:
    if len(pattern) > MAX_PATTERN:
        return f"The pattern is longer than {MAX_PATTERN} characters."
    found: list[str] = []
    left = MAX_TOKENS
    try:
        for number, line in _search(lines, first, last, pattern):
            found.append(f"{number}: {line}")
            left -= _count(found[-1]) + 1
            if left < 0:
                found[-1] = (
                    "[kimi-proxy: this is as much as fits; for more call again with "
                    f"from_line {number}]"
                )
                break
    except TimeoutError:
        found.append(
            "[kimi-proxy: the pattern takes too long; the rest was not searched. Use plain text.]"
        )
    if found:
        return "\n".join(found)
    return f"No line matches {pattern!r} ({_which(first, last)} of {len(lines)})."


def _search(lines: list[str], first: int, last: int, pattern: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that match, with their numbers. Raises TimeoutError.

    A pattern may be meant as it stands: a line matches that has it so, or as an expression.
    """
    literal = regex.compile(regex.escape(pattern), regex.IGNORECASE)
    try:
        meant = regex.compile(pattern, regex.IGNORECASE)
    except (regex.error, RecursionError, OverflowError):
        meant = literal
    until = time.monotonic() + SEARCH_S
    for number in range(first, last + 1):
        line = lines[number - 1]
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        # `concurrent`: without the GIL, so that a slow search holds nobody up.
        found = literal.search(line, concurrent=True, timeout=left)
        if found is None and meant is not literal:
            found = meant.search(line, concurrent=True, timeout=left)
        if found is not None:
            yield number, _around(line, found.start(), found.end())


def _around(line: str, start: int, end: int) -> str:
    """Return a line, or of a long one what stands round a match."""
    if len(line) <= 3 * _AROUND:
        return line
    start, end = max(0, start - _AROUND), min(len(line), end + _AROUND, start + 5 * _AROUND)
    return f"(from character {start + 1} of {len(line)}) {line[start:end]}"


def _fitting(text: str, limit: int) -> str:
    """Return the longest beginning, or one not much shorter, that has so many tokens."""
    shown = text[:_MAX_CHARS]
    while (count := _count(shown)) > limit:
        shown = shown[: min(len(shown) - 1, len(shown) * limit // count)]
    return shown


def _count(text: str) -> int:
    return tokens.tokenizer_for("o200k").count(text)


def _which(first: int, last: int) -> str:
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _lines(count: int) -> str:
    return f"{count} line" if count == 1 else f"{count} lines"
