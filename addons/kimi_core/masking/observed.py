"""Results of tools that an agent sends as a user's message, since it calls its tools in text.

Only what stands in the frame of a known agent counts, right after a message of the model: all
else may be what a person typed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_FRAMES = re.compile(
    r"\A\s*(?:"
    r"OBSERVATION:[ \t]*\n"  # SWE-agent, OpenHands
    r"|EXECUTION RESULT of \[([^\]\n]{1,200})\]"  # OpenHands, where the model has no tools
    r"|exitcode: \d+ \(execution (?:succeeded|failed)\)\n"  # AutoGen
    r")"
)
# SWE-agent shows the state of its shell below what a command printed.
_PROMPT = re.compile(
    r"\n\((?:Open file|Current directory): [^\n]*\)\n(?:\([^\n]*\)\n)?bash-\$\s*\Z", re.IGNORECASE
)
_REACT, _REACT_ASKS = re.compile(r"\A\s*Observation:\s"), re.compile(r"^Action(?: Input)?:", re.M)
# Cline and its kin: "[read_file for 'src/x.py'] Result:", what it brought in the next block.
_TITLE = re.compile(r"\A\s*\[(\w+(?: for '[^\n]{0,500}')?)\] Result:\s*")
_NO_RESULT = re.compile(r"\A\s*<(?:environment_details|feedback|user_message|task)>")
_COMMAND = re.compile(r"^```[\w+-]*\n(.+?)\n```", re.MULTILINE | re.DOTALL)
_MAX_LABEL = 40


def command(text: str) -> str:
    """Return the first line of the last command in a model's text, empty when it has none."""
    found = _COMMAND.findall(text)
    return found[-1].strip().partition("\n")[0][:_MAX_LABEL] if found else ""


def results(asked: str, texts: Sequence[str]) -> dict[int, str]:
    """Return which texts of a user's message are results, and of what.

    `asked` is the text of the model's message before it.
    """
    found: dict[int, str] = {}
    title = ""
    for index, text in enumerate(texts):
        titled = _TITLE.match(text)
        if titled:
            title = titled[1]
            if titled.end() < len(text):
                found[index], title = title, ""
        elif title and not _NO_RESULT.match(text):
            found[index], title = title, ""
        elif framed := _FRAMES.match(text):
            found[index] = framed[1] or command(asked)
        elif _PROMPT.search(text[-2_000:]):
            found[index] = command(asked)
        elif _REACT.match(text) and _REACT_ASKS.search(asked):
            found[index] = ""
    return {index: label.replace("\n", " ")[:_MAX_LABEL] for index, label in found.items()}
