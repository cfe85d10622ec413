"""Steps, stages, the pipe and who is addressed: flows.py, without a running proxy."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mitmproxy import http
from mitmproxy.addonmanager import Loader
from mitmproxy.test import taddons, tflow

from kimi_core import dialects, flows
from kimi_core import pipe as pipe_module
from kimi_core.dialects import Dialect
from kimi_core.document import Document
from kimi_core.exchange import Exchange
from kimi_core.flows import Rank
from kimi_core.pipe import Pipe
from kimi_core.sse import SSE, Event, JSONArray
from kimi_core.stages import HideUsage, ReadReply

RULES = """\
version: 1
providers:
  openai: {api: openai, base_url: "https://api.openai.com/v1"}
"""
BODY = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'


class Member:
    """An addon of the suite with nothing to do."""

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def done(self) -> Any:
        return flows.leave(self)


@pytest.fixture
def context(tmp_path: Path) -> Iterator[taddons.context]:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with taddons.context(loadcore=False) as entered:
        entered.member = Member()
        entered.master.addons.add(entered.member)
        entered.options.update(kimi_rules=str(rules), kimi_store=str(tmp_path / "kimi.db"))
        yield entered
        flows.suite().close()
        # taddons leaves it behind, and it would log to a loop that is closed.
        entered.master._legacy_log_events.uninstall()
    entered.master.event_loop.close()


def model_call(body: bytes = BODY, path: str = "/v1/chat/completions") -> http.HTTPFlow:
    flow = tflow.tflow()
    flow.request.method, flow.request.path = "POST", path
    flow.request.host, flow.request.port = "api.openai.com", 443
    flow.request.content = body
    return flow


def run(context: taddons.context, event: str, flow: http.HTTPFlow) -> None:
    """Call the event's hook of every addon in the order of loading, as mitmproxy does."""

    async def each() -> None:
        for addon in context.master.addons.chain:
            if (hook := getattr(addon, event, None)) and (pending := hook(flow)) is not None:
                await pending

    asyncio.run(each())


# --- steps


def _step(name: str, rank: Rank, seen: list[str], *, late: bool = False) -> Any:
    if late:

        async def request(self: Any, flow: http.HTTPFlow) -> None:
            await asyncio.sleep(0)
            seen.append(name)

    else:

        def request(self: Any, flow: http.HTTPFlow) -> None:  # type: ignore[misc]
            seen.append(name)

    return type(name, (Member,), {"request": flows.step(rank)(flows.fail_open(request))})()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_steps_run_once_in_the_order_of_ranks_whatever_the_order_of_loading(
    context: taddons.context, order: tuple[int, ...]
) -> None:
    seen: list[str] = []
    addons = [
        _step("admit", Rank.ADMIT, seen),
        _step("route", Rank.ROUTE, seen, late=True),
        _step("count", Rank.COUNT, seen),
        _step("dispatch", Rank.DISPATCH, seen, late=True),
    ]
    context.master.addons.add(*(addons[index] for index in order))
    flow = model_call()
    run(context, "request", flow)
    run(context, "request", flow)
    assert seen == ["admit", "route", "count", "dispatch"]


def test_a_body_that_is_read_in_a_thread_sees_the_same_steps(context: taddons.context) -> None:
    seen: list[str] = []
    context.master.addons.add(
        _step("route", Rank.ROUTE, seen, late=True), _step("count", Rank.COUNT, seen)
    )
    text = "x" * 1_100_000
    flow = model_call(BODY.replace(b'"hi"', json.dumps(text).encode()))
    run(context, "request", flow)
    assert seen == ["route", "count"]
    found = flows.exchange(flow)
    assert found is not None
    assert found.request_bytes > 1_100_000


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_raises_keeps_none_of_the_others_from_running(
    context: taddons.context, caplog: pytest.LogCaptureFixture, late: bool
) -> None:
    seen: list[str] = []

    class Broken(Member):
        if late:

            @flows.step(Rank.ROUTE)
            @flows.fail_open
            async def request(self, flow: http.HTTPFlow) -> None:
                raise ValueError("a prompt")
        else:

            @flows.step(Rank.ROUTE)
            @flows.fail_open
            def request(self, flow: http.HTTPFlow) -> None:
                raise ValueError("a prompt")

    context.master.addons.add(_step("count", Rank.COUNT, seen), Broken())
    flow = model_call()
    run(context, "request", flow)
    assert seen == ["count"]
    assert flow.response is None
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert flow.id in record.getMessage()
    assert "a prompt" not in caplog.text


def test_a_gate_that_raises_is_told_to_all_who_follow(context: taddons.context) -> None:
    class Gate(Member):
        @flows.step(Rank.ADMIT)
        @flows.fail_closed
        def request(self, flow: http.HTTPFlow) -> None:
            raise ValueError

    context.master.addons.add(Gate())
    flow = model_call()
    run(context, "request", flow)
    assert flow.response is not None
    assert flow.response.status_code == 502
    found = flows.exchange(flow)
    assert found is not None
    assert found.blocked


def test_who_has_left_runs_no_more_and_the_last_one_closes_the_store(
    context: taddons.context,
) -> None:
    seen: list[str] = []
    leaving, staying = _step("leaving", Rank.ADMIT, seen), _step("staying", Rank.COUNT, seen)
    context.master.addons.add(leaving, staying)
    store = flows.suite().store
    context.master.addons.remove(leaving)
    run(context, "request", model_call())
    assert seen == ["staying"]
    assert flows.suite().store is store
    store.touch_session("s")
    context.master.addons.remove(staying)
    context.master.addons.remove(context.member)  # type: ignore[attr-defined]
    assert flows.suite().members == []
    assert not any(flows.suite().steps.values())
    assert [row["id"] for row in store.sessions()] == ["s"], "closed, and nothing lost"


def test_a_replayed_flow_is_a_new_exchange(context: taddons.context) -> None:
    seen: list[str] = []
    ended: list[str] = []
    context.master.addons.add(_step("count", Rank.COUNT, seen), _ending(ended))
    flow = model_call()
    run(context, "request", flow)
    first = flows.exchange(flow)
    flow.response = http.Response.make(200, b"{}")
    run(context, "response", flow)
    assert first is not None
    flow.response = None
    run(context, "request", flow)
    flow.response = http.Response.make(200, b"{}")
    run(context, "response", flow)
    run(context, "response", flow)
    assert flows.exchange(flow) is not first
    assert seen == ["count", "count"]
    assert len(ended) == 2


def _ending(ended: list[str]) -> Any:
    class Ending(Member):
        @flows.step(Rank.RECORD)
        @flows.fail_open
        def response(self, flow: http.HTTPFlow) -> None:
            ended.append(flow.id)

    return Ending()


def test_a_flow_has_ended_for_all_steps_alike(context: taddons.context) -> None:
    flow = model_call()
    run(context, "request", flow)
    found = flows.exchange(flow)
    assert found is not None
    assert flows.live_exchanges() == [(flow, found)]
    context.master.addons.add(_ending([]))
    flow.response = http.Response.make(418, b"tea")
    run(context, "response", flow)
    assert flows.live_exchanges() == []
    assert (found.status, found.response_bytes) == (418, 3)
    assert found.ended is not None


# --- exchanges


def test_an_exchange_is_read_once(context: taddons.context) -> None:
    flow = model_call()
    found = flows.exchange(flow)
    assert found is not None
    flow.request.content = b"not read again"
    assert flows.exchange(flow) is found
    assert (found.model, found.dialect.name, found.request_bytes) == ("m", "openai", len(BODY))


@pytest.mark.parametrize(
    ("host", "path", "body"),
    [
        ("example.com", "/v1/chat/completions", BODY),
        ("api.openai.com", "/v1/files", BODY),
        ("api.openai.com", "/v1/chat/completions", b"{"),
        ("api.openai.com", "/v1/chat/completions", b"[]"),
    ],
)
def test_what_is_no_model_call_is_no_exchange(
    context: taddons.context, host: str, path: str, body: bytes
) -> None:
    flow = model_call(body, path)
    flow.request.host = host
    assert flows.exchange(flow) is None
    assert flow.request.content == body
    assert bool(flows.malformed(flow)) == (body != BODY)


def test_our_own_headers_leave_the_request_whatever_it_is(context: taddons.context) -> None:
    for host in ("api.openai.com", "example.com"):
        flow = model_call()
        flow.request.host = host
        flow.request.headers["X-Kimi-Session"] = "s"
        flows.exchange(flow)
        assert "x-kimi-session" not in flow.request.headers


US, THEM = ("127.0.0.1", 8080), ("192.0.2.9", 8080)


@pytest.mark.parametrize(
    ("listening", "host", "port", "hosts", "us"),
    [
        (US, "127.0.0.1", 8080, [], True),
        (US, "localhost", 8080, [], True),
        (US, "LOCALHOST.", 8080, [], True),
        (US, "api.localhost", 8080, [], True),
        (US, "127.1.2.3", 8080, [], True),
        (US, "0.0.0.0", 8080, [], True),
        (US, "::1", 8080, [], True),
        (US, "[::1]", 8080, [], True),
        (US, "::ffff:127.0.0.1", 8080, [], True),
        (US, "localhost", 8081, [], False),
        (US, "localhost", 80, [], False),
        (US, "192.0.2.9", 8080, [], False),
        (US, "evil.example", 8080, [], False),
        (US, "localhost.evil.example", 8080, [], False),
        (US, "xlocalhost", 8080, [], False),
        (US, "api.openai.com", 443, [], False),
        (THEM, "192.0.2.9", 8080, [], True),
        (THEM, "192.0.2.10", 8080, [], False),
        (("2001:db8::1", 8080, 0, 0), "2001:db8::1", 8080, [], True),
        (("2001:db8::1", 8080, 0, 0), "[2001:db8::1]", 8080, [], True),
        (("2001:db8::1", 8080, 0, 0), "2001:db8::2", 8080, [], False),
        (US, "llm.lan", 8080, ["llm.lan"], True),
        (US, "LLM.lan", 80, ["llm.LAN"], True),
        (US, "llm.lan", 9000, ["llm.lan:9000"], True),
        (US, "llm.lan", 9001, ["llm.lan:9000"], False),
        (US, "other.lan", 8080, ["llm.lan"], False),
        (None, "localhost", 8080, [], False),
    ],
)
def test_who_addresses_the_proxy_itself(
    context: taddons.context,
    listening: tuple[Any, ...] | None,
    host: str,
    port: int,
    hosts: list[str],
    us: bool,
) -> None:
    context.options.update(kimi_hosts=hosts)
    flow = model_call()
    flow.server_conn.address = None
    flow.client_conn.sockname = listening  # type: ignore[assignment]
    flow.request.host, flow.request.port = host, port
    assert flows.addressed_to_us(flow) is us
    flow.server_conn.address = (host, port)  # the same through CONNECT
    assert flows.addressed_to_us(flow) is False


# --- the pipe


def piped(
    *stages: Any, dialect: Dialect = dialects.OPENAI, framing: Any = None, **headers: str
) -> Pipe:
    flow = model_call()
    flow.response = http.Response.make(200)
    for name, value in headers.items():
        flow.response.headers[name.replace("_", "-")] = value
    exchange = Exchange(flow.id, dialect, "chat", Document(BODY, dialect.shape))
    encoding = flow.response.headers.get("content-encoding", "")
    return Pipe(flow.id, exchange, framing or SSE(), list(stages), encoding)


class Stage:
    """Writes down what it sees; `held` events are kept back until the end."""

    on_failure = "pass"

    def __init__(self, rank: int = 10, *, reads_only: bool = False, hold: int = 0) -> None:
        self.rank, self.reads_only, self.hold = rank, reads_only, hold
        self.seen: list[bytes] = []
        self.held: list[Event] = []
        self.ends = 0

    def feed(self, event: Event) -> Iterable[Event]:
        self.seen.append(event.data)
        if len(self.held) < self.hold:
            self.held.append(event)
            return ()
        return (event,)

    def end(self) -> Iterable[Event]:
        self.ends += 1
        return self.held


class Dropping(Stage):
    def feed(self, event: Event) -> Iterable[Event]:
        self.seen.append(event.data)
        return ()


class Failing(Stage):
    def __init__(self, at: int = 1, on_failure: str = "pass", **options: Any) -> None:
        super().__init__(**options)
        self.at, self.on_failure = at, on_failure

    def feed(self, event: Event) -> Iterable[Event]:
        if len(self.seen) == self.at:
            raise ValueError("secret words")
        return super().feed(event)


EVENTS = [b'data: {"n":%d}\n\n' % n for n in range(4)]


def test_a_piece_that_completes_no_event_is_no_piece() -> None:
    pipe = piped(Stage())
    assert list(pipe(b"data: {")) == []
    assert list(pipe(b"}\n")) == []
    assert list(pipe(b"\n")) == [b"data: {}\n\n"]
    assert list(pipe(b"")) == []


def test_an_event_that_a_stage_drops_is_no_piece() -> None:
    pipe = piped(Dropping())
    assert [piece for event in [*EVENTS, b""] for piece in pipe(event)] == []
    assert pipe.sent_bytes == 0


def test_where_all_only_read_the_pieces_pass_as_they_come() -> None:
    stage = Stage(reads_only=True)
    pipe = piped(stage)
    stream = b"".join(EVENTS) + b"data: rest"
    pieces = [stream[i : i + 5] for i in range(0, len(stream), 5)]
    assert [list(pipe(piece)) for piece in pieces] == [[piece] for piece in pieces]
    assert list(pipe(b"")) == []
    assert stage.seen == [b'{"n":0}', b'{"n":1}', b'{"n":2}', b'{"n":3}', b"rest"]
    assert stage.ends == 1
    assert (pipe.content, pipe.sent_bytes) == (stream, len(stream))


def test_what_is_held_comes_at_the_end_through_the_later_stages() -> None:
    first, second, third = Stage(10, hold=2), Stage(20, hold=1), Stage(30)
    pipe = piped(first, second, third)
    out = [bytes(p) for event in [*EVENTS, b""] for p in pipe(event)]
    assert sorted(out) == EVENTS
    assert out == [EVENTS[3], EVENTS[0], EVENTS[1], EVENTS[2]]
    assert [s.ends for s in (first, second, third)] == [1, 1, 1]


def test_a_stage_that_fails_at_the_end_leaves_the_others_their_turn() -> None:
    class Last(Stage):
        def end(self) -> Iterable[Event]:
            raise ValueError

    keeps = [Stage(20, hold=1), Stage(30, hold=1)]
    pipe = piped(Last(10), *keeps)
    out = [p for event in [*EVENTS[:3], b""] for p in pipe(event)]
    assert sorted(out) == EVENTS[:3]
    assert [keep.ends for keep in keeps] == [1, 1]


class Glancing(Stage):
    def lets_pass(self, first: bytes) -> bool:
        return first.startswith(b"data: {}")


@pytest.mark.parametrize("more", [[], [Glancing()], [Stage()]], ids=["alone", "two", "unsure"])
def test_what_a_stage_lets_pass_at_a_glance_leaves_before_it_is_read(more: list[Stage]) -> None:
    stage = Glancing()
    pipe = piped(stage, *more)
    sent = iter(pipe(b"data: {}\n\n"))
    assert next(sent) == b"data: {}\n\n"
    waits = bool(more) and not isinstance(more[0], Glancing)
    assert len(stage.seen) == (1 if waits else 0)
    assert list(sent) == []
    assert len(stage.seen) == 1
    assert list(pipe(b"data: {}\n\n")) == [b"data: {}\n\n"]
    assert len(stage.seen) == 2


@pytest.mark.parametrize(
    "first", [b"data: {}\n", b"data: {}", b"data: {}\n\ndata: {}", b"data: {}\r\n"]
)
def test_half_an_event_is_not_let_pass(first: bytes) -> None:
    stage = Glancing()
    pipe = piped(stage)
    whole = first + b"\n\n"
    out = [*pipe(first), *pipe(b"\n\n"), *pipe(b"")]
    assert b"".join(out) == whole


def test_a_cut_reply_ends_each_stage_once_and_sends_nothing() -> None:
    stage = Stage(hold=1)
    pipe = piped(stage)
    list(pipe(EVENTS[0] + b"data: half"))
    pipe.close()
    pipe.close()
    assert list(pipe(b"")) == []
    assert stage.ends == 1
    assert stage.seen == [b'{"n":0}', b"half"]
    assert pipe.content == b""


def test_a_stage_that_fails_is_taken_out_and_nothing_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing, later = Failing(at=2, hold=2), Stage(20)
    pipe = piped(failing, later)
    out = [p for event in [b"".join(EVENTS), b""] for p in pipe(event)]
    assert out == EVENTS
    assert len(later.seen) == 4
    assert len(caplog.records) == 1
    assert "secret words" not in caplog.text


@pytest.mark.parametrize("dialect", dialects.DIALECTS.values(), ids=lambda d: d.name)
def test_after_a_stage_that_must_not_be_left_out_only_an_error_follows(dialect: Dialect) -> None:
    reading, later = Stage(0, reads_only=True), Stage(20)
    pipe = piped(reading, Failing(at=1, on_failure="end"), later, dialect=dialect)
    out = [p for event in [*EVENTS, b""] for p in pipe(event)]
    assert out[0] == EVENTS[0]
    [error] = SSE().feed(b"".join(out[1:]))
    assert "message" in str(json.loads(error.data))
    assert len(reading.seen) == 4, "what the provider bills is counted"
    assert len(later.seen) == 1


@pytest.mark.parametrize("at", [0, 1, 2])
def test_in_a_json_array_the_error_closes_the_array(at: int) -> None:
    pipe = piped(Failing(at=at, on_failure="end"), dialect=dialects.GEMINI, framing=JSONArray())
    out = b"".join(
        p for piece in (b'[{"n":0}', b',\n{"n":1},', b'{"n":2}', b"]", b"") for p in pipe(piece)
    )
    *values, error = json.loads(out)
    assert values == [{"n": n} for n in range(at)]
    assert error["error"]["code"] == 502


def test_a_long_reply_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = b"data: " + b"x" * (1 << 20) + b"\n\n"
    pipe = piped(Stage(reads_only=True))
    times = pipe_module.MAX_KEPT_BYTES // len(piece)
    for _ in range(times):
        list(pipe(piece))
    assert pipe.content == piece * times
    list(pipe(piece))
    assert pipe.content is None
    assert pipe._kept == []
    assert pipe.sent_bytes == len(piece) * (times + 1)


def test_an_unknown_coding_passes_untouched() -> None:
    stage = Stage()
    pipe = piped(stage, content_encoding="rot13")
    assert list(pipe(b"qngn: k")) == [b"qngn: k"]
    assert list(pipe(b"")) == []
    assert stage.seen == []


# --- streamed and whole alike


class Shouting(Stage):
    """Edits: a body or an event, in the same way."""

    def feed(self, event: Event) -> Iterable[Event]:
        return (Event(event.data.upper(), event.raw.upper(), event.type),)


class Doubling(Stage):
    def feed(self, event: Event) -> Iterable[Event]:
        return (event, event)


def _stages(picks: list[int]) -> list[Stage]:
    made = [
        Stage(0, reads_only=True),
        Shouting(10),
        Stage(20, hold=1),
        Doubling(30),
        Failing(at=0, rank=40),
    ]
    return [made[pick] for pick in picks]


@settings(max_examples=150, deadline=None)
@given(
    st.binary(min_size=1, max_size=80).filter(lambda b: not set(b) & set(b'\r\n\0[]{}"')),
    st.lists(st.integers(0, 4), unique=True).map(sorted),
    st.lists(st.integers(0, 100), max_size=4),
)
def test_a_whole_body_and_one_event_pass_through_stages_alike(
    text: bytes, picks: list[int], cuts: list[int]
) -> None:
    """The pipe's result for a stream of one event is what drain makes of that event's bytes."""
    raw = b"data: " + text + b"\n\n"
    flow = tflow.tflow()
    state = flows._state(flow)
    state.read = True
    shape = dialects.OPENAI.shape
    state.exchange = Exchange(flow.id, dialects.OPENAI, "chat", Document(BODY, shape))
    flow.response = http.Response.make(200, raw)
    for stage in _stages(picks):
        flows.add_stage(flow, stage)
    flows.drain(flow)
    flows.drain(flow)
    whole = flow.response.content
    pipe = piped(*_stages(picks))
    points = sorted({0, len(raw), *(cut % len(raw) for cut in cuts)})
    pieces = [raw[a:b] for a, b in itertools.pairwise(points)]
    assert b"".join(p for piece in [*pieces, b""] for p in pipe(piece)) == whole


def test_the_reader_learns_the_same_from_a_stream_and_from_a_body() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 5}
    whole = {
        "choices": [{"message": {"content": "good day"}, "finish_reason": "stop"}],
        "usage": usage,
    }
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": "good "}}]},
        {"choices": [{"delta": {"content": "day"}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
    ]
    streamed = ReadReply(dialects.OPENAI.reader())
    pipe = piped(streamed, HideUsage())
    for piece in [
        *(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks),
        b"data: [DONE]\n\n",
        b"",
    ]:
        list(pipe(piece))
    body = json.dumps(whole).encode()
    buffered = ReadReply(dialects.OPENAI.reader())
    list(buffered.feed(Event(body, body, "body")))
    one, other = streamed.reader.finish(), buffered.reader.finish()
    assert "".join(one.text) == "".join(other.text) == "good day"
    assert one.usage == other.usage
    assert one.complete
    assert other.complete
    assert b"usage" not in (pipe.content or b"")


def test_answers_of_our_own_see_no_stage(context: taddons.context) -> None:
    flow = model_call()
    stage = Shouting()
    flows.exchange(flow)
    flows.add_stage(flow, stage)
    flows.refuse(flow, 429, "too much")
    flows.drain(flow)
    assert flow.response is not None
    assert b"too much" in (flow.response.content or b"")


def test_a_refused_head_request_gets_no_body(context: taddons.context) -> None:
    flow = model_call()
    flow.request.method = "HEAD"
    flows.refuse(flow, 404, "nothing here")
    assert flow.response is not None
    assert flow.response.content == b""
