"""What rules.yaml may hold: each key with its type, default, unit and a sentence.

What these classes say is what `kimi_core.rules` checks and what `json_schema` gives to editors.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic.fields import FieldInfo

from kimi_core.env import NAME, REFERENCE, quoted

Dialect = Literal["openai", "responses", "anthropic", "gemini"]
Strategy = Literal["first", "round_robin", "random", "weighted_random", "best"]
Markup = Literal["kimi-k2", "kimi-k3", "none"]
Profile = Literal["quality", "balanced", "savings"]
Place = tuple[str | int, ...]
"""Where a value stands: the keys and indexes that lead to it."""

MAX_MODEL_NAME = 256
MAX_STARS = 3
"""Each `*` of a pattern multiplies the time that a long name can take to match."""


_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?")
_ENDPOINTS = ("/chat/completions", "/responses", "/messages", "/models")


def split_url(url: str) -> SplitResult:
    """Return the parts of a base URL; raise ValueError when it is not one."""
    if not url:
        raise ValueError("is empty; write e.g. https://api.openai.com/v1")
    if not url.isascii() or not url.isprintable() or re.search(r"[\s\\\"<>^`{|}]", url):
        raise ValueError(
            f"{quoted(url)} has characters that no URL has; write e.g. https://api.openai.com/v1"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
        host = parts.hostname or ""
    except ValueError:
        raise ValueError(
            f"{quoted(url)} is not a URL; write e.g. https://api.openai.com/v1"
        ) from None
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(
            f"{quoted(url)} is not an absolute http or https URL; "
            "write e.g. https://api.openai.com/v1"
        )
    if "@" in parts.netloc:
        raise ValueError("carries a user name or password; give the key under key: instead")
    if "?" in url or "#" in url:
        raise ValueError(f"{quoted(url)} has a query or a fragment; let it end with the path")
    if not host or port == 0 or not (_HOST.fullmatch(host) or _is_address(host)):
        raise ValueError(f"{quoted(url)} names no host; write e.g. https://api.openai.com/v1")
    path = parts.path.rstrip("/")
    for endpoint in _ENDPOINTS:
        if path.endswith(endpoint):
            raise ValueError(
                f"{quoted(url)} ends in an endpoint, which is added later; "
                f"write {quoted(url.rstrip('/').removesuffix(endpoint))}"
            )
    return parts


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


_BROKEN_REFERENCE = re.compile(r"\$(?!\{" + NAME + r"\})")


def _check_references(text: str) -> None:
    if _BROKEN_REFERENCE.search(text):
        raise ValueError("has a $ that starts no ${NAME}; write e.g. ${NVIDIA_API_KEY}")


def _base_url(text: str) -> str:
    _check_references(text)
    if not text.startswith("${"):  # else nothing is known before the variable is
        split_url(REFERENCE.sub("x", text))
    return text


def _key(text: str) -> str:
    # Nothing here may show the text: it is a key, or what someone took for one.
    if not text:
        raise ValueError("is empty; write e.g. ${NVIDIA_API_KEY}, or leave key: out to send none")
    _check_references(text)
    if "${" in text:
        if not re.fullmatch(r"\$\{" + NAME + r"\}", text):
            raise ValueError("has text around ${NAME}; write the variable alone, the rest into it")
    elif not fits_header(text):
        raise ValueError("has blanks or characters that no HTTP header carries; copy it again")
    return text


def fits_header(key: str) -> bool:
    return all("!" <= character <= "~" for character in key)


_PROVIDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATHS_OF_OUR_OWN = frozenset({"v1", "v1beta", "chat", "responses", "messages", "models", "health"})


def _provider_name(name: str) -> str:
    if not _PROVIDER_NAME.fullmatch(name):
        raise ValueError(
            f"{quoted(name)} cannot name a provider, since the name is part of a path; "
            "use letters, digits, '-', '_' and '.'"
        )
    if name in _PATHS_OF_OUR_OWN:
        raise ValueError(
            f"{quoted(name)} cannot name a provider, since the proxy has a path of that name; "
            f"write e.g. my-{name}"
        )
    return name


def _model_name(name: str) -> str:
    if not name or name != name.strip() or not name.isprintable():
        raise ValueError(f"{quoted(name)} is no model name; write e.g. nvidia/kimi-k2.5")
    if len(name) > MAX_MODEL_NAME:
        raise ValueError(f"{quoted(name)} is longer than {MAX_MODEL_NAME} characters")
    if name.count("*") > MAX_STARS:
        raise ValueError(f"{quoted(name)} has more than {MAX_STARS} *; one is mostly enough")
    return name


def _prefix(text: str) -> str:
    if not text or not text.isprintable() or any(character.isspace() for character in text):
        raise ValueError(f"{quoted(text)} is no prefix; write e.g. claude-")
    return text


def _host_name(text: str) -> str:
    if not _HOST.fullmatch(text):
        raise ValueError(
            f"{quoted(text)} is not a host name; write it without scheme, port and path, "
            "e.g. api.moonshot.cn"
        )
    return text.lower().rstrip(".")


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


ModelName = Annotated[str, AfterValidator(_model_name)]
ProviderName = Annotated[str, AfterValidator(_provider_name)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
HostName = Annotated[str, AfterValidator(_host_name)]
Prefix = Annotated[str, AfterValidator(_prefix)]


class Price(_Section):
    """What a provider takes for a model, in US dollars per million tokens."""

    input: float = Field(
        ge=0, description="US dollars per million input tokens that no cache held.", examples=[0.6]
    )
    cached_input: float | None = Field(
        None,
        ge=0,
        description="US dollars per million input tokens read from the cache; "
        "null: the price of input.",
        examples=[0.1],
    )
    output: float = Field(
        ge=0,
        description="US dollars per million output tokens, reasoning included.",
        examples=[3.0],
    )


class ProviderSpec(_Section):
    """How to reach one provider."""

    api: Dialect = Field(
        description="The dialect that base_url speaks: openai (chat completions), responses, "
        "anthropic (messages) or gemini."
    )
    base_url: BaseUrl = Field(
        description="The absolute URL to which the endpoint is added, such as /chat/completions, "
        "/responses, /messages or /models/M:generateContent; ${NAME} is replaced.",
        examples=["https://api.openai.com/v1"],
    )
    also: dict[Dialect, BaseUrl] = Field(
        default_factory=dict,
        description="Further dialects that the provider speaks, each with its base URL.",
        examples=[{"anthropic": "https://api.kimi.com/coding/v1"}],
    )
    key: Annotated[str, AfterValidator(_key)] | None = Field(
        None,
        description="The API key, as ${NAME} for a variable of the environment or of .env; "
        "null: the provider wants none and none is sent.",
        examples=["${NVIDIA_API_KEY}"],
    )
    rpm: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Requests per minute that the provider allows; null: no limit is known.",
        examples=[40],
    )
    timeout: float = Field(
        120,
        ge=60,
        le=300,
        description="Seconds to wait for the answer to begin, 60 to 300.",
        examples=[120],
    )
    connect_timeout: float = Field(
        10, ge=1, le=60, description="Seconds to wait for the connection, 1 to 60.", examples=[10]
    )
    stream_usage: bool = Field(
        True,
        description="Whether the provider takes stream_options.include_usage; "
        "false: it is never sent.",
        examples=[True],
    )
    vendor_names: bool = Field(
        False,
        description="Whether the provider's own model names look like vendor/model, so that in a "
        "request addressed to it `openai/…` is a name and not a wish for the provider openai.",
        examples=[True],
    )
    prices: dict[ModelName, Price] = Field(
        default_factory=dict,
        description="Prices by upstream model name or pattern, in US dollars per million tokens, "
        "where the bundled price list has none.",
        examples=[{"moonshotai/kimi-k2.5": {"input": 0.6, "cached_input": 0.1, "output": 3.0}}],
    )
    model_prefixes: tuple[Prefix, ...] = Field(
        (),
        description="How the names of the provider's own models begin; used when no rule names "
        "the model and the path names no provider.",
        examples=[["claude-"]],
    )
    key_prefixes: tuple[Prefix, ...] = Field(
        (),
        description="How the provider's keys begin; used after model_prefixes, the longest first.",
        examples=[["sk-ant-"]],
    )
    hosts: tuple[HostName, ...] = Field(
        (),
        description="Further host names of the provider, whose traffic is decrypted for clients "
        "that use HTTPS_PROXY; those of base_url and also are known.",
        examples=[["api.moonshot.cn"]],
    )

    @model_validator(mode="after")
    def _api_once(self) -> Self:
        if self.api in self.also:
            raise ValueError(f"also: names {self.api}, which is its api: already; remove one")
        return self


class TargetSpec(_Section):
    """One who serves a model."""

    provider: str = Field(description="The provider's name under providers.", examples=["nvidia"])
    model: ModelName | None = Field(
        None,
        description="The model's name at the provider, where * is what the pattern's last * "
        "stands for; null: the client's name, without what comes before the pattern's /* and "
        "without the provider's own name and slash.",
        examples=["moonshotai/kimi-k2.5"],
    )
    weight: float = Field(
        1,
        gt=0,
        le=1_000_000,
        description="Share of the requests under weighted_random.",
        examples=[2],
    )


class ModelSpec(_Section):
    """Who serves a model that clients ask for by this name."""

    targets: tuple[TargetSpec, ...] = Field(
        (),
        description="Who serves the model; empty: the longest pattern that has targets says it, "
        "and where none has, the model goes where the client sent it.",
        examples=[[{"provider": "nvidia"}]],
    )
    strategy: Strategy | None = Field(
        None,
        description="How one of several targets is chosen; null: default_strategy.",
    )
    context: int | None = Field(
        None,
        ge=1,
        le=1_000_000_000,
        description="The model's window in tokens; null: what the longest pattern that fits "
        "says, else the bundled model list.",
        examples=[262144],
    )
    markup: Markup | None = Field(
        None,
        description="The grammar of tool calls and thoughts that the model's text may leak; none: "
        "nothing is mended; null: what the longest pattern that fits says, else what the "
        "model's name tells.",
    )
    ensure_tool_call: bool | None = Field(
        None,
        description="Whether a reply without a tool call is asked for again; "
        "null: what the longest pattern that fits says, else false.",
        examples=[True],
    )
    bypass: bool | None = Field(
        None,
        description="Whether its requests and replies pass unedited, routed and counted all the "
        "same; null: what the longest pattern that fits says, else false.",
        examples=[True],
    )


class When(_Section):
    """What a request must be for a routing rule to apply: all that is given."""

    model: ModelName | None = Field(
        None, description="The model's name or pattern; null: any.", examples=["claude-opus-*"]
    )
    input_tokens_below: int | None = Field(
        None, ge=1, description="Fewer input tokens than this; null: any.", examples=[2000]
    )
    input_tokens_above: int | None = Field(
        None, ge=0, description="More input tokens than this; null: any.", examples=[100000]
    )
    tools: bool | None = Field(
        None, description="With tools (true) or without (false); null: either.", examples=[False]
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError(
                "says nothing, so the rule would take every request; "
                'write e.g. {model: "claude-opus-*"}'
            )
        below, above = self.input_tokens_below, self.input_tokens_above
        if below is not None and above is not None and below <= above + 1:
            raise ValueError(
                f"no request has more than {above} and fewer than {below} input tokens; "
                "make input_tokens_below the larger one"
            )
        return self


class RoutingRule(_Section):
    """A request of this kind is served as if the client had asked for another model."""

    when: When = Field(
        description="What the request must be.", examples=[{"model": "claude-opus-*"}]
    )
    use: ModelName = Field(
        description="The model that is used instead, a name that models: may name.",
        examples=["claude-haiku"],
    )

    @model_validator(mode="after")
    def _use_is_one(self) -> Self:
        if "*" in self.use:
            raise ValueError(f"use: {quoted(self.use)} is a pattern; write one model's name")
        return self


class SanitizerSettings(_Section):
    """Which tool output is pointed at or cut."""

    threshold: int = Field(
        1000,
        ge=0,
        description="Tool output longer than this many o200k tokens is cut; 0 never cuts.",
        examples=[1000],
    )
    keep: int = Field(500, ge=0, description="How many o200k tokens of it stay.", examples=[500])
    references: bool = Field(
        True,
        description="Whether lines that the conversation already shows are pointed at "
        "instead of sent again.",
        examples=[False],
    )
    recall: bool = Field(
        False,
        description="Whether the model is offered a tool by which it reads what was left out, "
        "without the client's knowing.",
        examples=[True],
    )
    keep_days: int = Field(
        30,
        ge=1,
        le=3650,
        description="Days that an original is kept after it was last left out of a request.",
        examples=[30],
    )
    keep_mb: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="Megabytes that all originals may take, compressed; the oldest go first.",
        examples=[1024],
    )

    @model_validator(mode="after")
    def _keeps_less(self) -> Self:
        if self.threshold and self.keep > self.threshold:
            raise ValueError(
                f"keep is {self.keep} and threshold {self.threshold}, so nothing would be cut; "
                "make keep the smaller one"
            )
        return self


class CompressionSettings(_Section):
    """When old exchanges are summarised."""

    at: float = Field(
        0.85,
        gt=0,
        le=1,
        description="Share of the model's window from which the conversation is compressed, "
        "0 to 1.",
        examples=[0.85],
    )
    from_messages: int | None = Field(
        None,
        ge=1,
        description="Number of messages that triggers a compression too; null: none does.",
        examples=[10],
    )
    min_messages: int = Field(
        10,
        ge=1,
        description="Number of messages below which nothing is compressed.",
        examples=[10],
    )
    keep_exchanges: int = Field(
        5, ge=1, description="Number of last exchanges that stay word for word.", examples=[5]
    )
    auto: bool = Field(
        False, description="Whether it happens without being asked for.", examples=[False]
    )
    model: ModelName | None = Field(
        None,
        description="The model that writes the summary, a name that models: serves, or extract: "
        "none, what can be read off the conversation; null: the conversation's own model.",
        examples=["claude-haiku-4-5"],
    )
    profile: Profile = Field(
        "balanced",
        description="How long a summary may be: quality 600 words, balanced 300, savings 150.",
    )


class Budget(_Section):
    """What may be spent; what is over it is refused before it is sent."""

    per: Literal["key", "session", "day"] = Field(
        description="What the sum is taken over; a day is one of local time."
    )
    usd: float | None = Field(
        None, gt=0, description="US dollars; null: no limit in money.", examples=[5.0]
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens in and out; null: no limit in tokens.",
        examples=[2_000_000],
    )

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.usd is None and self.tokens is None:
            raise ValueError("limits nothing; add usd: or tokens:, e.g. usd: 5.0")
        return self


class LimitsSettings(_Section):
    """What is refused for being too much."""

    requests_per_minute: int | None = Field(
        None,
        ge=1,
        description="Requests per minute that one client key may make; null: no limit.",
        examples=[60],
    )
    warn_at: float = Field(
        0.875,
        gt=0,
        le=1,
        description="Share of a provider's rpm from which a warning is given, 0 to 1.",
        examples=[0.875],
    )
    critical_at: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Share of a provider's rpm from which it counts as full, 0 to 1.",
        examples=[0.95],
    )
    budgets: tuple[Budget, ...] = Field(
        (), description="What may be spent.", examples=[[{"per": "day", "usd": 5.0}]]
    )

    @model_validator(mode="after")
    def _warns_first(self) -> Self:
        if self.warn_at > self.critical_at:
            raise ValueError(
                f"warn_at {self.warn_at:g} lies above critical_at {self.critical_at:g}; "
                "make it the smaller one"
            )
        return self


class MemoryServer(_Section):
    """An MCP server, started as a program or reached by URL."""

    command: str | None = Field(
        None,
        min_length=1,
        description="The program to start, which speaks MCP on its standard streams; "
        "null: url is used.",
        examples=["npx"],
    )
    args: tuple[str, ...] = Field(
        (), description="Arguments of the program.", examples=[["-y", "mcp-server-qdrant"]]
    )
    env: dict[str, SecretStr] = Field(
        default_factory=dict,
        description="Variables for the program, where ${NAME} may stand.",
        examples=[{"QDRANT_URL": "http://127.0.0.1:6333"}],
    )
    url: BaseUrl | None = Field(
        None,
        description="The URL of a server that speaks streamable HTTP; null: command is used.",
        examples=["http://127.0.0.1:8000/mcp"],
    )
    headers: dict[str, SecretStr] = Field(
        default_factory=dict,
        description="Headers for the URL, where ${NAME} may stand.",
        examples=[{"Authorization": "${QDRANT_API_KEY}"}],
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.command is None) == (self.url is None):
            raise ValueError("needs either command: or url:, not both")
        return self


class MemorySettings(_Section):
    """Where memories are kept."""

    servers: dict[ProviderName, MemoryServer] = Field(
        default_factory=dict,
        description="MCP servers by name.",
        examples=[{"qdrant": {"command": "mcp-server-qdrant"}}],
    )


class RulesSpec(_Section):
    """What kimi-proxy sends where, and what it changes on the way."""

    version: Literal[1] = Field(1, description="The version of this file's shape.")
    proxy_host: str = Field(
        "127.0.0.1",
        min_length=1,
        pattern=r"^[A-Za-z0-9.:_-]+$",
        description="The address that the proxy listens on.",
        examples=["127.0.0.1"],
    )
    proxy_port: int = Field(
        8080, ge=1, le=65535, description="The port that the proxy listens on.", examples=[8080]
    )
    providers: dict[ProviderName, ProviderSpec] = Field(
        min_length=1,
        description="Providers by name; the name is also the first part of a path, as in "
        "/nvidia/v1/chat/completions.",
        examples=[{"local": {"api": "openai", "base_url": "http://127.0.0.1:11434/v1"}}],
    )
    models: dict[ModelName, ModelSpec] = Field(
        default_factory=dict,
        description="Models by the name that a client asks for: first the exact name counts, "
        "then the longest pattern, in which * stands for any text.",
        examples=[{"nvidia/*": {"targets": [{"provider": "nvidia"}]}}],
    )
    default_model: ModelName | None = Field(
        None,
        description="The model for a request by base URL whose own model has no provider; "
        "null: such a request is answered with 404.",
        examples=["kimi-code/kimi-for-coding"],
    )
    default_strategy: Strategy = Field(
        "first", description="How one of several targets is chosen where the model does not say."
    )
    sticky: bool = Field(
        True,
        description="Whether a choice holds for its session, so that the provider's prompt cache "
        "keeps hitting; false: each request chooses anew.",
        examples=[True],
    )
    ensure_tool_call_max_attempts: int = Field(
        3,
        ge=1,
        le=5,
        description="How often a reply with a tool call is asked for, the first time included, "
        "1 to 5.",
        examples=[3],
    )
    routing: tuple[RoutingRule, ...] = Field(
        (),
        description="Requests that go to another model; the first rule that fits counts.",
        examples=[[{"when": {"model": "claude-opus-*"}, "use": "claude-haiku"}]],
    )
    sanitizer: SanitizerSettings = Field(
        default_factory=SanitizerSettings, description="Which tool output is cut."
    )
    compression: CompressionSettings = Field(
        default_factory=CompressionSettings, description="When old exchanges are summarised."
    )
    limits: LimitsSettings = Field(
        default_factory=LimitsSettings, description="What is refused for being too much."
    )
    memory: MemorySettings = Field(
        default_factory=MemorySettings, description="Where memories are kept."
    )


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of rules.yaml, for editors."""
    schema = _plain(RulesSpec.model_json_schema())
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "kimi-proxy rules.yaml",
        **schema,
    }


def _plain(node: Any) -> Any:
    """Return a schema without the titles and one-of-null unions that pydantic writes."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {
        key: _plain(value)
        for key, value in node.items()
        if not (key in ("title", "format", "writeOnly") and not isinstance(value, dict))
    }
    branches = plain.get("anyOf")
    if isinstance(branches, list) and {"type": "null"} in branches and len(branches) == 2:
        branch = next(item for item in branches if item != {"type": "null"})
        del plain["anyOf"]
        if "enum" in branch:
            branch = {**branch, "enum": [*branch["enum"], None]}
        plain = {**branch, "type": [branch["type"], "null"], **plain}
    return plain


def bare_type(kind: Any) -> Any:
    """Return the type without `| None` and Annotated."""
    while True:
        origin = typing.get_origin(kind)
        if origin is Annotated:
            kind = typing.get_args(kind)[0]
        elif origin in (types.UnionType, typing.Union):
            kind = next(item for item in typing.get_args(kind) if item is not type(None))
        else:
            return kind


def described(path: Place) -> tuple[type[BaseModel] | None, FieldInfo | None, bool]:
    """Return what stands at `path`: its model, its field, and whether it is the field itself
    (not an item of it)."""
    kind: Any = RulesSpec
    info: FieldInfo | None = None
    direct = False
    for step in path:
        kind = bare_type(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            info = kind.model_fields.get(str(step))
            if info is None:
                return None, None, False
            kind, direct = info.annotation, True
        elif typing.get_origin(kind) in (dict, tuple):
            arguments = typing.get_args(kind)
            kind, direct = arguments[typing.get_origin(kind) is dict], False
        else:
            return None, None, False
    kind = bare_type(kind)
    model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return model, info, direct


def example_of(info: FieldInfo | None, direct: bool) -> str:
    if info is None or not info.examples:
        return ""
    example = info.examples[0]
    if not direct:
        if isinstance(example, dict):
            example = next(iter(example.values()))
        elif isinstance(example, list):
            example = example[0]
    return "; write e.g. " + json.dumps(example, ensure_ascii=False)


def range_of(info: FieldInfo | None) -> str:
    if info is None:
        return "another value"
    low = high = None
    above = False
    for bound in info.metadata:
        low = getattr(bound, "ge", low)
        high = getattr(bound, "le", high)
        if (limit := getattr(bound, "gt", None)) is not None:
            low, above = limit, True
    if low is None:
        return f"{high:g} or less"
    if high is None or high >= 1_000_000:
        return f"more than {low:g}" if above else f"{low:g} or more"
    if above:
        return f"more than {low:g}, at most {high:g}"
    return f"{low:g} to {high:g}"


def guess(name: str, known: Iterable[str], what: str) -> str:
    """Return "did you mean …", else the list of what there is."""
    names = list(known)
    folded = {candidate.lower(): candidate for candidate in reversed(names)}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    if close:
        return f"did you mean {folded[close[0]]}?"
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"{what}: {shown}" if names else f"there are no {what}"


def choices_of(info: FieldInfo | None, path: Place = (), value: Any = None) -> str:
    if info is None:
        return ""
    kind = bare_type(info.annotation)
    if typing.get_origin(kind) is dict:
        kind = bare_type(typing.get_args(kind)[0])
    if typing.get_origin(kind) is not Literal:
        return ""
    allowed = [str(item) for item in typing.get_args(kind)]
    if isinstance(value, str):
        close = difflib.get_close_matches(value.lower(), allowed, n=1)
        if close:
            return f"; did you mean {close[0]}?"
    return (
        f"; write {' or '.join([', '.join(allowed[:-1]), allowed[-1]] if allowed[1:] else allowed)}"
    )
