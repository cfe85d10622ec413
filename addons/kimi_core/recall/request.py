"""The tool that is offered, and to which requests it is not."""

from __future__ import annotations

from typing import Any

from kimi_core import attempts, context, dialects
from kimi_core.attempts.offer import (
    declared,
    offer,
    tool_choice,
    wants_choices,
    wants_something_else,
)
from kimi_core.exchange import Exchange
from kimi_core.recall.decider import Lookup, Recall

NAME = "kimi_recall"

# All of it stands before the conversation in a provider's cache: a change voids every prefix.
_DESCRIPTION = (
    "Read text that was left out of this conversation to save tokens. Where something was cut, a "
    "note says so and names a hash of 16 hex digits, as in `kimi-proxy mask 0123456789abcdef`; "
    "call this tool with that hash instead of running the command. Use it only when you need what "
    "was left out; prefer a pattern or a range of lines to the whole text."
)
_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "hash": {"type": "string", "description": "The 16 hex digits in the note."},
        "from_line": {"type": "integer", "description": "The first line wanted, from 1."},
        "to_line": {"type": "integer", "description": "The last line wanted."},
        "from_character": {
            "type": "integer",
            "description": "Where in from_line to begin, from 1; for very long lines.",
        },
        "pattern": {
            "type": "string",
            "description": "Return only lines that match, with their numbers: plain text or a "
            "regular expression, upper or lower case.",
        },
    },
    "required": ["hash"],
}


def prepare(exchange: Exchange, lookup: Lookup) -> bool:
    """Offer the tool, and answer its calls; False: the request is left as it is.

    So it is when it offers no tool of the client's own or one of the same name, when it asks for
    several choices, in which nobody would find a call, in dialects other than the two, and where
    nobody sends it who would ask again. Whether anything is masked yet makes no difference, nor
    does a request that allows no call or wants JSON: the tools stand before all messages, and a
    change there would cost the provider's cache.
    """
    document, dialect = exchange.document, exchange.dialect
    if exchange.operation != "chat" or exchange.route is None:
        return False
    if dialect not in (dialects.OPENAI, dialects.ANTHROPIC):
        return False
    names, has_choices = declared(document), wants_choices(document, dialect)
    if not names or NAME in names or not document.elements("messages"):
        return False
    if has_choices and tool_choice(document) != "none":
        return False
    given = context.sent(exchange)
    offer(document, dialect, NAME, _DESCRIPTION, _PARAMETERS)
    exchange.sent = given.with_heads(document)
    if not has_choices:
        # Even where no call is allowed: one that comes all the same is not for the client.
        said_once = wants_something_else(document, dialect)
        attempts.join(exchange, Recall(NAME, lookup, said_once=said_once))
    return True
