"""One exchange with a model: what the client asked, what came back, what it cost.

Typed views only. Raw JSON stays in `document` and the dialects.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kimi_core.attempts.turn import Turn
    from kimi_core.context import Context
    from kimi_core.dialects import Dialect
    from kimi_core.document import Document
    from kimi_core.relay import Job, Request
    from kimi_core.rules import Provider, Secret
    from kimi_core.stages import Stage

Role = Literal["system", "user", "assistant", "tool"]
PartKind = Literal["text", "reasoning", "tool_call", "tool_result", "image", "file", "other"]
Category = Literal["system", "tools", "user", "assistant", "tool_result", "memory"]
Operation = Literal["chat", "count_tokens", "models"]
Provenance = Literal["usage", "tokenizer", "estimate", "calibrated"]
MendKind = Literal[
    "tool_call", "thinking", "marker", "placeholder", "name", "id", "finish_reason", "dropped"
]
SavingKind = Literal["reference", "cut", "compression"]
SpendingKind = Literal["summary", "recall"]
Rewrite = Literal["", "compression", "revocation", "flush", "bypass"]
Breaker = Literal[
    "",
    "client",
    "tools",
    "system",
    "model",
    "provider",
    "compression",
    "revocation",
    "flush",
    "bypass",
    "proxy",
]

Adapt = Callable[[bytes], bytes]

CATEGORIES: tuple[Category, ...] = (
    "system",
    "tools",
    "user",
    "assistant",
    "tool_result",
    "memory",
)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message, and where it stands in the message's JSON."""

    kind: PartKind
    category: Category
    text: str
    path: tuple[str | int, ...] = ()
    """Keys and indexes from the message down to the JSON value that holds `text`."""
    name: str = ""
    id: str = ""
    data: bytes = b""
    """An image's own bytes, as far as they were sent inline."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a request: its role and parts, read from `raw`."""

    role: Role
    parts: tuple[Part, ...]
    raw: bytes = b""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made; `arguments` is JSON text, as far as it came."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a provider said an exchange used; None where it said nothing.

    As in OpenTelemetry, `input_tokens` includes cached tokens and `output_tokens`
    includes reasoning, whatever the provider's own convention is.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    """The part of `cache_write_tokens` kept for an hour, which Anthropic bills higher."""
    reasoning_tokens: int | None = None
    tool_prompt_tokens: int | None = None
    """Tokens of server-side tool results (Gemini's toolUsePromptTokenCount), in `input_tokens`."""
    cost_usd: float | None = None


@dataclass(slots=True)
class Reply:
    """What a model answered, as far as it has come."""

    id: str = ""
    model: str = ""
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    """The `type` of an error that the provider reported, in a body or in mid-stream."""
    usage: Usage = field(default_factory=Usage)
    complete: bool = False
    """The provider said that this is the end: a terminal event or a whole body."""


@dataclass(frozen=True, slots=True)
class Mend:
    """One thing that was put right in a reply: what came, and what the client got for it."""

    kind: MendKind
    leaked: str
    became: str
    """Empty when it was taken out."""


@dataclass(frozen=True, slots=True)
class Saving:
    """What was left out of one message of a request, and by what it can be had back."""

    kind: SavingKind
    message: int
    """Which of the messages as they leave it stands in, from 0."""
    tokens: int
    """How many fewer tokens leave, by o200k, what stands in for them counted."""
    hash: str
    """Of the mask in the store, or of the summary."""
    new: bool = False
    """It was decided for this request; otherwise an earlier one left without it too."""


@dataclass(frozen=True, slots=True)
class Spending:
    """What saving itself took of a model: a summary, or a recall's further request."""

    kind: SpendingKind
    input_tokens: int
    output_tokens: int
    cost_usd: float | None


@dataclass(slots=True)
class Attempt:
    """One upstream request of an exchange, and what came of it."""

    provider: str
    model: str
    dialect: Dialect
    started_at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    status: int | None = None
    error_type: str = ""
    rejected: str = ""
    """Why its reply was not enough and the next attempt was made; empty for the last one."""
    reply: Reply = field(default_factory=Reply)
    """As the provider sent it, before anything was mended."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """Where an exchange goes: provider, upstream model, and what to send along."""

    provider: str
    model: str
    dialect: str
    url: str = ""
    """Base URL of the provider for this dialect; empty: the destination is the client's own."""
    key: Secret | None = None
    """The provider's key; None leaves the headers to `keep_client_key`."""
    keep_client_key: bool = True
    named: bool = False
    """A rule names the model; otherwise nothing may be added to the request."""
    stream_usage: bool = False
    context: int | None = None
    """The model's window in tokens."""
    source: Provider | None = None


@dataclass(slots=True, weakref_slot=True, eq=False)
class Exchange:
    """A client's request, its reply, and all that the addons learnt of both.

    Addons read and edit in the client's dialect; `at_dispatch` holds what depends on
    the target and is run by Dispatch, once per attempt, in the order of its ranks.
    """

    id: str
    dialect: Dialect
    operation: Operation
    document: Document
    path_model: str = ""
    path_provider: str = ""
    for_us: bool = False
    """Addressed to the proxy itself (a base URL), so that Router must find a destination."""
    headers: dict[str, str] = field(default_factory=dict)
    """The `x-kimi-*` headers that the client sent."""
    client: str = ""
    client_key_hash: str = ""
    started_at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    first_chunk: float | None = None
    """`time.perf_counter()` when the first bytes of the reply's body came."""
    ended: float | None = None

    model: str = ""
    stream: bool = False
    route: Route | None = None
    session_id: str = ""
    kind: Literal["turn", "background", "subagent"] = "turn"
    context: Context | None = None
    at_dispatch: list[tuple[int, Callable[[Exchange], None]]] = field(default_factory=list)

    stages: list[tuple[int, Callable[[Attempt], Stage]]] = field(default_factory=list)
    """Makes what the reply to each upstream request passes through, in the order of the ranks."""
    job: Callable[[Request, Adapt], Job] | None = None
    """Makes the relay's job out of the request as Dispatch would send it, and of what makes
    another body as fit to be sent; None: one request, sent by mitmproxy itself."""
    turn: Turn | None = None
    """Who decides whether a reply is enough, where several requests may be needed for one."""
    attempts: list[Attempt] = field(default_factory=list)
    mends: list[Mend] = field(default_factory=list)

    reply: Reply = field(default_factory=Reply)
    partial: bool = False
    unread: bool = False
    """The reply could not be decoded: what it held is not known."""
    blocked: str = ""
    """Why we refused it, when we did."""
    status: int | None = None
    error_type: str = ""
    response_bytes: int = 0
    request_bytes: int = 0

    input_tokens: int | None = None
    output_tokens: int | None = None
    input_source: Provenance | None = None
    output_source: Provenance | None = None
    context_tokens: dict[Category, int] = field(default_factory=dict)
    messages: int = 0
    cost_usd: float | None = None
    cost_source: str = ""
    sent: Context | None = None
    """The context as it leaves, where it is not the client's; read it with `context.sent`."""
    savings: list[Saving] = field(default_factory=list)
    spendings: list[Spending] = field(default_factory=list)
    rewrite: Rewrite = ""
    """Why what was sent before is sent in another way now, which voids the provider's cache."""
    saved_tokens: int = 0
    """Tokens that did not leave, by o200k; 0 when the exchange was not billed."""
    saved_usd: float | None = None
    """Net: `gross_saved_usd` without the next two; all None while, or where, no price is known."""
    gross_saved_usd: float | None = None
    lost_usd: float | None = None
    spent_usd: float | None = None
    cache_break: int | None = None
    """The first message, from 1, that did not leave as in the request before, so that the
    provider's cache ends there; 0: something before the messages, or the model."""
    cache_break_by: Breaker = ""
    """Who or what it was; "provider" without a message: the cache had expired."""
    hide_usage: bool = False
    """We asked for usage in the stream, the client did not: it must not see the answer."""

    def attempt(self) -> Attempt:
        """Return the record of an upstream request that begins now, the exchange's next."""
        route = self.route
        attempt = Attempt(
            provider=route.provider if route else "",
            model=route.model if route else self.model,
            dialect=self.dialect,
        )
        self.attempts.append(attempt)
        return attempt
