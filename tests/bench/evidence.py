"""What a model had read in a tool result before it used it, and whether it was still there.

An item counts once: where an assistant message is the first to use what a tool result was the
first to bring. Words are paths and identifiers; lines are whole ones, which an agent that edits
retypes. Both are looked for wherever they may stand in the request before that use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_core import tokens
from kimi_core.dialects import OPENAI, Unit
from kimi_core.exchange import Message, Part

_IDENTIFIER = re.compile(r"[^\W\d]\w{3,}")
_RUN = re.compile(r"[\w./-]+")
_LETTER = re.compile(r"[^\W\d_]")
_LINE_NUMBER = re.compile(r"\s*\d+[:|\t→]")
_MIN_LINE = 12


@dataclass(frozen=True, slots=True)
class Reading:
    """One message as sent: its size, and what it shows."""

    tokens: int
    """By o200k, with what a chat template adds."""
    words: frozenset[str]
    lines: frozenset[str]


@dataclass(frozen=True, slots=True)
class Use:
    """What an assistant message is the first to use of what tool results brought."""

    message: int
    words: frozenset[str]
    lines: frozenset[str]


Read = Callable[[bytes], Reading]


class Reader:
    """Reads messages; each but once, since a conversation comes again with every request."""

    def __init__(self) -> None:
        self._known: dict[bytes, Reading] = {}
        self._tokenizer = tokens.tokenizer_for("o200k")
        self._overhead, _ = tokens.message_overhead("gpt-4o")

    def __call__(self, raw: bytes) -> Reading:
        found = self._known.get(raw)
        if found is None:
            if raw.startswith(b"["):  # tool definitions
                size = self._tokenizer.count(raw.decode("utf-8", "replace"))
                found = Reading(size, frozenset(), frozenset())
            else:
                found = self._read(OPENAI.read(Unit("message", raw, ())))
            self._known[raw] = found
        return found

    def _read(self, message: Message) -> Reading:
        words: set[str] = set()
        lines: set[str] = set()
        for part in message.parts:
            for text in _shown(part):
                words |= words_of(text)
                lines |= lines_of(text)
        texts = [text for part in message.parts for text in (part.name, part.text) if text]
        size = sum(self._tokenizer.count_many(texts)) + self._overhead
        return Reading(size, frozenset(words), frozenset(lines))


def words_of(text: str) -> set[str]:
    """Return the identifiers of four characters or more, and the paths."""
    words = set(_IDENTIFIER.findall(text))
    if "/" in text:
        runs = (run.strip("./-") for run in _RUN.findall(text) if "/" in run)
        words |= {run for run in runs if len(run) >= 4 and _LETTER.search(run)}
    return words


def lines_of(text: str) -> set[str]:
    """Return the lines of 12 characters or more, line numbers and outer white space apart."""
    bare = (_LINE_NUMBER.sub("", line, count=1).strip() for line in text.splitlines())
    return {line for line in bare if len(line) >= _MIN_LINE}


def uses(messages: Sequence[bytes], roles: Sequence[str], read: Read) -> list[Use]:
    """Return what the assistant's messages use of the tool results before them.

    Where an agent writes its actions as text, their results come as the user's; so a user's
    message after an assistant's counts as a result in a conversation that has no others.
    """
    has_results = any(role in ("tool", "function") for role in roles)
    seen_words: set[str] = set()
    seen_lines: set[str] = set()
    fresh_words: set[str] = set()
    fresh_lines: set[str] = set()
    found: list[Use] = []
    for index, (raw, role) in enumerate(zip(messages, roles, strict=True)):
        reading = read(raw)
        if role == "assistant":
            used = Use(index, reading.words & fresh_words, reading.lines & fresh_lines)
            found.append(used)
            fresh_words -= used.words
            fresh_lines -= used.lines
        elif role in ("tool", "function") or (not has_results and "assistant" in roles[:index]):
            fresh_words |= reading.words - seen_words
            fresh_lines |= reading.lines - seen_lines
        seen_words |= reading.words
        seen_lines |= reading.lines
    return found


def visible(use: Use, sent: Iterable[bytes], read: Read) -> tuple[int, int]:
    """Return how many of the words and of the lines the request as sent shows."""
    words, lines = set(use.words), set(use.lines)
    for raw in sent:
        if not words and not lines:
            break
        reading = read(raw)
        words -= reading.words
        lines -= reading.lines
    return len(use.words) - len(words), len(use.lines) - len(lines)


def _shown(part: Part) -> Iterator[str]:
    yield part.name
    # Text within JSON stands there with its line breaks and quotes escaped.
    if part.text.lstrip()[:1] in ("{", "["):
        try:
            yield from _strings(json.loads(part.text))
            return
        except (ValueError, RecursionError):
            yield part.text.replace("\\n", "\n").replace('\\"', '"')
    yield part.text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
