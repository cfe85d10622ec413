"""A request or reply of any dialect as a conversation that a person can read."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator

from msgspec import Raw

from kimi_core import dialects, transcript_saved
from kimi_core.context import Piece, piece
from kimi_core.dialects import Call
from kimi_core.dialects.base import text
from kimi_core.document import Document, NotJSON, decode
from kimi_core.exchange import Message, Part, Reply, Usage
from kimi_core.sse import SSE, JSONArray
from kimi_core.transcript_saved import Left

_MARKS = {"reasoning": "thinking", "tool_call": "calls", "tool_result": "result"}
_MENDED: dict[str, str] = {
    "tool_call": "tool call that came as text",
    "thinking": "thinking in tags",
    "marker": "stray marker",
    "placeholder": "placeholder for nothing",
    "name": "name of a tool",
    "id": "id of a call",
    "finish_reason": "finish reason",
    "dropped": "what belongs to no call",
}


def request(
    call: Call,
    body: bytes,
    count: Callable[[Piece], int] | None = None,
    saved: Collection[Left] = (),
) -> str:
    """Return a request's body as text: who said what, with the tokens of each message.

    `saved` is what was left out of it before it left: where that was is marked, and a list of it
    stands at the end. Raises NotJSON when the body is no JSON object.
    """
    dialect = call.dialect
    document = Document(body, dialect.shape)
    units = list(dialect.units(document))
    model = dialect.model(document, call.model) or "no model"
    head = [model]
    messages = sum(unit.kind == "message" for unit in units)
    head.append(f"{messages} message{'' if messages == 1 else 's'}")
    lines: list[str] = []
    total = 0
    number = 0
    left = transcript_saved.by_message(saved)
    said: dict[int, Message] = {}
    for unit in units:
        tokens = count(piece(unit)) if count else None
        total += tokens or 0
        label: str = unit.kind
        try:
            message = dialect.read(unit)
        except NotJSON:
            message = Message("user", (), bytes(unit.raw))
        if unit.kind == "message":
            number += 1
            label = f"{number} {message.role}"
            said[number] = message
        size = f" · {tokens:,} tokens" if tokens is not None else ""
        masks = left.get(number, ()) if unit.kind == "message" else ()
        if masks:
            size += f" · {sum(mask.tokens for mask in masks):,} left out"
        lines += ["", f"── {label}{size} {'─' * max(3, 60 - len(label) - len(size))}"]
        if unit.kind == "tools":
            lines += _tools(unit.raw)
        else:
            lines += map(transcript_saved.marked, _message(message)) if masks else _message(message)
    if count:
        head.append(f"{total:,} tokens")
    if saved:
        lines += ["", *transcript_saved.lines(saved, said, measured=count is not None)]
    return _printable([" · ".join(head), *lines, ""])


def reply(call: Call, body: bytes, content_type: str) -> str:
    """Return a reply's body, streamed or whole, as text."""
    reader = call.dialect.reader()
    if "event-stream" in content_type:
        framing: SSE | JSONArray = SSE()
    elif body.lstrip().startswith(b"["):
        framing = JSONArray()
    else:
        reader.feed(body)
        return _reply(reader.finish())
    for event in [*framing.feed(body), *framing.end()]:
        if event.data:
            reader.feed(event.data)
    return _reply(reader.finish())


def mended(leaked: object) -> str:
    """Return what was mended in a reply as text: what the model leaked, and what it became.

    `leaked` is a flow's `kimi.leaked`: a list of {kind, leaked, became} as JSON text. What is
    anything else, in a file of flows for instance, is left out; empty when nothing remains.
    """
    try:
        found = json.loads(leaked) if isinstance(leaked, str) else None
    except (ValueError, RecursionError):
        found = None
    mends = [one for one in found if _is_mend(one)] if isinstance(found, list) else []
    if not mends:
        return ""
    head = f"mended · {len(mends)} thing{'' if len(mends) == 1 else 's'}"
    lines = [f"── {head} {'─' * (60 - len(head))}"]
    for number, mend in enumerate(mends, 1):
        lines.append(f"{number}. {_MENDED.get(mend['kind'], ' '.join(mend['kind'].split()))}")
        # Each line has a mark of its own, so that no text can pass for another part of the view.
        lines += [f"   - {line}" for line in mend["leaked"].splitlines()] or ["   (was missing)"]
        lines += [f"   + {line}" for line in mend["became"].splitlines()] or ["   (taken out)"]
    return _printable([*lines, ""])


def _is_mend(value: object) -> bool:
    keys = ("kind", "leaked", "became")
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys)


def usage_line(usage: Usage) -> str:
    """Return what the provider said it used, in one line; empty when it said nothing."""
    said = []
    if usage.input_tokens is not None:
        cached = f" ({usage.cache_read_tokens:,} cached)" if usage.cache_read_tokens else ""
        said.append(f"{usage.input_tokens:,} in{cached}")
    if usage.output_tokens is not None:
        thought = f" ({usage.reasoning_tokens:,} thinking)" if usage.reasoning_tokens else ""
        said.append(f"{usage.output_tokens:,} out{thought}")
    if usage.cost_usd is not None:
        said.append(f"${usage.cost_usd:.6f}")
    return " · ".join(said)


def _reply(reply: Reply) -> str:
    head = [reply.model or "no model"]
    if reply.finish_reason:
        head.append(f"finished: {reply.finish_reason}")
    if reply.error:
        head.append(f"error: {reply.error}")
    if not reply.complete and not reply.error:
        head.append("cut off")
    if line := usage_line(reply.usage):
        head.append(line)
    lines = [" · ".join(head)]
    if thought := "".join(reply.reasoning):
        lines += ["", "── thinking " + "─" * 50, thought]
    if said := "".join(reply.text):
        lines += ["", "── assistant " + "─" * 49, said]
    for call in reply.tool_calls:
        lines += ["", f"── calls {call.name} {call.id} " + "─" * 30, _pretty(call.arguments)]
    return _printable([*lines, ""])


def _printable(lines: list[str]) -> str:
    """Return lines as one text that can be encoded: a lone surrogate is shown by its number."""
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _message(message: Message) -> Iterator[str]:
    if not message.parts and message.raw:
        yield message.raw.decode("utf-8", "replace")
    for part in message.parts:
        yield from _part(part)


def _part(part: Part) -> Iterator[str]:
    if part.kind in ("image", "file"):
        yield f"[{part.kind}]"
        return
    if mark := _MARKS.get(part.kind):
        yield " ".join(word for word in (f"[{mark}]", part.name, part.id) if word)
    yield _pretty(part.text) if part.kind == "tool_call" else part.text


def _tools(raw: bytes | Raw) -> Iterator[str]:
    try:
        definitions = decode(raw)
    except NotJSON:
        definitions = None
    for definition in definitions if isinstance(definitions, list) else []:
        if isinstance(definition, dict):
            yield from _names(definition)


def _names(definition: dict[str, object]) -> Iterator[str]:
    inner = definition.get("function")
    holder = inner if isinstance(inner, dict) else definition
    declared = definition.get("functionDeclarations") or definition.get("function_declarations")
    for one in declared if isinstance(declared, list) else [holder]:
        if isinstance(one, dict):
            said = text(one.get("description")).strip().partition("\n")[0][:100]
            yield f"{text(one.get('name')) or text(one.get('type'))}: {said}".rstrip(": ")


def _pretty(said: str) -> str:
    try:
        return json.dumps(json.loads(said), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return said


def looks_like(method: str, path: str) -> Call | None:
    """Return the call that a flow's request makes, None when it is none with a body."""
    call = dialects.match(method, path)
    return call if call is not None and call.operation != "models" else None
