"""Measure what masking saves on recorded conversations, and what it costs: `make bench-savings`.

Reads conversations in OpenAI's format (JSON, JSONL; also tau-bench's) and SWE-agent's .traj files,
and sends each request of them in turn. The price of a request follows from the bytes that were
sent: what a provider's cache holds costs a tenth, the rest 1.25 times the price of a token. Folders
are read with all below them. Exit code 1 when --gate is given and a gate fails, 2 when nothing
could be read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file: its folder's modules are ours, not names for everybody's import.
    tests = Path(__file__).resolve().parents[1]
    sys.path[:] = [p for p in sys.path if not p or Path(p).resolve() != tests / "bench"]
    sys.path[:0] = [str(tests), str(tests.parent / "addons")]

from bench import traces
from bench.direct import Direct
from bench.replay import Figures, Sender, replay
from bench.traces import Source, Unreadable
from kimi_core import tokens
from kimi_core.masking.policy import Policy
from kimi_core.report import number, plain_table

_NAME = 48
"""The longest name in a table, in characters; of a longer one its end."""
MIN_MONEY, MIN_WORDS, MIN_LINES, MAX_LOSS = 0.18, 0.95, 0.95, 0.01


@dataclass(slots=True)
class Row:
    """The figures of a file, or of several."""

    name: str
    figures: Figures = field(default_factory=Figures)
    by_references: float = 0.0
    """What references alone save of the money.

    What cuts add is the rest: less than nothing where a cut hides what could be pointed at."""
    worst: float = 1.0
    """What is saved of the money of the conversation that comes off worst."""
    worst_name: str = ""

    def add(self, other: Row) -> None:
        self.figures.add(other.figures)
        self.by_references += other.by_references
        if other.worst < self.worst:
            self.worst, self.worst_name = other.worst, other.worst_name

    @property
    def references_saved(self) -> float:
        before = self.figures.cost_before
        return self.by_references / before if before else 0.0


@dataclass(frozen=True, slots=True)
class Gate:
    """A share that must be at least so large, or a count that must be 0."""

    name: str
    value: float
    limit: float | None = None

    @property
    def ok(self) -> bool:
        return self.value == 0 if self.limit is None else self.value >= self.limit

    def __str__(self) -> str:
        if self.limit is None:
            said = f"{self.name}: {number(round(self.value))} (must be 0)"
        else:
            said = f"{self.name}: {_percent(self.value)} (at least {_percent(self.limit)})"
        return f"{'ok' if self.ok else 'FAILED'}  {said}"


def measure(source: Source, sender: Sender, references: Sender | None) -> Row:
    """Return the figures of a file; `references` sends with references alone."""
    row = Row(source.name)
    for trace in source.traces:
        figures = replay(trace, sender)
        of_one = Row(trace.name, figures, worst=figures.money_saved, worst_name=trace.name)
        if references is not None:
            alone = replay(trace, references)
            of_one.by_references = alone.cost_before - alone.cost_sent
        row.add(of_one)
    return row


def gates(coding: Row, everything: Row) -> list[Gate]:
    """Return what must hold: on coding traces for what is saved and still shown, else on all."""
    found = []
    if coding.figures.requests:
        found += [
            Gate("money saved, coding", coding.figures.money_saved, MIN_MONEY),
            Gate("words still shown, coding", coding.figures.words, MIN_WORDS),
            Gate("lines still shown, coding", coding.figures.lines, MIN_LINES),
        ]
    figures = everything.figures
    return [
        *found,
        Gate(
            f"money saved, {_short(everything.worst_name)} (the worst run)",
            everything.worst,
            -MAX_LOSS,
        ),
        Gate("masked bytes not had back", figures.masked_bytes - figures.recovered_bytes),
        Gate("requests that do not begin with the one before", figures.unstable),
        Gate("messages that another process sends in another form", figures.differing),
    ]


def saved_table(rows: Sequence[Row]) -> str:
    """Return a table of what was saved."""
    header = (
        "saved",
        "runs",
        "requests",
        "tokens",
        "sent",
        "saved",
        "money",
        "paid",
        "saved",
        "references alone",
        "cuts add",
        "worst run",
    )
    return plain_table(header, [_saved_cells(row) for row in rows])


def _saved_cells(row: Row) -> tuple[str, ...]:
    figures = row.figures
    return (
        _short(row.name),
        number(figures.conversations),
        number(figures.requests),
        number(figures.tokens_before),
        number(figures.tokens_sent),
        _percent(figures.tokens_saved),
        number(round(figures.cost_before)),
        number(round(figures.cost_sent)),
        _percent(figures.money_saved),
        _percent(row.references_saved),
        _percent(figures.money_saved - row.references_saved),
        _percent(row.worst),
    )


def kept_table(rows: Sequence[Row]) -> str:
    """Return a table of what the model could still see, and of what can be had back."""
    header = (
        "still shown",
        "words used",
        "shown",
        "lines used",
        "shown",
        "texts masked",
        "bytes",
        "had back",
        "unstable",
        "differing",
    )
    return plain_table(header, [_kept_cells(row.name, row.figures) for row in rows])


def _kept_cells(name: str, figures: Figures) -> tuple[str, ...]:
    return (
        _short(name),
        number(figures.words_used),
        _percent(figures.words),
        number(figures.lines_used),
        _percent(figures.lines),
        number(figures.masked_texts),
        number(figures.masked_bytes),
        _percent(figures.recovered),
        number(figures.unstable),
        number(figures.differing),
    )


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _percent(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:.1f} %"  # + 0.0: a loss of nothing has no sign


def _plain(row: Row) -> dict[str, Any]:
    figures = row.figures
    return {
        "name": row.name,
        **asdict(figures),
        "tokens_saved": figures.tokens_saved,
        "money_saved": figures.money_saved,
        "references_saved": row.references_saved,
        "cuts_saved": figures.money_saved - row.references_saved,
        "worst": row.worst,
        "worst_name": row.worst_name,
        "words": figures.words,
        "lines": figures.lines,
        "recovered": figures.recovered,
    }


def policies(given: argparse.Namespace) -> tuple[Policy | None, Policy | None]:
    """Return what is asked for, and the part of it that is references alone."""
    references = Policy(threshold=0)
    if given.policy == "none":
        return None, None
    if given.policy == "references":
        return references, references
    asked = Policy(threshold=given.threshold, keep=given.keep, references=given.policy == "both")
    return asked, references if given.policy == "both" else None


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    began = time.monotonic()
    sources = list(_sources(given.paths, given.observations))
    if not sources:
        _complain("Nothing could be read.")
        return 2
    tokens.warm(["o200k"])
    asked, alone = policies(given)
    rows: list[tuple[Source, Row]] = []
    references = Direct(alone) if alone is not None else None
    with _sender(given.live, asked) as sender:
        for source in sources:
            rows.append((source, measure(source, sender, references)))
    coding, everything = Row("coding"), Row("total")
    for source, row in rows:
        everything.add(row)
        if given.coding or source.coding:
            coding.add(row)
    of_files = [row for _, row in rows]
    totals = [coding, everything] if coding.figures.requests else [everything]
    shown = [*of_files, *totals] if len(of_files) > 1 else of_files
    print(f"{saved_table(shown)}\n\n{kept_table(shown)}\n")
    judged = gates(coding, everything)
    for gate in judged:
        print(gate)
    print(f"{time.monotonic() - began:.0f} s")
    if given.json:
        made = {
            "policy": given.policy,
            "threshold": given.threshold,
            "keep": given.keep,
            "live": given.live,
            "observations": given.observations,
            "files": [_plain(row) for row in of_files],
            "coding": _plain(coding),
            "total": _plain(everything),
            "gates": [{**asdict(gate), "ok": gate.ok} for gate in judged],
        }
        given.json.write_text(json.dumps(made, indent=1) + "\n")
    return int(given.gate and not all(gate.ok for gate in judged))


def _sources(paths: Iterable[Path], observations: bool) -> Iterator[Source]:
    found = traces.files(paths)
    above = os.path.commonpath([path.absolute().parent for path in found]) if found else ""
    for path in found:
        name = os.path.relpath(path.absolute(), above)
        try:
            source = traces.read(path, name, observations=observations)
        except Unreadable as error:
            _complain(f"{path}: skipped, {error}")
            continue
        if source.skipped:
            _complain(f"{path}: {source.skipped} entries skipped, they are no conversations")
        yield source


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


@contextmanager
def _sender(live: bool, policy: Policy | None) -> Iterator[Sender]:
    if not live:
        yield Direct(policy)
        return
    from bench.live import Live  # without it, nothing of a proxy is needed

    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        Live(Path(folder), policy) as sender,
    ):
        yield sender
        for line in sender.complaints[:10]:
            _complain(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench-savings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files and folders")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--direct",
        dest="live",
        action="store_false",
        help="through the functions that the Sanitizer uses (the default)",
    )
    mode.add_argument(
        "--live", action="store_true", help="through a real mitmdump with the whole chain"
    )
    parser.set_defaults(live=False)
    parser.add_argument(
        "--policy",
        choices=("none", "cut", "references", "both"),
        default="both",
        help="what is masked (default: both)",
    )
    default = Policy()
    parser.add_argument("--threshold", type=int, default=default.threshold, metavar="N")
    parser.add_argument("--keep", type=int, default=default.keep, metavar="N")
    parser.add_argument(
        "--coding",
        action="store_true",
        help="judge all files as runs of coding agents, not only .traj",
    )
    parser.add_argument(
        "--observations",
        action="store_true",
        help="send what SWE-agent's text actions brought as results of tool calls",
    )
    parser.add_argument("--gate", action="store_true", help="exit with 1 when a gate fails")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
