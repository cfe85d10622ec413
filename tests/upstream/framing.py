"""How a rendered reply is cut, compressed, slowed down and broken off."""

import asyncio
import gzip
import itertools
import zlib
from collections.abc import Iterator, Sequence

from .render import Rendered
from .reply import Framing, Received
from .wire import ClientGone, Wire

_POLL_S = 0.005


def cut(parts: Sequence[bytes], how: object) -> list[bytes]:
    """Return the same bytes, cut as `Framing.pieces` says."""
    if how == "event":
        return list(parts)
    whole = b"".join(parts)
    if how == "whole":
        return [whole]
    if isinstance(how, int):
        return [whole[i : i + how] for i in range(0, len(whole), how)]
    assert isinstance(how, tuple)
    points = [0, *sorted(p for p in how if 0 < p < len(whole)), len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(points)]


def _flushed(pieces: Sequence[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(wbits=31)
    for piece in pieces[:-1]:
        yield packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH)
    for piece in pieces[-1:]:
        yield packer.compress(piece) + packer.flush()


async def send(received: Received, rendered: Rendered, framing: Framing, wire: Wire) -> None:
    """Send a reply as `framing` says. Raises ClientGone when the client leaves before its end."""
    headers = list(rendered.headers)
    pieces = rendered.events if rendered.events is not None else [rendered.body]
    accepts = "gzip" in (received.header("accept-encoding") or "")
    if framing.gzip and (accepts or framing.gzip_unasked):
        headers.append(("content-encoding", "gzip"))
        if framing.gzip == "whole":
            pieces = cut([gzip.compress(b"".join(pieces), mtime=0)], framing.pieces)
        else:
            pieces = list(_flushed(cut(pieces, framing.pieces)))
    else:
        pieces = cut(pieces, framing.pieces)

    sized = rendered.events is None and framing.length == "auto"
    length = sum(map(len, pieces)) if sized else None
    if rendered.status in (204, 304):
        pieces, length = [], 0
    abort = framing.abort
    if framing.first_delay_s:
        await _pause(framing.first_delay_s, wire)
    if framing.hang and framing.hang_after is None:
        await _wait(framing, wire)
    if abort and abort.after is None:
        await wire.abort(abort.how)
        return
    chunked = length is None and framing.length != "close"
    close = framing.connection_close or framing.length == "close"
    await wire.start(rendered.status, headers, length, chunked=chunked, close=close)
    sent = 0
    for i, piece in enumerate(pieces):
        if i and framing.delay_s:
            await _pause(framing.delay_s, wire)
        if framing.hang and framing.hang_after == i:
            await _wait(framing, wire)
        if abort and abort.after is not None and sent + len(piece) >= abort.after:
            await wire.send(piece[: abort.after - sent])
            await wire.abort(abort.how)
            return
        await wire.send(piece)
        sent += len(piece)
    if framing.hang and framing.hang_after is not None and framing.hang_after >= len(pieces):
        await _wait(framing, wire)
    await wire.end()


async def _pause(seconds: float, wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while (left := end - loop.time()) > 0:
        await asyncio.sleep(min(left, 0.02))
        if wire.gone():
            raise ClientGone("the client left during a pause")


async def _wait(framing: Framing, wire: Wire) -> None:
    # A threading.Event is what a test in another thread can set; polling it costs no thread.
    assert framing.hang is not None
    while not framing.hang.is_set():
        await _pause(_POLL_S, wire)
