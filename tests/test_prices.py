import threading
import warnings

import pytest

from kimi_core.exchange import Usage
from kimi_core.prices import PriceList, cost
from kimi_core.rules import Price

KIMI = Price(input=0.6, cached_input=0.15, output=2.5)  # k2-thinking, per million tokens


@pytest.fixture(scope="module")
def prices() -> PriceList:
    found = PriceList()
    assert not found.ready
    found.warm()
    assert found.ready
    return found


def test_rules_bill_cached_tokens_once_and_at_their_own_price() -> None:
    usage = Usage(1_000_000, 100_000, cache_read_tokens=400_000)
    assert cost(usage, KIMI) == pytest.approx(0.6 * 0.6 + 0.4 * 0.15 + 0.1 * 2.5)


def test_without_a_price_for_cached_tokens_they_cost_what_others_do() -> None:
    usage = Usage(1_000_000, 0, cache_read_tokens=400_000)
    assert cost(usage, Price(input=0.6, output=2.5)) == pytest.approx(0.6)
    assert cost(usage, Price(input=0.6, cached_input=0, output=2.5)) == pytest.approx(0.36)


@pytest.mark.parametrize(
    ("usage", "dollars"),
    [
        (Usage(10, 0, cache_read_tokens=1000), 10 * 0.15e-6),  # more cached than sent
        (Usage(None, 1000), 0.0025),
        (Usage(1000, None), 0.0006),
        (Usage(0, 0), 0.0),
    ],
)
def test_rules_bill_no_more_than_was_said(usage: Usage, dollars: float) -> None:
    assert cost(usage, KIMI) == pytest.approx(dollars)


def test_the_rules_price_goes_before_the_list(prices: PriceList) -> None:
    usage = Usage(1_000_000, 1_000_000)
    assert prices.cost(usage, "nvidia", "moonshotai/kimi-k2-thinking", KIMI) == (
        pytest.approx(3.1),
        "rules",
    )
    assert prices.cost(usage, "openai", "gpt-4o", Price(input=1, output=1)) == (2.0, "rules")


@pytest.mark.parametrize(
    ("provider", "model", "usage", "dollars"),
    [
        # gpt-4o: 2.50 in, 1.25 cached, 10 out
        (
            "openai",
            "gpt-4o",
            Usage(10_000, 1000, cache_read_tokens=4000),
            (6000 * 2.5 + 4000 * 1.25 + 1000 * 10) / 1e6,
        ),
        # claude-sonnet-4-5: 3 in, 0.30 cached, 3.75 written for 5 minutes, 6 for an hour, 15 out
        (
            "anthropic",
            "claude-sonnet-4-5",
            Usage(10_000, 1000, cache_read_tokens=4000, cache_write_tokens=2000),
            (4000 * 3 + 4000 * 0.3 + 2000 * 3.75 + 1000 * 15) / 1e6,
        ),
        (
            "anthropic",
            "claude-sonnet-4-5-20250929",
            Usage(10_000, 1000, 4000, 2000, cache_write_1h_tokens=1500),
            (4000 * 3 + 4000 * 0.3 + 500 * 3.75 + 1500 * 6 + 1000 * 15) / 1e6,
        ),
        (
            "anthropic",
            "claude-sonnet-4-5",
            Usage(2000, 0, None, 2000, cache_write_1h_tokens=2000),
            2000 * 6 / 1e6,
        ),
        ("moonshot", "kimi-k2-thinking", Usage(1_000_000, 0), 0.6),
        ("gemini", "gemini-2.5-pro", Usage(100_000, 1000), 0.125 + 0.01),
        ("vertex", "google/gemini-2.5-pro", Usage(100_000, 1000), 0.125 + 0.01),
        ("gemini", "models/gemini-2.5-pro", Usage(100_000, 1000), 0.125 + 0.01),
        ("api.deepseek.com", "deepseek-chat", Usage(0, 0), 0.0),  # a host that no rule names
        ("api.anthropic.com", "claude-sonnet-4-5", Usage(1_000_000, 0), None),
    ],
)
def test_the_list_gives_the_published_price(
    prices: PriceList, provider: str, model: str, usage: Usage, dollars: float | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = prices.cost(usage, provider, model)
    assert found is not None
    assert found[1] == "prices"
    if dollars is not None:
        assert found[0] == pytest.approx(dollars)


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("kimi-code", "kimi-for-coding"),
        ("nvidia", "moonshotai/kimi-k2-thinking"),
        ("openai", "gpt-of-the-far-future"),
        ("local", "qwen3:8b"),
        ("llm.example.org", "gpt-4o"),
        ("", ""),
        ("openai", ""),
        ("x\ud800", "\ud800"),
    ],
)
def test_a_model_without_a_known_price_costs_nothing_known(
    prices: PriceList, provider: str, model: str
) -> None:
    for _ in range(2):
        assert prices.cost(Usage(1000, 1000), provider, model) is None


def test_without_any_count_there_is_no_cost(prices: PriceList) -> None:
    assert prices.cost(Usage(), "openai", "gpt-4o") is None
    assert prices.cost(Usage(cache_read_tokens=5), "openai", "gpt-4o", KIMI) is None


def test_counts_that_contradict_each_other_have_no_price_but_the_next_ones_do(
    prices: PriceList,
) -> None:
    wrong = Usage(100, 1000, cache_read_tokens=4000)
    assert prices.cost(wrong, "anthropic", "claude-sonnet-4-5") is None
    assert prices.cost(Usage(1_000_000, 0), "anthropic", "claude-sonnet-4-5") is not None
    hours = Usage(2000, 0, None, 1000, cache_write_1h_tokens=5000)
    found = prices.cost(hours, "anthropic", "claude-sonnet-4-5")
    assert found == (pytest.approx((1000 * 3 + 1000 * 6) / 1e6), "prices")


def test_a_list_that_nobody_warmed_warms_itself_from_any_thread() -> None:
    cold = PriceList()
    found: list[tuple[float, str] | None] = []
    threads = [
        threading.Thread(target=lambda: found.append(cold.cost(Usage(1, 1), "openai", "gpt-4o")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert found[0] is not None
