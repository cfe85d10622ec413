"""What is added to a request, and to which requests nothing is."""

from __future__ import annotations

from kimi_core import dialects
from kimi_core.attempts.offer import declared, offer, tool_choice, wants_something_else
from kimi_core.dialects import Dialect
from kimi_core.document import Document, encode
from kimi_core.enforcement.decider import Enforcement

NAMES = ("done", "finish_turn")
"""What the tool may be called: the first by which the client has no tool of its own."""
INSTRUCTION = (
    "Reply with at least one tool call every time. When all the work is done, call "
    '"{name}" with your answer to the user.'
)

_DESCRIPTION = "Call this when all the work is done, and it is the user's turn again."
_PARAMETERS = {
    "type": "object",
    "properties": {
        "final_answer": {
            "type": "string",
            "description": "Your answer to the user, unless you have already given it as text.",
        }
    },
}


def prepare(document: Document, dialect: Dialect, max_attempts: int) -> Enforcement | None:
    """Offer `done` and ask for a call in every reply; None: the request is left as it is.

    So it is when it offers no tool, allows none or prescribes which, when it asks for several
    choices or for text in JSON, and when the model has ended its turn by a message without a
    call. To a model that must call a tool anyway `done` would be a way around that: nothing
    is offered, but a reply without a call is asked for again all the same.
    """
    if dialect not in (dialects.OPENAI, dialects.ANTHROPIC):
        return None
    names = declared(document)
    choice = tool_choice(document)
    if (
        choice not in ("auto", "required")
        or not names
        or not document.elements("messages")
        or wants_something_else(document, dialect)
        or _turn_is_over(document, dialect)
    ):
        return None
    if choice == "required":
        return Enforcement("", names, max_attempts)
    name = next((name for name in NAMES if name not in names), "")
    if not name:
        return None
    offer(document, dialect, name, _DESCRIPTION, _PARAMETERS)
    said = INSTRUCTION.format(name=name)
    document.append_raw(("messages",), encode({"role": "user", "content": said}))
    return Enforcement(name, names, max_attempts)


def _turn_is_over(document: Document, dialect: Dialect) -> bool:
    """Tell whether a message of the model's since the user's last has no call."""
    messages = dialect.messages(document)
    for index in reversed(range(len(messages.raws))):
        message = dialect.read(messages.unit(index))
        if message.role == "user":
            return False
        if message.role == "assistant" and all(p.kind != "tool_call" for p in message.parts):
            return True
    return False
