"""A reply on its way back: through the stages, piece by piece or whole."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import brotli
import zstandard

from kimi_core.exchange import Exchange
from kimi_core.sse import SSE, Event, Framing, JSONArray
from kimi_core.stages import Stage

logger = logging.getLogger(__name__)

MAX_KEPT_BYTES = 16 * 1024 * 1024
"""A streamed reply longer than this is not kept for mitmweb and saved flows."""


class Pipe:
    """Cuts a streamed reply into events and sends them through stages.

    Called with each piece as it comes and with b"" at the end, it yields what the client
    gets; what it yields must be taken to the end. Where every stage only reads, that is each
    piece as it came, before anyone has looked at it.
    """

    def __init__(
        self,
        id: str,
        of: Exchange,
        framing: Framing,
        stages: Sequence[Stage],
        encoding: str = "",
    ) -> None:
        self._id = id
        self._exchange = of
        self._framing = framing
        self._stages = list(stages)
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self.sent_bytes = 0
        self._ended = False
        self._broken = False
        self._over = False
        self._decode = decoder(encoding)
        self._broken = of.unread = self._decode is None
        self._is_new = encoding.strip().lower() in ("", "identity")  # and can be read as it came
        self.edits = not self._broken and any(not stage.reads_only for stage in stages)
        """What leaves is not what came: its length is not known, and no coding is left on it."""

    def __call__(self, data: bytes) -> Iterator[bytes]:
        # mitmproxy sends each piece before it asks for the next, so what only reads comes after.
        if not data:
            yield from self._keep(self._last())
            return
        if self._exchange.first_chunk is None:
            self._exchange.first_chunk = time.perf_counter()
        if not self.edits or self._broken:
            try:
                yield from self._keep([] if self._over else [data])
            finally:
                self._through(self._events(data) or [])
            return
        is_first, self._is_new = self._is_new, False
        if is_first and self._let_pass(data):
            yield from self._keep([data])
            rest = b"".join(self._through(self._events(data) or []))
            yield from self._keep([rest.removeprefix(data)])  # a stage that failed says so
            return
        events = self._events(data)
        if events is None:
            # The header that says how to decode it is gone by now.
            yield from self._keep(self._finish("the provider's stream"))
            return
        first = next((n for n, stage in enumerate(self._stages) if not stage.reads_only), 0)
        reading, editing = self._stages[:first], self._stages[first:]
        try:
            yield from self._keep(self._through(events, editing))
        finally:
            self._through(events, reading)

    def _let_pass(self, first: bytes) -> bool:
        """Tell whether each stage sees at a glance that it will not touch a reply's first events.

        What most replies begin with says nothing, and need not wait to be read.
        """
        # Of half an event the rest would come out with the first half again.
        if not first.endswith(b"\n\n") or b"\r" in first or not isinstance(self._framing, SSE):
            return False
        editing = (stage for stage in self._stages if not stage.reads_only)
        looks = [getattr(stage, "lets_pass", None) for stage in editing]
        return all(look is not None and look(first) for look in looks)

    def _events(self, data: bytes) -> list[Event] | None:
        """Return the events that have come to their end; None when the stream cannot be read."""
        if self._broken or self._decode is None:
            return None
        try:
            return self._framing.feed(self._decode(data))
        except Exception as error:
            logger.warning(
                "%s: the stream cannot be read: %s; %s",
                self._id,
                type(error).__name__,
                "it ends here" if self.edits else "it passes as it is",
            )
            self._broken = self._exchange.unread = True
            return None

    @property
    def content(self) -> bytes | None:
        """Return what the client got; None when it was too long to keep."""
        return None if self._kept_bytes > MAX_KEPT_BYTES else b"".join(self._kept)

    def close(self) -> None:
        """The reply was cut: tell the stages that nothing more comes."""
        self._last()

    def _last(self) -> list[bytes]:
        if self._ended:
            return []
        self._ended = True
        if self._broken:
            return []
        out = self._through(self._framing.end())
        order = list(self._stages)
        for index, stage in enumerate(order):
            if not self._has(stage):  # it failed on what an earlier one held
                continue
            try:
                held = list(stage.end())
            except Exception as error:
                out += self._failed(stage, error)
            else:
                out += self._through(held, [s for s in order[index + 1 :] if self._has(s)])
        return out if self.edits else []

    def _has(self, stage: Stage) -> bool:
        return any(other is stage for other in self._stages)

    def _through(self, events: list[Event], stages: list[Stage] | None = None) -> list[bytes]:
        failure: list[bytes] = []
        for stage in self._stages if stages is None else stages:
            passed: list[Event] = []
            taken_out = False
            for event in events:
                if taken_out:
                    passed.append(event)
                    continue
                try:
                    passed.extend(stage.feed(event))
                except Exception as error:
                    failure += self._failed(stage, error)
                    if self._over:
                        break
                    passed += [*_held(stage), event]
                    taken_out = True
            events = passed
        if self._over and not failure:
            return []
        return [*(event.raw for event in events), *failure]

    def _failed(self, stage: Stage, error: Exception) -> list[bytes]:
        """Take a stage out; return what the client is told, if that must end the reply."""
        logger.warning(
            "%s: %s failed on the reply: %s", self._id, type(stage).__name__, type(error).__name__
        )
        self._stages = [other for other in self._stages if other is not stage]
        if stage.on_failure == "end" and not stage.reads_only:
            return self._finish(type(stage).__name__)
        return []

    def _finish(self, what: str) -> list[bytes]:
        """Say in the client's dialect that nothing more comes; what reads goes on reading."""
        if self._over:
            return []
        self._over = True
        self._stages = [stage for stage in self._stages if stage.reads_only]
        self._exchange.error_type = self._exchange.error_type or "stream_failed"
        message = f"kimi-proxy could not pass the rest of this reply on ({what} failed)."
        dialect = self._exchange.dialect
        if isinstance(self._framing, JSONArray):
            opening = b",\n" if self.sent_bytes else b"["
            return [opening + dialect.error(502, message) + b"]"]
        return [dialect.error_event(502, message)]

    def _keep(self, pieces: list[bytes]) -> list[bytes]:
        # On HTTP/1.1 an empty piece would end a chunked body: nothing is [], never b"".
        pieces = [piece for piece in pieces if piece]
        for piece in pieces:
            self.sent_bytes += len(piece)
            self._kept_bytes += len(piece)
            if self._kept_bytes <= MAX_KEPT_BYTES:
                self._kept.append(piece)
            else:
                self._kept.clear()
        return pieces


def _held(stage: Stage) -> list[Event]:
    """Return what a stage that has failed still holds, as far as it can say."""
    try:
        return list(stage.end())
    except Exception as error:
        logger.debug("%s cannot say what it held: %s", type(stage).__name__, type(error).__name__)
        return []


class StageFailed(Exception):
    """A stage failed without which the reply would be garbage; the text names it."""


def whole(id: str, stages: Sequence[Stage], body: bytes) -> bytes:
    """Return a buffered reply's body as it leaves the stages. Raises StageFailed."""
    events = [Event(body, body, "body")]
    for stage in stages:
        try:
            passed = [out for event in events for out in stage.feed(event)]
            events = [*passed, *stage.end()]
        except Exception as error:
            name = type(stage).__name__
            logger.warning("%s: %s failed on the reply: %s", id, name, type(error).__name__)
            if stage.on_failure == "end" and not stage.reads_only:
                raise StageFailed(name) from error
    return b"".join(event.raw for event in events)


def decoder(encoding: str) -> Callable[[bytes], bytes] | None:
    """Return a function that undoes a content-encoding piece by piece; None if unknown."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return bytes
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _Inflate()
    if encoding == "br":
        return brotli.Decompressor().process  # type: ignore[no-any-return]
    if encoding == "zstd":
        return zstandard.ZstdDecompressor().decompressobj().decompress
    return None


class _Inflate:
    """Undoes gzip and zlib; a gzip stream may be several, one after the other."""

    def __init__(self) -> None:
        # 32 + 15: zlib finds out by itself whether the header is gzip's or zlib's.
        self._member = zlib.decompressobj(47)

    def __call__(self, data: bytes) -> bytes:
        out = self._member.decompress(data)
        while rest := self._member.unused_data:
            self._member = zlib.decompressobj(47)
            out += self._member.decompress(rest)
        if self._member.eof:
            self._member = zlib.decompressobj(47)
        return out
