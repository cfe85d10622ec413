"""Tokens that a chat template adds round the text, and those of tool definitions."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kimi_core.tokens.models import model_tokens
from kimi_core.tokens.tokenizer import Tokenizer, tokenizer_for

# Template -> (per message, per request). A message's figure holds its markers and its role;
# a request's, what opens the text and primes the reply. Where roles differ, the user's is taken.
_OVERHEAD: Mapping[str, tuple[int, int]] = {
    # "every reply is primed with <|start|>assistant<|message|>", 3 a message and its role: 1.
    # -- https://github.com/openai/openai-cookbook/blob/main/examples/How_to_count_tokens_with_tiktoken.ipynb
    "openai": (4, 3),
    "openai-cl100k": (4, 3),
    # <|im_user|>user<|im_middle|>...<|im_end|>, then <|im_assistant|>assistant<|im_middle|>
    # -- https://huggingface.co/moonshotai/Kimi-K2-Instruct (chat_template)
    "kimi-k2": (4, 3),
    # <|open|>message role="user"<|sep|>...<|close|>message<|sep|><|end_of_msg|>; a request adds
    # the message on thinking effort, and opens the reply's message and its think block.
    # -- https://huggingface.co/moonshotai/Kimi-K3 (encoding_k3.py)
    "kimi-k3": (11, 77),
    # <|im_start|>user\n...<|im_end|>\n, then <|im_start|>assistant\n
    "chatml": (5, 3),
    # <｜User｜>..., <｜Assistant｜></think>...<｜end▁of▁sentence｜>: 1 and 3; the mean is taken.
    # The request: <｜begin▁of▁sentence｜>, <｜Assistant｜></think>
    "deepseek": (2, 3),
    # [INST]...[/INST]; ...</s>. The request: <s>
    "mistral": (2, 1),
    # [gMASK]<sop>, <|user|>\n..., then <|assistant|>
    "glm": (2, 3),
    # <|start_header_id|>user<|end_header_id|>\n\n...<|eot_id|>; <|begin_of_text|> and a header
    "llama3": (5, 5),
    # <start_of_turn>user\n...<end_of_turn>\n; <bos>, then <start_of_turn>model\n
    "gemma": (5, 4),
    # "Why is the sky blue?" is reported as prompt_token_count=6, the tokens of the text alone
    # (for some prompts and models Google prints one more).
    # -- https://github.com/GoogleCloudPlatform/python-docs-samples genai/count_tokens
    "gemini": (0, 0),
}
DEFAULT_OVERHEAD = (4, 3)

# Function start: 7 for gpt-4o and later, 10 for gpt-4 and gpt-3.5 (cookbook, section 7).
_FUNCTION_START = {"openai": 7, "openai-cl100k": 10}
_FUNCTIONS_END = 12
_PROPERTIES_START = 3
_PROPERTY = 3
_ENUM_START = -3
_ENUM_ITEM = 3

_K3_DECLARE = 'message role="system" type="tool-declare"'
_K3_INTRO = "# Tools\nHere are the available tools, described in JSONSchema.\n\n```json\n"


def message_overhead(model: str) -> tuple[int, int]:
    """Return the tokens that the template adds per message (role included) and per request.

    A `name` of an OpenAI message costs its own tokens and 1. Kimi K2 answers a conversation
    without a system message as if it began with "You are a helpful assistant"; that is not
    counted here. Models without a published template get DEFAULT_OVERHEAD.
    """
    return _OVERHEAD.get(model_tokens(model).template, DEFAULT_OVERHEAD)


def count_tool_definitions(model: str, tools: Sequence[Any]) -> int:
    """Return the tokens of a request's `tools` as the model is shown them.

    OpenAI: the cookbook's formula, for function tools of both its APIs; Kimi: the declaration
    of its chat template; others: the tokens of the compact JSON, which is an estimate.
    """
    if not tools:
        return 0
    template = model_tokens(model).template
    tokenizer = tokenizer_for(model)
    if template in _FUNCTION_START:
        start = _FUNCTION_START[template]
        return sum(_openai_tool(tokenizer, tool, start) for tool in tools) + _FUNCTIONS_END
    if template == "kimi-k2":
        # <|im_system|>tool_declare<|im_middle|>...<|im_end|>, keys sorted by the tokenizer's
        # apply_chat_template
        text = _compact(tools, sort_keys=True)
        return 3 + tokenizer.count("tool_declare") + tokenizer.count(text)
    if template == "kimi-k3":
        body = _K3_INTRO + _compact(tools, sort_keys=True) + "\n```"
        texts = (_K3_DECLARE, body, "message")
        return 5 + sum(tokenizer.count_many(texts))
    return tokenizer.count(_compact(tools))


def _compact(value: object, *, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys)


def _openai_tool(tokenizer: Tokenizer, tool: object, start: int) -> int:
    function = _function(tool)
    if function is None:
        return tokenizer.count(_compact(tool))
    total = start + tokenizer.count(_line(function.get("name"), function.get("description")))
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if not isinstance(properties, dict) or not properties:
        return total
    total += _PROPERTIES_START
    for key, schema in properties.items():
        total += _PROPERTY
        if not isinstance(schema, dict):
            schema = {}
        enum = schema.get("enum")
        if isinstance(enum, list):
            total += _ENUM_START
            for item in enum:
                total += _ENUM_ITEM + tokenizer.count(item if isinstance(item, str) else str(item))
        total += tokenizer.count(_line(key, schema.get("type"), schema.get("description")))
        # The cookbook stops here; a nested schema is written out for the model all the same.
        nested = {k: v for k, v in schema.items() if k not in ("type", "description", "enum")}
        if nested:
            total += tokenizer.count(_compact(nested))
    return total


def _function(tool: object) -> dict[str, Any] | None:
    """Return the function of a tool, nested as in Chat Completions or flat as in Responses."""
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        return None
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else None


def _line(*parts: object) -> str:
    """Return `a:b:c` as the cookbook writes it: without the description's last full stop."""
    *words, description = ("" if part is None else str(part) for part in parts)
    return ":".join((*words, description.removesuffix(".")))
