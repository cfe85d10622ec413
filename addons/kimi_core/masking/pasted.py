"""Blocks of a user's message that a program put there: files, output, search results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

_TAGS = (
    "file|files|file_content|file_contents|file-content|document|documents|document_content"
    "|context|code|codebase|repo|repository|stdout|stderr|output|terminal|terminal_output|console"
    "|command_output|log|logs|diff|search_results|attached[\\w-]*|attachment|open_files|editor[\\w-]*"
    "|current_file|selected_code|snippet|returncode|local-command-stdout|bash-stdout|bash-stderr"
)
_OPEN = re.compile(rf"<({_TAGS})(?:\s[^<>\n]*)?>", re.IGNORECASE)
# Continue: ```src/x.py (1-20), ```py src/x.py; Aider and others: the path in the line before.
_FENCE = re.compile(r"^(`{3,}|~{3,})[ \t]*([^\n`]*)$", re.MULTILINE)
_FILE_NAME = re.compile(r"(?:^|[\s/\\=\"'])[\w.-]+\.\w{1,8}\b|[\w.-]+[/\\][\w.-]+")
_MENTION = re.compile(r"@(?:file|codebase|console|output|terminal|diff|problems|docs|url|folder)\b")
_MENTIONED = re.compile(r"output|console|terminal|stdout|log", re.IGNORECASE)


def blocks(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield where each block's contents begin and end, and what it is said to be."""
    at = 0
    mentions = _MENTION.search(text) is not None
    unclosed: set[str] = set()
    tag, fence = _OPEN.search(text), _FENCE.search(text)
    while tag or fence:
        # Each is looked for again only when it was passed, so that a text is read once.
        if tag and tag.start() < at:
            tag = _OPEN.search(text, at)
        if fence and fence.start() < at:
            fence = _FENCE.search(text, at)
        if tag and (not fence or tag.start() < fence.start()):
            closing = f"</{tag[1]}>"
            end = -1 if closing in unclosed else text.find(closing, tag.end())
            if end < 0:
                unclosed.add(closing)
                at = tag.end()
                continue
            yield tag.end(), end, tag[0].strip("<>")
            at = end
        elif fence:
            found = _closing(fence[1][0], len(fence[1])).search(text, fence.end())
            if found is None:
                return
            info = fence[2].strip()
            if _FILE_NAME.search(info) or _MENTIONED.search(info) or mentions:
                yield fence.end() + 1, max(fence.end() + 1, found.start() - 1), info
            at = found.end()


@lru_cache(maxsize=16)
def _closing(mark: str, length: int) -> re.Pattern[str]:
    return re.compile(rf"^{mark}{{{length},}}[ \t]*$", re.MULTILINE)
