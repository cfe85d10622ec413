"""The wire formats of the providers' APIs, and which request speaks which."""

from __future__ import annotations

import re
from urllib.parse import unquote

from kimi_core.dialects.anthropic import Anthropic
from kimi_core.dialects.base import Call, Dialect, Offer, ReplyReader, Unit
from kimi_core.dialects.gemini import Gemini
from kimi_core.dialects.openai import OpenAI
from kimi_core.dialects.responses import Responses
from kimi_core.exchange import Operation

OPENAI, RESPONSES, ANTHROPIC, GEMINI = OpenAI(), Responses(), Anthropic(), Gemini()
DIALECTS: dict[str, Dialect] = {d.name: d for d in (OPENAI, RESPONSES, ANTHROPIC, GEMINI)}

# What may stand before the operation differs by provider: /v1, /v1beta, /coding/v1, /openai/v1,
# /api/v1, /v1beta/openai, /v1/projects/.../endpoints/openai or nothing, so only the end counts.
_ENDINGS: tuple[tuple[str, Dialect, Operation], ...] = (
    ("/chat/completions", OPENAI, "chat"),
    ("/responses", RESPONSES, "chat"),
    ("/messages/count_tokens", ANTHROPIC, "count_tokens"),
    ("/messages", ANTHROPIC, "chat"),
)
_VERBS: dict[str, Operation] = {
    "generateContent": "chat",
    "streamGenerateContent": "chat",
    "countTokens": "count_tokens",
}
_PROVIDER = re.compile(r"/(?P<provider>[A-Za-z0-9][A-Za-z0-9_.-]*?)(?:/v1|/v1beta)?")
_VERSION = re.compile(r"v\d+(beta)?")


def match(method: str, path: str) -> Call | None:
    """Return what a request's path (query and all) asks for; None when it is no model call.

    `Call.provider` is what stands before the usual prefix: a provider's name when the
    client uses our own base URL, otherwise a part of the provider's path.
    """
    path = path.partition("?")[0].removesuffix("/")
    if method == "GET" and path.endswith("/models"):
        return Call(OPENAI, "models", _provider(path.removesuffix("/models")), rest="/models")
    if method != "POST":
        return None
    for rest, dialect, operation in _ENDINGS:
        if path.endswith(rest):
            before = path.removesuffix(rest)
            if before.split("/")[-2:-1] in (["threads"], ["conversations"]):
                return None  # OpenAI's /v1/threads/ID/messages adds a message, no more
            return Call(dialect, operation, _provider(before), rest=rest)
    head, _, verb = path.rpartition(":")
    before, found, model = head.partition("/models/")
    if not found or not model or verb not in _VERBS:
        return None
    rest = f"/models/{model}:{verb}"
    return Call(GEMINI, _VERBS[verb], _provider(before), unquote(model), rest)


def _provider(before: str) -> str:
    named = _PROVIDER.fullmatch(before)
    return "" if named is None or _VERSION.fullmatch(named["provider"]) else named["provider"]


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
