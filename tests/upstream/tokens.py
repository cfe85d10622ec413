"""How the fake provider counts, so that a test can say beforehand what `usage` will hold."""

from dataclasses import dataclass

_WORDS = (
    "the token stream carries every answer piece by piece while a reader counts what "
    "it costs and keeps the rest for later use "
)


@dataclass(frozen=True)
class TokenUsage:
    """What a reply says it cost, in OpenAI's terms.

    `input` includes `cached` and `cache_write`; `output` includes `reasoning`. Each dialect
    writes these numbers its own way (Anthropic's kinds of input are disjoint, Gemini's
    candidates and thoughts too).
    """

    input: int
    output: int
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0

    @property
    def total(self) -> int:
        return self.input + self.output


def input_tokens(body: bytes) -> int:
    """Return what the fake provider bills for a request body: a token per 4 bytes, rounded up."""
    return -(-len(body) // 4)


def output_tokens(text: str) -> int:
    """Return what the fake provider bills for a generated text: a token per 4 characters."""
    return -(-len(text) // 4)


def filler(size: int) -> str:
    """Return the same `size` characters of prose each time."""
    return (_WORDS * (size // len(_WORDS) + 1))[:size]


def split(text: str, size: int) -> list[str]:
    """Return `text` in deltas of `size` characters; no delta for no text."""
    return [text[i : i + size] for i in range(0, len(text), size)]
