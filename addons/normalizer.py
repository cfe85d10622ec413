"""What Kimi models leak as markup, made tool calls and thinking again; and their history."""

import json
import logging
from collections.abc import Awaitable, Callable
from weakref import WeakKeyDictionary

from mitmproxy import ctx, http
from mitmproxy.addonmanager import Loader

from kimi_core import dialects, flows
from kimi_core.exchange import Attempt, Exchange, Mend
from kimi_core.flows import Rank
from kimi_core.markup import GRAMMARS, Scanner, grammar_of
from kimi_core.mending import asked
from kimi_core.mending.chat import MendChat
from kimi_core.mending.history import Thoughts, has_calls, mend_history
from kimi_core.mending.messages import MendMessages
from kimi_core.stages import Stage, StageRank

logger = logging.getLogger(__name__)

STAGES: dict[str, type[MendChat] | type[MendMessages]] = {
    dialects.OPENAI.name: MendChat,
    dialects.ANTHROPIC.name: MendMessages,
}
MAX_SHOWN_BYTES = 65_536


class Normalizer:
    """Mends the replies of Kimi models as they pass, and the history sent to them.

    Calls and thinking that a provider left in the text come out as what they are; a reply that
    needs nothing keeps its bytes. Towards the model, ids of calls get the form that it was
    trained on, and thinking that the client dropped is put back.
    """

    def __init__(self) -> None:
        self._declared = asked.Declared()
        self._thoughts = Thoughts()
        self._stages: WeakKeyDictionary[Exchange, list[MendChat | MendMessages]] = (
            WeakKeyDictionary()
        )

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)
        loader.add_option(
            "normalizer_mend", bool, True, "Mend what Kimi models leak; false leaves it as it is."
        )

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def done(self) -> Awaitable[None]:
        return flows.leave(self)

    @flows.step(Rank.NORMALIZE)
    @flows.fail_open
    def request(self, flow: http.HTTPFlow) -> None:
        exchange = flows.exchange(flow)
        if exchange is None or flow.response or flow.error or not ctx.options.normalizer_mend:
            return
        if flows.bypassed(flow):
            return
        if exchange.operation != "chat" or exchange.dialect.name not in STAGES:
            return
        models = (exchange.route.model if exchange.route else "", exchange.model)
        grammar, ruled = _grammar(*models)
        if not grammar and any(models):
            return
        self._stages[exchange] = []
        exchange.stages.append((StageRank.MEND, self._stage(exchange, grammar, *models)))
        named = exchange.route is not None and exchange.route.named
        if exchange.dialect is dialects.OPENAI and (named or ruled):
            # For a model that no rule speaks of, nothing is added to what the client sends.
            flows.session_id(flow)  # what was thought belongs to one conversation
            exchange.at_dispatch.append((Rank.NORMALIZE, self._mend_history))

    def _stage(self, exchange: Exchange, grammar: str, *models: str) -> Callable[[Attempt], Stage]:
        """Return what makes the stage for a reply; a request may leave the model to it."""
        document, dialect = exchange.document, exchange.dialect
        stages = self._stages[exchange]

        def scanner(model: str) -> Scanner | None:
            name = grammar or grammar_of(model)
            if not name:
                return None
            undecided = asked.thinking(document, dialect, *models, model)
            tools = self._declared.of(document, dialect)
            made = GRAMMARS[name](tools, undecided=undecided)
            made.earlier = lambda: asked.ids_used(document)
            return made

        def make(attempt: Attempt) -> Stage:
            stages.append(STAGES[attempt.dialect.name](scanner))
            return stages[-1]

        return make

    def _mend_history(self, exchange: Exchange) -> None:
        if not has_calls(exchange.document):
            return
        upstream = exchange.route.model if exchange.route else ""
        owner = _owner(exchange)
        mend_history(
            exchange.document,
            thinking=asked.thinking(exchange.document, exchange.dialect, upstream, exchange.model),
            recall=lambda ids: self._thoughts.recall(owner, ids),
            owner=owner,
        )

    @flows.step(Rank.NORMALIZE)
    @flows.fail_open
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """Nothing of its own: where nobody handles this event, no reply passes as it comes."""

    @flows.step(Rank.NORMALIZE)
    @flows.fail_open
    def response(self, flow: http.HTTPFlow) -> None:
        self._settle(flow)

    @flows.step(Rank.NORMALIZE)
    @flows.fail_open
    def error(self, flow: http.HTTPFlow) -> None:
        self._settle(flow)

    def _settle(self, flow: http.HTTPFlow) -> None:
        """Keep what was thought before each call, and say what was mended."""
        exchange = flows.exchange(flow)
        stages = self._stages.get(exchange) if exchange is not None else None
        if exchange is None or not stages:
            return
        turns = [turn for stage in stages for turn in stage.all_turns]
        for turn in turns:
            if turn.ids and turn.reasoning:
                self._thoughts.remember(_owner(exchange), turn.ids, "".join(turn.reasoning))
        exchange.mends = [mend for turn in turns for mend in turn.scanner.mends]
        if exchange.mends:
            kinds = dict.fromkeys(mend.kind for mend in exchange.mends)
            flow.metadata["kimi.mended"] = len(exchange.mends)
            flow.metadata["kimi.mended_kinds"] = ", ".join(kinds)
            flow.metadata["kimi.leaked"] = _shown(exchange.mends)


def _owner(exchange: Exchange) -> str:
    """Return whose calls an exchange's ids name: `functions.bash:0` is in most conversations."""
    return f"{exchange.client_key_hash} {exchange.session_id}"


def _grammar(upstream: str, asked_for: str) -> tuple[str, bool]:
    """Return the grammar that a model's text may leak, empty when none, and if a rule says so."""
    rules = flows.suite().rules
    for model in (asked_for, upstream):
        about = rules.about(model) if model else None
        if about is not None and about.markup:
            return ("" if about.markup == "none" else about.markup), True
    return grammar_of(upstream) or grammar_of(asked_for), False


def _shown(mends: list[Mend]) -> str:
    """Return what was mended as JSON text, for people to look at."""
    shown: list[dict[str, str]] = []
    length = 0
    for mend in mends:
        one = {"kind": mend.kind, "leaked": mend.leaked, "became": mend.became}
        length += len(mend.leaked) + len(mend.became) + 60
        if length > MAX_SHOWN_BYTES:
            break
        shown.append(one)
    return json.dumps(shown)


addons = [Normalizer()]
