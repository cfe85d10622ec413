"""OpenAI chat completions, and what each compatible provider makes of them.

https://platform.openai.com/docs/api-reference/chat and the providers' SDKs, as summed up in
the table of quirks below (read November 2026).
"""

import re
from collections.abc import Iterator
from typing import Any

from .answer import CREATED, Answer, Json, encode, event

DONE = b"data: [DONE]\n\n"

# Providers whose thinking goes by another name than `reasoning_content`.
_REASONING = {"groq": "reasoning", "cerebras": "reasoning", "openrouter": "reasoning"}
# Providers that send a tool call whole in one delta instead of its arguments in pieces.
_WHOLE_CALLS = {"mistral", "groq", "gemini", "vertex"}
# Providers that send `usage` with the finish chunk although nobody asked.
_USAGE_UNASKED = {"mistral", "cerebras", "openrouter"}
# Providers that send the usage so far on every chunk: to be overwritten, never added up.
_USAGE_ALWAYS = {"nvidia", "siliconflow"}
_TIMES = {"queue_time": 0.01, "prompt_time": 0.02, "completion_time": 0.3, "total_time": 0.33}

# https://docs.mistral.ai/api: anything else is answered with 422 `extra_forbidden`.
MISTRAL_FIELDS = frozenset(
    [
        "model",
        "messages",
        "temperature",
        "top_p",
        "max_tokens",
        "stream",
        "stop",
        "random_seed",
        "metadata",
        "response_format",
        "tools",
        "tool_choice",
        "presence_penalty",
        "frequency_penalty",
        "n",
        "prediction",
        "parallel_tool_calls",
        "prompt_mode",
        "reasoning_effort",
        "guardrails",
        "safe_prompt",
        "prompt",
        "prompt_cache_key",
        "suffix",
        "min_tokens",
    ]
)
_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")


def usage(a: Answer, output: int | None = None) -> Json:
    """Return the usage object; `output` is what has been generated so far, default all of it."""
    u = a.usage
    out = u.output if output is None else output
    given: Json = {
        "prompt_tokens": u.input,
        "completion_tokens": out,
        "total_tokens": u.input + out,
    }
    match a.provider:
        case "openai":
            given["prompt_tokens_details"] = {"cached_tokens": u.cached, "audio_tokens": 0}
            given["completion_tokens_details"] = {
                "reasoning_tokens": u.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            }
        case "moonshot" | "kimi-code":
            if u.cached:
                given["cached_tokens"] = u.cached
        case "groq":
            given |= _TIMES
            if u.cached:
                given["prompt_tokens_details"] = {"cached_tokens": u.cached}
        case "cerebras":
            given["prompt_tokens_details"] = {"cached_tokens": u.cached}
        case "gemini" | "vertex":
            # Hidden thinking is only in the total.
            given["completion_tokens"] = max(0, out - u.reasoning)
        case "openrouter":
            given |= {
                "cost": round(u.input * 6e-7 + out * 2.5e-6, 9),
                "is_byok": False,
                "prompt_tokens_details": {"cached_tokens": u.cached, "audio_tokens": 0},
                "cost_details": {"upstream_inference_cost": None},
                "completion_tokens_details": {"reasoning_tokens": u.reasoning},
            }
        case _:
            if u.cached:
                given["prompt_tokens_details"] = {"cached_tokens": u.cached}
            if u.reasoning:
                given["completion_tokens_details"] = {"reasoning_tokens": u.reasoning}
    return given


def _calls(a: Answer, *, indexed: bool) -> list[Json]:
    calls = []
    for i, call in enumerate(a.reply.tool_calls):
        made: Json = {"index": i} if indexed else {}
        made |= {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        if a.provider in ("gemini", "vertex"):
            made["extra_content"] = {"google": {"thought_signature": "c2lnbmF0dXJl"}}
        calls.append(made)
    return calls


def _message(a: Answer) -> Json:
    r = a.reply
    message: Json = {"role": "assistant", "content": r.said or None}
    if a.provider == "openai":
        message |= {"refusal": None, "annotations": []}
    if r.reasoning and a.provider == "mistral":
        message["content"] = [_mistral_thinking(r.reasoning), {"type": "text", "text": r.said}]
    elif r.reasoning:
        message[_REASONING.get(a.provider, "reasoning_content")] = r.reasoning
    if r.tool_calls:
        message["tool_calls"] = _calls(a, indexed=False)
    return message


def _mistral_thinking(text: str) -> Json:
    return {"type": "thinking", "thinking": [{"type": "text", "text": text}]}


def complete(a: Answer) -> bytes:
    """Return the body of a reply that was not streamed."""
    choice: Json = {
        "index": 0,
        "message": _message(a),
        "logprobs": None,
        "finish_reason": a.reply.finish,
    }
    body: Json = {
        "id": a.id("chatcmpl-"),
        "object": "chat.completion",
        "created": CREATED,
        "model": a.model,
        "choices": [choice],
        "usage": usage(a),
    }
    match a.provider:
        case "openai":
            body |= {"service_tier": "default", "system_fingerprint": "fp_fake"}
        case "groq":
            body["x_groq"] = {"id": a.id("req_")}
        case "cerebras":
            body["time_info"] = _TIMES | {"created": CREATED}
        case "openrouter":
            body["provider"] = "Fake"
            choice["native_finish_reason"] = a.reply.finish
    return encode(body)


def stream(a: Answer) -> Iterator[bytes]:
    """Yield the events of a stream."""
    r, provider = a.reply, a.provider
    asked = a.received.include_usage
    base: Json = {
        "id": a.id("chatcmpl-"),
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": a.model,
    }
    if provider == "openai":
        base |= {"service_tier": "default", "system_fingerprint": "fp_fake"}
    elif provider == "openrouter":
        base["provider"] = "Fake"
        # "SSE comments ... to prevent connection timeouts. These comments can be ignored"
        # -- https://openrouter.ai/docs/api-reference/streaming
        yield b": OPENROUTER PROCESSING\n\n"
    sent = ""

    def chunk(delta: Json, finish: str | None = None) -> Json:
        choice: Json = {"index": 0, "delta": delta, "finish_reason": finish}
        if provider == "openai":
            choice["logprobs"] = None
        elif provider == "openrouter":
            choice["native_finish_reason"] = finish
        made = {**base, "choices": [choice]}
        if provider in _USAGE_ALWAYS:
            made["usage"] = usage(a, a.usage.output if finish else a.spent(sent))
        elif provider == "openai":
            made["obfuscation"] = "x" * 8
            if asked:
                # "All other chunks will also include a usage field, but with a null value."
                # -- https://platform.openai.com/docs/api-reference/chat/create
                made["usage"] = None
        return made

    first = chunk({"role": "assistant", "content": ""})
    if provider == "openai":
        first["choices"][0]["delta"]["refusal"] = None
    elif provider == "groq":
        first["x_groq"] = {"id": a.id("req_")}
    yield event(first)

    for piece in a.deltas(r.reasoning):
        sent += piece
        delta: Json = {_REASONING.get(provider, "reasoning_content"): piece}
        if provider == "mistral":
            delta = {"content": [_mistral_thinking(piece)]}
        elif provider == "openrouter":
            delta["reasoning_details"] = [{"type": "reasoning.text", "text": piece, "index": 0}]
        yield event(chunk(delta))
    for piece in a.deltas(r.said):
        sent += piece
        yield event(chunk({"content": piece}))

    last: Json = {"content": ""} if provider == "mistral" else {}
    whole = _calls(a, indexed=True)
    if whole and provider == "mistral":
        last["tool_calls"] = whole
    elif whole and provider in _WHOLE_CALLS:
        yield event(chunk({"tool_calls": whole}))
    else:
        for call in whole:
            arguments, function = call["function"]["arguments"], call["function"]
            call["function"] = {**function, "arguments": ""}
            yield event(chunk({"tool_calls": [call]}))
            for piece in a.deltas(arguments):
                sent += piece
                delta = {"index": call["index"], "function": {"arguments": piece}}
                yield event(chunk({"tool_calls": [delta]}))

    finish = chunk(last, r.finish)
    if provider in _USAGE_UNASKED:
        finish["usage"] = usage(a)
    if provider in ("moonshot", "kimi-code"):
        finish["choices"][0]["usage"] = usage(a)
    elif provider == "groq":
        finish["x_groq"] = {"id": a.id("req_"), "usage": usage(a)}
    elif provider == "cerebras":
        finish["time_info"] = _TIMES | {"created": CREATED}
    yield event(finish)

    if asked and provider not in _USAGE_ALWAYS | _USAGE_UNASKED | {"moonshot"}:
        yield event({**base, "choices": [], "usage": usage(a)})
    yield DONE


def failure(status: int, message: str, kind: str | None) -> Json:
    """Return the error body."""
    kinds: dict[int, tuple[str, str | None]] = {
        401: ("invalid_request_error", "invalid_api_key"),
        403: ("permission_error", None),
        404: ("invalid_request_error", "model_not_found"),
        429: ("requests", "rate_limit_exceeded"),
    }
    default = ("server_error", None) if status >= 500 else ("invalid_request_error", None)
    type_, code = kinds.get(status, default)
    return {"error": {"message": message, "type": kind or type_, "param": None, "code": code}}


def stream_failure(a: Answer, message: str) -> bytes:
    """Return the event by which a stream fails after its status line said 200."""
    error = failure(500, message, a.reply.error_type)["error"]
    match a.provider:
        case "openrouter":
            choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
            return event(
                {
                    "id": a.id("gen-"),
                    "object": "chat.completion.chunk",
                    "created": CREATED,
                    "model": a.model,
                    "provider": "Fake",
                    "error": {"code": 502, "message": message},
                    "choices": [choice],
                }
            )
        case "groq":
            return event(
                {
                    "id": a.id("chatcmpl-"),
                    "object": "chat.completion.chunk",
                    "created": CREATED,
                    "model": a.model,
                    "choices": [],
                    "x_groq": {"id": a.id("req_"), "error": message},
                    "error": error,
                }
            )
        case "cerebras":
            return event({"error": error, "status_code": 500})
    return event({"error": error})


def refusal(a: Answer) -> tuple[int, Json] | None:
    """Return status and body with which the provider rejects the request's fields, if it does."""
    if a.provider != "mistral":
        return None
    request = a.received.json()
    # https://github.com/editor-code-assistant/eca/issues/231
    extra = [
        {
            "type": "extra_forbidden",
            "loc": ["body", name],
            "msg": "Extra inputs are not permitted",
            "input": value,
        }
        for name, value in request.items()
        if name not in MISTRAL_FIELDS
    ]
    if extra:
        return 422, {
            "object": "error",
            "message": {"detail": extra},
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    # https://github.com/editor-code-assistant/eca/issues/233
    for wrong in (i for i in _tool_ids(request) if not _MISTRAL_ID.fullmatch(i)):
        return 400, {
            "object": "error",
            "message": f"Tool call id was {wrong} but must be a-z, A-Z, 0-9, with a length of 9.",
            "type": "invalid_function_call",
            "param": None,
            "code": "3280",
        }
    return None


def _tool_ids(request: Any) -> Iterator[str]:
    for message in request.get("messages") or ():
        for call in message.get("tool_calls") or ():
            yield str(call.get("id"))
        if message.get("role") == "tool":
            yield str(message.get("tool_call_id"))
