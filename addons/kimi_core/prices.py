"""What an exchange costs, in US dollars.

Prices come from rules.yaml where it has them, else from genai-prices, whose data is part
of the package: nothing is fetched.
"""

from __future__ import annotations

import threading
from importlib.metadata import version
from typing import Any

from kimi_core.exchange import Usage
from kimi_core.memo import Memo
from kimi_core.rules import Price

# genai-prices' provider ids, where they differ from the names in rules.yaml.
_PROVIDER_IDS = {
    "gemini": "google",
    "vertex": "google",
    "moonshot": "moonshotai",
}
_VENDOR_PREFIXES = ("google/", "moonshotai/", "openai/", "anthropic/", "models/")


def cost(usage: Usage, price: Price) -> float:
    """Return the cost of one exchange in US dollars.

    `usage.input_tokens` includes cached tokens, as in OpenTelemetry; they are billed
    once, at `price.cached_input`; what writes the cache costs what plain input does.
    """
    total = usage.input_tokens or 0
    read = min(usage.cache_read_tokens or 0, total)
    cached = price.input if price.cached_input is None else price.cached_input
    dollars = (total - read) * price.input + read * cached
    dollars += (usage.output_tokens or 0) * price.output
    return dollars / 1e6


class PriceList:
    """Looks prices up: the rules' own first, then genai-prices'."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._library: Any = None
        self._knows_hours = False
        self._unknown: Memo[tuple[str, str], bool] = Memo(1000)

    @property
    def ready(self) -> bool:
        """Tell whether a look-up will not have to import genai-prices, which takes a second."""
        return self._library is not None

    def warm(self) -> None:
        """Import genai-prices; to be called from a thread."""
        with self._lock:
            if self._library is None:
                import genai_prices

                # Older ones, for Python 3.11, bill every cache write as Anthropic's short one.
                self._knows_hours = not version("genai-prices").startswith("0.0.")
                self._library = genai_prices

    def cost(
        self, usage: Usage, provider: str, model: str, own: Price | None = None
    ) -> tuple[float, str] | None:
        """Return (US dollars, where the price is from); None when no price is known.

        `own` is the price that the rules give for the upstream model.
        """
        if usage.input_tokens is None and usage.output_tokens is None:
            return None
        if own is not None:
            return cost(usage, own), "rules"
        if self._unknown.get((provider, model)):
            return None
        self.warm()
        try:
            dollars = self._look_up(usage, provider, model)
        except LookupError:
            self._unknown.put((provider, model), True)
            return None
        return None if dollars is None else (dollars, "prices")

    def _look_up(self, usage: Usage, provider: str, model: str) -> float | None:
        """Return US dollars; None when the counts contradict each other. Raises LookupError."""
        counts = {
            "input_tokens": usage.input_tokens or 0,
            "output_tokens": usage.output_tokens or 0,
            "cache_read_tokens": usage.cache_read_tokens or 0,
            "cache_write_tokens": usage.cache_write_tokens or 0,
        }
        hour = min(usage.cache_write_1h_tokens or 0, counts["cache_write_tokens"])
        if hour and self._knows_hours:
            counts["cache_write_1h_tokens"] = hour
        # A provider that no rule names is called by its host.
        where = {"provider_id": _PROVIDER_IDS.get(provider, provider)}
        if "." in provider:
            where = {"provider_api_url": f"https://{provider}"}
        for name in _names(model):
            try:
                found = self._calc(counts, name, where)
                if not hour or self._knows_hours:
                    return float(found.total_price)
                short = self._calc({"input_tokens": hour, "cache_write_tokens": hour}, name, where)
            except LookupError:
                continue
            except ValueError:
                return None  # more was cached than sent
            # "5-minute cache write tokens are 1.25 times the base input tokens price. 1-hour cache
            # write tokens are 2 times the base input tokens price."
            # -- https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching
            return float(found.total_price) + float(short.input_price) * (2 / 1.25 - 1)
        raise LookupError(model)

    def _calc(self, counts: dict[str, int], name: str, where: dict[str, str]) -> Any:
        library = self._library
        return library.calc_price(library.Usage(**counts), model_ref=name, **where)


def _names(model: str) -> list[str]:
    """Return the names by which a price list may know an upstream model."""
    names = [model, model.lower()]
    for prefix in _VENDOR_PREFIXES:
        if model.lower().startswith(prefix):
            names.append(model[len(prefix) :].lower())
    return list(dict.fromkeys(names))
