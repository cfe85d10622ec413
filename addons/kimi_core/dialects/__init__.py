"""The wire formats of the providers' APIs, and which request speaks which."""

from __future__ import annotations

import re
from urllib.parse import unquote

from kimi_core.dialects.anthropic import Anthropic
from kimi_core.dialects.base import Call, Dialect, Offer, ReplyReader, Unit
from kimi_core.dialects.gemini import Gemini
from kimi_core.dialects.openai import OpenAI
from kimi_core.dialects.responses import Responses

OPENAI, RESPONSES, ANTHROPIC, GEMINI = OpenAI(), Responses(), Anthropic(), Gemini()
DIALECTS: dict[str, Dialect] = {d.name: d for d in (OPENAI, RESPONSES, ANTHROPIC, GEMINI)}

# What may stand before the operation differs by provider: /v1, /v1beta, /coding/v1, /openai/v1,
# /api/v1, /v1beta/openai, /v1/projects/.../endpoints/openai or nothing, so only the end counts.
_POST = re.compile(
    r"(?P<before>.*?)(?P<rest>/chat/completions|/responses|/messages/count_tokens|/messages"
    r"|/models/(?P<model>[^/:]+):(?P<verb>generateContent|streamGenerateContent|countTokens))/?"
)
_GET = re.compile(r"(?P<before>.*?)(?P<rest>/models)/?")
_PROVIDER = re.compile(r"/(?P<provider>[A-Za-z0-9][A-Za-z0-9_.-]*?)(?:/v1|/v1beta)?")


def match(method: str, path: str) -> Call | None:
    """Return what a request's path (query and all) asks for; None when it is no model call.

    `Call.provider` is what stands before the usual prefix: a provider's name when the
    client uses our own base URL, otherwise a part of the provider's path.
    """
    path = path.partition("?")[0]
    if method == "POST":
        found = _POST.fullmatch(path)
    elif method == "GET":
        found = _GET.fullmatch(path)
    else:
        return None
    if not found:
        return None
    provider = ""
    if named := _PROVIDER.fullmatch(found["before"]):
        provider = named["provider"]
        if re.fullmatch(r"v\d+(beta)?", provider):
            provider = ""
    rest = found["rest"]
    if method == "GET":
        return Call(OPENAI, "models", provider, rest=rest)
    if rest == "/chat/completions":
        return Call(OPENAI, "chat", provider, rest=rest)
    if rest == "/responses":
        return Call(RESPONSES, "chat", provider, rest=rest)
    if rest == "/messages":
        return Call(ANTHROPIC, "chat", provider, rest=rest)
    if rest == "/messages/count_tokens":
        return Call(ANTHROPIC, "count_tokens", provider, rest=rest)
    operation = "count_tokens" if found["verb"] == "countTokens" else "chat"
    return Call(GEMINI, operation, provider, unquote(found["model"]), rest)  # type: ignore[arg-type]


__all__ = [
    "ANTHROPIC",
    "DIALECTS",
    "GEMINI",
    "OPENAI",
    "RESPONSES",
    "Call",
    "Dialect",
    "Offer",
    "ReplyReader",
    "Unit",
    "match",
]
