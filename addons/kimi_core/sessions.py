"""Which session an exchange belongs to: the conversation that a person would name."""

from __future__ import annotations

import hashlib
import logging
import secrets
from dataclasses import dataclass
from typing import Literal

from kimi_core.context import Context, Counter, context
from kimi_core.exchange import Exchange
from kimi_core.memo import Memo
from kimi_core.store import Store, StoreError

logger = logging.getLogger(__name__)

Source = Literal["header", "client", "conversation", "key"]

_REMEMBERED = 4096
_REMEMBERED_SESSIONS = 1024


@dataclass(slots=True)
class _Main:
    """The conversation that a session is about; others in it are side calls."""

    root: bytes
    tools: bytes


class Sessions:
    """Assigns sessions, and knows again after a restart what the store remembers.

    In this order: the `x-kimi-session` header; the client's own id; the conversation
    whose messages the request continues; the hash of the client's key.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._conversations: Memo[bytes, str] = Memo(_REMEMBERED)
        self._main: Memo[str, _Main] = Memo(_REMEMBERED_SESSIONS)
        self._told: Memo[str, tuple[Source, str | None]] = Memo(_REMEMBERED_SESSIONS)
        self._counter = Counter()
        try:
            known = list(store.conversations(_REMEMBERED))
        except StoreError as error:
            # A new database has nothing to read yet; a broken one says so by itself.
            logger.debug("no conversations remembered: %s", type(error).__name__)
            known = []
        for row in reversed(known):
            self._conversations.put(bytes.fromhex(row["digest"]), row["session_id"])

    def assign(self, exchange: Exchange) -> None:
        """Set the exchange's `session_id` and `kind`."""
        exchange.session_id, source = self._find(exchange)
        exchange.kind = self._kind(exchange)
        project = exchange.headers.get("x-kimi-project")
        told = (source, project)
        if self._told.get(exchange.session_id) != told:
            # What else a session shows follows from the rows of its exchanges.
            self._told.put(exchange.session_id, told)
            self._store.touch_session(
                exchange.session_id,
                source=source,
                key_hash=exchange.client_key_hash or None,
                project=project,
                client=exchange.client or None,
            )

    def look(self, exchange: Exchange) -> None:
        """Do in a thread what `assign` would do to a large request on the event loop."""
        given = context(exchange)
        for index in range(min(len(given), 2)):
            self._counter.role(given.dialect, given.message(index))

    def _find(self, exchange: Exchange) -> tuple[str, Source]:
        if named := _printable(exchange.headers.get("x-kimi-session", "")):
            return named, "header"
        if known := exchange.dialect.client_session(exchange.document):
            return hashlib.sha256(known.encode("utf-8", "replace")).hexdigest()[:16], "client"
        if len(given := context(exchange)):
            return self._conversation(exchange, given), "conversation"
        return exchange.client_key_hash or "anonymous", "key"

    def _conversation(self, exchange: Exchange, given: Context) -> str:
        owner = exchange.client_key_hash.encode()
        chain = owner + given.chains[-1]
        session = self._conversations.get(chain)
        if session is None:
            session = self._continued(given, owner) or secrets.token_hex(8)
            self._conversations.put(chain, session)
            self._store.add_conversation(chain.hex(), session, exchange.client_key_hash)
        return session

    def _continued(self, given: Context, owner: bytes) -> str | None:
        """Return the session of the longest earlier request that this one goes on from.

        It goes on when what follows that request's messages is the model's answer.
        """
        for index in range(len(given) - 2, -1, -1):
            session = self._conversations.get(owner + given.chains[index])
            if session is not None:
                role = self._counter.role(given.dialect, given.message(index + 1))
                return session if role == "assistant" else None
        return None

    def _kind(self, exchange: Exchange) -> Literal["turn", "background", "subagent"]:
        given = context(exchange)
        tools = next((head.digest for head in given.heads if head.unit.kind == "tools"), b"")
        root = b""
        for index in range(len(given)):
            if self._counter.role(given.dialect, given.message(index)) != "system":
                root = given.digests[index]
                break
        main = self._main.get(exchange.session_id)
        if main is None or (tools and not main.tools):
            # The first request with tools is what the session is about; titles come without.
            self._main.put(exchange.session_id, _Main(root, tools))
            return "turn"
        if root == main.root or (tools and tools == main.tools):
            return "turn"
        return "subagent" if tools else "background"


def _printable(name: str) -> str:
    return "".join(char for char in name.strip() if char.isprintable())[:200]
