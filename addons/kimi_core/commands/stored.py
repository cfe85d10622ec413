"""What the store holds, written out: exchanges as a file, and the originals of masks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kimi_core import process
from kimi_core.commands.common import FILE, store_path

if TYPE_CHECKING:
    from kimi_core.store import StoreReader


@click.command()
@click.option("--format", "kind", type=click.Choice(["csv", "json"]), default="csv")
@click.option("--session", "session", metavar="ID", help="Only the exchanges of this session.")
@click.option("-o", "--output", type=FILE, help="A file instead of standard output.")
@click.option("--store", "path", type=FILE, help="The SQLite file.  [env: KIMI_STORE]")
def export(kind: str, session: str | None, output: Path | None, path: Path | None) -> None:
    """Write the exchanges of the store, oldest first, one row each."""
    from kimi_core.export import write_csv, write_json
    from kimi_core.store import StoreError, StoreReader

    found = process.running()
    path = path or store_path(found.settings if found else None)
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


@click.command()
@click.argument("hash", required=False)
@click.option("--list", "listed", is_flag=True, help="List the latest masks instead.")
@click.option("--session", metavar="ID", help="List those of this session.")
@click.option("-n", "count", type=click.IntRange(1, 10_000), default=20, help="Masks listed.")
@click.option("--store", "path", type=FILE, help="The SQLite file.  [env: KIMI_STORE]")
def mask(
    hash: str | None, listed: bool, session: str | None, count: int, path: Path | None
) -> None:
    """Print the text that a mask stands for, byte for byte.

    HASH is the one in the note that the model got; its first six digits do where no other mask
    begins so.
    """
    from kimi_core.store import StoreError, StoreReader

    if (hash is None) != (listed or session is not None):
        raise click.UsageError("Name a HASH, or ask for a list with --list or --session ID.")
    found = process.running()
    path = path or store_path(found.settings if found else None)
    if not path.exists():
        raise click.ClickException(f"There is no store at {path}.")
    try:
        if hash is None:
            _list_masks(StoreReader(path).masks(count, session_id=session))
        else:
            _write_bytes(_original(StoreReader(path), hash))
    except StoreError as error:
        raise click.ClickException(str(error)) from None


def _original(reader: StoreReader, given: str) -> bytes:
    """Return the original whose hash begins with the digits that are given."""
    if len(given) < 6 or set(given.lower()) - set("0123456789abcdef"):
        raise click.ClickException(
            f"{given!r} is no hash of a mask; write its 16 hex digits, or at least the first 6."
        )
    hashes = reader.find_masks(given)
    if len(hashes) > 1:
        raise click.ClickException(f"Several masks begin with {given}: {', '.join(hashes)}.")
    found = reader.mask(hashes[0]) if hashes else None
    if found is None:
        raise click.ClickException(
            f"{reader.path} has no mask {given}; `kimi-proxy mask --list` shows the latest."
        )
    return str(found["original"]).encode("utf-8", "surrogatepass")


def _list_masks(masks: list[dict[str, Any]]) -> None:
    import time

    from kimi_core import report

    if not masks:
        click.echo("There are no masks.", err=True)
        return
    what = [report.one_line(f"{found['kinds']}: {found['label']}") for found in masks]
    width = max(map(len, what))
    rows = [
        (
            found["hash"],
            report.age(time.time() - found["created_at"]),
            report.number(found["tokens"]),
            report.number(found["sent_tokens"]),
            text.ljust(width),
        )
        for found, text in zip(masks, what, strict=True)
    ]
    header = ("hash", "age", "tokens", "sent", "what".ljust(width))
    click.echo(report.plain_table(header, rows))


def _write_bytes(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
