"""The context of a request piece by piece: what it is, and how many tokens each part takes.

Everything is remembered by the piece's own bytes, so that a conversation's next turn
costs only what is new in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from kimi_core import tokens
from kimi_core.dialects import Unit
from kimi_core.document import NotJSON, decode
from kimi_core.exchange import CATEGORIES, Category, Exchange, Message, Role
from kimi_core.memo import Memo

# Clients move cache_control from message to message; the message stays the same one.
_CACHE_CONTROL = re.compile(rb',\s*"cache_control"\s*:\s*\{[^{}]*\}|"cache_control"\s*:\s*\{[^{}]*\}\s*,?')


@dataclass(frozen=True, slots=True)
class Piece:
    """A unit of the context with the digest of its bytes, `cache_control` apart."""

    unit: Unit
    digest: bytes


def pieces(exchange: Exchange) -> list[Piece]:
    """Return the pieces of an exchange's request; worked out once.

    The digest is XXH3 of 128 bits: it recognises, it does not authenticate.
    """
    if exchange.pieces is None:
        exchange.pieces = [piece(unit) for unit in exchange.dialect.units(exchange.document)]
        exchange.messages = sum(one.unit.kind == "message" for one in exchange.pieces)
    return exchange.pieces


def piece(unit: Unit) -> Piece:
    """Return a unit with its digest."""
    return Piece(unit, _digest(unit.raw))


def _digest(raw: object) -> bytes:
    view = memoryview(raw)  # type: ignore[arg-type]
    if b'"cache_control"' in bytes(view):
        return xxhash.xxh3_128_digest(_CACHE_CONTROL.sub(b"", bytes(view)))
    return xxhash.xxh3_128_digest(view)


Counts = tuple[int, ...]
"""Tokens by category, in the order of CATEGORIES."""

_NOTHING: Counts = (0,) * len(CATEGORIES)
_INDEX = {category: index for index, category in enumerate(CATEGORIES)}


class Counter:
    """Counts the tokens of requests and replies, remembering each piece.

    Thread-safe as far as it must be: two threads may count the same piece twice.
    """

    def __init__(self, size: int = 8192) -> None:
        self._counts: Memo[tuple[str, bytes], Counts] = Memo(size)
        self._roles: Memo[bytes, Role] = Memo(size)

    def role(self, dialect: object, piece: Piece) -> Role:
        """Return the role of a message; "user" when it cannot be read."""
        role = self._roles.get(piece.digest)
        if role is None:
            role = _read(dialect, piece.unit).role
            self._roles.put(piece.digest, role)
        return role

    def missing(self, exchange: Exchange, model: str) -> int:
        """Return how many bytes of the request have not been counted for `model` yet."""
        name = tokens.tokenizer_for(model).name
        return sum(
            len(memoryview(piece.unit.raw))
            for piece in pieces(exchange)
            if self._counts.get((name, piece.digest)) is None
        )

    def count(self, exchange: Exchange, model: str) -> dict[Category, int]:
        """Return the request's tokens by category, by `model`'s tokenizer and template."""
        name = tokens.tokenizer_for(model).name
        per_message, per_request = tokens.message_overhead(model)
        total = list(_NOTHING)
        for piece in pieces(exchange):
            counts = self._counts.get((name, piece.digest))
            if counts is None:
                counts = _count(_read(exchange.dialect, piece.unit), piece.unit, model, per_message)
                self._counts.put((name, piece.digest), counts)
            for index, value in enumerate(counts):
                if value:
                    total[index] += value
        total[_INDEX["system"]] += per_request
        return dict(zip(CATEGORIES, total, strict=True))

    def tokens_of(self, exchange: Exchange, model: str, piece: Piece) -> int:
        """Return the tokens of one piece, template included."""
        name = tokens.tokenizer_for(model).name
        counts = self._counts.get((name, piece.digest))
        if counts is None:
            per_message, _ = tokens.message_overhead(model)
            counts = _count(_read(exchange.dialect, piece.unit), piece.unit, model, per_message)
            self._counts.put((name, piece.digest), counts)
        return sum(counts)

    def reply(self, exchange: Exchange, model: str) -> int:
        """Return the tokens of the reply as far as it came: text, reasoning and calls."""
        reply = exchange.reply
        texts = ["".join(reply.text), "".join(reply.reasoning)]
        for call in reply.tool_calls:
            texts += [call.name, call.arguments]
        return sum(tokens.tokenizer_for(model).count_many([text for text in texts if text]))


def _read(dialect: object, unit: Unit) -> Message:
    try:
        return dialect.read(unit)  # type: ignore[attr-defined,no-any-return]
    except NotJSON:
        return Message("user", (), bytes(unit.raw))


def _count(message: Message, unit: Unit, model: str, per_message: int) -> Counts:
    counts = list(_NOTHING)
    if unit.kind == "tools":
        try:
            definitions = decode(unit.raw)
        except NotJSON:
            definitions = []
        if isinstance(definitions, list):
            counts[_INDEX["tools"]] = tokens.count_tool_definitions(model, definitions)
        return tuple(counts)
    texts: list[str] = []
    owners: list[Category] = []
    for part in message.parts:
        if part.kind == "image":
            size = tokens.image_size(part.data) if part.data else None
            counts[_INDEX[part.category]] += tokens.image_tokens(model, *(size or (0, 0)))
        for text in (part.name if part.kind == "tool_call" else "", part.text):
            if text:
                texts.append(text)
                owners.append(part.category)
    tokenizer = tokens.tokenizer_for(model)
    for category, text, count in zip(owners, texts, tokenizer.count_many(texts), strict=True):
        remembered = _memory(text, tokenizer) if category in ("system", "user") else 0
        counts[_INDEX["memory"]] += remembered
        counts[_INDEX[category]] += count - remembered
    owner = message.parts[0].category if message.parts else "user"
    counts[_INDEX[owner]] += per_message
    return tuple(counts)


_MEMORY_TOKENS = 20
_MEMORY = re.compile(
    r"<mcp-memory>.*?</mcp-memory>|@memory\[[^\]]+\]|@recall\([^)]*\)|\[MEMORY\].*?\[/MEMORY\]"
    r"|<mcp-result[^>]*>.*?</mcp-result>|<mcp-tool[^>]*>.*?</mcp-tool>",
    re.IGNORECASE | re.DOTALL,
)
_MEMORY_SIGNS = ("<mcp-", "@memory[", "@recall(", "[memory]")


def _memory(text: str, tokenizer: tokens.Tokenizer) -> int:
    """Return the tokens of memory segments in a text, those of 20 tokens or more."""
    lowered = text.lower()
    if not any(sign in lowered for sign in _MEMORY_SIGNS):
        return 0
    segments = [match.group() for match in _MEMORY.finditer(text)]
    counted: Iterable[int] = tokenizer.count_many(segments)
    return sum(count for count in counted if count >= _MEMORY_TOKENS)


__all__: Sequence[str] = ("Counter", "Piece", "pieces")
