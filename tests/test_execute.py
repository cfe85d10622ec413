from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_core import execute
from kimi_core.execute import Execution, missing


@pytest.mark.parametrize(
    ("program", "code"),
    [("exit 0", 0), ("exit 3", 3), ("kill -TERM $$", 143), ("kill -KILL $$", 137)],
)
def test_the_exit_code_is_the_shells(program: str, code: int) -> None:
    with Execution() as execution:
        assert execution.run(["sh", "-c", program], os.environ) == code


def test_a_command_that_cannot_be_run_has_the_shells_codes(tmp_path: Path) -> None:
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    plain.write_text("no program")
    broken.write_bytes(b"\x7fnot an executable")
    broken.chmod(0o755)

    assert missing("no-such-program-here", os.environ) == execute.NOT_FOUND
    assert missing(str(plain), os.environ) == execute.NOT_EXECUTABLE
    assert missing(str(tmp_path), os.environ) == execute.NOT_EXECUTABLE
    assert missing("sh", os.environ) == 0
    with Execution() as execution:
        assert execution.run([str(tmp_path / "none")], os.environ) == execute.NOT_FOUND
        assert execution.run([str(broken)], os.environ) == execute.NOT_EXECUTABLE


FORWARDS = """
import os, sys
from kimi_core.execute import Execution
child = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(9));"
child += "print('ready', flush=True); signal.pause()"
with Execution() as execution:
    code = execution.run([sys.executable, "-c", child], os.environ)
sys.exit(code)
"""


def test_a_signal_that_no_terminal_sent_reaches_the_command() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORWARDS],
        cwd=Path(execute.__file__).parents[1],
        stdout=subprocess.PIPE,
        start_new_session=True,  # no terminal
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        running.send_signal(signal.SIGINT)
        assert running.wait(10) == 9


def test_a_signal_before_the_command_ends_the_block_and_gives_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended, Execution():
        os.kill(os.getpid(), signal.SIGTERM)

    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
