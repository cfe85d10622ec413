"""Anthropic messages: https://docs.claude.com/en/api/messages-streaming (SDK 2.11)."""

from collections.abc import Iterator

from .answer import Answer, Json, encode, event, loads_object

_STOP = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


def usage(a: Answer, output: int | None = None) -> Json:
    """Return the usage object. Its three kinds of input are disjoint, unlike OpenAI's."""
    u = a.usage
    return {
        "input_tokens": u.input - u.cached - u.cache_write,
        "cache_creation_input_tokens": u.cache_write,
        "cache_read_input_tokens": u.cached,
        "cache_creation": {
            "ephemeral_5m_input_tokens": u.cache_write,
            "ephemeral_1h_input_tokens": 0,
        },
        "output_tokens": u.output if output is None else output,
        "service_tier": "standard",
    }


def _blocks(a: Answer) -> list[Json]:
    r = a.reply
    blocks: list[Json] = []
    if r.reasoning:
        blocks.append({"type": "thinking", "thinking": r.reasoning, "signature": "c2lnbmF0dXJl"})
    if r.said or not r.tool_calls:
        blocks.append({"type": "text", "text": r.said})
    for call in r.tool_calls:
        given = {"id": call.id, "name": call.name, "input": loads_object(call.arguments)}
        blocks.append({"type": "tool_use", **given})
    return blocks


def complete(a: Answer) -> bytes:
    """Return the body of a reply that was not streamed."""
    return encode(
        {
            "model": a.model,
            "id": a.id("msg_"),
            "type": "message",
            "role": "assistant",
            "content": _blocks(a),
            "stop_reason": _STOP.get(a.reply.finish, a.reply.finish),
            "stop_sequence": None,
            "usage": usage(a),
        }
    )


def stream(a: Answer) -> Iterator[bytes]:
    """Yield the events of a stream, `message_start` to `message_stop`."""

    def named(name: str, **fields: object) -> bytes:
        return event({"type": name, **fields}, name)

    message: Json = {
        "model": a.model,
        "id": a.id("msg_"),
        "type": "message",
        "role": "assistant",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage(a, min(1, a.usage.output)),
    }
    yield named("message_start", message=message)
    calls = iter(a.reply.tool_calls)
    for index, block in enumerate(_blocks(a)):
        match block["type"]:
            case "thinking":
                empty: Json = {"type": "thinking", "thinking": "", "signature": ""}
                deltas: list[Json] = [
                    {"type": "thinking_delta", "thinking": p} for p in a.deltas(block["thinking"])
                ]
                deltas.append({"type": "signature_delta", "signature": block["signature"]})
            case "text":
                empty = {"type": "text", "text": ""}
                deltas = [{"type": "text_delta", "text": p} for p in a.deltas(block["text"])]
            case _:
                empty = {**block, "input": {}}
                deltas = [
                    {"type": "input_json_delta", "partial_json": p}
                    for p in ["", *a.deltas(next(calls).arguments)]
                ]
        yield named("content_block_start", index=index, content_block=empty)
        if index == 0:
            yield named("ping")
        for delta in deltas:
            yield named("content_block_delta", index=index, delta=delta)
        yield named("content_block_stop", index=index)
    # "The token counts shown in the usage field of the message_delta event are cumulative."
    # -- https://docs.claude.com/en/api/messages-streaming
    final = usage(a)
    del final["cache_creation"], final["service_tier"]
    stop = _STOP.get(a.reply.finish, a.reply.finish)
    yield named("message_delta", delta={"stop_reason": stop, "stop_sequence": None}, usage=final)
    yield named("message_stop")


def failure(status: int, message: str, kind: str | None, request_id: str) -> Json:
    """Return the error body."""
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        529: "overloaded_error",
    }
    default = "api_error" if status >= 500 else "invalid_request_error"
    error = {"type": kind or kinds.get(status, default), "message": message}
    return {"type": "error", "error": error, "request_id": request_id}


def stream_failure(a: Answer, message: str) -> bytes:
    """Return the event by which a stream fails after its status line said 200."""
    return event(failure(529, message, a.reply.error_type, a.id("req_")), "error")
