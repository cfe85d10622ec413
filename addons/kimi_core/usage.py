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
        """Return what was said so far, as OpenTelemetry counts: totals include their parts."""
        counters = self._counters
        if not counters and self._cost is None:
            return Usage()
        read = counters.get("cache_read")
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
            output_tokens = _gemini_output(counters, input_tokens)
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
    "promptTokenCount",
    "candidatesTokenCount",
    "thoughtsTokenCount",
    "cachedContentTokenCount",
    "toolUsePromptTokenCount",
    "totalTokenCount",
)

# (where the statement holds it, which counter it is)
_NESTED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("cached_tokens",), "cache_read"),  # Moonshot
    (("prompt_cache_hit_tokens",), "cache_read"),  # DeepSeek
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
        if isinstance(holder, dict) and isinstance(found := holder.get(key), dict):
            yield found


def _counters(found: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name in _PLAIN:
        if (value := _count(found.get(name))) is not None:
            yield name, value
    for path, name in _NESTED:
        inner: Any = found
        for key in path:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if (count := _count(inner)) is not None:
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
    cost = _dollars(found.get("cost"))
    if cost is None:
        return before
    details = found.get("cost_details")
    if found.get("is_byok") is True and isinstance(details, dict):
        # With a key of one's own `cost` is OpenRouter's fee alone.
        cost += _dollars(details.get("upstream_inference_cost")) or 0.0
    return max(cost, before or 0.0)


def _dollars(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 1e9 else None


def _gemini_output(counters: Mapping[str, int], input_tokens: int | None) -> int | None:
    candidates, thoughts = counters.get("candidatesTokenCount"), counters.get("thoughtsTokenCount")
    if candidates is None and thoughts is None:
        # A blocked prompt and an empty answer leave both out.
        total = counters.get("totalTokenCount")
        return None if total is None or input_tokens is None else max(0, total - input_tokens)
    return (candidates or 0) + (thoughts or 0)
