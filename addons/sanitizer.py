"""Verbose tool output, pointed at where it is already shown and cut where it is too long."""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mitmproxy import command, ctx, exceptions, http
from mitmproxy.addonmanager import Loader

from kimi_core import context, flows, recall, tokens
from kimi_core.api import ApiError, Asked, Endpoint
from kimi_core.context import Context
from kimi_core.exchange import Exchange, Saving
from kimi_core.flows import Rank
from kimi_core.masking.policy import Policy
from kimi_core.masking.requests import Mask, Masker, Plan, originals
from kimi_core.memo import Memo
from kimi_core.store import StoreError

logger = logging.getLogger(__name__)

_INLINE_BYTES = 8_192
"""Text up to this size is decided on at once: that takes less than handing it to a thread."""
_SAFE_S = 3600.0
"""How long a committed original is known to be there: the store drops none used so lately."""
_REMEMBERED = 8192
_MAX_LISTED = 500


class _Ready(NamedTuple):
    """A plan for one request, and what it takes to put it into effect."""

    given: Context
    plan: Plan
    changed: Mapping[int, bytes]
    """The messages as they leave."""
    unsafe: Sequence[Mask]
    """Whose originals are not known to be on disk."""
    texts: Mapping[str, str]
    """These originals, by hash."""


class Sanitizer:
    """Masks tool output in requests: lines already shown become a reference, the rest is cut.

    A message is decided on when it is first seen, and leaves in that form ever after, so that
    the provider's cache keeps hitting. Its original is in the store, on disk, before the request
    leaves; when it cannot be kept it is not hidden.
    """

    def __init__(self) -> None:
        self._masker = Masker()
        self._safe: Memo[tuple[str, str], float] = Memo(_REMEMBERED)
        self._opened = 0
        self._sent: Memo[str, str] = Memo(512)
        self._flush: set[str] = set()
        self._loaded = False
        self._said: object = None
        self._warned = False

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)
        loader.add_option(
            "sanitizer_mask",
            bool,
            True,
            "Mask tool output that is new; false sends it as it is, and what was masked stays so.",
        )

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def running(self) -> None:
        threading.Thread(target=tokens.warm, args=(["o200k"],), daemon=True).start()
        self._remember()

    def done(self) -> Awaitable[None]:
        return flows.leave(self)

    @flows.step(Rank.MASK)
    @flows.fail_open
    def request(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        exchange = flows.exchange(flow)
        if exchange is None or flow.response or flow.error:
            return None
        if flows.bypassed(flow):
            exchange.rewrite = "bypass"
            return None
        self._remember()
        if flows.suite().rules.sanitizer.recall:
            # Offered from the first request on: a tool that comes later voids the cache.
            recall.prepare(exchange, self._lookup(exchange.client_key_hash))
        flows.session_id(flow)  # by the messages as the client sent them
        given, owner = context.sent(exchange), exchange.client_key_hash
        if not len(given):
            return None
        new, is_known = self._masker.unread(given, owner)
        if (
            new > _INLINE_BYTES
            or (new and not tokens.tokenizer_for("o200k").loaded)
            # What another process decided is in the store.
            or (len(given) > 2 and not is_known)
            or self._flushes(exchange)
        ):
            return self._slowly(flow, exchange, given)
        return self._settle(flow, exchange, self._plan(exchange, given))

    @flows.fail_open
    async def _slowly(self, flow: http.HTTPFlow, exchange: Exchange, given: Context) -> None:
        ready = await asyncio.to_thread(self._plan, exchange, given, look_up=True)
        pending = self._settle(flow, exchange, ready)
        if pending is not None:
            await pending

    def _flushes(self, exchange: Exchange) -> bool:
        """Tell whether a session is to be decided on anew; a side call of it is not meant."""
        is_turn = exchange.operation == "chat" and exchange.kind == "turn"
        return is_turn and exchange.session_id in self._flush

    def _plan(self, exchange: Exchange, given: Context, *, look_up: bool = False) -> _Ready:
        owner, policy, store = exchange.client_key_hash, self._policy(), flows.suite().store
        stored = self._stored if look_up else None
        plan = self._masker.plan(given, owner, policy, stored)
        if self._flushes(exchange):
            self._flush.discard(exchange.session_id)
            before = plan
            store.forget_decisions(self._masker.digests(given, owner))
            plan = self._masker.again(given, owner, policy)
            if _forms(before) != _forms(plan):
                exchange.rewrite = "flush"
        return self._ready(given, owner, plan)

    def _ready(self, given: Context, owner: str, plan: Plan) -> _Ready:
        """Return a plan with all that takes time: the new texts, and what is not yet safe."""
        if self._opened != (opened := flows.suite().store.openings):
            # Another file may have taken the place of the one that the originals were in.
            self._opened, self._safe = opened, Memo(_REMEMBERED)
        now = time.time()
        unsafe = [
            mask
            for mask in plan.masks
            if (known := self._safe.get((owner, mask.hash))) is None
            or not now - _SAFE_S <= known <= now
        ]
        texts = originals(given, unsafe) if unsafe else {}
        return _Ready(given, plan, self._masker.changed(given, plan), unsafe, texts)

    def _stored(self, digests: Sequence[bytes]) -> Mapping[bytes, str]:
        try:
            return flows.suite().store.decisions_of(digests)
        except StoreError as error:
            logger.debug("no decisions known: %s", type(error).__name__)
            return {}

    def _policy(self) -> Policy | None:
        """Return how messages are treated that nobody has seen before."""
        # What the store cannot keep must not be hidden.
        if not ctx.options.sanitizer_mask or flows.suite().store.state != "ok":
            return None
        said = flows.suite().rules.sanitizer
        return Policy(threshold=said.threshold, keep=said.keep, references=said.references)

    def _settle(
        self, flow: http.HTTPFlow, exchange: Exchange, ready: _Ready
    ) -> Awaitable[None] | None:
        if ready.unsafe:
            return self._commit(flow, exchange, ready)
        self._decided(ready.plan)
        self._apply(flow, exchange, ready)
        return None

    def _decided(self, plan: Plan) -> None:
        store = flows.suite().store
        for digest, policy in plan.decided:
            store.add_decision(digest, policy)

    @flows.fail_open
    async def _commit(self, flow: http.HTTPFlow, exchange: Exchange, ready: _Ready) -> None:
        """Apply a plan when its originals are on disk; without them, as far as they are."""
        store, owner = flows.suite().store, exchange.client_key_hash
        old = [mask.hash for mask in ready.unsafe if not mask.new]
        kept = await asyncio.to_thread(self._kept, owner, old) if old else set()
        for mask in ready.unsafe:
            store.add_mask(
                owner,
                mask.hash,
                ready.texts[mask.hash],
                tokens=mask.tokens,
                sent_tokens=mask.sent_tokens,
                label=mask.label,
                kinds=mask.kind,
                session_id=exchange.session_id,
            )
        missing = [mask for mask in ready.unsafe if mask.new or mask.hash not in kept]
        if not missing or await store.committed():
            missing, self._warned = [], False
        elif not self._warned:
            self._warned = True
            logger.warning(
                "%s: nothing more is masked, because the store cannot keep the originals (%s).",
                flow.id,
                store.state,
            )
        now, lost = time.time(), {mask.hash for mask in missing}
        for mask in ready.unsafe:
            if mask.hash not in lost:
                self._safe.put((owner, mask.hash), now)
        if missing:
            first = min(mask.message for mask in missing)
            plan = await asyncio.to_thread(self._masker.again, ready.given, owner, None, first)
            changed = await asyncio.to_thread(self._masker.changed, ready.given, plan)
            ready = _Ready(ready.given, plan, changed, [], {})
        self._decided(ready.plan)
        self._apply(flow, exchange, ready)

    def _kept(self, owner: str, hashes: Sequence[str]) -> set[str]:
        try:
            return flows.suite().store.kept(owner, hashes)
        except StoreError as error:
            logger.debug("no masks known: %s", type(error).__name__)
            return set()

    def _apply(self, flow: http.HTTPFlow, exchange: Exchange, ready: _Ready) -> None:
        if not ready.changed:
            return
        document, masks = exchange.document, ready.plan.masks
        edits = document.edits()
        try:
            ready.given.put(document, ready.changed)
            exchange.sent = ready.given.replaced(ready.changed)
        except BaseException:
            document.restore(edits)
            raise
        exchange.savings += [
            Saving(mask.kind, mask.message, mask.tokens - mask.sent_tokens, mask.hash, mask.new)
            for mask in masks
        ]
        for mask in masks:
            if mask.new:
                self._sent.put(mask.hash, mask.text)
        flow.metadata["kimi.masked"] = len(masks)

    def _lookup(self, owner: str) -> Callable[[str], Awaitable[str | None]]:
        """Return what finds an original that was left out for the same key, by its hash."""
        store = flows.suite().store

        async def find(hash: str) -> str | None:
            found = await asyncio.to_thread(store.mask, hash, owner)
            return str(found["original"]) if found is not None else None

        return find

    @flows.step(Rank.MASK)
    @flows.fail_open
    def response(self, flow: http.HTTPFlow) -> None:
        exchange = flows.exchange(flow)
        if exchange is not None and (count := recall.recalls(exchange)):
            flow.metadata["kimi.recalls"] = count

    @flows.step(Rank.MASK)
    @flows.fail_open
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """Nothing of its own: where nobody handles this event, no reply passes as it comes."""

    def _remember(self) -> None:
        """Take up what an earlier process decided, and tell the store how much to keep."""
        said, store = flows.suite().rules.sanitizer, flows.suite().store
        if said is not self._said:
            self._said = said
            store.limit_masks(said.keep_days * 86_400.0, said.keep_mb * 1_000_000)
        if self._loaded:
            return
        self._loaded = True
        try:
            rows = store.decisions(_REMEMBERED)
        except StoreError as error:
            # A new database has nothing to read yet; a broken one says so by itself.
            logger.debug("no decisions remembered: %s", type(error).__name__)
            return
        self._masker.remember((bytes(row["digest"]), row["policy"]) for row in reversed(rows))

    # -- switches

    @command.command("sanitizer.toggle")
    def toggle(self) -> bool:
        """Mask new tool output, or stop masking it; return whether it is masked now."""
        ctx.options.sanitizer_mask = not ctx.options.sanitizer_mask
        return bool(ctx.options.sanitizer_mask)

    @command.command("sanitizer.flush")
    def flush(self, session: str) -> None:
        """Decide anew on all messages of a session with its next request."""
        self._flush.add(session)

    @command.command("sanitizer.mask")
    def mask(self, hash: str) -> str:
        """Return the text that a mask stands for, by its hash."""
        found = flows.suite().store.mask(hash)
        if found is None:
            raise exceptions.CommandError(f"The store has no mask {hash[:64]!r}.")
        return str(found["original"])

    def endpoints(self) -> list[Endpoint]:
        """Return what the API answers about masks."""
        return [
            Endpoint("GET", "sanitizer/stats", self._stats, "What masking is set to, and saved."),
            Endpoint("POST", "sanitizer/toggle", self._toggle, "Switch masking on or off."),
            Endpoint(
                "POST", "sanitizer/flush", self._flushed, "Decide anew on a session's messages."
            ),
            Endpoint("GET", "mask", self._masks, "The latest masks, without their originals."),
            Endpoint("GET", "mask/([^/]+)", self._original, "One mask with its original."),
        ]

    async def _stats(self, asked: Asked) -> dict[str, object]:
        said = flows.suite().rules.sanitizer
        totals = await asyncio.to_thread(flows.suite().store.mask_totals)
        return {
            "enabled": ctx.options.sanitizer_mask,
            "bypass": ctx.options.kimi_bypass,
            "store": flows.suite().store.state,
            "threshold": said.threshold,
            "keep": said.keep,
            "references": said.references,
            **totals,
        }

    def _toggle(self, asked: Asked) -> dict[str, object]:
        wanted = asked.body.get("enabled", not ctx.options.sanitizer_mask)
        if not isinstance(wanted, bool):
            raise ApiError(400, f"enabled is {wanted!r}; write true or false")
        ctx.options.sanitizer_mask = wanted
        return {"enabled": wanted}

    def _flushed(self, asked: Asked) -> dict[str, object]:
        session = asked.body.get("session")
        if not isinstance(session, str) or not session:
            raise ApiError(400, "session is missing; write the id of the session to decide anew")
        self.flush(session)
        return {"session": session, "flush": "with its next request"}

    async def _masks(self, asked: Asked) -> dict[str, object]:
        try:
            limit = max(1, min(_MAX_LISTED, int(asked.query.get("limit", 50))))
            before = float(asked.query["before"]) if "before" in asked.query else None
        except ValueError:
            raise ApiError(400, "limit and before are numbers") from None
        session = asked.query.get("session")
        rows = await asyncio.to_thread(
            flows.suite().store.masks, limit, before=before, session_id=session
        )
        following = rows[-1]["created_at"] if len(rows) == limit else None
        return {"masks": [_shown(row) for row in rows], "next": following}

    async def _original(self, asked: Asked) -> dict[str, object]:
        found = await asyncio.to_thread(flows.suite().store.mask, asked.path[0])
        if found is None:
            raise ApiError(404, "no such mask", hash=asked.path[0])
        shown = {**_shown(found), "original_content": found["original"]}
        if (sent := self._sent.get(asked.path[0])) is not None:
            shown["sent_content"] = sent  # as long as this process remembers it
        return shown


def _shown(row: Mapping[str, Any]) -> dict[str, object]:
    """Return a mask as the API shows it, without its original."""
    kept = ("hash", "preview", "tags", "label", "sent_tokens", "session_id", "created_at")
    return {name: row[name] for name in kept} | {"token_count": row["tokens"]}


def _forms(plan: Plan) -> list[tuple[int, int, str]]:
    return [(mask.message, mask.part, mask.text) for mask in plan.masks]


addons = [Sanitizer()]
