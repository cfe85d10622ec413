"""Gemini's own API: https://ai.google.dev/api/generate-content (SDK google-genai 3.4)."""

import json
from collections.abc import Iterator

from .answer import Answer, Json, event, loads_object
from .tokens import output_tokens

_FINISH = {
    "stop": "STOP",
    "tool_calls": "STOP",
    "length": "MAX_TOKENS",
    "content_filter": "SAFETY",
}


def _pretty(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def usage(a: Answer, output: int | None = None) -> Json:
    """Return `usageMetadata`; candidates and thoughts are disjoint and both are billed."""
    u = a.usage
    out = u.output if output is None else output
    thoughts = min(u.reasoning, out)
    given: Json = {
        "promptTokenCount": u.input,
        "candidatesTokenCount": out - thoughts,
        "totalTokenCount": u.input + out,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": u.input}],
    }
    if u.cached:
        given["cachedContentTokenCount"] = u.cached
        given["cacheTokensDetails"] = [{"modality": "TEXT", "tokenCount": u.cached}]
    if thoughts:
        given["thoughtsTokenCount"] = thoughts
    return given


def _response(a: Answer, parts: list[Json], spent: int | None, finish: bool) -> Json:
    candidate: Json = {"content": {"parts": parts, "role": "model"}, "index": 0}
    if finish:
        candidate["finishReason"] = _FINISH.get(a.reply.finish, a.reply.finish)
    return {
        "candidates": [candidate],
        "usageMetadata": usage(a, spent),
        "modelVersion": a.model,
        "responseId": a.id("resp"),
    }


def _call_parts(a: Answer) -> list[Json]:
    parts = []
    for call in a.reply.tool_calls:
        given = {"name": call.name, "args": loads_object(call.arguments)}
        if call.id:
            given["id"] = call.id
        parts.append({"functionCall": given, "thoughtSignature": "c2lnbmF0dXJl"})
    return parts


def complete(a: Answer) -> bytes:
    """Return the body of a reply that was not streamed, indented as Google sends it."""
    parts: list[Json] = []
    if a.reply.reasoning:
        parts.append({"text": a.reply.reasoning, "thought": True})
    if a.reply.said:
        parts.append({"text": a.reply.said})
    return _pretty(_response(a, parts + _call_parts(a), None, True))


def _chunks(a: Answer) -> Iterator[Json]:
    spent = 0
    for piece in a.deltas(a.reply.reasoning):
        spent += output_tokens(piece)
        part = {"text": piece, "thought": True}
        yield _response(a, [part], min(spent, a.usage.output), False)
    for piece in a.deltas(a.reply.said):
        spent += output_tokens(piece)
        yield _response(a, [{"text": piece}], min(spent, a.usage.output), False)
    yield _response(a, _call_parts(a) or [{"text": ""}], None, True)


def stream(a: Answer) -> Iterator[bytes]:
    """Yield server-sent events with `?alt=sse`, else the pieces of one JSON array."""
    if "alt=sse" in a.received.query.split("&"):
        yield from map(event, _chunks(a))
        return
    opening = b"["
    for chunk in _chunks(a):
        yield opening + _pretty(chunk)
        opening = b",\r\n"
    yield b"]"


def failure(status: int, message: str, kind: str | None) -> Json:
    """Return the error body."""
    kinds = {
        400: "INVALID_ARGUMENT",
        401: "UNAUTHENTICATED",
        403: "PERMISSION_DENIED",
        404: "NOT_FOUND",
        429: "RESOURCE_EXHAUSTED",
        503: "UNAVAILABLE",
    }
    default = "INTERNAL" if status >= 500 else "INVALID_ARGUMENT"
    named = kind or kinds.get(status, default)
    return {"error": {"code": status, "message": message, "status": named, "details": []}}


def stream_failure(a: Answer, message: str) -> bytes:
    """Return what a failing stream sends last: an event, or an element and the array's end."""
    error = failure(503, message, a.reply.error_type)
    if "alt=sse" in a.received.query.split("&"):
        return event(error)
    return b",\r\n" + _pretty(error) + b"]"
