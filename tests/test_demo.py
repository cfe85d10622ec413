"""`make demo` tells the truth: its figures add up, and nothing stays behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).with_name("demo.py")
ROW = re.compile(
    r"  (?P<number>\d) (?P<model>\S+) at (?P<provider>\S+) +(?P<status>\d+)(?P<cut> cut)? +"
    r"(?P<input>[\d,]+|-)(?P<in_by> [t~])? +(?P<cached>[\d,]+) +"
    r"(?P<output>[\d,]+|-)(?P<out_by> [t~])? +(?P<cost>\$[\d.]+|-) +"
    r"(?P<first>[\d,]+) ms +(?P<whole>[\d,]+) ms"
)


def _number(text: str) -> int:
    return 0 if text == "-" else int(text.replace(",", ""))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    environment = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("demo"))}
    done = subprocess.run(
        [sys.executable, str(DEMO)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(Path(environment["TMPDIR"]).iterdir()) == []
    return done.stdout


@pytest.fixture(scope="module")
def rows(told: str) -> list[dict[str, str]]:
    found = [
        match.groupdict(default="") for match in map(ROW.fullmatch, told.splitlines()) if match
    ]
    assert [row["number"] for row in found] == list("123456789")
    return found


def test_every_exchange_has_its_provider_status_and_times(rows: list[dict[str, str]]) -> None:
    claude = [row for row in rows if row["provider"] == "anthropic"]
    assert [row["model"] for row in claude] == ["claude-sonnet-4-6"]
    assert {row["model"] for row in rows if row not in claude} == {"kimi-k2-thinking"}
    assert [row["status"] for row in rows] == ["200"] * 7 + ["429", "200"]
    assert [bool(row["cut"]) for row in rows] == [False] * 8 + [True]
    # The fake provider begins to answer after 120 ms, and streams for a while.
    assert all(_number(row["first"]) >= 120 for row in rows if row["status"] == "200")
    assert all(_number(row["whole"]) > _number(row["first"]) for row in rows[:5])


def test_costs_are_the_tokens_times_their_prices(rows: list[dict[str, str]]) -> None:
    for row in rows:
        if row["status"] == "429":
            assert (row["input"], row["output"], row["cost"]) == ("-", "-", "-")
            continue
        prices = (3.0, 0.3, 15.0) if row["provider"] == "anthropic" else (0.6, 0.15, 2.5)
        fresh = _number(row["input"]) - _number(row["cached"])
        tokens = (fresh, _number(row["cached"]), _number(row["output"]))
        expected = sum(n * price for n, price in zip(tokens, prices, strict=True)) / 1e6
        assert float(row["cost"][1:]) == pytest.approx(expected, abs=6e-7), row


def test_the_conversation_grows_and_is_cached(rows: list[dict[str, str]]) -> None:
    turns = [_number(row["input"]) for row in rows[:5]]
    assert turns == sorted(set(turns))
    # The provider bills what it saw the turn before as cached, in steps of 64.
    assert [_number(row["cached"]) for row in rows[1:5]] == [n // 64 * 64 for n in turns[:4]]


def test_the_cut_stream_is_counted_by_the_tokenizer_and_the_rest_by_usage(
    rows: list[dict[str, str]],
) -> None:
    assert all(row["in_by"] == row["out_by"] == "" for row in rows[:8])
    assert rows[8]["in_by"] == rows[8]["out_by"] == " t"
    assert 0 < _number(rows[8]["output"]) < 500


def test_totals_are_the_sums_of_the_exchanges(told: str, rows: list[dict[str, str]]) -> None:
    total = re.search(
        r"^  total +9 \(2 failed\) +([\d,]+) +([\d,]+) +([\d,]+) +\$([\d.]+)", told, re.MULTILINE
    )
    assert total
    sums = [sum(_number(row[name]) for row in rows) for name in ("input", "cached", "output")]
    assert [_number(part) for part in total.groups()[:3]] == sums
    costs = sum(float(row["cost"].strip("$-") or 0) for row in rows)
    assert float(total[4]) == pytest.approx(costs, abs=6e-5)


def test_the_context_is_split_into_parts_that_add_up(told: str) -> None:
    names = ("system", "tools", "user", "assistant", "tool result", "memory")
    parts = [re.search(rf"^  {name} +([\d,]+) +\d+ %", told, re.MULTILINE) for name in names]
    assert all(parts)
    tokens = [_number(part[1]) for part in parts if part]
    whole = re.search(r"^  ([\d,]+) tokens in 10 messages", told, re.MULTILINE)
    assert whole
    assert sum(tokens) == _number(whole[1])
    assert max(tokens) == tokens[names.index("tool result")]


def test_headers_and_gauge_say_what_the_rows_say(told: str, rows: list[dict[str, str]]) -> None:
    headers = dict(re.findall(r"^    (x-kimi-proxy-\S+): (\S+)$", told, re.MULTILINE))
    assert headers["x-kimi-proxy-provider"] == "moonshot"
    assert headers["x-kimi-proxy-input-tokens"] == rows[5]["input"].replace(",", "")
    assert headers["x-kimi-proxy-output-tokens"] == rows[5]["output"]
    cost = float(headers["x-kimi-proxy-cost-usd"])
    assert cost == pytest.approx(float(rows[5]["cost"][1:]), abs=6e-7)
    gauge = re.search(
        rf"^  {headers['x-kimi-proxy-session']} .* % of 16,384 tokens, green", told, re.M
    )
    assert gauge


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_keep_runs_until_it_is_told_to_stop_and_leaves_no_process() -> None:
    with subprocess.Popen(
        [sys.executable, str(DEMO), "--keep"], stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout
        children: list[str] = []
        for line in demo.stdout:
            if line.startswith("  proxy "):
                children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()
                break
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(20) == 0
    assert len(children) == 1
    assert not Path(f"/proc/{children[0]}").exists()
