"""Whether the proxy runs, and what the store knows of now and of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from kimi_core import process
from kimi_core.commands.common import store_path


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("-n", "count", type=click.IntRange(0, 1000), default=5, help="Last exchanges shown.")
def status(as_json: bool, count: int) -> None:
    """Show whether the proxy runs, the active session, sums, savings and the last exchanges."""
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
    path = store_path(found.settings if found else None)
    said |= {"store": str(path), "session": None, "today": None, "total": None, "exchanges": []}
    if path.exists():
        from datetime import datetime

        from kimi_core.store import StoreError, StoreReader

        midnight = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
        reader = StoreReader(path)
        try:
            active = reader.active_session()
            said["session"] = _with_gauge(active) if active else None
            said["today"] = reader.totals(since=midnight.timestamp())
            said["total"] = reader.totals()
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
            f"{report.cost(today['cost_usd'], today['unpriced'])}"
        )
    for when, sums in (("today", said["today"]), ("in all", said["total"])):
        if sums and (line := report.savings(sums)):
            click.echo(f"Saved {when}: {line}")
    if said["exchanges"]:
        header = ("time", "provider", "model", "status", "input", "saved", "output", "cost")
        rows = [
            (
                datetime.fromtimestamp(row["started_at"]).strftime("%d %b %H:%M:%S"),
                row["gen_ai.provider.name"] or "?",
                row["gen_ai.response.model"] or row["gen_ai.request.model"] or "?",
                str(row["status"] or row["error_type"] or "?"),
                report.number(row["gen_ai.usage.input_tokens"]),
                report.number(row["saved_tokens"]),
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
