"""Conversations in mitmweb: what was said, by whom, and how many tokens it took."""

import logging
import re
from collections.abc import Awaitable, Iterable
from typing import Any

from mitmproxy import contentviews, ctx, http
from mitmproxy.addonmanager import Loader

from kimi_core import context, flows, transcript, transcript_saved
from kimi_core.context import Piece
from kimi_core.dialects import Call
from kimi_core.document import NotJSON
from kimi_core.exchange import Exchange
from kimi_core.flows import Rank

logger = logging.getLogger(__name__)

_NAME = "LLM conversation"
old: Any = contentviews
"""What only mitmproxy 11 has in that module."""
MARK = ":wrench:"
"""Beside a flow whose reply was mended; one of mitmproxy's own list of emojis."""
_COUNTED_BYTES = 2_000_000
"""A longer request is shown without tokens, so that a look does not block the proxy."""
_SAVED_BYTES = 64 * 1024
"""What the list of a request's masks may take in the flow's metadata."""


class Views:
    """Shows exchanges as sent: a content view for both directions, and a comment on each flow.

    What was left out of a request is marked where it stood and listed at its end.

    A reply in which something was mended shows what the model leaked and what it became, and
    its flow has a mark.

    mitmweb keeps every flow in memory, so the oldest finished ones are dropped.
    """

    def __init__(self) -> None:
        self._view = _view()

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)
        loader.add_option(
            "views_keep", int, 1000, "How many finished flows mitmweb keeps; 0 keeps all."
        )
        contentviews.add(self._view)

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def done(self) -> Awaitable[None]:
        if not hasattr(contentviews, "Contentview"):
            old.remove(self._view)
        return flows.leave(self)

    @flows.step(Rank.VIEW)
    @flows.fail_open
    def response(self, flow: http.HTTPFlow) -> None:
        self._show(flow)

    @flows.step(Rank.VIEW)
    @flows.fail_open
    def error(self, flow: http.HTTPFlow) -> None:
        self._show(flow)

    def _show(self, flow: http.HTTPFlow) -> None:
        exchange = flows.exchange(flow)
        if exchange is not None and not flow.comment:
            flow.comment = _summary(exchange)
        if exchange is not None and exchange.mends and not flow.marked:
            flow.marked = MARK
        if exchange is not None and exchange.savings:
            flow.metadata["kimi.saved"] = transcript_saved.dumped(exchange.savings, _SAVED_BYTES)
        self._bound()

    def _bound(self) -> None:
        view = ctx.master.addons.get("view")
        keep = ctx.options.views_keep
        if view is None or not keep or len(view._store) <= keep * 1.02:
            return
        finished = [flow for flow in view._store.values() if not flow.live]
        if len(finished) > keep:
            view.remove(finished[: len(finished) - keep])


def _summary(exchange: Exchange) -> str:
    if exchange.blocked:
        return f"refused: {exchange.blocked[:200]}"
    said = []
    if exchange.input_tokens is not None:
        cached = exchange.reply.usage.cache_read_tokens
        about = "~" if exchange.input_source == "estimate" else ""
        said.append(
            f"{about}{exchange.input_tokens:,} in" + (f" ({cached:,} cached)" if cached else "")
        )
    if exchange.output_tokens is not None:
        about = "~" if exchange.output_source == "estimate" else ""
        said.append(f"{about}{exchange.output_tokens:,} out")
    if exchange.cost_usd is not None:
        said.append(f"${exchange.cost_usd:.6f}")
    if exchange.route is not None:
        said.append(f"{exchange.route.model} at {exchange.route.provider}")
    if exchange.saved_tokens:
        said.append(f"saved {exchange.saved_tokens:,}")
    if exchange.cache_break_by == "provider":
        said.append("cache expired")
    elif exchange.cache_break_by:
        at = f" at message {exchange.cache_break}" if exchange.cache_break else ""
        said.append(f"cache broke{at} ({exchange.cache_break_by})")
    if exchange.mends:
        said.append(f"mended {len(exchange.mends)}")
    if len(exchange.attempts) > 1:
        said.append(f"{len(exchange.attempts)} attempts")
    if exchange.partial:
        said.append("cut off")
    if exchange.error_type:
        said.append(f"error {exchange.error_type}")
    return " · ".join(said)


_counter = context.Counter(1024)

# Terminals obey the control characters, and mitmdump prints what a view returns; writing
# direction can hide what a text says; half a surrogate pair cannot be printed at all.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _conversation(data: bytes, flow: Any, message: Any) -> str:
    """Return the message's body as a conversation. Raises NotJSON."""
    call = _call(flow)
    if call is None:
        raise NotJSON("no model call")
    if isinstance(message, http.Request):
        exchange = flows.exchange(flow)
        counted = None
        if exchange is not None and len(data) <= _COUNTED_BYTES:
            route = exchange.route
            model = route.model if route else exchange.model

            def count(piece: Piece) -> int:
                return _counter.tokens_of(exchange, model, piece)

            counted = count
        saved = transcript_saved.loaded(flow.metadata.get("kimi.saved"))
        text = transcript.request(call, data, counted, saved)
    else:
        text = transcript.reply(call, data, message.headers.get("content-type", ""))
        if mended := transcript.mended(flow.metadata.get("kimi.leaked")):
            text += f"\n{mended}"
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def _call(flow: Any) -> Call | None:
    if not isinstance(flow, http.HTTPFlow):
        return None
    return transcript.looks_like(flow.request.method, flow.request.path)


def _priority(data: bytes, flow: Any, message: Any) -> float:
    """Rank above the JSON view for model calls, below everything for all else."""
    if not data or _call(flow) is None or message is None:
        return -1
    kind = message.headers.get("content-type", "")
    if isinstance(message, http.Request):
        return 2 if data.lstrip()[:1] == b"{" else -1
    return 2 if "json" in kind or "event-stream" in kind else -1


def _view() -> Any:
    """Return the content view, made for the API of the mitmproxy that runs."""
    if hasattr(contentviews, "Contentview"):

        class Conversation(contentviews.Contentview):
            name = _NAME
            syntax_highlight = "none"

            def prettify(self, data: bytes, metadata: Any) -> str:
                return _conversation(data, metadata.flow, metadata.http_message)

            def render_priority(self, data: bytes, metadata: Any) -> float:
                return _priority(data, metadata.flow, metadata.http_message)

        return Conversation()

    class OldConversation(old.View):  # type: ignore[misc]
        name = _NAME

        def __call__(
            self, data: bytes, *, flow: Any = None, http_message: Any = None, **_: Any
        ) -> tuple[str, Iterable[Any]]:
            text = _conversation(data, flow, http_message)
            return _NAME, old.format_text(text)

        def render_priority(
            self, data: bytes, *, flow: Any = None, http_message: Any = None, **_: Any
        ) -> float:
            return _priority(data, flow, http_message)

    return OldConversation()


addons = [Views()]
