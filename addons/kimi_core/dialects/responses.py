"""OpenAI Responses.

Implements https://platform.openai.com/docs/api-reference/responses (read 2026-11-21), and
what Codex adds: tools as an `additional_tools` item of the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kimi_core.dialects.base import (
    CATEGORY_OF,
    Messages,
    ReplyReader,
    Unit,
    any_text,
    json_text,
    mappings,
    text,
    tools_message,
)
from kimi_core.dialects.openai import _ROLES, OpenAI, content_part, header_bytes
from kimi_core.document import Document, Shape, decode, encode
from kimi_core.exchange import Message, Part, Role


class Responses(OpenAI):
    name = "responses"
    shape = Shape(
        "model",
        "stream",
        "input",
        "instructions",
        "tools",
        "max_output_tokens",
        "prompt_cache_key",
        "conversation",
        "previous_response_id",
    )

    def heads(self, document: Document) -> Iterator[Unit]:
        if raw := document.raw("instructions"):
            yield Unit("system", raw, ("instructions",))
        if raw := document.raw("tools"):
            yield Unit("tools", raw, ("tools",))

    def messages(self, document: Document) -> Messages:
        given = document.raw("input")
        if given.startswith(b"["):
            return Messages(document.elements("input"), ("input",))
        return Messages([given] if given else [], ("input",), listed=False)

    def read(self, unit: Unit) -> Message:
        if unit.kind == "tools":
            return tools_message(unit.raw)
        value = decode(unit.raw)
        raw = bytes(unit.raw)
        if isinstance(value, str):
            role: Role = "system" if unit.kind == "system" else "user"
            return Message(role, (Part("text", CATEGORY_OF[role], value),), raw)
        if not isinstance(value, dict):
            return Message("user", (), raw)
        role, parts = _item(value)
        return Message(role, tuple(parts), raw)

    def reader(self) -> ReplyReader:
        return _Reader()

    def asks_usage(self, document: Document) -> bool:
        return True  # the terminal event always carries it

    def client_session(self, document: Document) -> str:
        conversation = document.get("conversation")
        if isinstance(conversation, dict):
            conversation = conversation.get("id")
        return text(document.get("prompt_cache_key")) or text(conversation)

    def error_event(self, status: int, message: str, type: str = "") -> bytes:
        payload = {"type": "error", "code": type or str(status), "message": message, "param": None}
        return b"event: error\ndata: " + encode(payload) + b"\n\n"


def _item(value: dict[str, Any]) -> tuple[Role, list[Part]]:
    type_ = text(value.get("type"))
    id_ = text(value.get("call_id"))
    if type_ in ("", "message"):
        role = _ROLES.get(text(value.get("role")), "user")
        content = value.get("content")
        category = CATEGORY_OF[role]
        if isinstance(content, str):
            return role, [Part("text", category, content, ("content",))]
        return role, [content_part(x, ("content", i), category) for i, x in mappings(content)]
    if type_ == "additional_tools":
        return "system", [Part("other", "tools", json_text(value))]
    if type_ == "reasoning" or "encrypted_content" in value:
        pieces = [
            Part("reasoning", "assistant", text(item.get("text")), (key, index, "text"))
            for key in ("summary", "content")
            for index, item in mappings(value.get(key))
        ]
        if sealed := text(value.get("encrypted_content")):
            pieces.append(Part("reasoning", "assistant", "", ("encrypted_content",), id=sealed[:8]))
        return "assistant", pieces
    if type_.endswith("_output"):
        output = value.get("output")
        if isinstance(output, str):
            return "tool", [Part("tool_result", "tool_result", output, ("output",), id=id_)]
        if isinstance(output, list):
            return "tool", [
                content_part(x, ("output", i), "tool_result", "tool_result", id=id_)
                for i, x in mappings(output)
            ]
        if isinstance(output, dict) and output.get("type") == "computer_screenshot":
            return "tool", [content_part(output, ("output",), "tool_result", "tool_result", id=id_)]
        return "tool", [Part("tool_result", "tool_result", any_text(output), ("output",), id=id_)]
    if type_.endswith("_call"):
        for key in ("arguments", "input", "action"):
            if key in value:
                name = text(value.get("name")) or type_
                said = any_text(value[key])
                return "assistant", [Part("tool_call", "assistant", said, (key,), name, id_)]
        if image := text(value.get("result")):  # image_generation_call
            data = header_bytes(image)
            return "assistant", [Part("image", "assistant", "", ("result",), data=data)]
        return "assistant", [Part("other", "assistant", json_text(value))]
    return "user", [Part("other", "user", json_text(value))]


class _Reader(ReplyReader):
    def take(self, payload: dict[str, Any]) -> None:
        reply = self.reply
        type_ = text(payload.get("type"))
        if not type_:  # a whole response
            if payload.get("error"):
                self._fail(payload["error"], "type", "code")
            if payload.get("object") == "response":
                self._whole(payload)
                self._output(payload)
        elif type_ == "error":
            error = payload.get("error")
            if isinstance(error, dict):
                self._fail(error, "type", "code")
            else:
                self._fail(payload, "code")
        elif type_ in ("response.output_text.delta", "response.refusal.delta"):
            reply.text.append(text(payload.get("delta")))
        elif type_ in ("response.reasoning_text.delta", "response.reasoning_summary_text.delta"):
            reply.reasoning.append(text(payload.get("delta")))
        elif type_ == "response.output_item.added":
            item = payload.get("item")
            if isinstance(item, dict) and text(item.get("type")).endswith("_call"):
                name = text(item.get("name")) or item["type"]
                self._call(payload.get("output_index"), name, item.get("call_id"))
        elif type_ == "response.output_item.done":
            index = payload.get("output_index")
            for part in _item(item)[1] if isinstance(item := payload.get("item"), dict) else ():
                # Calls of server-side tools, and those of vLLM, come without deltas.
                if part.kind == "tool_call" and not self._has_arguments(index):
                    self._call(index, part.name, part.id, part.text)
        elif type_ in (
            "response.function_call_arguments.delta",
            "response.custom_tool_call_input.delta",
        ):
            self._call(payload.get("output_index"), arguments=payload.get("delta"))
        elif isinstance(response := payload.get("response"), dict):
            self._whole(response)
            if type_ in ("response.completed", "response.incomplete", "response.failed"):
                reply.complete = True
                if not reply.text and not reply.reasoning and not self._calls:
                    self._output(response)

    def _whole(self, response: dict[str, Any]) -> None:
        reply = self.reply
        self._identify(response)
        status = text(response.get("status"))
        if status in ("completed", "incomplete", "failed", "cancelled"):
            reply.complete = True
            details = response.get("incomplete_details")
            reason = text(details.get("reason")) if isinstance(details, dict) else ""
            reply.finish_reason = reason or status
        if status == "failed":
            self._fail(response.get("error"), "code", "type")

    def _output(self, response: dict[str, Any]) -> None:
        for index, item in mappings(response.get("output")):
            _, parts = _item(item)
            for part in parts:
                if part.kind == "tool_call":
                    self._call(index, part.name, part.id, part.text)
                elif part.kind == "reasoning":
                    self.reply.reasoning.append(part.text)
                elif part.kind == "text":
                    self.reply.text.append(part.text)
