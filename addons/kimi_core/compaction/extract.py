"""A summary without a model: what can be read off a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kimi_core.compaction.prompt import WORDS
from kimi_core.compaction.rewrite import shortened, words_of
from kimi_core.document import NotJSON, decode
from kimi_core.exchange import Message, Part
from kimi_core.rules_schema import Profile

_CHARS_PER_WORD = 7
_PATH_KEYS = re.compile(
    r"(?:^|_)(?:path|paths|file|files|filename|file_name|notebook)(?:$|_)", re.I
)
_COMMAND_KEYS = frozenset(("command", "cmd", "script", "code", "commands"))
_ERROR = re.compile(
    r"\b[A-Za-z_.]*(?:Error|Exception)\b|\b(?:error|FAILED|fatal|panic)\b:?\s|^Traceback"
    r"|command not found|No such file"
)
_LOOKED_AT_CHARS = 20_000
_LINE_CHARS = 300
_MARK_CHARS = 50
"""What stands for the middle of a text that was shortened takes less than this."""


def extract(messages: Sequence[Message], earlier: str, profile: Profile) -> str:
    """Return what the user asked, files, commands, the last errors and statements, bounded.

    The same for the same messages. `earlier` is the summary of what was before them.
    """
    size = WORDS[profile] * _CHARS_PER_WORD
    sections = [
        ("Summary so far", [earlier], size // 2 + _MARK_CHARS, size // 2),
        ("The user said", [words_of(message) for message in messages], size // 2, size // 4),
        ("Files", _files(messages), size // 4, 200),
        ("Commands", _commands(messages), size // 4, 160),
        ("Latest errors", _errors(messages), size // 5, 200),
        ("The assistant said", _statements(messages), size // 3, size // 6),
    ]
    texts = [_section(*section) for section in sections]
    return "\n\n".join(text for text in texts if text)


def _section(title: str, entries: Sequence[str], size: int, each: int) -> str:
    """Return the newest entries that fit, in their order, each once."""
    chosen: list[str] = []
    for entry in dict.fromkeys(one for one in reversed(entries) if one):
        text = shortened(entry, each)
        if len(text) + 2 > size:
            break
        size -= len(text) + 2
        chosen.append(text)
    if not chosen:
        return ""
    lines = [f"- {text}" for text in reversed(chosen)] if len(chosen) > 1 else chosen
    return f"{title}:\n" + "\n".join(lines)


def _calls(messages: Sequence[Message]) -> Iterator[tuple[Part, Mapping[str, Any]]]:
    for message in messages:
        for part in message.parts:
            if part.kind != "tool_call":
                continue
            try:
                arguments = decode(part.text.encode("utf-8", "surrogatepass"))
            except NotJSON:
                continue
            if isinstance(arguments, dict):
                yield part, arguments


def _files(messages: Sequence[Message]) -> list[str]:
    found: list[str] = []
    for part, arguments in _calls(messages):
        for key, value in arguments.items():
            if _PATH_KEYS.search(key):
                found += [f"{one} ({part.name})" for one in _texts(value) if "\n" not in one]
    return found


def _commands(messages: Sequence[Message]) -> list[str]:
    return [
        one.strip()
        for _, arguments in _calls(messages)
        for key in arguments
        if key.lower() in _COMMAND_KEYS
        for one in [" ".join(_texts(arguments[key]))]
    ]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _errors(messages: Sequence[Message]) -> list[str]:
    return [
        line.strip()
        for message in messages
        for part in message.parts
        if part.kind == "tool_result"
        for line in part.text[-_LOOKED_AT_CHARS:].splitlines()
        if _ERROR.search(line[:_LINE_CHARS])
    ]


def _statements(messages: Sequence[Message]) -> list[str]:
    return [
        part.text.strip()
        for message in messages
        if message.role == "assistant"
        for part in message.parts
        if part.kind == "text"
    ]
