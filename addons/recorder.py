"""Finished exchanges into SQLite."""

import logging
from collections.abc import Awaitable

from mitmproxy import http
from mitmproxy.addonmanager import Loader

from kimi_core import flows
from kimi_core.exchange import Attempt, Exchange
from kimi_core.flows import Rank

logger = logging.getLogger(__name__)

Row = dict[str, int | float | str | None]


class Recorder:
    """Writes one row for each exchange and one for each upstream request, when it has ended.

    The rows go to the store's writer thread: the flow does not wait for them, and a
    database that is locked or full does not reach it. No content is written.
    """

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def running(self) -> None:
        # Opening the store may wait for a lock: now, rather than in the first request.
        _ = flows.suite().sessions

    def done(self) -> Awaitable[None]:
        return flows.leave(self)

    @flows.step(Rank.RECORD)
    @flows.fail_open
    def response(self, flow: http.HTTPFlow) -> None:
        self._record(flow)

    @flows.step(Rank.RECORD)
    @flows.fail_open
    def error(self, flow: http.HTTPFlow) -> None:
        self._record(flow)

    def _record(self, flow: http.HTTPFlow) -> None:
        exchange = flows.exchange(flow)
        if exchange is None:
            return
        flows.session_id(flow)
        store = flows.suite().store
        for attempt in attempt_rows(exchange):  # first: the session's gauge is the last one's
            store.add_attempt(attempt)
        store.add_exchange(row(exchange))


def row(exchange: Exchange) -> Row:
    """Return the exchange as a row of the `exchanges` table."""
    usage, route, context = exchange.reply.usage, exchange.route, exchange.context_tokens
    duration = exchange.ended - exchange.started if exchange.ended is not None else None
    first = exchange.first_chunk
    masks = [saving for saving in exchange.savings if saving.kind != "compression"]
    summaries = [saving for saving in exchange.savings if saving.kind == "compression"]
    saved = exchange.saved_tokens
    return {
        "id": exchange.id,
        "session_id": exchange.session_id,
        "started_at": exchange.started_at,
        "ended_at": exchange.started_at + duration if duration is not None else None,
        "gen_ai.operation.name": exchange.operation,
        "gen_ai.provider.name": route.provider if route else None,
        "gen_ai.request.model": exchange.model or None,
        "gen_ai.response.model": exchange.reply.model or (route.model if route else None),
        "gen_ai.request.stream": int(exchange.stream),
        "gen_ai.response.finish_reason": exchange.reply.finish_reason or None,
        "gen_ai.usage.input_tokens": exchange.input_tokens,
        "gen_ai.usage.output_tokens": exchange.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cache_read_tokens,
        "gen_ai.usage.cache_creation.input_tokens": usage.cache_write_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
        "input_source": exchange.input_source,
        "output_source": exchange.output_source,
        "partial": int(exchange.partial),
        **{
            f"{category}_tokens": context.get(category)
            for category in ("system", "tools", "user", "assistant", "tool_result", "memory")
        },
        "context_window": route.context if route else None,
        "cost_usd": exchange.cost_usd,
        "cost_source": exchange.cost_source or None,
        "saved_tokens": exchange.saved_tokens,
        "saved_usd": exchange.saved_usd,
        "time_to_first_chunk_s": first - exchange.started if first is not None else None,
        "duration_s": duration,
        "status": exchange.status,
        "error_type": exchange.error_type or None,
        "dialect": exchange.dialect.name,
        "kind": exchange.kind,
        "client": exchange.client or None,
        "key_hash": exchange.client_key_hash or None,
        "project": exchange.headers.get("x-kimi-project"),
        "messages": exchange.messages,
        "request_bytes": exchange.request_bytes,
        "response_bytes": exchange.response_bytes,
        "attempts": len(_attempts(exchange)),
        "mended": len(exchange.mends),
        "gross_saved_usd": exchange.gross_saved_usd,
        "lost_usd": exchange.lost_usd,
        "spent_usd": exchange.spent_usd,
        "masked_tokens": sum(saving.tokens for saving in masks) if saved else 0,
        "compressed_tokens": sum(saving.tokens for saving in summaries) if saved else 0,
        "masks": len(masks),
        "recalls": sum(spending.kind == "recall" for spending in exchange.spendings),
        "cache_break": exchange.cache_break,
        "cache_break_by": exchange.cache_break_by or None,
        "summary_id": summaries[0].hash if summaries else None,
    }


def attempt_rows(exchange: Exchange) -> list[Row]:
    """Return the upstream requests of an exchange as rows of the `attempts` table."""
    return [
        {
            "exchange_id": exchange.id,
            "number": number,
            "provider": attempt.provider or None,
            "model": attempt.model or None,
            "started_at": attempt.started_at,
            "duration_s": attempt.ended - attempt.started if attempt.ended is not None else None,
            "status": attempt.status,
            "error_type": attempt.error_type or None,
            "input_tokens": attempt.input_tokens,
            "output_tokens": attempt.output_tokens,
            "cost_usd": attempt.cost_usd,
            "rejected": attempt.rejected or None,
            "gen_ai.response.finish_reason": attempt.reply.finish_reason or None,
            "gen_ai.usage.cache_read.input_tokens": attempt.reply.usage.cache_read_tokens,
        }
        for number, attempt in enumerate(_attempts(exchange), 1)
    ]


def _attempts(exchange: Exchange) -> list[Attempt]:
    if exchange.blocked:
        return []
    return exchange.attempts or [_only(exchange)]


def _only(exchange: Exchange) -> Attempt:
    """Return the one upstream request of an exchange that nobody followed more closely."""
    route = exchange.route
    return Attempt(
        provider=route.provider if route else "",
        model=route.model if route else "",
        dialect=exchange.dialect,
        started_at=exchange.started_at,
        started=exchange.started,
        ended=exchange.ended,
        status=exchange.status,
        error_type=exchange.error_type,
        reply=exchange.reply,
        input_tokens=exchange.input_tokens,
        output_tokens=exchange.output_tokens,
        cost_usd=exchange.cost_usd,
    )


addons = [Recorder()]
