"""What the rules say of masking, as it is kept with a decision."""

from __future__ import annotations

from dataclasses import dataclass

_VERSION = "1"


@dataclass(frozen=True, slots=True)
class Policy:
    """How a message is masked. Sizes are in o200k tokens."""

    threshold: int = 1000
    """A longer text is cut; 0 never cuts."""
    keep: int = 500
    """About so much stays of a text that is cut."""
    references: bool = True
    """Lines that the conversation shows already are pointed at."""

    def __str__(self) -> str:
        return f"{_VERSION} {self.threshold} {self.keep} {'r' if self.references else '-'}"

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Return the policy that `str` wrote. Raises ValueError."""
        version, threshold, keep, references = text.split(" ")
        if version != _VERSION or references not in ("r", "-"):
            raise ValueError(f"{text!r} is no policy of version {_VERSION}")
        return cls(int(threshold), int(keep), references == "r")
