"""Payloads have the shape that each provider sends; the numbers are chosen to tell fields apart."""

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core.exchange import Usage
from kimi_core.usage import UsageReader


def read(*payloads: dict[str, Any]) -> Usage:
    reader = UsageReader()
    for payload in payloads:
        reader.feed(payload)
    return reader.usage


def chunk(delta: dict[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": None}]
    return {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": choices, **rest}


OPENAI_USAGE = {
    "prompt_tokens": 2006,
    "completion_tokens": 300,
    "total_tokens": 2306,
    "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 192,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}


def test_openai_says_it_in_one_extra_chunk() -> None:
    expected = Usage(2006, 300, cache_read_tokens=1920, reasoning_tokens=192)
    assert read(chunk({"content": "a"}, usage=None), chunk(usage=OPENAI_USAGE)) == expected
    assert read({"object": "chat.completion", "choices": [], "usage": OPENAI_USAGE}) == expected


def test_openai_cache_writes_are_part_of_the_prompt() -> None:
    details = {"cached_tokens": 100, "cache_write_tokens": 50}
    usage = {"prompt_tokens": 200, "completion_tokens": 1, "prompt_tokens_details": details}
    assert read({"usage": usage}) == Usage(200, 1, cache_read_tokens=100, cache_write_tokens=50)


def test_moonshot_says_it_in_the_choice_that_finishes_with_cached_tokens_on_top() -> None:
    finish = {
        "id": "chatcmpl-69",
        "object": "chat.completion.chunk",
        "model": "kimi-k2-thinking",
        "choices": [
            {
                "index": 0,
                "delta": {},
                "finish_reason": "stop",
                "usage": {
                    "prompt_tokens": 19,
                    "completion_tokens": 21,
                    "total_tokens": 40,
                    "cached_tokens": 10,
                },
            }
        ],
        "system_fingerprint": "fpv0_ff52a3ef",
    }
    assert read(chunk({"content": "a"}), finish) == Usage(19, 21, cache_read_tokens=10)


def test_moonshot_may_say_the_cached_tokens_twice() -> None:
    usage = {
        "prompt_tokens": 19,
        "completion_tokens": 21,
        "cached_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 10},
    }
    assert read({"choices": [{"usage": usage}], "usage": usage}) == Usage(
        19, 21, cache_read_tokens=10
    )


@pytest.mark.parametrize("provider", ["nvidia", "siliconflow"])
def test_usage_that_grows_on_every_chunk_is_not_added_up(provider: str) -> None:
    said = [
        chunk(
            {"content": "a"},
            usage={
                "prompt_tokens": 50,
                "completion_tokens": n,
                "total_tokens": 50 + n,
                "reasoning_tokens": 0,
                "prompt_tokens_details": None,
            },
        )
        for n in range(1, 12)
    ]
    assert read(*said) == Usage(50, 11)


def test_groq_says_it_under_x_groq() -> None:
    usage = {
        "queue_time": 0.037493756,
        "prompt_tokens": 73,
        "prompt_time": 0.003,
        "completion_tokens": 40,
        "completion_time": 0.04,
        "total_tokens": 113,
        "total_time": 0.043,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {"reasoning_tokens": 7},
    }
    first = chunk({"role": "assistant"}, x_groq={"id": "req_01", "seed": 1})
    last = chunk({}, x_groq={"id": "req_01", "usage": usage, "usage_breakdown": {"models": []}})
    expected = Usage(73, 40, cache_read_tokens=64, reasoning_tokens=7)
    assert read(first, last) == expected
    assert read(first, last, chunk(usage=usage, x_groq={"id": "req_01"})) == expected


OPENROUTER_USAGE = {
    "prompt_tokens": 194,
    "completion_tokens": 42,
    "total_tokens": 236,
    "cost": 0.00095,
    "is_byok": False,
    "prompt_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 100, "audio_tokens": 0},
    "cost_details": {
        "upstream_inference_cost": 0.00095,
        "upstream_inference_prompt_cost": 0.0005,
        "upstream_inference_completions_cost": 0.00045,
    },
    "completion_tokens_details": {"reasoning_tokens": 30, "image_tokens": 0},
}


def test_openrouter_says_what_it_cost() -> None:
    assert read(chunk({"content": ""}, usage=OPENROUTER_USAGE, provider="Moonshot AI")) == Usage(
        194,
        42,
        cache_read_tokens=20,
        cache_write_tokens=100,
        reasoning_tokens=30,
        cost_usd=0.00095,
    )


def test_with_a_key_of_ones_own_openrouters_fee_comes_on_top_of_the_upstream_bill() -> None:
    usage = {
        **OPENROUTER_USAGE,
        "is_byok": True,
        "cost": 0.05,
        "cost_details": {"upstream_inference_cost": 1.0},
    }
    assert read({"usage": usage}).cost_usd == pytest.approx(1.05)
    usage["cost_details"] = {"upstream_inference_cost": None}
    assert read({"usage": usage}).cost_usd == 0.05


def test_a_cost_of_nothing_is_a_cost() -> None:
    assert read({"usage": {"prompt_tokens": 1, "completion_tokens": 1, "cost": 0}}).cost_usd == 0.0
    assert read({"usage": {"prompt_tokens": 1, "completion_tokens": 1}}).cost_usd is None


def test_cerebras_says_it_in_the_last_chunk() -> None:
    last = chunk(
        {},
        usage={
            "prompt_tokens": 23,
            "completion_tokens": 12,
            "total_tokens": 35,
            "image_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        time_info={"queue_time": 0.0001, "prompt_time": 0.001, "created": 1754000000.1},
    )
    assert read(last) == Usage(23, 12, cache_read_tokens=0)


def test_mistral_says_it_in_the_last_chunk_unasked() -> None:
    last = chunk(
        {"content": ""},
        usage={
            "prompt_tokens": 16,
            "total_tokens": 50,
            "completion_tokens": 34,
            "prompt_audio_seconds": None,
        },
    )
    assert read(chunk({"content": "a"}), last) == Usage(16, 34)


def test_deepseek_says_hits_and_misses() -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "total_tokens": 150,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {"reasoning_tokens": 33},
        "prompt_cache_hit_tokens": 64,
        "prompt_cache_miss_tokens": 36,
    }
    assert read({"usage": usage}) == Usage(100, 50, cache_read_tokens=64, reasoning_tokens=33)
    del usage["prompt_tokens_details"]
    assert read({"usage": usage}).cache_read_tokens == 64


def test_geminis_openai_endpoint_hides_thinking_in_the_total() -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115}
    assert read({"usage": usage}) == Usage(10, 105, reasoning_tokens=100)


def test_xai_leaves_reasoning_out_of_the_completion() -> None:
    usage = {
        "prompt_tokens": 32,
        "completion_tokens": 9,
        "total_tokens": 135,
        "completion_tokens_details": {"reasoning_tokens": 94},
    }
    assert read({"usage": usage}) == Usage(32, 103, reasoning_tokens=94)


def test_gemini_adds_thoughts_to_the_output_and_tool_results_to_the_input() -> None:
    first = {
        "candidates": [{"content": {"role": "model", "parts": [{"text": "a"}]}}],
        "usageMetadata": {"promptTokenCount": 30, "totalTokenCount": 90, "thoughtsTokenCount": 60},
        "modelVersion": "gemini-2.5-pro",
        "responseId": "r",
    }
    last = {
        "candidates": [{"content": {"parts": [{"text": "b"}]}, "finishReason": "STOP"}],
        "usageMetadata": {
            "promptTokenCount": 30,
            "cachedContentTokenCount": 16,
            "candidatesTokenCount": 7,
            "thoughtsTokenCount": 60,
            "toolUsePromptTokenCount": 11,
            "totalTokenCount": 108,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 30}],
            "trafficType": "ON_DEMAND",
        },
    }
    assert read(first, last) == Usage(
        41, 67, cache_read_tokens=16, reasoning_tokens=60, tool_prompt_tokens=11
    )
    assert read(first) == Usage(30, 60, reasoning_tokens=60)


def test_gemini_says_no_output_when_the_prompt_is_blocked() -> None:
    blocked = {
        "promptFeedback": {"blockReason": "SAFETY"},
        "usageMetadata": {"promptTokenCount": 8, "totalTokenCount": 8},
    }
    assert read(blocked) == Usage(8, 0)
    assert read({"usageMetadata": {"promptTokenCount": 8}}) == Usage(8, None)


def test_anthropics_input_is_the_sum_of_three_and_its_output_is_overwritten() -> None:
    start = {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "content": [],
            "usage": {
                "input_tokens": 12,
                "cache_creation_input_tokens": 300,
                "cache_read_input_tokens": 2000,
                "cache_creation": {
                    "ephemeral_5m_input_tokens": 100,
                    "ephemeral_1h_input_tokens": 200,
                },
                "output_tokens": 4,
                "service_tier": "standard",
            },
        },
    }
    delta = {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn"},
        "usage": {
            "input_tokens": 12,
            "cache_creation_input_tokens": 300,
            "cache_read_input_tokens": 2000,
            "output_tokens": 90,
            "output_tokens_details": {"thinking_tokens": 55},
            "server_tool_use": {"web_search_requests": 1},
        },
    }
    whole = Usage(
        2312,
        90,
        cache_read_tokens=2000,
        cache_write_tokens=300,
        cache_write_1h_tokens=200,
        reasoning_tokens=55,
    )
    assert read(start, delta) == whole
    cut = read(start)
    assert (cut.input_tokens, cut.output_tokens) == (2312, 4)
    assert (
        read(start, {"type": "message_delta", "usage": {"output_tokens": 90}}).output_tokens == 90
    )


def test_anthropics_whole_message_reads_like_its_stream() -> None:
    usage = {"input_tokens": 5, "cache_read_input_tokens": 7, "output_tokens": 2}
    message = {"type": "message", "usage": {**usage, "cache_creation_input_tokens": None}}
    assert read(message) == Usage(12, 2, cache_read_tokens=7)


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_responses_says_it_in_the_terminal_event(status: str) -> None:
    usage = {
        "input_tokens": 75,
        "input_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 3},
        "output_tokens": 1186,
        "output_tokens_details": {"reasoning_tokens": 1024},
        "total_tokens": 1261,
    }
    created = {"type": "response.created", "response": {"status": "in_progress", "usage": None}}
    ended = {"type": f"response.{status}", "response": {"status": status, "usage": usage}}
    expected = Usage(75, 1186, cache_read_tokens=64, cache_write_tokens=3, reasoning_tokens=1024)
    assert read(created, ended) == expected
    assert read({"object": "response", "status": status, "usage": usage}) == expected


def test_nothing_said_is_nothing_known() -> None:
    assert read() == Usage()
    assert read({}, {"choices": []}, {"usage": None}, {"usage": {}}) == Usage()
    assert read({"error": {"message": "no"}}) == Usage()


def test_an_embeddings_reply_has_input_only() -> None:
    assert read({"usage": {"prompt_tokens": 8, "total_tokens": 8}}) == Usage(8, None)


# --- malformed -------------------------------------------------------------------------------

WRONG = ["7", -1, True, False, None, [], {}, float("nan"), float("inf"), 1e300, 10**400, "", [9]]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_malformed_count_is_no_statement(wrong: Any) -> None:
    said = read({"usage": {**OPENAI_USAGE, "prompt_tokens": wrong, "total_tokens": wrong}})
    assert said == Usage(None, 300, cache_read_tokens=1920, reasoning_tokens=192)
    said = read({"usage": {**OPENAI_USAGE, "prompt_tokens_details": wrong}})
    assert said == Usage(2006, 300, reasoning_tokens=192)
    if wrong is not None and not isinstance(wrong, bool | list | dict | str):
        assert read({"usage": {**OPENROUTER_USAGE, "cost": wrong}}).cost_usd is None
    assert read({"usage": {"cost": wrong}}).cost_usd is None


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize(
    "key", ["usage", "choices", "x_groq", "usageMetadata", "response", "message"]
)
def test_a_malformed_holder_is_no_statement(key: str, wrong: Any) -> None:
    assert read({key: wrong}) == Usage()
    assert read({key: wrong, "usageMetadata": {"promptTokenCount": 1}}).input_tokens == 1
    assert read({key: {"usage": wrong}}) == Usage()
    assert read({key: [wrong]}) == Usage()


names = st.sampled_from(
    [
        *["usage", "choices", "x_groq", "usageMetadata", "response", "message", "cost", "is_byok"],
        *["prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens"],
        *["cached_tokens", "prompt_tokens_details", "cache_creation", "cache_read_input_tokens"],
        *["cost_details", "upstream_inference_cost", "promptTokenCount", "totalTokenCount"],
        *["thoughtsTokenCount", "toolUsePromptTokenCount", "ephemeral_1h_input_tokens"],
    ]
)
anything: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.sampled_from(WRONG), st.integers(), st.floats()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=6),
    max_leaves=15,
)


@given(st.lists(st.dictionaries(names, anything, max_size=6), max_size=4))
@settings(max_examples=150, deadline=None)
def test_whatever_is_said_gives_counts_or_none(payloads: list[dict[str, Any]]) -> None:
    usage = read(*payloads)
    for field in fields(usage):
        value = getattr(usage, field.name)
        kind = float if field.name == "cost_usd" else int
        assert value is None or (type(value) is kind and 0 <= value < 1e17)
    json.dumps(usage.cost_usd, allow_nan=False)


@given(st.permutations(range(5)))
@settings(max_examples=20, deadline=None)
def test_repeated_and_reordered_statements_change_nothing(order: list[int]) -> None:
    said = [
        {"usage": {"prompt_tokens": 50, "completion_tokens": n, "total_tokens": 50 + n}}
        for n in range(5)
    ]
    assert read(*(said[n] for n in order), *said) == Usage(50, 4)
