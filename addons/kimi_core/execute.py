"""Running a command in the terminal as a shell does: its signals, its exit code."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType

NOT_FOUND = 127
NOT_EXECUTABLE = 126
# "If a command is not found, [...] status of 127. If a command is found but is not executable,
# the return status is 126"; "terminates on a fatal signal N [...] 128+N"
# -- https://www.gnu.org/software/bash/manual/html_node/Exit-Status.html

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Execution:
    """Takes the signals that are meant for the command from `with` to its end.

    One that comes before the command was started, or after it, raises SystemExit.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Execution:
        for number in _FORWARDED:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._child is None:
            raise SystemExit(128 + number)
        # A terminal sends Ctrl-C and Ctrl-\ to all processes of its foreground: the command has it.
        if number in (signal.SIGINT, signal.SIGQUIT) and _in_foreground():
            return
        self._child.send_signal(number)

    def run(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        """Return the exit code of the command, which gets this process's terminal."""
        try:
            self._child = subprocess.Popen(command, env=dict(environ))
        except FileNotFoundError:
            return NOT_FOUND
        except OSError:
            return NOT_EXECUTABLE
        code = self._child.wait()
        self._child = None
        return code if code >= 0 else 128 - code


def missing(command: str, environ: Mapping[str, str]) -> int:
    """Return the exit code of a command that cannot be run; 0 when it can."""
    path = environ.get("PATH")
    if shutil.which(command, path=path):
        return 0
    there = shutil.which(command, mode=os.F_OK, path=path) or os.path.isdir(command)
    return NOT_EXECUTABLE if there else NOT_FOUND


def _in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
