"""A coding conversation through the whole chain, without any key: `make demo`.

The provider is the tests' fake one, on loopback; proxy, store and stats page are real, and so are
the clients, the openai and the anthropic SDK. `--keep` leaves all of it running to be looked at.
"""

import argparse
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "addons"))

import anthropic
import httpx
import openai
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bench.proxies import ROOT, Proxy, free_port, running
from kimi_core import report
from upstream import Abort, Framing, Received, Reply, TokenUsage, ToolCall, Upstream
from upstream.tokens import input_tokens

Row = Mapping[str, Any]

KIMI, CLAUDE = "kimi-k2-thinking", "claude-sonnet-4-6"
# Prices in US dollars per million tokens; Claude's come from the bundled price list.
RULES = """\
version: 1
providers:
  moonshot:
    api: openai
    base_url: "{url}/moonshot/v1"
    key: "${{DEMO_KIMI_KEY}}"
    prices: {{kimi-k2-thinking: {{input: 0.60, cached_input: 0.15, output: 2.50}}}}
  anthropic: {{api: anthropic, base_url: "{url}/anthropic/v1", key: "${{DEMO_CLAUDE_KEY}}"}}
models:
  kimi-k2-thinking: {{context: 16384, markup: kimi-k2, targets: [{{provider: moonshot}}]}}
  claude-*: {{context: 200000, targets: [{{provider: anthropic}}]}}
"""
TIMEOUT_S = 10.0

# --- the conversation -------------------------------------------------------------------------

SYSTEM = """You are a coding agent in the project shop. Work in small steps.
- Read before you edit, and edit no more than the task needs.
- Run the tests after each change; a task is done when they pass.
- Say in one sentence what you found before you call a tool.
- Money is in cents, an int; percent is an int from 0 to 100.
- Public functions have a docstring that says what the caller gets.
"""
WISH = "tests/test_totals.py fails since yesterday. Find out why and fix it."
SOURCE = '''\
     1\t"""Totals of an order, in cents."""
     2\t
     3\tfrom shop.order import Line, Order
     4\t
     5\tdef subtotal(line: Line) -> int:
     6\t    """Return what a line costs without its discount."""
     7\t    return line.price * line.quantity
     8\t
     9\tdef discount(line: Line) -> int:
    10\t    """Return what is taken off a line, rounded down."""
    11\t    return subtotal(line) * line.percent // 10
    12\t
    13\tdef total(order: Order) -> int:
    14\t    """Return what the customer pays."""
    15\t    return sum(subtotal(line) - discount(line) for line in order.lines)
'''
FAILING = """\
============================= test session starts ==============================
collected 14 items

tests/test_order.py .........                                            [ 64%]
tests/test_totals.py ..FF.                                               [100%]

=================================== FAILURES ===================================
_________________________ test_ten_percent_off_a_line __________________________
    def test_ten_percent_off_a_line() -> None:
>       assert discount(Line(price=1000, quantity=1, percent=10)) == 100
E       assert 1000 == 100
______________________________ test_total_of_two ______________________________
    def test_total_of_two() -> None:
>       assert total(order(Line(1000, 1, 10), Line(500, 2, 0))) == 1900
E       assert 1000 == 1900
=========================== short test summary info ============================
FAILED tests/test_totals.py::test_ten_percent_off_a_line - assert 1000 == 100
FAILED tests/test_totals.py::test_total_of_two - assert 1000 == 1900
========================= 2 failed, 12 passed in 0.31s =========================
"""
PASSING = """\
============================= test session starts ==============================
collected 14 items

tests/test_order.py .........                                            [ 64%]
tests/test_totals.py .....                                               [100%]

============================== 14 passed in 0.29s ==============================
"""
OLD, NEW = "subtotal(line) * line.percent // 10\n", "subtotal(line) * line.percent // 100\n"


@dataclass(frozen=True)
class Step:
    """What the model says, the tool it calls, and what the tool gives."""

    thought: str
    says: str
    tool: str = ""
    arguments: dict[str, str] = field(default_factory=dict)
    result: str = ""

    def call(self, number: int) -> ToolCall:
        return ToolCall(f"{self.tool}:{number}", self.tool, json.dumps(self.arguments))


STEPS = (
    Step(
        "The failing test is about totals, so the code under it comes first.",
        "I will read the module that the test is about.",
        "read_file",
        {"path": "src/shop/totals.py"},
        SOURCE,
    ),
    Step(
        "Line 11 divides by 10 where percent goes to 100. The test will tell.",
        "The discount looks ten times too high; the tests will show it.",
        "run_tests",
        {"path": "tests"},
        FAILING,
    ),
    Step(
        "1000 instead of 100: the divisor it is.",
        "As expected: 10 percent of 1000 came out as 1000.",
        "edit_file",
        {"path": "src/shop/totals.py", "old": OLD, "new": NEW},
        "Edited src/shop/totals.py: 1 replacement.",
    ),
    Step(
        "Now the whole suite again, not only the two.",
        "I will run all tests again.",
        "run_tests",
        {"path": "tests"},
        PASSING,
    ),
    Step(
        "All 14 pass, nothing else changed.",
        "Fixed: `discount` divided the percentage by 10 instead of 100. All 14 tests pass now.",
    ),
)


def _tool(name: str, does: str, *parameters: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {p: {"type": "string"} for p in parameters},
        "required": list(parameters),
    }
    return {
        "type": "function",
        "function": {"name": name, "description": does, "parameters": schema},
    }


TOOLS = [
    _tool("read_file", "Read a file of the project with line numbers.", "path"),
    _tool("run_tests", "Run pytest on a path and return what it printed.", "path"),
    _tool("edit_file", "Replace a text that occurs once in a file.", "path", "old", "new"),
]


class CachingProvider:
    """Answers as scripted, and bills what it has seen before as cached, as Moonshot does."""

    def __init__(self) -> None:
        self._known = 0

    def answering(self, reply: Reply) -> Callable[[Received], Reply]:
        def answer(received: Received) -> Reply:
            said = "".join((reply.reasoning, reply.said, *(c.arguments for c in reply.tool_calls)))
            known, self._known = self._known, input_tokens(received.body)
            usage = TokenUsage(
                input=self._known,
                output=-(-len(said) // 4),
                cached=min(known, self._known) // 64 * 64,
                reasoning=-(-len(reply.reasoning) // 4),
            )
            return Reply(
                text=reply.said,
                reasoning=reply.reasoning,
                tool_calls=reply.tool_calls,
                usage=usage,
                provider="moonshot",
                framing=reply.framing,
            )

        return answer


PACE = Framing(first_delay_s=0.12, delay_s=0.004)


def script(up: Upstream) -> None:
    """Tell the fake provider what to answer, in the order of `play`."""
    moonshot = CachingProvider()
    replies = [
        Reply(
            text=step.says,
            reasoning=step.thought,
            tool_calls=(step.call(i),) if step.tool else (),
            framing=PACE,
        )
        for i, step in enumerate(STEPS)
    ]
    # How the cut one begins; its usage would have come with the last event.
    cut = Framing(first_delay_s=0.12, delay_s=0.004, abort=Abort(after=4_000, how="close"))
    path = "/moonshot/v1/chat/completions"
    up.script(path, *(moonshot.answering(reply) for reply in replies))
    up.script(path, moonshot.answering(Reply(text="Divide discounts by 100", framing=PACE)))
    busy = "The engine is currently overloaded, please try again later"
    up.script(path, Reply(status=429, error=busy, error_type="engine_overloaded_error"))
    up.script(path, Reply(size=2_000, provider="moonshot", framing=cut))
    said = "The change is right: percent is 0 to 100. A test for 100 percent would be worth having."
    up.script(
        "/anthropic/v1/messages",
        Reply(text=said, usage=TokenUsage(input=2_412, output=31, cached=2_048), framing=PACE),
    )


# --- the clients ------------------------------------------------------------------------------


@dataclass
class Player:
    """Plays the client's part and tells as it goes."""

    console: Console
    kimi: openai.OpenAI
    claude: anthropic.Anthropic
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    """What the proxy told a client, by what it was."""

    def play(self) -> int:
        """Have all exchanges, and return how many there were."""
        messages: list[Any] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": WISH},
        ]
        self._tell("you", WISH)
        for i, step in enumerate(STEPS):
            self._turn(messages)
            self._tell("kimi", step.says)
            said: dict[str, Any] = {"role": "assistant", "content": step.says}
            said["reasoning_content"] = step.thought
            if step.tool:
                call = step.call(i)
                function = {"name": call.name, "arguments": call.arguments}
                said["tool_calls"] = [{"id": call.id, "type": "function", "function": function}]
                result = {"role": "tool", "tool_call_id": call.id, "content": step.result}
                messages += [said, result]
                shown = step.result.strip().splitlines()[-1].strip("= ")
                self._tell(step.tool, shown if step.tool != "read_file" else "15 lines")
            else:
                messages.append(said)
        messages.append({"role": "user", "content": "Give me a subject line for the commit."})
        self._tell("you", "Give me a subject line for the commit.")
        self._whole(messages)
        self._review()
        self._refused(messages)
        self._cut(messages)
        return len(STEPS) + 4

    def _turn(self, messages: list[Any]) -> None:
        raw = self.kimi.chat.completions.with_raw_response.create(
            model=KIMI,
            messages=messages,
            tools=TOOLS,  # type: ignore[arg-type]
            stream=True,
        )
        self.headers.setdefault("a streamed reply", _ours(raw.headers))
        for _ in raw.parse():
            pass

    def _whole(self, messages: list[Any]) -> None:
        raw = self.kimi.chat.completions.with_raw_response.create(model=KIMI, messages=messages)
        self.headers["a reply that was not streamed"] = _ours(raw.headers)
        self._tell("kimi", raw.parse().choices[0].message.content or "")

    def _review(self) -> None:
        wish = f"Review this change.\n-    return {OLD}+    return {NEW}"
        self._tell("you", "Review this change. (to Claude, by the anthropic SDK)")
        with self.claude.messages.stream(
            model=CLAUDE,
            max_tokens=1024,
            system=SYSTEM,
            messages=[{"role": "user", "content": wish}],
        ) as stream:
            self._tell("claude", stream.get_final_text())

    def _refused(self, messages: list[Any]) -> None:
        try:
            self.kimi.chat.completions.create(model=KIMI, messages=messages)
        except openai.RateLimitError as error:
            said = error.body.get("message") if isinstance(error.body, dict) else error.message
            self._tell("error", f"429 from the provider: {said}")

    def _cut(self, messages: list[Any]) -> None:
        came = 0
        try:
            stream = self.kimi.chat.completions.create(model=KIMI, messages=messages, stream=True)
            for chunk in stream:
                came += len(chunk.choices[0].delta.content or "") if chunk.choices else 0
        except _cut_streams():
            self._tell("error", f"the provider hung up after {came} characters")

    def _tell(self, who: str, what: str) -> None:
        styles = {"you": "bold", "error": "red", "kimi": "magenta", "claude": "magenta"}
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(justify="right", width=11)
        line.add_row(Text(who, style=styles.get(who, "cyan")), Text(what))
        self.console.print(line)


def _cut_streams() -> tuple[type[Exception], ...]:
    """Return what the SDK raises when a body ends early: its own, or its HTTP client's error."""
    newer = sys.modules.get("httpx2")
    return openai.APIError, httpx.TransportError, *((newer.TransportError,) if newer else ())


def _ours(headers: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in headers.items() if k.lower().startswith("x-kimi-proxy")}


# --- what the proxy saw -----------------------------------------------------------------------


@dataclass(frozen=True)
class Api:
    """The stats page's JSON API."""

    port: int
    token: str

    def get(self, path: str) -> Any:
        answer = httpx.get(
            f"http://127.0.0.1:{self.port}/api/{path}",
            headers={"authorization": f"Bearer {self.token}"},
            trust_env=False,
        )
        answer.raise_for_status()
        return answer.json()

    def exchanges(self, count: int) -> list[Row]:
        """Return the exchanges, oldest first, as soon as there are `count`."""
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            rows: list[Row] = self.get("export/json")
            if len(rows) >= count:
                return sorted(rows, key=lambda row: row["started_at"])
            time.sleep(0.05)
        raise SystemExit(f"Only {len(rows)} of {count} exchanges were recorded.")


_MARKS = {"usage": "", "tokenizer": " t", "estimate": " ~", "calibrated": " ~", None: ""}


def show_exchanges(console: Console, rows: Sequence[Row]) -> None:
    said = ("exchange", "status", "in", "cached", "out", "cost", "first", "whole")
    cells = []
    wide = console.width >= 100
    for i, row in enumerate(rows, 1):
        provider = f" at {row['gen_ai.provider.name']}" if wide else ""
        status = str(row["status"] or "-") + (" cut" if row["partial"] else "")
        cells.append(
            (
                f"{i} {row['gen_ai.response.model']}{provider}",
                status,
                _tokens(row, "input"),
                report.number(row["gen_ai.usage.cache_read.input_tokens"] or 0),
                _tokens(row, "output"),
                "-" if row["cost_usd"] is None else f"${row['cost_usd']:.6f}",
                _ms(row["time_to_first_chunk_s"]),
                _ms(row["duration_s"]),
            )
        )
    show_table(console, said, cells)
    note(
        console,
        "first: until the reply's first chunk. No mark: the provider's own usage; t: counted by "
        "the model's own tokenizer, since the provider did not get to say it; ~: estimated with "
        "another one.",
    )


def _tokens(row: Row, kind: str) -> str:
    count = row[f"gen_ai.usage.{kind}_tokens"]
    return "-" if count is None else f"{count:,}{_MARKS[row[f'{kind}_source']]}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:,.0f} ms"


def show_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not console.is_terminal:
        text = report.plain_table(header, rows)
        console.print("\n".join(f"  {line}" for line in text.splitlines()), soft_wrap=True)
        return
    table = Table(box=None, padding=(0, 0, 0, 2), header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        failed = any(cell.startswith(("4", "5", "-")) or "cut" in cell for cell in row[1:2])
        table.add_row(*row, style="red" if failed else None)
    console.print(table)


def show_context(console: Console, row: Row) -> None:
    kinds = ("system", "tools", "user", "assistant", "tool_result", "memory")
    parts = {kind: row[f"{kind}_tokens"] or 0 for kind in kinds}
    whole = sum(parts.values())
    for kind, tokens in parts.items():
        bar = "#" * round(40 * tokens / whole)
        name = kind.replace("_", " ")
        console.print(
            f"  {name:<12}{tokens:>6,}  {100 * tokens / whole:3.0f} %  [cyan]{bar}[/]",
            highlight=False,
        )
    note(
        console,
        f"{whole:,} tokens in {row['messages']} messages, counted by Kimi's own tokenizer; each "
        "message once, when it was new. (The fake provider bills a token per four bytes.)",
    )


def show_sessions(console: Console, sessions: Sequence[Row]) -> None:
    for session in sessions:
        gauge = session["gauge"]
        if gauge["percentage"] is None:
            continue
        bar = "#" * max(1, round(gauge["percentage"] * 0.4))
        console.print(
            f"  {session['id'][:16]:<17}[{gauge['color']}]{bar:.<40}[/] "
            f"{gauge['percentage']:.1f} % of {gauge['window']:,} tokens, {gauge['color']}",
            highlight=False,
        )


def heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", highlight=False)


def note(console: Console, text: str) -> None:
    console.print(Padding(Text(text), (0, 0, 0, 2)), style="dim")


# --- all of it --------------------------------------------------------------------------------


@contextmanager
def chain(folder: Path, upstream_url: str, tool: str, api: Api, web: Api) -> Iterator[Proxy]:
    """Run mitmdump or mitmweb with the whole chain and a store of its own."""
    (folder / "rules.yaml").write_text(RULES.format(url=upstream_url))
    given = [
        *("-s", str(ROOT / "addons" / "all.py")),
        *("--set", f"kimi_rules={folder / 'rules.yaml'}"),
        *("--set", f"kimi_store={folder / 'demo.db'}"),
        *("--set", f"stats_port={api.port}", "--set", f"stats_token={api.token}"),
    ]
    if tool == "mitmweb":
        given += ["--no-web-open-browser", "--web-port", str(web.port)]
        given += ["--set", f"web_password={web.token}"]
    keys = {
        name: f"sk-demo-{secrets.token_hex(8)}" for name in ("DEMO_KIMI_KEY", "DEMO_CLAUDE_KEY")
    }
    with running(tool, tool, folder, given, **keys) as proxy:
        yield proxy


def demo(console: Console, keep: bool) -> None:
    api, web = (Api(free_port(), secrets.token_urlsafe(16)) for _ in range(2))
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        Upstream(tls=False) as up,
        chain(Path(folder), up.http_url, "mitmweb" if keep else "mitmdump", api, web) as proxy,
    ):
        script(up)
        url = f"http://127.0.0.1:{proxy.port}"
        heading(console, "kimi-proxy in two minutes: no key, no network, a fake provider")
        note(
            console,
            f"The clients are the real SDKs; all they know is OPENAI_BASE_URL={url}/v1 and "
            f"ANTHROPIC_BASE_URL={url}. The keys are the proxy's.",
        )
        console.print()
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as kimi,
            anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as claude,
        ):
            player = Player(console, kimi, claude)
            count = player.play()
        rows = api.exchanges(count)
        heading(console, "What each exchange took")
        show_exchanges(console, rows)
        heading(console, "What the client is told, in headers")
        for what, headers in player.headers.items():
            console.print(f"  {what}:", style="dim")
            for name, value in sorted(headers.items()):
                console.print(f"    {name}: {value}", highlight=False)
        heading(console, "Where the context goes: the last turn with tools")
        show_context(console, rows[len(STEPS) - 1])
        heading(console, "How full each session's window is")
        show_sessions(console, api.get("sessions")["sessions"])
        heading(console, "All of it, by model")
        sums = report.by_model(rows)
        show_table(console, report.HEADER, report.lines(sums, report.total(rows)))
        if complaints := proxy.complaints():
            console.print(f"\nThe proxy warned:\n{complaints}", style="yellow", markup=False)
        if keep:
            heading(console, "Look at it, until Ctrl-C:")
            console.print(
                f"  stats page  http://127.0.0.1:{api.port}/?token={api.token}\n"
                f"  mitmweb     http://127.0.0.1:{web.port}/?token={web.token}\n"
                f"  proxy       {url}, whose provider answers anything now",
                highlight=False,
                soft_wrap=True,
            )
            signal.pause()
        else:
            heading(console, "Look at it live:")
            console.print(
                "  make run               proxy 8080, mitmweb 8081, stats page 8082; keys in .env\n"
                "  tests/demo.py --keep   this demo, left running to be browsed",
                highlight=False,
            )


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave everything running to browse")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    # A proxy of the surroundings must not get between the SDKs and ours.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=110, color_system=None)
    try:
        demo(console, given.keep)
    except KeyboardInterrupt:
        return 0 if given.keep else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
