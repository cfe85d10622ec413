"""What leads clients to the proxy: variables, the CA, .env and Continue's configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kimi_core import process
from kimi_core.commands.common import (
    FILE,
    Command,
    Entry,
    chosen_settings,
    confdir_of,
    load_rules,
    rules_path,
)
from kimi_core.process import Settings

if TYPE_CHECKING:
    from kimi_core.rules import Rules


def client_variables(entry: Entry, settings: Settings, base_url: bool) -> dict[str, str]:
    from kimi_core import child_env

    if base_url:
        return child_env.base_url_variables(settings.proxy_url, os.environ)
    confdir = confdir_of(settings)
    try:
        entry.make_ca(confdir)
        return child_env.proxy_variables(settings.proxy_url, confdir, os.environ)
    except OSError as error:
        raise click.ClickException(f"The CA in {confdir} cannot be used: {error}") from None


BASE_URL: Callable[[Command], Command] = click.option(
    "--base-url", is_flag=True, help="Base URLs of the SDKs instead of HTTPS_PROXY and the CA."
)


@click.command("env")
@click.option(
    "--shell",
    type=click.Choice(["sh", "bash", "zsh", "fish", "powershell", "json"]),
    help="The syntax to write.  [that of $SHELL]",
)
@BASE_URL
@click.pass_obj
def env_(entry: Entry, /, shell: str | None, base_url: bool) -> None:
    """Print the variables that send a shell's programs through the proxy.

    eval "$(kimi-proxy env)"
    """
    from kimi_core import child_env

    found = process.running()
    if found is None:
        click.echo("# kimi-proxy does not run yet: kimi-proxy start", err=True)
    settings = found.settings if found else chosen_settings({})[0]
    shell = shell or child_env.guess_shell(os.environ)
    click.echo(child_env.shell_lines(client_variables(entry, settings, base_url), shell))


@click.command()
@click.option("--install", is_flag=True, help="Do the steps now, as root where that is needed.")
@click.option("--confdir", type=FILE, help="Folder of the CA.")
@click.pass_obj
def trust(entry: Entry, /, install: bool, confdir: Path | None) -> None:
    """Make the CA where it is missing, and show how this machine is made to trust it."""
    import shlex
    import subprocess

    from kimi_core import child_env
    from kimi_core import trust as how

    found = process.running()
    confdir = confdir or confdir_of(found.settings if found else Settings())
    try:
        entry.make_ca(confdir)
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


@click.command()
@click.option("--force", is_flag=True, help="Change files that exist; each is backed up first.")
@click.option("--copy-rules", type=FILE, metavar="PATH", help="Copy rules.yaml there, to edit it.")
@click.option("--no-continue", is_flag=True, help="Leave Continue alone.")
@click.option("--rules", type=FILE, help="The rules.yaml whose models Continue gets.")
def init(force: bool, copy_rules: Path | None, no_continue: bool, rules: Path | None) -> None:
    """Write .env, and the rules' models into Continue's config.yaml."""
    source = rules_path(rules)
    if copy_rules is not None:
        if copy_rules.is_dir():
            copy_rules /= "rules.yaml"
        if _write(copy_rules, source.read_text(encoding="utf-8"), force):
            click.echo(f"Use it with: kimi-proxy start --rules {copy_rules}")
    _init_dotenv(source, (copy_rules or source).parent)
    if not no_continue:
        _init_continue(load_rules(source), force)


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
