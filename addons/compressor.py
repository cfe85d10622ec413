"""Old exchanges of a conversation, summarised before its context window is full."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence

from mitmproxy import command, ctx, exceptions, http
from mitmproxy.addonmanager import Loader

from kimi_core import context, flows
from kimi_core.api import ApiError, Asked, Endpoint
from kimi_core.compaction import asking, planning, rewrite, targets
from kimi_core.compaction.asking import Answer, SummaryFailed, Target
from kimi_core.compaction.extract import extract
from kimi_core.compaction.latest import Last, Latest, Took
from kimi_core.compaction.planning import Conversation, NotWorth, Plan, Size
from kimi_core.compaction.summaries import Summaries, Summary
from kimi_core.context import Context
from kimi_core.exchange import Exchange, Saving, Spending
from kimi_core.flows import Rank
from kimi_core.masking.policy import Policy
from kimi_core.masking.requests import Masker
from kimi_core.memo import Memo
from kimi_core.prices import PriceList
from kimi_core.rules import EXTRACT
from kimi_core.store import StoreError

logger = logging.getLogger(__name__)

_PREPARE_AT = 0.88
"""The share of `compression.at` from which a summary is prepared: 75 % of the window by default."""
_PRESSING = 0.95
"""The share of the window from which a smaller saving is worth the provider's cache too."""
_WORTH_THEN = 0.2
_GROWN = 1.05
"""How much longer a request may be by the time that the summary is there."""
_AGAIN_AFTER_S = 600.0
_LOOK_BACK = 64
_REMEMBERED = 64
_NOT_KEPT = "the store cannot keep the summary"


class Compressor:
    """Replaces old exchanges in requests by a summary of them; the last ones stay word for word.

    A summary is prepared in the background, so that no request waits for it, and belongs to
    the messages that it replaces: each later request that begins with them leaves with it, until
    it is revoked. When it fails, requests pass unchanged.

    For a compression on demand the last request of each session is kept in memory, 32 MB in all.
    A client's own key is not: what is begun by its request may use it, what is asked for later
    goes with the provider's key, or is an extract that no model wrote.
    """

    def __init__(self) -> None:
        self._counter = context.Counter(4096)
        # Of its own: it only foretells what masking, which comes after, will leave.
        self._masker = Masker()
        self._prices = PriceList()
        self._summaries = Summaries()
        self._latest = Latest()
        self._took: Memo[bytes, Took] = Memo(_REMEMBERED)
        self._running: dict[str, asyncio.Task[Summary]] = {}
        self._asked_for: set[asyncio.Task[None]] = set()
        self._spent: Memo[str, list[Spending]] = Memo(1024)
        self._not_before: Memo[str, float] = Memo(1024)
        self._held: set[str] = set()
        self._loaded = False

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)
        loader.add_option(
            "compressor_auto",
            str,
            "",
            "Compress conversations without being asked: true or false; empty: as rules.yaml says.",
            choices=("", "true", "false"),
        )

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def running(self) -> None:
        self._take_up()

    def done(self) -> Awaitable[None]:
        for task in [*self._running.values(), *self._asked_for]:
            task.cancel()
        return flows.leave(self)

    # -- requests

    @flows.step(Rank.COMPRESS)
    @flows.fail_open
    def request(self, flow: http.HTTPFlow) -> None:
        exchange = flows.exchange(flow)
        # Without a route nobody sends what is edited.
        if exchange is None or exchange.route is None or flow.response or flow.error:
            return
        self._take_up()
        session, owner = flows.session_id(flow), exchange.client_key_hash
        given = context.sent(exchange)
        is_chat = exchange.operation == "chat"
        if is_chat:
            exchange.spendings += self._spent.pop(session) or []
        fitting = self._summaries.matching(given.chains, owner)
        in_force = next((one for one in fitting if one.used_at is not None), None)
        if flows.bypassed(flow):
            exchange.rewrite = "bypass" if in_force else exchange.rewrite
            return
        if not len(given):
            return
        body, took = exchange.document.encode(), Took(exchange.attempts)
        if is_chat:
            self._took.put(owner.encode() + given.chains[-1], took)
            conversation = Conversation(exchange.dialect, body, owner, session)
            if exchange.kind == "turn":
                headers = targets.shown(flow.request.headers.fields)
                last = Last(conversation, exchange.route, headers, took, given.chains)
                self._latest.put(last)
        if not planning.is_whole(exchange.document, exchange.dialect):
            return
        if is_chat and self._auto():
            in_force = self._look(flow, exchange, given, conversation, fitting, in_force)
        if in_force is not None:
            self._apply(exchange, given, in_force, counts=is_chat)
            took.saved = in_force.saved
        elif is_chat and self._summaries.was_revoked(given.chains, owner):
            exchange.rewrite = "revocation"

    def _look(
        self,
        flow: http.HTTPFlow,
        exchange: Exchange,
        given: Context,
        conversation: Conversation,
        fitting: list[Summary],
        in_force: Summary | None,
    ) -> Summary | None:
        """Return the summary to send, and begin to prepare the next one in time."""
        said = flows.suite().rules.compression
        window = exchange.route.context if exchange.route else None
        sent = max(1, self._tokens(exchange, given) - (in_force.saved if in_force else 0))
        messages = len(given)
        if in_force is not None:
            messages -= in_force.messages_before - in_force.messages_after
        many = said.from_messages is not None and messages >= said.from_messages
        ready = fitting[0] if fitting and fitting[0].used_at is None else None
        pressing = window is not None and sent >= _PRESSING * window
        least = _WORTH_THEN if pressing else planning.WORTH
        if ready is not None and self._share(given, ready, in_force) >= least:
            due = many or (window is not None and sent >= said.at * window)
            return ready if due else in_force
        soon = many or (window is not None and sent >= _PREPARE_AT * said.at * window)
        if soon and len(given) >= said.min_messages and self._may_begin(conversation.session):
            growth = 1.0 if many or not window else max(1.0, said.at * window / sent)
            target = self._target(flow, exchange)
            base = ready or in_force
            self._begin(conversation, base, in_force, target, least, growth * _GROWN)
        return in_force

    def _share(self, given: Context, ready: Summary, in_force: Summary | None) -> float:
        """Return the share of what is sent that a summary would save now."""
        since = self._estimate(given, ready.messages_before)
        before = in_force.saved if in_force else 0
        return (ready.saved - before) / max(1, ready.tokens_before + since - before)

    def _apply(self, exchange: Exchange, given: Context, summary: Summary, *, counts: bool) -> None:
        """Replace what a summary stands for; what does not count is asked about, not sent."""
        head = self._summaries.head(given, summary)
        exchange.sent = rewrite.compress(
            exchange.document, given, summary.messages, head, summary.text
        )
        first = counts and not summary.applied
        if counts:
            self._summaries.use(summary, time.time())
            flows.suite().store.touch_summary(summary.id)
        exchange.savings.append(
            Saving("compression", rewrite.place(head), summary.saved, summary.id, first)
        )
        if first:
            exchange.rewrite = "compression"

    def _tokens(self, exchange: Exchange, given: Context) -> int:
        """Return about how many tokens a request takes without a summary."""
        # What its provider said of the conversation's last request, and an estimate of the rest.
        owner, first, known = exchange.client_key_hash.encode(), 0, 0
        for index in range(len(given) - 1, max(-1, len(given) - _LOOK_BACK), -1):
            took = self._took.get(owner + given.chains[index])
            if took is not None and took.full is not None:
                first, known = index + 1, took.full
                break
        else:
            known = sum(len(memoryview(head.unit.raw)) for head in given.heads) // 4
        return known + self._estimate(given, first)

    def _estimate(self, given: Context, first: int) -> int:
        """Return about how many tokens the messages from `first` on take."""
        policy = self._policy()
        pieces = (given.message(index) for index in range(first, len(given)))
        return sum(
            planning.estimated(context.read(given.dialect, piece.unit), policy) for piece in pieces
        )

    def _size(self, owner: str) -> Size:
        """Return what tells how many tokens of a request leave: counted, and masked as it will."""
        policy, masks = self._policy(), _masks()

        def size(given: Context) -> int:
            whole = planning.count(given, self._counter)
            if not masks:
                return whole
            plan = self._masker.plan(given, owner, policy, self._decided)
            return whole - sum(mask.tokens - mask.sent_tokens for mask in plan.masks)

        return size

    def _policy(self) -> Policy | None:
        """Return how new messages are masked."""
        suite = flows.suite()
        if not (_masks() and ctx.options.sanitizer_mask) or suite.store.state != "ok":
            return None
        said = suite.rules.sanitizer
        return Policy(threshold=said.threshold, keep=said.keep, references=said.references)

    def _decided(self, digests: Sequence[bytes]) -> Mapping[bytes, str]:
        try:
            return flows.suite().store.decisions_of(digests)
        except StoreError as error:
            logger.debug("no decisions known: %s", type(error).__name__)
            return {}

    # -- summaries

    def _auto(self) -> bool:
        said: str = ctx.options.compressor_auto
        return said == "true" if said else flows.suite().rules.compression.auto

    def _may_begin(self, session: str) -> bool:
        if session in self._running or session in self._held:
            return False
        return time.monotonic() >= (self._not_before.get(session) or 0.0)

    def _target(self, flow: http.HTTPFlow, exchange: Exchange) -> Target | None:
        """Return whom to ask on behalf of a request; None: there is no model to be had."""
        rules, route, call = flows.suite().rules, exchange.route, flows.asked(flow)
        if (name := rules.compression.model) is not None:
            return None if name == EXTRACT else targets.of_rules(rules, name)
        if route is None or call is None:
            return None
        fields = flow.request.headers.fields
        if not route.keep_client_key:
            return targets.of_route(route, exchange.dialect, fields, rules)
        key, path = flows.client_key(flow), flow.request.path.partition("?")[0]
        base_url = f"{flow.request.scheme}://{flow.request.host}:{flow.request.port}"
        base_url += path.removesuffix("/").removesuffix(call.rest)
        return targets.of_client(
            route, exchange.dialect, fields, key, base_url, for_us=exchange.for_us
        )

    def _later_target(self, last: Last) -> Target | None:
        """Return whom to ask when the request is over, and its client's key gone."""
        rules = flows.suite().rules
        if (name := rules.compression.model) is not None:
            return None if name == EXTRACT else targets.of_rules(rules, name)
        return targets.of_route(last.route, last.conversation.dialect, last.headers, rules)

    def _begin(
        self,
        conversation: Conversation,
        base: Summary | None,
        in_force: Summary | None,
        target: Target | None,
        least: float,
        growth: float = 1.0,
    ) -> asyncio.Task[Summary]:
        session = conversation.session
        task = asyncio.create_task(self._make(conversation, base, in_force, target, least, growth))
        self._running[session] = task

        def ended(task: asyncio.Task[Summary]) -> None:
            if self._running.get(session) is task:
                del self._running[session]
            error = None if task.cancelled() else task.exception()
            if error is None or isinstance(error, NotWorth):
                return
            self._not_before.put(session, time.monotonic() + _AGAIN_AFTER_S)
            # The text of any other exception may quote a prompt or a key.
            why = error if isinstance(error, SummaryFailed) else type(error).__name__
            logger.warning("Session %s is not compressed, and goes on as it is: %s.", session, why)

        task.add_done_callback(ended)
        return task

    async def _make(
        self,
        conversation: Conversation,
        base: Summary | None,
        in_force: Summary | None,
        target: Target | None,
        least: float,
        growth: float,
    ) -> Summary:
        said = flows.suite().rules.compression
        size = self._size(conversation.owner)
        plan = await asyncio.to_thread(
            planning.plan,
            conversation,
            size,
            said.keep_exchanges,
            said.profile,
            base,
            in_force,
            least=least,
            growth=growth,
        )
        if target is None:
            made = await asyncio.to_thread(self._extract, plan, size)
        else:
            if flows.suite().store.state not in ("ok", "locked"):
                raise SummaryFailed(_NOT_KEPT)
            made = await self._ask(plan, target, size)
        await self._keep(made)
        self._summaries.put(made)
        logger.info(
            "Session %s: a summary of %d messages by %s is ready.",
            made.session,
            made.messages,
            made.model or EXTRACT,
        )
        flows.suite().announce()
        return made

    async def _keep(self, made: Summary) -> None:
        """Write a summary to disk: another process has to send the same. Raises SummaryFailed."""
        store = flows.suite().store
        store.add_summary(made.row())
        try:
            kept = await store.committed()
        except asyncio.CancelledError:
            if made.session in self._held:
                store.revoke_summary(made.id)
            raise
        if not kept:
            raise SummaryFailed(_NOT_KEPT)

    def _extract(self, plan: Plan, size: Size) -> Summary:
        profile = flows.suite().rules.compression.profile
        text = extract(plan.replaced, plan.earlier, profile)
        return planning.summary(plan, text, size)

    async def _ask(self, plan: Plan, target: Target, size: Size) -> Summary:
        said = flows.suite().rules.compression
        system, user = await asyncio.to_thread(planning.asked, plan, said.profile, target.window)
        session = plan.conversation.session
        try:
            answer = await asking.ask(flows.suite().client, target, system, user)
        except SummaryFailed as failure:
            if failure.answer is not None:
                await self._spend(session, target, failure.answer)
            raise
        cost = await self._spend(session, target, answer)
        return await asyncio.to_thread(
            planning.summary, plan, answer.text, size, target, answer, cost
        )

    async def _spend(self, session: str, target: Target, answer: Answer) -> float | None:
        """Note what an answer took, for the session's next exchange; return its cost."""
        await asyncio.to_thread(self._prices.warm)
        usage = answer.usage
        found = self._prices.cost(usage, target.provider, target.model, target.price)
        cost = usage.cost_usd if usage.cost_usd is not None else (found and found[0])
        taken = Spending("summary", usage.input_tokens or 0, usage.output_tokens or 0, cost)
        self._spent.put(session, [*(self._spent.get(session) or []), taken])
        return cost

    def _take_up(self) -> None:
        """Take the summaries that an earlier process made."""
        if self._loaded:
            return
        self._loaded = True
        try:
            rows = flows.suite().store.summaries()
        except StoreError as error:
            # A new database has nothing to read yet; a broken one says so by itself.
            logger.debug("no summaries remembered: %s", type(error).__name__)
            return
        self._summaries.load(rows)
        # Whoever revoked a session's last summary does not want another one by itself.
        last = {row["session_id"]: row["revoked_at"] for row in reversed(rows)}
        self._held |= {session for session, revoked in last.items() if revoked is not None}

    # -- on demand

    async def _on_demand(self, session: str, force: bool) -> Summary:
        """Put a summary into force for a session's next request. Raises ApiError."""
        last = self._latest.get(session)
        if last is None:
            raise ApiError(
                404,
                "no request of this session has come since the proxy started",
                session=session,
                hint="send one, then compress",
            )
        state = await self._state(session)
        if not state["can_compress"] and not force:
            raise ApiError(400, "the conversation is not long enough", **_told(state))
        if (running := self._running.get(session)) is not None:
            await asyncio.wait([running])
        fitting = self._summaries.matching(last.chains, last.conversation.owner)
        if fitting and fitting[0].used_at is None:
            made = fitting[0]
        else:
            made = await self._forced(last, fitting, force, state)
        self._held.discard(session)
        # A request may have left with it meanwhile, or somebody revoked it.
        if (ready := self._summaries.get(made.id)) is None:
            raise ApiError(409, "a summary of this session was revoked meanwhile")
        used = self._summaries.use(ready, time.time(), applied=False)
        flows.suite().store.add_summary(used.row())
        await flows.suite().store.committed()
        return used

    async def _forced(
        self,
        last: Last,
        fitting: list[Summary],
        force: bool,
        state: dict[str, object],
    ) -> Summary:
        if len(last.chains) < (least := flows.suite().rules.compression.min_messages):
            why = f"a conversation of fewer than {least} messages is not compressed"
            raise ApiError(400, why, **_told(state))
        base = fitting[0] if fitting else None
        worth = 0.0 if force else planning.WORTH
        # One that is ready was taken, so that the longest is in force.
        task = self._begin(last.conversation, base, base, self._later_target(last), worth)
        await asyncio.wait([task])
        if task.cancelled():
            raise ApiError(409, "a summary of this session was revoked meanwhile")
        error = task.exception()
        if isinstance(error, NotWorth):
            raise ApiError(400, str(error), **_told(state))
        if isinstance(error, SummaryFailed):
            raise ApiError(502, str(error), hint="try again, or set compression.model to extract")
        if error is not None:
            raise ApiError(500, f"the compression failed ({type(error).__name__})")
        return task.result()

    async def _state(self, session: str) -> dict[str, object]:
        """Return how far a session is from being compressed."""
        said, last = flows.suite().rules.compression, self._latest.get(session)
        state: dict[str, object] = {
            "current_percentage": None,
            "threshold": round(100 * said.at, 1),
            "can_compress": False,
            "hint": "no request of this session has come since the proxy started",
        }
        if last is None:
            return state
        full = last.took.full
        if full is None:
            full = await asyncio.to_thread(self._full, last.conversation)
        fitting = self._summaries.matching(last.chains, last.conversation.owner)
        in_force = next((one for one in fitting if one.used_at is not None), None)
        sent, messages = full, len(last.chains)
        if in_force is not None:
            sent -= in_force.saved
            messages -= in_force.messages_before - in_force.messages_after
        sent = max(0, sent)
        window = last.route.context
        if window:
            state["current_percentage"] = round(100 * sent / window, 1)
        many = said.from_messages is not None and messages >= said.from_messages
        reached = many or bool(window and sent >= said.at * window)
        state["can_compress"] = reached and len(last.chains) >= said.min_messages
        state["hint"] = _hint(reached, window is None, len(last.chains), said.min_messages)
        return state

    def _full(self, conversation: Conversation) -> int:
        """Return how many tokens a request would leave with, without a summary."""
        given = Context(conversation.dialect, conversation.document())
        return self._size(conversation.owner)(given)

    def _revoke(self, summary_id: str) -> list[Summary]:
        """Let the original messages be sent again; return what is revoked."""
        found = self._summaries.get(summary_id)
        if found is None:
            return []
        lasts = [
            last for last in self._latest.all() if found.fits(last.chains, last.conversation.owner)
        ]
        sessions = {last.conversation.session for last in lasts}
        revoked = self._summaries.revoke(summary_id, [last.chains for last in lasts])
        for one in revoked:
            flows.suite().store.revoke_summary(one.id)
            sessions.add(one.session)
        flows.suite().announce()
        for session in sessions:
            self._held.add(session)
            if (task := self._running.get(session)) is not None:
                task.cancel()
        return revoked

    @command.command("compressor.compress")
    def compress(self, session: str, force: bool = False) -> None:
        """Summarise the old exchanges of a session; the log tells when it is done."""
        if self._latest.get(session) is None:
            raise exceptions.CommandError(
                f"No request of session {session[:200]!r} has come since the proxy started."
            )
        task = asyncio.create_task(self._by_command(session, force))
        self._asked_for.add(task)
        task.add_done_callback(self._asked_for.discard)

    async def _by_command(self, session: str, force: bool) -> None:
        try:
            made = await self._on_demand(session, force)
        except ApiError as error:
            logger.warning("Session %s is not compressed: %s.", session, error)
            return
        logger.info(
            "Session %s is compressed from %d to %d tokens with its next request.",
            session,
            made.tokens_before,
            made.tokens_after,
        )

    @command.command("compressor.revoke")
    def revoke(self, summary: str) -> None:
        """Send the messages again that a summary stands for, by its id."""
        if not self._revoke(summary):
            raise exceptions.CommandError(f"There is no summary {summary[:64]!r} in force.")

    # -- the API

    def endpoints(self) -> list[Endpoint]:
        """Return what the API answers about summaries."""
        one, compress = "([^/]+)", "Summarise the old exchanges of a session."
        seen = "A session's summaries, and how far it is from the next one."
        told, all_told = "What a session's summaries saved.", "What all summaries saved."
        return [
            Endpoint("GET", "compaction/stats", self._all_stats, all_told),
            Endpoint("GET", "compress/stats", self._all_stats, all_told),
            Endpoint("POST", "compaction/auto", self._switch, "Compress by itself, or not."),
            Endpoint("GET", f"compaction/{one}", self._of_session, seen),
            Endpoint("GET", f"compress/{one}", self._of_session, seen),
            Endpoint("POST", f"compaction/{one}", self._compress, compress),
            Endpoint("POST", f"compress/{one}", self._compress, compress),
            Endpoint("GET", f"compaction/{one}/stats", self._session_stats, told),
            Endpoint("GET", f"compress/{one}/stats", self._session_stats, told),
            Endpoint(
                "POST", f"compaction/{one}/revoke", self._revoked, "Send the original bytes again."
            ),
        ]

    async def _of_session(self, asked: Asked) -> dict[str, object]:
        session, store = asked.path[0], flows.suite().store
        rows = await asyncio.to_thread(store.summaries, session)
        # The same conversation may have gone by another name when it was summarised.
        others = [one.id for one in self._of_latest(session) if one.session != session]
        for other in others:
            if (row := await asyncio.to_thread(store.summary, other)) is not None:
                rows.append(row)
        return {"session": session, "summaries": rows, **await self._state(session)}

    def _of_latest(self, session: str) -> list[Summary]:
        """Return the summaries that fit a session's last request."""
        last = self._latest.get(session)
        if last is None:
            return []
        return self._summaries.matching(last.chains, last.conversation.owner)

    async def _compress(self, asked: Asked) -> dict[str, object]:
        force = asked.body.get("force", False)
        if not isinstance(force, bool):
            raise ApiError(400, f"force is {force!r}; write true or false")
        made = await self._on_demand(asked.path[0], force)
        return {
            "session": made.session,
            "id": made.id,
            "original_tokens": made.tokens_before,
            "compressed_tokens": made.tokens_after,
            "tokens_saved": made.saved,
            "compression_ratio": round(made.saved / made.tokens_before, 4),
            "messages_before": made.messages_before,
            "messages_after": made.messages_after,
            "summary": made.text,
            "source": made.source,
            "model": made.model,
            "provider": made.provider,
            "cost_usd": made.cost_usd,
        }

    async def _revoked(self, asked: Asked) -> dict[str, object]:
        session, summary = asked.path[0], asked.body.get("id")
        if not isinstance(summary, str):
            raise ApiError(400, "id is missing; write the id of the summary to revoke")
        known = self._summaries.get(summary)
        if known is None or (known.session != session and known not in self._of_latest(session)):
            raise ApiError(404, "this session has no such summary in force", id=summary)
        revoked = [one.id for one in self._revoke(summary)]
        await flows.suite().store.committed()
        return {"session": session, "revoked": revoked}

    def _switch(self, asked: Asked) -> dict[str, object]:
        # Without it the body may be meant for a session that is called "auto".
        wanted = asked.body.get("enabled")
        if not isinstance(wanted, bool):
            raise ApiError(400, "enabled is missing; write true or false")
        ctx.options.compressor_auto = "true" if wanted else "false"
        return {"enabled": wanted}

    async def _all_stats(self, asked: Asked) -> dict[str, object]:
        said = flows.suite().rules.compression
        rows = await asyncio.to_thread(flows.suite().store.summaries)
        return {
            "auto": self._auto(),
            "threshold": round(100 * said.at, 1),
            "prepare_at": round(100 * said.at * _PREPARE_AT, 1),
            "from_messages": said.from_messages,
            "min_messages": said.min_messages,
            "keep_exchanges": said.keep_exchanges,
            "profile": said.profile,
            "model": said.model,
            "running": len(self._running),
            **planning.totals(rows),
        }

    async def _session_stats(self, asked: Asked) -> dict[str, object]:
        session = asked.path[0]
        rows = await asyncio.to_thread(flows.suite().store.summaries, session)
        return {"session": session, **planning.totals(rows)}


def _masks() -> bool:
    """Tell whether an addon masks requests."""
    return hasattr(ctx.options, "sanitizer_mask")


def _told(state: dict[str, object]) -> dict[str, object]:
    return {name: state[name] for name in ("current_percentage", "threshold", "hint")}


def _hint(reached: bool, no_window: bool, messages: int, least: int) -> str:
    if messages < least:
        return f"it has {messages} messages; below {least} nothing is compressed"
    if reached:
        return ""
    if no_window:
        return 'the window of its model is not known; {"force": true} compresses all the same'
    return 'the window is not full enough; {"force": true} compresses all the same'


addons = [Compressor()]
