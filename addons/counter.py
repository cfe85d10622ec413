"""Tokens, time and money of each exchange, streamed or not."""

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import TypeVar
from weakref import WeakKeyDictionary

from mitmproxy import http
from mitmproxy.addonmanager import Loader

from kimi_core import context, flows, tokens
from kimi_core.context import Piece
from kimi_core.exchange import Attempt, Category, Exchange, Provenance, Reply, Usage
from kimi_core.flows import Rank
from kimi_core.ledger import Ledger, broken
from kimi_core.prices import PriceList
from kimi_core.stages import HideUsage, ReadReply, Stage, StageRank

logger = logging.getLogger(__name__)

_INLINE_BYTES = 16_384
"""Text up to this size is counted at once: that takes less than handing it to a thread."""

Count = dict[Category, int]
Number = TypeVar("Number", int, float)


class Counter:
    """Counts each exchange: the request when it leaves, the reply as it passes.

    What the provider says counts; what it leaves out is counted by the model's own
    tokenizer, or estimated where none is public, and each number says which. In a stream
    usage is asked for where the provider takes the question, and hidden again from a
    client that did not ask. The ledger then says what was saved, net of what that took.
    """

    def __init__(self) -> None:
        self._counter = context.Counter()
        self._prices = PriceList()
        self._ledger = Ledger()
        self._readers: WeakKeyDictionary[Exchange, list[ReadReply]] = WeakKeyDictionary()
        self._counts: WeakKeyDictionary[Exchange, Count | Future[Count]] = WeakKeyDictionary()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="counter")

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def running(self) -> None:
        threading.Thread(target=self._warm, name="counter-warm", daemon=True).start()

    def done(self) -> Awaitable[None]:
        self._pool.shutdown(wait=False)
        return flows.leave(self)

    def _warm(self) -> None:
        # genai-prices takes a second to import; the first reply should not wait for it.
        self._prices.warm()
        # What was loaded by now stays for good, and need not be looked through for garbage again.
        gc.collect()
        gc.freeze()

    @flows.step(Rank.COUNT)
    @flows.fail_open
    def request(self, flow: http.HTTPFlow) -> None:
        exchange = flows.exchange(flow)
        if exchange is None or flow.response or flow.error:
            return
        flows.session_id(flow)
        readers = self._readers[exchange] = []
        of = weakref.ref(exchange)

        def read(attempt: Attempt) -> Stage:
            reader = attempt.dialect.reader()
            attempt.reply = reader.reply
            if (counted := of()) is not None:
                counted.reply = reader.reply
            readers.append(ReadReply(reader))
            return readers[-1]

        exchange.stages.append((StageRank.READ, read))
        exchange.at_dispatch.append((Rank.COUNT, _ask_usage))
        model = _model(exchange)
        if (
            self._counter.missing(exchange, model) <= _INLINE_BYTES
            and tokens.tokenizer_for(model).loaded
        ):
            # In the next turn of the loop: by then the request is on its way.
            asyncio.get_running_loop().call_soon(self._count_request, exchange, model)
        else:
            self._counts[exchange] = self._pool.submit(self._counter.count, exchange, model)
        self._ledger.leaves(exchange)

    def _count_request(self, exchange: Exchange, model: str) -> Count:
        counted = self._counts[exchange] = self._counter.count(exchange, model)
        return counted

    @flows.step(Rank.COUNT)
    @flows.fail_open
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        exchange = flows.exchange(flow)
        if exchange is None or flow.response is None:
            return
        if exchange.hide_usage:
            flows.add_stage(flow, HideUsage())
        if flows.will_stream(flow):
            self._tell(flow.response, exchange)

    @flows.step(Rank.COUNT)
    @flows.fail_open
    async def response(self, flow: http.HTTPFlow) -> None:
        await self._settle(flow)

    @flows.step(Rank.COUNT)
    @flows.fail_open
    async def error(self, flow: http.HTTPFlow) -> None:
        await self._settle(flow)

    async def _settle(self, flow: http.HTTPFlow) -> None:
        exchange = flows.exchange(flow)
        if exchange is None:
            return
        readers = self._readers.get(exchange)
        if readers is not None and not exchange.blocked:
            for attempt, stage in zip(exchange.attempts, readers, strict=False):
                attempt.reply = stage.reader.finish()
                exchange.unread = exchange.unread or stage.failed
            await self._count(flow, exchange)
        await self._account(exchange)
        _label(flow, exchange)
        if flow.response is not None and not flows.is_streamed(flow):
            self._tell(flow.response, exchange, whole=True)

    async def _count(self, flow: http.HTTPFlow, exchange: Exchange) -> None:
        """Count what each upstream request took; the exchange took their sum."""
        if len(exchange.attempts) <= 1:
            last = exchange.attempts[-1] if exchange.attempts else None
            exchange.reply = last.reply if last else exchange.reply
        else:
            last = None
            exchange.reply = _together([attempt.reply for attempt in exchange.attempts])
        reply = exchange.reply
        exchange.unread = exchange.unread or _is_unknown(exchange)
        failed = exchange.status is None or exchange.status >= 400
        ends_itself = exchange.stream and not exchange.unread
        exchange.partial = not failed and not reply.complete and (bool(flow.error) or ends_itself)
        if reply.error and not exchange.error_type:
            exchange.error_type = reply.error
        elif failed and exchange.status is not None and not exchange.error_type:
            exchange.error_type = str(exchange.status)
        if last is not None:
            last.status, last.error_type = exchange.status, exchange.error_type
        counted = self._counts.get(exchange)
        if isinstance(counted, Future):
            counted = await asyncio.wrap_future(counted)
        elif counted is None:
            counted = self._count_request(exchange, _model(exchange))
        exchange.context_tokens = counted
        for attempt in exchange.attempts:
            if exchange.unread:
                attempt.reply.usage = Usage()  # an earlier event's may be far from the last
            await self._count_attempt(exchange, attempt, sum(counted.values()))

    async def _count_attempt(self, exchange: Exchange, attempt: Attempt, context: int) -> None:
        usage = attempt.reply.usage
        failed = attempt.status is None or attempt.status >= 400
        if failed and usage.input_tokens is None:
            return  # nobody bills what was refused
        if exchange.operation == "count_tokens":
            return  # its answer is a number of tokens, not tokens used
        model = attempt.model
        source: Provenance = "tokenizer" if tokens.tokenizer_for(model).exact else "estimate"
        if usage.input_tokens is not None:
            attempt.input_tokens = usage.input_tokens
            exchange.input_source = exchange.input_source or "usage"
        elif context:
            attempt.input_tokens, exchange.input_source = context, source
        exchange.input_tokens = _sum(exchange.input_tokens, attempt.input_tokens)
        if exchange.unread:
            return
        output = usage.output_tokens
        # A cut stream's last word on usage may be its first: Anthropic begins with 1.
        came = None
        if output is None or (exchange.partial and not attempt.reply.complete):
            came = await asyncio.to_thread(self._counter.reply, attempt.reply, model)
        if came is not None and (output is None or came > output):
            attempt.output_tokens, exchange.output_source = came, source
        else:
            attempt.output_tokens = output
            exchange.output_source = exchange.output_source or "usage"
        exchange.output_tokens = _sum(exchange.output_tokens, attempt.output_tokens)
        await self._price(exchange, attempt)

    async def _price(self, exchange: Exchange, attempt: Attempt) -> None:
        usage = attempt.reply.usage
        cost, source = usage.cost_usd, "usage.cost"
        if cost is None:
            if attempt.input_tokens is None and attempt.output_tokens is None:
                return
            if not self._prices.ready:
                await asyncio.to_thread(self._prices.warm)
            billed = replace(
                usage, input_tokens=attempt.input_tokens, output_tokens=attempt.output_tokens
            )
            found = self._look_up(exchange, attempt, billed)
            if found is None:
                return
            cost, source = found
        attempt.cost_usd, exchange.cost_source = cost, source
        exchange.cost_usd = cost + (exchange.cost_usd or 0.0)

    def _look_up(
        self, exchange: Exchange, attempt: Attempt, usage: Usage
    ) -> tuple[float, str] | None:
        route = exchange.route
        own = route.source.price(attempt.model) if route and route.source else None
        return self._prices.cost(usage, attempt.provider, attempt.model, own)

    async def _account(self, exchange: Exchange) -> None:
        """Have the ledger say what the exchange saved, by the prices of its attempts."""

        def price(attempt: Attempt, usage: Usage) -> float | None:
            found = self._look_up(exchange, attempt, usage)
            return found[0] if found is not None else None

        def count(piece: Piece) -> int:
            return self._counter.tokens_of(exchange, model, piece)

        model = _model(exchange)
        asks = exchange.savings or exchange.rewrite or len(exchange.attempts) > 1
        if asks and not self._prices.ready:
            await asyncio.to_thread(self._prices.warm)
        self._ledger.settle(exchange, price, count)

    def _tell(self, response: http.Response, exchange: Exchange, *, whole: bool = False) -> None:
        """Put what is known into the reply's headers."""
        told: dict[str, str] = {}
        if exchange.session_id:
            told["Session"] = exchange.session_id
        if (route := exchange.route) is not None:
            told["Provider"], told["Model"] = route.provider, route.model
        tokens_in = exchange.input_tokens
        if tokens_in is None and not whole:
            counted = self._counts.get(exchange)
            if isinstance(counted, Future):
                counted = counted.result() if counted.done() and not counted.exception() else None
            tokens_in = sum(counted.values()) if counted else None
        if tokens_in is not None:
            told["Input-Tokens"] = str(tokens_in)
            told["Saved-Tokens"] = str(exchange.saved_tokens)
        if whole and exchange.output_tokens is not None:
            told["Output-Tokens"] = str(exchange.output_tokens)
        if whole and exchange.cost_usd is not None:
            told["Cost-Usd"] = _dollars(exchange.cost_usd)
            if exchange.saved_usd is not None:
                told["Saved-Usd"] = _dollars(exchange.saved_usd)
        response.headers.fields += tuple(
            (b"X-Kimi-Proxy-" + name.encode(), _header(value)) for name, value in told.items()
        )


def _is_unknown(exchange: Exchange) -> bool:
    """Tell whether a reply that came whole says nothing that we can read: HTML, half a JSON."""
    reply = exchange.reply
    said = reply.complete or reply.text or reply.reasoning or reply.tool_calls or reply.error
    return not exchange.stream and not said and reply.usage.output_tokens is None


def _together(replies: Sequence[Reply]) -> Reply:
    """Return several replies, each to a request of its own, as what the client was given."""
    last = replies[-1]
    usages = [reply.usage for reply in replies]
    return replace(
        last,
        id=last.id or replies[0].id,
        text=[piece for reply in replies for piece in reply.text],
        reasoning=[piece for reply in replies for piece in reply.reasoning],
        usage=Usage(
            **{
                field.name: _sum(*(getattr(usage, field.name) for usage in usages))
                for field in fields(Usage)
            }
        ),
    )


def _sum(*counts: Number | None) -> Number | None:
    """Return the sum of those that are known, None when none is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _model(exchange: Exchange) -> str:
    return exchange.route.model if exchange.route else exchange.model


def _ask_usage(exchange: Exchange) -> None:
    """Ask for usage in the stream, where a rule names the model and its provider takes it."""
    route = exchange.route
    if route is None or not (route.named and route.stream_usage and exchange.stream):
        return
    if exchange.dialect.asks_usage(exchange.document):
        return
    options = exchange.document.get("stream_options")
    asked = {**options} if isinstance(options, dict) else {}
    exchange.document.set(("stream_options",), {**asked, "include_usage": True})
    exchange.hide_usage = True


def _label(flow: http.HTTPFlow, exchange: Exchange) -> None:
    """Put the numbers into the flow's metadata, where `~meta` finds them."""
    usage = exchange.reply.usage
    values: dict[str, str | int | float | None] = {
        "gen_ai.provider.name": exchange.route.provider if exchange.route else None,
        "gen_ai.response.model": exchange.reply.model or None,
        "gen_ai.usage.input_tokens": exchange.input_tokens,
        "gen_ai.usage.output_tokens": exchange.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cache_read_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
        "kimi.cost_usd": exchange.cost_usd,
        "kimi.input_source": exchange.input_source,
        "kimi.output_source": exchange.output_source,
        "kimi.saved_tokens": exchange.saved_tokens or None,
        "kimi.saved_usd": exchange.saved_usd or None,
        "kimi.cache_break": broken(exchange) or None,
    }
    flow.metadata.update({name: value for name, value in values.items() if value is not None})
    if exchange.partial:
        flow.metadata["kimi.partial"] = True


def _dollars(amount: float) -> str:
    return f"{round(amount, 9) + 0.0:.9f}".rstrip("0").rstrip(".")  # never -0


def _header(value: str) -> bytes:
    return "".join(char for char in value if " " <= char <= "~")[:200].encode()


addons = [Counter()]
