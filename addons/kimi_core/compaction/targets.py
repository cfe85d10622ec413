"""Whom to ask for a summary: the conversation's own model, or one that the rules name."""

from __future__ import annotations

from collections.abc import Iterable

from kimi_core.compaction.asking import Target
from kimi_core.dialects import DIALECTS, GEMINI, Dialect
from kimi_core.exchange import Route
from kimi_core.keys import SECRET_HEADERS
from kimi_core.rules import Provider, Rules

Fields = tuple[tuple[bytes, bytes], ...]

# Who the client is. Any other header may hold a secret, whatever its name.
_SHOWN = frozenset(
    (
        b"user-agent",
        b"anthropic-version",
        b"anthropic-beta",
        b"openai-organization",
        b"openai-project",
        b"http-referer",
        b"x-title",
        b"x-app",
        b"x-msh-platform",
        b"x-msh-version",
    )
)
_SHOWN_PREFIX = b"x-stainless-"


def shown(fields: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Return the headers that tell a provider which client it serves; none of them is secret."""
    return tuple(
        field
        for field in fields
        if (name := field[0].lower()) in _SHOWN or name.startswith(_SHOWN_PREFIX)
    )


def of_route(route: Route, dialect: Dialect, fields: Fields, rules: Rules) -> Target | None:
    """Return the target of an exchange that went with the provider's own key, or with none.

    None when only its client had the key.
    """
    provider = rules.providers.get(route.provider)
    if route.keep_client_key or provider is None or provider.problem:
        return None
    key = provider.key.reveal() if provider.key else ""
    if provider.takes_key and not key:
        return None
    return _target(provider, route.model, dialect, shown(fields), key, route.context)


def of_client(
    route: Route, dialect: Dialect, fields: Fields, key: str, base_url: str, *, for_us: bool
) -> Target | None:
    """Return the target of an exchange that goes with its client's own key.

    `base_url` is where it goes when the route does not say. What the client sent to its provider
    itself keeps its form; what was addressed to us gets the provider's header.
    """
    headers = shown(fields)
    provider = route.source
    if for_us and provider is not None:
        return _target(provider, route.model, dialect, headers, key, route.context)
    secret = [f for f in fields if f[0].lower() in SECRET_HEADERS and f[0].lower() != b"cookie"]
    if not secret and key and dialect is GEMINI:  # it stood in the query
        secret = [(b"x-goog-api-key", key.encode("utf-8", "surrogateescape"))]
    return Target(
        provider=route.provider,
        model=route.model,
        dialect=dialect,
        base_url=route.url or base_url,
        headers=(*headers, *secret),
        timeout_s=provider.timeout if provider else 120.0,
        connect_timeout_s=provider.connect_timeout if provider else 10.0,
        window=route.context,
        price=provider.price(route.model) if provider else None,
    )


def of_rules(rules: Rules, name: str) -> Target | None:
    """Return the first usable target of a model that the rules serve; None: none has a key."""
    match = rules.match(name)
    found = rules.detect(None, name, None)
    served = [(target.provider, target.model) for target in match.targets] if match else []
    if found is not None and not served:
        served = [(found, name)]
    for provider, model in served:
        key = provider.key.reveal() if provider.key else ""
        if provider.problem or (provider.takes_key and not key):
            continue
        window = match.context if match else None
        return _target(provider, model, DIALECTS[provider.api], (), key, window)
    return None


def _target(
    provider: Provider,
    model: str,
    dialect: Dialect,
    headers: Fields,
    key: str,
    window: int | None,
) -> Target | None:
    url = provider.url_for(dialect.name)
    if not url:
        return None
    if key:
        name = provider.key_header(dialect.name)
        value = f"Bearer {key}" if name == "authorization" else key
        headers = (*headers, (name.encode(), value.encode("utf-8", "surrogateescape")))
    if dialect.name == "anthropic" and not any(
        name.lower() == b"anthropic-version" for name, _ in headers
    ):
        headers = (*headers, (b"anthropic-version", b"2023-06-01"))
    return Target(
        provider=provider.name,
        model=model,
        dialect=dialect,
        base_url=url,
        headers=headers,
        timeout_s=provider.timeout,
        connect_timeout_s=provider.connect_timeout,
        window=window,
        price=provider.price(model),
    )
