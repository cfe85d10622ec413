"""Recorded conversations: in OpenAI's format, tau-bench's and SWE-agent's `.traj` files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_core.document import encode

_ENDINGS = (".json", ".jsonl", ".ndjson", ".traj")
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_KEYS = ("messages", "traj", "history", "conversation", "trajectory")
_SENT_KEYS = (
    "role",
    "content",
    "reasoning_content",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
)


class Unreadable(Exception):
    """A file holds no conversation; the text says why."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One recorded conversation: the JSON texts of its messages, as a client would send them."""

    name: str
    messages: tuple[bytes, ...]
    roles: tuple[str, ...]
    tools: bytes = b""

    def requests(self) -> Iterator[int]:
        """Yield how many messages each request had: all that stood before an assistant's."""
        for index, role in enumerate(self.roles):
            if role == "assistant" and index:
                yield index


@dataclass(frozen=True, slots=True)
class Source:
    """A file of conversations."""

    path: Path
    name: str
    traces: tuple[Trace, ...]
    skipped: int
    """So many things in it were no conversation."""

    @property
    def coding(self) -> bool:
        """Tell whether it holds the runs of a coding agent, as far as its name says so."""
        return ".traj" in self.path.suffixes


def files(paths: Iterable[Path]) -> list[Path]:
    """Return the files to read: those named, and of folders those that may hold conversations."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = (each for each in path.rglob("*") if each.suffix in _ENDINGS)
            found += sorted(each for each in inside if each.is_file())
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def read(path: Path, name: str = "", *, observations: bool = False) -> Source:
    """Return the conversations of a file, under its own name or this one. Raises Unreadable.

    With `observations`, actions that SWE-agent took from a message's text become tool calls, and
    what followed them their results: as the same agent sends them where its model has tools.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from None
    items = _items(text, path.suffix in (".jsonl", ".ndjson"))
    name = name or path.name
    traces: list[Trace] = []
    for number, item in enumerate(items, 1):
        trace = _trace(name if len(items) == 1 else f"{name} #{number}", item, observations)
        if trace is not None:
            traces.append(trace)
    if not traces:
        raise Unreadable("no conversation with an answer in it")
    return Source(path, name, tuple(traces), len(items) - len(traces))


def _items(text: str, by_line: bool) -> list[Any]:
    try:
        if not by_line:
            value = json.loads(text)
            is_many = isinstance(value, list) and not _is_conversation(value)
            return value if is_many else [value]
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"no JSON: {error}") from None


def _trace(name: str, item: Any, observations: bool) -> Trace | None:
    """Return a conversation that has at least one request and its answer, else None."""
    found = _messages(item)
    if found is None:
        return None
    tools = item.get("tools") if isinstance(item, dict) else None
    sent = [_message(message) for message in found]
    if observations:
        _turn_into_results(found, sent)
    trace = Trace(
        name,
        tuple(map(encode, sent)),
        tuple(message["role"] for message in sent),
        encode(tools) if isinstance(tools, list) and tools else b"",
    )
    return trace if any(trace.requests()) else None


def _messages(item: Any) -> list[dict[str, Any]] | None:
    if isinstance(item, dict):
        candidates = [item.get(key) for key in _KEYS]
    else:
        candidates = [item]
    for value in candidates:
        if isinstance(value, str):  # a column of a table
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if isinstance(value, list) and _is_conversation(value):
            return value
    return None


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and each.get("role") in _ROLES for each in value)
    )


def _message(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return a message without what its recorder added to it."""
    message = {key: recorded[key] for key in _SENT_KEYS if recorded.get(key) is not None}
    answered = recorded.get("tool_call_ids")  # SWE-agent
    if message["role"] == "tool" and "tool_call_id" not in message and answered:
        message["tool_call_id"] = answered[0] if isinstance(answered, list) else answered
    message.setdefault("content", None)
    return message


def _turn_into_results(recorded: list[dict[str, Any]], sent: list[dict[str, Any]]) -> None:
    if any(message["role"] == "tool" for message in sent):
        return
    for index in range(1, len(sent)):
        action = recorded[index - 1].get("action")
        if sent[index]["role"] == "user" and sent[index - 1]["role"] == "assistant" and action:
            id = f"call_{index}"
            function = {"name": "run", "arguments": json.dumps({"command": action})}
            sent[index - 1]["tool_calls"] = [{"id": id, "type": "function", "function": function}]
            sent[index] |= {"role": "tool", "tool_call_id": id}
