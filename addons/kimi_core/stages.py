"""Stages: what a reply passes through on its way to the client, streamed or whole."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum
from typing import Literal, Protocol

from kimi_core.dialects import ReplyReader
from kimi_core.document import NotJSON, decode
from kimi_core.sse import Event


class StageRank(IntEnum):
    """The order in which stages see a reply on its way to the client."""

    READ = 0
    MEND = 10
    ENFORCE = 20
    TRANSLATE = 30
    HIDE = 40


class Stage(Protocol):
    """What a reply's events pass through.

    One that edits may have a method `lets_pass(first: bytes) -> bool`: it tells at a glance that
    events with which a reply begins will leave as they are, so that they need not wait.
    """

    rank: int
    reads_only: bool
    """It changes nothing, so the client's bytes need not wait for it."""
    on_failure: Literal["pass", "end"]
    """`pass`: the stage is taken out. `end`: what follows would be garbage without it."""

    def feed(self, event: Event) -> Iterable[Event]:
        """Return the events that take the place of `event`; [] holds it back."""
        ...

    def end(self) -> Iterable[Event]:
        """Return what was held back: when the reply is over, or when `feed` has raised.

        In the second case the event on which it raised follows, so it is not to be in it.
        """
        ...


class ReadReply:
    """Reads a reply as it passes: text, calls, usage, finish reason."""

    rank: int = StageRank.READ
    reads_only = True
    on_failure: Literal["pass", "end"] = "pass"

    def __init__(self, reader: ReplyReader) -> None:
        self.reader = reader
        self.failed = False
        """What it has read is not the whole reply, and none of its numbers is the last."""

    def feed(self, event: Event) -> Iterable[Event]:
        if event.data:
            self.failed = True
            self.reader.feed(event.data)
            self.failed = False
        return (event,)

    def end(self) -> Iterable[Event]:
        return ()


_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


class HideUsage:
    """Takes out the chunk that carries usage alone, which only we asked for."""

    rank: int = StageRank.HIDE
    reads_only = False
    on_failure: Literal["pass", "end"] = "pass"

    def feed(self, event: Event) -> Iterable[Event]:
        if event.type == "body" or b'"usage"' not in event.data:
            return (event,)
        try:
            payload = decode(event.data)
        except NotJSON:
            return (event,)
        if isinstance(payload, dict) and payload.get("choices") == [] and payload.get("usage"):
            return ()
        return (event,)

    def lets_pass(self, first: bytes) -> bool:
        return _NO_CHOICES.search(first) is None

    def end(self) -> Iterable[Event]:
        return ()
