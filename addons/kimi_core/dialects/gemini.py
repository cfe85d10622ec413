"""Gemini's own generateContent and streamGenerateContent.

Implements https://ai.google.dev/api/generate-content (read 2026-11-21). The model and the
wish for a stream stand in the path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kimi_core.dialects.base import (
    CATEGORY_OF,
    Dialect,
    Messages,
    Offer,
    ReplyReader,
    Unit,
    any_text,
    mappings,
    text,
    tools_message,
)
from kimi_core.dialects.openai import header_bytes
from kimi_core.document import Document, Shape, decode, encode
from kimi_core.exchange import Category, Message, Part, Role

_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
}


class Gemini(Dialect):
    name = "gemini"
    shape = Shape(
        "model",
        "systemInstruction",
        "system_instruction",
        "tools",
        "generationConfig",
        "generateContentRequest",
        arrays=("contents",),
    )

    def heads(self, document: Document) -> Iterator[Unit]:
        for key in ("systemInstruction", "system_instruction"):
            if raw := document.raw(key):
                yield Unit("system", raw, (key,))
        if raw := document.raw("tools"):
            yield Unit("tools", raw, ("tools",))

    def messages(self, document: Document) -> Messages:
        return Messages(document.elements("contents"), ("contents",))

    def read(self, unit: Unit) -> Message:
        if unit.kind == "tools":
            return tools_message(unit.raw)
        value = decode(unit.raw)
        raw = bytes(unit.raw)
        role: Role = "system" if unit.kind == "system" else "user"
        if isinstance(value, str):
            return Message(role, (Part("text", CATEGORY_OF[role], value),), raw)
        if not isinstance(value, dict):
            return Message(role, (), raw)
        if role == "user" and value.get("role") == "model":
            role = "assistant"
        category = CATEGORY_OF[role]
        given = value.get("parts")
        if isinstance(given, dict):
            parts = tuple(_parts(given, ("parts",), category))
        else:
            parts = tuple(
                part for i, x in mappings(given) for part in _parts(x, ("parts", i), category)
            )
        if parts and all(part.category == "tool_result" for part in parts):
            role = "tool"
        return Message(role, parts, raw)

    def reader(self) -> ReplyReader:
        return _Reader()

    def model(self, document: Document, path_model: str) -> str:
        return path_model

    def streams(self, document: Document, path: str) -> bool:
        return ":streamGenerateContent" in path

    def key(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str:
        return (
            headers.get("x-goog-api-key", "") or query.get("key", "") or super().key(headers, query)
        )

    def error(self, status: int, message: str, type: str = "") -> bytes:
        name = type or _STATUS.get(status, "INTERNAL")
        return encode({"error": {"code": status, "message": message, "status": name}})

    def models(self, offers: Sequence[Offer]) -> bytes:
        return encode(
            {
                "models": [
                    {
                        "name": f"models/{offer.id}",
                        "displayName": offer.id,
                        "supportedGenerationMethods": ["generateContent", "streamGenerateContent"],
                        **({"inputTokenLimit": offer.context} if offer.context else {}),
                    }
                    for offer in offers
                ]
            }
        )


def _parts(part: dict[str, Any], path: tuple[str | int, ...], category: Category) -> Iterator[Part]:
    if isinstance(said := part.get("text"), str):
        kind: Any = "reasoning" if part.get("thought") is True else "text"
        yield Part(kind, category, said, (*path, "text"))
    key, call = _either(part, "functionCall", "function_call")
    if isinstance(call, dict):
        name, id_ = text(call.get("name")), text(call.get("id"))
        said = any_text(call.get("args"))
        yield Part("tool_call", "assistant", said, (*path, key, "args"), name, id_)
    key, result = _either(part, "functionResponse", "function_response")
    if isinstance(result, dict):
        response = result.get("response")
        where: tuple[str | int, ...] = (*path, key, "response")
        name, id_ = text(result.get("name")), text(result.get("id"))
        if isinstance(response, dict):
            # {"output": "..."} or {"stdout": "...", "exit_code": 0}: a text itself can be cut.
            least = _LONG_TEXT if len(response) > 1 else 0
            long = {k: v for k, v in response.items() if isinstance(v, str) and len(v) >= least}
            for inner, said in long.items():
                yield Part("tool_result", "tool_result", said, (*where, inner), name, id_)
            response = {k: v for k, v in response.items() if k not in long}
            if long and not response:
                return
        yield Part("tool_result", "tool_result", any_text(response), where, name, id_)
    key, inline = _either(part, "inlineData", "inline_data")
    if isinstance(inline, dict):
        mime = text(_either(inline, "mimeType", "mime_type")[1])
        kind = "image" if mime.startswith("image/") else "file"
        yield Part(kind, category, "", path, data=header_bytes(text(inline.get("data"))))
    if isinstance(_either(part, "fileData", "file_data")[1], dict):
        yield Part("file", category, "", path)
    for names, field in _CODE:
        key, code = _either(part, *names)
        if isinstance(code, dict) and (said := text(code.get(field))):
            yield Part("other", category, said, (*path, key, field))


_LONG_TEXT = 500
"""From so many characters on, a text among a function's results is a part of its own."""

_CODE = (
    (("executableCode", "executable_code"), "code"),
    (("codeExecutionResult", "code_execution_result"), "output"),
)


def _either(value: Mapping[str, Any], camel: str, snake: str) -> tuple[str, Any]:
    """Return the one of two spellings that is there, and what it holds."""
    key = camel if camel in value else snake
    return key, value.get(key)


class _Reader(ReplyReader):
    def take(self, payload: dict[str, Any]) -> None:
        reply = self.reply
        self._identify(payload, "modelVersion", "responseId")
        if payload.get("error"):
            self._fail(payload["error"], "status", "code")
        feedback = payload.get("promptFeedback")
        if isinstance(feedback, dict) and (reason := text(feedback.get("blockReason"))):
            reply.finish_reason, reply.complete = reason, True
        for _, candidate in mappings(payload.get("candidates")):
            content = candidate.get("content")
            if isinstance(content, dict):
                for _, item in mappings(content.get("parts")):
                    for part in _parts(item, (), "assistant"):
                        if part.kind == "tool_call":
                            self._call(len(self._calls), part.name, part.id, part.text)
                        elif part.kind == "reasoning":
                            reply.reasoning.append(part.text)
                        elif part.kind == "text":
                            reply.text.append(part.text)
            if reason := text(candidate.get("finishReason")):
                reply.finish_reason, reply.complete = reason, True
