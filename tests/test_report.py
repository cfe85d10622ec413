from __future__ import annotations

from typing import Any

import pytest

from kimi_core import report
from kimi_core.store.schema import EXCHANGE_COLUMNS


def _row(model: str | None = "m", **values: Any) -> dict[str, Any]:
    named = {
        "input": "gen_ai.usage.input_tokens",
        "output": "gen_ai.usage.output_tokens",
        "cached": "gen_ai.usage.cache_read.input_tokens",
    }
    given = {named.get(name, name): value for name, value in values.items()}
    return {**dict.fromkeys(EXCHANGE_COLUMNS), "gen_ai.request.model": model, **given}


def test_models_are_summed_and_the_dearest_comes_first() -> None:
    rows = [
        _row("cheap", input=10, output=1, cost_usd=0.1),
        _row("dear", input=1, output=1, cached=1, cost_usd=1.5),
        _row("cheap", input=5, output=2, cost_usd=0.2, status=200),
    ]

    found = report.by_model(rows)

    assert list(found) == ["dear", "cheap"]
    assert (found["cheap"].requests, found["cheap"].input_tokens) == (2, 15)
    assert found["cheap"].cost_usd == pytest.approx(0.3)
    assert report.total(rows).cache_read_tokens == 1


def test_what_nobody_said_is_a_question_mark_and_no_zero() -> None:
    rows = [_row(None, input=10), _row("priced", input=1, cost_usd=0.5)]

    lines = report.lines(report.by_model(rows), report.total(rows))

    assert lines[1] == ("?", "1", "10", "?", "?", "?", "?", "?")
    assert lines[-1][5] == "$0.5000 + ?"


def test_a_failed_request_without_tokens_is_failed_and_not_unpriced() -> None:
    sums = report.total([_row(status=500), _row(error_type="connection"), _row(partial=1)])

    assert (sums.requests, sums.errors, sums.partial, sums.unpriced) == (3, 2, 1, 0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "?"), (0.0, "$0.00"), (0.00012, "$0.0001"), (1234.5, "$1,234.50"), (-0.5, "-$0.5000")],
)
def test_money_is_written_for_people(value: float | None, shown: str) -> None:
    assert report.usd(value) == shown


@pytest.mark.parametrize(
    ("tokens", "color"),
    [(0, "green"), (499, "green"), (500, "yellow"), (799, "yellow"), (800, "red"), (2000, "red")],
)
def test_the_gauge_is_yellow_from_half_and_red_from_four_fifths(tokens: int, color: str) -> None:
    said = report.gauge({"context_tokens": tokens, "context_window": 1000})

    assert said["color"] == color
    assert said["percentage"] == tokens / 10


@pytest.mark.parametrize(("tokens", "window"), [(None, 10), (10, None), (10, 0)])
def test_a_gauge_of_unknown_size_has_no_colour(tokens: int | None, window: int | None) -> None:
    said = report.gauge({"context_tokens": tokens, "context_window": window})

    assert (said["percentage"], said["color"]) == (None, None)


def test_savings_fit_in_one_line_and_nothing_saved_is_nothing_said() -> None:
    sums = dict.fromkeys(
        (
            "saved_tokens",
            "masked_tokens",
            "compressed_tokens",
            "gross_saved_usd",
            "lost_usd",
            "spent_usd",
            "saved_usd",
        )
    )
    sums |= {"unpriced_savings": 0, "unpriced_spendings": 0}
    assert report.savings(sums) == ""
    assert report.savings(sums | {"saved_tokens": 0}) == ""
    said = report.savings(sums | {"saved_tokens": 1500, "masked_tokens": 1500})
    assert said == "1,500 tokens not sent (1,500 masked); ? gross, ? lost, ? spent, ? net"
    assert report.savings(sums | {"saved_tokens": 0, "spent_usd": 2.0, "saved_usd": -2.0}) == (
        "0 tokens not sent; ? gross, ? lost, $2.00 spent, -$2.00 net"
    )


def test_savings_without_a_known_price_are_no_zero() -> None:
    sums = {
        "saved_tokens": 0,
        "masked_tokens": 0,
        "compressed_tokens": 0,
        "gross_saved_usd": 0.0,
        "lost_usd": 0.0,
        "spent_usd": 0.0,
        "saved_usd": None,
        "unpriced_savings": 0,
        "unpriced_spendings": 1,
    }
    assert report.savings(sums) == ("0 tokens not sent; $0.00 gross, $0.00 lost, ? spent, ? net")
    sums |= {"gross_saved_usd": 3.0, "spent_usd": 2.0, "saved_usd": 1.0, "unpriced_savings": 1}
    assert report.savings(sums) == (
        "0 tokens not sent; $3.00 + ? gross, ? lost, $2.00 + ? spent, $1.00 ± ? net"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-3, "0 s"), (59.4, "59 s"), (119, "1 min"), (3600, "1 h"), (86_399, "23 h"), (9e5, "10 d")],
)
def test_an_age_is_told_in_its_largest_unit(seconds: float, shown: str) -> None:
    assert report.age(seconds) == shown


def test_a_text_of_somebody_elses_takes_one_line_without_what_a_terminal_obeys() -> None:
    assert report.one_line("a\x1b[2J\r\n\tb\u202ec") == "a [2J b c"
    assert report.one_line("x" * 60) == "x" * 60
    assert report.one_line("x" * 61) == "x" * 59 + "…"


def test_a_plain_table_is_aligned() -> None:
    text = report.plain_table(("model", "n"), [("a", "1,000"), ("long name", "2")])

    assert text == "model          n\na          1,000\nlong name      2"
