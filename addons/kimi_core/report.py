"""What a run cost: the exchanges of a command, summed by model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SUMMED = {
    "input_tokens": "gen_ai.usage.input_tokens",
    "cache_read_tokens": "gen_ai.usage.cache_read.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cost_usd": "cost_usd",
    "saved_tokens": "saved_tokens",
    "saved_usd": "saved_usd",
}

HEADER = ("model", "requests", "input", "cached", "output", "cost", "saved tokens", "saved")


@dataclass(slots=True)
class Sums:
    """Sums over exchanges; None where no exchange had the number.

    `unpriced` says how many exchanges that used tokens have no known price: `cost_usd` is then
    a lower bound.
    """

    requests: int = 0
    errors: int = 0
    partial: int = 0
    unpriced: int = 0
    input_tokens: int | None = None
    cache_read_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    saved_tokens: int | None = None
    saved_usd: float | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row of the store's exchanges."""
        self.requests += 1
        self.errors += bool(row["error_type"]) or (row["status"] or 0) >= 400
        self.partial += bool(row["partial"])
        used = row["gen_ai.usage.input_tokens"] or row["gen_ai.usage.output_tokens"]
        self.unpriced += bool(used) and row["cost_usd"] is None
        for name, column in _SUMMED.items():
            if row[column] is not None:
                setattr(self, name, (getattr(self, name) or 0) + row[column])


def by_model(rows: Iterable[Mapping[str, Any]]) -> dict[str, Sums]:
    """Return the sums of each model that answered, the dearest first."""
    found: dict[str, Sums] = {}
    for row in rows:
        model = row["gen_ai.response.model"] or row["gen_ai.request.model"] or "?"
        found.setdefault(model, Sums()).add(row)
    return dict(sorted(found.items(), key=lambda item: (-(item[1].cost_usd or 0), item[0])))


def total(rows: Iterable[Mapping[str, Any]]) -> Sums:
    """Return the sums of all rows."""
    sums = Sums()
    for row in rows:
        sums.add(row)
    return sums


def lines(models: Mapping[str, Sums], of_all: Sums) -> list[tuple[str, ...]]:
    """Return the cells of a table: one line a model, the last one the total."""
    named = [*models.items(), ("total", of_all)]
    return [
        (
            name,
            number(sums.requests) + (f" ({sums.errors} failed)" if sums.errors else ""),
            number(sums.input_tokens),
            number(sums.cache_read_tokens),
            number(sums.output_tokens),
            cost(sums.cost_usd, sums.unpriced),
            number(sums.saved_tokens),
            usd(sums.saved_usd),
        )
        for name, sums in named
    ]


def gauge(session: Mapping[str, Any]) -> dict[str, Any]:
    """Return how full a session's context is; null what is not known.

    Green, yellow from 50 %, red from 80 %.
    """
    tokens, window = session["context_tokens"], session["context_window"]
    found = {"tokens": tokens, "window": window, "percentage": None, "color": None}
    if tokens is None or not window:
        return found
    share = tokens / window
    color = "red" if share >= 0.8 else "yellow" if share >= 0.5 else "green"
    return found | {"percentage": round(100 * share, 1), "color": color}


def number(value: int | None) -> str:
    """Return a number for people; "?" when nobody said it."""
    return "?" if value is None else f"{value:,}"


def usd(value: float | None) -> str:
    """Return money for people, small sums with more digits; "?" when no price is known."""
    if value is None:
        return "?"
    size, sign = abs(value), "-" if value < 0 else ""
    return f"{sign}${size:,.2f}" if size >= 1 or size == 0 else f"{sign}${size:.4f}"


def cost(value: float | None, unpriced: int) -> str:
    """Return money, with a mark when some of it is not known."""
    return usd(value) + (" + ?" if unpriced and value is not None else "")


def _partly(value: float | None, unpriced: int, sign: str = "+") -> str:
    """Return money of which some is not known; where all of it is, that is no zero."""
    if not unpriced:
        return usd(value)
    return f"{usd(value)} {sign} ?" if value else usd(None)


def savings(sums: Mapping[str, Any]) -> str:
    """Return what was saved in one line, from sums of the store; empty when nothing was.

    Gross is what the tokens left out would have cost, net what remains of it.
    """
    no_gain, no_cost = sums["unpriced_savings"], sums["unpriced_spendings"]
    if not (sums["saved_tokens"] or sums["lost_usd"] or sums["spent_usd"] or no_cost):
        return ""
    kinds = (("masked", sums["masked_tokens"]), ("compressed", sums["compressed_tokens"]))
    of_each = ", ".join(f"{count:,} {kind}" for kind, count in kinds if count)
    money = (
        ("gross", _partly(sums["gross_saved_usd"], no_gain)),
        ("lost", _partly(sums["lost_usd"], no_gain)),
        ("spent", _partly(sums["spent_usd"], no_cost)),
        ("net", _partly(sums["saved_usd"], no_gain or no_cost, "±")),
    )
    return (
        f"{number(sums['saved_tokens'])} tokens not sent"
        + (f" ({of_each})" if of_each else "")
        + "; "
        + ", ".join(f"{value} {name}" for name, value in money)
    )


def age(seconds: float) -> str:
    """Return how long ago something was, for people."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def one_line(text: str, width: int = 60) -> str:
    """Return the beginning of a text of somebody else's, without what a terminal obeys."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return plain if len(plain) <= width else f"{plain[: width - 1]}…"


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table without any control character, the first column to the left."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    )
