"""Which lines of a masked text are ours, for whoever shows it to people."""

from __future__ import annotations

import re

from kimi_core.exchange import SavingKind

_REFERENCE = re.compile(r"\[(?:\d+ lines?|lines? \d+(?:-\d+)?): (?:as|all|the) .*\]", re.S)
_CUT = re.compile(
    r"\[… [^\[\]]* cut …\]"
    r"|kimi-proxy mask [0-9a-f]{16}"
    r"|\[control codes left out #[0-9a-f]{16}\]"
)


def kind_of(line: str) -> SavingKind | None:
    """Return what a line of a masked text says: what it refers to, or what was cut there.

    None for a line of the text itself, which may look like one of ours all the same.
    """
    if _REFERENCE.fullmatch(line):
        return "reference"
    return "cut" if _CUT.search(line) else None
