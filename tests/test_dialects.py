import base64
import copy
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core import dialects
from kimi_core.dialects import ANTHROPIC, DIALECTS, GEMINI, OPENAI, RESPONSES, Dialect, Offer, Unit
from kimi_core.dialects.base import json_text
from kimi_core.document import Document, NotJSON, decode, encode, locate
from kimi_core.exchange import Message, Part, Reply, ToolCall, Usage
from kimi_core.sse import SSE, JSONArray

# --- paths -----------------------------------------------------------------------------------

CHAT, COUNT = "chat", "count_tokens"


@pytest.mark.parametrize(
    ("path", "dialect", "operation", "provider", "model"),
    [
        ("/v1/chat/completions", OPENAI, CHAT, "", ""),
        ("/chat/completions", OPENAI, CHAT, "", ""),
        ("/v1/chat/completions/", OPENAI, CHAT, "", ""),
        ("/v1/chat/completions?api-version=1", OPENAI, CHAT, "", ""),
        ("/nvidia/v1/chat/completions", OPENAI, CHAT, "nvidia", ""),
        ("/kimi-code/chat/completions", OPENAI, CHAT, "kimi-code", ""),
        ("/openai/v1/chat/completions", OPENAI, CHAT, "openai", ""),
        ("/coding/v1/chat/completions", OPENAI, CHAT, "coding", ""),
        ("/api/v1/chat/completions", OPENAI, CHAT, "api", ""),
        ("/v1beta/openai/chat/completions", OPENAI, CHAT, "", ""),
        ("/v1/projects/p/locations/l/endpoints/openapi/chat/completions", OPENAI, CHAT, "", ""),
        ("/v1/responses", RESPONSES, CHAT, "", ""),
        ("/responses", RESPONSES, CHAT, "", ""),
        ("/openai/responses", RESPONSES, CHAT, "openai", ""),
        ("/v1/messages", ANTHROPIC, CHAT, "", ""),
        ("/v1/messages?beta=true", ANTHROPIC, CHAT, "", ""),
        ("/anthropic/v1/messages", ANTHROPIC, CHAT, "anthropic", ""),
        ("/v1/messages/count_tokens", ANTHROPIC, COUNT, "", ""),
        ("/v1beta/models/gemini-2.5-pro:generateContent", GEMINI, CHAT, "", "gemini-2.5-pro"),
        ("/v1/models/g:streamGenerateContent?alt=sse", GEMINI, CHAT, "", "g"),
        ("/v1beta/models/g:countTokens?key=secret", GEMINI, COUNT, "", "g"),
        ("/gemini/v1beta/models/g:generateContent", GEMINI, CHAT, "gemini", "g"),
        ("/models/g:generateContent", GEMINI, CHAT, "", "g"),
        ("/v1beta/models/a%2Fb:generateContent", GEMINI, CHAT, "", "a/b"),
        (
            "/v1beta/models/moonshotai/kimi-k2:generateContent",
            GEMINI,
            CHAT,
            "",
            "moonshotai/kimi-k2",
        ),
        ("/v1beta/models/kimi:free:generateContent", GEMINI, CHAT, "", "kimi:free"),
    ],
)
def test_a_path_says_dialect_operation_provider_and_model(
    path: str, dialect: Dialect, operation: str, provider: str, model: str
) -> None:
    call = dialects.match("POST", path)
    assert call is not None
    assert (call.dialect, call.operation, call.provider, call.model) == (
        dialect,
        operation,
        provider,
        model,
    )
    plain = path.partition("?")[0].rstrip("/")
    assert plain.endswith(call.rest)
    assert call.rest.startswith("/")
    assert not call.rest.startswith("/v1")


@pytest.mark.parametrize(
    ("path", "provider"),
    [("/v1/models", ""), ("/models", ""), ("/groq/v1/models", "groq"), ("/v1beta/models?a=b", "")],
)
def test_a_list_of_models_is_asked_for_with_get(path: str, provider: str) -> None:
    call = dialects.match("GET", path)
    assert call is not None
    assert (call.operation, call.provider, call.rest) == ("models", provider, "/models")
    assert dialects.match("POST", path) is None


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "*",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages/batches",
        "/v1/chat/completions/id",
        "/v1/responses/resp_1/cancel",
        "/v1/threads/thread_1/messages",
        "/v1/conversations/c/messages",
        "/v1/chat/completionsx",
        "/v1beta/models/g:embedContent",
        "/v1beta/models/:generateContent",
        "/v1beta/models/g",
        "/api/event_logging/batch?x=/v1/messages",
    ],
)
def test_any_other_path_is_no_model_call(path: str) -> None:
    assert dialects.match("POST", path) is None


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
def test_any_other_method_is_no_model_call(method: str) -> None:
    assert dialects.match(method, "/v1/chat/completions") is None


@given(st.text(st.sampled_from("/v1betamodelschat:generateContent?"), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_path_is_matched_or_not(path: str) -> None:
    call = dialects.match("POST", path)
    assert call is None or call.rest in path


def test_a_long_path_is_matched_in_linear_time() -> None:
    assert dialects.match("POST", "/models" * 20_000) is None
    assert dialects.match("POST", "/models/" + ":generateContent" * 20_000 + "x") is None


# --- requests ----------------------------------------------------------------------------------

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 20).decode()

CHAT_REQUEST = {
    "model": "kimi-k2-thinking",
    "stream": True,
    "stream_options": {"include_usage": True},
    "prompt_cache_key": "session-1",
    "messages": [
        {"role": "system", "content": "You are a coding agent."},
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": 'Look at é "this"\n'},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
                {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}},
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
                {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
                {"type": "unheard_of", "value": 1},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I should read it.",
            "tool_calls": [
                {
                    "id": "functions.read:0",
                    "type": "function",
                    "function": {"name": "read", "arguments": '{"path": "a.py"}'},
                },
                {"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}},
                {"id": "c3", "function": {"name": "odd", "arguments": {"not": "a string"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "functions.read:0", "content": "print(1)"},
        {
            "role": "tool",
            "tool_call_id": "c2",
            "content": [{"type": "text", "text": "done"}, {"type": "image_url", "image_url": "x"}],
        },
        {"role": "function", "name": "old", "content": "result"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "refusal", "refusal": "No."},
            ],
            "reasoning": "aloud",
            "function_call": {"name": "old", "arguments": "{}"},
        },
        "no message",
    ],
    "tools": [{"type": "function", "function": {"name": "read", "parameters": {}}}],
    "functions": [{"name": "old"}],
}

RESPONSES_REQUEST = {
    "model": "gpt-5-codex",
    "instructions": "You are Codex.",
    "stream": True,
    "tools": [{"type": "web_search"}],
    "conversation": {"id": "conv_1"},
    "input": [
        {"type": "additional_tools", "tools": [{"name": "shell", "tools": [{"name": "exec"}]}]},
        {"type": "message", "role": "developer", "content": "Sandbox is on."},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Fix it"},
                {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"},
                {"type": "input_file", "file_data": "AAAA"},
            ],
        },
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "Plan"}],
            "content": [{"type": "reasoning_text", "text": "Steps"}],
            "encrypted_content": "gAAAAB" * 100,
        },
        {"type": "function_call", "call_id": "c1", "name": "exec", "arguments": '{"cmd":"ls"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": "*** Begin"},
        {
            "type": "custom_tool_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "Done"}, {"type": "input_image"}],
        },
        {
            "type": "local_shell_call",
            "call_id": "c3",
            "action": {"type": "exec", "command": ["ls"]},
        },
        {"type": "local_shell_call_output", "call_id": "c3", "output": {"exit_code": 0}},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "image_generation_call", "id": "ig_1", "result": PIXEL},
        {
            "type": "computer_call_output",
            "call_id": "c4",
            "output": {
                "type": "computer_screenshot",
                "image_url": f"data:image/png;base64,{PIXEL}",
            },
        },
        {"type": "compaction", "encrypted_content": "gAAAAB" * 100},
        {
            "type": "message",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "Fixed", "annotations": []},
                {"type": "refusal", "refusal": "No."},
            ],
        },
        {"type": "unheard_of", "value": 1},
    ],
}

ANTHROPIC_REQUEST = {
    "model": "claude-sonnet-4-5",
    "max_tokens": 1024,
    "stream": True,
    "metadata": {"user_id": "user_1_session_2"},
    "system": [{"type": "text", "text": "You are Claude.", "cache_control": {"type": "ephemeral"}}],
    "tools": [{"name": "Read", "input_schema": {"type": "object"}}],
    "messages": [
        {"role": "user", "content": "Hello"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "See"},
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": PIXEL},
                },
                {"type": "document", "source": {"type": "text", "data": "A page."}},
                {"type": "document", "source": {"type": "base64", "data": "JVBERi0="}},
                {
                    "type": "document",
                    "source": {"type": "content", "content": [{"type": "text", "text": "Chunk"}]},
                },
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Let me read.", "signature": "EqRk"},
                {"type": "redacted_thinking", "data": "Emw" * 50},
                {"type": "text", "text": "Reading."},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"p": "a.py"}},
                {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {}},
                {
                    "type": "web_search_tool_result",
                    "tool_use_id": "srv_1",
                    "content": [{"type": "web_search_result", "url": "https://example.org"}],
                },
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "print(1)"}],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "content": [
                        {"type": "text", "text": "line"},
                        {"type": "image", "source": {"type": "base64", "data": PIXEL}},
                        {"type": "document", "source": {"type": "base64", "data": "JVBERi0="}},
                        {"type": "tool_reference", "tool_name": "x"},
                    ],
                },
                {"type": "tool_result", "tool_use_id": "toolu_3"},
            ],
        },
        {"role": "user", "content": [{"type": "unheard_of", "value": 1}]},
    ],
}

GEMINI_REQUEST = {
    "systemInstruction": {"parts": [{"text": "You are Gemini."}]},
    "tools": [{"functionDeclarations": [{"name": "read_file"}]}],
    "generationConfig": {"temperature": 0},
    "contents": [
        {
            "role": "user",
            "parts": [
                {"text": "Hello"},
                {"inlineData": {"mimeType": "image/png", "data": PIXEL}},
                {"inline_data": {"mime_type": "application/pdf", "data": "JVBERi0="}},
                {"fileData": {"fileUri": "gs://x"}},
            ],
        },
        {
            "role": "model",
            "parts": [
                {"text": "Thinking", "thought": True, "thoughtSignature": "abc"},
                {"text": "Reading."},
                {"functionCall": {"id": "f1", "name": "read_file", "args": {"p": "a.py"}}},
                {"function_call": {"name": "ls"}},
                {"executableCode": {"language": "PYTHON", "code": "print(1)"}},
                {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "1\n"}},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "read_file", "response": {"output": "print(1)"}}},
                {"function_response": {"name": "ls", "response": {"a": 1, "b": "x"}}},
            ],
        },
        {"parts": {"text": "a single part"}},
    ],
}

REQUESTS: list[tuple[Dialect, dict[str, Any]]] = [
    (OPENAI, CHAT_REQUEST),
    (RESPONSES, RESPONSES_REQUEST),
    (RESPONSES, {"model": "m", "input": "Just text", "instructions": None}),
    (ANTHROPIC, ANTHROPIC_REQUEST),
    (ANTHROPIC, {"model": "m", "system": "Plain", "messages": []}),
    (GEMINI, GEMINI_REQUEST),
    (GEMINI, {"system_instruction": "Plain", "contents": []}),
]


def read(dialect: Dialect, request: Any) -> list[tuple[Unit, Message]]:
    document = Document(encode(request), dialect.shape)
    return [(unit, dialect.read(unit)) for unit in dialect.units(document)]


def said(message: Message) -> list[tuple[str, str, str]]:
    return [(part.kind, part.category, part.text) for part in message.parts]


def test_a_chat_request_is_read() -> None:
    units = read(OPENAI, CHAT_REQUEST)
    assert [unit.kind for unit, _ in units] == ["tools", "tools"] + ["message"] * 9
    assert [unit.path for unit, _ in units[:3]] == [("tools",), ("functions",), ("messages", 0)]
    messages = [message for unit, message in units if unit.kind == "message"]
    assert [message.role for message in messages] == [
        *["system", "system", "user", "assistant", "tool", "tool", "tool", "assistant", "user"]
    ]
    assert said(messages[0]) == [("text", "system", "You are a coding agent.")]
    assert said(messages[1]) == [("text", "system", "Be brief.")]
    assert said(messages[2]) == [
        ("text", "user", 'Look at é "this"\n'),
        ("image", "user", ""),
        ("file", "user", ""),
        ("file", "user", ""),
        ("file", "user", ""),
        ("other", "user", '{"type":"unheard_of","value":1}'),
    ]
    assert messages[2].parts[1].data == base64.b64decode(PIXEL)
    assert said(messages[3]) == [
        ("reasoning", "assistant", "I should read it."),
        ("tool_call", "assistant", '{"path": "a.py"}'),
        ("tool_call", "assistant", "*** Begin"),
        ("tool_call", "assistant", '{"not":"a string"}'),
    ]
    assert [(part.name, part.id) for part in messages[3].parts[1:]] == [
        ("read", "functions.read:0"),
        ("patch", "c2"),
        ("odd", "c3"),
    ]
    assert said(messages[4]) == [("tool_result", "tool_result", "print(1)")]
    assert messages[4].parts[0].id == "functions.read:0"
    assert said(messages[5]) == [
        ("tool_result", "tool_result", "done"),
        ("image", "tool_result", ""),
    ]
    assert said(messages[6]) == [("tool_result", "tool_result", "result")]
    assert said(messages[7]) == [
        ("reasoning", "assistant", "aloud"),
        ("reasoning", "assistant", "hm"),
        ("text", "assistant", "No."),
        ("tool_call", "assistant", "{}"),
    ]
    assert messages[8] == Message("user", (), b'"no message"')


def test_a_responses_request_is_read() -> None:
    units = read(RESPONSES, RESPONSES_REQUEST)
    assert [unit.kind for unit, _ in units[:3]] == ["system", "tools", "message"]
    assert said(units[0][1]) == [("text", "system", "You are Codex.")]
    items = [message for unit, message in units if unit.kind == "message"]
    assert [unit.path for unit, _ in units[2:4]] == [("input", 0), ("input", 1)]
    assert [message.role for message in items] == [
        *["system", "system", "user", "assistant", "assistant", "tool", "assistant", "tool"],
        *["assistant", "tool", "assistant", "assistant", "tool", "assistant", "assistant", "user"],
    ]
    assert [part.category for part in items[0].parts] == ["tools"]
    assert '"exec"' in items[0].parts[0].text
    assert said(items[2]) == [
        ("text", "user", "Fix it"),
        ("image", "user", ""),
        ("file", "user", ""),
    ]
    assert items[2].parts[1].data == base64.b64decode(PIXEL)
    assert said(items[3]) == [
        ("reasoning", "assistant", "Plan"),
        ("reasoning", "assistant", "Steps"),
        ("reasoning", "assistant", ""),
    ]
    assert (items[4].parts[0].name, items[4].parts[0].id) == ("exec", "c1")
    assert said(items[4]) == [("tool_call", "assistant", '{"cmd":"ls"}')]
    assert said(items[5]) == [("tool_result", "tool_result", "a.py")]
    assert said(items[6]) == [("tool_call", "assistant", "*** Begin")]
    assert said(items[7]) == [("tool_result", "tool_result", "Done"), ("image", "tool_result", "")]
    assert said(items[8]) == [("tool_call", "assistant", '{"type":"exec","command":["ls"]}')]
    assert said(items[9]) == [("tool_result", "tool_result", '{"exit_code":0}')]
    assert [part.kind for part in items[11].parts] == ["image"]
    assert said(items[12]) == [("image", "tool_result", "")]
    assert said(items[13]) == [("reasoning", "assistant", "")]
    assert said(items[14]) == [("text", "assistant", "Fixed"), ("text", "assistant", "No.")]
    text = read(RESPONSES, {"input": "Just text"})
    assert [said(message) for _, message in text] == [[("text", "user", "Just text")]]


def test_a_messages_request_is_read() -> None:
    units = read(ANTHROPIC, ANTHROPIC_REQUEST)
    assert [unit.kind for unit, _ in units[:3]] == ["tools", "system", "message"]
    assert said(units[1][1]) == [("text", "system", "You are Claude.")]
    messages = [message for unit, message in units if unit.kind == "message"]
    assert [m.role for m in messages] == ["user", "user", "assistant", "tool", "tool", "user"]
    assert said(messages[0]) == [("text", "user", "Hello")]
    assert said(messages[1]) == [
        ("text", "user", "See"),
        ("image", "user", ""),
        ("file", "user", "A page."),
        ("file", "user", ""),
        ("text", "user", "Chunk"),
    ]
    assert messages[1].parts[1].data == base64.b64decode(PIXEL)
    assert said(messages[2]) == [
        ("reasoning", "assistant", "Let me read."),
        ("reasoning", "assistant", ""),
        ("text", "assistant", "Reading."),
        ("tool_call", "assistant", '{"p":"a.py"}'),
        ("tool_call", "assistant", "{}"),
        (
            "tool_result",
            "tool_result",
            '{"type":"web_search_result","url":"https://example.org"}',
        ),
    ]
    assert (messages[2].parts[3].name, messages[2].parts[3].id) == ("Read", "toolu_1")
    assert said(messages[3]) == [("tool_result", "tool_result", "print(1)")]
    assert messages[3].parts[0].id == "toolu_1"
    assert [(part.kind, part.category) for part in messages[4].parts] == [
        ("tool_result", "tool_result"),
        ("image", "tool_result"),
        ("file", "tool_result"),
        ("tool_result", "tool_result"),
    ]


def test_a_gemini_request_is_read() -> None:
    units = read(GEMINI, GEMINI_REQUEST)
    assert [unit.kind for unit, _ in units[:3]] == ["system", "tools", "message"]
    assert said(units[0][1]) == [("text", "system", "You are Gemini.")]
    messages = [message for unit, message in units if unit.kind == "message"]
    assert [message.role for message in messages] == ["user", "assistant", "tool", "user"]
    assert [part.kind for part in messages[0].parts] == ["text", "image", "file", "file"]
    assert messages[0].parts[1].data == base64.b64decode(PIXEL)
    assert said(messages[1]) == [
        ("reasoning", "assistant", "Thinking"),
        ("text", "assistant", "Reading."),
        ("tool_call", "assistant", '{"p":"a.py"}'),
        ("tool_call", "assistant", ""),
        ("other", "assistant", "print(1)"),
        ("other", "assistant", "1\n"),
    ]
    assert said(messages[2]) == [
        ("tool_result", "tool_result", "print(1)"),
        ("tool_result", "tool_result", '{"a":1,"b":"x"}'),
    ]
    assert said(messages[3]) == [("text", "user", "a single part")]


def assert_located(unit: Unit, part: Part) -> None:
    if not part.text or part.category == "tools":
        return
    raw = bytes(unit.raw)
    span = locate(raw, 0, part.path)
    assert span is not None, part
    value = decode(raw[slice(*span)])
    if isinstance(value, list) and part.kind == "reasoning":  # Mistral's pieces of thinking
        assert "".join(piece.get("text", "") for piece in value) == part.text
    elif isinstance(value, str):
        assert value == part.text
    else:
        assert json_text(value) == part.text


@pytest.mark.parametrize(("dialect", "request_"), REQUESTS)
def test_the_path_of_each_part_leads_to_its_text(dialect: Dialect, request_: Any) -> None:
    for unit, message in read(dialect, request_):
        for part in message.parts:
            assert_located(unit, part)


@pytest.mark.parametrize(("dialect", "request_"), REQUESTS)
def test_a_text_can_be_cut_where_its_part_says(dialect: Dialect, request_: Any) -> None:
    document = Document(encode(request_), dialect.shape)
    parts = [
        (unit.path, part)
        for unit in dialect.units(document)
        for part in dialect.read(unit).parts
        if part.kind in ("text", "tool_result") and part.text
    ]
    for path, part in parts:
        document.set((*path, *part.path), "cut")
    again = Document(document.encode(), dialect.shape)
    found = [part for unit in dialect.units(again) for part in dialect.read(unit).parts]
    texts = [part.text for part in found if part.kind in ("text", "tool_result") and part.text]
    # A JSON value in a list of blocks gives way to a string, which is no block any more.
    assert len(texts) >= len(parts) - 2
    assert set(texts) <= {"cut"}


@pytest.mark.parametrize(
    ("dialect", "request_", "expected"),
    [
        (OPENAI, CHAT_REQUEST, ("kimi-k2-thinking", True, True, "session-1")),
        (OPENAI, {"model": 7, "stream": "true"}, ("", False, False, "")),
        (RESPONSES, RESPONSES_REQUEST, ("gpt-5-codex", True, True, "conv_1")),
        (RESPONSES, {"conversation": "conv_2", "model": None}, ("", False, True, "conv_2")),
        (RESPONSES, {"conversation": "c", "prompt_cache_key": "p"}, ("", False, True, "p")),
        (ANTHROPIC, ANTHROPIC_REQUEST, ("claude-sonnet-4-5", True, True, "user_1_session_2")),
        (ANTHROPIC, {"metadata": "odd"}, ("", False, True, "")),
    ],
)
def test_what_a_request_wishes_is_read(
    dialect: Dialect, request_: Any, expected: tuple[str, bool, bool, str]
) -> None:
    document = Document(encode(request_), dialect.shape)
    assert expected == (
        dialect.model(document, ""),
        dialect.streams(document, "/v1/x"),
        dialect.asks_usage(document),
        dialect.client_session(document),
    )


def test_geminis_path_says_model_and_stream() -> None:
    document = Document(b'{"stream":true,"model":"no"}', GEMINI.shape)
    assert GEMINI.model(document, "gemini-2.5-pro") == "gemini-2.5-pro"
    assert GEMINI.streams(document, "/v1beta/models/g:streamGenerateContent?alt=sse")
    assert not GEMINI.streams(document, "/v1beta/models/g:generateContent")


@pytest.mark.parametrize(
    ("dialect", "headers", "query", "key"),
    [
        (OPENAI, {"authorization": "Bearer sk-1"}, {}, "sk-1"),
        (OPENAI, {"authorization": "bearer  sk-1 "}, {}, "sk-1"),
        (OPENAI, {"authorization": "Basic sk-1"}, {}, ""),
        (OPENAI, {}, {"key": "no"}, ""),
        (RESPONSES, {"authorization": "Bearer sk-1"}, {}, "sk-1"),
        (ANTHROPIC, {"x-api-key": "sk-ant", "authorization": "Bearer other"}, {}, "sk-ant"),
        (ANTHROPIC, {"authorization": "Bearer oauth"}, {}, "oauth"),
        (GEMINI, {"x-goog-api-key": "AIza"}, {"key": "other"}, "AIza"),
        (GEMINI, {}, {"key": "AIza"}, "AIza"),
        (GEMINI, {"authorization": "Bearer ya29"}, {}, "ya29"),
    ],
)
def test_the_clients_key_is_found(
    dialect: Dialect, headers: dict[str, str], query: dict[str, str], key: str
) -> None:
    assert dialect.key(headers, query) == key


# --- hostile requests ----------------------------------------------------------------------------

ODD_VALUES: list[Any] = [None, True, 0, -1.5, "", "odd", [], ["odd"], [[]], {}, {"type": "text"}]


def variations(value: Any) -> Iterator[Any]:
    """Yield `value` with each of its values replaced by each kind of JSON value, and left out."""
    holder = [value]
    stack: list[tuple[Any, Any]] = [(holder, 0)]
    while stack:
        container, key = stack.pop()
        kept = container[key]
        for odd in ODD_VALUES:
            container[key] = odd
            yield holder[0]
        container[key] = kept
        if isinstance(kept, dict):
            for inner in list(kept):
                without = kept.pop(inner)
                yield holder[0]
                kept[inner] = without
                stack.append((kept, inner))
        elif isinstance(kept, list):
            stack += [(kept, index) for index in range(len(kept))]


@pytest.mark.parametrize(("dialect", "request_"), REQUESTS)
def test_a_request_with_any_value_replaced_is_still_read(dialect: Dialect, request_: Any) -> None:
    for odd in variations(copy.deepcopy(request_)):
        if not isinstance(odd, dict):
            continue
        document = Document(encode(odd), dialect.shape)
        dialect.model(document, "")
        dialect.streams(document, "/x")
        dialect.asks_usage(document)
        dialect.client_session(document)
        for unit in dialect.units(document):
            for part in dialect.read(unit).parts:
                assert isinstance(part.text, str)
                assert isinstance(part.name, str)
                assert isinstance(part.id, str)
                assert_located(unit, part)


words = st.sampled_from(
    [
        *["role", "content", "type", "text", "parts", "tool_calls", "function", "arguments"],
        *["source", "data", "input", "output", "image_url", "thinking", "functionResponse"],
        *["user", "assistant", "tool_result", "image", "reasoning", "message", "document"],
    ]
)
anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=5),
    max_leaves=12,
)


@given(anything, st.sampled_from(["system", "tools", "message"]))
@settings(max_examples=150, deadline=None)
def test_any_unit_is_read(value: Any, kind: Any) -> None:
    for dialect in DIALECTS.values():
        unit = Unit(kind, encode(value), ())
        for part in dialect.read(unit).parts:
            if kind != "tools":
                assert_located(unit, part)


def test_a_unit_that_is_no_json_is_refused() -> None:
    for dialect in DIALECTS.values():
        with pytest.raises(NotJSON):
            dialect.read(Unit("message", b'{"role":', ()))
        with pytest.raises(NotJSON):
            dialect.read(Unit("message", b"[" * 100_000, ()))


def test_odd_bytes_in_a_message_are_read() -> None:
    for content in (b'"\\ud800"', b'"\xff"', b'["\xed\xa0\x80",NaN,1e999]', b"NaN"):
        for dialect in DIALECTS.values():
            dialect.read(Unit("message", b'{"role":"user","content":%s}' % content, ()))


# --- replies -------------------------------------------------------------------------------------


def reply(dialect: Dialect, *payloads: Any) -> Reply:
    reader = dialect.reader()
    for payload in payloads:
        reader.feed(payload if isinstance(payload, bytes) else encode(payload))
    return reader.finish()


def summary(found: Reply) -> dict[str, Any]:
    return {
        "id": found.id,
        "model": found.model,
        "text": "".join(found.text),
        "reasoning": "".join(found.reasoning),
        "calls": found.tool_calls,
        "finish": found.finish_reason,
        "usage": found.usage,
        "complete": found.complete,
        "error": found.error,
    }


CALLS = [ToolCall("read", '{"p":"a"}', "c1"), ToolCall("ls", "{}", "c2")]


def chat_chunk(delta: Any, finish: Any = None, **rest: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion.chunk", "model": "m", "choices": [choice], **rest}


CHAT_USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
CHAT_STREAM: list[Any] = [
    chat_chunk({"role": "assistant", "content": "", "reasoning_content": None}),
    chat_chunk({"reasoning_content": "hm", "reasoning": "hm"}),
    chat_chunk({"content": "Hel"}),
    chat_chunk({"content": "lo"}),
    chat_chunk({"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "read"}}]}),
    chat_chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"p"'}}]}),
    chat_chunk({"tool_calls": [{"index": 0, "id": "", "function": {"arguments": ':"a"}'}}]}),
    chat_chunk(
        {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "ls", "arguments": "{}"}}]}
    ),
    chat_chunk({}, "tool_calls"),
    {"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": CHAT_USAGE},
    b"[DONE]",
]
CHAT_WHOLE = {
    "id": "x",
    "object": "chat.completion",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hello",
                "reasoning_content": "hm",
                "tool_calls": [
                    {"id": "c1", "function": {"name": "read", "arguments": '{"p":"a"}'}},
                    {"id": "c2", "function": {"name": "ls", "arguments": "{}"}},
                ],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": CHAT_USAGE,
}

RESPONSE = {
    "id": "x",
    "object": "response",
    "status": "completed",
    "model": "m",
    "output": [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello"}],
        },
        {"type": "function_call", "call_id": "c1", "name": "read", "arguments": '{"p":"a"}'},
        {"type": "function_call", "call_id": "c2", "name": "ls", "arguments": "{}"},
    ],
    "usage": {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8},
}
ADDED = "response.output_item.added"
ARGUMENTS = "response.function_call_arguments.delta"
RESPONSES_STREAM: list[Any] = [
    {"type": "response.created", "response": {"id": "x", "model": "m", "status": "in_progress"}},
    {"type": "response.in_progress", "response": {"id": "x", "status": "in_progress"}},
    {"type": "response.reasoning_summary_text.delta", "delta": "hm"},
    {"type": "response.output_text.delta", "delta": "Hel", "output_index": 1},
    {"type": "response.output_text.delta", "delta": "lo", "output_index": 1},
    {"type": "response.output_text.done", "text": "Hello", "output_index": 1},
    {"type": ADDED, "output_index": 2, "item": {**RESPONSE["output"][2], "arguments": ""}},
    {"type": ARGUMENTS, "output_index": 2, "delta": '{"p"'},
    {"type": ARGUMENTS, "output_index": 2, "delta": ':"a"}'},
    {"type": "response.output_item.done", "output_index": 2, "item": RESPONSE["output"][2]},
    {"type": ADDED, "output_index": 3, "item": {**RESPONSE["output"][3], "arguments": ""}},
    {"type": "response.output_item.done", "output_index": 3, "item": RESPONSE["output"][3]},
    {"type": "response.completed", "response": RESPONSE},
]

MESSAGE = {
    "id": "x",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "AAAA"},
        {"type": "text", "text": "Hello"},
        {"type": "tool_use", "id": "c1", "name": "read", "input": {"p": "a"}},
        {"type": "tool_use", "id": "c2", "name": "ls", "input": {}},
    ],
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 5, "output_tokens": 3},
}
START, DELTA = "content_block_start", "content_block_delta"
MESSAGE_STREAM: list[Any] = [
    {
        "type": "message_start",
        "message": {**MESSAGE, "content": [], "usage": {"input_tokens": 5, "output_tokens": 1}},
    },
    {"type": START, "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
    {"type": "ping"},
    {"type": DELTA, "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
    {"type": DELTA, "index": 0, "delta": {"type": "signature_delta", "signature": "s"}},
    {"type": START, "index": 1, "content_block": {"type": "redacted_thinking", "data": "AAAA"}},
    {"type": START, "index": 2, "content_block": {"type": "text", "text": ""}},
    {"type": DELTA, "index": 2, "delta": {"type": "text_delta", "text": "Hel"}},
    {"type": DELTA, "index": 2, "delta": {"type": "text_delta", "text": "lo"}},
    {"type": "content_block_stop", "index": 2},
    {"type": START, "index": 3, "content_block": {**MESSAGE["content"][3], "input": {}}},
    {"type": DELTA, "index": 3, "delta": {"type": "input_json_delta", "partial_json": '{"p"'}},
    {"type": DELTA, "index": 3, "delta": {"type": "input_json_delta", "partial_json": ':"a"}'}},
    {"type": START, "index": 4, "content_block": MESSAGE["content"][4]},
    {"type": DELTA, "index": 4, "delta": {"type": "input_json_delta", "partial_json": ""}},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 3}},
    {"type": "message_stop"},
]


def candidate(parts: Sequence[Any], finish: str | None = None, **rest: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"content": {"role": "model", "parts": list(parts)}, "index": 0}
    if finish:
        found["finishReason"] = finish
    return {"candidates": [found], "modelVersion": "m", "responseId": "x", **rest}


GEMINI_USAGE = {"promptTokenCount": 5, "candidatesTokenCount": 3, "totalTokenCount": 8}
GEMINI_CALLS = [
    {"functionCall": {"id": "c1", "name": "read", "args": {"p": "a"}}},
    {"functionCall": {"id": "c2", "name": "ls", "args": {}}},
]
GEMINI_STREAM: list[Any] = [
    candidate([{"text": "hm", "thought": True}]),
    candidate([{"text": "Hel"}], usageMetadata={"promptTokenCount": 5, "totalTokenCount": 5}),
    candidate([{"text": "lo"}, GEMINI_CALLS[0]]),
    candidate([GEMINI_CALLS[1], {"text": "", "thoughtSignature": "s"}]),
    candidate([], "STOP", usageMetadata=GEMINI_USAGE),
]
GEMINI_WHOLE = candidate(
    [{"text": "hm", "thought": True}, {"text": "Hello"}, *GEMINI_CALLS],
    "STOP",
    usageMetadata=GEMINI_USAGE,
)

REPLIES: list[tuple[Dialect, list[Any], dict[str, Any], str]] = [
    (OPENAI, CHAT_STREAM, CHAT_WHOLE, "tool_calls"),
    (RESPONSES, RESPONSES_STREAM, RESPONSE, "completed"),
    (ANTHROPIC, MESSAGE_STREAM, MESSAGE, "tool_use"),
    (GEMINI, GEMINI_STREAM, GEMINI_WHOLE, "STOP"),
]


@pytest.mark.parametrize(("dialect", "stream", "whole", "finish"), REPLIES)
def test_a_stream_and_a_whole_body_give_the_same_reply(
    dialect: Dialect, stream: list[Any], whole: dict[str, Any], finish: str
) -> None:
    expected = {
        "id": "x",
        "model": "m",
        "text": "Hello",
        "reasoning": "hm",
        # Anthropic's streams have no text for arguments that are empty.
        "calls": [CALLS[0], ToolCall("ls", "" if dialect is ANTHROPIC else "{}", "c2")],
        "finish": finish,
        "usage": Usage(5, 3),
        "complete": True,
        "error": "",
    }
    assert summary(reply(dialect, *stream)) == expected
    assert summary(reply(dialect, whole)) == expected


@pytest.mark.parametrize(("dialect", "stream", "whole", "finish"), REPLIES)
def test_a_reply_reads_the_same_through_its_framing_and_any_cut(
    dialect: Dialect, stream: list[Any], whole: dict[str, Any], finish: str
) -> None:
    expected = summary(reply(dialect, *stream))
    texts = [one if isinstance(one, bytes) else encode(one) for one in stream]
    body = b"".join(b"data: " + one + b"\n\n" for one in texts)
    for size in (1, 3, 64, len(body)):
        framing, reader = SSE(), dialect.reader()
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        events = [event for piece in pieces for event in framing.feed(piece)] + framing.end()
        for event in events:
            reader.feed(event.data)
        assert summary(reader.finish()) == expected


def test_geminis_array_reads_like_its_event_stream() -> None:
    body = b"[" + b",\r\n".join(encode(one) for one in GEMINI_STREAM) + b"\n]\n"
    expected = summary(reply(GEMINI, *GEMINI_STREAM))
    framing = JSONArray()
    events = [*framing.feed(body), *framing.end()]
    assert summary(reply(GEMINI, *(event.data for event in events))) == expected
    assert summary(reply(GEMINI, body)) == expected


@pytest.mark.parametrize(("dialect", "stream", "whole", "finish"), REPLIES)
def test_a_stream_that_was_cut_is_not_complete(
    dialect: Dialect, stream: list[Any], whole: dict[str, Any], finish: str
) -> None:
    found = reply(dialect, *stream[: len(stream) // 3])
    assert not found.complete
    assert not found.finish_reason


@pytest.mark.parametrize(("dialect", "stream", "whole", "finish"), REPLIES)
def test_what_is_no_event_of_the_dialect_is_ignored(
    dialect: Dialect, stream: list[Any], whole: dict[str, Any], finish: str
) -> None:
    noise: list[Any] = [
        b"",
        b"  ",
        b"not json",
        b'{"cut":',
        b"[1,2",
        b"null",
        b"7",
        b'"text"',
        b"[1,null,[]]",
        b"{}",
        {"type": "unheard.of", "delta": {"x": 1}},
        b"[" * 100_000,
    ]
    mixed = [one for payload in stream for one in (*noise, payload)]
    assert summary(reply(dialect, *mixed)) == summary(reply(dialect, *stream))


@pytest.mark.parametrize(
    ("dialect", "payload", "error"),
    [
        (
            OPENAI,
            {"error": {"message": "m", "type": "rate_limit_error", "code": None}},
            "rate_limit_error",
        ),
        (OPENAI, {"error": {"message": "m", "code": 429}, "choices": []}, "429"),
        (OPENAI, {"error": "text"}, "error"),
        (OPENAI, {"error": {"type": {"deep": "secret prompt"}}}, "error"),
        (OPENAI, {"x_groq": {"error": "Failed to call a function: secret prompt"}}, "error"),
        (OPENAI, {"error": None}, ""),
        (RESPONSES, {"type": "error", "code": "server_error", "message": "m"}, "server_error"),
        (
            RESPONSES,
            {"type": "error", "error": {"type": "invalid_request_error"}},
            "invalid_request_error",
        ),
        (
            RESPONSES,
            {
                "type": "response.failed",
                "response": {"status": "failed", "error": {"code": "rate_limit_exceeded"}},
            },
            "rate_limit_exceeded",
        ),
        (RESPONSES, {"error": {"type": "invalid_request_error"}}, "invalid_request_error"),
        (ANTHROPIC, {"type": "error", "error": {"type": "overloaded_error"}}, "overloaded_error"),
        (ANTHROPIC, {"type": "error"}, "error"),
        (GEMINI, {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}, "RESOURCE_EXHAUSTED"),
        (GEMINI, [{"error": {"code": 400}}], "400"),
    ],
)
def test_an_error_is_known_by_its_type(dialect: Dialect, payload: Any, error: str) -> None:
    assert reply(dialect, payload).error == error


def test_an_error_in_mid_stream_keeps_what_came_before() -> None:
    error = {
        "error": {"code": 502, "message": "Provider disconnected"},
        "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}],
    }
    found = reply(OPENAI, *CHAT_STREAM[:4], error)
    assert ("".join(found.text), found.error, found.finish_reason) == ("Hello", "502", "error")


def test_calls_that_share_an_index_are_told_apart_by_id() -> None:
    first = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{"}}
    more = {"index": 0, "function": {"arguments": "}"}}
    second = {"index": 0, "id": "b", "function": {"name": "f", "arguments": "{"}}
    found = reply(
        OPENAI, *(chat_chunk({"tool_calls": [call]}) for call in (first, more, second, more))
    )
    assert found.tool_calls == [ToolCall("f", "{}", "a"), ToolCall("f", "{}", "b")]


def test_custom_and_older_calls_are_read() -> None:
    message = {
        "tool_calls": [{"id": "a", "type": "custom", "custom": {"name": "patch", "input": "x"}}],
        "function_call": {"name": "old", "arguments": "{}"},
    }
    whole = {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert reply(OPENAI, whole).tool_calls == [ToolCall("patch", "x", "a"), ToolCall("old", "{}")]


def test_mistrals_content_in_pieces_is_read() -> None:
    pieces = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "Hello"},
        {"type": "reference", "reference_ids": [1]},
    ]
    found = reply(OPENAI, chat_chunk({"content": pieces}, "stop"))
    assert ("".join(found.reasoning), "".join(found.text)) == ("hm", "Hello")
    assert found.complete


def test_calls_of_server_side_tools_are_read_with_what_they_did() -> None:
    action = {"type": "search", "query": "q"}
    item = {"type": "web_search_call", "id": "ws_1", "action": action}
    stream = [
        {"type": ADDED, "output_index": 0, "item": {"type": "web_search_call", "id": "ws_1"}},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
    ]
    whole = {"object": "response", "status": "completed", "output": [item]}
    expected = [ToolCall("web_search_call", '{"type":"search","query":"q"}')]
    assert reply(RESPONSES, *stream).tool_calls == expected
    assert reply(RESPONSES, whole).tool_calls == expected


def test_a_terminal_event_alone_gives_the_whole_reply() -> None:
    found = reply(RESPONSES, {"type": "response.completed", "response": RESPONSE})
    assert summary(found) == summary(reply(RESPONSES, RESPONSE))


def test_a_blocked_prompt_is_a_complete_reply() -> None:
    found = reply(GEMINI, {"promptFeedback": {"blockReason": "SAFETY"}})
    assert (found.finish_reason, found.complete) == ("SAFETY", True)


@pytest.mark.parametrize(("dialect", "stream", "whole", "finish"), REPLIES)
def test_a_reply_with_any_value_replaced_is_still_read(
    dialect: Dialect, stream: list[Any], whole: dict[str, Any], finish: str
) -> None:
    for odd in variations(copy.deepcopy(whole)):
        check(reply(dialect, odd))
    for payload in stream:
        if isinstance(payload, bytes):
            continue
        for odd in variations(copy.deepcopy(payload)):
            # Twice, so that what one event leaves behind meets the next one too.
            check(reply(dialect, odd, odd, payload))


def check(found: Reply) -> None:
    for name in ("id", "model", "finish_reason", "error"):
        assert isinstance(getattr(found, name), str)
    "".join(found.text + found.reasoning)
    for call in found.tool_calls:
        "".join((call.name, call.arguments, call.id))


@given(st.lists(st.dictionaries(words, anything, max_size=4), max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_payloads_are_read(payloads: list[Any]) -> None:
    for dialect in DIALECTS.values():
        check(reply(dialect, *payloads))


# --- our own answers, read by the providers' own SDKs ---------------------------------------

OFFERS = [Offer("kimi-k2-thinking", "nvidia", 262_144), Offer("local/*x", "local")]


def test_the_openai_sdk_reads_our_list_of_models_and_errors() -> None:
    from openai.pagination import SyncPage
    from openai.types import ErrorObject, Model

    page = SyncPage[Model].model_validate_json(OPENAI.models(OFFERS))
    assert [(model.id, model.owned_by) for model in page.data] == [
        ("kimi-k2-thinking", "nvidia"),
        ("local/*x", "local"),
    ]
    body = json.loads(OPENAI.error(429, 'slow "down"'))
    error = ErrorObject.model_validate(body["error"])
    assert (error.type, error.message) == ("rate_limit_error", 'slow "down"')


def test_the_openai_sdk_reads_our_error_event_of_responses() -> None:
    from openai.types.responses import ResponseErrorEvent

    (event,) = SSE().feed(RESPONSES.error_event(502, "gone"))
    assert event.type == "error"
    read_back = ResponseErrorEvent.model_validate({**json.loads(event.data), "sequence_number": 0})
    assert (read_back.code, read_back.message) == ("502", "gone")
    assert json.loads(RESPONSES.error(404, "no"))["error"]["type"] == "not_found_error"


def test_the_anthropic_sdk_reads_our_list_of_models_and_errors() -> None:
    from anthropic.pagination import SyncPage
    from anthropic.types import ErrorResponse, ModelInfo

    page = SyncPage[ModelInfo].model_validate_json(ANTHROPIC.models(OFFERS))
    assert [model.id for model in page.data] == ["kimi-k2-thinking", "local/*x"]
    assert page.has_more is False
    assert [model.max_input_tokens for model in page.data] == [262_144, None]
    assert page.last_id == "local/*x"
    assert SyncPage[ModelInfo].model_validate_json(ANTHROPIC.models([])).data == []
    error = ErrorResponse.model_validate_json(ANTHROPIC.error(401, "who are you"))
    assert (error.error.type, error.error.message) == ("authentication_error", "who are you")
    (event,) = SSE().feed(ANTHROPIC.error_event(529, "busy", "overloaded_error"))
    assert event.type == "error"
    assert ErrorResponse.model_validate_json(event.data).error.type == "overloaded_error"


def test_the_google_sdk_reads_our_list_of_models_and_errors() -> None:
    from google import genai
    from google.genai.errors import ClientError

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = self.path.partition("?")[0].endswith("/models")
            body = GEMINI.models(OFFERS) if listed else GEMINI.error(404, "no such model")
            self.send_response(200 if listed else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        client = genai.Client(api_key="AIza", http_options={"base_url": url})
        models = list(client.models.list())
        with pytest.raises(ClientError) as caught:
            client.models.get(model="unknown")
        server.shutdown()
    assert [model.name for model in models] == ["models/kimi-k2-thinking", "models/local/*x"]
    assert models[0].input_token_limit == 262_144
    assert models[0].supported_actions == ["generateContent", "streamGenerateContent"]
    error = caught.value
    assert (error.code, error.status, error.message) == (404, "NOT_FOUND", "no such model")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429, 500, 502, 503, 504, 529])
def test_every_status_has_an_error_that_its_own_reader_knows(status: int) -> None:
    for dialect in DIALECTS.values():
        assert reply(dialect, dialect.error(status, "why")).error
        assert reply(dialect, dialect.error(status, "why", "own_type")).error == "own_type"
        (event,) = SSE().feed(dialect.error_event(status, "why", "own_type"))
        assert reply(dialect, event.data).error == "own_type"
