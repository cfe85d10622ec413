"""rules.yaml: which providers there are, who serves which model, and every threshold.

`load` gives the whole file as one frozen `Rules`, or a `RulesError` that lists all that is
wrong with it. What the file may hold is said in `rules_schema`.

`python -m kimi_core.rules` prints the JSON Schema.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import math
import os
import random
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from kimi_core import env as dotenv
from kimi_core.env import Secret, Variables, quoted
from kimi_core.rules_schema import (
    MAX_MODEL_NAME,
    CompressionSettings,
    Dialect,
    LimitsSettings,
    Markup,
    MemorySettings,
    Place,
    Price,
    ProviderSpec,
    RoutingRule,
    RulesSpec,
    SanitizerSettings,
    Strategy,
    TargetSpec,
    bare_type,
    choices_of,
    described,
    example_of,
    fits_header,
    guess,
    json_schema,
    range_of,
    split_url,
)
from kimi_core.rules_yaml import Reader, Wrong, plain_value, read_text, shown_path

__all__ = [
    "Dialect",
    "Markup",
    "Match",
    "ModelRule",
    "Price",
    "Problem",
    "Provider",
    "Rules",
    "RulesError",
    "RulesFile",
    "Score",
    "Secret",
    "Strategy",
    "Target",
    "choose",
    "default_rules_path",
    "json_schema",
    "load",
    "settings",
]

EXTRACT = "extract"
"""In the place of a model's name: no model writes the summary."""
MAX_ANSWERS = 1000
"""Matches that are remembered; a client that asks for ever new names begins the list anew."""

_T = typing.TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; `where` is `rules.yaml:12`, `.env:3` or `environment`."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class RulesError(Exception):
    """Rules that cannot be used: str() lists each problem on a line of its own.

    No message holds a key.
    """

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.path = path
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider with its variables filled in.

    `problem` says why it cannot be used, where a variable of its base_url or a key is no good;
    the file is right all the same.
    """

    name: str
    api: Dialect
    base_urls: Mapping[Dialect, str] = field(hash=False)
    key: Secret | None = None
    key_variable: str | None = None
    takes_key: bool = False
    rpm: int | None = None
    timeout: float = 120
    connect_timeout: float = 10
    stream_usage: bool = True
    vendor_names: bool = False
    prices: tuple[tuple[str, Price], ...] = field(default=(), hash=False)
    model_prefixes: tuple[str, ...] = ()
    key_prefixes: tuple[str, ...] = ()
    hosts: frozenset[str] = frozenset()
    problem: str | None = None

    @property
    def base_url(self) -> str:
        """Return the URL of its own dialect, without a slash at the end; "" when it has none."""
        return self.base_urls.get(self.api, "")

    @property
    def dialects(self) -> tuple[Dialect, ...]:
        """Return what it speaks, its own dialect first."""
        return tuple(self.base_urls)

    def url_for(self, dialect: str) -> str | None:
        """Return the base URL to which that dialect's endpoint is added, or None."""
        return self.base_urls.get(typing.cast(Dialect, dialect))

    def key_header(self, dialect: str) -> str:
        """Return the name of the header in which it takes the key.

        Providers that speak Anthropic's dialect beside their own take a bearer token there too.
        """
        if dialect == "gemini":
            return "x-goog-api-key"
        return "x-api-key" if dialect == "anthropic" == self.api else "authorization"

    def price(self, model: str) -> Price | None:
        """Return the price that the rules give for the upstream model, or None."""
        return next((price for name, price in self.prices if _fits(name, model)), None)


@dataclass(frozen=True, slots=True)
class Target:
    """A provider and the name of the model there."""

    provider: Provider
    model: str
    weight: float = 1


@dataclass(frozen=True, slots=True)
class ModelRule:
    """One entry of models: as written; `name` may be a pattern."""

    name: str
    targets: tuple[TargetSpec, ...] = ()
    strategy: Strategy | None = None
    context: int | None = None
    markup: Markup | None = None
    ensure_tool_call: bool | None = None
    bypass: bool | None = None

    @property
    def is_pattern(self) -> bool:
        return "*" in self.name


@dataclass(frozen=True, slots=True)
class Match:
    """What the rules say of one model that a client asked for.

    `rule` is the entry that says who serves it, or the one that fits best where none does.
    `targets` is never empty in what `Rules.match` gives. `context` is the window in tokens, None
    when the rules do not say.
    """

    model: str
    rule: ModelRule
    targets: tuple[Target, ...]
    strategy: Strategy
    context: int | None
    markup: Markup | None
    ensure_tool_call: bool
    bypass: bool


@dataclass(frozen=True, slots=True)
class Score:
    """What has been seen of a provider; None is not known.

    `capacity`: the share of its requests per minute that is free, 0 to 1. `usd_per_mtok`: US
    dollars per million tokens. `latency_s`: seconds until the first byte.
    """

    capacity: float | None = None
    usd_per_mtok: float | None = None
    latency_s: float | None = None


def choose(
    targets: Sequence[Target],
    strategy: Strategy,
    *,
    rng: random.Random,
    counter: int = 0,
    scores: Mapping[str, Score] | None = None,
) -> Target:
    """Return the target that the strategy picks.

    `counter` is how many choices were made before (round_robin); `scores` is by provider name.
    `best` takes the highest `capacity * (0.6 * cheapest / cost + 0.4 * fastest / latency)`, so a
    provider that is full is taken only when all are, money counts more than time, and
    twice the price or the time halves its share. A capacity that is not known counts as 1, a
    cost as half as good as the cheapest, a latency as the fastest, so that a provider
    that nobody has tried gets tried. The first of equals wins.

    Raises ValueError when there is no target.
    """
    if not targets:
        raise ValueError("there is no target to choose from")
    if strategy == "round_robin":
        return targets[counter % len(targets)]
    if strategy == "random":
        return rng.choice(targets)
    if strategy == "weighted_random":
        return rng.choices(targets, weights=[target.weight for target in targets])[0]
    if strategy == "best":
        return _best(targets, scores or {})
    return targets[0]


def _best(targets: Sequence[Target], scores: Mapping[str, Score]) -> Target:
    seen = [scores.get(target.provider.name, Score()) for target in targets]
    cheapest = min(filter(_is_known, (score.usd_per_mtok for score in seen)), default=None)
    fastest = min(filter(_is_known, (score.latency_s for score in seen)), default=None)

    def worth(score: Score) -> float:
        capacity = min(score.capacity, 1.0) if _is_known(score.capacity) else 1.0
        cost = _share(cheapest, score.usd_per_mtok, unknown=0.5)
        return capacity * (0.6 * cost + 0.4 * _share(fastest, score.latency_s, unknown=1.0))

    return max(zip(targets, seen, strict=True), key=lambda pair: worth(pair[1]))[0]


def _is_known(value: float | None) -> typing.TypeGuard[float]:
    return value is not None and math.isfinite(value) and value >= 0


def _share(least: float | None, value: float | None, *, unknown: float) -> float:
    if least is None or not _is_known(value):
        return unknown
    return 1.0 if value <= least else least / value


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(re.escape(part) for part in name.split("*")), re.DOTALL)


def _fits(name: str, model: str) -> bool:
    return name == model if "*" not in name else _pattern(name).fullmatch(model) is not None


def _by_length(names: Iterable[str]) -> list[str]:
    """Return exact names first, then patterns, those with the most letters of their own first."""
    return sorted(names, key=lambda name: ("*" in name, -len(name.replace("*", ""))))


@dataclass(frozen=True)
class Rules:
    """The whole file, checked and filled in. Nothing in it changes; a reload makes another."""

    path: Path
    providers: Mapping[str, Provider]
    models: Mapping[str, ModelRule]
    default_model: str | None
    default_strategy: Strategy
    sticky: bool
    ensure_tool_call_max_attempts: int
    proxy_host: str
    proxy_port: int
    routing: tuple[RoutingRule, ...]
    sanitizer: SanitizerSettings
    compression: CompressionSettings
    limits: LimitsSettings
    memory: MemorySettings

    def match(self, model: str, sent_to: Provider | None = None) -> Match | None:
        """Return who serves the model; None: no rule does, so it goes where it was sent.

        The exact name counts first, then the longest pattern. `sent_to` is the provider that the
        client itself addressed, by host or by path. Where that provider's own names look like
        vendor/model, a pattern such as `openai/*` is not read from them:
        `openai/gpt-oss-120b` sent to OpenRouter is OpenRouter's model.
        """
        said = self.about(model, sent_to)
        return said if said is not None and said.targets else None

    def about(self, model: str, sent_to: Provider | None = None) -> Match | None:
        """Return all that the rules say of the model, even if no rule serves it (no targets)."""
        if len(model) > MAX_MODEL_NAME:
            return None
        own_names = sent_to is not None and sent_to.vendor_names
        asked = (model, own_names)
        if asked not in self._answers:
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
            self._answers[asked] = self._about(model, own_names)
        return self._answers[asked]

    def _about(self, model: str, own_names: bool) -> Match | None:
        entries = list(self._entries(model, own_names))
        if not entries:
            return None
        serving = next((entry for entry in entries if entry.targets), None)
        return Match(
            model=model,
            rule=serving or entries[0],
            targets=() if serving is None else self._targets(serving, model),
            strategy=(serving and serving.strategy) or self.default_strategy,
            context=_first(entry.context for entry in entries),
            markup=_first(entry.markup for entry in entries),
            ensure_tool_call=bool(_first(entry.ensure_tool_call for entry in entries)),
            bypass=bool(_first(entry.bypass for entry in entries)),
        )

    def _entries(self, model: str, own_names: bool) -> Iterator[ModelRule]:
        exact = self.models.get(model)
        if exact is not None and not exact.is_pattern:
            yield exact
        for entry in self._patterns:
            if not (own_names and entry.name.endswith("/*")) and _fits(entry.name, model):
                yield entry

    def _targets(self, entry: ModelRule, model: str) -> tuple[Target, ...]:
        return tuple(
            Target(
                self.providers[target.provider],
                _upstream_name(entry.name, target, model),
                target.weight,
            )
            for target in entry.targets
        )

    def offered(self) -> tuple[ModelRule, ...]:
        """Return the models that can be asked for by name, in the order of the file."""
        return tuple(r for r in self.models.values() if r.targets and not r.is_pattern)

    def detect(self, path_provider: str | None, model: str, key: str | None) -> Provider | None:
        """Return the provider of a request that no rule names: by path, model, then key.

        `path_provider` is the first part of the path where it is none of our own; when it names
        no provider nothing else is tried. The longest prefix counts, so that `sk-ant-` goes
        before `sk-`.
        """
        if path_provider is not None:
            return self.providers.get(path_provider)
        name = model.removeprefix("models/")
        for prefix, provider in self._model_prefixes:
            if name.startswith(prefix):
                return provider
        for prefix, provider in self._key_prefixes:
            if key and key.startswith(prefix):
                return provider
        return None

    def hosts(self) -> frozenset[str]:
        """Return the names of the LLM hosts, whose TLS is opened; all others are tunnelled."""
        return self._llm_hosts

    def providers_by_host(self, host: str, port: int | None = None) -> Provider | None:
        """Return the provider that answers at this host; the first of the file when several do.

        With `port`, one whose base URL has it goes first, and an address of this machine counts
        only with its port: another port is another program.
        """
        name = _host_key(host)
        candidates = self._by_host.get(name, ())
        for provider, known in candidates:
            if port is None or port in known:
                return provider
        return candidates[0][0] if candidates and not _is_local(name) else None

    def points_at(self, hosts_ports: Iterable[tuple[str, int]]) -> tuple[Provider, ...]:
        """Return the providers that would lead back to one of these listen addresses.

        All names of this machine are one: 127.0.0.1, localhost, ::1, and 0.0.0.0, :: or ""
        where the proxy listens on every address.
        """
        ours = {
            ("localhost" if _is_local(_host_key(host)) else _host_key(host), port)
            for host, port in hosts_ports
        }
        return tuple(
            provider
            for provider in self.providers.values()
            if any(
                ("localhost" if _is_local(host) else host, port) in ours
                for host, port in map(_address, provider.base_urls.values())
            )
        )

    def secrets(self) -> frozenset[str]:
        """Return the keys themselves, those of 8 characters and more, to find them in texts."""
        return self._secrets

    @cached_property
    def _answers(self) -> dict[tuple[str, bool], Match | None]:
        return {}

    @cached_property
    def _patterns(self) -> tuple[ModelRule, ...]:
        return tuple(self.models[name] for name in _by_length(self.models) if "*" in name)

    @cached_property
    def _model_prefixes(self) -> list[tuple[str, Provider]]:
        return _longest_first(
            (prefix, provider)
            for provider in self.providers.values()
            for prefix in provider.model_prefixes
        )

    @cached_property
    def _key_prefixes(self) -> list[tuple[str, Provider]]:
        return _longest_first(
            (prefix, provider)
            for provider in self.providers.values()
            for prefix in provider.key_prefixes
        )

    @cached_property
    def _by_host(self) -> dict[str, list[tuple[Provider, frozenset[int]]]]:
        found: dict[str, list[tuple[Provider, frozenset[int]]]] = {}
        for provider in self.providers.values():
            addresses = [_address(url) for url in provider.base_urls.values()]
            for host in dict.fromkeys([*(host for host, _ in addresses), *sorted(provider.hosts)]):
                ports = frozenset(port for name, port in addresses if name == host) or {443}
                found.setdefault(host, []).append((provider, frozenset(ports)))
        return found

    @cached_property
    def _llm_hosts(self) -> frozenset[str]:
        named = {host for provider in self.providers.values() for host in provider.hosts}
        over_tls = {
            _address(url)[0]
            for provider in self.providers.values()
            for url in provider.base_urls.values()
            if url.startswith("https:")
        }
        return frozenset(named | over_tls)

    @cached_property
    def _secrets(self) -> frozenset[str]:
        keys = (p.key.reveal() for p in self.providers.values() if p.key is not None)
        return frozenset(key for key in keys if len(key) >= 8)


def _first(values: Iterable[_T | None]) -> _T | None:
    return next((value for value in values if value is not None), None)


def _longest_first(pairs: Iterable[tuple[str, Provider]]) -> list[tuple[str, Provider]]:
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def _upstream_name(entry: str, target: TargetSpec, model: str) -> str:
    """Return what the target calls the model, which fits the entry of that name."""
    if "*" not in entry:
        # `groq/x: {targets: [{provider: groq}]}` means what the pattern `groq/*` would.
        return target.model or model.removeprefix(f"{target.provider}/") or model
    found = _pattern(entry).fullmatch(model)
    rest = found[found.lastindex or 0] if found else model
    if target.model is not None:
        return target.model.replace("*", rest)
    return rest if entry.endswith("/*") and rest else model


def _host_key(host: str) -> str:
    return host.lower().rstrip(".").strip("[]")


def _is_local(host: str) -> bool:
    if host in ("", "localhost") or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return _host_key(parts.hostname or ""), parts.port or (443 if parts.scheme == "https" else 80)


@cache
def settings() -> Mapping[str, Place]:
    """Return the variables that go before the file, each with the setting it stands for.

    A top-level setting has its own name in capitals (DEFAULT_MODEL), one of a section both names
    (SANITIZER_THRESHOLD). Mappings and lists have none.
    """
    found: dict[str, Place] = {}
    for name, info in RulesSpec.model_fields.items():
        kind = bare_type(info.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for inner, inner_info in kind.model_fields.items():
                if typing.get_origin(bare_type(inner_info.annotation)) not in (dict, tuple):
                    found[f"{name}_{inner}".upper()] = (name, inner)
        elif name != "version" and typing.get_origin(kind) not in (dict, tuple):
            found[name.upper()] = (name,)
    return types.MappingProxyType(found)


def load(
    path: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
) -> Rules:
    """Return the rules of the file at `path`.

    `${NAME}` is taken from `env` (None: the process environment), then from `.env` beside the
    file; the variables of `settings()` go before what the file says.

    Raises RulesError, and nothing else, whatever the files hold.
    """
    return _load(Path(path), os.environ if env is None else env)


def _load(path: Path, environ: Mapping[str, str]) -> Rules:
    try:
        variables = dotenv.read(path.parent / ".env", environ)
    except dotenv.DotenvError as error:
        where = f".env:{error.line}" if error.line else ".env"
        raise RulesError(path, [Problem(where, str(error))]) from None
    reader = Reader()
    try:
        raw = reader.read(read_text(path))
    except Wrong as error:
        where = f"{path.name}:{error.line}" if error.line else path.name
        raise RulesError(path, [Problem(where, str(error))]) from None
    if raw is None:
        raise RulesError(
            path,
            [Problem(f"{path.name}:1", "is empty; `kimi-proxy init` writes a file to start from")],
        )
    if not isinstance(raw, dict):
        raise RulesError(
            path,
            [Problem(f"{path.name}:1", "is not a mapping; write version: 1, providers: and so on")],
        )
    return _Loading(path, raw, reader, variables).rules()


class _Loading:
    """From plain values to Rules, collecting all that is wrong."""

    def __init__(
        self, path: Path, raw: dict[str, Any], reader: Reader, variables: Variables
    ) -> None:
        self._path = path
        # A section whose every line is a comment is null in YAML, and means its defaults.
        self._raw = {
            key: value
            for key, value in raw.items()
            if value is not None or key not in RulesSpec.model_fields or key == "providers"
        }
        self._reader = reader
        self._variables = variables
        self._from_variable: dict[Place, str] = {}
        self._found: list[tuple[int, Problem]] = []

    def rules(self) -> Rules:
        for line, problem in self._reader.problems:
            self._add(line, problem)
        self._apply_variables()
        spec: RulesSpec | None = None
        try:
            spec = RulesSpec.model_validate(self._raw)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                self._translate(item)
        for path, problem in self._cross_checks():
            self._report(path, problem)
        if spec is not None and not self._found:
            rules = self._built(spec)
            for place, what in (
                (("default_model",), _default_model_problem(rules)),
                (("compression", "model"), _summariser_problem(rules)),
            ):
                if what is not None:
                    self._report(place, what)
            if not self._found:
                return rules
        self._found.sort(key=lambda pair: pair[0])
        raise RulesError(self._path, list(dict.fromkeys(found for _, found in self._found)))

    def _add(self, line: int, what: str, where: str | None = None) -> None:
        self._found.append((line, Problem(where or f"{self._path.name}:{line}", what)))

    def _report(self, path: Place, what: str) -> None:
        """Add a problem of the value at `path`, at the nearest line that is known."""
        variable = self._from_variable.get(path)
        if variable is not None:
            self._add(0, f"{variable}: {what}", self._variables.place(variable))
            return
        line = next(
            self._reader.lines[path[:length]]
            for length in range(len(path), -1, -1)
            if path[:length] in self._reader.lines
        )
        self._add(line, f"{shown_path(path)}: {what}")

    def _apply_variables(self) -> None:
        for name, path in settings().items():
            text = self._variables.get(name)
            if text is None:
                continue
            _, info, _ = described(path)
            kind = bare_type(info.annotation) if info else str
            value: Any = text
            if kind is not str and typing.get_origin(kind) is not Literal:
                value = plain_value(text)
            section: Any = self._raw
            for step in path[:-1]:
                section = section.setdefault(str(step), {})
            if not isinstance(section, dict):
                continue
            section[str(path[-1])] = value
            self._reader.written[path] = text
            self._from_variable[path] = name

    def _translate(self, error: Any) -> None:
        kind: str = error["type"]
        path: Place = tuple(error["loc"])
        if path and path[-1] == "[key]":
            path = path[:-1]
        if kind == "missing":
            _, info, _ = described(path)
            hint = example_of(info, True) or choices_of(info)
            self._report(path[:-1], f"{path[-1]} is missing{hint}")
            return
        if kind == "extra_forbidden":
            owner, _, _ = described(path[:-1])
            known = owner.model_fields if owner else ()
            hint = guess(str(path[-1]), known, "the keys here are")
            self._report(path, f"is no key of rules.yaml; {hint}")
            return
        self._report(path, self._message(kind, path, error))

    def _message(self, kind: str, path: Place, error: Any) -> str:
        _, info, direct = described(path)
        value = error["input"]
        shown = self._echo(path, value)
        example = example_of(info, direct)
        context = error.get("ctx", {})
        if kind == "value_error":
            return str(context["error"])
        if value is None:
            return f"is empty{example or choices_of(info)}"
        if kind in ("int_type", "int_from_float", "int_parsing", "int_parsing_size"):
            return f"{shown} is not a whole number{example}"
        if kind in ("float_type", "float_parsing"):
            return f"{shown} is not a number{example}"
        if kind == "finite_number":
            return f"{shown} is not a finite number{example}"
        if kind == "bool_type":
            return f"{shown} is neither true nor false{example}"
        if kind == "string_type":
            if isinstance(value, (dict, tuple)) or self._is_secret(path):
                return f"{shown} is not a text{example}"
            written = self._reader.written.get(path, str(value))
            return f"{shown} is not a text; put it in quotes: {quoted(written)}"
        if kind in ("model_type", "dict_type", "model_attributes_type"):
            return f"{shown} is not a mapping{example}"
        if kind == "tuple_type":
            return f"{shown} is not a list{example}"
        if kind == "literal_error":
            return f"{shown} is not allowed{choices_of(info, path, value)}"
        if kind in (
            "greater_than",
            "greater_than_equal",
            "less_than",
            "less_than_equal",
        ):
            return f"{shown} is out of range; write {range_of(info)}"
        if kind in ("string_too_short", "too_short"):
            return f"is empty{example}"
        if kind == "string_pattern_mismatch":
            return f"{shown} has characters that cannot stand here{example}"
        return f"{shown} cannot stand here ({kind}){example}"

    def _is_secret(self, path: Place) -> bool:
        return path[-1:] == ("key",) or (
            path[:1] == ("memory",) and bool({"env", "headers"} & set(path))
        )

    def _echo(self, path: Place, value: Any) -> str:
        if self._is_secret(path):
            return "the value"
        if isinstance(value, dict):
            return "a mapping"
        if isinstance(value, tuple):
            return "a list"
        if isinstance(value, str):
            return quoted(value)
        return quoted(self._reader.written.get(path, str(value)))[1:-1]

    def _cross_checks(self) -> Iterator[tuple[Place, str]]:
        """Give what is wrong between two places of the file, be the rest right or not."""
        providers = self._raw.get("providers")
        if not isinstance(providers, dict):
            return
        models = self._raw.get("models")
        for name, model in models.items() if isinstance(models, dict) else ():
            targets = model.get("targets") if isinstance(model, dict) else None
            for index, target in enumerate(targets if isinstance(targets, tuple) else ()):
                if not isinstance(target, dict):
                    continue
                path: Place = ("models", name, "targets", index)
                provider, upstream = target.get("provider"), target.get("model")
                if isinstance(provider, str) and provider not in providers:
                    hint = guess(provider, providers, "the providers are")
                    yield (
                        (*path, "provider"),
                        f"{quoted(provider)} is no provider of this file; {hint}",
                    )
                if isinstance(upstream, str) and "*" in upstream and "*" not in name:
                    yield (
                        (*path, "model"),
                        f"{quoted(upstream)} is a pattern, but {quoted(name)} is not; "
                        "write the model's name at the provider",
                    )
        for kind in ("model_prefixes", "key_prefixes"):
            owners: dict[str, str] = {}
            for name, provider in providers.items():
                prefixes = provider.get(kind) if isinstance(provider, dict) else None
                for index, prefix in enumerate(prefixes if isinstance(prefixes, tuple) else ()):
                    if not isinstance(prefix, str):
                        continue
                    owner = owners.setdefault(prefix, name)
                    if owner != name:
                        yield (
                            ("providers", name, kind, index),
                            f"{quoted(prefix)} stands for {owner} already; remove one of them",
                        )

    def _built(self, spec: RulesSpec) -> Rules:
        return Rules(
            path=self._path,
            providers=types.MappingProxyType(
                {name: self._provider(name, given) for name, given in spec.providers.items()}
            ),
            models=types.MappingProxyType(
                {
                    name: ModelRule(
                        name=name,
                        targets=given.targets,
                        strategy=given.strategy,
                        context=given.context,
                        markup=given.markup,
                        ensure_tool_call=given.ensure_tool_call,
                        bypass=given.bypass,
                    )
                    for name, given in spec.models.items()
                }
            ),
            default_model=spec.default_model,
            default_strategy=spec.default_strategy,
            sticky=spec.sticky,
            ensure_tool_call_max_attempts=spec.ensure_tool_call_max_attempts,
            proxy_host=spec.proxy_host,
            proxy_port=spec.proxy_port,
            routing=spec.routing,
            sanitizer=spec.sanitizer,
            compression=spec.compression,
            limits=spec.limits,
            memory=spec.memory,
        )

    def _provider(self, name: str, given: ProviderSpec) -> Provider:
        problem: str | None = None
        urls: dict[Dialect, str] = {}
        unset: list[str] = []
        for dialect, written in {given.api: given.base_url, **given.also}.items():
            url, missing = self._variables.expand(written)
            if missing:
                unset += missing
                continue
            try:
                scheme, rest = split_url(url).geturl().rstrip("/").split("://", 1)
            except ValueError as error:
                names = ", ".join(dotenv.references(written))
                problem = f"provider {name}: its base URL, with {names} filled in, {error}"
                continue
            host, slash, tail = rest.partition("/")
            urls[dialect] = f"{scheme}://{host.lower()}{slash}{tail}"
        if unset:
            several = len(set(unset)) > 1
            problem = (
                f"provider {name}: {' and '.join(dict.fromkeys(unset))} "
                f"{'are' if several else 'is'} not set; "
                f"put {'them' if several else 'it'} into the environment or into .env"
            )
        if given.api not in urls:
            urls = {}
        variable = next(iter(dotenv.references(given.key or "")), None)
        text = self._variables.get(variable) if variable else given.key
        if text is not None and not fits_header(text):
            problem = (
                f"provider {name}: {variable} has blanks or characters that no HTTP header "
                "carries; copy the key again"
            )
            text = None
        return Provider(
            name=name,
            api=given.api,
            base_urls=types.MappingProxyType(urls),
            key=Secret(text) if text else None,
            key_variable=variable,
            takes_key=given.key is not None,
            rpm=given.rpm,
            timeout=given.timeout,
            connect_timeout=given.connect_timeout,
            stream_usage=given.stream_usage,
            vendor_names=given.vendor_names,
            prices=tuple((model, given.prices[model]) for model in _by_length(given.prices)),
            model_prefixes=given.model_prefixes,
            key_prefixes=given.key_prefixes,
            hosts=frozenset(given.hosts),
            problem=problem,
        )


def _default_model_problem(rules: Rules) -> str | None:
    name = rules.default_model
    if name is None or rules.match(name) or rules.detect(None, name, None):
        return None
    hint = guess(name, (rule.name for rule in rules.offered()), "the models are")
    return f"{quoted(name)} is a model that no rule with targets names; {hint}"


def _summariser_problem(rules: Rules) -> str | None:
    name = rules.compression.model
    if name in (None, EXTRACT) or rules.match(name) or rules.detect(None, name, None):
        return None
    hint = guess(name, [EXTRACT, *(rule.name for rule in rules.offered())], "the models are")
    return f"{quoted(name)} is a model that no rule with targets names; {hint}"


class RulesFile:
    """The rules of a file that may change while the proxy runs.

    `current` is always a set of rules that was right; `problem` is what is wrong with the file
    as it is now, or None. Raises RulesError when the file is wrong from the start.
    """

    def __init__(self, path: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self._env = env
        # Taken before the file is read: a change in between is seen by the next refresh.
        self._seen = self._signature()
        self.current: Rules = load(self.path, env)
        self.problem: RulesError | None = None

    def refresh(self) -> RulesError | None:
        """Read the file again if it or its `.env` changed; two stat calls if not.

        Returns what is wrong once for each change, so that the caller warns once; the rules
        stay as they were then.
        """
        signature = self._signature()
        if signature == self._seen:
            return None
        self._seen = signature
        try:
            self.current = load(self.path, self._env)
        except RulesError as error:
            self.problem = error
            return error
        self.problem = None
        return None

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        return _stat(self.path), _stat(self.path.parent / ".env")


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def default_rules_path() -> Path:
    """Return rules.yaml of the checkout this file stands in, else the one of the package."""
    addons = Path(__file__).resolve().parents[1]
    if addons.name == "addons" and (checkout := addons.parent / "rules.yaml").is_file():
        return checkout
    package = importlib.util.find_spec("kimi_proxy")
    for folder in (package and package.submodule_search_locations) or ():
        if (installed := Path(folder) / "rules.yaml").is_file():
            return installed
    return addons.parent / "rules.yaml"


if __name__ == "__main__":
    json.dump(json_schema(), sys.stdout, indent=2, ensure_ascii=False)
    print()
