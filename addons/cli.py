"""The kimi-proxy command: start, stop and question the proxy, and run a program through it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

# Whatever is slow to import is imported by the command that needs it.
from kimi_core import places, process
from kimi_core.process import ProcessError, Settings

if TYPE_CHECKING:
    from kimi_core.rules import Rules

CHAIN = Path(__file__).with_name("all.py")
END_WITHIN_S = 5.0
"""How long SIGINT and SIGTERM leave to the exchanges that are open."""

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kimi-proxy")
def main() -> None:
    """See, explain and trim every token between your tools and LLM providers."""


# --- options that several commands share ----------------------------------------------


def _where(command: Command) -> Command:
    """Add the options that say what a proxy listens on and where it keeps its things."""
    port = click.IntRange(1, 65535)
    for option in (
        click.option("--confdir", type=_FILE, help="Folder of the CA.  [certs/ of the checkout]"),
        click.option("--store", type=_FILE, help="The SQLite file.  [env: KIMI_STORE]"),
        click.option("--rules", type=_FILE, help="The rules.yaml to use.  [env: KIMI_RULES]"),
        click.option("--no-web", is_flag=True, help="Without mitmweb."),
        click.option("--stats-port", type=port, help="Port of the stats page.  [env: STATS_PORT]"),
        click.option("--web-port", type=port, help="Port of mitmweb.  [env: WEB_PORT]"),
        click.option("--port", type=port, help="Port of the proxy.  [env: PROXY_PORT]"),
        click.option("--host", help="Address the proxy listens on.  [env: PROXY_HOST]"),
    ):
        command = option(command)
    return command


_OPTIONS = {"proxy": "--port", "mitmweb": "--web-port", "stats": "--stats-port"}
_FILE = click.Path(path_type=Path, resolve_path=True)
_PORTS = {"port": "PROXY_PORT", "web_port": "WEB_PORT", "stats_port": "STATS_PORT"}


def _rules_path(given: Path | None) -> Path:
    if given is None and (named := os.environ.get("KIMI_RULES", "").strip()):
        given = Path(named).expanduser().resolve()
    if given is not None:
        return given
    from kimi_core.rules import default_rules_path

    return default_rules_path()


def _load(path: Path) -> Rules:
    from kimi_core.rules import RulesError, load

    try:
        return load(path)
    except RulesError as error:
        raise click.ClickException(f"{path} cannot be used:\n{error}") from None


def _settings(given: Mapping[str, Any], base: Settings | None = None) -> tuple[Settings, Rules]:
    """Return what a proxy is started with: options, then `base`, environment, .env, rules.yaml."""
    from kimi_core import env

    path = given.get("rules") or (Path(base.rules) if base and base.rules else None)
    path = _rules_path(path)
    rules = _load(path)
    variables = env.read(path.parent / ".env", os.environ)
    changed: dict[str, Any] = {}
    if base is None:
        base = Settings(
            host=rules.proxy_host,
            port=rules.proxy_port,
            rules=str(path),
            store=variables.get("KIMI_STORE") or "",
        )
        for field, name in _PORTS.items():
            if field != "port" and (text := variables.get(name)) is not None:
                place = variables.place(name)
                changed[field] = _port(text, f"{place}: {name}")
    changed |= {name: given[name] for name in ("host", *_PORTS) if given.get(name) is not None}
    for name in ("rules", "store", "confdir"):
        if given.get(name):
            changed[name] = str(given[name])
    if given.get("no_web"):
        changed["web_port"] = 0
    return replace(base, **changed), rules


def _port(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise click.ClickException(f"{where} is {text!r}; write a port, 1 to 65535, or 0 for none")
    return int(text)


def _confdir(settings: Settings) -> Path:
    return Path(settings.confdir) if settings.confdir else places.confdir()


def _store(settings: Settings | None) -> Path:
    named = settings.store if settings else os.environ.get("KIMI_STORE", "").strip()
    return Path(named).expanduser() if named else places.store()


# --- start, stop, restart -------------------------------------------------------------


@main.command()
@_where
@click.option("--foreground", is_flag=True, help="Run in this terminal until Ctrl-C.")
def start(foreground: bool, **given: Any) -> None:
    """Start the proxy, mitmweb and the stats page.

    What no option says is taken from the environment, then .env, then rules.yaml.
    """
    if foreground:
        _leave_on_signals()
    if (found := process.running()) is not None:
        click.echo(f"kimi-proxy already runs, process {found.pid}.")
        _say_where(found.settings)
        return
    settings, _ = _settings(given)
    _start(settings, foreground)


def _start(settings: Settings, foreground: bool = False) -> None:
    for name, port in settings.ports.items():
        host = settings.host if name == "proxy" else "127.0.0.1"
        if problem := process.listen_problem(host, port):
            raise click.ClickException(
                f"The port of {name} cannot be used: {problem}. "
                f"Stop that, or choose another port with {_OPTIONS[name]}."
            )
    settings = _with_tokens(replace(settings, run_file=str(process.run_file())))
    if foreground:
        sys.exit(_serve(replace(settings, log="")))
    settings = replace(settings, log=str(process.log_file()))
    try:
        child = process.start(settings, process.serve_command(Path(__file__)))
    except ProcessError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"kimi-proxy runs, process {child.process.pid}; its log: {settings.log}")
    _say_where(settings)


def _with_tokens(settings: Settings) -> Settings:
    import secrets

    return replace(
        settings,
        stats_token=settings.stats_token or secrets.token_urlsafe(24),
        # mitmweb wants a password from version 12 on; 11 has none.
        web_token=(settings.web_token or secrets.token_urlsafe(24)) if _web_password() else "",
    )


def _web_password() -> bool:
    from importlib import metadata

    return int(metadata.version("mitmproxy").split(".")[0]) >= 12


def _say_where(settings: Settings) -> None:
    for name, url in settings.urls.items():
        click.echo(f"  {name:<8} {url}")
    click.echo("Try it with a base URL, or as the proxy of a program:")
    click.echo(f"  export OPENAI_BASE_URL={settings.proxy_url}/v1")
    ca = _confdir(settings) / "mitmproxy-ca-cert.pem"
    click.echo(
        f"  export HTTPS_PROXY={settings.proxy_url}"
        f'   # with the CA {ca}; all variables: eval "$(kimi-proxy env)"'
    )


_TIMEOUT: Callable[[Command], Command] = click.option(
    "--timeout",
    type=click.FloatRange(0, 3600),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long open exchanges may take to end.",
)


@main.command()
@_TIMEOUT
def stop(timeout: float) -> None:
    """Stop the proxy when the exchanges that are open have ended."""
    found = process.running()
    if found is None:
        click.echo("kimi-proxy does not run.")
        return
    _stop(found, timeout)


def _stop(found: process.Running, timeout: float) -> None:
    live = (process.health(found.settings) or {}).get("live_exchanges")
    if live:
        click.echo(f"Waiting for {live} open exchanges, {timeout:g} s at most.")

    def ended() -> bool:
        now = process.running()
        return now is None or now.pid != found.pid

    try:
        how = process.stop(found.pid, ended, timeout, kill_after_s=END_WITHIN_S * 2)
    except ProcessError as error:
        raise click.ClickException(str(error)) from None
    click.echo(
        {
            "drained": "kimi-proxy has stopped.",
            "ended": "kimi-proxy has stopped; exchanges that were open are recorded as partial.",
            "killed": "kimi-proxy did not end and was killed; what was not written yet is lost.",
        }[how]
    )


@main.command()
@_where
@_TIMEOUT
def restart(timeout: float, **given: Any) -> None:
    """Stop the proxy and start it again as it was, with the options that are given here changed."""
    found = process.running()
    # First of all, so that a mistake in rules.yaml does not leave nothing running.
    settings, _ = _settings(given, found.settings if found else None)
    if found is not None:
        _stop(found, timeout)
    _start(settings)


# --- the process itself ---------------------------------------------------------------


@main.command(hidden=True)
def serve() -> None:
    """Be the proxy, with the settings that standard input holds as a line of JSON."""
    import json

    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    settings = Settings.from_json(json.loads(line))
    if not settings.attached:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
    sys.exit(_serve(settings))


_ENDING = (signal.SIGINT, signal.SIGTERM, process.DRAIN)


def _leave_on_signals() -> None:
    """Until the proxy serves, let a signal end the process at once and without a traceback."""

    def leave(*_: object) -> NoReturn:
        # Nothing has been started yet, and an exception amid an import would be printed.
        os._exit(0)

    for number in _ENDING:
        signal.signal(number, leave)


def _serve(settings: Settings) -> int:
    """Run mitmweb or mitmdump in this process until a signal; return the exit code."""
    _leave_on_signals()
    try:
        claim = process.Claim(Path(settings.run_file))
    except ProcessError as error:
        raise click.ClickException(str(error)) from None
    claim.write(settings)
    sys.argv[0] = "kimi-proxy"  # in mitmproxy's own messages
    try:
        _run_mitmproxy(settings)
        return 0
    except KeyboardInterrupt:
        return 0
    finally:
        # A second Ctrl-C while Python ends would print a traceback.
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)


def _run_mitmproxy(settings: Settings) -> None:
    from mitmproxy.tools import cmdline
    from mitmproxy.tools import main as tools

    if settings.web_port:
        from mitmproxy.tools.web.master import WebMaster

        tools.run(_draining(WebMaster, settings), cmdline.mitmweb, _arguments(settings))
    else:
        from mitmproxy.tools.dump import DumpMaster

        tools.run(_draining(DumpMaster, settings), cmdline.mitmdump, _arguments(settings))


def _arguments(settings: Settings) -> list[str]:
    """Return mitmproxy's arguments; they are passed inside this process, so `ps` has no token."""
    arguments = ["-s", str(CHAIN), "--listen-host", settings.host]
    arguments += ["--listen-port", str(settings.port)]
    options = {
        "stats_port": str(settings.stats_port),
        "stats_token": settings.stats_token,
        "kimi_rules": settings.rules,
        "kimi_store": settings.store,
        "confdir": settings.confdir,
    }
    if settings.web_port:
        arguments += ["--web-host", "127.0.0.1", "--web-port", str(settings.web_port)]
        arguments.append("--no-web-open-browser")
        if settings.web_token:
            import argon2

            # mitmweb warns of a password in plain text. This one has 192 random bits: stretching
            # it would only slow the page down.
            hasher = argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
            options["web_password"] = hasher.hash(settings.web_token)
    else:
        options["flow_detail"] = "0"
    for name, value in options.items():
        if value:
            arguments += ["--set", f"{name}={value}"]
    return arguments


def _draining(master: type[Any], settings: Settings) -> type[Any]:
    """Return a master that lets open exchanges end before it does.

    SIGINT and SIGTERM give them END_WITHIN_S, a second one nothing; process.DRAIN all they need.
    """
    import asyncio

    class Draining(master):  # type: ignore[misc]
        _deadline: float | None = None
        _ending: asyncio.Task[None] | None = None

        def __init__(self, options: Any) -> None:
            super().__init__(options)
            if settings.ids_file:
                self.addons.add(_Ids(Path(settings.ids_file)))

        async def running(self) -> None:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(process.DRAIN, self._end, float("inf"))
            # A terminal that was closed is no reason to drop anything at once.
            loop.add_signal_handler(signal.SIGHUP, self._end, END_WITHIN_S)
            if settings.attached:
                loop.add_reader(0, self._parent_ended)
            await super().running()
            if not settings.log:
                _say_where(settings)

        def _parent_ended(self) -> None:
            asyncio.get_running_loop().remove_reader(0)
            self._end(0.0)

        def shutdown(self) -> None:
            self.event_loop.call_soon_threadsafe(self._end, END_WITHIN_S)

        def _end(self, within_s: float) -> None:
            now = asyncio.get_running_loop().time()
            # The first one begins; each one more is impatience.
            self._deadline = now + within_s if self._deadline is None else now
            if self._ending is None:
                self._ending = asyncio.create_task(self._drain())

        async def _drain(self) -> None:
            from kimi_core import flows

            try:
                self.options.update(server=False)  # no new connections
                told = False
                while live := len(flows.live_exchanges()):
                    if asyncio.get_running_loop().time() >= (self._deadline or 0):
                        break
                    if not told and not settings.log:
                        click.echo(f"Waiting for {live} open exchanges; Ctrl-C ends them now.")
                        told = True
                    await asyncio.sleep(0.05)
            finally:
                super().shutdown()

    return Draining


class _Ids:
    """Writes the id of each exchange that ends to a file, for the table of `kimi-proxy run`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="ascii", buffering=1)

    def response(self, flow: Any) -> None:
        self._note(flow)

    def error(self, flow: Any) -> None:
        self._note(flow)

    def _note(self, flow: Any) -> None:
        from kimi_core import flows

        if getattr(flow, "request", None) is not None and flows.exchange(flow) is not None:
            self._file.write(f"{flow.id}\n")

    def done(self) -> None:
        self._file.close()


# --- questions ------------------------------------------------------------------------


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("-n", "count", type=click.IntRange(0, 1000), default=5, help="Last exchanges shown.")
def status(as_json: bool, count: int) -> None:
    """Show whether the proxy runs, the active session, today's sums and the last exchanges."""
    found = process.running()
    said = _status(found, count)
    if as_json:
        import json

        click.echo(json.dumps(said, indent=2))
    else:
        _say_status(said)


def _status(found: process.Running | None, count: int) -> dict[str, Any]:
    said: dict[str, Any] = {"running": found is not None, "pid": None, "ports": {}, "urls": {}}
    if found is not None:
        said |= {
            "pid": found.pid,
            "started_at": found.started_at,
            "ports": found.settings.ports,
            "urls": found.settings.urls,
            "rules": found.settings.rules,
            "log": found.settings.log or None,
        }
    said["health"] = process.health(found.settings) if found else None
    path = _store(found.settings if found else None)
    said |= {"store": str(path), "session": None, "today": None, "exchanges": []}
    if path.exists():
        from datetime import datetime

        from kimi_core.store_read import StoreReader
        from kimi_core.store_schema import StoreError

        midnight = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
        reader = StoreReader(path)
        try:
            said["session"] = next(map(_with_gauge, reader.sessions(1)), None)
            said["today"] = reader.totals(since=midnight.timestamp())
            said["exchanges"] = reader.exchanges(count) if count else []
        except StoreError as error:
            said["store_error"] = str(error)
    return said


def _with_gauge(session: Mapping[str, Any]) -> dict[str, Any]:
    from kimi_core.report import gauge

    return {**session, "gauge": gauge(session)}


def _say_status(said: Mapping[str, Any]) -> None:
    from datetime import datetime

    from kimi_core import report

    if said["running"]:
        state = (said["health"] or {}).get("status")
        health = "" if state in (None, "ok") else click.style(f", {state}", fg="yellow")
        click.echo(click.style("runs", fg="green") + f", process {said['pid']}{health}")
        for name, url in said["urls"].items():
            click.echo(f"  {name:<8} {url}")
    else:
        click.echo(click.style("does not run", fg="yellow") + "; start it with `kimi-proxy start`")
    click.echo(f"  store    {said['store']}")
    if "store_error" in said:
        click.echo(click.style(f"  {said['store_error']}", fg="red"), err=True)
    if session := said["session"]:
        name = session["name"] or session["id"]
        click.echo(f"\nSession {name}: {_gauge_text(session)}")
    if (today := said["today"]) and not today["requests"]:
        click.echo("\nToday: no requests yet.")
    elif today:
        click.echo(
            f"Today: requests {report.number(today['requests'])}, "
            f"{report.number(today['input_tokens'])} tokens in "
            f"({report.number(today['cache_read_tokens'])} cached), "
            f"{report.number(today['output_tokens'])} out, "
            f"{report.cost(today['cost_usd'], today['unpriced'])}; "
            f"saved {report.number(today['saved_tokens'])} tokens, "
            f"{report.usd(today['saved_usd'])}"
        )
    if said["exchanges"]:
        header = ("time", "provider", "model", "status", "input", "output", "cost")
        rows = [
            (
                datetime.fromtimestamp(row["started_at"]).strftime("%d %b %H:%M:%S"),
                row["gen_ai.provider.name"] or "?",
                row["gen_ai.response.model"] or row["gen_ai.request.model"] or "?",
                str(row["status"] or row["error_type"] or "?"),
                report.number(row["gen_ai.usage.input_tokens"]),
                report.number(row["gen_ai.usage.output_tokens"]),
                report.usd(row["cost_usd"]),
            )
            for row in said["exchanges"]
        ]
        click.echo("\n" + report.plain_table(header, rows))


def _gauge_text(session: Mapping[str, Any], width: int = 20) -> str:
    gauge = session["gauge"]
    if gauge["percentage"] is None:
        tokens = gauge["tokens"]
        return "context unknown" if tokens is None else f"{tokens:,} tokens of an unknown window"
    filled = min(round(gauge["percentage"] / 100 * width), width)
    bar = click.style("█" * filled, fg=gauge["color"]) + "░" * (width - filled)
    return (
        f"{bar} {gauge['percentage']:.0f} % of the window, "
        f"{gauge['tokens']:,} of {gauge['window']:,} tokens"
    )


@main.command()
@click.option("-n", "count", type=click.IntRange(0), default=50, show_default=True, metavar="N")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is added, until Ctrl-C.")
def logs(count: int, follow: bool) -> None:
    """Show the last lines of the proxy's log."""
    found = process.running()
    if found is not None and not found.settings.log:
        raise click.ClickException(
            f"Process {found.pid} was started with --foreground: it logs to its terminal."
        )
    path = process.log_file()
    if not path.exists() and not follow:
        raise click.ClickException(f"There is no log yet at {path}.")
    lines, end = process.last_lines(path, count)
    click.echo("".join(lines), nl=False)
    if follow:
        out = sys.stdout.buffer
        try:
            for data in process.follow(path, end):
                out.write(data)
                out.flush()
        except KeyboardInterrupt:
            click.echo()


@main.command()
@_where
def doctor(**given: Any) -> None:
    """Check the installation and say what to do; the exit code is 1 when something is broken."""
    from kimi_core import env
    from kimi_core.doctor import Subject, examine

    found = process.running()
    path = _rules_path(given["rules"] or (Path(found.settings.rules) if found else None))
    try:
        settings = found.settings if found else _settings(given)[0]
    except (click.ClickException, env.DotenvError):
        settings = replace(Settings(), **{k: given[k] for k in ("host", *_PORTS) if given[k]})
    confdir = given["confdir"] or _confdir(settings)
    store = given["store"] or _store(settings)
    subject = Subject(settings, found, path, store, confdir, os.environ)
    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    failed = False
    for check in examine(subject):
        failed |= check.state == "fail"
        click.echo(click.style(f"{check.state:<5}", fg=colors[check.state]), nl=False)
        click.echo(f"{check.name}: {check.text}")
        if check.advice:
            click.echo(f"     -> {check.advice}")
    sys.exit(1 if failed else 0)


@main.command()
@click.option("--format", "kind", type=click.Choice(["csv", "json"]), default="csv")
@click.option("--session", "session", metavar="ID", help="Only the exchanges of this session.")
@click.option("-o", "--output", type=_FILE, help="A file instead of standard output.")
@click.option("--store", "path", type=_FILE, help="The SQLite file.  [env: KIMI_STORE]")
def export(kind: str, session: str | None, output: Path | None, path: Path | None) -> None:
    """Write the exchanges of the store, oldest first, one row each."""
    from kimi_core.export import write_csv, write_json
    from kimi_core.store_read import StoreReader
    from kimi_core.store_schema import StoreError

    found = process.running()
    path = path or _store(found.settings if found else None)
    if not path.exists():
        raise click.ClickException(f"There is no store at {path}.")
    write = write_csv if kind == "csv" else write_json
    try:
        rows = StoreReader(path).export(session)
        with _writing(output) as file:
            count = write(rows, file)
    except (StoreError, OSError) as error:
        raise click.ClickException(str(error)) from None
    if output is not None:
        click.echo(f"{count} exchanges written to {output}.", err=True)


@contextmanager
def _writing(path: Path | None) -> Iterator[Any]:
    import io

    if path is not None:
        with path.open("w", newline="", encoding="utf-8") as file:
            yield file
        return
    # Line ends are the format's own.
    text = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="")
    try:
        yield text
        text.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        text.detach()


@main.command()
def schema() -> None:
    """Print the JSON Schema of rules.yaml."""
    import json

    from kimi_core.rules import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


# --- clients --------------------------------------------------------------------------


def _make_ca(confdir: Path) -> None:
    from kimi_core.child_env import CA_CERT

    if (confdir / CA_CERT).exists():
        return
    from mitmproxy.certs import CertStore
    from mitmproxy.options import CONF_BASENAME, KEY_SIZE

    CertStore.from_store(confdir, CONF_BASENAME, KEY_SIZE)


def _variables(settings: Settings, base_url: bool) -> dict[str, str]:
    from kimi_core import child_env

    if base_url:
        return child_env.base_url_variables(settings.proxy_url, os.environ)
    confdir = _confdir(settings)
    try:
        _make_ca(confdir)
        return child_env.proxy_variables(settings.proxy_url, confdir, os.environ)
    except OSError as error:
        raise click.ClickException(f"The CA in {confdir} cannot be used: {error}") from None


_BASE_URL: Callable[[Command], Command] = click.option(
    "--base-url", is_flag=True, help="Base URLs of the SDKs instead of HTTPS_PROXY and the CA."
)


@main.command("env")
@click.option(
    "--shell",
    type=click.Choice(["sh", "bash", "zsh", "fish", "powershell", "json"]),
    help="The syntax to write.  [that of $SHELL]",
)
@_BASE_URL
def env_(shell: str | None, base_url: bool) -> None:
    """Print the variables that send a shell's programs through the proxy.

    eval "$(kimi-proxy env)"
    """
    from kimi_core import child_env

    found = process.running()
    if found is None:
        click.echo("# kimi-proxy does not run yet: kimi-proxy start", err=True)
    settings = found.settings if found else _settings({})[0]
    shell = shell or child_env.guess_shell(os.environ)
    click.echo(child_env.shell_lines(_variables(settings, base_url), shell))


@main.command()
@click.option("--install", is_flag=True, help="Do the steps now, as root where that is needed.")
@click.option("--confdir", type=_FILE, help="Folder of the CA.")
def trust(install: bool, confdir: Path | None) -> None:
    """Make the CA where it is missing, and show how this machine is made to trust it."""
    import shlex
    import subprocess

    from kimi_core import child_env
    from kimi_core import trust as how

    found = process.running()
    confdir = confdir or _confdir(found.settings if found else Settings())
    try:
        _make_ca(confdir)
    except OSError as error:
        raise click.ClickException(f"The CA cannot be made in {confdir}: {error}") from None
    certificate = confdir / child_env.CA_CERT
    click.echo(f"The CA: {certificate}")
    steps = how.steps(certificate)
    if steps is None:
        click.echo("How this system is made to trust it is not known; see its manual.")
    else:
        sudo = "sudo " if steps.as_root and not install else ""
        click.echo(f"For the whole system ({steps.system}):")
        for command in steps.commands:
            click.echo(f"  {sudo}{shlex.join(command)}")
    if not install:
        click.echo('For one shell, without any of that: eval "$(kimi-proxy env)"')
        click.echo("For one program:                    kimi-proxy run -- PROGRAM")
        click.echo("Firefox has its own list: Settings, Certificates, Authorities, Import.")
        return
    if steps is None:
        raise click.ClickException("Nothing was installed.")
    if steps.as_root and os.geteuid() != 0:
        raise click.ClickException("Only root may do that: sudo kimi-proxy trust --install")
    for command in steps.commands:
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise click.ClickException(f"{shlex.join(command)} failed: {error}") from None
    click.echo("Installed.")


@main.command()
@click.option("--force", is_flag=True, help="Change files that exist; each is backed up first.")
@click.option("--copy-rules", type=_FILE, metavar="PATH", help="Copy rules.yaml there, to edit it.")
@click.option("--no-continue", is_flag=True, help="Leave Continue alone.")
@click.option("--rules", type=_FILE, help="The rules.yaml whose models Continue gets.")
def init(force: bool, copy_rules: Path | None, no_continue: bool, rules: Path | None) -> None:
    """Write .env, and the rules' models into Continue's config.yaml."""
    source = _rules_path(rules)
    if copy_rules is not None:
        if copy_rules.is_dir():
            copy_rules /= "rules.yaml"
        if _write(copy_rules, source.read_text(encoding="utf-8"), force):
            click.echo(f"Use it with: kimi-proxy start --rules {copy_rules}")
    _init_dotenv(source, (copy_rules or source).parent)
    if not no_continue:
        _init_continue(_load(source), force)


def _init_dotenv(rules: Path, folder: Path) -> None:
    """Write .env from the example beside rules.yaml; one that exists holds keys and is left."""
    from kimi_core import env

    target = folder / ".env"
    if target.exists():
        click.echo(f"{target} is there already; it is left as it is.")
        return
    example = rules.parent / ".env.example"
    if example.is_file():
        text = example.read_text(encoding="utf-8")
    else:
        names = env.references(rules.read_text(encoding="utf-8"))
        text = "".join(f"{name}=\n" for name in names if name.isupper() and name != "NAME")
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise click.ClickException(
            f"{target} cannot be written ({error.strerror}); "
            "choose a folder of your own with --copy-rules PATH"
        ) from None
    click.echo(f"{target} is written: fill in the keys that you have.")


def _init_continue(rules: Rules, force: bool) -> None:
    from kimi_core import continue_config

    found = process.running()
    host = process.bracketed(process.client_host(rules.proxy_host))
    url = found.settings.proxy_url if found else f"http://{host}:{rules.proxy_port}"
    entries = [continue_config.entry(m.name, url, m.context) for m in rules.offered()]
    target = continue_config.path(os.environ)
    if not entries:
        click.echo("rules.yaml names no model, so Continue gets none.")
        return
    if not target.exists():
        _write(target, continue_config.document(entries), force)
        return
    text = target.read_text(encoding="utf-8")
    try:
        merged = continue_config.merged(text, entries)
    except continue_config.CannotMerge as error:
        click.echo(f"{target} is left as it is: {error}. Add this to its models:\n", err=True)
        click.echo(continue_config.dump(entries), nl=False)
        return
    if merged == text:
        click.echo(f"{target} has these models already.")
    elif force:
        _write(target, merged, force)
    else:
        click.echo(f"{target} exists. Add this to its models, or use --force:\n", err=True)
        click.echo(continue_config.dump(entries), nl=False)


def _write(path: Path, text: str, force: bool) -> bool:
    """Write the file, an existing one only with `force` and after a copy of it was made."""
    import shutil
    import time

    if path.exists():
        if not force:
            click.echo(f"{path} is there already; it is left as it is (--force replaces it).")
            return False
        backup = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.bak")
        shutil.copy2(path, backup)
        click.echo(f"The old {path.name} is kept as {backup.name}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path.resolve())
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from None
    click.echo(f"{path} is written.")
    return True


# --- run ------------------------------------------------------------------------------


@main.command(context_settings={"ignore_unknown_options": True})
@_BASE_URL
@click.option("--shared", is_flag=True, help="Use the proxy that runs, not one of its own.")
@click.option("--json", "report_file", type=_FILE, help="Write the report to this file as JSON.")
@click.option("--rules", type=_FILE, help="The rules.yaml to use.  [env: KIMI_RULES]")
@click.option("--store", type=_FILE, help="The SQLite file.  [env: KIMI_STORE]")
@click.option("--confdir", type=_FILE, help="Folder of the CA.  [certs/ of the checkout]")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    command: tuple[str, ...], base_url: bool, shared: bool, report_file: Path | None, **given: Any
) -> None:
    """Run COMMAND through the proxy and show what it cost.

    It gets a proxy of its own on free ports, with the usual rules and store, so that what is
    counted is this command's alone; with --shared, all that the running proxy served meanwhile
    is. The exit code is COMMAND's: 128 and the signal's number where one ended it, 127 where it
    was not found, 126 where it cannot be executed.
    """
    from kimi_core import execute

    if code := execute.missing(command[0], os.environ):
        why = "cannot be executed" if code == execute.NOT_EXECUTABLE else "was not found"
        click.echo(f"kimi-proxy: {command[0]} {why}", err=True)
        sys.exit(code)
    if shared:
        if any(given.values()):
            raise click.UsageError("--shared takes rules, store and CA of the running proxy.")
        found = process.running()
        if found is None:
            raise click.ClickException("No proxy runs that could be shared: kimi-proxy start")
        code = _run_shared(found.settings, command, base_url, report_file)
    else:
        code = _run_alone(_settings(given)[0], command, base_url, report_file)
    sys.exit(code)


def _run_shared(
    settings: Settings, command: tuple[str, ...], base_url: bool, report_file: Path | None
) -> int:
    import time

    from kimi_core.execute import Execution

    variables = _variables(settings, base_url)
    started_at = time.time()
    with Execution() as execution:
        code = execution.run(command, {**os.environ, **variables})
    deadline = time.monotonic() + 2
    while (process.health(settings) or {}).get("live_exchanges") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # the store commits within this time
    rows = _rows_since(_store(settings), started_at, None)
    _report(command, code, started_at, rows, report_file)
    return code


def _run_alone(
    settings: Settings, command: tuple[str, ...], base_url: bool, report_file: Path | None
) -> int:
    import tempfile
    import time

    from kimi_core.execute import Execution

    with Execution() as execution, tempfile.TemporaryDirectory(prefix="kimi-proxy-") as folder:
        settings = process.private_settings(settings, Path(folder))
        try:
            child = process.start(settings, process.serve_command(Path(__file__)))
        except ProcessError as error:
            raise click.ClickException(str(error)) from None
        started_at = time.time()
        try:
            variables = _variables(settings, base_url)
            code = execution.run(command, {**os.environ, **variables})
        finally:
            process.stop(child.process.pid, lambda: child.process.poll() is not None, END_WITHIN_S)
        ids = set(Path(settings.ids_file).read_text(encoding="ascii").split())
        rows = _rows_since(_store(settings), started_at, ids) if ids else []
    _report(command, code, started_at, rows, report_file)
    return code


def _rows_since(store: Path, started_at: float, ids: set[str] | None) -> list[dict[str, Any]]:
    """Return the exchanges that began at or after `started_at`; with `ids` only those."""
    from kimi_core.store_read import StoreReader
    from kimi_core.store_schema import StoreError

    found: list[dict[str, Any]] = []
    before: str | None = None
    try:
        while page := StoreReader(store).exchanges(500, before) if store.exists() else []:
            rows = [row for row in page if row["started_at"] >= started_at]
            found += [row for row in rows if ids is None or row["id"] in ids]
            if len(rows) < len(page):
                break
            before = page[-1]["id"]
    except StoreError as error:
        click.echo(f"kimi-proxy: {error}", err=True)
    return found


def _report(
    command: tuple[str, ...],
    code: int,
    started_at: float,
    rows: list[dict[str, Any]],
    report_file: Path | None,
) -> None:
    """Print what a run cost to standard error, and write it to `report_file`."""
    import time

    from kimi_core import report

    models, of_all = report.by_model(rows), report.total(rows)
    if report_file is not None:
        import json

        said = {
            "command": Path(command[0]).name,  # its arguments may hold secrets
            "exit_code": code,
            "started_at": started_at,
            "duration_s": round(time.time() - started_at, 3),
            "models": {name: asdict(sums) for name, sums in models.items()},
            "total": asdict(of_all),
        }
        try:
            report_file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            click.echo(f"kimi-proxy: {report_file}: {error.strerror}", err=True)
    if not rows:
        click.echo("kimi-proxy: no model was called.", err=True)
        return
    cells = report.lines(models, of_all)
    if not _rich_table(report.HEADER, cells):
        click.echo(report.plain_table(report.HEADER, cells), err=True)


def _rich_table(header: tuple[str, ...], cells: list[tuple[str, ...]]) -> bool:
    """Print the table with lines and colours; tell whether the terminal and rich allow it."""
    if not sys.stderr.isatty():
        return False
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title="kimi-proxy", show_footer=True)
    for index, (name, footer) in enumerate(zip(header, cells[-1], strict=True)):
        table.add_column(name, footer=footer, justify="right" if index else "left")
    for row in cells[:-1]:
        table.add_row(*row)
    Console(stderr=True).print(table)
    return True


if __name__ == "__main__":
    main()
