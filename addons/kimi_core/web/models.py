"""The providers and models of the rules, and those that were used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from kimi_core.rules import Provider, Rules
from kimi_core.web.handler import Api


class Providers(Api):
    async def get(self) -> None:
        totals = await self.read(self.site.store.totals)
        self.answer({"providers": providers(self.site.proxy.rules, totals["by_provider"])})


class Models(Api):
    """The models of the rules, and those that were used with what they used."""

    async def get(self) -> None:
        known = await self.read(self.site.store.known_models)
        totals = await self.read(self.site.store.totals)
        rules = self.site.proxy.rules
        self.answer(
            {
                "default_model": rules.default_model,
                "models": models(rules),
                "seen": seen_models(known, totals["by_model"]),
            }
        )


class AllModels(Api):
    """One list of every model that can be asked for or was: who serves it, and its window."""

    async def get(self) -> None:
        known = await self.read(self.site.store.known_models)
        self.answer({"models": all_models(self.site.proxy.rules, known)})


def providers(rules: Rules, seen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the providers of the rules, then those that only the store knows.

    `seen` has the sums of each by name; of a key it is only said whether there is one.
    """
    known = [
        {
            "name": provider.name,
            "configured": True,
            "dialects": list(provider.dialects),
            "host": _host(provider),
            "has_key": provider.key is not None,
            "takes_key": provider.takes_key,
            "rpm": provider.rpm,
            "timeout_s": provider.timeout,
            "problem": provider.problem,
            "seen": seen.get(provider.name),
        }
        for provider in rules.providers.values()
    ]
    others = [
        {
            "name": name,
            "configured": False,
            "dialects": [],
            "host": None,
            "has_key": False,
            "takes_key": False,
            "rpm": None,
            "timeout_s": None,
            "problem": None,
            "seen": sums,
        }
        for name, sums in seen.items()
        if name and name not in rules.providers
    ]
    return known + others


def _host(provider: Provider) -> str | None:
    if not provider.base_url:
        return None
    parts = urlsplit(provider.base_url)
    return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname


def models(rules: Rules) -> list[dict[str, Any]]:
    """Return the models of the rules: window in tokens, and who serves them."""
    return [
        {
            "name": rule.name,
            "pattern": rule.is_pattern,
            "context": rule.context,
            "strategy": rule.strategy or rules.default_strategy,
            "targets": [
                {"provider": target.provider, "model": target.model or rule.name}
                for target in rule.targets
            ],
        }
        for rule in rules.models.values()
    ]


def seen_models(
    known: Sequence[Mapping[str, Any]], sums: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the models that were used, last used first, each with its sums over providers."""
    found: dict[str, dict[str, Any]] = {}
    for row in known:
        model = found.setdefault(
            row["model"],
            {"name": row["model"], "providers": [], "last_seen_at": row["last_seen_at"]}
            | dict(sums.get(row["model"], {})),
        )
        if row["provider"] is not None:
            model["providers"].append(row["provider"])
    return list(found.values())


def all_models(rules: Rules, known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each name and provider; `model` is its name at the provider."""
    used = {(row["provider"], row["model"]): row for row in known}
    listed = [
        {"name": rule["name"], "context": rule["context"], "source": "rules", **target}
        for rule in models(rules)
        for target in rule["targets"] or [{"provider": None, "model": rule["name"]}]
    ]
    mine = {(entry["provider"], entry["model"]) for entry in listed}
    listed += [
        {
            "name": model,
            "context": about.context if (about := rules.about(model)) else None,
            "source": "seen",
            "provider": provider,
            "model": model,
        }
        for provider, model in used
        if (provider, model) not in mine
    ]
    for entry in listed:
        row = used.get((entry["provider"], entry["model"]), {})
        entry["requests"] = row.get("requests", 0)
        entry["last_seen_at"] = row.get("last_seen_at")
    return listed
