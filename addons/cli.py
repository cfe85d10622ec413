"""The kimi-proxy command: start, stop and question the proxy, and run a program through it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click

# Whatever is slow to import is imported by the command that needs it.
from kimi_core import process
from kimi_core.commands.clients import env_, init, trust
from kimi_core.commands.common import (
    END_WITHIN_S,
    PORTS,
    Command,
    Entry,
    chosen_settings,
    confdir_of,
    rules_path,
    store_path,
    where,
)
from kimi_core.commands.run import run
from kimi_core.commands.status import status
from kimi_core.commands.stored import export, mask
from kimi_core.process import ProcessError, Settings

CHAIN = Path(__file__).with_name("all.py")
_OPTIONS = {"proxy": "--port", "mitmweb": "--web-port", "stats": "--stats-port"}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kimi-proxy")
@click.pass_context
def main(context: click.Context) -> None:
    """See, explain and trim every token between your tools and LLM providers."""
    context.obj = Entry(Path(__file__), _make_ca)


# --- start, stop, restart -------------------------------------------------------------


@click.command()
@where
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
    settings, _ = chosen_settings(given)
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
    ca = confdir_of(settings) / "mitmproxy-ca-cert.pem"
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


@click.command()
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


@click.command()
@where
@_TIMEOUT
def restart(timeout: float, **given: Any) -> None:
    """Stop the proxy and start it again as it was, with the options that are given here changed."""
    found = process.running()
    # First of all, so that a mistake in rules.yaml does not leave nothing running.
    settings, _ = chosen_settings(given, found.settings if found else None)
    if found is not None:
        _stop(found, timeout)
    _start(settings)


# --- the process itself ---------------------------------------------------------------


@click.command(hidden=True)
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


@click.command()
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


@click.command()
@where
def doctor(**given: Any) -> None:
    """Check the installation and say what to do; the exit code is 1 when something is broken."""
    from kimi_core import env
    from kimi_core.doctor import Subject, examine

    found = process.running()
    path = rules_path(given["rules"] or (Path(found.settings.rules) if found else None))
    try:
        settings = found.settings if found else chosen_settings(given)[0]
    except (click.ClickException, env.DotenvError):
        settings = replace(Settings(), **{k: given[k] for k in ("host", *PORTS) if given[k]})
    confdir = given["confdir"] or confdir_of(settings)
    store = given["store"] or store_path(settings)
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


@click.command()
def schema() -> None:
    """Print the JSON Schema of rules.yaml."""
    import json

    from kimi_core.rules import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


# --- what the commands of the core are given ------------------------------------------


def _make_ca(confdir: Path) -> None:
    from kimi_core.child_env import CA_CERT

    if (confdir / CA_CERT).exists():
        return
    from mitmproxy.certs import CertStore
    from mitmproxy.options import CONF_BASENAME, KEY_SIZE

    CertStore.from_store(confdir, CONF_BASENAME, KEY_SIZE)


# In the order of `kimi-proxy --help` and of the documentation.
for _command in (
    start,
    stop,
    restart,
    serve,
    status,
    logs,
    doctor,
    export,
    mask,
    schema,
    env_,
    trust,
    init,
    run,
):
    main.add_command(_command)


if __name__ == "__main__":
    main()
