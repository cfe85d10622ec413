"""A fake LLM provider on real sockets: every dialect, every framing, every failure.

    with Upstream() as up:                              # HTTP/1.1, and TLS with h2 on its own CA
        up.script("api.mistral.ai", Reply(status=429), Reply(text="now it works"))
        up.default = Reply(text="Hello", framing=Framing(pieces=7, delay_s=0.01))
        ...                                             # any client at up.http_url, up.https_url
        assert up.requests[-1].header("authorization") == "Bearer key"

`up.environment()` gives a child process the variables with which `https://api.mistral.ai` leads
here; `python tests/upstream` runs it as a process of its own. The modules chat, messages,
responses and gemini are the wire formats.
"""

from .reply import Abort, Framing, Received, Reply, ToolCall
from .routes import PROVIDER_HOSTS, PROVIDERS, Dialect, Route, route
from .server import Answering, Match, Upstream
from .tokens import TokenUsage, filler, input_tokens, output_tokens
from .traffic import conversation, conversation_replies

__all__ = [
    "PROVIDERS",
    "PROVIDER_HOSTS",
    "Abort",
    "Answering",
    "Dialect",
    "Framing",
    "Match",
    "Received",
    "Reply",
    "Route",
    "TokenUsage",
    "ToolCall",
    "Upstream",
    "conversation",
    "conversation_replies",
    "filler",
    "input_tokens",
    "output_tokens",
    "route",
]
