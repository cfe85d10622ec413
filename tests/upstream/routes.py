"""Which API a path belongs to, and which provider a host name belongs to."""

import re
from dataclasses import dataclass
from typing import Literal

Dialect = Literal["openai", "responses", "anthropic", "gemini"]
Operation = Literal["generate", "count_tokens", "models"]

# Host -> whose quirks it has. All hosts that a default certificate is good for.
PROVIDERS: dict[str, str] = {
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "api.kimi.com": "kimi-code",
    "api.moonshot.ai": "moonshot",
    "api.moonshot.cn": "moonshot",
    "integrate.api.nvidia.com": "nvidia",
    "api.mistral.ai": "mistral",
    "codestral.mistral.ai": "mistral",
    "openrouter.ai": "openrouter",
    "api.siliconflow.cn": "siliconflow",
    "api.siliconflow.com": "siliconflow",
    "api.groq.com": "groq",
    "api.cerebras.ai": "cerebras",
    "generativelanguage.googleapis.com": "gemini",
    "aiplatform.googleapis.com": "vertex",
    "us-central1-aiplatform.googleapis.com": "vertex",
    "europe-west4-aiplatform.googleapis.com": "vertex",
}
PROVIDER_HOSTS: tuple[str, ...] = tuple(PROVIDERS)

_GEMINI = re.compile(
    r"/models/(?P<model>.+):(?P<method>generateContent|streamGenerateContent|countTokens)$"
)


@dataclass(frozen=True)
class Route:
    """What a path asks for. `model` and `stream` are set only where the path names them."""

    dialect: Dialect
    operation: Operation
    model: str | None = None
    stream: bool | None = None


def route(path: str) -> Route | None:
    """Return what `path` (without its query) asks for, behind any prefix; None for no API."""
    if path.endswith("/chat/completions"):
        return Route("openai", "generate")
    if path.endswith("/responses"):
        return Route("responses", "generate")
    if path.endswith("/messages"):
        return Route("anthropic", "generate")
    if path.endswith("/messages/count_tokens"):
        return Route("anthropic", "count_tokens")
    if found := _GEMINI.search(path):
        if found["method"] == "countTokens":
            return Route("gemini", "count_tokens", found["model"], False)
        streams = found["method"] == "streamGenerateContent"
        return Route("gemini", "generate", found["model"], streams)
    if path.endswith("/models"):
        return Route("gemini" if path == "/v1beta/models" else "openai", "models")
    return None
