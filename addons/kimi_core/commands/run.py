"""Run a program through the proxy and show what it cost."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from kimi_core import process
from kimi_core.commands.clients import BASE_URL, client_variables
from kimi_core.commands.common import END_WITHIN_S, FILE, Entry, chosen_settings, store_path
from kimi_core.process import ProcessError, Settings


@click.command(context_settings={"ignore_unknown_options": True})
@BASE_URL
@click.option("--shared", is_flag=True, help="Use the proxy that runs, not one of its own.")
@click.option("--json", "report_file", type=FILE, help="Write the report to this file as JSON.")
@click.option("--rules", type=FILE, help="The rules.yaml to use.  [env: KIMI_RULES]")
@click.option("--store", type=FILE, help="The SQLite file.  [env: KIMI_STORE]")
@click.option("--confdir", type=FILE, help="Folder of the CA.  [certs/ of the checkout]")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def run(
    entry: Entry,
    /,
    command: tuple[str, ...],
    base_url: bool,
    shared: bool,
    report_file: Path | None,
    **given: Any,
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
        code = _run_shared(entry, found.settings, command, base_url, report_file)
    else:
        code = _run_alone(entry, chosen_settings(given)[0], command, base_url, report_file)
    sys.exit(code)


def _run_shared(
    entry: Entry,
    settings: Settings,
    command: tuple[str, ...],
    base_url: bool,
    report_file: Path | None,
) -> int:
    import time

    from kimi_core.execute import Execution

    variables = client_variables(entry, settings, base_url)
    started_at = time.time()
    with Execution() as execution:
        code = execution.run(command, {**os.environ, **variables})
    deadline = time.monotonic() + 2
    while (process.health(settings) or {}).get("live_exchanges") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # the store commits within this time
    rows = _rows_since(store_path(settings), started_at, None)
    _report(command, code, started_at, rows, report_file)
    return code


def _run_alone(
    entry: Entry,
    settings: Settings,
    command: tuple[str, ...],
    base_url: bool,
    report_file: Path | None,
) -> int:
    import tempfile
    import time

    from kimi_core.execute import Execution

    with Execution() as execution, tempfile.TemporaryDirectory(prefix="kimi-proxy-") as folder:
        settings = process.private_settings(settings, Path(folder))
        try:
            child = process.start(settings, process.serve_command(entry.script))
        except ProcessError as error:
            raise click.ClickException(str(error)) from None
        started_at = time.time()
        try:
            variables = client_variables(entry, settings, base_url)
            code = execution.run(command, {**os.environ, **variables})
        finally:
            process.stop(child.process.pid, lambda: child.process.poll() is not None, END_WITHIN_S)
        ids = set(Path(settings.ids_file).read_text(encoding="ascii").split())
        rows = _rows_since(store_path(settings), started_at, ids) if ids else []
    _report(command, code, started_at, rows, report_file)
    return code


def _rows_since(store: Path, started_at: float, ids: set[str] | None) -> list[dict[str, Any]]:
    """Return the exchanges that began at or after `started_at`; with `ids` only those."""
    from kimi_core.store import StoreError, StoreReader

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
