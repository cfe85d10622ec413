from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kimi_core import places, process
from kimi_core.process import Claim, ProcessError, Settings

SETTINGS = Settings(port=1234, stats_token="secret-of-stats", web_token="secret-of-web")

HOLDER = """
import sys, time
from pathlib import Path
from kimi_core.process import Claim, Settings
Claim(Path(sys.argv[1])).write(Settings(port=1234))
print("held", flush=True)
time.sleep(60)
"""


def test_a_record_counts_only_as_long_as_its_process_lives(tmp_path: Path) -> None:
    path = tmp_path / "state" / "run.json"
    assert process.running(path) is None
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        cwd=Path(process.__file__).parents[1],
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"

        found = process.running(path)
        assert found is not None
        assert (found.pid, found.settings.port) == (holder.pid, 1234)
        with pytest.raises(ProcessError, match=r"run\.json"):
            Claim(path)

        holder.kill()
        holder.wait()
    assert path.stat().st_size > 0
    assert process.running(path) is None
    Claim(path).write(SETTINGS)


def test_the_record_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("left behind")
    path.chmod(0o644)

    Claim(path).write(SETTINGS)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["pid"] == os.getpid()


def test_settings_come_back_from_json_whatever_another_version_added() -> None:
    said = {**asdict(SETTINGS), "of_a_newer_version": 1}

    assert Settings.from_json(said) == SETTINGS


def test_settings_show_no_token_where_they_are_printed() -> None:
    assert "secret" not in repr(SETTINGS)


def test_urls_lead_to_this_machine_wherever_the_proxy_listens() -> None:
    assert replace(SETTINGS, host="0.0.0.0").proxy_url == "http://127.0.0.1:1234"
    assert replace(SETTINGS, host="::").proxy_url == "http://[::1]:1234"
    assert replace(SETTINGS, host="10.0.0.5").proxy_url == "http://10.0.0.5:1234"
    assert SETTINGS.urls["stats"].endswith("?token=secret-of-stats")
    assert list(replace(SETTINGS, web_port=0, stats_port=0).urls) == ["proxy"]


def test_a_taken_port_is_a_problem_and_a_free_one_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        problem = process.listen_problem("127.0.0.1", port)
        assert process.accepts("127.0.0.1", port)
    assert f"port {port} is taken" in problem
    assert process.listen_problem("127.0.0.1", port) == ""
    assert not process.accepts("127.0.0.1", port)


def test_an_address_that_is_not_ours_is_told_as_it_is() -> None:
    assert "cannot listen on 192.0.2.1:80" in process.listen_problem("192.0.2.1", 80)
    assert "cannot listen on no such host:80" in process.listen_problem("no such host", 80)


STUBBORN = """
import signal, sys, time
for name in sys.argv[1:]:
    signal.signal(getattr(signal, name), lambda *_: None)
print("ready", flush=True)
while True:
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("deaf_to", "how"),
    [((), "drained"), (("SIGQUIT",), "ended"), (("SIGQUIT", "SIGTERM"), "killed")],
)
def test_a_process_is_asked_then_told_then_killed(deaf_to: tuple[str, ...], how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN, *deaf_to], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        patience = 5.0 if how == "drained" else 0.2
        after = 5.0 if how == "ended" else 0.2
        if how == "killed":
            after = 1.0

        assert process.stop(child.pid, lambda: child.poll() is not None, patience, after) == how


def test_a_long_log_is_put_aside(tmp_path: Path) -> None:
    log = tmp_path / "proxy.log"
    process.rotate(log, 10)
    log.write_text("x" * 10)
    process.rotate(log, 10)
    assert log.exists()

    log.write_text("x" * 11)
    process.rotate(log, 10)

    assert not log.exists()
    assert (tmp_path / "proxy.log.1").read_text() == "x" * 11


def test_the_last_lines_come_with_the_place_where_they_end(tmp_path: Path) -> None:
    log = tmp_path / "proxy.log"
    log.write_bytes(b"one\ntwo\nthr\xffee")

    assert process.last_lines(log, 2) == (["two\n", "thr\ufffdee"], 14)
    assert process.last_lines(log, 9, begin=4)[0][0] == "two\n"
    assert process.last_lines(tmp_path / "none", 2) == ([], 0)


def test_following_a_log_goes_on_in_a_new_file_and_in_an_emptied_one(tmp_path: Path) -> None:
    log = tmp_path / "proxy.log"
    log.write_bytes(b"old new")
    lines = process.follow(log, 4)
    assert next(lines) == b"new"

    log.rename(tmp_path / "proxy.log.1")
    log.write_bytes(b"another")
    assert next(lines) == b"another"

    log.write_bytes(b"short")
    assert next(lines) == b"short"


def test_a_relative_state_folder_is_no_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert places.state_dir() == Path("/somewhere/kimi-proxy")
    monkeypatch.setenv("XDG_STATE_HOME", "somewhere")
    monkeypatch.setenv("HOME", "/home/me")
    assert places.state_dir() == Path("/home/me/.local/state/kimi-proxy")


def test_signals_are_those_of_nginx() -> None:
    assert process.DRAIN == signal.SIGQUIT
