"""Pick provider and model for each exchange, and, last of the chain, send it there."""

import logging
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from urllib.parse import quote, unquote_plus, urlsplit

from mitmproxy import http
from mitmproxy.addonmanager import Loader
from mitmproxy.net.http.url import hostport
from mitmproxy.proxy import server_hooks

from kimi_core import dialects, flows
from kimi_core.balance import Balancer
from kimi_core.dialects import Offer
from kimi_core.exchange import Exchange, Route
from kimi_core.flows import Rank
from kimi_core.relay import Client, Request, Writer
from kimi_core.rules import Match, Provider, Rules, Target

logger = logging.getLogger(__name__)

PATHS = (
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1beta/models/MODEL:generateContent",
    "/v1beta/models/MODEL:streamGenerateContent",
)


KEY_HEADERS = ("authorization", "x-api-key", "x-goog-api-key", "api-key", "cookie")
PROXY_HEADERS = ("proxy-authorization", "proxy-connection", "origin", "referer")


class Router:
    """Gives each exchange its route: by rule, else by what the client itself addressed.

    A request to a base URL of ours always gets a destination or a clear refusal; one that came
    for a provider's own host, with a model that no rule names, is left alone.
    """

    def __init__(self) -> None:
        self.balancer = Balancer()
        self._looked: tuple[Rules, object, frozenset[str]] | None = None

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def done(self) -> Awaitable[None]:
        return flows.leave(self)

    @flows.step(Rank.ROUTE)
    @flows.fail_closed
    def request(self, flow: http.HTTPFlow) -> None:
        if flow.response or flow.error:
            return
        rules = flows.suite().rules
        exchange = flows.exchange(flow)
        if exchange is None:
            if flows.for_us(flow):
                self._answer_without_exchange(flow, rules)
            return
        if exchange.for_us and not exchange.model:
            flows.refuse(flow, 400, "The request names no model.")
            return
        provider = self._addressed(flow, exchange, rules)
        if flow.response:
            return
        self._route(flow, exchange, rules, provider)

    def _answer_without_exchange(self, flow: http.HTTPFlow, rules: Rules) -> None:
        call = flows.asked(flow)
        if call is None:
            named = urlsplit(flow.request.path).path
            flows.refuse(
                flow,
                404,
                f"kimi-proxy has no {flow.request.method} {named[:200]}. It serves "
                f"{', '.join(PATHS)}, each also behind /PROVIDER, with PROVIDER one of "
                f"{', '.join(rules.providers)}.",
            )
        elif call.operation == "models":
            self._list_models(flow, rules, call.provider)
        else:
            flows.refuse(flow, 400, f"The body is no JSON object: {flows.malformed(flow)}")

    def _list_models(self, flow: http.HTTPFlow, rules: Rules, named: str) -> None:
        if named:
            provider = rules.providers.get(named)
            if provider is None or provider.problem:
                flows.refuse(flow, 404, _unknown_provider(named, rules, provider))
                return
            key = provider.key.reveal() if provider.key else ""
            if provider.takes_key and not key:
                key = flows.client_key(flow)
                if not _may_pass(key, provider, provider, rules, True):
                    flows.refuse(flow, 401, _no_key(provider))
                    return
            put = _redirect(flow, provider.base_url, "/models")
            _drop_key_from_query(flow)
            put |= _key_header(provider, provider.api, key)
            flows.change_headers(flow.request, drop=(*KEY_HEADERS, *PROXY_HEADERS), put=put)
            return
        offers = [
            Offer(rule.name, rule.targets[0].provider, rule.context) for rule in rules.offered()
        ]
        dialect: dialects.Dialect
        if flows.client_header(flow, "anthropic-version"):
            dialect = dialects.ANTHROPIC
        elif flows.client_header(flow, "x-goog-api-key") or "/v1beta" in flow.request.path:
            dialect = dialects.GEMINI
        else:
            dialect = dialects.OPENAI
        flows.answer(flow, 200, dialect.models(offers))

    def _addressed(self, flow: http.HTTPFlow, exchange: Exchange, rules: Rules) -> Provider | None:
        """Return the provider that the client itself named, by path or by host."""
        if not exchange.for_us:
            return rules.providers_by_host(flow.request.host, flow.request.port)
        if not exchange.path_provider:
            return None
        provider = rules.providers.get(exchange.path_provider)
        if provider is None:
            flows.refuse(flow, 404, _unknown_provider(exchange.path_provider, rules, None))
        return provider

    def _route(
        self, flow: http.HTTPFlow, exchange: Exchange, rules: Rules, addressed: Provider | None
    ) -> None:
        match = rules.match(exchange.model, addressed)
        if match is None and not exchange.for_us:
            exchange.route = Route(
                provider=addressed.name if addressed else flow.request.host,
                model=exchange.model,
                dialect=exchange.dialect.name,
                context=_window(rules, exchange.model),
                source=addressed,
            )
            flows.session_id(flow)
            return
        key = flows.client_key(flow)
        if match is None:
            found = addressed or rules.detect(None, exchange.model, key)
            if found is None and rules.default_model:
                match = rules.match(rules.default_model)
            if found is None and match is None:
                flows.refuse(flow, 404, _unknown_model(exchange.model, rules))
                return
            targets = match.targets if match else (Target(_known(found), exchange.model),)
        else:
            targets = match.targets
            if exchange.for_us and addressed is not None:
                # The path names a provider: a rule may say how it calls the model, no more.
                own = tuple(t for t in targets if t.provider.name == addressed.name)
                targets = own or (Target(addressed, exchange.model),)

        def has_key(provider: Provider) -> bool:
            if provider.key is not None or not provider.takes_key:
                return True
            return _may_pass(key, provider, addressed, rules, exchange.for_us)

        target = self._target(flow, exchange, rules, match, targets, has_key)
        if target is None:
            return
        provider = target.provider
        secret = provider.key
        keeps = provider.takes_key and secret is None
        exchange.route = Route(
            provider=provider.name,
            model=target.model,
            dialect=exchange.dialect.name,
            url=provider.url_for(exchange.dialect.name) or "",
            key=secret,
            keep_client_key=keeps,
            named=True,
            stream_usage=provider.stream_usage,
            context=(match.context if match else None) or _window(rules, exchange.model),
            source=provider,
        )
        if match is not None and match.strategy == "best" and len(match.targets) > 1:
            self.balancer.watch(exchange)

    def _target(
        self,
        flow: http.HTTPFlow,
        exchange: Exchange,
        rules: Rules,
        match: Match | None,
        targets: tuple[Target, ...],
        has_key: Callable[[Provider], bool],
    ) -> Target | None:
        """Return the target that the exchange goes to; refuse it when there is none."""
        usable = tuple(t for t in targets if not t.provider.problem)
        if not usable:
            flows.refuse(flow, 401, "; ".join(str(t.provider.problem) for t in targets))
            return None
        spoken = tuple(t for t in usable if t.provider.url_for(exchange.dialect.name))
        if not spoken:
            speaks = "; ".join(
                f"{t.provider.name} speaks {', '.join(t.provider.dialects)}" for t in usable
            )
            flows.refuse(
                flow,
                400,
                f"{exchange.model} cannot be asked in the {exchange.dialect.name} dialect: "
                f"{speaks}. Ask it in one of these.",
            )
            return None
        keyed = tuple(t for t in spoken if has_key(t.provider))
        if not keyed:
            flows.refuse(flow, 401, " ".join(dict.fromkeys(_no_key(t.provider) for t in spoken)))
            return None
        session = flows.session_id(flow)
        target = self.balancer.choose(match, keyed, session, rules.sticky) if match else keyed[0]
        if target.provider.name in self._loops(flow, rules):
            flows.refuse(
                flow,
                508,
                f"The base_url of provider {target.provider.name} leads back to kimi-proxy itself; "
                "write the provider's own address into rules.yaml.",
            )
            return None
        return target

    def _loops(self, flow: http.HTTPFlow, rules: Rules) -> frozenset[str]:
        """Return the providers whose base_url leads back to the address the client came to."""
        sockname = flow.client_conn.sockname
        if self._looked is None or self._looked[0] is not rules or self._looked[1] != sockname:
            listening = [(sockname[0], sockname[1])] if sockname else []
            found = frozenset(provider.name for provider in rules.points_at(listening))
            self._looked = rules, sockname, found
        return self._looked[2]


class Dispatch:
    """Sends each exchange on its route: what the addons asked for, then host, path and key.

    Where a route changes nothing, the original bytes leave.
    """

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def done(self) -> Awaitable[None]:
        return flows.leave(self)

    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        flows.connect_to_relay(data.server)

    def server_connected(self, data: server_hooks.ServerConnectionHookData) -> None:
        flows.connected_to_relay(data.server)

    @flows.step(Rank.DISPATCH)
    @flows.fail_closed
    def request(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        exchange = flows.exchange(flow)
        if flow.response or flow.error or exchange is None or exchange.route is None:
            return None
        route = exchange.route
        call = flows.asked(flow)
        flows.prepare(flow, exchange)
        drop: list[str] = []
        put: dict[str, str] = {}
        if route.url and call is not None:
            rest = call.rest
            if call.model and route.model != call.model:
                verb = rest.rpartition(":")[2]
                rest = f"/models/{quote(route.model, safe='/:@')}:{verb}"
            elif not call.model and route.model != exchange.model:
                exchange.document.set(("model",), route.model)
            put |= _redirect(flow, route.url, rest)
            drop += PROXY_HEADERS
            if exchange.stream:
                # A compressed stream would have to be undone to be read as it passes.
                put["accept-encoding"] = "identity"
            if exchange.for_us or not route.keep_client_key:
                # One key goes out, in the header that the provider takes, whatever else came.
                key = route.key.reveal() if route.key else ""
                if route.keep_client_key:
                    key = flows.client_key(flow)
                drop += KEY_HEADERS
                put |= _key_header(route.source, route.dialect, key)
                _drop_key_from_query(flow)
        if exchange.document.edited:
            body = exchange.document.encode()
            flow.request.raw_content = body
            drop.append("content-encoding")
            if "content-length" in flow.request.headers:
                put["content-length"] = str(len(body))
        if drop or put:
            flows.change_headers(flow.request, drop=drop, put=put)
        if exchange.job is not None:
            return self._relay(flow)
        flows.get_ready(flow)
        return None

    @flows.fail_closed
    async def _relay(self, flow: http.HTTPFlow) -> None:
        """Let the exchange's job answer the request, as it is when mitmproxy would send it."""
        waiting = weakref.ref(flow)  # should it never come, the relay must not keep it

        async def job(client: Client, writer: Writer) -> None:
            if (
                (came := waiting()) is not None
                and (exchange := flows.exchange(came)) is not None
                and exchange.job is not None
            ):
                adapt = partial(flows.prepared, came, exchange)
                await exchange.job(_as_sent(came, exchange.route), adapt)(client, writer)

        await flows.send_by_relay(flow, job)


def _as_sent(flow: http.HTTPFlow, route: Route | None) -> Request:
    """Return the request as mitmproxy itself would send it."""
    request, provider = flow.request, route.source if route else None
    timeout_s, connect_timeout_s = 120.0, 10.0
    if provider is not None:
        timeout_s, connect_timeout_s = provider.timeout, provider.connect_timeout
    return Request(
        request.method,
        request.url,
        request.headers.fields,
        request.raw_content or b"",
        timeout_s,
        connect_timeout_s,
    )


def _redirect(flow: http.HTTPFlow, base_url: str, rest: str) -> dict[str, str]:
    """Send the request to `base_url`; return the headers that follow from that."""
    parts = urlsplit(base_url)
    _, mark, query = flow.request.path.partition("?")
    data = flow.request.data
    # The setters of mitmproxy's Request would write the Host header anew, one by one.
    data.scheme = parts.scheme.encode()
    data.host = parts.hostname or ""
    data.port = parts.port or (443 if parts.scheme == "https" else 80)
    data.path = (parts.path.rstrip("/") + rest + mark + query).encode("utf-8", "surrogateescape")
    authority = hostport(parts.scheme, data.host, data.port)
    if data.authority:
        data.authority = authority.encode()
    return {"host": authority} if flows.client_header(flow, "host") else {}


def _key_header(provider: Provider | None, dialect: str, key: str) -> dict[str, str]:
    """Return the header by which a provider takes its key; no key: none is sent."""
    if not key or provider is None:
        return {}
    name = provider.key_header(dialect)
    return {name: f"Bearer {key}" if name == "authorization" else key}


def _drop_key_from_query(flow: http.HTTPFlow) -> None:
    path, mark, query = flow.request.path.partition("?")
    given = query.split("&")
    # mitmproxy's own `query` would write all the other parameters anew.
    kept = [one for one in given if unquote_plus(one.partition("=")[0]) != "key"]
    if len(kept) < len(given):
        flow.request.path = path + (mark + "&".join(kept) if kept else "")


def _may_pass(
    key: str, provider: Provider, addressed: Provider | None, rules: Rules, for_us: bool
) -> bool:
    """Tell whether the client's own key is this provider's, so that it may go there."""
    if not key:
        return False
    if addressed is not None and not for_us:
        return addressed.name == provider.name
    prefixes = [(p, other) for other in rules.providers.values() for p in other.key_prefixes]
    form, owner = max(
        ((p, other) for p, other in prefixes if key.startswith(p)),
        key=lambda pair: len(pair[0]),
        default=("", None),
    )
    if owner is not None and owner.name == provider.name:
        return True
    if addressed is None or addressed.name != provider.name:
        return False
    # `sk-` alone begins the keys of several providers, `sk-ant-` those of one.
    says_nothing = any(p != form and p.startswith(form) for p, _ in prefixes)
    return owner is None or (says_nothing and not provider.key_prefixes)


def _known(provider: Provider | None) -> Provider:
    assert provider is not None
    return provider


def _window(rules: Rules, model: str) -> int | None:
    rule = rules.about(model)
    return rule.context if rule else None


def _no_key(provider: Provider) -> str:
    variable = provider.key_variable or "key"
    return (
        f"kimi-proxy has no key for provider {provider.name}: set {variable} in the environment "
        "or in .env beside rules.yaml."
    )


def _unknown_provider(named: str, rules: Rules, provider: Provider | None) -> str:
    if provider is not None and provider.problem:
        return provider.problem
    return f"rules.yaml has no provider {named[:100]!r}; it has {', '.join(rules.providers)}."


def _unknown_model(model: str, rules: Rules) -> str:
    offered = ", ".join(rule.name for rule in rules.offered())
    return (
        f"No rule names the model {model[:200]!r}, and neither its name nor the key tells its "
        f"provider. Add it to rules.yaml, set default_model, or ask for one of: {offered}."
    )


addons = [Router(), Dispatch()]
