"""The fake provider itself: a thread with real sockets, and the script it answers by."""

import asyncio
import contextlib
import functools
import ssl
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

from . import ca, framing, wire
from .names import environment
from .render import render, unauthorised
from .reply import Received, Reply
from .routes import PROVIDER_HOSTS

Answering = Reply | Callable[[Received], Reply]


@dataclass(frozen=True)
class Match:
    """Which requests a script answers; shell patterns, None matches all."""

    host: str | None = None
    path: str | None = None
    model: str | None = None

    def __call__(self, received: Received) -> bool:
        given = (
            (self.host, received.host),
            (self.path, received.path),
            (self.model, received.model),
        )
        return all(
            pattern is None or (value is not None and fnmatchcase(value, pattern))
            for pattern, value in given
        )


@dataclass
class _Script:
    matches: Callable[[Received], bool]
    replies: deque[Answering]
    forever: bool


class Upstream:
    """A provider of every dialect on loopback, started by `with` and gone after it.

        with Upstream() as up:
            up.script("api.mistral.ai", Reply(status=429), Reply(text="now it works"))
            OpenAI(base_url=f"http://127.0.0.1:{up.http_port}/v1", api_key="any")
            ... up.requests[-1].json()

    `hosts` are the names its certificate is good for, `keep` how many requests it remembers
    (0: none), `alpn` what TLS offers. `keys` maps host -> the only key it takes; `echo_key` makes
    the 401 repeat the key that came, as some providers do.
    An exception in a scripted callable is answered with 500 and raised when the `with` ends.
    """

    def __init__(
        self,
        *,
        hosts: Iterable[str] = (*PROVIDER_HOSTS, "localhost", "127.0.0.1"),
        alpn: Sequence[str] = ("h2", "http/1.1"),
        tls: bool = True,
        keep: int = 10_000,
        address: str = "127.0.0.1",
        http_port: int = 0,
        https_port: int = 0,
        folder: Path | None = None,
        default: Answering | None = None,
    ) -> None:
        self.default: Answering = default or Reply()
        self.keys: dict[str, str] = {}
        self.echo_key = False
        self.http_port = http_port
        self.https_port = https_port
        self.hosts = tuple(hosts)
        self._alpn, self._tls, self._address = tuple(alpn), tls, address
        self._changed = threading.Condition()
        self._scripts: list[_Script] = []
        self._requests: deque[Received] = deque(maxlen=keep)
        self._abandoned: deque[Received] = deque(maxlen=keep)
        self._count = 0
        self._failures: list[Exception] = []
        self._sni: WeakKeyDictionary[ssl.SSLObject, str] = WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._folder = folder
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None
        self.ca_file: Path = Path()

    # What a test says

    def script(
        self,
        matcher: str | Match | Callable[[Received], bool],
        *replies: Answering,
        forever: bool = False,
    ) -> None:
        """Answer the next matching requests with `replies`, one each.

        `matcher`: a path pattern if it starts with `/`, else a host pattern. Scripts are asked in
        the order they were made; a used-up one is passed over, or with `forever` repeats its last
        reply.
        """
        if isinstance(matcher, str):
            is_path = matcher.startswith(("/", "*/"))
            matcher = Match(path=matcher) if is_path else Match(host=matcher)
        with self._changed:
            self._scripts.append(_Script(matcher, deque(replies), forever))

    def clear(self) -> None:
        """Forget scripts, keys, requests and failures; the default reply stays."""
        with self._changed:
            self._scripts.clear()
            self._requests.clear()
            self._abandoned.clear()
            self._failures.clear()
            self._count = 0
        self.keys.clear()
        self.echo_key = False

    # What a test asks

    @property
    def requests(self) -> list[Received]:
        """The requests so far, in the order in which they were complete."""
        with self._changed:
            return list(self._requests)

    @property
    def abandoned(self) -> list[Received]:
        """The requests whose client left before the reply was complete."""
        with self._changed:
            return list(self._abandoned)

    @property
    def count(self) -> int:
        """How many requests came, remembered or not."""
        with self._changed:
            return self._count

    def wait_for(
        self, condition: Callable[["Upstream"], bool], timeout_s: float = 5.0
    ) -> list[Received]:
        """Return the requests as soon as `condition(self)` holds. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout_s):
                raise TimeoutError(f"{self._count} requests after {timeout_s} s")
            return list(self._requests)

    @property
    def http_url(self) -> str:
        return f"http://{self._address}:{self.http_port}"

    @property
    def https_url(self) -> str:
        return f"https://localhost:{self.https_port}"

    def environment(self, *more_hosts: str) -> dict[str, str]:
        """Return variables with which a Python child process finds us by the providers' names."""
        return environment((*self.hosts, *more_hosts), self.http_port, self.https_port)

    # Life

    def __enter__(self) -> Self:
        started = threading.Event()
        errors: list[BaseException] = []

        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            try:
                async with self.serving():
                    started.set()
                    await self._stop.wait()
            except OSError as e:
                errors.append(e)
            finally:
                started.set()

        self._thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
        self._thread.start()
        started.wait()
        if errors:
            self._thread.join()
            raise errors[0]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._loop
        assert self._thread
        assert self._stop
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._failures and error is None:
            raise self._failures[0]

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve within the running event loop, as the command line does. Raises OSError."""
        with contextlib.ExitStack() as stack:
            listen = functools.partial(
                asyncio.start_server, host=self._address, limit=1 << 20, backlog=512
            )
            servers = [await listen(self._on_http, port=self.http_port)]
            self.http_port = servers[0].sockets[0].getsockname()[1]
            if self._tls:
                folder = self._folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
                self.ca_file, leaf_file = ca.issue(folder, self.hosts)
                context = ca.server_context(leaf_file, self._alpn)
                context.sni_callback = self._on_sni
                servers.append(await listen(self._on_https, port=self.https_port, ssl=context))
                self.https_port = servers[1].sockets[0].getsockname()[1]
            try:
                yield
            finally:
                for server in servers:
                    server.close()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_sni(
        self, tls: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext
    ) -> None:
        if name and isinstance(tls, ssl.SSLObject):
            self._sni[tls] = name

    def _on_http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._accept(wire.Connection(reader, writer, "http", None))

    def _on_https(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sni = self._sni.get(writer.get_extra_info("ssl_object"))
        self._accept(wire.Connection(reader, writer, "https", sni))

    def _accept(self, connection: wire.Connection) -> None:
        task = asyncio.create_task(wire.serve(connection, self._handle))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # One request

    async def _handle(self, received: Received, out: wire.Wire) -> None:
        with self._changed:
            number = self._count
            self._count += 1
            self._requests.append(received)
            answering = self._next(received)
            self._changed.notify_all()
        try:
            reply = answering if isinstance(answering, Reply) else answering(received)
            wanted = self.keys.get(received.host)
            if wanted is not None and received.key != wanted:
                repeated = f": {received.key}" if self.echo_key else ""
                rendered = unauthorised(received, number, f"Incorrect API key provided{repeated}")
            else:
                rendered = render(received, reply, number)
        except Exception as e:  # noqa: BLE001 - a test's own bug, shown to client and test
            self._failures.append(e)
            reply = Reply(status=500, error=f"The script failed: {e!r}")
            rendered = render(received, reply, number)
        try:
            await framing.send(received, rendered, reply.framing, out)
        except (OSError, asyncio.CancelledError):
            if not out.gone():
                raise  # we are being stopped
            with self._changed:
                self._abandoned.append(received)
                self._changed.notify_all()
            raise

    def _next(self, received: Received) -> Answering:
        for script in self._scripts:
            if script.replies and script.matches(received):
                last = script.forever and len(script.replies) == 1
                return script.replies[0] if last else script.replies.popleft()
        return self.default
