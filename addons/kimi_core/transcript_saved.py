"""What was left out of a request, in the words of its transcript."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from kimi_core.exchange import Message, Part, Saving
from kimi_core.masking.marks import kind_of
from kimi_core.tokens import tokenizer_for

_MARKS = {"reference": "≡ ", "cut": "✂ ", None: ""}
_EARLIER = "earlier"
"""The kind of what stands for several, where a list would have become too long."""
_MAX_LABEL = 60
_MAX_NUMBER = 1 << 53


@dataclass(frozen=True, slots=True)
class Left:
    """What was left out of one message of a request."""

    message: int
    """From 1."""
    kind: str
    tokens: int
    """By o200k."""
    hash: str


def dumped(savings: Iterable[Saving], limit: int) -> str:
    """Return what `loaded` reads: JSON text of `limit` bytes at most.

    What does not fit of a long list's beginning is summed.
    """
    found = [
        Left(saving.message + 1, saving.kind, saving.tokens, saving.hash) for saving in savings
    ]
    said: list[str] = []
    # What the list's brackets and the sum may take.
    room = limit - 100
    while found and room > len(one := _json(found[-1])) + 2:
        said.append(one)
        room -= len(one) + 2
        found.pop()
    if found:
        said.append(_json(Left(0, _EARLIER, sum(one.tokens for one in found), "")))
    return f"[{', '.join(reversed(said))}]"


def _json(one: Left) -> str:
    return json.dumps(
        {"message": one.message, "kind": one.kind, "tokens": one.tokens, "hash": one.hash}
    )


def loaded(value: object) -> list[Left]:
    """Return what a flow's `kimi.saved` says.

    What is anything else, in a file of flows for instance, is left out.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        return []
    return [
        Left(one["message"], one["kind"], one["tokens"], one["hash"])
        for one in found
        if _is_left(one)
    ]


def _is_left(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    numbers = (value.get("message"), value.get("tokens"))
    words = (value.get("kind"), value.get("hash"))
    return all(map(_is_number, numbers)) and all(isinstance(word, str) for word in words)


def _is_number(value: object) -> bool:
    # By type, since true is an int.
    return type(value) is int and 0 <= value < _MAX_NUMBER


def by_message(saved: Iterable[Left]) -> dict[int, list[Left]]:
    """Return what was left out of each message, by its number."""
    found: dict[int, list[Left]] = {}
    for one in saved:
        found.setdefault(one.message, []).append(one)
    return found


def marked(text: str) -> str:
    """Return a masked text with a mark before each line that stands for what was left out."""
    return "\n".join(_MARKS[kind_of(line)] + line for line in text.split("\n"))


def lines(
    saved: Collection[Left], messages: Mapping[int, Message], *, measured: bool
) -> Iterator[str]:
    """Yield the list of what was left out of `messages`, which are given by their numbers.

    When `measured`, with the size of each text before and after.
    """
    total = sum(one.tokens for one in saved)
    head = f"saved · {total:,} tokens of o200k not sent"
    yield f"── {head} {'─' * max(3, 60 - len(head))}"
    labels = _labels(messages.values())
    for number, one in enumerate(saved, 1):
        part = _part(messages.get(one.message), one.hash)
        said = [f"message {one.message}", _line(one.kind)]
        if one.kind == _EARLIER:
            said = ["messages before these"]
        if part is not None and measured:
            after = tokenizer_for("o200k").count(part.text)
            said.append(f"{after + one.tokens:,} → {after:,} tokens")
        else:
            said.append(f"{one.tokens:,} tokens left out")
        if one.hash:
            said.append(_line(one.hash))
        if part is not None and (label := labels.get(part.id) or part.name):
            said.append(_line(label))
        yield f"{number}. {' · '.join(said)}"


def _part(message: Message | None, hash: str) -> Part | None:
    """Return the text that a mask's hash stands in."""
    parts = message.parts if message is not None and hash else ()
    return next((part for part in parts if hash in part.text), None)


def _labels(messages: Iterable[Message]) -> dict[str, str]:
    """Return the calls of a conversation in a few words, by their ids."""
    return {
        part.id: f"{part.name} {_first_word(part.text)}".strip()
        for message in messages
        for part in message.parts
        if part.kind == "tool_call" and part.id
    }


def _first_word(arguments: str) -> str:
    """Return the first text among a call's arguments."""
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        return ""
    values = given.values() if isinstance(given, dict) else ()
    return next((value for value in values if isinstance(value, str)), "")


def _line(text: str) -> str:
    """Return a text of somebody else's as one short line."""
    plain = " ".join(text.split())
    return plain if len(plain) <= _MAX_LABEL else f"{plain[: _MAX_LABEL - 1]}…"
