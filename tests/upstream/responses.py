"""OpenAI Responses: https://platform.openai.com/docs/api-reference/responses-streaming."""

from collections.abc import Iterator

from .answer import CREATED, Answer, Json, encode, event


def usage(a: Answer) -> Json:
    u = a.usage
    return {
        "input_tokens": u.input,
        "input_tokens_details": {"cached_tokens": u.cached, "cache_write_tokens": u.cache_write},
        "output_tokens": u.output,
        "output_tokens_details": {"reasoning_tokens": u.reasoning},
        "total_tokens": u.total,
    }


def _response(a: Answer, status: str, output: list[Json]) -> Json:
    cut = status == "incomplete"
    reason = "content_filter" if a.reply.finish == "content_filter" else "max_output_tokens"
    done = status in ("completed", "incomplete")
    return {
        "id": a.id("resp_"),
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": reason} if cut else None,
        "instructions": None,
        "max_output_tokens": None,
        "model": a.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": usage(a) if done else None,
        "user": None,
        "metadata": {},
    }


def _status(a: Answer) -> str:
    return "incomplete" if a.reply.finish in ("length", "content_filter") else "completed"


def _items(a: Answer) -> list[Json]:
    r = a.reply
    items: list[Json] = []
    if r.reasoning:
        summary = [{"type": "summary_text", "text": r.reasoning}]
        items.append({"id": a.id("rs_"), "type": "reasoning", "summary": summary})
    if r.said or not r.tool_calls:
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": r.said}
        items.append(
            {
                "id": a.id("msg_"),
                "type": "message",
                "status": "completed",
                "content": [part],
                "role": "assistant",
            }
        )
    for i, call in enumerate(r.tool_calls):
        items.append(
            {
                "id": a.id("fc_") + f"{i:02x}",
                "type": "function_call",
                "status": "completed",
                "arguments": call.arguments,
                "call_id": call.id,
                "name": call.name,
            }
        )
    return items


def complete(a: Answer) -> bytes:
    """Return the body of a reply that was not streamed."""
    return encode(_response(a, _status(a), _items(a)))


def stream(a: Answer) -> Iterator[bytes]:
    """Yield the events of a stream; each carries its name twice and a rising number."""
    number = -1

    def named(name: str, **fields: object) -> bytes:
        nonlocal number
        number += 1
        return event({"type": name, "sequence_number": number, **fields}, name)

    yield named("response.created", response=_response(a, "in_progress", []))
    yield named("response.in_progress", response=_response(a, "in_progress", []))
    items = _items(a)
    added: tuple[str, Json] | None
    ended: tuple[str, Json] | None
    for index, item in enumerate(items):
        at = {"item_id": item["id"], "output_index": index}
        match item["type"]:
            case "reasoning":
                empty, text = {**item, "summary": []}, item["summary"][0]["text"]
                where = {**at, "summary_index": 0}
                part = {"type": "summary_text", "text": ""}
                added = ("response.reasoning_summary_part.added", {**where, "part": part})
                delta, done = "response.reasoning_summary_text.delta", {**where, "text": text}
                ended = (
                    "response.reasoning_summary_part.done",
                    {**where, "part": {"type": "summary_text", "text": text}},
                )
            case "message":
                empty = {**item, "status": "in_progress", "content": []}
                text = item["content"][0]["text"]
                where = {**at, "content_index": 0}
                part = {**item["content"][0], "text": ""}
                added = ("response.content_part.added", {**where, "part": part})
                delta, done = "response.output_text.delta", {**where, "text": text}
                done["logprobs"] = []
                ended = ("response.content_part.done", {**where, "part": item["content"][0]})
            case _:
                empty = {**item, "status": "in_progress", "arguments": ""}
                text, where = item["arguments"], at
                added = ended = None
                delta = "response.function_call_arguments.delta"
                done = {**at, "arguments": text}
        yield named("response.output_item.added", output_index=index, item=empty)
        if added:
            yield named(added[0], **added[1])
        for piece in a.deltas(text):
            extra: Json = {"logprobs": []} if item["type"] == "message" else {}
            yield named(delta, **where, delta=piece, **extra)
        yield named(delta.replace(".delta", ".done"), **done)
        if ended:
            yield named(ended[0], **ended[1])
        yield named("response.output_item.done", output_index=index, item=item)
    status = _status(a)
    yield named(f"response.{status}", response=_response(a, status, items))


def stream_failure(a: Answer, message: str, number: int) -> bytes:
    """Return the events by which a stream fails: `error`, then `response.failed`."""
    code = a.reply.error_type or "server_error"
    error = {"type": "error", "code": code, "message": message, "param": None}
    failed = _response(a, "failed", []) | {"error": {"code": code, "message": message}}
    return event({**error, "sequence_number": number}, "error") + event(
        {"type": "response.failed", "sequence_number": number + 1, "response": failed},
        "response.failed",
    )
