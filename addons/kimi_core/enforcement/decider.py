"""When a reply is enough where every reply needs a call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from kimi_core.attempts.turn import Call, Ending, Message, bare
from kimi_core.dialects import Dialect
from kimi_core.dialects.base import text
from kimi_core.document import NotJSON, decode

REMINDER = (
    "The client will not continue unless you reply with a tool call. Use the available tools "
    'for work and call "{name}" when you are done.'
)
REMINDER_WITHOUT_NAME = (
    "The client will not continue unless you reply with a tool call. Use the available tools."
)
ANSWER_REMINDER = (
    'You called "{name}" without an answer. Call it again, with your answer to the user.'
)

_FINISHING = frozenset(
    ["done", "final", "finalanswer", "finish", "finished", "finishturn", "endturn"]
)
_ANSWERS = ("final_answer", "final", "answer", "summary")


class Enforcement:
    """Finds a reply enough that has a call of the client's tools, or ends the turn by `done`."""

    def __init__(self, name: str, declared: Iterable[str], max_attempts: int) -> None:
        self.name = name
        """What the tool is called; empty when none was offered."""
        self._declared = frozenset(declared)
        self._max_attempts = max_attempts
        self._rejections = 0
        self._wants_answer = False

    def hides(self, name: str) -> bool:
        """Tell whether a call by this name is no tool of the client's, but ends the turn."""
        if name in self._declared:
            return False
        plain = bare(name)
        return plain.isdigit() or re.sub(r"[^a-z]", "", plain.lower()) in _FINISHING

    def decide(self, ending: Ending) -> str:
        """Return why another reply is asked for; empty when this one has what it needs."""
        if any(call.is_real for call in ending.calls) or ending.is_stopped:
            return ""
        if self._rejections + 1 >= self._max_attempts:
            return ""
        reason = ""
        if not any(self._ends(call) for call in ending.calls):
            reason = "no_tool_call"
        elif not ending.says_something and not self.answer(ending.calls):
            reason = "no_answer" if self.name else "no_tool_call"
        self._rejections += bool(reason)
        self._wants_answer = reason == "no_answer"
        return reason

    def answer(self, calls: Sequence[Call]) -> str:
        """Return the answer in the calls that end the turn; empty when there is none."""
        given = (_answer(call.arguments) for call in calls if self._ends(call))
        return next((one for one in given if one), "")

    def keeps(self, call: Call) -> bool:
        return False

    async def more(self, kept: Sequence[Call], dialect: Dialect) -> list[Message]:
        """Return what reminds the model of what is wanted."""
        wanted = ANSWER_REMINDER if self._wants_answer else REMINDER
        said = wanted.format(name=self.name) if self.name else REMINDER_WITHOUT_NAME
        return [{"role": "user", "content": said}]

    def _ends(self, call: Call) -> bool:
        """Tell whether a call says that the work is done.

        A number with some tool's arguments does not.
        """
        if not call.name or not self.hides(call.name):
            return False
        if not bare(call.name).isdigit():
            return True
        said = call.arguments.strip()
        return said in ("", "{}", "null") or bool(_answer(said, _ANSWERS))


def _answer(arguments: str, keys: Sequence[str] | None = None) -> str:
    """Return the first string that says something, by `keys`, else by any, the known first."""
    said = arguments.strip()
    try:
        value = decode(said.encode("utf-8", "surrogatepass")) if said else None
    except NotJSON:
        value = dict(_members(said)) if said.startswith(("{", "[")) else said
    if isinstance(value, str):
        return value if value.strip() else ""
    if not isinstance(value, dict):
        return ""
    found = (text(value.get(key)) for key in (keys or (*_ANSWERS, *value)))
    return next((one for one in found if one.strip()), "")


# A string by its key, maybe cut off.
_MEMBER = re.compile(r'"(\w++)"\s*+:\s*+"((?:[^"\\]|\\.)*+)', re.DOTALL)


def _members(broken: str) -> Iterator[tuple[str, str]]:
    for key, quoted in _MEMBER.findall(broken):
        try:
            yield key, text(decode(b'"' + quoted.encode("utf-8", "surrogatepass") + b'"'))
        except NotJSON:  # a line break that was not escaped
            yield key, quoted
