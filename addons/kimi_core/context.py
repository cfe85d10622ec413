"""The context of a request piece by piece: what it is, and how many tokens each part takes.

Everything is remembered by the piece's own bytes, so that a conversation's next turn
costs only what is new in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from operator import add
from typing import NamedTuple

import xxhash
from msgspec import Raw

from kimi_core import tokens
from kimi_core.dialects import Dialect, Unit
from kimi_core.document import Document, NotJSON, decode
from kimi_core.exchange import CATEGORIES, Category, Exchange, Message, Reply, Role
from kimi_core.memo import Memo

# Clients move cache_control from message to message; the message stays the same one.
_CACHE_CONTROL = re.compile(
    rb',\s*"cache_control"\s*:\s*(?:\{[^{}]*\}|null)'
    rb'|"cache_control"\s*:\s*(?:\{[^{}]*\}|null)\s*,?'
)
# To hold a cache_control a text that stood alone becomes a list of one block, as in Claude Code.
_ONE_TEXT = re.compile(
    rb'"content"\s*:\s*\[\s*\{\s*"type"\s*:\s*"text"\s*,\s*"text"\s*:\s*'
    rb'("[^"\\]*+(?:\\.[^"\\]*+)*+")\s*\}\s*\]'
)


class Piece(NamedTuple):
    """A unit of the context, and the digest by which it is recognised."""

    unit: Unit
    digest: bytes


class Context:
    """What a request gives the model to read, recognised but not yet read.

    Digests are XXH3 of 128 bits: they recognise, they do not authenticate. `plain` are
    those of the messages' own bytes, `digests` those with `cache_control` apart; `chains[i]`
    is that of all messages up to the i-th. Nothing here is done per message that need not
    be: a long conversation comes again with every turn.
    """

    def __init__(self, dialect: Dialect, document: Document) -> None:
        self.dialect = dialect
        self.heads = [piece(unit) for unit in dialect.heads(document)]
        self._messages = dialect.messages(document)
        raws = self._messages.raws
        self.plain = list(map(xxhash.xxh3_128_digest, raws))
        self.digests = [
            known or _new_digest(key, bytes(raw))
            for known, key, raw in zip(_digests.get_many(self.plain), self.plain, raws, strict=True)
        ]
        self.chains = _chains(self.digests)

    def replaced(self, messages: Mapping[int, bytes]) -> Context:
        """Return the context with other JSON texts in the place of these messages."""
        made = copy(self)
        raws = list(self._messages.raws)
        made.plain, made.digests = list(self.plain), list(self.digests)
        for index, raw in messages.items():
            raws[index] = raw
            plain = made.plain[index] = xxhash.xxh3_128_digest(raw)
            made.digests[index] = _digests.get(plain) or _new_digest(plain, raw)
        made._messages = self._messages._replace(raws=raws)
        made.chains = _chains(made.digests)
        return made

    def with_heads(self, document: Document) -> Context:
        """Return the context with what stands before the messages in the document now."""
        made = copy(self)
        made.heads = [piece(unit) for unit in self.dialect.heads(document)]
        return made

    def put(self, document: Document, messages: Mapping[int, bytes]) -> None:
        """Put other JSON texts in the place of these messages of the request's document."""
        path = self._messages.path
        if self._messages.listed and len(path) == 1:
            document.set_elements(str(path[0]), messages)
        else:
            for index, raw in messages.items():
                document.set_raw(self.message(index).unit.path, raw)

    def raw(self, index: int) -> bytes | Raw:
        """Return the JSON text of one message."""
        return self._messages.raws[index]

    def message(self, index: int) -> Piece:
        """Return one message."""
        return Piece(self._messages.unit(index), self.digests[index])

    def __len__(self) -> int:
        return len(self.chains)


def _chains(digests: Iterable[bytes]) -> list[bytes]:
    hasher = xxhash.xxh3_128()
    chains: list[bytes] = []
    for digest in digests:
        hasher.update(digest)
        chains.append(hasher.digest())
    return chains


def context(exchange: Exchange) -> Context:
    """Return the context of an exchange's request; worked out once."""
    if exchange.context is None:
        exchange.context = Context(exchange.dialect, exchange.document)
        exchange.messages = len(exchange.context)
    return exchange.context


def sent(exchange: Exchange) -> Context:
    """Return the context that leaves: the client's, or what an editor made of it."""
    return exchange.sent or context(exchange)


def piece(unit: Unit) -> Piece:
    """Return a unit with its digest."""
    return Piece(unit, _digest(unit.raw))


_digests: Memo[bytes, bytes] = Memo(2048)


def _digest(raw: bytes | Raw) -> bytes:
    plain = xxhash.xxh3_128_digest(raw)
    return _digests.get(plain) or _new_digest(plain, bytes(raw))


def _new_digest(plain: bytes, text: bytes) -> bytes:
    if b'"cache_control"' in text:
        text = _CACHE_CONTROL.sub(b"", text)
    digest = xxhash.xxh3_128_digest(_ONE_TEXT.sub(rb'"content":\1', text))
    _digests.put(plain, digest)
    return digest


Counts = tuple[int, ...]
"""Tokens by category, in the order of CATEGORIES."""

_NOTHING: Counts = (0,) * len(CATEGORIES)
_INDEX = {category: index for index, category in enumerate(CATEGORIES)}


class Counter:
    """Counts the tokens of requests and replies, remembering each piece and each prefix.

    Thread-safe as far as it must be: two threads may count the same piece twice.
    """

    def __init__(self, size: int = 1024) -> None:
        self._counts: Memo[tuple[str, bytes], Counts] = Memo(size)
        self._prefixes: Memo[tuple[str, bytes], Counts] = Memo(size)
        self._roles: Memo[tuple[str, bytes], Role] = Memo(size)

    def role(self, dialect: Dialect, piece: Piece) -> Role:
        """Return the role of a message; "user" when it cannot be read."""
        key = (dialect.name, piece.digest)
        role = self._roles.get(key)
        if role is None:
            role = read(dialect, piece.unit).role
            self._roles.put(key, role)
        return role

    def missing(self, exchange: Exchange, model: str) -> int:
        """Return how many bytes of the request have not been counted for `model` yet."""
        known = sent(exchange)
        name = _reader(known.dialect, model)
        _, first = self._known(name, known)
        rest = known.heads + [known.message(index) for index in range(first, len(known))]
        return sum(
            len(memoryview(piece.unit.raw))
            for piece in rest
            if self._counts.get((f"{name} {piece.unit.kind}", piece.digest)) is None
        )

    def count(self, exchange: Exchange, model: str) -> dict[Category, int]:
        """Return the request's tokens by category, by `model`'s tokenizer and template."""
        return self.count_in(sent(exchange), model)

    def count_in(self, given: Context, model: str) -> dict[Category, int]:
        """Return the same of a context.

        The sums of every prefix of a conversation are remembered, so only what follows the
        longest known one is looked at.
        """
        _, per_request = tokens.message_overhead(model)
        name = _reader(given.dialect, model)
        sums, first = self._known(name, given)
        for index in range(first, len(given)):
            counts = self._piece(given.dialect, model, name, given.message(index))
            sums = tuple(map(add, sums, counts))
            self._prefixes.put((name, given.chains[index]), sums)
        for piece in given.heads:
            sums = tuple(map(add, sums, self._piece(given.dialect, model, name, piece)))
        total = dict(zip(CATEGORIES, sums, strict=True))
        total["system"] += per_request
        return total

    def tokens_of(self, exchange: Exchange, model: str, piece: Piece) -> int:
        """Return the tokens of one piece, template included."""
        name = _reader(exchange.dialect, model)
        return sum(self._piece(exchange.dialect, model, name, piece))

    def _known(self, name: str, given: Context) -> tuple[Counts, int]:
        """Return the sums of the longest prefix of messages that is known, and its length."""
        for index in range(len(given) - 1, -1, -1):
            if (sums := self._prefixes.get((name, given.chains[index]))) is not None:
                return sums, index + 1
        return _NOTHING, 0

    def _piece(self, dialect: Dialect, model: str, name: str, piece: Piece) -> Counts:
        # The same bytes count as another thing where they are a system text.
        key = (f"{name} {piece.unit.kind}", piece.digest)
        counts = self._counts.get(key)
        if counts is None:
            per_message, _ = tokens.message_overhead(model)
            counts = _count(read(dialect, piece.unit), piece.unit, model, per_message)
            self._counts.put(key, counts)
        return counts

    def reply(self, reply: Reply, model: str) -> int:
        """Return the tokens of a reply as far as it came: text, reasoning and calls."""
        texts = ["".join(reply.text), "".join(reply.reasoning)]
        for call in reply.tool_calls:
            texts += [call.name, call.arguments]
        return sum(tokens.tokenizer_for(model).count_many([text for text in texts if text]))


def _reader(dialect: Dialect, model: str) -> str:
    """Return what a count depends on besides the bytes; images cost what the model says."""
    return f"{dialect.name} {model}"


def read(dialect: Dialect, unit: Unit) -> Message:
    """Return a unit as a message; one that cannot be read has no parts."""
    try:
        return dialect.read(unit)
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
        remembered = min(remembered, count)  # a segment by itself may take a token more
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


__all__: Sequence[str] = ("Context", "Counter", "Piece", "context", "piece", "sent")
