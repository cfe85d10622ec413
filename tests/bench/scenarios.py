"""What is measured, and when it is good enough."""

import asyncio
import contextlib
import json
import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from bench import bodies, proxies
from bench.load import Answer, Client, Conversation, play
from bench.proxies import Proxy
from kimi_core.markup import K2, Tools

STREAM = "20/1"
"""20 events, a millisecond apart: closer ones would reach the proxy as one piece."""
SLOW_STREAM = "20/4"

MAX_CPU = {"200 KB": 1.35, "1 KB": 1.5}
MIN_RATE = 0.75
MAX_FIRST_BYTE_MS = 1.0
MAX_CHUNK_MS = 0.2
MAX_MENDING_MS = 0.1
MIN_SCAN_MB_S = 20.0
MAX_GROWTH_PERCENT, MAX_LATE_GROWTH_MB, MAX_RSS_MB = 5.0, 3.0, 250.0


@dataclass(frozen=True)
class Gate:
    """A figure and its limit."""

    name: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def ok(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        said = f"{self.name}: {self.value:.3f} {self.unit} (limit {sign} {self.limit:.3f})"
        return f"{'ok' if self.ok else 'FAILED'} {said}"


@dataclass
class Report:
    """What came out: the gates, and the absolute figures behind them."""

    say: Callable[[str], None]
    gates: list[Gate] = field(default_factory=list)
    figures: list[tuple[str, str, float | None, float | None, str]] = field(default_factory=list)
    """(what, unit, bare, ours, remark)"""

    def gate(self, gate: Gate) -> None:
        self.gates.append(gate)
        self.say(str(gate))


@dataclass
class Bench:
    """The two proxies side by side, and the seeds that are still unused."""

    report: Report
    folder: Path
    quick: bool = False
    sent: int = 0
    """Exchanges that went through the chain of this bench so far."""
    _seeds: Iterator[int] = field(default_factory=bodies.numbers)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Bench":
        self.provider = self._stack.enter_context(proxies.provider())
        self.bare = self._stack.enter_context(proxies.bare(self.folder / "bare", self.provider))
        self.ours = self._stack.enter_context(proxies.ours(self.folder / "ours", self.provider))
        # Tokenizers and prices are loaded at their first use.
        warm = [[bodies.short(self.seed(), i % 4 > 1)] for i in range(64)]
        for proxy in (self.bare, self.ours):
            self.play(proxy, warm, 4)
            self.play(proxy, warm, 4, STREAM)
            proxy.settled_cpu_s()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def play(
        self,
        proxy: Proxy,
        conversations: Sequence[Conversation],
        connections: int,
        chunks: str = "",
    ) -> float:
        if proxy is self.ours:
            self.sent += sum(map(len, conversations))
        return asyncio.run(play(proxy.port, conversations, connections, chunks))

    def seed(self) -> int:
        return next(self._seeds)

    def rounds(self, n: int) -> Iterator[tuple[int, tuple[Proxy, Proxy]]]:
        """Yield the proxies for each round, each first in every other one."""
        for i in range(2 if self.quick else n):
            yield i, ((self.bare, self.ours) if i % 2 == 0 else (self.ours, self.bare))

    def agentic(self, count: int, stream: bool) -> list[bodies.Growing]:
        return [bodies.agentic(self.seed(), stream) for _ in range(count)]

    def short(self, count: int, stream: bool) -> list[bodies.Growing]:
        return [bodies.Growing((), (bodies.short(self.seed(), stream),)) for _ in range(count)]


# --- CPU and requests per second --------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """A kind of traffic, and how much of it makes a round."""

    size: str
    stream: bool
    connections: int
    rounds: int
    conversations: int

    @property
    def name(self) -> str:
        return f"{self.size}, {'streamed' if self.stream else 'whole'}"

    def made(self, bench: Bench) -> list[bodies.Growing]:
        make = bench.agentic if self.size == "200 KB" else bench.short
        return make(self.conversations, self.stream)


LOADS = (
    Load("200 KB", False, 16, rounds=11, conversations=24),
    Load("1 KB", False, 16, rounds=15, conversations=240),
    Load("200 KB", True, 8, rounds=7, conversations=8),
    Load("1 KB", True, 8, rounds=7, conversations=96),
)


def cpu(bench: Bench) -> None:
    """CPU per request, and, without streams, requests per second."""
    for load in LOADS:
        spent: dict[str, list[float]] = {"bare": [], "ours": []}
        rate: dict[str, list[float]] = {"bare": [], "ours": []}
        sizes: list[int] = []
        for _, pair in bench.rounds(load.rounds):
            made = load.made(bench)
            turns = [one.turns for one in made]
            sizes += [len(body) for turn in turns for body in turn]
            requests = sum(map(len, turns))
            for proxy in pair:
                if openings := [one.opening for one in made if one.opening]:
                    bench.play(proxy, openings, 4)
                before = proxy.settled_cpu_s()
                seconds = bench.play(proxy, turns, load.connections, STREAM if load.stream else "")
                spent[proxy.name].append((proxy.settled_cpu_s() - before) / requests * 1000)
                rate[proxy.name].append(requests / seconds)
        bare, own = median(spent["bare"]), median(spent["ours"])
        remark = f"{load.connections} connections, body {sum(sizes) / len(sizes) / 1000:.1f} KB"
        bench.report.figures.append((f"CPU per request, {load.name}", "ms", bare, own, remark))
        limit = MAX_CPU[load.size]
        bench.report.gate(Gate(f"CPU per request, {load.name}", own / bare, limit, "x bare"))
        if not load.stream:
            bare, own = median(rate["bare"]), median(rate["ours"])
            name = f"requests per second, {load.name}"
            bench.report.figures.append((name, "/s", bare, own, remark))
            bench.report.gate(Gate(name, own / bare, MIN_RATE, "x bare", at_least=True))


# --- delay ------------------------------------------------------------------------------------


def delay(bench: Bench) -> None:
    """The first byte of a stream and each later chunk, one request at a time."""
    chunks: dict[str, list[float]] = {"bare": [], "ours": []}
    for size, conversations in (("200 KB", 6), ("1 KB", 54)):
        make = bench.agentic if size == "200 KB" else bench.short
        made = make(2 if bench.quick else conversations, True)
        first: dict[str, list[float]] = {"bare": [], "ours": []}
        for proxy, answer in asyncio.run(_one_by_one(bench, made, bench.bare, bench.ours)):
            first[proxy.name].append(answer.first_byte_ms)
            chunks[proxy.name] += answer.chunk_delays_ms
        # Of two that were asked one after the other, whatever else the machine did meanwhile.
        later = median(b - a for a, b in zip(first["bare"], first["ours"], strict=True))
        name, count = f"first byte of a stream, {size}", len(first["ours"])
        medians = median(first["bare"]), median(first["ours"])
        bench.report.figures.append((name, "ms", *medians, f"{count} streams"))
        bench.report.gate(Gate(name + ", later by", later, MAX_FIRST_BYTE_MS, "ms"))
    bare, own = median(chunks["bare"]), median(chunks["ours"])
    remark = f"{len(chunks['ours'])} chunks, 95 % within {_p95(chunks['bare']):.2f} and "
    remark += f"{_p95(chunks['ours']):.2f}"
    bench.report.figures.append(("a stream's chunk", "ms", bare, own, remark))
    bench.report.gate(Gate("a stream's chunk, later by", own - bare, MAX_CHUNK_MS, "ms"))


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20)[-1]


async def _one_by_one(
    bench: Bench, made: Sequence[bodies.Growing], *pair: Proxy
) -> Iterable[tuple[Proxy, Answer]]:
    clients = [(proxy, await Client.connect(proxy.port)) for proxy in pair]
    found: list[tuple[Proxy, Answer]] = []
    for one in made:
        for body in one.opening:
            for _, client in clients:
                await client.ask(body)
        for body in one.turns:
            clients.reverse()  # whoever is asked first waits longer for a machine at rest
            for proxy, client in clients:
                answer = await client.ask(body, SLOW_STREAM)
                found.append((proxy, answer))
        if bench.ours in pair:
            bench.sent += len(one.opening) + len(one.turns)
    for _, client in clients:
        client.close()
    return found


# --- markup -----------------------------------------------------------------------------------


_PAIRS = 4
"""Two proxies that do the same differ by some tenths of a millisecond for as long as they live."""


def markup(bench: Bench) -> None:
    """What the Normalizer adds to a Kimi stream without markup; how fast it reads text."""
    answers: list[tuple[str, Answer]] = []
    for pair in range(1 if bench.quick else _PAIRS):
        answers += _with_and_without(bench, str(pair), 2 if bench.quick else 30)
    first: dict[str, list[float]] = {"without": [], "with": []}
    chunks: dict[str, list[float]] = {"without": [], "with": []}
    for name, answer in answers:
        first[name].append(answer.first_byte_ms)
        chunks[name] += answer.chunk_delays_ms
    later = median(b - a for a, b in zip(first["without"], first["with"], strict=True))
    medians = median(first["without"]), median(first["with"])
    report = bench.report
    report.figures.append(("first byte, without and with Normalizer", "ms", *medians, ""))
    report.gate(Gate("first byte, later by Normalizer", later, MAX_MENDING_MS, "ms"))
    medians = median(chunks["without"]), median(chunks["with"])
    remark = f"{len(chunks['with'])} chunks"
    report.figures.append(("chunk, without and with Normalizer", "ms", *medians, remark))
    later = medians[1] - medians[0]
    report.gate(Gate("chunk, later by Normalizer", later, MAX_MENDING_MS, "ms"))
    for name, text in bodies.texts():
        took: list[float] = []
        for _ in range(5):
            scanner = K2(Tools({"read_file": None, "run": None}))
            began = time.process_time()
            scanner.feed("content", text)
            scanner.end()
            took.append(time.process_time() - began)
            if scanner.changes:
                raise SystemExit(f"{name} was changed, so its figure means nothing")
        rate = len(text.encode()) / 1e6 / min(took)
        report.figures.append((f"text scanned, {name}", "MB/s", None, rate, "1 MB, whole"))
        report.gate(Gate(f"text scanned, {name}", rate, MIN_SCAN_MB_S, "MB/s", at_least=True))


def _with_and_without(bench: Bench, name: str, streams: int) -> list[tuple[str, Answer]]:
    """Return the answers of two proxies of one age, one of which does not mend."""
    kimi = [number * len(bodies.MODELS) for number in (bench.seed() for _ in range(streams))]
    made = [bodies.Growing((), (bodies.short(seed, True),)) for seed in kimi]
    options = {"with": "normalizer_mend=true", "without": "normalizer_mend=false"}
    with contextlib.ExitStack() as stack:
        fresh = {
            kind: stack.enter_context(
                proxies.ours(bench.folder / f"{kind}-{name}", bench.provider, "mitmdump", 1000, one)
            )
            for kind, one in options.items()
        }
        warm = [[bodies.short(bench.seed() * len(bodies.MODELS), True)] for _ in range(64)]
        for proxy in fresh.values():
            bench.play(proxy, warm, 4, STREAM)
        answers = asyncio.run(_one_by_one(bench, made, fresh["without"], fresh["with"]))
        for proxy in fresh.values():
            _complaints(proxy)
        names = {proxy.pid: kind for kind, proxy in fresh.items()}
        return [(names[proxy.pid], answer) for proxy, answer in answers]


# --- the 40th turn ----------------------------------------------------------------------------

NOISE_MS = 0.2
"""By how much the difference of two proxies' CPU varies from run to run at 200 KB."""


def turns(bench: Bench) -> None:
    """What the chain adds to bare mitmdump's CPU at turn 40 of a conversation, and at turn 4.

    Both turns add the same messages. What reading the longer body may cost more is what one
    `json.loads` of it takes more in this process.
    """
    spent: dict[tuple[str, str], list[float]] = {}
    reading: dict[str, list[float]] = {"4": [], "40": []}
    sizes: dict[str, list[int]] = {"4": [], "40": []}
    for i, pair in bench.rounds(9):
        made = [bodies.aged(bench.seed()) for _ in range(10)]
        kinds = {"4": [early for early, _ in made], "40": [late for _, late in made]}
        for turn in ("4", "40") if i % 4 < 2 else ("40", "4"):
            measured = [one.turns for one in kinds[turn]]
            all_bodies = [body for bodies_ in measured for body in bodies_]
            sizes[turn] += map(len, all_bodies)
            began = time.process_time()
            for body in all_bodies:
                json.loads(body)
            reading[turn].append((time.process_time() - began) / len(all_bodies) * 1000)
            for proxy in pair:
                bench.play(proxy, [one.opening for one in kinds[turn]], 4)
                before = proxy.settled_cpu_s()
                bench.play(proxy, measured, 4)
                took = (proxy.settled_cpu_s() - before) / len(all_bodies) * 1000
                spent.setdefault((turn, proxy.name), []).append(took)
    own: dict[str, float] = {}
    for turn in ("4", "40"):
        bare, ours = median(spent[turn, "bare"]), median(spent[turn, "ours"])
        own[turn] = ours - bare
        size = sum(sizes[turn]) / len(sizes[turn]) / 1000
        remark = f"body {size:.0f} KB, ours alone {own[turn]:.2f} ms"
        bench.report.figures.append((f"CPU at turn {turn}", "ms", bare, ours, remark))
    longer = median(reading["40"]) - median(reading["4"])
    bench.report.gate(
        Gate("own CPU at turn 40 over turn 4", own["40"] - own["4"], longer + NOISE_MS, "ms")
    )


# --- memory -----------------------------------------------------------------------------------


def memory(bench: Bench) -> None:
    """Memory after 1,000 and after 10,000 exchanges, mitmdump and mitmweb; in fresh processes."""
    step = 100 if bench.quick else 1000
    for tool in ("mitmdump", "mitmweb"):
        folder = bench.folder / tool
        with proxies.ours(folder, bench.provider, tool, keep=step) as proxy:
            seen: list[float] = []
            numbers = bodies.numbers(random.Random(tool).randrange(1 << 40))
            for _ in range(10):
                wave = [[bodies.short(next(numbers), False)] for _ in range(step)]
                asyncio.run(play(proxy.port, wave, 8))
                proxy.settled_cpu_s()
                seen.append(proxy.rss_mb())
            _complaints(proxy)
        _all_counted(folder / "store.db", 10 * step)
        steps = " ".join(f"{mb:.0f}" for mb in seen)
        exchanges = f"{10 * step:,} exchanges, {tool}"
        bench.report.figures.append(
            (f"memory, {exchanges}", "MB", None, seen[-1], f"each {step:,}: {steps}")
        )
        gate = bench.report.gate
        gate(Gate(f"memory after {exchanges}", seen[-1], MAX_RSS_MB, "MB"))
        growth = (seen[-1] / seen[0] - 1) * 100
        gate(Gate(f"its growth after {step:,}", growth, MAX_GROWTH_PERCENT, "%"))
        gate(Gate(f"and after {7 * step:,}", seen[-1] - seen[6], MAX_LATE_GROWTH_MB, "MB"))


# --- did it do the work -----------------------------------------------------------------------


def honest(bench: Bench) -> None:
    """Raise SystemExit unless every exchange was counted, priced or not, and recorded."""
    bench._stack.close()
    for proxy in (bench.bare, bench.ours):
        _complaints(proxy)
    _all_counted(bench.folder / "ours" / "store.db", bench.sent)


def _complaints(proxy: Proxy) -> None:
    if text := proxy.complaints():
        raise SystemExit(f"The proxy {proxy.name} complained, so its figures mean nothing:\n{text}")


def _all_counted(path: Path, expected: int) -> None:
    question = (
        'SELECT count(*), count(system_tokens), sum("gen_ai.usage.input_tokens" = 1200 AND '
        '"gen_ai.usage.output_tokens" = 80), count(DISTINCT "gen_ai.request.model") FROM exchanges'
    )
    with closing(sqlite3.connect(path)) as connection:
        found = tuple(connection.execute(question).fetchone())
    if found != (expected, expected, expected, len(bodies.MODELS)):
        raise SystemExit(
            f"Of {expected} exchanges {found[0]} were recorded, {found[1]} counted and {found[2]} "
            f"have the provider's usage, of {found[3]} models: the figures mean nothing."
        )
