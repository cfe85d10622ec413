"""Where a conversation may be cut: the exchanges that stay word for word, and what stays before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_core.context import Context, read
from kimi_core.dialects import ANTHROPIC, GEMINI, RESPONSES
from kimi_core.document import NotJSON, decode
from kimi_core.exchange import Message

MAX_KEPT_CHARS = 16_000
"""A message of the beginning with more text than this, some 4000 tokens, is summarised too."""

_SEALED = b'"compaction"'


@dataclass(frozen=True, slots=True)
class Head:
    """What of the messages before a cut stays: these, by index, and which one holds the summary.

    Without a `holder` a message that holds it is inserted after those that stay.
    """

    kept: tuple[int, ...]
    holder: int | None


def messages_of(given: Context) -> list[Message]:
    """Return the messages of a request, read."""
    return [read(given.dialect, given.message(index).unit) for index in range(len(given))]


def find(given: Context, messages: Sequence[Message], keep_exchanges: int, after: int = 0) -> int:
    """Return how many messages from the first on may be replaced; 0: none.

    What stays begins with an assistant message and has the last `keep_exchanges` exchanges, more
    of them where a call would be parted from its result. `after` is what a summary replaces
    already: there must be an exchange more.
    """
    if _is_sealed(given, messages):
        return 0
    starts = list(_starts(given, messages))
    spans = list(_spans(given, messages))
    for start in reversed(starts[: max(0, len(starts) - keep_exchanges + 1)]):
        if start <= max(after, starts[0]):
            break
        if not any(first < start <= last for first, last in spans):
            return start
    return 0


def head(given: Context, end: int) -> Head:
    """Return what stays of the first `end` messages: system texts, and how the user began.

    The same for the same messages, whoever asks and whenever.
    """
    kept: list[int] = []
    holder: int | None = None
    begun = False
    for index in range(end):
        message = read(given.dialect, given.message(index).unit)
        begun = begun or message.role == "assistant"
        if message.role == "system":
            # Anthropic takes system messages at certain places only.
            if not begun or given.dialect is not ANTHROPIC:
                kept.append(index)
        elif not begun and message.role == "user" and _is_short(message):
            kept.append(index)
            if can_hold(given, message.raw):
                holder = index
    return Head(tuple(kept), holder)


def can_hold(given: Context, raw: bytes) -> bool:
    """Tell whether a text can be added to a message."""
    value = _value(raw)
    if given.dialect is GEMINI:
        return isinstance(value.get("parts"), list | dict)
    return isinstance(value.get("content"), str | list)


def _is_short(message: Message) -> bool:
    return sum(len(part.text) for part in message.parts) <= MAX_KEPT_CHARS


def _is_sealed(given: Context, messages: Sequence[Message]) -> bool:
    """Tell whether part of the conversation cannot be read: a provider's own, encrypted summary."""
    return given.dialect is RESPONSES and any(
        _SEALED in message.raw and _value(message.raw).get("type") == "compaction"
        for message in messages
    )


def _starts(given: Context, messages: Sequence[Message]) -> Iterator[int]:
    """Yield where an exchange begins: the first of assistant messages that follow one another."""
    answering = False
    for index, message in enumerate(messages):
        if message.role == "assistant":
            if not answering:
                yield index
            answering = True
        elif not (given.dialect is RESPONSES and _is_aside(message)):
            answering = False


def _is_aside(message: Message) -> bool:
    """Tell whether an item is nobody's message, such as a server's list of tools."""
    return all(part.kind == "other" for part in message.parts)


def _spans(given: Context, messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """Yield, for each call that has a result, the indexes of both."""
    calls: dict[tuple[str, str], list[int]] = {}
    for index, message in enumerate(messages):
        found = _item_ids(message) if given.dialect is RESPONSES else _part_ids(message)
        for is_call, key in found:
            if is_call:
                calls.setdefault(key, []).append(index)
            elif calls.get(key):
                yield calls[key].pop(), index


def _part_ids(message: Message) -> Iterator[tuple[bool, tuple[str, str]]]:
    """Yield the calls (True) and results (False) of a message, each with what pairs them."""
    seen: set[str] = set()
    for part in message.parts:
        if part.kind == "tool_result" and part.id:
            if part.id in seen:
                continue  # a further piece of the same result
            seen.add(part.id)
        if part.kind in ("tool_call", "tool_result"):
            # Gemini's calls and OpenAI's old functions may have a name alone.
            yield part.kind == "tool_call", (part.id, "" if part.id else part.name)


def _item_ids(message: Message) -> Iterator[tuple[bool, tuple[str, str]]]:
    item = _value(message.raw)
    if isinstance(id_ := item.get("call_id"), str):
        yield not str(item.get("type", "")).endswith("_output"), (id_, "")


def _value(raw: bytes) -> dict[str, Any]:
    try:
        value = decode(raw)
    except NotJSON:
        return {}
    return value if isinstance(value, dict) else {}
