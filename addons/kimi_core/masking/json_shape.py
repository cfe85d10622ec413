"""JSON results: their keys, first items and counts; or the text that one of them wraps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from kimi_core.document import NotJSON, Path, splice_all

_LIMITS = ((60, 2_000), (30, 1_000), (15, 500), (8, 250), (5, 120), (3, 80), (2, 50), (1, 30))
"""So many items of each list, and characters of each string: the first that fits is taken."""
_KEYS = 4
"""An object is left so many times more keys than a list items."""
_WRAPPED = 0.6
"""The share of a result that a member must hold to be what it is about."""
_MAX_DEPTH = 60


class _Number(str):
    """A number in its own digits."""


def parse(text: str) -> Any:
    """Return the object or list that a text holds, numbers as they are written; else None."""
    bare = text.strip()
    if bare[:1] + bare[-1:] not in ("{}", "[]"):
        return None
    try:
        return json.loads(bare, parse_float=_Number, parse_int=_Number, parse_constant=_Number)
    except (ValueError, RecursionError):
        return None


def wrapped(text: str, value: Any) -> tuple[Path, str] | None:
    """Return the one text of several lines that a result is about, and where it stands."""
    best: tuple[Path, str] | None = None
    for path, member in _strings(value, ()):
        if "\n" in member and (best is None or len(member) > len(best[1])):
            best = path, member
    return best if best and len(best[1]) >= _WRAPPED * len(text) else None


def rewrapped(text: str, path: Path, member: str) -> str | None:
    """Return a result with another text in it, all else in its own bytes."""
    try:
        return splice_all(text.encode(), {path: member}).decode()
    except (KeyError, NotJSON, UnicodeError):
        return None


def shaped(text: str, value: Any, fits: Callable[[str], bool], note: str) -> str | None:
    """Return the JSON text of the value's shape that fits, with the note in it, else None."""
    style = _Style(text)
    for items, chars in _LIMITS:
        try:
            small = _small(value, items, chars, 0)
        except RecursionError:
            return None
        if isinstance(small, dict):
            small["kimi-proxy"] = note
        else:
            small.append(f"kimi-proxy: {note}")
        made = style.dump(small)
        if fits(made):
            return made
    return None


def _strings(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if len(path) > 4:
        return
    if type(value) is str:
        yield path, value
    elif isinstance(value, dict):
        for key, member in value.items():
            yield from _strings(member, (*path, key))
    elif isinstance(value, list):
        for index, member in enumerate(value[:50]):
            yield from _strings(member, (*path, index))


def _small(value: Any, items: int, chars: int, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        return "…"
    if isinstance(value, dict):
        given = list(value.items())
        kept = given[: items * _KEYS]
        made = {key: _small(member, items, chars, depth + 1) for key, member in kept}
        if len(given) > len(kept):
            made["…"] = f"{len(given) - len(kept)} more keys"
        return made
    if isinstance(value, list):
        listed = [_small(member, items, chars, depth + 1) for member in value[:items]]
        if len(value) > items:
            listed.append(f"… {len(value) - items} more")
        return listed
    if type(value) is str and len(value) > chars + 30:
        head = chars * 2 // 3
        return f"{value[:head]}[… {len(value) - chars} characters cut …]{value[head - chars :]}"
    return value


class _Style:
    """How a JSON text is laid out."""

    def __init__(self, text: str) -> None:
        head = text[:2_000]
        _, newline, rest = head.partition("\n")
        self._indent = (len(rest) - len(rest.lstrip(" "))) if newline else 0
        self._lines = bool(newline)
        self._comma = ", " if not newline and ", " in head and '": ' in head else ","
        self._colon = ": " if newline or '": ' in head else ":"
        self._ascii = text.isascii() and "\\u" in text

    def dump(self, value: Any) -> str:
        return "".join(self._pieces(value, 0))

    def _pieces(self, value: Any, depth: int) -> Iterator[str]:
        if isinstance(value, _Number):
            yield str(value)
        elif isinstance(value, dict) and value:
            yield "{"
            for index, (key, member) in enumerate(value.items()):
                yield (self._comma if index else "") + self._break(depth + 1)
                yield json.dumps(key, ensure_ascii=self._ascii) + self._colon
                yield from self._pieces(member, depth + 1)
            yield self._break(depth) + "}"
        elif isinstance(value, list) and value:
            yield "["
            for index, member in enumerate(value):
                yield (self._comma if index else "") + self._break(depth + 1)
                yield from self._pieces(member, depth + 1)
            yield self._break(depth) + "]"
        else:
            yield json.dumps(value, ensure_ascii=self._ascii)

    def _break(self, depth: int) -> str:
        return "\n" + " " * (self._indent * depth) if self._lines else ""
