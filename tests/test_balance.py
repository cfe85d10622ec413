import types
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from kimi_core.balance import Balancer
from kimi_core.dialects import OPENAI
from kimi_core.document import Document
from kimi_core.exchange import Exchange, Route
from kimi_core.rules import Match, ModelRule, Provider, Strategy, Target


def target(name: str, weight: float = 1, model: str = "m", rpm: int | None = None) -> Target:
    url = f"https://{name}.example/v1"
    provider = Provider(name, "openai", types.MappingProxyType({"openai": url}), rpm=rpm)
    return Target(provider, model, weight)


A, B, C = target("a"), target("b"), target("c")


def match(
    targets: Sequence[Target],
    strategy: Strategy = "round_robin",
    model: str = "kimi",
    rule: str = "",
) -> Match:
    entry = ModelRule(rule or model)
    return Match(model, entry, tuple(targets), strategy, None, None, False, False)


def choose(
    balancer: Balancer,
    targets: Sequence[Target],
    strategy: Strategy,
    session: str = "s",
    *,
    sticky: bool = True,
    usable: Sequence[Target] | None = None,
) -> str:
    found = match(targets, strategy)
    return balancer.choose(found, tuple(usable or targets), session, sticky).provider.name


def ended(provider: str, latency_s: float = 1.0, **fields: Any) -> Exchange:
    exchange = Exchange("x", OPENAI, "chat", Document(b"{}", OPENAI.shape))
    exchange.route = Route(provider, "m", "openai", url=f"https://{provider}.example/v1")
    exchange.status = 200
    exchange.started, exchange.first_chunk = 100.0, 100.0 + latency_s
    exchange.input_tokens, exchange.output_tokens = 900_000, 100_000
    for name, value in fields.items():
        setattr(exchange, name, value)
    return exchange


def test_a_single_target_is_always_taken() -> None:
    for strategy in ("first", "round_robin", "random", "weighted_random", "best"):
        assert choose(Balancer(), [A], strategy) == "a"  # type: ignore[arg-type]


def test_round_robin_gives_each_session_the_next_target() -> None:
    balancer = Balancer()
    sessions = [f"s{n}" for n in range(6)]
    chosen = [choose(balancer, [A, B, C], "round_robin", session) for session in sessions]
    assert chosen == ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize("strategy", ["first", "round_robin", "random", "weighted_random", "best"])
def test_a_session_keeps_its_target(strategy: Strategy) -> None:
    balancer = Balancer()
    for session in ("s1", "s2", "s3"):
        first = choose(balancer, [A, B, C], strategy, session)
        for _ in range(10):
            choose(balancer, [A, B, C], strategy, "another " + session)
            assert choose(balancer, [A, B, C], strategy, session) == first


def test_a_session_keeps_one_target_for_each_model() -> None:
    balancer = Balancer()
    kimi, glm = match([A, B], model="kimi"), match([A, B], model="glm")
    for _ in range(3):
        assert balancer.choose(kimi, (A, B), "s", True) is A
        assert balancer.choose(glm, (A, B), "s", True) is A
    assert balancer.choose(kimi, (A, B), "t", True) is B


def test_models_of_one_pattern_take_turns_together() -> None:
    balancer = Balancer()
    chosen = [
        balancer.choose(match([A, B], model=f"kimi-{n}", rule="kimi-*"), (A, B), "s", True)
        for n in range(4)
    ]
    assert chosen == [A, B, A, B]


def test_two_targets_at_one_provider_are_told_apart() -> None:
    fast, slow = target("a", model="fast"), target("a", model="slow")
    balancer = Balancer()
    found = match([fast, slow])
    chosen = {session: balancer.choose(found, (fast, slow), session, True) for session in "xy"}
    assert chosen == {"x": fast, "y": slow}
    for session, before in chosen.items():
        assert balancer.choose(found, (fast, slow), session, True) is before


def test_a_session_whose_target_is_not_usable_moves_and_stays_there() -> None:
    balancer = Balancer()
    assert choose(balancer, [A, B, C], "first") == "a"
    assert choose(balancer, [A, B, C], "first", usable=[B, C]) == "b"
    assert choose(balancer, [A, B, C], "first") == "b"


def test_without_stickiness_each_request_is_chosen_for() -> None:
    balancer = Balancer()
    chosen = [choose(balancer, [A, B], "round_robin", sticky=False) for _ in range(4)]
    assert chosen == ["a", "b", "a", "b"]
    many = Counter(choose(balancer, [A, B], "random", sticky=False) for _ in range(200))
    assert min(many["a"], many["b"]) > 50


def test_requests_without_a_session_are_not_held() -> None:
    balancer = Balancer()
    chosen = [choose(balancer, [A, B], "round_robin", session="") for _ in range(4)]
    assert chosen == ["a", "b", "a", "b"]


def test_a_drawn_target_follows_the_weights_and_outlives_a_restart() -> None:
    light, heavy, never = target("light", 1), target("heavy", 3), target("never", 0)
    sessions = [f"session {n}" for n in range(1000)]
    before, after = Balancer(), Balancer()
    targets = [light, heavy, never]
    first = [choose(before, targets, "weighted_random", session) for session in sessions]
    again = [choose(after, targets, "weighted_random", session) for session in reversed(sessions)]
    assert first == again[::-1]
    drawn = Counter(first)
    assert 690 < drawn["heavy"] < 810
    assert drawn["light"] + drawn["heavy"] == 1000


def test_best_takes_the_cheaper_and_the_faster_one() -> None:
    cheap = Balancer()
    cheap.note(ended("a", cost_usd=3.0))
    cheap.note(ended("b", cost_usd=1.0))
    assert choose(cheap, [A, B], "best") == "b"
    fast = Balancer()
    fast.note(ended("a", 4.0))
    fast.note(ended("b", 0.5))
    assert choose(fast, [A, B], "best") == "b"


def test_best_leaves_a_provider_alone_that_is_full() -> None:
    small, large = target("a", rpm=3), target("b", rpm=100)
    balancer = Balancer()
    balancer.note(ended("b", 3.0))
    balancer.note(ended("a", 0.5))
    assert choose(balancer, [small, large], "best", "before") == "a"
    balancer.note(ended("a", 0.5))
    balancer.note(ended("a", 0.5))
    assert choose(balancer, [small, large], "best", "after") == "b"
    assert choose(balancer, [small, large], "best", "before") == "a"  # its cache is there


def test_best_takes_a_full_provider_when_all_are() -> None:
    balancer = Balancer()
    one, two = target("a", rpm=1), target("b", rpm=1)
    balancer.note(ended("a"))
    balancer.note(ended("b"))
    assert choose(balancer, [one, two], "best") in ("a", "b")


def test_a_refusal_is_not_taken_for_speed() -> None:
    balancer = Balancer()
    balancer.note(ended("a", 2.0))
    balancer.note(ended("b", 1.0))
    for _ in range(20):
        balancer.note(ended("a", 0.01, status=429))
        balancer.note(ended("a", 0.01, error_type="connection", status=None))
    assert choose(balancer, [A, B], "best") == "b"


def test_a_measurement_fades() -> None:
    balancer = Balancer()
    balancer.note(ended("b", 1.0))
    balancer.note(ended("a", 60.0))
    for _ in range(40):
        balancer.note(ended("a", 0.1))
    assert choose(balancer, [A, B], "best") == "a"


@pytest.mark.parametrize(
    "fields",
    [
        {"route": None},
        {"route": Route("a", "m", "openai")},  # the client's own destination
        {"blocked": "over budget"},
        {"first_chunk": None, "cost_usd": None},
        {"cost_usd": 0.0, "input_tokens": None, "output_tokens": None, "first_chunk": None},
    ],
)
def test_what_says_nothing_of_a_provider_changes_nothing(fields: dict[str, Any]) -> None:
    balancer = Balancer()
    balancer.note(ended("b", 1.0, cost_usd=1.0))
    for _ in range(10):
        balancer.note(ended("a", 0.001, **fields))
    balancer.note(ended("a", 5.0, cost_usd=5.0))
    assert choose(balancer, [A, B], "best") == "b"


def test_a_session_is_held_while_thousands_of_others_come() -> None:
    balancer = Balancer()
    assert choose(balancer, [A, B], "round_robin", "mine") == "a"
    for number in range(12_000):
        choose(balancer, [A, B], "round_robin", f"s{number}")
        if number % 1000 == 0:
            assert choose(balancer, [A, B], "round_robin", "mine") == "a"
