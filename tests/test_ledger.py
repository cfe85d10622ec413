"""What an exchange saved, lost and spent, in numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mitmproxy.io import FlowReader

from kimi_core.context import Context, Piece, sent
from kimi_core.dialects import ANTHROPIC, OPENAI, RESPONSES, Dialect
from kimi_core.document import Document
from kimi_core.exchange import Attempt, Breaker, Exchange, Route, Saving, Spending, Usage
from kimi_core.ledger import Ledger, broken
from proxy import Proxy
from upstream import Reply as Answer
from upstream import TokenUsage, Upstream

Json = dict[str, Any]

IN, READ, WRITE, OUT = 1.0, 0.1, 1.25, 5.0
"""US dollars for a token, so that sums can be done in the head."""
HEAD, MESSAGE = 50, 100
"""Tokens of a head and of a message."""


def price(attempt: Attempt, usage: Usage) -> float | None:
    if attempt.model == "unpriced":
        return None
    read, write = usage.cache_read_tokens or 0, usage.cache_write_tokens or 0
    plain = (usage.input_tokens or 0) - read - write
    return plain * IN + read * READ + write * WRITE + (usage.output_tokens or 0) * OUT


def count(piece: Piece) -> int:
    return MESSAGE if piece.unit.kind == "message" else HEAD


def turns(number: int, start: int = 0, mark: str = "") -> list[Json]:
    """Return messages of a conversation, user and assistant by turns."""
    return [
        {"role": "assistant" if n % 2 else "user", "content": f"{mark}{n}"}
        for n in range(start, start + number)
    ]


def masked(messages: Sequence[Json], *numbers: int) -> list[Json]:
    return [
        message | {"content": "[masked]"} if n in numbers else message
        for n, message in enumerate(messages)
    ]


SYSTEM = {"role": "system", "content": "Be brief."}


class Talk:
    """One session with a ledger; what was read and written by the cache is said for each turn."""

    def __init__(self, dialect: Dialect = OPENAI) -> None:
        self.ledger = Ledger()
        self.dialect = dialect

    def asks(
        self,
        messages: Sequence[Json],
        sent: Sequence[Json] | None = None,
        *,
        model: str = "m",
        kind: Any = "turn",
        session: str = "s",
        **more: Any,
    ) -> Exchange:
        """Let a request leave; `sent` is what the editors made of its messages."""
        name = "input" if self.dialect is RESPONSES else "messages"

        def document(messages: Sequence[Json]) -> Document:
            body = {"model": model, name: messages} | more
            text = json.dumps(body, separators=(",", ":")).encode()
            return Document(text, self.dialect.shape)

        exchange = Exchange("x", self.dialect, "chat", document(messages))
        exchange.model, exchange.kind, exchange.session_id = model, kind, session
        exchange.route = Route("p", model, self.dialect.name)
        if sent is not None:
            exchange.sent = Context(self.dialect, document(sent))
        return exchange

    def gets(
        self,
        exchange: Exchange,
        tokens: int = 0,
        *,
        read: int | None = None,
        write: int | None = None,
        out: int = 10,
        cost: float | None = None,
    ) -> Exchange:
        """Let an exchange leave and be answered."""
        self.ledger.leaves(exchange)
        return self.ends(exchange, [(tokens, read, write, out, "")], cost)

    def ends(
        self,
        exchange: Exchange,
        attempts: Sequence[tuple[int, int | None, int | None, int, str]],
        cost: float | None = None,
    ) -> Exchange:
        leaving = len(exchange.sent or exchange.context or ())
        exchange.context_tokens = {"user": leaving * MESSAGE}
        for tokens, read, write, out, rejected in attempts:
            attempt = exchange.attempt()
            tokens = tokens or leaving * MESSAGE
            attempt.reply.usage = Usage(tokens, out, read, write, cost_usd=cost)
            attempt.input_tokens, attempt.output_tokens = tokens, out
            attempt.cost_usd = price(attempt, attempt.reply.usage) if cost is None else cost
            attempt.rejected = rejected
        self.ledger.settle(exchange, price, count)
        return exchange


def at(exchange: Exchange) -> tuple[int | None, str]:
    return exchange.cache_break, exchange.cache_break_by


def money(exchange: Exchange) -> tuple[float | None, ...]:
    """Return gross, lost, spent and net."""
    return (
        exchange.gross_saved_usd,
        exchange.lost_usd,
        exchange.spent_usd,
        exchange.saved_usd,
    )


def about(*numbers: float) -> Any:
    return pytest.approx(numbers)


# -- where a cache breaks


def test_a_conversation_that_grows_breaks_nothing() -> None:
    talk = Talk()
    for size in (1, 3, 5, 5, 9):
        assert at(talk.gets(talk.asks(turns(size)))) == (None, "")


def test_a_request_that_is_the_beginning_of_an_earlier_one_breaks_nothing() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(9)))
    assert at(talk.gets(talk.asks(turns(5)))) == (None, "")


def test_a_moved_cache_control_breaks_nothing() -> None:
    talk, mark = Talk(ANTHROPIC), {"cache_control": {"type": "ephemeral"}}

    def marked(size: int) -> list[Json]:
        messages = turns(size)
        block = {"type": "text", "text": messages[-1]["content"], **mark}
        return [*messages[:-1], messages[-1] | {"content": [block]}]

    talk.gets(talk.asks(marked(3)))
    assert at(talk.gets(talk.asks(marked(5)))) == (None, "")


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (turns(3) + turns(1, 3, "other") + turns(3, 4), 4),
        (turns(4) + turns(1, 4, "again"), 5),
        (turns(3, 2) + turns(2, 5), 1),  # a window that slides
        (turns(1, 0, "first") + turns(4, 1) + turns(2, 5), 1),
    ],
    ids=["edited", "retried", "dropped", "first edited"],
)
def test_what_the_client_changed_is_its_own_doing(then: list[Json], message: int) -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(5)))
    assert at(talk.gets(talk.asks(then))) == (message, "client")


def test_a_branch_can_be_left_again_for_the_one_before() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(5)))
    assert talk.gets(talk.asks(turns(4) + turns(1, 4, "b"))).cache_break == 5
    assert at(talk.gets(talk.asks(turns(7)))) == (None, "")
    assert at(talk.gets(talk.asks(turns(4) + turns(3, 4, "b")))) == (None, "")


def test_another_conversation_of_a_session_breaks_nothing() -> None:
    talk = Talk()
    talk.gets(talk.asks([SYSTEM, *turns(5)]))
    assert at(talk.gets(talk.asks([SYSTEM, *turns(5, 0, "new")]))) == (None, "")
    assert at(talk.gets(talk.asks([SYSTEM, *turns(7)]))) == (None, "")
    assert at(talk.gets(talk.asks(turns(5), session="t"))) == (None, "")


def test_a_side_call_is_compared_with_its_own_kind() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(5)))
    titled = turns(2) + turns(1, 2, "title")
    assert at(talk.gets(talk.asks(titled, kind="background"))) == (None, "")
    assert at(talk.gets(talk.asks(titled))) == (3, "client")


TOOLS = [{"name": "read", "input_schema": {"type": "object"}}]


@pytest.mark.parametrize(
    ("before", "then", "by"),
    [
        ({}, {"tools": TOOLS}, "tools"),
        ({"system": "a", "tools": TOOLS}, {"system": "b", "tools": []}, "tools"),
        ({"system": "a", "tools": TOOLS}, {"system": "b", "tools": TOOLS}, "system"),
    ],
)
def test_what_stands_before_the_messages_breaks_the_cache_at_0(
    before: Json, then: Json, by: str
) -> None:
    talk = Talk(ANTHROPIC)
    talk.gets(talk.asks(turns(3), **before))
    assert at(talk.gets(talk.asks(turns(5), **then))) == (0, by)
    assert at(talk.gets(talk.asks(turns(7), **then))) == (None, "")


OURS = {"name": "kimi_recall", "input_schema": {}}


def offering(talk: Talk, messages: Sequence[Json], **more: Any) -> Exchange:
    """Let a request leave with a tool of ours."""
    exchange = talk.asks(messages, **more)
    given = sent(exchange)
    document = talk.asks(messages, **more | {"tools": [*more["tools"], OURS]}).document
    exchange.sent = given.with_heads(document)
    return exchange


def test_a_tool_of_ours_that_comes_or_goes_is_our_doing() -> None:
    talk = Talk(ANTHROPIC)
    talk.gets(offering(talk, turns(3), tools=TOOLS), read=250)
    assert at(talk.gets(offering(talk, turns(5), tools=TOOLS), read=450)) == (None, "")
    gone = talk.gets(talk.asks(turns(7), tools=TOOLS), read=0)
    assert at(gone) == (0, "proxy")
    assert money(gone) == about(0, 500 * (IN - READ), 0, -500 * (IN - READ))
    again = talk.gets(offering(talk, turns(9), tools=TOOLS), read=450)
    assert at(again) == (None, "")  # as it left before, which is in the cache still


def test_a_bypass_takes_our_tool_with_it() -> None:
    talk = Talk(ANTHROPIC)
    talk.gets(offering(talk, turns(3), tools=TOOLS))
    exchange = talk.asks(turns(5), tools=TOOLS)
    exchange.rewrite = "bypass"
    assert at(talk.gets(exchange)) == (0, "bypass")
    assert broken(exchange) == "the tools, by a bypass"


def test_the_clients_change_of_tools_is_its_own_beside_a_tool_of_ours() -> None:
    talk = Talk(ANTHROPIC)
    talk.gets(offering(talk, turns(3), tools=TOOLS, system="a"))
    assert at(talk.gets(offering(talk, turns(5), tools=TOOLS, system="b"))) == (0, "system")
    assert at(talk.gets(offering(talk, turns(7), tools=[], system="b"))) == (0, "tools")


@pytest.mark.parametrize("then", [[SYSTEM | {"content": "It is noon."}], [SYSTEM, SYSTEM], []])
def test_a_changed_system_message_is_a_changed_system_prompt(then: list[Json]) -> None:
    talk = Talk()
    talk.gets(talk.asks([SYSTEM, *turns(3)]))
    number, by = at(talk.gets(talk.asks([*then, *turns(5)])))
    assert (number, by) == ((0, "system") if then else (1, "client"))


def test_another_target_begins_a_cache_of_its_own() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(3)))
    assert at(talk.gets(talk.asks(turns(5), model="other"))) == (0, "model")
    assert at(talk.gets(talk.asks(turns(7), model="other"))) == (None, "")
    assert at(talk.gets(talk.asks(turns(9)))) == (None, "")


def test_a_request_that_was_refused_broke_nothing_and_is_forgotten() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(3)))
    edited = turns(2) + turns(1, 2, "b")
    refused = talk.asks(edited)
    refused.savings = [Saving("cut", 2, 100, "h", new=True)]
    talk.ledger.leaves(refused)
    assert (at(refused), refused.saved_tokens) == ((3, "client"), 100)
    refused.attempt().status = 429
    talk.ledger.settle(refused, price, count)
    assert (at(refused), refused.saved_tokens) == ((None, ""), 0)
    assert money(refused) == (0, 0, 0, 0)
    assert at(talk.gets(talk.asks(edited))) == (3, "client")


def test_a_history_that_the_provider_keeps_is_compared_with_nothing() -> None:
    talk = Talk(RESPONSES)
    talk.gets(talk.asks(turns(3), previous_response_id="r1"))
    for size in (3, 2):
        messages = turns(size - 1) + turns(1, 9)
        assert at(talk.gets(talk.asks(messages, previous_response_id="r2"))) == (None, "")


def test_two_requests_at_a_time_are_no_break() -> None:
    talk = Talk()
    one, two = talk.asks(turns(3)), talk.asks(turns(5))
    talk.ledger.leaves(one)
    talk.ledger.leaves(two)
    for exchange in (two, one):
        talk.ends(exchange, [(0, None, None, 10, "")])
    assert at(one) == at(two) == (None, "")
    assert at(talk.gets(talk.asks(turns(7)))) == (None, "")


@pytest.mark.parametrize("rewrite", ["flush", "revocation", "bypass"])
def test_what_we_sent_in_another_way_is_our_doing(rewrite: Any) -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(5), masked(turns(5), 2)))
    exchange = talk.asks(turns(7))
    exchange.rewrite = rewrite
    assert at(talk.gets(exchange)) == (3, rewrite)
    # Both ways of sending it are in the cache now.
    assert at(talk.gets(talk.asks(turns(9), masked(turns(9), 2)))) == (None, "")


def test_a_bypass_is_to_blame_for_what_is_masked_again_after_it() -> None:
    talk = Talk()
    bypassed = talk.asks(turns(5))
    bypassed.rewrite = "bypass"
    assert at(talk.gets(bypassed)) == (None, "")
    assert at(talk.gets(talk.asks(turns(7), masked(turns(7), 2)))) == (3, "bypass")


def test_a_change_of_ours_without_a_reason_is_owned_up_to() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(5), masked(turns(5), 2)))
    assert at(talk.gets(talk.asks(turns(7), masked(turns(7), 4)))) == (3, "proxy")


def summed(messages: Sequence[Json], until: int) -> list[Json]:
    """Return the messages with those before `until` as a summary in the first."""
    first = messages[0] | {"content": f"{messages[0]['content']} and a summary"}
    return [first, *messages[until:]]


def test_who_came_first_is_to_blame_when_both_changed_something() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(9)))
    edited = turns(8) + turns(1, 8, "b") + turns(2, 9)
    compressed = talk.asks(edited, summed(edited, 5))
    compressed.rewrite = "compression"
    assert at(talk.gets(compressed)) == (1, "compression")
    # The summary is of what the client changed, so it is gone: the client's doing.
    assert at(talk.gets(talk.asks(turns(2) + turns(9, 2, "c")))) == (3, "client")


def test_after_a_compression_the_client_breaks_the_cache_where_its_message_stands_now() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(9), summed(turns(9), 5)))
    edited = turns(8) + turns(3, 8, "b")
    assert at(talk.gets(talk.asks(edited, summed(edited, 5)))) == (5, "client")


def test_a_cache_that_expired_is_the_providers_doing_and_no_break() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(3)), read=0)
    assert at(talk.gets(talk.asks(turns(5)), read=0)) == (None, "")  # it never had one
    assert at(talk.gets(talk.asks(turns(7)), read=500)) == (None, "")
    expired = talk.gets(talk.asks(turns(9)), read=0)
    assert at(expired) == (None, "provider")
    assert broken(expired) == "expired at the provider"
    assert at(talk.gets(talk.asks(turns(11)), read=900)) == (None, "")


def test_a_shorter_request_may_be_too_short_for_a_cache() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(5)), read=300)
    assert at(talk.gets(talk.asks(turns(1)), read=0)) == (None, "")


def test_each_break_can_be_said() -> None:
    exchange = Talk().asks(turns(1))
    assert broken(exchange) == ""
    said = set()
    for by in get_args(Breaker)[1:]:
        exchange.cache_break_by = by
        exchange.cache_break = None if by == "provider" else 0
        if by not in ("tools", "system", "model", "provider"):
            exchange.cache_break = 4
        said.add(broken(exchange))
    assert len(said) == len(get_args(Breaker)) - 1
    assert {"message 4, by the client", "message 4, by a compression", "another model"} < said


# -- what it saved


def test_what_is_new_saves_the_price_of_input() -> None:
    talk = Talk()
    exchange = talk.asks(turns(3), masked(turns(3), 2))
    exchange.savings = [Saving("cut", 2, 400, "h", new=True)]
    talk.gets(exchange)
    assert exchange.saved_tokens == 400
    assert money(exchange) == about(400 * IN, 0, 0, 400 * IN)


def test_what_is_new_saves_the_price_of_a_cache_write_where_that_is_billed() -> None:
    talk = Talk(ANTHROPIC)
    exchange = talk.asks(turns(3), masked(turns(3), 2))
    exchange.savings = [Saving("cut", 2, 400, "h", new=True)]
    talk.gets(exchange, read=0, write=300)
    assert money(exchange) == about(400 * WRITE, 0, 0, 400 * WRITE)


def test_what_had_been_sent_before_saves_the_price_of_a_cached_read() -> None:
    talk = Talk()
    old = Saving("reference", 2, 400, "h")
    talk.gets(talk.asks(turns(3), masked(turns(3), 2)))
    exchange = talk.asks(turns(5), masked(turns(5), 2, 4))
    exchange.savings = [old, Saving("cut", 4, 300, "i", new=True)]
    talk.gets(exchange, read=300)
    assert money(exchange) == about(40 + 300, 0, 0, 340)
    # Nothing was read: without us it would not have been either.
    exchange = talk.asks(turns(7), masked(turns(7), 2, 4))
    exchange.savings = [old, Saving("cut", 4, 300, "i")]
    talk.gets(exchange, read=0)
    assert at(exchange) == (None, "provider")
    assert money(exchange) == about(700, 0, 0, 700)


def test_where_only_the_beginning_is_cached_the_rest_saves_the_price_of_input() -> None:
    talk = Talk()
    messages = [SYSTEM, *turns(7)]
    savings = [Saving("cut", 1, 400, "h"), Saving("cut", 5, 400, "i")]
    talk.gets(talk.asks(messages, masked(messages, 1, 5)), read=200)
    exchange = talk.asks([*messages, *turns(2, 7)], masked([*messages, *turns(2, 7)], 1, 5))
    exchange.savings = savings
    talk.gets(exchange, read=200)
    assert money(exchange) == about(400 * READ + 400 * IN, 0, 0, 440)


def test_behind_what_the_client_changed_nothing_would_have_been_cached() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(9), masked(turns(9), 2, 6)), read=300)
    edited = turns(4) + turns(1, 4, "b") + turns(4, 5)
    exchange = talk.asks(edited, masked(edited, 2, 6))
    exchange.savings = [Saving("cut", 2, 400, "h"), Saving("cut", 6, 400, "i")]
    talk.gets(exchange, read=400)
    assert at(exchange) == (5, "client")
    assert money(exchange) == about(400 * READ + 400 * IN, 0, 0, 440)


def test_after_a_start_masking_knows_what_had_been_sent_before() -> None:
    talk = Talk()
    exchange = talk.asks(turns(5), masked(turns(5), 2, 4))
    exchange.savings = [Saving("cut", 2, 400, "h"), Saving("cut", 4, 300, "i", new=True)]
    talk.gets(exchange, read=480)
    assert money(exchange) == about(40 + 300, 0, 0, 340)


def test_tokens_are_o200ks_and_dollars_are_by_what_the_provider_counts() -> None:
    talk = Talk()
    exchange = talk.asks(turns(3), masked(turns(3), 2))
    exchange.savings = [Saving("cut", 2, 400, "h", new=True)]
    talk.gets(exchange, tokens=330)  # 300 by our count
    assert exchange.saved_tokens == 400
    assert exchange.gross_saved_usd == pytest.approx(440 * IN)


@pytest.mark.parametrize(("tokens", "scale"), [(10, 0.5), (90_000, 2.0)])
def test_a_count_that_is_far_off_is_believed_within_bounds(tokens: int, scale: float) -> None:
    talk = Talk()
    exchange = talk.asks(turns(3), masked(turns(3), 2))
    exchange.savings = [Saving("cut", 2, 400, "h", new=True)]
    talk.gets(exchange, tokens=tokens)
    assert exchange.gross_saved_usd == pytest.approx(400 * scale * IN)


def test_without_a_price_there_are_tokens_and_no_money() -> None:
    talk = Talk()
    exchange = talk.asks(turns(3), masked(turns(3), 2), model="unpriced")
    exchange.savings = [Saving("cut", 2, 400, "h", new=True)]
    talk.gets(exchange)
    assert exchange.saved_tokens == 400
    assert money(exchange) == (None, None, 0, None)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_the_provider_says_it_took_is_the_measure(share: float) -> None:
    talk = Talk()
    exchange = talk.asks(turns(3), masked(turns(3), 2))
    exchange.savings = [Saving("cut", 2, 400, "h", new=True)]
    talk.gets(exchange, cost=share * (300 * IN + 10 * OUT))
    assert money(exchange) == about(share * 400, 0, 0, share * 400)


def test_usage_that_nobody_reported_takes_what_was_cached_for_cached() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(3), masked(turns(3), 2)), read=250)
    exchange = talk.asks(turns(5), masked(turns(5), 2))
    exchange.savings = [Saving("cut", 2, 400, "h")]
    talk.ledger.leaves(exchange)
    exchange.context_tokens = {"user": 500}
    attempt = exchange.attempt()
    attempt.input_tokens, attempt.cost_usd = 500, 500.0
    talk.ledger.settle(exchange, price, count)
    assert at(exchange) == (None, "")
    assert money(exchange) == about(40, 0, 0, 40)


# -- what it lost and spent


def compressed(talk: Talk, **usage: Any) -> Exchange:
    """11 messages, of which 6 were summarised: 2000 tokens fewer; 2 are new."""
    exchange = talk.asks(turns(11), summed(turns(11), 7))
    exchange.rewrite = "compression"
    exchange.savings = [Saving("compression", 0, 2000, "sum", new=True)]
    return talk.gets(exchange, **usage)


def test_a_compression_loses_what_the_cache_held_of_the_rest() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(9)), read=700)
    exchange = compressed(talk, read=0)  # 5 messages leave, 3 of them not new
    assert at(exchange) == (1, "compression")
    gross, lost = 2000 * READ, 300 * (IN - READ)
    assert money(exchange) == about(gross, lost, 0, gross - lost)
    # The next one reads what it wrote: nothing more is lost.
    after = talk.asks(turns(13), summed(turns(13), 7))
    after.savings = [Saving("compression", 0, 2000, "sum")]
    talk.gets(after, read=500)
    assert money(after) == about(gross, 0, 0, gross)


def test_what_was_read_all_the_same_is_not_lost() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(9)), read=700)
    assert compressed(talk, read=60).lost_usd == pytest.approx((300 - 60) * (IN - READ))


def test_where_writing_is_billed_losing_costs_more() -> None:
    talk = Talk(ANTHROPIC)
    talk.gets(talk.asks(turns(9)), read=700, write=200)
    exchange = compressed(talk, read=0, write=500)
    assert money(exchange)[:2] == about(2000 * READ, 300 * (WRITE - READ))


def test_without_a_cache_there_is_nothing_to_lose() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(9)), read=0)
    assert money(compressed(talk, read=0)) == about(2000 * IN, 0, 0, 2000 * IN)


def test_what_the_cache_did_not_hold_is_not_lost() -> None:
    talk = Talk(ANTHROPIC)
    talk.gets(talk.asks(turns(7)), read=0, write=80)  # the client marks the beginning only
    talk.gets(talk.asks(turns(9)), read=80, write=0)
    assert compressed(talk, read=80, write=0).lost_usd == 0
    talk = Talk(ANTHROPIC)
    talk.gets(talk.asks(turns(9)), read=0, write=250)
    assert compressed(talk, read=0, write=0).lost_usd == pytest.approx(250 * (IN - READ))


def test_a_flush_loses_all_that_is_sent_anew() -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(9), masked(turns(9), 2)), read=700)
    exchange = talk.asks(turns(11))
    exchange.rewrite = "flush"
    talk.gets(exchange, read=200)
    assert at(exchange) == (3, "flush")
    lost = (900 - 200) * (IN - READ)
    assert money(exchange) == about(0, lost, 0, -lost)


def test_summaries_are_spent_whatever_becomes_of_the_exchange() -> None:
    talk = Talk()
    for fails in (False, True):
        exchange = talk.asks(turns(3))
        exchange.spendings = [Spending("summary", 900, 100, 70.0), Spending("summary", 1, 1, 0.5)]
        talk.ledger.leaves(exchange)
        talk.ends(exchange, [] if fails else [(300, None, None, 10, "")])
        assert money(exchange) == about(0, 0, 70.5, -70.5)


def test_a_summary_of_unknown_price_leaves_the_net_unknown() -> None:
    talk = Talk()
    exchange = talk.asks(turns(3))
    exchange.spendings = [Spending("summary", 900, 100, None)]
    assert money(talk.gets(exchange)) == (0, 0, None, None)


def test_a_recall_takes_a_further_prompt_and_the_call_that_asked_for_it() -> None:
    talk = Talk()
    exchange = talk.asks(turns(3), masked(turns(3), 2))
    exchange.savings = [Saving("cut", 2, 400, "h", new=True)]
    talk.ledger.leaves(exchange)
    talk.ends(exchange, [(300, 0, None, 20, "recall"), (450, 300, None, 500, "")])
    spent = 150 * IN + 300 * READ + 20 * OUT
    assert exchange.spendings == [Spending("recall", 450, 20, spent)]
    assert money(exchange) == about(400, 0, spent, 400 - spent)


def test_a_recall_whose_further_request_is_refused_took_all_that_the_asking_one_did() -> None:
    talk = Talk()
    exchange = talk.asks(turns(3))
    talk.ledger.leaves(exchange)
    exchange.attempt().rejected = "recall"
    exchange.attempts[0].input_tokens, exchange.attempts[0].output_tokens = 300, 20
    exchange.attempts[0].cost_usd = 400.0
    exchange.attempt().status = 500
    talk.ledger.settle(exchange, price, count)
    assert exchange.spendings == [Spending("recall", 300, 20, 400.0)]
    assert money(exchange) == about(0, 0, 400, -400)


def test_recalls_that_lead_to_a_failure_are_all_in_vain() -> None:
    talk = Talk()
    exchange = talk.asks(turns(3))
    talk.ledger.leaves(exchange)
    for number, rejected in enumerate(("recall", "no_tool_call", "recall", "recall", "")):
        attempt = exchange.attempt()
        attempt.rejected, attempt.status = rejected, 200 if rejected else 500
        if rejected:
            attempt.input_tokens, attempt.output_tokens = 300 + number, 20
            attempt.cost_usd = 400.0 + number
    talk.ledger.settle(exchange, price, count)
    assert [spending.cost_usd for spending in exchange.spendings] == [401.0, 402.0, 403.0]


def test_a_further_request_that_is_no_recall_is_not_spent_on_saving() -> None:
    talk = Talk()
    exchange = talk.asks(turns(3))
    talk.ledger.leaves(exchange)
    talk.ends(exchange, [(300, 0, None, 20, "no tool call"), (450, 300, None, 500, "")])
    assert (exchange.spendings, exchange.spent_usd) == ([], 0)


def test_an_exchange_of_several_attempts_saves_once() -> None:
    talk = Talk()
    exchange = talk.asks(turns(3), masked(turns(3), 2))
    exchange.savings = [Saving("cut", 2, 400, "h", new=True)]
    talk.ledger.leaves(exchange)
    talk.ends(exchange, [(300, 0, None, 20, "no tool call"), (450, 300, None, 500, "")])
    assert money(exchange) == about(400, 0, 0, 400)


# -- what holds for any conversation

sizes = st.integers(0, 6)
edits = st.lists(st.tuples(sizes, st.sampled_from(["", "b"])), min_size=1, max_size=4)


@st.composite
def conversations(draw: st.DrawFn) -> list[list[Json]]:
    """Requests of a client that goes on, rewinds, edits and begins anew, as it likes."""
    return [
        [message for size, mark in draw(edits) for message in turns(size, 0, mark)] or turns(1)
        for _ in range(draw(st.integers(1, 6)))
    ]


@given(conversations(), st.sampled_from([None, 0, 100]))
def test_without_savings_of_ours_nothing_is_saved_lost_or_blamed_on_us(
    requests: list[list[Json]], read: int | None
) -> None:
    talk = Talk()
    for messages in requests:
        exchange = talk.gets(talk.asks(messages), read=read)
        assert exchange.saved_tokens == 0
        assert money(exchange) == (0, 0, 0, 0)
        assert exchange.cache_break_by in ("", "client", "provider")
        assert (exchange.cache_break is None) == (exchange.cache_break_by in ("", "provider"))


@given(conversations(), st.data())
def test_the_break_is_at_the_first_message_that_no_request_before_had_there(
    requests: list[list[Json]], data: st.DataObject
) -> None:
    talk, before = Talk(), []
    for messages in requests:
        exchange = talk.gets(talk.asks(messages))
        number = exchange.cache_break
        if number is not None:
            assert all(one[:number] != messages[:number] for one in before)
            assert any(one[: number - 1] == messages[: number - 1] for one in before)
        before.append(messages)


@given(st.integers(1, 2000), st.integers(0, 8), st.booleans(), st.integers(0, 900))
def test_a_mask_never_saves_more_than_the_price_of_input(
    tokens: int, message: int, new: bool, read: int
) -> None:
    talk = Talk()
    talk.gets(talk.asks(turns(7), masked(turns(7), message)), read=100)
    exchange = talk.asks(turns(9), masked(turns(9), message))
    exchange.savings = [Saving("cut", message, tokens, "h", new=new)]
    talk.gets(exchange, read=read)
    assert exchange.saved_usd is not None
    assert tokens * READ * 0.99 <= exchange.saved_usd <= tokens * IN * 1.01


# -- through a proxy

CALL = {"id": "c", "type": "function", "function": {"name": "ls", "arguments": "{}"}}
LISTED = [
    {"role": "user", "content": "List it."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {
        "role": "tool",
        "tool_call_id": "c",
        "content": "\n".join(f"{n * 7919 % 10007} is line {n} of the output" for n in range(1200)),
    },
]
THANKS = [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "Thanks."}]


def ask(proxy: Proxy, messages: Sequence[Json], **headers: str) -> httpx.Response:
    with proxy.base_client() as client:
        answer = client.post(
            "/v1/chat/completions",
            json={"model": "answers", "messages": messages},
            headers={"x-kimi-session": "s", **headers},
        )
    assert answer.status_code == 200, answer.text
    return answer


def test_a_row_says_where_the_client_broke_the_cache(up: Upstream, tmp_path: Path) -> None:
    up.default = Answer(usage=TokenUsage(input=1000, output=10, cached=900))
    saved = tmp_path / "flows.mitm"
    with Proxy(tmp_path, up, arguments=["-w", str(saved)]) as proxy:
        answer = ask(proxy, turns(7))
        ask(proxy, turns(3) + turns(1, 3, "b") + turns(5, 4))
        first, second = proxy.row(1), proxy.row(2)
    assert (first["cache_break"], first["cache_break_by"]) == (None, None)
    assert (second["cache_break"], second["cache_break_by"]) == (4, "client")
    for row in (first, second):
        assert (row["saved_usd"], row["lost_usd"], row["spent_usd"]) == (0, 0, 0)
    assert answer.headers["x-kimi-proxy-saved-tokens"] == "0"
    assert answer.headers["x-kimi-proxy-saved-usd"] == "0"
    with saved.open("rb") as file:
        flows = list(FlowReader(file).stream())
    assert "kimi.cache_break" not in flows[0].metadata
    assert flows[1].metadata["kimi.cache_break"] == "message 4, by the client"
    assert flows[1].comment.count("cache broke at message 4 (client)") == 1


def test_a_row_says_what_masks_saved_at_the_providers_prices(up: Upstream, tmp_path: Path) -> None:
    """gpt-4o: 2.50 dollars for a million tokens, 1.25 for cached ones."""
    with Proxy(tmp_path, up) as proxy:
        up.default = Answer(usage=TokenUsage(input=1000, output=10))
        ask(proxy, LISTED)
        up.default = Answer(usage=TokenUsage(input=1100, output=10, cached=990))
        answer = ask(proxy, LISTED + THANKS)
        rows = proxy.row(1), proxy.row(2)
    for row, dollars in zip(rows, (2.5e-6, 1.25e-6), strict=True):
        parts = ("system", "tools", "user", "assistant", "tool_result", "memory")
        counted = sum(row[f"{part}_tokens"] for part in parts)
        scale = row["gen_ai.usage.input_tokens"] / counted
        assert row["saved_tokens"] > 10_000
        assert 0.5 < scale < 2
        assert row["gross_saved_usd"] == pytest.approx(row["saved_tokens"] * scale * dollars, 1e-3)
        assert row["saved_usd"] == row["gross_saved_usd"]
        assert (row["lost_usd"], row["spent_usd"], row["cache_break"]) == (0, 0, None)
    said = float(answer.headers["x-kimi-proxy-saved-usd"])
    assert said == pytest.approx(rows[1]["saved_usd"], abs=1e-9)


def test_a_bypass_is_in_the_row_with_what_it_lost(up: Upstream, tmp_path: Path) -> None:
    bypass = {"x-kimi-bypass": "1"}
    with Proxy(tmp_path, up) as proxy:
        up.default = Answer(usage=TokenUsage(input=30_000, output=10, cached=29_000))
        ask(proxy, LISTED)
        up.default = Answer(usage=TokenUsage(input=30_000, output=10, cached=0))
        ask(proxy, LISTED + THANKS, **bypass)
        row = proxy.row(2)
    assert (row["cache_break"], row["cache_break_by"]) == (3, "bypass")
    assert (row["masks"], row["saved_tokens"], row["gross_saved_usd"]) == (0, 0, 0)
    # All but the last two messages had been read at half the price.
    assert 0.97 < row["lost_usd"] / (30_000 * 1.25e-6) < 1
    assert row["saved_usd"] == -row["lost_usd"]
