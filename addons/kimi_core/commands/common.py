"""What several commands share: the options that say where a proxy is, and what they come to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kimi_core import places
from kimi_core.process import Settings

if TYPE_CHECKING:
    from kimi_core.rules import Rules

END_WITHIN_S = 5.0
"""How long SIGINT and SIGTERM leave to the exchanges that are open."""
FILE = click.Path(path_type=Path, resolve_path=True)
PORTS = {"port": "PROXY_PORT", "web_port": "WEB_PORT", "stats_port": "STATS_PORT"}

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Entry:
    """What a command is given by the file that was started; it knows mitmproxy, these do not."""

    script: Path
    make_ca: Callable[[Path], None]
    """Makes the CA in a folder where it is missing. Raises OSError."""


def where(command: Command) -> Command:
    """Add the options that say what a proxy listens on and where it keeps its things."""
    port = click.IntRange(1, 65535)
    for option in (
        click.option("--confdir", type=FILE, help="Folder of the CA.  [certs/ of the checkout]"),
        click.option("--store", type=FILE, help="The SQLite file.  [env: KIMI_STORE]"),
        click.option("--rules", type=FILE, help="The rules.yaml to use.  [env: KIMI_RULES]"),
        click.option("--no-web", is_flag=True, help="Without mitmweb."),
        click.option("--stats-port", type=port, help="Port of the stats page.  [env: STATS_PORT]"),
        click.option("--web-port", type=port, help="Port of mitmweb.  [env: WEB_PORT]"),
        click.option("--port", type=port, help="Port of the proxy.  [env: PROXY_PORT]"),
        click.option("--host", help="Address the proxy listens on.  [env: PROXY_HOST]"),
    ):
        command = option(command)
    return command


def rules_path(given: Path | None) -> Path:
    if given is None and (named := os.environ.get("KIMI_RULES", "").strip()):
        given = Path(named).expanduser().resolve()
    if given is not None:
        return given
    from kimi_core.rules import default_rules_path

    return default_rules_path()


def load_rules(path: Path) -> Rules:
    from kimi_core.rules import RulesError, load

    try:
        return load(path)
    except RulesError as error:
        raise click.ClickException(f"{path} cannot be used:\n{error}") from None


def chosen_settings(
    given: Mapping[str, Any], base: Settings | None = None
) -> tuple[Settings, Rules]:
    """Return what a proxy is started with: options, then `base`, environment, .env, rules.yaml."""
    from kimi_core import env

    path = given.get("rules") or (Path(base.rules) if base and base.rules else None)
    path = rules_path(path)
    rules = load_rules(path)
    variables = env.read(path.parent / ".env", os.environ)
    changed: dict[str, Any] = {}
    if base is None:
        base = Settings(
            host=rules.proxy_host,
            port=rules.proxy_port,
            rules=str(path),
            store=variables.get("KIMI_STORE") or "",
        )
        for field, name in PORTS.items():
            if field != "port" and (text := variables.get(name)) is not None:
                place = variables.place(name)
                changed[field] = _port(text, f"{place}: {name}")
    changed |= {name: given[name] for name in ("host", *PORTS) if given.get(name) is not None}
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


def confdir_of(settings: Settings) -> Path:
    return Path(settings.confdir) if settings.confdir else places.confdir()


def store_path(settings: Settings | None) -> Path:
    named = settings.store if settings else os.environ.get("KIMI_STORE", "").strip()
    return Path(named).expanduser() if named else places.store()
