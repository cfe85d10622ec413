"""Made-up agentic conversations that grow turn by turn, the same for the same seed.

They have the shape of coding agents' traffic: a long system prompt, tool schemas, a user's wish
now and then, and mostly tool calls with their results: files read with line numbers (the same
ones again and again), listings, searches and test logs.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .reply import Reply, ToolCall
from .routes import Dialect

_VERBS = [
    "load",
    "parse",
    "render",
    "merge",
    "split",
    "store",
    "fetch",
    "check",
    "count",
    "mask",
    "trim",
    "send",
]
_NOUNS = [
    "config",
    "token",
    "stream",
    "record",
    "cache",
    "header",
    "price",
    "session",
    "window",
    "event",
    "rule",
    "batch",
]
_WISHES = (
    "The totals on the report page are wrong when a stream is cut. Find out why and fix it.",
    "Now add a test that fails without your change.",
    "Rename the helper so that its unit is in the name, everywhere it is used.",
    "The same page is slow with many sessions. Measure first, then make it faster.",
)
_THOUGHTS = (
    "Let me look at the code that does this.",
    "I need to see who calls it.",
    "Now I will run the tests to see where we stand.",
    "That explains it. I will check the neighbouring module as well.",
)
_TOOLS: dict[str, tuple[str, dict[str, str]]] = {
    "read_file": ("Read a file with line numbers.", {"path": "Path within the project"}),
    "list_files": ("List a folder, recursively.", {"path": "Folder within the project"}),
    "search": (
        "Search the project for a regular expression.",
        {"pattern": "Regular expression", "path": "Where to search"},
    ),
    "run_command": ("Run a shell command and return its output.", {"command": "The command"}),
    "edit_file": (
        "Replace a text that occurs once in a file.",
        {"path": "Path within the project", "old": "Text to replace", "new": "Its replacement"},
    ),
}


_TOOLS_FROM = 4_000  # a smaller conversation is a chat without tool schemas


@dataclass(frozen=True)
class _Step:
    """One turn: perhaps a user's wish, then what the model answers and the tool's result."""

    wish: str | None
    thought: str
    call: ToolCall
    result: str


def _source(rng: random.Random, lines: int) -> list[str]:
    made: list[str] = []
    while len(made) < lines:
        verb, noun, other = rng.choice(_VERBS), rng.choice(_NOUNS), rng.choice(_NOUNS)
        made += [
            f"def {verb}_{noun}({other}: dict[str, int], limit: int = {rng.randrange(9999)}):",
            f'    """Return the {noun} of a {other}, at most `limit` of it."""',
            f"    {noun} = {other}.get({rng.choice(_NOUNS)!r}, {rng.randrange(100)})",
            f"    if {noun} > limit:",
            f"        raise ValueError(f'{noun} {{{noun}}} is over {{limit}}')",
            f"    return {noun}",
            "",
        ]
    return made[:lines]


class _Project:
    """Files that exist for the length of a conversation."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        names = [f"src/{a}/{b}_{c}.py" for a in _NOUNS for b in _VERBS for c in _NOUNS[:3]]
        self.files = {name: _source(rng, 400) for name in rng.sample(names, 60)}
        self.often = rng.sample(list(self.files), 6)

    def step(self, size: int) -> tuple[str, dict[str, str], str]:
        """Return (tool, arguments, a result of about `size` characters)."""
        tool = self.rng.choices(list(_TOOLS), (45, 8, 17, 22, 8))[0]
        path = self.rng.choice(self.often if self.rng.random() < 0.6 else list(self.files))
        match tool:
            case "read_file":
                lines = (f"{i:5}\t{x}" for i, x in enumerate(self.files[path], 1))
                return tool, {"path": path}, _fit(lines, size)
            case "list_files":
                return tool, {"path": "src"}, _fit(self._listing(), size)
            case "search":
                noun = self.rng.choice(_NOUNS)
                found = (
                    f"{name}:{i}: {line.strip()}"
                    for name, lines in self.files.items()
                    for i, line in enumerate(lines, 1)
                    if noun in line
                )
                return tool, {"pattern": noun, "path": "src"}, _fit(found, size)
            case "run_command":
                return tool, {"command": "python -m pytest -vv"}, _fit(self._log(), size)
            case _:
                old = self.files[path][0]
                given = {"path": path, "old": old, "new": old.replace("limit", "at_most")}
                return tool, given, f"Edited {path}: 1 replacement."

    def _listing(self) -> Iterator[str]:
        for name, lines in self.files.items():
            yield f"-rw-r--r-- 1 dev dev {len(lines) * 31:6} Nov  3 10:14 {name}"

    def _log(self) -> Iterator[str]:
        yield "============================= test session starts =============================="
        n = 0
        while True:
            n += 1
            verb, noun = self.rng.choice(_VERBS), self.rng.choice(_NOUNS)
            name = f"tests/test_{noun}.py::test_{verb}_{noun}[{self.rng.randrange(10_000)}]"
            if self.rng.random() < 0.02:
                yield f"{name} FAILED"
                yield f"E       AssertionError: assert {self.rng.randrange(99)} == {n}"
            else:
                yield f"{name} PASSED [{n % 100:3}%] {self.rng.random():.3f}s"


def _fit(lines: Iterator[str], size: int) -> str:
    made, length = [], 0
    for line in lines:
        made.append(line)
        length += len(line) + 1
        if length >= size:
            break
    return "\n".join(made)


def _system(rng: random.Random, size: int) -> str:
    lines = ["You are a coding agent. Work in small steps and check each with a tool."]
    length = len(lines[0])
    while length < size:
        rule = (
            f"- Before you {rng.choice(_VERBS)} a {rng.choice(_NOUNS)}, "
            f"{rng.choice(_VERBS)} its {rng.choice(_NOUNS)} and say what you found."
        )
        lines.append(rule)
        length += len(rule) + 1
    return "\n".join(lines)


@dataclass(frozen=True)
class _Script:
    system: str
    steps: list[_Step]


def _script(turns: int, size_bytes: int, seed: int) -> _Script:
    rng = random.Random(seed)
    project = _Project(rng)
    system = _system(rng, size_bytes - 400 if turns == 1 else min(8_000, size_bytes // 8))
    # Results differ in length as real ones do, yet add up to what is left of the size.
    weights = [rng.lognormvariate(0, 0.8) for _ in range(turns)]
    tools = 1_200 if size_bytes >= _TOOLS_FROM else 0
    in_last_body = sum(weights[:-1]) or 1.0
    room = max(0, size_bytes - len(system) - tools - 380 * turns)
    steps, owed = [], 0.0
    for i, weight in enumerate(weights):
        share = room * weight / in_last_body + owed
        tool, arguments, result = project.step(int(share * 0.93))
        # JSON escapes newlines and tabs; a short result leaves its room to the next one.
        owed = share - len(json.dumps(result))
        call = ToolCall(f"call{rng.randrange(16**5):05x}", tool, json.dumps(arguments))
        wish = _WISHES[i // 8 % len(_WISHES)] if i % 8 == 0 else None
        steps.append(_Step(wish, rng.choice(_THOUGHTS), call, result))
    return _Script(system, steps)


def conversation(
    turns: int,
    size_bytes: int,
    dialect: Dialect = "openai",
    *,
    seed: int = 0,
    model: str = "fake-large",
    stream: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yield `turns` request bodies of one conversation, each the one before plus what came since.

    The last has about `size_bytes` bytes as compact JSON, but never less than some 450 a turn.
    A turn adds the model's tool call, the tool's result and, every eighth time, a user's message:
    30 turns are about 60 messages. Tool ids are valid for every provider, Mistral included.
    For Gemini model and streaming belong to the path, so the body has neither.
    """
    made = _script(turns, size_bytes, seed)
    body = _BODY[dialect](made.system, model, stream)
    if size_bytes < _TOOLS_FROM:
        del body["tools"]
    history: list[dict[str, Any]] = body[_HISTORY[dialect]]
    for step in made.steps:
        if step.wish:
            history += _WISH[dialect](step.wish)
        yield {**body, _HISTORY[dialect]: list(history)}
        history += _ROUND[dialect](step)


def conversation_replies(turns: int, size_bytes: int, *, seed: int = 0) -> Iterator[Reply]:
    """Yield what the model answers to each body of `conversation` with the same arguments."""
    for step in _script(turns, size_bytes, seed).steps:
        yield Reply(text=step.thought, tool_calls=(step.call,))


_HISTORY: dict[Dialect, str] = {
    "openai": "messages",
    "responses": "input",
    "anthropic": "messages",
    "gemini": "contents",
}


def _schema(parameters: dict[str, str]) -> dict[str, Any]:
    given = {k: {"type": "string", "description": v} for k, v in parameters.items()}
    return {"type": "object", "properties": given, "required": list(parameters)}


def _openai_body(system: str, model: str, stream: bool) -> dict[str, Any]:
    tools = [
        {
            "type": "function",
            "function": {"name": n, "description": d, "parameters": _schema(p)},
        }
        for n, (d, p) in _TOOLS.items()
    ]
    body: dict[str, Any] = {"model": model, "tools": tools, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return {**body, "messages": [{"role": "system", "content": system}]}


def _responses_body(system: str, model: str, stream: bool) -> dict[str, Any]:
    tools = [
        {"type": "function", "name": n, "description": d, "parameters": _schema(p)}
        for n, (d, p) in _TOOLS.items()
    ]
    given = {"model": model, "instructions": system, "tools": tools, "stream": stream}
    return {**given, "input": []}


def _anthropic_body(system: str, model: str, stream: bool) -> dict[str, Any]:
    tools = [
        {"name": n, "description": d, "input_schema": _schema(p)} for n, (d, p) in _TOOLS.items()
    ]
    blocks = [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}]
    given = {"model": model, "max_tokens": 8192, "system": blocks, "tools": tools}
    return {**given, "stream": stream, "messages": []}


def _gemini_body(system: str, model: str, stream: bool) -> dict[str, Any]:
    declared = [
        {"name": n, "description": d, "parameters": _schema(p)} for n, (d, p) in _TOOLS.items()
    ]
    return {
        "systemInstruction": {"parts": [{"text": system}]},
        "tools": [{"functionDeclarations": declared}],
        "contents": [],
    }


def _openai_round(s: _Step) -> list[dict[str, Any]]:
    function = {"name": s.call.name, "arguments": s.call.arguments}
    calls = [{"id": s.call.id, "type": "function", "function": function}]
    return [
        {"role": "assistant", "content": s.thought, "tool_calls": calls},
        {"role": "tool", "tool_call_id": s.call.id, "content": s.result},
    ]


def _responses_round(s: _Step) -> list[dict[str, Any]]:
    said = [{"type": "output_text", "text": s.thought}]
    call = {"call_id": s.call.id, "name": s.call.name, "arguments": s.call.arguments}
    return [
        {"type": "message", "role": "assistant", "content": said},
        {"type": "function_call", **call},
        {"type": "function_call_output", "call_id": s.call.id, "output": s.result},
    ]


def _anthropic_round(s: _Step) -> list[dict[str, Any]]:
    use = {"id": s.call.id, "name": s.call.name, "input": json.loads(s.call.arguments)}
    said = [{"type": "text", "text": s.thought}, {"type": "tool_use", **use}]
    result = {"type": "tool_result", "tool_use_id": s.call.id, "content": s.result}
    return [{"role": "assistant", "content": said}, {"role": "user", "content": [result]}]


def _gemini_round(s: _Step) -> list[dict[str, Any]]:
    call = {"name": s.call.name, "args": json.loads(s.call.arguments)}
    response = {"name": s.call.name, "response": {"output": s.result}}
    return [
        {"role": "model", "parts": [{"text": s.thought}, {"functionCall": call}]},
        {"role": "user", "parts": [{"functionResponse": response}]},
    ]


_BODY = {
    "openai": _openai_body,
    "responses": _responses_body,
    "anthropic": _anthropic_body,
    "gemini": _gemini_body,
}
_WISH: dict[Dialect, Callable[[str], list[dict[str, Any]]]] = {
    "openai": lambda t: [{"role": "user", "content": t}],
    "responses": lambda t: [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t}]}
    ],
    "anthropic": lambda t: [{"role": "user", "content": [{"type": "text", "text": t}]}],
    "gemini": lambda t: [{"role": "user", "parts": [{"text": t}]}],
}
_ROUND = {
    "openai": _openai_round,
    "responses": _responses_round,
    "anthropic": _anthropic_round,
    "gemini": _gemini_round,
}
