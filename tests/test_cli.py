"""The kimi-proxy command, mostly with real processes on free ports."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import cli
from kimi_core import process
from kimi_core.store import Store
from upstream import Framing, Reply, Upstream

CLI = Path(cli.__file__)
KEY = "sk-planted-in-a-test-0123456789"


@dataclass
class Home:
    """A user with a home and a state folder of its own, and rules that lead to the fake."""

    folder: Path
    provider: Upstream
    ports: dict[str, int] = field(
        default_factory=lambda: {n: process.free_port() for n in ("port", "web-port", "stats-port")}
    )

    def __post_init__(self) -> None:
        (self.folder / "rules.yaml").write_text(
            yaml.safe_dump(
                {
                    "version": 1,
                    "providers": {
                        "fake": {
                            "api": "openai",
                            "base_url": f"{self.provider.http_url}/v1",
                            "key": "${FAKE_KEY}",
                            "prices": {"priced": {"input": 1, "output": 2}},
                        }
                    },
                    "models": {
                        name: {"context": 1000, "targets": [{"provider": "fake"}]}
                        for name in ("priced", "unpriced")
                    },
                }
            )
        )
        (self.folder / ".env").write_text(f"FAKE_KEY={KEY}\n")

    @property
    def environ(self) -> dict[str, str]:
        kept = {k: os.environ[k] for k in ("PATH", "PYTHONPATH", "LANG") if k in os.environ}
        return {
            **kept,
            "HOME": str(self.folder),
            "XDG_STATE_HOME": str(self.folder / "state"),
            "KIMI_RULES": str(self.folder / "rules.yaml"),
            "SHELL": "/bin/bash",
        }

    @property
    def where(self) -> list[str]:
        """The options that keep a proxy off the ports and the CA of whoever runs the tests."""
        ports = [f"--{name}={port}" for name, port in self.ports.items()]
        return [*ports, f"--confdir={self.folder / 'certs'}"]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(CLI), *arguments]

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env={**self.environ, **environ},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def status(self) -> dict[str, Any]:
        said = self.run("status", "--json")
        assert said.returncode == 0, said.stderr
        return dict(json.loads(said.stdout))

    def ask(self, model: str = "priced", *, stream: bool = False) -> Any:
        """Return the open reply to a request by base URL."""
        body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
        url = f"http://127.0.0.1:{self.ports['port']}/v1/chat/completions"
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return opener.open(request, timeout=20)


def _until(condition: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """Return what `condition` gives as soon as it is true."""
    pause, deadline = threading.Event(), time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it has not come about"
        pause.wait(0.02)
    return found


@pytest.fixture(scope="module")
def home(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home where a proxy with mitmweb and the stats page runs."""
    found = Home(tmp_path_factory.mktemp("home"), provider)
    started = found.run("start", *found.where)
    assert started.returncode == 0, started.stderr
    try:
        for url in ("proxy", "mitmweb", "stats"):
            assert url in started.stdout
        assert f"OPENAI_BASE_URL=http://127.0.0.1:{found.ports['port']}/v1" in started.stdout
        assert f"HTTPS_PROXY=http://127.0.0.1:{found.ports['port']}" in started.stdout
        yield found
    finally:
        found.run("stop", "--timeout", "0")
    assert found.status()["running"] is False


@pytest.fixture
def idle(provider: Upstream, tmp_path: Path) -> Iterator[Home]:
    """A home where nothing runs yet; whatever a test starts there is ended."""
    found = Home(tmp_path, provider)
    yield found
    if (record := process.running(tmp_path / "state/kimi-proxy/run.json")) is not None:
        os.kill(record.pid, signal.SIGKILL)


# --- a proxy that runs ----------------------------------------------------------------


def test_an_exchange_shows_in_status_and_export_with_tokens_and_money(
    home: Home, up: Upstream
) -> None:
    with home.ask() as reply:
        assert reply.status == 200

    _until(lambda: home.status()["exchanges"])
    said = home.status()  # the session was read before the exchanges were

    assert said["running"] is True
    assert said["ports"] == {
        "proxy": home.ports["port"],
        "mitmweb": home.ports["web-port"],
        "stats": home.ports["stats-port"],
    }
    assert said["health"]["status"] == "ok"
    assert said["session"]["gauge"]["window"] == 1000
    assert said["session"]["gauge"]["color"] == "green"
    row = said["exchanges"][0]
    usage = row["gen_ai.usage.input_tokens"], row["gen_ai.usage.output_tokens"]
    assert row["cost_usd"] == pytest.approx((usage[0] + 2 * usage[1]) / 1e6)
    assert said["today"]["input_tokens"] >= usage[0]

    table = home.run("status").stdout
    assert "priced" in table
    assert f"{usage[0]:,}" in table

    exported = home.run("export", "--format", "csv").stdout
    assert row["id"] in [each["id"] for each in csv.DictReader(io.StringIO(exported))]
    of_session = json.loads(
        home.run("export", "--format", "json", "--session", row["session_id"]).stdout
    )
    assert row["id"] in [each["id"] for each in of_session]
    target = home.folder / "out.json"
    home.run("export", "--format", "json", "--session", "none", "-o", str(target))
    assert json.loads(target.read_text()) == []


def test_a_second_start_says_that_one_runs_already(home: Home) -> None:
    again = home.run("start", *home.where)

    assert again.returncode == 0
    assert "already runs" in again.stdout
    assert home.status()["urls"]["stats"] in again.stdout


def test_the_urls_open_the_pages_and_nothing_opens_them_without_their_tokens(home: Home) -> None:
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor()
    )
    for name, url in home.status()["urls"].items():
        if name == "proxy" or "token=" not in url:
            continue
        with opener.open(url, timeout=10) as page:
            assert page.status == 200
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url.partition("?")[0], timeout=10)
        assert refused.value.code in (401, 403)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")
def test_no_token_stands_in_the_process_list_or_its_environment_or_the_log(home: Home) -> None:
    said = home.status()
    tokens = [url.partition("token=")[2] for url in said["urls"].values() if "token=" in url]
    assert tokens

    shown = Path(f"/proc/{said['pid']}/cmdline").read_bytes()
    shown += Path(f"/proc/{said['pid']}/environ").read_bytes()
    shown += Path(said["log"]).read_bytes()

    assert not [token for token in tokens if token.encode() in shown]


def test_the_files_of_a_running_proxy_are_private(home: Home) -> None:
    folder = home.folder / "state/kimi-proxy"

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}

    assert {"run.json", "proxy.log", "kimi.db"} <= modes.keys()
    assert {name: mode for name, mode in modes.items() if mode & 0o077} == {}


def test_logs_shows_the_last_lines(home: Home) -> None:
    everything = home.run("logs", "-n", "1000").stdout.splitlines()

    assert any("listening" in line for line in everything)
    assert home.run("logs", "-n", "1").stdout.splitlines() == everything[-1:]


def test_logs_follows_until_interrupted(home: Home) -> None:
    log = Path(home.status()["log"])
    with subprocess.Popen(
        home.command("logs", "-n", "0", "-f"),
        env=home.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        assert following.stdout is not None
        stop = threading.Event()

        def write() -> None:
            while not stop.wait(0.1):
                with log.open("a") as file:
                    file.write("a line from outside\n")

        writer = threading.Thread(target=write)
        writer.start()
        try:
            line = _until(lambda: following.stdout and following.stdout.readline())
        finally:
            stop.set()
            writer.join()
        assert line == "a line from outside\n"
        following.send_signal(signal.SIGINT)
        _, errors = following.communicate(timeout=10)
    assert following.returncode == 0
    assert "Traceback" not in errors


def test_doctor_finds_a_running_proxy_sound_and_shows_no_key(home: Home) -> None:
    said = home.run("doctor")

    assert said.returncode == 0, said.stdout
    assert "fail" not in said.stdout
    assert "set: FAKE_KEY" in said.stdout
    assert f"process {home.status()['pid']}" in said.stdout
    assert KEY not in said.stdout


def test_env_names_the_running_proxy_and_a_bundle_that_keeps_the_systems_cas(home: Home) -> None:
    said = json.loads(home.run("env", "--shell", "json", NO_PROXY="intranet.example").stdout)

    assert said["HTTPS_PROXY"] == f"http://127.0.0.1:{home.ports['port']}"
    assert said["NO_PROXY"] == "intranet.example,localhost,127.0.0.1,::1"
    bundle, ours = Path(said["SSL_CERT_FILE"]), Path(said["NODE_EXTRA_CA_CERTS"])
    assert ours.read_text().strip() in bundle.read_text()
    assert bundle.read_text().count("BEGIN CERTIFICATE") > 50


def test_a_shared_run_reports_what_the_running_proxy_served(home: Home, up: Upstream) -> None:
    before = len(up.requests)

    said = home.run("run", "--shared", "--base-url", "--", sys.executable, "-c", _call("priced"))

    assert said.returncode == 0, said.stderr
    assert len(up.requests) == before + 1
    assert "priced" in said.stderr


# --- run ------------------------------------------------------------------------------


def _call(*models: str, code: int = 0) -> str:
    """Return a program that asks for each model and ends with `code`."""
    return f"""
import json, os, sys, urllib.request
for model in {models!r}:
    body = {{"model": model, "messages": [{{"role": "user", "content": sys.argv[0]}}]}}
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps(body).encode(),
        {{"content-type": "application/json"}},
    )
    urllib.request.urlopen(request).read()
print(sys.stdin.read() + "done")
sys.exit({code})
"""


def test_run_starts_its_own_proxy_passes_the_exit_code_on_and_counts_by_model(
    idle: Home, up: Upstream
) -> None:
    report = idle.folder / "report.json"
    options = ["--base-url", f"--json={report}", f"--confdir={idle.folder / 'certs'}"]
    program = [sys.executable, "-c", _call("priced", "priced", "unpriced", code=7)]

    said = subprocess.run(
        idle.command("run", *options, "--", *program),
        env=idle.environ,
        input="typed ",
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert said.returncode == 7, said.stderr
    assert said.stdout == "typed done\n"
    assert [request.key for request in up.requests] == [KEY] * 3
    written = json.loads(report.read_text())
    assert (written["exit_code"], written["total"]["requests"]) == (7, 3)
    assert written["models"]["priced"]["requests"] == 2
    assert written["models"]["priced"]["cost_usd"] > 0
    assert written["models"]["unpriced"]["cost_usd"] is None
    assert written["total"]["unpriced"] == 1
    lines = {line.split()[0]: line for line in said.stderr.splitlines() if line.strip()}
    assert "?" in lines["unpriced"]
    assert "+ ?" in lines["total"]
    assert "\x1b" not in said.stderr
    assert idle.status()["running"] is False


def test_a_run_that_a_signal_ends_has_its_number_in_the_exit_code_and_leaves_no_proxy(
    idle: Home,
) -> None:
    program = "import os, time; print(os.environ['KIMI_PROXY_URL'], flush=True); time.sleep(60)"
    with subprocess.Popen(
        idle.command(
            "run",
            "--base-url",
            f"--confdir={idle.folder / 'certs'}",
            "--",
            sys.executable,
            "-c",
            program,
        ),
        env=idle.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        port = int(running.stdout.readline().rpartition(":")[2])
        assert process.accepts("127.0.0.1", port)
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=20)

    assert running.returncode == 128 + signal.SIGTERM
    assert "no model was called" in errors
    assert not process.accepts("127.0.0.1", port)


def test_the_proxy_of_a_run_that_is_killed_ends_by_itself(idle: Home) -> None:
    program = "import os, time; print(os.environ['KIMI_PROXY_URL'], flush=True); time.sleep(60)"
    with subprocess.Popen(
        idle.command(
            "run",
            "--base-url",
            f"--confdir={idle.folder / 'certs'}",
            "--",
            sys.executable,
            "-c",
            program,
        ),
        env=idle.environ,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        port = int(running.stdout.readline().rpartition(":")[2])
        running.kill()
        running.wait()
        _until(lambda: not process.accepts("127.0.0.1", port))
        os.killpg(running.pid, signal.SIGKILL)


def test_a_program_that_knows_of_no_base_url_is_seen_and_other_hosts_keep_their_certificates(
    idle: Home, up: Upstream
) -> None:
    rules, certs = idle.folder / "rules.yaml", idle.folder / "certs"
    spec = yaml.safe_load(rules.read_text())
    spec["providers"]["mistral"] = {"api": "openai", "base_url": "https://api.mistral.ai/v1"}
    rules.write_text(yaml.safe_dump(spec))
    certs.mkdir()
    trusted = json.dumps(str(up.ca_file))
    (certs / "config.yaml").write_text(f"ssl_verify_upstream_trusted_ca: {trusted}\n")
    program = """
import json, urllib.request
body = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
for host in ("api.mistral.ai", "tunnelled.example"):
    request = urllib.request.Request(
        f"https://{host}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": "Bearer mine"},
    )
    print(urllib.request.urlopen(request).status)
"""
    report = idle.folder / "report.json"
    options = [f"--confdir={certs}", f"--json={report}", "--"]

    said = idle.run(
        "run",
        *options,
        sys.executable,
        "-c",
        program,
        # As in a company with a CA of its own: the tunnelled host's certificate is signed by it.
        **{**up.environment(), "SSL_CERT_FILE": str(up.ca_file)},
    )

    assert said.stdout == "200\n200\n", said.stderr
    assert [request.host for request in up.requests] == ["api.mistral.ai", "tunnelled.example"]
    assert json.loads(report.read_text())["total"]["requests"] == 1


def test_a_program_that_is_not_there_or_cannot_be_executed_costs_no_proxy(idle: Home) -> None:
    assert idle.run("run", "--", "no-such-program-here").returncode == 127
    assert idle.run("run", "--", str(idle.folder / "rules.yaml")).returncode == 126
    assert not (idle.folder / "state").exists()


# --- beginning and end ----------------------------------------------------------------


def test_restart_and_stop_let_open_streams_end_and_a_stop_without_patience_records_the_cut(
    idle: Home, up: Upstream
) -> None:
    where = [*idle.where, "--no-web"]
    assert idle.run("start", *where).returncode == 0
    first = idle.status()
    assert list(first["urls"]) == ["proxy", "stats"]

    go_on = threading.Event()
    up.default = Reply(text="one two three four five", framing=Framing(hang=go_on, hang_after=2))
    with idle.ask(stream=True) as reply:
        begun = reply.read(10)
        restarting = subprocess.Popen(
            idle.command("restart"), env=idle.environ, stdout=subprocess.PIPE, text=True
        )
        # The draining proxy takes no new connection.
        _until(lambda: not process.accepts("127.0.0.1", idle.ports["port"]))
        assert restarting.poll() is None
        go_on.set()
        whole = begun + reply.read()
    said, _ = restarting.communicate(timeout=30)
    assert restarting.returncode == 0, said
    assert whole.rstrip().endswith(b"data: [DONE]")
    second = idle.status()
    assert second["pid"] != first["pid"]
    assert second["urls"] == first["urls"]
    assert second["exchanges"][0]["partial"] == 0

    for_ever = threading.Event()
    up.default = Reply(text="one two three four", framing=Framing(hang=for_ever, hang_after=2))
    with idle.ask(stream=True) as reply:
        reply.read(10)
        stopped = idle.run("stop", "--timeout", "0")
        assert stopped.returncode == 0, stopped.stderr
        assert "partial" in stopped.stdout
    for_ever.set()
    third = idle.status()
    assert third["running"] is False
    assert third["exchanges"][0]["partial"] == 1
    assert "does not run" in idle.run("stop").stdout


def test_ctrl_c_ends_a_proxy_in_the_foreground_without_a_traceback(idle: Home) -> None:
    where = [*idle.where, "--host", "127.0.0.1"]
    with subprocess.Popen(
        idle.command("start", "--foreground", *where),
        env=idle.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        _until(lambda: process.accepts("127.0.0.1", idle.ports["stats-port"]))
        logs = idle.run("logs")
        os.killpg(running.pid, signal.SIGINT)
        output, _ = running.communicate(timeout=10)

    assert running.returncode == 0, output
    assert "Traceback" not in output
    assert "?token=" in output
    assert logs.returncode == 1
    assert "terminal" in logs.stderr


@pytest.mark.parametrize("name", ["port", "web-port", "stats-port"])
def test_a_port_that_is_taken_is_named_with_the_program_that_has_it(idle: Home, name: str) -> None:
    with socket.create_server(("127.0.0.1", idle.ports[name])):
        said = _invoke(idle, "start", *idle.where)
        ill = _invoke(idle, "doctor", *idle.where)

    assert said.exit_code == 1
    assert f"port {idle.ports[name]} is taken by" in said.stderr
    assert f"--{name}" in said.stderr
    if Path("/proc/net/tcp").exists():
        assert f"(process {os.getpid()})" in said.stderr
    assert ill.exit_code == 1
    assert f"port {idle.ports[name]} is taken by" in ill.stdout


def test_a_proxy_that_dies_at_its_start_is_an_error_with_the_end_of_its_log(idle: Home) -> None:
    certs = idle.folder / "certs"
    certs.mkdir()
    (certs / "mitmproxy-ca.pem").write_text("this is no key\n")

    said = idle.run("start", *idle.where)

    assert said.returncode == 1
    assert "did not start" in said.stderr
    assert str(idle.folder / "state/kimi-proxy/proxy.log") in said.stderr
    assert idle.status()["running"] is False


@pytest.mark.parametrize("command", ["start", "run"])
def test_wrong_rules_are_told_before_anything_starts(idle: Home, command: str) -> None:
    (idle.folder / "rules.yaml").write_text("version: 1\nproviders: 7\n")

    said = _invoke(idle, command, *(["--", "true"] if command == "run" else idle.where))

    assert said.exit_code == 1
    assert "rules.yaml:2" in said.stderr


# --- without a process of the proxy's -------------------------------------------------


def _invoke(idle: Home, *arguments: str, **environ: str) -> Any:
    """Run a command in this process, with nothing of this process's environment."""
    nothing: Mapping[str, str | None] = dict.fromkeys(os.environ)
    return CliRunner().invoke(
        cli.main, arguments, env={**nothing, **idle.environ, **environ}, catch_exceptions=False
    )


def _resolved(idle: Home, **environ: str) -> dict[str, str]:
    shown = _invoke(idle, "env", "--base-url", "--shell", "json", **environ)
    return dict(json.loads(shown.stdout))


def test_a_port_comes_from_the_environment_then_dotenv_then_the_rules(idle: Home) -> None:
    rules = idle.folder / "rules.yaml"
    rules.write_text(rules.read_text() + "proxy_port: 7001\n")
    assert _resolved(idle)["KIMI_PROXY_URL"] == "http://127.0.0.1:7001"

    (idle.folder / ".env").write_text("PROXY_PORT=7002\nPROXY_HOST=0.0.0.0\n")
    assert _resolved(idle)["KIMI_PROXY_URL"] == "http://127.0.0.1:7002"

    said = _resolved(idle, PROXY_PORT="7003")
    assert said["KIMI_PROXY_URL"] == "http://127.0.0.1:7003"


def test_a_port_that_is_none_is_told_with_its_name(idle: Home) -> None:
    said = _invoke(idle, "start", WEB_PORT="80a")

    assert said.exit_code == 1
    assert "WEB_PORT" in said.output
    assert "80a" in said.output


def test_trust_makes_the_ca_once_and_changes_nothing_else(idle: Home) -> None:
    certs = idle.folder / "certs"

    said = _invoke(idle, "trust", "--confdir", str(certs))
    key = (certs / "mitmproxy-ca.pem").read_bytes()
    again = _invoke(idle, "trust", "--confdir", str(certs))

    assert said.exit_code == again.exit_code == 0
    assert str(certs / "mitmproxy-ca-cert.pem") in said.output
    assert (certs / "mitmproxy-ca.pem").read_bytes() == key
    assert stat.S_IMODE((certs / "mitmproxy-ca.pem").stat().st_mode) == 0o600


def test_schema_is_that_of_the_rules(idle: Home) -> None:
    said = json.loads(_invoke(idle, "schema").stdout)

    assert {"providers", "models"} <= said["properties"].keys()


def test_init_writes_a_private_dotenv_and_continues_config(idle: Home) -> None:
    (idle.folder / ".env").unlink()

    said = _invoke(idle, "init")

    dotenv = idle.folder / ".env"
    assert said.exit_code == 0, said.output
    assert dotenv.read_text() == "FAKE_KEY=\n"
    assert stat.S_IMODE(dotenv.stat().st_mode) == 0o600
    config = yaml.safe_load((idle.folder / ".continue/config.yaml").read_text())
    assert [model["model"] for model in config["models"]] == ["priced", "unpriced"]
    assert {model["apiBase"] for model in config["models"]} == {"http://127.0.0.1:8080/v1"}


def test_init_changes_no_file_that_exists_unless_forced_and_then_keeps_a_copy(idle: Home) -> None:
    folder = idle.folder / "continue"
    folder.mkdir()
    config = folder / "config.yaml"
    mine = "# mine\nname: mine\nmodels:\n  - name: other\n    provider: ollama\n    model: x\n"
    config.write_text(mine)
    keys = (idle.folder / ".env").read_text()
    environ = {"CONTINUE_GLOBAL_DIR": str(folder)}

    said = _invoke(idle, "init", **environ)
    assert config.read_text() == mine
    assert "apiBase: http://127.0.0.1:8080/v1" in said.stdout

    _invoke(idle, "init", "--force", **environ)
    merged = config.read_text()
    assert merged.startswith(mine)
    assert len(yaml.safe_load(merged)["models"]) == 3
    assert [path.read_text() for path in folder.glob("*.bak")] == [mine]

    again = _invoke(idle, "init", "--force", **environ)
    assert "already" in again.output
    assert config.read_text() == merged
    assert (idle.folder / ".env").read_text() == keys


def test_init_copies_the_rules_where_asked_and_writes_dotenv_beside_them(idle: Home) -> None:
    target = idle.folder / "own" / "rules.yaml"

    said = _invoke(idle, "init", "--copy-rules", str(target), "--no-continue")

    assert said.exit_code == 0, said.output
    assert target.read_text() == (idle.folder / "rules.yaml").read_text()
    assert (target.parent / ".env").exists()
    assert not (idle.folder / ".continue").exists()


def test_export_without_a_store_is_an_error(idle: Home) -> None:
    said = _invoke(idle, "export")

    assert said.exit_code == 1
    assert "kimi.db" in said.output


MASKS = {
    "0123456789abcdef": "no end of line\r\n\tand \x1b[31m half \ud83d pair",
    "0123456000000000": "another\n",
    "fedcba9876543210": "",
}


@pytest.fixture
def masked(idle: Home) -> Home:
    """A home whose store has masks, the later ones of session t."""
    store = Store(idle.folder / "state/kimi-proxy/kimi.db")
    for at, (hash, text) in enumerate(MASKS.items()):
        label = "open a.py" if at else "run \x1b[31mecho\n\x07"
        store.add_mask(
            "k",
            hash,
            text,
            tokens=1000 + at,
            sent_tokens=10,
            label=label,
            kinds="cut",
            session_id="t" if at else "s",
        )
    assert store.close()
    return idle


@pytest.mark.parametrize("hash", MASKS)
def test_mask_prints_the_original_byte_for_byte(masked: Home, hash: str) -> None:
    said = _invoke(masked, "mask", hash)

    assert said.exit_code == 0, said.output
    assert said.stdout_bytes == MASKS[hash].encode("utf-8", "surrogatepass")


def test_mask_takes_the_first_digits_where_one_mask_begins_so(masked: Home) -> None:
    assert _invoke(masked, "mask", "FEDCBA").exit_code == 0
    assert _invoke(masked, "mask", "01234560").stdout == MASKS["0123456000000000"]

    said = _invoke(masked, "mask", "012345")
    assert said.exit_code == 1
    assert "0123456789abcdef" in said.output
    assert "0123456000000000" in said.output


@pytest.mark.parametrize("given", ["0000000000000000", "abcdef", "01234", "012345%", "open a.py"])
def test_mask_says_what_it_did_not_find(masked: Home, given: str) -> None:
    said = _invoke(masked, "mask", given)

    assert said.exit_code == 1
    assert given in said.stderr
    assert said.stdout == ""


def test_mask_lists_the_latest_without_what_a_terminal_obeys(masked: Home) -> None:
    said = _invoke(masked, "mask", "--list")
    header, *lines = said.stdout.splitlines()

    assert said.exit_code == 0
    assert header.split() == ["hash", "age", "tokens", "sent", "what"]
    assert [line.split()[0] for line in lines] == list(reversed(MASKS))
    assert lines[0].endswith("1,002    10  cut: open a.py")
    assert lines[2].endswith("1,000    10  cut: run [31mecho")
    assert len(_invoke(masked, "mask", "--list", "-n", "2").stdout.splitlines()) == 3
    of_session = _invoke(masked, "mask", "--session", "s").stdout.splitlines()[1:]
    assert [line.split()[0] for line in of_session] == ["0123456789abcdef"]
    assert _invoke(masked, "mask", "--session", "nobody").stdout == ""


@pytest.mark.parametrize("arguments", [(), ("0123456789abcdef", "--list")])
def test_mask_wants_a_hash_or_a_list(masked: Home, arguments: tuple[str, ...]) -> None:
    said = _invoke(masked, "mask", *arguments)

    assert said.exit_code == 2
    assert "HASH" in said.stderr


def test_mask_without_a_store_is_an_error(idle: Home) -> None:
    said = _invoke(idle, "mask", "0123456789abcdef")

    assert said.exit_code == 1
    assert "kimi.db" in said.output


def test_a_mask_may_be_cut_off_by_the_program_that_reads_it(masked: Home) -> None:
    big = "line\n" * 200_000
    store = Store(masked.folder / "state/kimi-proxy/kimi.db")
    store.add_mask(
        "k", "b" * 16, big, tokens=1, sent_tokens=1, label="", kinds="cut", session_id="s"
    )
    assert store.close()
    with subprocess.Popen(
        masked.command("mask", "b" * 16),
        env=masked.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_status_shows_what_was_saved_today_and_in_all(idle: Home) -> None:
    path = idle.folder / "kimi.db"
    now = time.time()
    saving = {
        "session_id": "one",
        "status": 200,
        "gen_ai.usage.input_tokens": 100,
        "saved_tokens": 1200,
        "masked_tokens": 900,
        "compressed_tokens": 300,
        "gross_saved_usd": 0.04,
        "lost_usd": 0.02,
        "spent_usd": 0.03,
        "saved_usd": -0.01,
    }
    store = Store(path)
    store.add_exchange({"id": "a", "started_at": now, "ended_at": now} | saving)
    then = now - 3 * 86400
    store.add_exchange(
        {"id": "b", "started_at": then, "ended_at": then} | saving | {"compressed_tokens": None}
    )
    assert store.close()

    said = _invoke(idle, "status", KIMI_STORE=str(path))
    as_json = json.loads(_invoke(idle, "status", "--json", KIMI_STORE=str(path)).output)

    lines = said.output.splitlines()
    assert (
        "Saved today: 1,200 tokens not sent (900 masked, 300 compressed); "
        "$0.0400 gross, $0.0200 lost, $0.0300 spent, -$0.0100 net"
    ) in lines
    assert (
        "Saved in all: 2,400 tokens not sent (1,800 masked, 300 compressed); "
        "$0.0800 gross, $0.0400 lost, $0.0600 spent, -$0.0200 net"
    ) in lines
    header, first, *_ = lines[-3:]
    assert header.split()[4:6] == ["input", "saved"]
    assert "1,200" in first
    assert as_json["today"]["saved_usd"] == -0.01
    assert as_json["total"]["saved_tokens"] == 2400


def test_status_shows_what_a_summary_of_unknown_price_took_as_unknown(idle: Home) -> None:
    path = idle.folder / "kimi.db"
    exchange = {
        "started_at": time.time(),
        "session_id": "one",
        "status": 200,
        "attempts": 1,
        "gen_ai.usage.input_tokens": 100,
        "saved_tokens": 0,
        "masks": 0,
        "gross_saved_usd": 0.0,
        "lost_usd": 0.0,
    }
    store = Store(path)
    store.add_exchange({"id": "a", "spent_usd": 0.0, "saved_usd": 0.0} | exchange)
    store.add_exchange({"id": "b"} | exchange)
    assert store.close()

    said = _invoke(idle, "status", KIMI_STORE=str(path)).output

    assert "Saved today: 0 tokens not sent; $0.00 gross, $0.00 lost, ? spent, ? net" in said


def test_a_session_of_which_all_was_refused_is_not_the_active_one(idle: Home) -> None:
    path = idle.folder / "kimi.db"
    store = Store(path)
    for number, (session, attempts) in enumerate((("talk", 1), ("refused", 0))):
        stamp = time.time() + number
        store.add_exchange(
            {"id": session, "session_id": session, "started_at": stamp, "attempts": attempts}
        )
    assert store.close()

    said = _invoke(idle, "status", KIMI_STORE=str(path)).output

    assert "Session talk: " in said


def test_status_says_nothing_of_savings_where_there_were_none(idle: Home) -> None:
    path = idle.folder / "kimi.db"
    store = Store(path)
    store.add_exchange({"id": "a", "started_at": time.time(), "session_id": "one"})
    assert store.close()

    assert "Saved" not in _invoke(idle, "status", KIMI_STORE=str(path)).output


def test_status_without_a_proxy_says_so(idle: Home) -> None:
    said = _invoke(idle, "status")

    assert said.exit_code == 0
    assert "does not run" in said.output


def test_the_command_imports_nothing_slow(idle: Home) -> None:
    slow = "mitmproxy", "pydantic", "tiktoken", "sqlite_utils", "rich", "httpx", "cryptography"
    code = f"import sys, cli; print([m for m in {slow!r} if m in sys.modules])"

    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CLI.parent, check=True
    )

    assert said.stdout.strip() == "[]"
