"""Where the core meets mitmproxy: exchanges, steps, stages, refusals.

A handler of an addon is a *step*: `@step(Rank.COUNT)` on `request`, `responseheaders`,
`response` or `error`. The first hook that mitmproxy calls for an event runs the steps of
all loaded addons, in the order of their ranks, so that the order in which scripts were
given does not matter. A reply passes through *stages* in the same way, streamed or not.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import ipaddress
import logging
import time
from collections import deque
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from mitmproxy import ctx, exceptions, http
from mitmproxy.addonmanager import Loader
from mitmproxy.connection import Server
from mitmproxy.flow import Error
from mitmproxy.net.http.url import hostport
from mitmproxy.proxy.mode_specs import ProxyMode, UpstreamMode

from kimi_core import dialects, places, relay, store
from kimi_core.dialects import Call
from kimi_core.document import Document, NotJSON
from kimi_core.exchange import Exchange
from kimi_core.pipe import Pipe, StageFailed, whole
from kimi_core.rules import Match, Rules, RulesError, RulesFile, default_rules_path
from kimi_core.sessions import Sessions
from kimi_core.sse import SSE, Framing, JSONArray
from kimi_core.stages import Stage

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"

_IN_THREAD_BYTES = 1024 * 1024
_RELOAD_EVERY_S = 1.0


class Rank(IntEnum):
    """The order of the chain, whatever the order of loading; all.py lists the addons in it."""

    ADMIT = 0
    ROUTE = 10
    LIMIT = 20
    MEMORY = 30
    COMPRESS = 40
    MASK = 50  # after it, so that no reference points at what a compression took out
    CACHE = 60
    ENFORCE = 70
    NORMALIZE = 75
    COUNT = 80
    RECORD = 82
    SHOW = 84
    VIEW = 86
    DISPATCH = 90


# --- what all addons of one proxy share -----------------------------------------------


class Suite:
    """What the addons of one proxy share: the steps, the rules, the store, the sessions."""

    def __init__(self) -> None:
        self.steps: dict[str, list[tuple[int, Any, Callable[..., Any]]]] = {}
        self.members: list[Any] = []
        self.live: WeakSet[http.HTTPFlow] = WeakSet()
        """The flows that have not ended, whether or not they carry an exchange."""
        self._wanted: str | None = None
        self._rules: RulesFile | None = None
        self._next_look = 0.0
        self._store: store.Store | None = None
        self._sessions: Sessions | None = None
        self.hosts: frozenset[str] = frozenset()
        self.relay: relay.Relay | None = None
        """Answers the exchanges that have a job; made for the first of them."""
        self._client: relay.Client | None = None
        self.relayed: WeakValueDictionary[str, http.HTTPFlow] = WeakValueDictionary()
        """The flows on their way to the relay, by one-time host name."""
        self.on_change: Callable[[], None] | None = None
        """Set by the one that shows what the suite is like; see `announce`."""

    def announce(self) -> None:
        """Have what is shown read anew: something has changed besides an exchange that ended.

        To be called on the event loop; rows that are queued by then can be read when it is heard.
        """
        if self.on_change is not None:
            self.on_change()

    @property
    def rules(self) -> Rules:
        """Return the rules in force, read again when the file has changed.

        Raises OptionsError when they are wrong at the first reading.
        """
        if self._rules is None:
            path = Path(ctx.options.kimi_rules) if ctx.options.kimi_rules else default_rules_path()
            try:
                self._rules = RulesFile(path.expanduser())
            except RulesError as error:
                raise exceptions.OptionsError(str(error)) from None
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _RELOAD_EVERY_S
            if problem := self._rules.refresh():
                logger.warning("The old rules stay in force: %s", problem)
        return self._rules.current

    @property
    def store(self) -> store.Store:
        if self._store is None:
            path = ctx.options.kimi_store or str(places.store())
            self._store = store.shared(Path(path).expanduser())
        return self._store

    @property
    def sessions(self) -> Sessions:
        if self._sessions is None:
            self._sessions = Sessions(self.store)
        return self._sessions

    def configure(self, updated: set[str]) -> None:
        """Take new options; each addon calls it, the first call for an option does the work.

        Raises OptionsError when rules.yaml is wrong, except at start: there mitmproxy would
        print a traceback around it, while an ERROR in the log ends it just as well.
        """
        if "kimi_rules" in updated and self._wanted != ctx.options.kimi_rules:
            self._wanted = ctx.options.kimi_rules
            self._rules = None
            try:
                _ = self.rules
            except exceptions.OptionsError as error:
                server = ctx.master.addons.get("proxyserver")
                if server is None or server.is_running:
                    raise
                logger.error("%s", error)
        if "kimi_hosts" in updated:
            self.hosts = frozenset(host.strip().lower() for host in ctx.options.kimi_hosts)
        if updated & _UPSTREAM_OPTIONS:
            if self.relay is not None:
                self.relay.client.settings = _upstream_settings()
            if self._client is not None:
                self._client.settings = _upstream_settings()

    @property
    def client(self) -> relay.Client:
        """Return what sends requests of our own, as mitmproxy itself would reach a provider."""
        if self._client is None:
            self._client = relay.Client(_upstream_settings())
        return self._client

    async def start_relay(self) -> relay.Relay:
        """Return the relay, listening. Raises OSError."""
        if self.relay is None:
            made = relay.Relay(relay.Client(_upstream_settings()))
            await made.start()
            if self.relay is None:
                self.relay = made
            else:  # another flow was faster
                await made.stop()
        return self.relay

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._store is not None:
            store.release(self._store)
            self._store = self._sessions = None


_suites: WeakKeyDictionary[Any, Suite] = WeakKeyDictionary()


def suite() -> Suite:
    """Return what the addons of the running proxy share."""
    found = _suites.get(ctx.master)
    if found is None:
        found = _suites[ctx.master] = Suite()
    return found


def join(addon: Any, loader: Loader) -> None:
    """Make `addon` one of the suite; each calls it in its `load`.

    Adds the options that all share and sets what the suite needs of mitmproxy.
    """
    loader.add_option(
        "kimi_rules", str, "", "Path of rules.yaml; empty takes the one of the checkout."
    )
    loader.add_option(
        "kimi_store",
        str,
        "",
        "Path of the SQLite file; empty takes ~/.local/state/kimi-proxy/kimi.db.",
    )
    loader.add_option(
        "kimi_hosts",
        typespec=Sequence[str],
        default=[],
        help="Further HOST or HOST:PORT names by which clients reach this proxy as a base URL.",
    )
    loader.add_option(
        "kimi_bypass",
        bool,
        False,
        "Edit no request and mend no reply; routing, keys and counting stay.",
    )
    defaults()
    members = suite()
    members.members.append(addon)
    if not hasattr(addon, "request"):
        # Whoever only looks at replies still has the request read before it leaves.
        addon.request = functools.partial(_run, "request")
    for event in ("request", "responseheaders", "response", "error"):
        handler = getattr(addon, event, None)
        if handler is not None and (rank := getattr(handler, "rank", None)) is not None:
            steps = members.steps.setdefault(event, [])
            steps.append((rank, addon, handler.step))
            steps.sort(key=lambda entry: entry[0])


def leave(addon: Any) -> Awaitable[None]:
    """Take `addon` out of the suite; each returns this from its `done`.

    The last one closes the store. When the proxy stops, exchanges that are still open end
    first, as cut off. No coroutine function, because mitmproxy calls `done` from synchronous
    code when a script is reloaded.
    """
    if ctx.master.should_exit.is_set() and (suite().live or _busy or suite().relay):
        return _end_and_leave(addon)
    _leave(addon)
    return _Nothing()


async def _end_and_leave(addon: Any) -> None:
    for flow in list(suite().live):  # those that carry no exchange may carry a key
        flow.error = flow.error or Error("kimi-proxy stopped")
        _run("error", flow)
    if _busy:
        await asyncio.wait(set(_busy))
    members = suite()
    if members.relay is not None:
        await members.relay.stop()
        members.relay = None
    _leave(addon)


def _leave(addon: Any) -> None:
    members = suite()
    if addon in members.members:
        members.members.remove(addon)
    for event, steps in members.steps.items():
        members.steps[event] = [entry for entry in steps if entry[1] is not addon]
    if not members.members:
        members.close()


class _Nothing:
    """An awaitable that has nothing to wait for, and may as well be dropped."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


def defaults() -> None:
    """Set what the suite needs of mitmproxy, unless the user said otherwise."""
    options = ctx.options
    wanted: dict[str, Any] = {
        "connection_strategy": "lazy",  # "eager" dials before we know where to
        "confdir": str(places.confdir()),
        # mitmproxy 12 may have begun to listen by now; Guard then turns other hosts away.
        "listen_host": LOOPBACK,
    }
    for name, value in wanted.items():
        must = name == "connection_strategy"
        if name in options and (must or not options.has_changed(name)):
            options.update(**{name: value})


# --- steps ----------------------------------------------------------------------------

Handler = TypeVar("Handler", bound=Callable[..., Any])


class _State:
    """What we know of one flow; kept as long as the flow lives."""

    __slots__ = (
        "answered",
        "call",
        "done",
        "ended",
        "exchange",
        "headers",
        "key",
        "made",
        "malformed",
        "pipe",
        "read",
        "relayed",
        "replays",
        "secrets",
        "sent_to",
        "stages",
        "us",
    )

    def __init__(self, replays: int = 0) -> None:
        self.replays = replays
        self.done: set[str] = set()
        self.read = False
        self.us = False
        self.call: Call | None = None
        self.exchange: Exchange | None = None
        self.headers: dict[str, str] = {}
        self.key = ""
        self.malformed = ""
        self.stages: list[Stage] = []
        self.made = False
        self.pipe: Pipe | None = None
        self.answered = False
        self.relayed = False
        self.sent_to: tuple[str, bytes, str, int] | None = None
        self.ended = False
        self.secrets: tuple[bytes, ...] = ()


_STATE = "_kimi_state"


def _state(flow: http.HTTPFlow) -> _State:
    # In the flow's own dict: a tenth of the cost of a weak mapping, and asked for thirty times.
    # What mitmproxy saves or copies of a flow is named in its classes, so this is never among it.
    own = vars(flow)
    state: _State | None = own.get(_STATE)
    if state is None:
        state = own[_STATE] = _State()
    return state


def step(rank: Rank) -> Callable[[Handler], Handler]:
    """Make a handler one step of its event, at its place in the chain."""

    def decorate(handler: Handler) -> Handler:
        event = handler.__name__

        @functools.wraps(handler)
        def hook(self: Any, flow: http.HTTPFlow) -> Awaitable[None] | None:
            return _run(event, flow)

        hook.rank = rank  # type: ignore[attr-defined]
        hook.step = handler  # type: ignore[attr-defined]
        return hook  # type: ignore[return-value]

    return decorate


def _run(event: str, flow: http.HTTPFlow) -> Awaitable[None] | None:
    state = _state(flow)
    if event == "request" and state.ended:  # the user replays the flow
        state = vars(flow)[_STATE] = _State(state.replays + 1)
    if event in state.done:
        return None
    state.done.add(event)
    steps = suite().steps.get(event, ())
    running = _steps(event, flow, state, iter(steps))
    if event == "request" and len(flow.request.raw_content or b"") > _IN_THREAD_BYTES:
        return _slowly(running, lambda: _read_all(flow, state))
    if event == "response" and len((flow.response and flow.response.raw_content) or b"") > (
        _IN_THREAD_BYTES
    ):
        return _to_the_end(_slowly(running, lambda: drain(flow)))
    pending = next(running, None)
    if pending is None:
        return None
    rest = _finish(pending, running)
    return rest if event in ("request", "responseheaders") else _to_the_end(rest)


_busy: set[asyncio.Future[None]] = set()
"""The ends of exchanges that are being worked out."""


def _to_the_end(steps: Coroutine[Any, Any, None]) -> Awaitable[None] | None:
    """Run what remains of an ended exchange, even if the connection's own task is cancelled."""
    task = asyncio.ensure_future(steps)
    if task.done():  # started eagerly, and nothing to wait for
        return task
    _busy.add(task)
    task.add_done_callback(_busy.discard)
    return asyncio.shield(task)


def _steps(
    event: str,
    flow: http.HTTPFlow,
    state: _State,
    steps: Iterator[tuple[int, Any, Callable[..., Any]]],
) -> Iterator[Awaitable[None]]:
    if event == "request":
        _read_safely(flow, state)
    elif event == "response":
        drain(flow)
    elif event == "error" and state.pipe is not None and flow.response is not None:
        state.pipe.close()
        flow.response.data.content = state.pipe.content  # what came, for mitmweb to show
    if event in ("response", "error"):
        state.ended = True
        suite().live.discard(flow)
        if state.relayed:
            _back_from_relay(flow, state)
        if state.exchange is not None:
            _end(flow, state, state.exchange)
    for _, addon, handler in steps:
        if (pending := handler(addon, flow)) is not None and inspect.isawaitable(pending):
            yield pending
    if event == "responseheaders":
        _open(flow, state)


async def _finish(pending: Awaitable[None], running: Iterator[Awaitable[None]]) -> None:
    await pending
    for later in running:
        await later


async def _slowly(running: Iterator[Awaitable[None]], work: Callable[[], Any]) -> None:
    await asyncio.to_thread(work)
    for pending in running:
        await pending


def fail_open(handler: Handler) -> Handler:
    """Let the flow pass when `handler` raises: one warning, and the number is missing."""
    return cast(Handler, _guarded(handler, None))


def fail_closed(handler: Handler) -> Handler:
    """Answer 502 when `handler` raises, because letting the flow pass would do harm."""

    def block(flow: http.HTTPFlow, name: str) -> None:
        refuse(flow, 502, f"kimi-proxy could not check this request ({name} failed).")

    return cast(Handler, _guarded(handler, block))


def _guarded(handler: Any, block: Callable[[http.HTTPFlow, str], None] | None) -> Any:
    def fail(flow: http.HTTPFlow, error: Exception) -> None:
        name = handler.__qualname__
        # An exception's text may quote a prompt or a key: its type and place are enough.
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
        logger.warning("%s: %s failed: %s at %s", flow.id, name, type(error).__name__, where)
        if block is not None and not flow.response:
            block(flow, name)

    if inspect.iscoroutinefunction(handler):

        @functools.wraps(handler)
        async def guarded_async(self: Any, flow: http.HTTPFlow, *more: Any) -> None:
            try:
                await handler(self, flow, *more)
            except Exception as error:
                fail(flow, error)

        return guarded_async

    @functools.wraps(handler)
    def guarded(self: Any, flow: http.HTTPFlow, *more: Any) -> Any:
        try:
            return handler(self, flow, *more)
        except Exception as error:
            fail(flow, error)
            return None

    return guarded


# --- exchanges ------------------------------------------------------------------------

OWN_HEADERS = ("x-kimi-session", "x-kimi-bypass", "x-kimi-project")


def exchange(flow: http.HTTPFlow) -> Exchange | None:
    """Return the exchange that `flow` carries; None when it is no call to a model."""
    state = _state(flow)
    if not state.read:
        _read(flow, state)
    return state.exchange


def asked(flow: http.HTTPFlow) -> Call | None:
    """Return what the request's path asks for, whether or not its body can be read."""
    return _state(flow).call


def malformed(flow: http.HTTPFlow) -> str:
    """Return why the body of a model call cannot be read, empty when it can."""
    return _state(flow).malformed


def for_us(flow: http.HTTPFlow) -> bool:
    """Tell whether the client addressed the proxy itself, by a base URL."""
    return _state(flow).us


def client_header(flow: http.HTTPFlow, name: str) -> str:
    """Return a header as the client sent it, by its lower-case name; empty when it did not."""
    return _state(flow).headers.get(name, "")


def client_key(flow: http.HTTPFlow) -> str:
    """Return the key that the client sent, empty when it sent none."""
    return _state(flow).key


def bypassed(flow: http.HTTPFlow) -> bool:
    """Tell whether nothing may be edited: by the `x-kimi-bypass` header, `kimi_bypass` or a rule.

    Who may be asked, whose key is sent, and what is counted stay as they are.
    """
    said = client_header(flow, "x-kimi-bypass").strip().lower()
    if said:
        return said not in ("0", "false", "no", "off")
    if ctx.options.kimi_bypass:
        return True
    ruled = rule(flow)
    return ruled is not None and ruled.bypass


def rule(flow: http.HTTPFlow) -> Match | None:
    """Return what the rules say of the model that the client asks for, where it sent it itself.

    To be asked before the request is sent on to another host.
    """
    found = exchange(flow)
    if found is None:
        return None
    rules = suite().rules
    if found.for_us:
        addressed = rules.providers.get(found.path_provider)
    else:
        addressed = rules.providers_by_host(flow.request.host, flow.request.port)
    return rules.about(found.model, addressed)


def change_headers(
    message: http.Message,
    *,
    drop: Iterable[str] = (),
    put: Mapping[str, str] | None = None,
) -> None:
    """Take headers out of a message and put others in, in one pass; names in lower case."""
    fresh = {
        name.encode(): value.encode("utf-8", "surrogateescape")
        for name, value in (put or {}).items()
    }
    gone = {name.encode() for name in drop} | fresh.keys()
    kept = [field for field in message.headers.fields if field[0].lower() not in gone]
    message.headers.fields = (*kept, *fresh.items())


def prepare(flow: http.HTTPFlow, exchange: Exchange) -> None:
    """Do what the addons put off until the target is known; one that fails changes nothing."""
    for _, edit in sorted(exchange.at_dispatch, key=lambda entry: entry[0]):
        edits = exchange.document.edits()
        try:
            edit(exchange)
        except Exception as error:
            exchange.document.restore(edits)
            logger.warning("%s: the request is sent unedited: %s", flow.id, type(error).__name__)


def prepared(flow: http.HTTPFlow, exchange: Exchange, body: bytes) -> bytes:
    """Return the body of a later attempt with the same done to it.

    What stood in the body of the first one is as its target wants it, and keeps its bytes.
    """
    first, exchange.document = exchange.document, Document(body, exchange.dialect.shape)
    try:
        prepare(flow, exchange)
        return exchange.document.encode()
    finally:
        exchange.document = first


def live_exchanges() -> list[tuple[http.HTTPFlow, Exchange]]:
    """Return the exchanges that have not ended yet."""
    return [
        (flow, found) for flow in list(suite().live) if (found := _state(flow).exchange) is not None
    ]


def _read_safely(flow: http.HTTPFlow, state: _State) -> None:
    """Read the request; one that we fail to read is one that cannot be read."""
    try:
        _read(flow, state)
    except Exception as error:
        logger.warning("%s: the request cannot be read: %s", flow.id, type(error).__name__)
        state.malformed = f"kimi-proxy failed to read it ({type(error).__name__})"


def _read_all(flow: http.HTTPFlow, state: _State) -> None:
    """Read a large request, in a thread, as far as the steps will ask."""
    _read_safely(flow, state)
    if state.exchange is not None:
        suite().sessions.look(state.exchange)


def _read(flow: http.HTTPFlow, state: _State) -> None:
    if state.read:
        return
    state.read = True
    suite().live.add(flow)
    state.us = addressed_to_us(flow)
    # One pass over the raw fields: a look-up in mitmproxy's Headers takes microseconds.
    sent = state.headers
    for name, value in flow.request.headers.fields:
        sent.setdefault(name.lower().decode("latin-1"), value.decode("utf-8", "surrogateescape"))
    own = {name: sent[name] for name in OWN_HEADERS if name in sent}
    if own:
        change_headers(flow.request, drop=OWN_HEADERS)
    if not state.us and not is_llm_host(flow.request.host):
        return
    call = state.call = dialects.match(flow.request.method, flow.request.path)
    if call is None:
        return
    query = dict(flow.request.query.fields) if "key=" in flow.request.path else {}
    if call.operation == "models":  # of any dialect
        state.key = dialects.ANTHROPIC.key(sent, {}) or dialects.GEMINI.key(sent, query)
        return
    try:
        body = flow.request.content or b""
    except ValueError as error:
        state.malformed = str(error)
        return
    try:
        document = Document(body, call.dialect.shape)
    except NotJSON as error:
        state.malformed = str(error)
        return
    key = state.key = call.dialect.key(sent, query)
    found = Exchange(
        # A replayed flow is billed again, and is an exchange of its own.
        id=f"{flow.id}-{state.replays}" if state.replays else flow.id,
        dialect=call.dialect,
        operation=call.operation,
        document=document,
        path_model=call.model,
        path_provider=call.provider,
        for_us=state.us,
        headers=own,
        client=sent.get("user-agent", "").partition(" ")[0][:80],
        client_key_hash=hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        if key
        else "",
        request_bytes=len(body),
    )
    found.model = call.dialect.model(document, call.model)
    found.stream = call.dialect.streams(document, flow.request.path)
    state.exchange = found


def _end(flow: http.HTTPFlow, state: _State, ended: Exchange) -> None:
    ended.ended = time.perf_counter()
    ended.status = flow.response.status_code if flow.response else None
    if state.pipe is not None:
        ended.response_bytes = state.pipe.sent_bytes
    elif flow.response is not None:
        ended.response_bytes = len(flow.response.raw_content or b"")
    # A client may close as soon as it has the last event: nothing failed then.
    if flow.error is not None and not ended.error_type and not ended.reply.complete:
        ended.error_type = "connection"
    if not state.relayed and not ended.blocked and not state.answered:
        _make_stages(flow, state, ended)
    if ended.attempts and (last := ended.attempts[-1]).ended is None:
        last.ended = ended.ended
        if flow.error is not None and not last.reply.complete:
            last.error_type = last.error_type or "connection"
    flow.metadata["gen_ai.request.model"] = ended.model


def session_id(flow: http.HTTPFlow) -> str:
    """Return the id of the session that the flow's exchange belongs to."""
    found = exchange(flow)
    if found is None:
        return ""
    if not found.session_id:
        suite().sessions.assign(found)
        flow.metadata["gen_ai.conversation.id"] = found.session_id
    return found.session_id


def addressed_to_us(flow: http.HTTPFlow) -> bool:
    """Tell whether a request came without CONNECT and names one of our listen addresses.

    mitmproxy gives a flow within a CONNECT tunnel the tunnel's destination as server
    address, and none to a request that it has yet to find a destination for.
    """
    if flow.server_conn.address is not None or flow.is_replay:
        return False
    host, port = flow.request.host.lower(), flow.request.port
    named = suite().hosts
    if host in named or f"{host}:{port}" in named:
        return True
    sockname = flow.client_conn.sockname
    return bool(sockname) and port == sockname[1] and is_our_host(host, sockname[0])


def is_our_host(host: str, listening: str = "") -> bool:
    """Tell whether `host` is this machine's loopback or the address a client connected to."""
    host = host.strip("[]").lower().rstrip(".")
    if not host:
        return False
    if host == "localhost" or host.endswith(".localhost") or host == listening.lower():
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback or (mapped or address).is_unspecified)


def is_llm_host(host: str) -> bool:
    """Tell whether the rules name `host` as a provider's."""
    return host.lower().rstrip(".") in suite().rules.hosts()


def remember_secrets(flow: http.HTTPFlow, secrets: tuple[bytes, ...]) -> None:
    """Keep, for this flow's life and in memory only, what its reply must not repeat."""
    state = _state(flow)
    state.secrets = (*state.secrets, *(s for s in secrets if s not in state.secrets))


def secrets_of(flow: http.HTTPFlow) -> tuple[bytes, ...]:
    """Return the keys that were in the request."""
    return _state(flow).secrets


# --- answers of our own ---------------------------------------------------------------


def answer(flow: http.HTTPFlow, status: int, body: bytes, **headers: str) -> None:
    """Answer the request with `body` (JSON); the stages do not see it."""
    fields = {"content-type": "application/json", **headers}
    if flow.request.method.upper() == "HEAD":
        body = b""  # mitmproxy would send it, and the client would take it for the next answer
    flow.response = http.Response.make(status, body, fields)
    _state(flow).answered = True


def refuse(flow: http.HTTPFlow, status: int, message: str, type: str = "") -> None:
    """Answer with an error in the client's dialect, which says who speaks."""
    call = asked(flow)
    dialect = call.dialect if call else dialects.OPENAI
    if found := _state(flow).exchange:
        found.blocked = message
        found.error_type = type or str(status)
    answer(flow, status, dialect.error(status, message, type))


# --- exchanges that need more than one upstream request --------------------------------

_UPSTREAM_OPTIONS = frozenset(
    (
        "ssl_verify_upstream_trusted_ca",
        "ssl_verify_upstream_trusted_confdir",
        "ssl_insecure",
        "mode",
        "upstream_auth",
        "connect_addr",
    )
)
_ONE_TIME_HOST = "_kimi_one_time_host"


class _Address(tuple[str, int]):
    """An address that equals no other, even of the same host and port.

    mitmproxy opens at most five connections to one address for an HTTP/2 client, and takes an
    open one for the next flow to it; to the relay there is one for each flow.
    """

    __slots__ = ()
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__


def _upstream_settings() -> relay.Settings:
    """Return how mitmproxy itself would reach a provider."""
    options = ctx.options
    proxy, auth = "", None
    if options.mode and isinstance(mode := ProxyMode.parse(options.mode[0]), UpstreamMode):
        proxy = f"{mode.scheme}://{hostport(mode.scheme, *mode.address)}"
        if given := getattr(options, "upstream_auth", None):
            name, _, password = given.partition(":")
            auth = name, password
    return relay.Settings(
        ca_file=options.ssl_verify_upstream_trusted_ca,
        ca_folder=options.ssl_verify_upstream_trusted_confdir,
        insecure=options.ssl_insecure,
        proxy=proxy,
        proxy_auth=auth,
        local_address=getattr(options, "connect_addr", None),
    )


async def send_by_relay(flow: http.HTTPFlow, job: relay.Job) -> None:
    """Let `job` answer the request; for the last step, in place of sending it.

    The flow keeps its provider's Host header, and gets the rest of its address back when
    mitmproxy connects. Raises OSError when the relay cannot listen.
    """
    members, state, data = suite(), _state(flow), flow.request.data
    host = (await members.start_relay()).submit(job, flow.id)
    state.relayed = True
    state.sent_to = host, data.scheme, data.host, data.port
    members.relayed[host] = flow
    data.scheme, data.host, data.port = b"http", host, 80
    if flow.server_conn.via is not None:  # no proxy leads to the relay
        flow.server_conn = Server(address=flow.server_conn.address)


def names_relay(host: str) -> bool:
    """Tell whether a host name is a one-time name of the relay, or looks like one."""
    return host.lower().rstrip(".").endswith(relay.DOMAIN)


def relay_address(host: str) -> tuple[str, int] | None:
    """Return where a one-time host name leads; None when no job waits there."""
    found = suite().relay
    return found.address if found is not None and found.waits(host) else None


def relay_port() -> int | None:
    """Return the port at which the relay listens, if it does."""
    found = suite().relay
    return found.address[1] if found is not None else None


def leads_to_relay(server: Server) -> bool:
    """Tell whether a connection about to be made is one that `send_by_relay` asked for."""
    host = server.address[0] if server.address else ""
    return _ONE_TIME_HOST in vars(server) or (names_relay(host) and bool(relay_address(host)))


def connect_to_relay(server: Server) -> None:
    """Lead a connection to a one-time host name to the relay; leave all others alone."""
    host = server.address[0] if server.address else ""
    if not names_relay(host) or (address := relay_address(host)) is None:
        return
    vars(server)[_ONE_TIME_HOST] = host
    server.address = _Address(address)
    server.sockname = (LOOPBACK, 0)  # not from `connect_addr`
    # mitmproxy has its connection by now, so the flow may show again where it really goes.
    if (flow := suite().relayed.pop(host, None)) is not None:
        _restore_address(flow, _state(flow))


def connected_to_relay(server: Server) -> None:
    """Tell the relay, by the connection's own address, which job it is for."""
    host, found = vars(server).get(_ONE_TIME_HOST), suite().relay
    if host is not None and found is not None:
        found.expect(host, server.sockname)


def _restore_address(flow: http.HTTPFlow, state: _State) -> None:
    data = flow.request.data
    if state.sent_to is not None and data.host == state.sent_to[0]:
        _, data.scheme, data.host, data.port = state.sent_to


def _back_from_relay(flow: http.HTTPFlow, state: _State) -> None:
    """Forget a flow that has ended, and its job, should that not have begun."""
    _restore_address(flow, state)
    members = suite()
    if state.sent_to is not None:
        members.relayed.pop(state.sent_to[0], None)
        if members.relay is not None:
            members.relay.forget(state.sent_to[0])


# --- the way back ---------------------------------------------------------------------


def add_stage(flow: http.HTTPFlow, stage: Stage) -> None:
    """Let the reply of `flow` pass through `stage`; to be called before the reply begins."""
    stages = _state(flow).stages
    stages.append(stage)
    stages.sort(key=lambda entry: entry.rank)


def _make_stages(flow: http.HTTPFlow, state: _State, exchange: Exchange) -> None:
    """Add what the reply to the one upstream request passes through; the relay adds its own."""
    if state.made or state.relayed or state.answered:
        return
    state.made = True
    attempt = exchange.attempts[-1] if exchange.attempts else exchange.attempt()
    attempt.started_at, attempt.started = exchange.started_at, exchange.started
    for _, make in exchange.stages:
        try:
            add_stage(flow, make(attempt))
        except Exception as error:
            logger.warning("%s: a stage cannot be made: %s", flow.id, type(error).__name__)


def get_ready(flow: http.HTTPFlow) -> None:
    """Make what the reply will pass through, once the request is on its way."""
    state = _state(flow)
    if state.exchange is not None:
        # In the next turn of the loop, while the provider works, and not when its reply begins.
        loop = asyncio.get_running_loop()
        loop.call_soon(_make_stages, flow, state, state.exchange)


def is_streamed(flow: http.HTTPFlow) -> bool:
    """Tell whether the reply passes to the client as it comes."""
    return _state(flow).pipe is not None


def will_stream(flow: http.HTTPFlow) -> bool:
    """Tell, when the reply's headers have come, whether it will be streamed."""
    return _framing(flow, _state(flow)) is not None


def _framing(flow: http.HTTPFlow, state: _State) -> Framing | None:
    response = flow.response
    if response is None or state.answered or response.status_code == 204:
        return None
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "text/event-stream":
        return SSE()
    if (
        kind == "application/json"
        and response.status_code == 200
        and state.exchange is not None
        and state.exchange.stream
        and state.exchange.dialect is dialects.GEMINI
    ):
        return JSONArray()
    return None


_LENGTH = b"content-length"


def _open(flow: http.HTTPFlow, state: _State) -> None:
    """Let an event stream through as it comes; everything else is buffered by mitmproxy."""
    response, framing = flow.response, _framing(flow, state)
    if response is None or framing is None:
        return
    if state.exchange is None:
        response.stream = True
        return
    _make_stages(flow, state, state.exchange)
    headers = response.headers
    encoding = headers.get("content-encoding", "")
    state.pipe = Pipe(flow.id, state.exchange, framing, state.stages, encoding)
    if state.pipe.edits:
        kept = [f for f in headers.fields if f[0].lower() not in (b"content-encoding", _LENGTH)]
        if len(kept) < len(headers.fields):
            had_length = _LENGTH in {name.lower() for name, _ in headers.fields}
            headers.fields = tuple(kept)
            if had_length and response.http_version == "HTTP/1.1":
                headers["transfer-encoding"] = "chunked"
    response.stream = state.pipe
    if body := response.raw_content:
        # A flow out of a file: its reply is all there, and mitmproxy will not call the pipe.
        for piece in (body, b""):
            deque(state.pipe(piece), maxlen=0)


def drain(flow: http.HTTPFlow) -> None:
    """Send a buffered reply through the stages, once; a streamed one gets its bytes to show."""
    state = _state(flow)
    if "drained" in state.done or state.exchange is None or flow.response is None:
        return
    state.done.add("drained")
    response = flow.response
    if state.pipe is not None:
        state.pipe.close()
        response.data.content = state.pipe.content
        return
    if state.answered:
        return
    _make_stages(flow, state, state.exchange)
    if state.exchange.first_chunk is None:
        state.exchange.first_chunk = time.perf_counter()
    try:
        body = response.content or b""
    except ValueError:
        state.exchange.unread = True
        return
    try:
        out = whole(flow.id, state.stages, body)
    except StageFailed as failure:
        message = f"kimi-proxy could not pass this reply on ({failure} failed)."
        state.exchange.error_type = "stream_failed"
        answer(flow, 502, state.exchange.dialect.error(502, message))
        return
    if out != body:
        response.content = out
