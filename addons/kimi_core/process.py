"""The proxy as a process: its settings, the record of what runs, its ports, its end.

A running proxy keeps an exclusive lock on the file that describes it, so a record without a lock
is what a killed one left behind, whoever has its process id now.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote

from kimi_core import places

MAX_LOG_BYTES = 10 * 1024 * 1024
"""A log longer than this is put aside, to proxy.log.1, when a proxy starts."""

DRAIN = signal.SIGQUIT
"""Ends the proxy as soon as no exchange is open; SIGINT and SIGTERM end it after 5 s at most.

The same signals as nginx's: "TERM, INT fast shutdown; QUIT graceful shutdown"
-- https://nginx.org/en/docs/control.html
"""

_POLL_S = 0.05


class ProcessError(Exception):
    """The proxy cannot be started or reached; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What one proxy process is started with; empty paths mean the suite's own defaults."""

    host: str = "127.0.0.1"
    port: int = 8080
    web_port: int = 8081
    """0: no mitmweb, mitmdump runs instead."""
    stats_port: int = 8082
    """0: no stats page."""
    rules: str = ""
    store: str = ""
    confdir: str = ""
    stats_token: str = ""
    web_token: str = ""
    run_file: str = ""
    """Where the process says that it runs; it is locked while it does."""
    log: str = ""
    """Empty: the terminal."""
    ids_file: str = ""
    """Where the id of each exchange is written, a line each; empty: nowhere."""
    attached: bool = False
    """It ends when its standard input does, and so with the process that started it."""

    def __repr__(self) -> str:
        return f"Settings({self.client_host}:{self.port})"

    @property
    def client_host(self) -> str:
        """Return the address by which clients on this machine reach the proxy."""
        return client_host(self.host)

    @property
    def proxy_url(self) -> str:
        return f"http://{bracketed(self.client_host)}:{self.port}"

    @property
    def urls(self) -> dict[str, str]:
        """Return the URLs by what they show; with their tokens, so that a click is enough."""
        found = {"proxy": self.proxy_url}
        if self.web_port:
            token = f"?token={quote(self.web_token)}" if self.web_token else ""
            found["mitmweb"] = f"http://127.0.0.1:{self.web_port}/{token}"
        if self.stats_port:
            found["stats"] = f"http://127.0.0.1:{self.stats_port}/?token={quote(self.stats_token)}"
        return found

    @property
    def ports(self) -> dict[str, int]:
        named = {"proxy": self.port, "mitmweb": self.web_port, "stats": self.stats_port}
        return {name: port for name, port in named.items() if port}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Return settings from `asdict`; keys of another version are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})


def client_host(host: str) -> str:
    """Return where a client of this machine finds what listens on `host`."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def run_file() -> Path:
    """Return the file that describes the running proxy of this user."""
    return places.state_dir() / "run.json"


def log_file() -> Path:
    return places.state_dir() / "proxy.log"


# --- the record of what runs ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Running:
    """A proxy that runs now."""

    pid: int
    started_at: float
    settings: Settings


class Claim:
    """The right to be the proxy that `path` describes, until this process is gone.

    It is not given back earlier: whoever sees it free must find the ports free too.
    Raises ProcessError when another process has it.
    """

    def __init__(self, path: Path) -> None:
        private_folder(path.parent)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(self._fd, 0o600)
        # Someone who asks whether a proxy runs holds the lock for a moment.
        deadline = time.monotonic() + 0.5
        while not _locked(self._fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                os.close(self._fd)
                raise ProcessError(f"another kimi-proxy holds {path}; see `kimi-proxy status`")
            time.sleep(_POLL_S / 5)

    def write(self, settings: Settings) -> None:
        """Say what runs: this process, with `settings`."""
        record = {"pid": os.getpid(), "started_at": time.time(), **asdict(settings)}
        data = json.dumps(record, indent=1).encode()
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))


def running(path: Path | None = None) -> Running | None:
    """Return the proxy that the file at `path` describes (None: this user's), if it lives."""
    try:
        fd = os.open(path or run_file(), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if _locked(fd, fcntl.LOCK_SH):
            return None
        data = json.loads(os.pread(fd, 1 << 20, 0))
        return Running(data["pid"], data["started_at"], Settings.from_json(data))
    except (ValueError, KeyError, TypeError):
        return None  # it is just being written
    finally:
        os.close(fd)


def _locked(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def private_folder(path: Path) -> None:
    """Make the folder, for its owner only where it is new."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)


# --- ports ----------------------------------------------------------------------------


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nothing listens on now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def listen_problem(host: str, port: int) -> str:
    """Return why nothing of ours can listen there, with the program that does; "" when it can."""
    with socket.socket(_family(host)) as probe:
        # As asyncio does: a port whose last connection is in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return f"cannot listen on {bracketed(host)}:{port}: {error.strerror}"
            return f"port {port} is taken by {listener(port) or 'another program'}"
    return ""


def listener(port: int) -> str:
    """Return name and process id of the program that listens on `port`; "" when not found.

    Only programs of this user are found, unless root asks.
    """
    inodes = {
        f"socket:[{row[9]}]"
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for row in _rows(table)
        if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port
    }
    if not inodes:
        return "" if Path("/proc/net/tcp").exists() else _listener_by_lsof(port)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(_target(fd) in inodes for fd in (process / "fd").iterdir()):
                name = (process / "comm").read_text().strip()
                return f"{name} (process {process.name})"
    return ""


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed since it was listed
        return ""


def _rows(table: str) -> list[list[str]]:
    try:
        return [line.split() for line in Path(table).read_text().splitlines()[1:]]
    except OSError:
        return []


def _listener_by_lsof(port: int) -> str:
    try:
        found = subprocess.run(
            ["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"],
            capture_output=True,
            text=True,
            timeout=5,
        ).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = {line[0]: line[1:] for line in reversed(found)}
    return f"{said['c']} (process {said['p']})" if {"c", "p"} <= said.keys() else ""


def accepts(host: str, port: int, timeout_s: float = 1.0) -> bool:
    """Tell whether something accepts connections there."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError:
        return False
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def get_json(
    host: str, port: int, path: str, token: str = "", timeout_s: float = 2.0
) -> tuple[int, Any]:
    """Return status and decoded JSON (None when it is none) of a GET. Raises OSError."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        data = response.read(1 << 22)
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP answer: {error!r}") from error
    finally:
        connection.close()
    try:
        return response.status, json.loads(data)
    except ValueError:
        return response.status, None


def health(settings: Settings) -> dict[str, Any] | None:
    """Return what /health says; None when there is no such page or no answer."""
    if not settings.stats_port:
        return None
    try:
        status, said = get_json("127.0.0.1", settings.stats_port, "/health", settings.stats_token)
    except OSError:
        return None
    return said if status in (200, 503) and isinstance(said, dict) else None


# --- life -----------------------------------------------------------------------------


@dataclass(slots=True)
class Child:
    """A proxy that this process started and that is ready."""

    process: subprocess.Popen[bytes]
    settings: Settings


def start(settings: Settings, command: list[str], timeout_s: float = 30.0) -> Child:
    """Start the proxy in a session of its own and return when it answers.

    `command` reads the settings from a line of its standard input: neither `ps` nor the
    environment shows the tokens. Raises ProcessError, with the log's last lines, when it does
    not come up.
    """
    log = Path(settings.log)
    private_folder(log.parent)
    rotate(log)
    with open_private(log) as out:
        begin = out.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died; its last words are in the log
        process.stdin.write(json.dumps(asdict(settings)).encode() + b"\n")
        process.stdin.flush()
        if not settings.attached:
            process.stdin.close()
    child = Child(process, settings)
    try:
        _until_ready(child, timeout_s, log, begin)
    except BaseException:
        if process.poll() is None:
            process.kill()
            process.wait()
        raise
    return child


def _until_ready(child: Child, timeout_s: float, log: Path, begin: int) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready(child.settings):
        died = child.process.poll() is not None
        if died or time.monotonic() > deadline:
            what = "The proxy did not start" if died else f"No answer after {timeout_s:g} s"
            said, _ = last_lines(log, 15, begin)
            raise ProcessError(f"{what}. The end of {log}:\n" + "".join(said).rstrip())
        time.sleep(_POLL_S)


def ready(settings: Settings) -> bool:
    """Tell whether the proxy takes connections, and whether the stats page answers."""
    if settings.stats_port and health(settings) is None:
        return False
    return accepts(settings.client_host, settings.port)


def stop(pid: int, ended: Callable[[], bool], timeout_s: float, kill_after_s: float = 10.0) -> str:
    """End a proxy and return how: "drained", "ended" (before its exchanges were), or "killed".

    It gets `timeout_s` for the exchanges that are open. The second signal ends it at once.
    """
    for how, number, patience in (
        ("drained", DRAIN, timeout_s),
        ("ended", signal.SIGTERM, kill_after_s),
        ("killed", signal.SIGKILL, kill_after_s),
    ):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience
        while not ended():
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_S)
        else:
            return how
    raise ProcessError(f"process {pid} does not end")


# --- the log --------------------------------------------------------------------------


def open_private(path: Path) -> IO[bytes]:
    """Open for appending; only its owner may read it."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)
    file = os.fdopen(fd, "ab", buffering=0)
    file.seek(0, os.SEEK_END)
    return file


def rotate(path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Put a long log aside, in place of the one before it."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > max_bytes:
            path.replace(path.with_name(path.name + ".1"))


def last_lines(path: Path, count: int, begin: int = 0) -> tuple[list[str], int]:
    """Return the last lines at and after byte `begin`, with their ends, and where they stop."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            lines = deque(file, maxlen=count)
            return [line.decode("utf-8", "replace") for line in lines], file.tell()
    except FileNotFoundError:
        return [], 0


def follow(path: Path, begin: int) -> Iterator[bytes]:
    """Yield what stands after byte `begin` and what is added to it, for ever.

    A rotated or emptied file is begun again.
    """
    file: IO[bytes] | None = None
    try:
        while True:
            if file is None:
                with contextlib.suppress(FileNotFoundError):
                    file = path.open("rb")
                    file.seek(begin)
                begin = 0
            if file is not None:
                if data := file.read(1 << 16):
                    yield data
                    continue
                if _moved(path, file):
                    file.close()
                    file = None
                    continue
            time.sleep(_POLL_S * 4)
    finally:
        if file is not None:
            file.close()


def _moved(path: Path, file: IO[bytes]) -> bool:
    mine = os.fstat(file.fileno())
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_ino, mine.st_dev) != (now.st_ino, now.st_dev) or now.st_size < file.tell()


def is_private(path: Path) -> bool:
    """Tell whether only its owner can read or write the file."""
    return not stat.S_IMODE(path.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO)


def private_settings(settings: Settings, folder: Path) -> Settings:
    """Return settings for a proxy of its own on free ports, without pages, told of in `folder`."""
    return replace(
        settings,
        host="127.0.0.1",
        port=free_port(),
        web_port=0,
        stats_port=0,
        run_file=str(folder / "run.json"),
        log=str(folder / "proxy.log"),
        ids_file=str(folder / "exchanges"),
        attached=True,
    )


def serve_command(cli: Path) -> list[str]:
    """Return the command that serves with the settings it reads from standard input."""
    return [sys.executable, str(cli), "serve"]
