"""What an exchange costs, in US dollars.

Prices come from rules.yaml where it has them, else from genai-prices, whose data is part
of the package: nothing is fetched.
"""

from __future__ import annotations

import threading
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
        dollars = self._look_up(usage, provider, model)
        if dollars is None:
            self._unknown.put((provider, model), True)
            return None
        return dollars, "prices"

    def _look_up(self, usage: Usage, provider: str, model: str) -> float | None:
        library = self._library
        asked = library.Usage(
            input_tokens=usage.input_tokens or 0,
            output_tokens=usage.output_tokens or 0,
            cache_read_tokens=usage.cache_read_tokens or 0,
            cache_write_tokens=usage.cache_write_tokens or 0,
            **({"cache_write_1h_tokens": hour} if (hour := usage.cache_write_1h_tokens) else {}),
        )
        provider_id = _PROVIDER_IDS.get(provider, provider)
        for name in _names(model):
            try:
                found = library.calc_price(asked, model_ref=name, provider_id=provider_id)
            except LookupError:
                continue
            except ValueError:
                return None  # counts that contradict each other: more cached than sent
            return float(found.total_price)
        return None


def _names(model: str) -> list[str]:
    """Return the names by which a price list may know an upstream model."""
    names = [model, model.lower()]
    for prefix in _VENDOR_PREFIXES:
        if model.lower().startswith(prefix):
            names.append(model[len(prefix) :].lower())
    return list(dict.fromkeys(names))
