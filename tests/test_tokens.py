"""Counts of tokens against what the makers of the models published, and under bad input."""

import base64
import hashlib
import json
import random
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import splintr
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core.tokens import (
    DEFAULT_IMAGE_TOKENS,
    Tokenizer,
    count_tool_definitions,
    image_size,
    image_tokens,
    message_overhead,
    tokenizer_for,
    warm,
)
from kimi_core.tokens.models import _RULES
from kimi_core.tokens.tokenizer import PIECE_CHARS, _vocabulary

GOLDEN = Path(__file__).parent / "golden" / "tokens"


def golden(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return content


CHECK_TEXT: str = golden("check_text")["text"]
VOCABULARIES = sorted(
    path.stem
    for path in GOLDEN.glob("*.json")
    if path.stem not in ("check_text", "openai_requests")
)

AWKWARD = [
    "",
    " ",
    CHECK_TEXT,
    "I'll we'LL HE'LL it'ſ ſ's 'S 's 'Re can'T Kelvin's ĲSSEL's",
    "👨‍👩‍👧‍👦 👍🏽 🇩🇪 e\u0301 a\u0308\u0323\u0301 ﬁ İı ẞß ǅ ʰ",
    "中文字符，日本語テキスト。カタカナ 한국어 漢字漢A字1々〇𠀀",
    "12345678901234567890 3.14159 ١٢٣ ²³ ½ Ⅷ 1,000,000",
    "a\r\nb\rc\n\n\n d\t\t e \u00a0\u3000\u2028 f   ",
    "\x00\x07\x1b[0m\x7f\x85\u200b\u200d\ufeff",
    'def f(x):\n    return {"a": [1, None]}  # !!! ==== //\n/*\n*/\n',
    "<|endoftext|> <|im_end|><|im_user|> [INST] </s> <s> <think> <bos> <start_of_turn>",
]
PARTS = [
    *AWKWARD,
    *("the", "world", "HTTPServer", "camelCase", "snake_case", "naïve", "'ll", "'S", "//", "123"),
    *("\n", "\r\n", "\t", "  ", "\n\n  ", "é", "中文", "😀"),
]


def mixed_text(seed: int, length: int) -> str:
    rng = random.Random(seed)
    parts: list[str] = []
    size = 0
    while size < length:
        part = rng.choice(PARTS)
        if rng.random() < 0.2:
            part = chr(rng.choice([rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF)]))
        parts.append(part + rng.choice(["", " ", " ", "\n"]))
        size += len(parts[-1])
    return "".join(parts)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_published_vectors_come_out_id_for_id(name: str) -> None:
    data = golden(name)
    tokenizer = Tokenizer(name, True)
    for vector in data["vectors"]:
        assert tokenizer.encode(vector["text"]) == vector["ids"], vector["text"]
        assert tokenizer.count(vector["text"]) == len(vector["ids"])
    for vector in data.get("counts", []):
        assert tokenizer.count(vector["text"]) == vector["count"]
    for check in data["id_hashes"]:
        ids = check["before"] + tokenizer.encode(CHECK_TEXT) + check["after"]
        assert hashlib.sha256(str(ids).encode()).hexdigest() == check["sha256"], check["model"]
    assert data["vectors"] or data["id_hashes"]
    assert data["sources"]


@pytest.mark.parametrize("name", [n for n in VOCABULARIES if "rank_file" in golden(n)])
def test_the_whole_vocabulary_is_the_file_that_the_maker_published(name: str) -> None:
    expected = golden(name)["rank_file"]
    core = splintr.Tokenizer.from_pretrained(name)
    first = expected["first_id"]
    lines = (
        base64.b64encode(core.decode_token_bytes(first + rank)) + b" %d\n" % rank
        for rank in range(expected["count"])
    )
    assert hashlib.sha256(b"".join(lines)).hexdigest() == expected["sha256"]


def test_the_pattern_of_kimi_is_the_one_that_moonshot_published() -> None:
    digest = hashlib.sha256(splintr.KIMI_PATTERN.encode()).hexdigest()
    assert digest == golden("kimi_k2")["pattern_sha256"]


def test_deepseeks_vocabulary_and_merges_are_those_of_its_tokenizer_json() -> None:
    expected = golden("deepseek_v3")["bpe_core"]
    core = splintr.Tokenizer.from_pretrained("deepseek_v3")
    ranks: dict[bytes, int] = {}
    for number in range(expected["count"]):
        token = core.decode_token_bytes(number)
        if token:
            ranks[token] = number

    def spell(token: bytes) -> str:
        return "".join(BYTE_LEVEL[byte] for byte in token)

    merges = [[spell(a), spell(b)] for a, b in (split(t, ranks) for t in ranks if len(t) > 1)]
    vocab = {spell(token): number for token, number in ranks.items()} | expected["extra"]
    text = json.dumps(
        {"vocab": vocab, "merges": merges},
        ensure_ascii=False,
        sort_keys=True,
        separators=(",", ":"),
    )
    assert hashlib.sha256(text.encode()).hexdigest() == expected["sha256"]


def byte_level() -> dict[int, str]:
    """Return the printable stand-ins that tokenizer.json uses for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (byte for byte in range(256) if byte not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


BYTE_LEVEL = byte_level()


def split(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two tokens whose merge makes this one."""
    pairs = [[token[:at], token[at:]] for at in range(1, len(token))]
    known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    if len(known) == 1:
        return known[0]
    limit = ranks[token]
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, at = min(
            (ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)
        )
        assert rank < limit
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def as_tiktoken(name: str, count: int, pattern: str) -> tiktoken.Encoding:
    core = splintr.Tokenizer.from_pretrained(name)
    ranks = {core.decode_token_bytes(number): number for number in range(count)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def references() -> list[tuple[Tokenizer, tiktoken.Encoding]]:
    return [
        (Tokenizer("o200k_base", True), as_tiktoken("o200k_base", 199_998, O200K_PATTERN)),
        (Tokenizer("kimi_k2", True), as_tiktoken("kimi_k2", 163_584, splintr.KIMI_PATTERN)),
    ]


# As in tiktoken_ext/openai_public.py of tiktoken 0.14.
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def test_ids_equal_tiktokens_on_mixed_text(
    references: list[tuple[Tokenizer, tiktoken.Encoding]],
) -> None:
    texts = [*AWKWARD, *(mixed_text(seed, 200) for seed in range(300))]
    texts += [" x".join(chr(c) for c in range(base, base + 64)) for base in range(0, 0xD800, 64)]
    for tokenizer, reference in references:
        for text in texts:
            assert tokenizer.encode(text) == reference.encode_ordinary(text), ascii(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80) | st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
def test_ids_equal_tiktokens_on_any_text(
    references: list[tuple[Tokenizer, tiktoken.Encoding]], text: str
) -> None:
    for tokenizer, reference in references:
        ids = tokenizer.encode(text)
        assert ids == reference.encode_ordinary(text)
        assert tokenizer.count(text) == len(ids)


@pytest.mark.parametrize(
    ("model", "vocabulary", "exact"),
    [
        ("gpt-4o", "o200k_base", True),
        ("openai/gpt-4.1-mini-2025-04-14", "o200k_base", True),
        ("GPT-5.2-codex", "o200k_base", True),
        ("o1", "o200k_base", True),
        ("o3-mini", "o200k_base", True),
        ("o4-mini-2025-04-16", "o200k_base", True),
        ("ft:gpt-4o-mini:my-org::abc", "o200k_base", True),
        ("openai/gpt-oss-120b:free", "o200k_base", True),
        ("gpt-4", "cl100k_base", True),
        ("gpt-4-turbo", "cl100k_base", True),
        ("gpt-3.5-turbo-0125", "cl100k_base", True),
        ("text-embedding-3-small", "cl100k_base", True),
        ("kimi-k2-0905-preview", "kimi_k2", True),
        ("Pro/moonshotai/Kimi-K2.5", "kimi_k2", True),
        ("accounts/fireworks/models/kimi-k2p5", "kimi_k2", True),
        ("moonshotai/kimi-k2-thinking-maas", "kimi_k2", True),
        ("kimi-for-coding", "kimi_k2", True),
        ("k3-256k", "kimi_k2", True),
        ("moonshotai/kimi-k3:free", "kimi_k2", True),
        ("moonshot-v1-128k", "kimi_k2", False),
        ("deepseek-chat", "deepseek_v3", True),
        ("deepseek/deepseek-r1-0528:free", "deepseek_v3", True),
        ("deepseek-ai/DeepSeek-V3.2-Exp", "deepseek_v3", True),
        ("deepseek-r1-distill-llama-70b", "llama3", False),
        ("deepseek-coder-33b", "deepseek_v3", False),
        ("mistral-7b-instruct-v0.2", "mistral_v1", True),
        ("open-mixtral-8x22b", "mistral_v2", True),
        ("mistral-large-2411", "mistral_v2", True),
        ("open-mistral-nemo-2407", "mistral_v3", True),
        ("ministral-8b-2410", "mistral_v3", True),
        ("pixtral-12b-2409", "mistral_v3", True),
        ("mistral/codestral-2501", "mistral_v3", False),
        ("devstral-small-2507", "mistral_v3", False),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen3", True),
        ("qwen3-coder-480b-a35b-instruct", "qwen3", True),
        ("qwen3:8b", "qwen3", True),
        ("qwen3-max", "qwen3", False),
        ("qwen3.5-397b-a17b", "qwen3", False),
        ("THUDM/glm-4-9b-chat", "glm4", True),
        ("zai-org/GLM-4.6", "glm4", False),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3", True),
        ("llama-4-scout", "llama3", False),
        ("google/gemma-2-9b-it", "gemma2", True),
        ("google/gemma-3-27b-it", "gemma3", True),
        ("models/gemini-2.5-pro", "gemma3", False),
        ("gemini-3-flash-preview", "gemma3", False),
        ("gemini-3.1-pro-preview", "gemma4", False),
        ("google/gemini-3.5-flash", "gemma4", False),
        ("claude-opus-4-1", "o200k_base", False),
        ("us.anthropic.claude-sonnet-4-20250514-v1:0", "o200k_base", False),
        ("openrouter/aurora-alpha", "o200k_base", False),
        ("", "o200k_base", False),
    ],
)
def test_a_model_id_finds_its_vocabulary(model: str, vocabulary: str, exact: bool) -> None:
    assert tokenizer_for(model) == Tokenizer(vocabulary, exact)


def test_only_vocabularies_with_published_vectors_are_called_exact() -> None:
    exact = {vocabulary for _, vocabulary, is_exact, _ in _RULES if is_exact}
    shown = {name for name in VOCABULARIES if golden(name)["shows_exact"]}
    assert exact == shown


@pytest.mark.parametrize("name", VOCABULARIES)
def test_control_tokens_in_a_text_are_counted_as_text(name: str) -> None:
    core = splintr.Tokenizer.from_pretrained(name)
    tokenizer = Tokenizer(name, True)
    for token in ("<|endoftext|>", "<|im_end|>", "<|im_user|>", "[INST]", "</s>", "<bos>"):
        text = f"say {token} twice: {token}"
        if token in core.special_tokens():
            ids = tokenizer.encode(text)
            assert core.special_token_id(token) not in ids
            assert ids == core.encode_ordinary(text)
            assert tokenizer.count(text) == len(ids)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *(("o200k_base", unit) for unit in (" ", "\n", "\t", "a", "<", "\x00", "\r\n", " a", "中")),
        *(("kimi_k2", unit) for unit in (" ", "a", "\ud83d")),
        *(("mistral_v2", unit) for unit in (" ", "a")),
    ],
)
def test_a_million_repeated_characters_are_counted(name: str, unit: str) -> None:
    tokenizer = Tokenizer(name, True)
    repeats = 1_000_000 // len(unit)
    count = tokenizer.count(unit * repeats)
    # A run costs the same a character however long it is, but for a token at each cut.
    sample = tokenizer.count(unit * (PIECE_CHARS // len(unit)))
    pieces = 1_000_000 / PIECE_CHARS
    assert abs(count - sample * pieces) <= 2 * pieces + sample


def words(seed: int, length: int) -> str:
    rng = random.Random(seed)
    syllables = [
        "ka",
        "To",
        "mi",
        "ñé",
        "中文",
        "X9",
        "_y",
        "дa",
        "(x)",
        "'s",
        "e\u0301",
        "--",
        "π",
        "0",
    ]
    parts: list[str] = []
    size = 0
    while size < length:
        parts.append("".join(rng.choices(syllables, k=rng.randint(1, 4))))
        parts.append(rng.choice([" ", " ", " ", "  ", "\n", "\n    ", ".\r\n", ", "]))
        size += len(parts[-1]) + len(parts[-2])
    return "".join(parts)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_long_text_has_the_ids_of_the_whole(name: str) -> None:
    text = words(1, 5 * PIECE_CHARS // 2)
    whole = splintr.Tokenizer.from_pretrained(name).encode_ordinary(text)
    assert Tokenizer(name, True).encode(text) == whole
    assert Tokenizer(name, True).count(text) == len(whole)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_cutting_changes_no_ids_where_there_are_words(name: str) -> None:
    vocabulary = _vocabulary(name)
    for seed in range(10):
        text = words(seed, 2_000)
        pieces = list(vocabulary.pieces(text, 400))
        assert max(map(len, pieces)) <= 400
        assert len(pieces) >= 5
        ids = [number for piece in pieces for number in vocabulary.core.encode_ordinary(piece)]
        assert ids == vocabulary.core.encode_ordinary(text)


def test_lone_surrogates_count_as_replacement_characters() -> None:
    tokenizer = tokenizer_for("gpt-4o")
    assert tokenizer.encode("a\ud83d b\udc4d") == tokenizer.encode("a\ufffd b\ufffd")
    assert tokenizer.count("a\ud83d b\udc4d") == tokenizer.count("a\ufffd b\ufffd")
    assert tokenizer.encode("\ud83d\udc4d") == tokenizer.encode("👍")


def test_nothing_costs_nothing() -> None:
    assert tokenizer_for("gpt-4o").count("") == 0
    assert tokenizer_for("gpt-4o").encode("") == []
    assert tokenizer_for("mistral-large-2411").count("") == 0


def test_threads_count_the_same_as_one_thread_does() -> None:
    texts = [mixed_text(seed, 2_000) for seed in range(40)]
    tokenizer = tokenizer_for("kimi-k2")
    expected = tokenizer.count_many(texts)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(tokenizer.count_many, [texts] * 8):
            assert result == expected


def test_loading_from_many_threads_needs_no_network() -> None:
    code = """
        import sys, threading
        def refuse(event, args):
            if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
                raise RuntimeError(event)
        sys.addaudithook(refuse)
        from kimi_core.tokens import tokenizer_for, warm
        models = ["gpt-4o", "kimi-k2", "claude-x"]
        threads = [threading.Thread(target=warm, args=(models,)) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(tokenizer_for("gpt-4o").count("hello world"), tokenizer_for("kimi-k2").count("hi"))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": str(Path(__file__).parents[1] / "addons")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["2", "1"], done.stderr


def test_warm_takes_model_ids_and_unknown_names() -> None:
    warm(["gpt-4o", "no-such-model"])
    assert tokenizer_for("no-such-model").count("x") == 1


@pytest.mark.parametrize("request_", golden("openai_requests")["requests"])
def test_a_whole_openai_request_costs_what_the_api_counted(request_: dict[str, Any]) -> None:
    for model, expected in request_["prompt_tokens"].items():
        tokenizer = tokenizer_for(model)
        per_message, total = message_overhead(model)
        for message in request_["messages"]:
            total += per_message + tokenizer.count(message["content"])
            if "name" in message:
                total += 1 + tokenizer.count(message["name"])
        total += count_tool_definitions(model, request_["tools"])
        assert total == expected, model


TOOLS = golden("openai_requests")["requests"][1]["tools"]


def render(model: str, template: str) -> int:
    """Return the tokens of a rendered chat template, control tokens matched."""
    return len(splintr.Tokenizer.from_pretrained(model).encode_with_special(template))


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_a_kimi_k2_conversation_costs_what_its_template_renders_to(role: str) -> None:
    marker = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}.get(role, "<|im_system|>")
    text = "Write a function.\n"
    rendered = (
        "<|im_system|>system<|im_middle|>You are Kimi<|im_end|>"
        f"{marker}{role}<|im_middle|>{text}<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    per_message, per_request = message_overhead("kimi-k2-thinking")
    contents = sum(tokenizer_for("kimi-k2").count_many(["You are Kimi", text]))
    assert contents + 2 * per_message + per_request == render("kimi_k2", rendered)


def test_kimi_k2_tools_cost_what_their_declaration_renders_to() -> None:
    body = json.dumps(TOOLS, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    rendered = f"<|im_system|>tool_declare<|im_middle|>{body}<|im_end|>"
    assert count_tool_definitions("kimi-k2", TOOLS) == render("kimi_k2", rendered)


def test_kimi_k3_costs_what_its_template_renders_to() -> None:
    per_message, per_request = message_overhead("kimi-k3")
    message = '<|open|>message role="user"<|sep|>Hi<|close|>message<|sep|><|end_of_msg|>'
    assert per_message + tokenizer_for("kimi-k3").count("Hi") == render("kimi_k3", message)
    opening = (
        '<|open|>message role="system" type="thinking-effort"<|sep|>`thinking_effort` guides on'
        " how much to think in your thinking channel (not including the response channel),"
        " supported values include `low`, `medium`, `high`, and `max`.\nNow the system is"
        " invoked with `thinking_effort=max`.<|close|>message<|sep|><|end_of_msg|>"
    )
    reply = '<|open|>message role="assistant"<|sep|><|open|>think<|sep|>'
    assert per_request == render("kimi_k3", opening) + render("kimi_k3", reply)
    body = json.dumps(TOOLS, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    declared = (
        '<|open|>message role="system" type="tool-declare"<|sep|># Tools\nHere are the available'
        f" tools, described in JSONSchema.\n\n```json\n{body}\n```"
        "<|close|>message<|sep|><|end_of_msg|>"
    )
    assert count_tool_definitions("kimi-k3", TOOLS) == render("kimi_k3", declared)


@pytest.mark.parametrize(
    ("model", "vocabulary", "message", "request_"),
    [
        ("qwen3-8b", "qwen3", "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"),
        ("glm-4-9b", "glm4", "<|user|>\n{}", "[gMASK]<sop><|assistant|>"),
        (
            "gemma-3-4b",
            "gemma3",
            "<start_of_turn>user\n{}<end_of_turn>\n",
            "<bos><start_of_turn>model\n",
        ),
        (
            "llama-3.1-8b",
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
            "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral-nemo", "mistral_v3", "[INST]{}[/INST]", "<s>"),
    ],
)
def test_overhead_of_other_templates_is_that_of_their_markers(
    model: str, vocabulary: str, message: str, request_: str
) -> None:
    count = tokenizer_for(model).count("Hello")
    assert message_overhead(model) == (
        render(vocabulary, message.format("Hello")) - count,
        render(vocabulary, request_),
    )


def test_gemini_reports_the_text_alone_and_unknown_models_get_a_default() -> None:
    assert message_overhead("gemini-2.0-flash-001") == (0, 0)
    assert message_overhead("some-model") == message_overhead("claude-sonnet-4") == (4, 3)


def test_other_models_are_shown_tools_as_json() -> None:
    expected = tokenizer_for("claude-sonnet-4").count(json.dumps(TOOLS, separators=(",", ":")))
    assert count_tool_definitions("claude-sonnet-4", TOOLS) == expected
    assert count_tool_definitions("claude-sonnet-4", []) == 0


def test_flat_tools_of_the_responses_api_cost_the_same_as_nested_ones() -> None:
    flat = [{"type": "function", **TOOLS[0]["function"], "strict": True}]
    assert count_tool_definitions("gpt-4o", flat) == count_tool_definitions("gpt-4o", TOOLS)


@pytest.mark.parametrize(
    "tool",
    [
        None,
        "x",
        {},
        {"type": "web_search"},
        {"type": "function", "function": None},
        {"function": {"name": "f"}},
        {"function": {"name": "f", "description": None, "parameters": None}},
        {"function": {"name": "f", "parameters": {"properties": []}}},
        {"function": {"name": "f", "parameters": {"properties": {"a": None, "b": True}}}},
        {
            "function": {
                "name": "f",
                "parameters": {
                    "properties": {"a": {"type": ["string", "null"], "enum": [1, None]}}
                },
            }
        },
        {"function": {"name": "\ud83d", "description": "\udc00"}},
    ],
)
@pytest.mark.parametrize("model", ["gpt-4o", "kimi-k2", "kimi-k3", "claude-sonnet-4"])
def test_odd_tool_definitions_are_counted_and_raise_nothing(model: str, tool: object) -> None:
    assert count_tool_definitions(model, [tool]) > 0


@pytest.mark.parametrize(
    ("model", "size", "detail", "tokens"),
    [
        # Examples of OpenAI's guide.
        ("gpt-4o", (1024, 1024), "high", 765),
        ("gpt-4o", (2048, 4096), "high", 1105),
        ("gpt-4o", (4096, 8192), "low", 85),
        ("gpt-4.1-mini", (1024, 1024), None, 1659),
        ("o4-mini", (1800, 2400), None, 2498),
        # Billed, as measured by users (8 to 12 tokens of text taken off).
        ("gpt-4.1", (2049, 513), None, 1445),
        ("gpt-4.1", (2050, 513), None, 765),
        ("gpt-4o-mini", (128, 64), "high", 8500),
        ("o3", (128, 64), "high", 225),
        ("gpt-5", (512, 512), "auto", 210),
        # Anthropic: width * height / 750, at most about 1,600.
        ("claude-sonnet-4", (1000, 1000), None, 1334),
        ("claude-sonnet-4", (200, 200), None, 54),
        ("claude-sonnet-4", (8000, 8000), None, 1600),
        # Gemini: one tile up to 384 px, then tiles of 258.
        ("gemini-2.5-flash", (384, 384), None, 258),
        ("gemini-2.5-flash", (960, 540), None, 6 * 258),
        ("some-model", (1000, 1000), None, DEFAULT_IMAGE_TOKENS),
        ("gpt-4o", (0, 10), None, DEFAULT_IMAGE_TOKENS),
    ],
)
def test_an_image_costs_what_the_provider_documents(
    model: str, size: tuple[int, int], detail: str | None, tokens: int
) -> None:
    assert image_tokens(model, *size, detail) == tokens


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_patches_never_exceed_their_cap(width: int, height: int) -> None:
    assert 0 < image_tokens("gpt-4.1-mini", width, height) <= 2489
    assert 0 < image_tokens("gpt-4o", width, height) <= 85 + 170 * 8


def chunk(name: bytes, body: bytes) -> bytes:
    return (
        b"RIFF"
        + (len(body) + 12).to_bytes(4, "little")
        + b"WEBP"
        + name
        + (len(body).to_bytes(4, "little") + body)
    )


IMAGES = {
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\x02\x80\0\0\x01\xe0\x08\x02\0\0\0",
    "gif": b"GIF89a\x80\x02\xe0\x01\xf7\0\0",
    "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0\xff\xff\xfe\0\x05abc"
    b"\xff\xc4\0\x04\0\0\xff\xc2\0\x11\x08\x01\xe0\x02\x80\x03\x01\x22\0",
    "webp lossy": chunk(b"VP8 ", b"\0\0\0\x9d\x01\x2a\x80\x02\xe0\x01"),
    "webp lossless": chunk(b"VP8L", b"\x2f" + (639 | 479 << 14).to_bytes(4, "little")),
    "webp extended": chunk(b"VP8X", b"\x10\0\0\0\x7f\x02\0\xdf\x01\0"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_the_size_of_an_image_is_read_from_its_header(kind: str) -> None:
    assert image_size(IMAGES[kind]) == (640, 480)
    assert image_size(IMAGES[kind] + b"\0" * 1000) == (640, 480)


@pytest.mark.parametrize("kind", IMAGES)
def test_a_cut_header_gives_no_size_or_the_right_one(kind: str) -> None:
    sizes = {image_size(IMAGES[kind][:length]) for length in range(len(IMAGES[kind]))}
    assert sizes <= {None, (640, 480)}
    assert None in sizes


@given(st.sampled_from(sorted(IMAGES)), st.integers(0, 40), st.binary(max_size=60))
def test_no_bytes_make_image_size_raise(kind: str, keep: int, rest: bytes) -> None:
    size = image_size(IMAGES[kind][:keep] + rest)
    assert size is None or min(size) > 0
