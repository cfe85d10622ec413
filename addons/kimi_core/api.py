"""What an addon answers over HTTP, said without a web server: the stats page's server mounts it.

An addon has a method `endpoints` that returns these; Stats finds it on each member of the suite.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class ApiError(Exception):
    """The question cannot be answered; `more` are further members of the JSON answer."""

    def __init__(self, status: int, error: str, **more: object) -> None:
        super().__init__(error)
        self.status, self.error, self.more = status, error, more


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to an endpoint."""

    path: tuple[str, ...] = ()
    """What the groups of the endpoint's pattern matched, percent-decoded."""
    query: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    """The JSON object that came with a POST; empty when none did."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path of the API: `answer` returns what is sent as JSON, or raises ApiError.

    It runs on the event loop; what reads the store is awaited in a thread.
    """

    method: Literal["GET", "POST"]
    pattern: str
    """A regular expression of the whole path, below /api/."""
    answer: Callable[[Asked], Any | Awaitable[Any]]
    summary: str
    """A sentence for the interactive documentation."""
