"""Which vocabulary and which chat template a model id stands for."""

import re
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class ModelTokens:
    """What is known of a model's tokens.

    `exact` is True only where vectors of the model's maker (tests/golden/tokens) show that
    `vocabulary`, a name that splintr knows, gives the maker's own ids for plain text.
    """

    vocabulary: str
    exact: bool
    template: str


def bare_name(model: str) -> str:
    """Return the model's own name, in lower case, without vendor, route or price class.

    `Pro/moonshotai/Kimi-K2.5:free`, `accounts/fireworks/models/kimi-k2p5`,
    `ft:gpt-4o:my-org::id` and `publishers/google/models/gemini-2.5-pro@001` are read.
    """
    name = model.strip().lower()
    if name.startswith("ft:"):
        name = name[3:]
    name = name.rsplit("/", 1)[-1]
    return re.split(r"[:@]", name, maxsplit=1)[0]


# First match wins; patterns are matched from the start of the bare name. Where a maker publishes
# a list of models and encodings, the pattern follows that list:
# OpenAI  -- https://github.com/openai/tiktoken/blob/main/tiktoken/model.py
# Mistral -- MODEL_NAME_TO_TOKENIZER_CLS in
#   https://github.com/mistralai/mistral-common/blob/main/src/mistral_common/tokens/tokenizers/mistral.py
# Google  -- https://github.com/googleapis/python-genai/blob/main/google/genai/_local_tokenizer_loader.py
# (all read 2026-11-21)
_RULES: tuple[tuple[str, str, bool, str], ...] = (
    # OpenAI. gpt-oss has o200k's ranks and other control tokens, which plain text never uses.
    (r"gpt-oss|o200k", "o200k_base", True, "openai"),
    (r"(chat)?gpt-4o|gpt-4\.[15]|gpt-5|o[13](-|$)|o4-mini", "o200k_base", True, "openai"),
    (
        r"gpt-4(-|$)|gpt-3\.?5|text-embedding-(ada-002|3-)|(davinci|babbage)-002|cl100k",
        "cl100k_base",
        True,
        "openai-cl100k",
    ),
    # Moonshot. K2, K2.5, K2.6, K2.7 and K3 ship one and the same tiktoken.model and pattern.
    (r"kimi[-_]?k3|k3(-|$)", "kimi_k2", True, "kimi-k3"),
    (r"kimi[-_]?k2|k2p\d|k2(-|$)|kimi-for-coding", "kimi_k2", True, "kimi-k2"),
    (r"kimi-dev", "qwen3", False, "chatml"),
    (r"kimi|moonshot|moonlight", "kimi_k2", False, "kimi-k2"),
    # DeepSeek. Distilled models keep the vocabulary of the model they were made from.
    (r"deepseek-r1-distill-qwen", "qwen3", False, "deepseek"),
    (r"deepseek-r1-distill-llama", "llama3", False, "deepseek"),
    (r"deepseek[-_]?(chat|reasoner|v3|v4|r1)", "deepseek_v3", True, "deepseek"),
    (r"deepseek", "deepseek_v3", False, "deepseek"),
    # Mistral. splintr's mistral_v2 is the SentencePiece vocabulary of v2, v3 and v7 alike, and
    # its mistral_v3 is Tekken.
    (
        r"mistral-7b(-instruct)?-v0\.[12]|(open-)?mixtral-8x7b|mistral-medium-2312",
        "mistral_v1",
        True,
        "mistral",
    ),
    (
        r"mistral-7b(-instruct)?-v0\.3|(open-)?mixtral-8x22b"
        r"|mistral-(tiny-2312|tiny-2407|small-2312|small-2402|large-24\d\d)"
        r"|codestral-(2405|22b|mamba)|pixtral-large-2411",
        "mistral_v2",
        True,
        "mistral",
    ),
    (
        r"(open-)?mistral-nemo|ministral-8b-2410|mistral-small-2409|pixtral-12b",
        "mistral_v3",
        True,
        "mistral",
    ),
    (r"(open-)?(mixtral|mistral-7b|mathstral)", "mistral_v2", False, "mistral"),
    (
        r"(open-|labs-)?(mistral|ministral|codestral|devstral|magistral|pixtral|voxtral)",
        "mistral_v3",
        False,
        "mistral",
    ),
    # Qwen. 3.5 brought a vocabulary of its own; the closed models' is not published.
    (r"qwen.*-(max|plus|turbo|flash|long)", "qwen3", False, "chatml"),
    (r"qwen-?(1\.5|2|2\.5|3)(?![.\d])|qwq-32b|qvq-72b", "qwen3", True, "chatml"),
    (r"qwen|qwq|qvq", "qwen3", False, "chatml"),
    # GLM. From 4.5 on, a published hash of the ids does not come out of this vocabulary.
    (r"glm-4-(9b|32b-0414)|glm-z1-(9b|32b)-0414", "glm4", True, "glm"),
    (r"(chat)?glm", "glm4", False, "glm"),
    (r"(meta-?)?llama-?(guard-)?3", "llama3", True, "llama3"),
    (r"(meta-?)?llama", "llama3", False, "llama3"),
    # Google. Gemini 2.x counts as Gemma 3, from 3.1 on as Gemma 4, in Google's own SDK; the ids
    # agree, but the counts that Google prints are sometimes one more than the text's.
    (r"gemini-(3\.[1-9]|[4-9])", "gemma4", False, "gemini"),
    (r"gemini-(live-)?(2\.|3-)", "gemma3", False, "gemini"),
    (r"gemini", "gemma4", False, "gemini"),
    (r"gemma-?[12](?!\d)|codegemma|gemma-\db", "gemma2", True, "gemma"),
    (r"(function)?gemma-?3(?!\d)|medgemma", "gemma3", True, "gemma"),
    (r"gemma-?4(?!\d)", "gemma4", True, "gemma"),
    (r"gemma", "gemma4", False, "gemma"),
    # Anthropic has published no tokenizer for Claude 3 and later.
    (r"(.*\.)?claude", "o200k_base", False, "anthropic"),
)
_COMPILED = tuple(
    (re.compile(pattern), ModelTokens(vocabulary, exact, template))
    for pattern, vocabulary, exact, template in _RULES
)
_UNKNOWN = ModelTokens("o200k_base", False, "other")


# Model ids come from clients, so what is remembered of them is bounded.
@lru_cache(maxsize=1024)
def model_tokens(model: str) -> ModelTokens:
    """Return the vocabulary and template of a model id; o200k as an estimate when unknown."""
    name = bare_name(model)
    for pattern, known in _COMPILED:
        if pattern.match(name):
            return known
    return _UNKNOWN
