"""Ask a model again until it replies with a tool call, where rules.yaml says so."""

from collections.abc import Awaitable

from mitmproxy import http
from mitmproxy.addonmanager import Loader

from kimi_core import attempts, context, enforcement, flows
from kimi_core.flows import Rank


class Enforcer:
    """Enforces `ensure_tool_call`: agents stop where a model replies without a tool call.

    The request offers one more tool, `done`. A reply with neither a call of it nor of another
    tool is asked for again, as often as rules.yaml allows; the client gets all replies as one,
    as they come. Requests to other models pass untouched.
    """

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def done(self) -> Awaitable[None]:
        return flows.leave(self)

    @flows.step(Rank.ENFORCE)
    @flows.fail_open
    def request(self, flow: http.HTTPFlow) -> None:
        exchange = flows.exchange(flow)
        if flow.response or flow.error or exchange is None or exchange.operation != "chat":
            return
        # Without a route nobody sends it who would run a job.
        if exchange.route is None or flows.bypassed(flow):
            return
        said = flows.rule(flow)
        if said is None or not said.ensure_tool_call:
            return
        max_attempts = flows.suite().rules.ensure_tool_call_max_attempts
        given = context.sent(exchange)
        decider = enforcement.prepare(exchange.document, exchange.dialect, max_attempts)
        if decider is not None:
            exchange.sent = given.with_heads(exchange.document)
            attempts.join(exchange, decider, asks_again=max_attempts > 1)

    @flows.step(Rank.ENFORCE)
    @flows.fail_open
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """Nothing of its own: where nobody handles this event, no reply passes as it comes."""

    @flows.step(Rank.ENFORCE)
    @flows.fail_open
    def response(self, flow: http.HTTPFlow) -> None:
        self._label(flow)

    @flows.step(Rank.ENFORCE)
    @flows.fail_open
    def error(self, flow: http.HTTPFlow) -> None:
        self._label(flow)

    def _label(self, flow: http.HTTPFlow) -> None:
        exchange = flows.exchange(flow)
        if exchange is None or exchange.turn is None:
            return
        flow.metadata["kimi.attempts"] = len(exchange.attempts)
        if rejected := [one.rejected for one in exchange.attempts if one.rejected]:
            flow.metadata["kimi.rejected"] = ", ".join(rejected)


addons = [Enforcer()]
