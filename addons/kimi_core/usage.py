"""What a provider says an exchange used, whatever its dialect and quirks.

Sources: the providers' SDKs and documentation, as noted at each field (read 2026-11-21).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kimi_core.exchange import Usage


class UsageReader:
    """Reads usage from the payloads of one reply, a whole body or a stream's events.

    A counter that comes again is cumulative (Anthropic's message_delta; NVIDIA and
    SiliconFlow repeat it on every chunk), so the largest value counts and none is added.
    """

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._cost: float | None = None

    def feed(self, payload: Mapping[str, Any]) -> None:
        """Take what `payload` says; anything malformed in it is no statement."""
        for found in _statements(payload):
            for name, value in _counters(found):
                self._counters[name] = max(value, self._counters.get(name, 0))
            self._cost = _cost(found, self._cost)

    @property
    def usage(self) -> Usage:
        """Return what was said so far, in OpenTelemetry's terms: totals that include their parts."""
        counters = self._counters
        if not counters and self._cost is None:
            return Usage()
        read = _first(counters, "cache_read", "prompt_cache_hit_tokens")
        write = counters.get("cache_write")
        tool_prompt = counters.get("toolUsePromptTokenCount")
        reasoning = counters.get("reasoning")
        if "prompt_tokens" in counters or "completion_tokens" in counters:
            input_tokens = counters.get("prompt_tokens")
            output_tokens = counters.get("completion_tokens")
            total = counters.get("total_tokens")
            if total and input_tokens is not None and total - input_tokens > (output_tokens or 0):
                # Gemini's OpenAI endpoint and xAI leave hidden thinking out of completion_tokens;
                # it is billed, and only total_tokens has it.
                hidden = total - input_tokens - (output_tokens or 0)
                output_tokens = total - input_tokens
                reasoning = max(reasoning or 0, hidden)
        elif "promptTokenCount" in counters or "candidatesTokenCount" in counters:
            input_tokens = counters.get("promptTokenCount")
            if input_tokens is not None:
                input_tokens += tool_prompt or 0
            reasoning = counters.get("thoughtsTokenCount")
            output_tokens = counters.get("candidatesTokenCount", 0) + (reasoning or 0)
            read = counters.get("cachedContentTokenCount")
        else:
            input_tokens = counters.get("input_tokens")
            output_tokens = counters.get("output_tokens")
            if input_tokens is not None and "disjoint" in counters:
                # Anthropic: "Total input tokens in a request is the summation of input_tokens,
                # cache_creation_input_tokens, and cache_read_input_tokens."
                # -- https://docs.anthropic.com/en/api/messages
                input_tokens += (read or 0) + (write or 0)
        return Usage(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cache_read_tokens=read,
            cache_write_tokens=write,
            cache_write_1h_tokens=counters.get("cache_write_1h"),
            reasoning_tokens=reasoning,
            tool_prompt_tokens=tool_prompt,
            cost_usd=self._cost,
        )


_PLAIN = (
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "input_tokens",
    "output_tokens",
    "prompt_cache_hit_tokens",  # DeepSeek
    "promptTokenCount",
    "candidatesTokenCount",
    "thoughtsTokenCount",
    "cachedContentTokenCount",
    "toolUsePromptTokenCount",
)

# (where the statement holds it, which counter it is)
_NESTED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("cached_tokens",), "cache_read"),  # Moonshot
    (("prompt_tokens_details", "cached_tokens"), "cache_read"),
    (("input_tokens_details", "cached_tokens"), "cache_read"),
    (("cache_read_input_tokens",), "cache_read"),
    (("prompt_tokens_details", "cache_write_tokens"), "cache_write"),
    (("input_tokens_details", "cache_write_tokens"), "cache_write"),
    (("cache_creation_input_tokens",), "cache_write"),
    (("cache_creation", "ephemeral_1h_input_tokens"), "cache_write_1h"),
    (("completion_tokens_details", "reasoning_tokens"), "reasoning"),
    (("output_tokens_details", "reasoning_tokens"), "reasoning"),
    (("output_tokens_details", "thinking_tokens"), "reasoning"),
)


def _statements(payload: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield each object in which a provider states usage."""
    choices = payload.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    for holder, key in (
        (payload, "usage"),
        (first, "usage"),  # Moonshot, in the chunk with the finish_reason
        (payload.get("x_groq"), "usage"),
        (payload, "usageMetadata"),
        (payload.get("response"), "usage"),  # Responses, in the terminal events
        (payload.get("message"), "usage"),  # Anthropic, in message_start
    ):
        if isinstance(holder, Mapping) and isinstance(found := holder.get(key), Mapping):
            yield found


def _counters(found: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name in _PLAIN:
        if (value := _count(found.get(name))) is not None:
            yield name, value
    for path, name in _NESTED:
        value: Any = found
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if (count := _count(value)) is not None:
            yield name, count
    if "prompt_tokens" not in found and (
        "cache_read_input_tokens" in found or "cache_creation_input_tokens" in found
    ):
        yield "disjoint", 1


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 1 << 53 else None


def _cost(found: Mapping[str, Any], before: float | None) -> float | None:
    """Return the dollars that OpenRouter says it took, the upstream's bill included."""
    cost = found.get("cost")
    if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < 1e9:
        return before
    details = found.get("cost_details")
    if found.get("is_byok") and isinstance(details, Mapping):
        upstream = details.get("upstream_inference_cost")
        if isinstance(upstream, int | float) and 0 <= upstream < 1e9:
            cost += upstream
    return max(float(cost), before or 0.0)


def _first(counters: Mapping[str, int], *names: str) -> int | None:
    return next((counters[name] for name in names if name in counters), None)
