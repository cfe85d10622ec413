"""All exchanges as a file, sent while it is read."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from tornado.iostream import StreamClosedError

from kimi_core import export
from kimi_core.store import StoreError
from kimi_core.web.handler import Handler

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 1024


class Export(Handler):
    """All exchanges, or those of `?session=`, as a file that is sent while it is read."""

    async def get(self, kind: str) -> None:
        rows = await self.read(self.site.store.export, self.argument("session"))
        if kind == "csv":
            self.set_header("Content-Type", "text/csv; charset=utf-8")
            write: Callable[[Any, Any], int] = export.write_csv
        else:
            self.set_header("Content-Type", "application/json; charset=utf-8")
            write = export.write_json
        self.set_header(
            "Content-Disposition", f'attachment; filename="kimi-proxy-exchanges.{kind}"'
        )
        file = _Download(self._send, asyncio.get_running_loop())
        try:
            await asyncio.to_thread(_write, write, rows, file)
        except (StoreError, StreamClosedError) as error:
            if isinstance(error, StoreError):
                logger.warning("An export of the stats page was cut: %s", error)
            # A chunked body that ends as it should would pass for the whole file.
            self.detach().close()

    async def _send(self, data: bytes) -> None:
        self.write(data)
        await self.flush()


def _write(
    write: Callable[[Any, Any], int], rows: Iterator[dict[str, Any]], file: _Download
) -> None:
    text = io.TextIOWrapper(
        io.BufferedWriter(file, CHUNK_BYTES), "utf-8", "backslashreplace", newline=""
    )
    try:
        write(rows, text)
        text.flush()
    finally:
        file.over = True
        getattr(rows, "close", lambda: None)()


class _Download(io.RawIOBase):
    """A file, written in a thread, whose bytes the event loop sends; waits for a slow client."""

    def __init__(
        self,
        send: Callable[[bytes], Coroutine[Any, Any, None]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._send = send
        self._loop = loop
        self.over = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = bytes(data)
        # What a buffer still holds when the client has gone is flushed by its destructor.
        if not self.over:
            asyncio.run_coroutine_threadsafe(self._send(piece), self._loop).result()
        return len(piece)
