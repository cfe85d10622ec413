"""What stays of a text that is too long: what the model most likely needs next."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from kimi_core.masking.lines import bare
from kimi_core.masking.references import Line
from kimi_core.masking.relevance import Named

CountMany = Callable[[Sequence[str]], list[int]]

_ERROR = re.compile(
    r"\b(?:errors?|exceptions?|traceback|failed|failures?|fail|fatal|panic(?:ked)?|abort(?:ed)?"
    r"|undefined|unresolved|denied|refused|segfault|killed|no such|not found|cannot|can't"
    r"|unexpected|mismatch|expected)\b|\w(?:Error|Exception)\b|^E  |✗|✘|×",
    re.IGNORECASE,
)
_ERROR_SIGNS = (
    *("error", "exception", "traceback", "fail", "fatal", "panic", "abort", "undefined"),
    *("unresolved", "denied", "refused", "segfault", "killed", "no such", "not found", "cannot"),
    *("can't", "mismatch", "expected", "e  "),
)
"""One of these, in small letters, is in all that `_ERROR` finds in ASCII, at most `_BEFORE_SIGN`
characters after its beginning."""
_BEFORE_SIGN = 2
_WARNING = re.compile(r"\b(?:warn(?:ing)?s?|deprecated|skipped|conflicts?)\b", re.IGNORECASE)
_WARNING_SIGNS = ("warn", "deprecated", "skipped", "conflict")
# A search for what begins with a character of its own is fast.
_PLACE = re.compile(r"\.(?<=[\w./-]\.)\w{1,5}:\d")
_FILE_LINE = re.compile(r'File "[^"\n]+", line \d')
_DECLARES = re.compile(
    r"^\s*(?:(?:export|default|public|private|protected|internal|static|async|pub(?:\(\w+\))?"
    r"|abstract|final|override|virtual|extern|unsafe|const)\s+)*"
    r"(?:def|class|func|function|fn|interface|struct|enum|trait|impl|type|module|namespace|package"
    r"|record|object|protocol|macro_rules!|describe|it|test)\b"
    r"|^[A-Za-z_][\w<>*&:\s]*\([^;]*\)\s*(?:const\s*)?\{?$|^#{1,6} \S|^[A-Z_]{3,}\s*[:=]"
)
_CODE_ENDS = re.compile(r"[{};]\s*(?://.*)?$")
_CODE = re.compile(
    r"^\s*[)\]}]|^\s*(?:def|class|import|from|return|if|elif|else|for|while|try"
    r"|except|raise|with|func|fn|let|const|var|public|private|static|use|#include|package|end)\b.*\S"
    r"|^\s*(?:@\w|//|/\*|\*\s|\"\"\"|''')|^\s*[\w.\[\]\"']+\s*[:+-]?=\s?[^=]|^\s*[\w.]+\(.*\),?$"
)
_DIFF_HEAD = re.compile(r"^(?:diff |index |--- |\+\+\+ |@@ |rename |new file|deleted file|Binary )")
_DIGITS = re.compile(r"[0-9a-f]{6,}|\d+")
_SHAPES = 3
"""Of so many errors alike each counts in full."""
_LONG_LINE, _MARK = 150.0, 20.0
_MAX_LINES = 24_000
"""Of a text with more lines not all are looked at."""
_LOOKED_AT = 400


def is_listing(lines: Sequence[Line]) -> bool:
    """Tell whether these are a file's lines with their numbers."""
    said = [line for line in lines if line.hash and line.text]
    return 2 * sum(line.number >= 0 for line in said) > len(said)


def is_code(lines: Sequence[Line]) -> bool:
    """Tell whether it looks like a file of a program, by some of its lines."""
    said = [line for line in lines if line.hash and line.text]
    sample = [_bare(line)[:_LOOKED_AT] for line in said[:: max(1, len(said) // 400)]]
    found = [text for text in sample if _CODE.match(text) or _CODE_ENDS.search(text)]
    return 2 * len(found) > len(sample)


def _bare(line: Line) -> str:
    return line.text if line.number < 0 else bare(line.text, line.number)


def _found(pattern: re.Pattern[str], signs: Iterable[str], texts: Sequence[str]) -> list[bool]:
    """Return which texts the pattern is found in; of ASCII those only that have one of the signs.

    Most texts have none of them, and most signs are in no text.
    """
    whole = "\n".join(texts)
    small = whole.lower()
    here = [sign for sign in signs if sign in small]
    if not here and whole.isascii():
        return [False] * len(texts)
    made: list[bool] = []
    for text in texts:
        first = 0
        if text.isascii():
            small = text.lower()
            starts = [small.find(sign) for sign in here if sign in small]
            first = max(0, min(starts) - _BEFORE_SIGN) if starts else -1
        made.append(first >= 0 and pattern.search(text, first) is not None)
    return made


def _errors(texts: Sequence[str]) -> list[bool]:
    """Return which lines tell of an error, or point with carets at one in the line above."""
    found = _found(_ERROR, _ERROR_SIGNS, texts)
    for index, text in enumerate(texts):
        if "^" in text and not text.strip().strip("^"):
            found[index] = True
    return found


class Cutter:
    """Chooses what stays of a text, for one budget or another."""

    def __init__(self, lines: Sequence[Line], named: Named, count: CountMany) -> None:
        self._lines = lines = _candidates(lines)
        self._scores = _scores(lines, named)
        self._costs = [
            math.inf if line.is_cut else 1.0 + tokens
            for line, tokens in zip(lines, count([line.text for line in lines]), strict=True)
        ]

    def keep(self, budget: int) -> list[Line]:
        """Return about `budget` tokens of the lines, and what says how many were left out."""
        lines, costs = list(self._lines), list(self._costs)
        # A line is shortened when it would leave little of the budget for all others.
        long = [cost for cost in costs if _LONG_LINE < cost < math.inf]
        room = max(budget / 4, budget - _MARK - sum(cost for cost in costs if cost <= _LONG_LINE))
        longest = max(_LONG_LINE, room / max(1, len(long)))
        for index, cost in enumerate(costs):
            if longest + _MARK < cost < math.inf:
                chars = int(longest * len(lines[index].text) / cost)
                lines[index] = _within(lines[index], chars)
                costs[index] = longest
        kept = _chosen(self._scores, costs, budget)
        return _marked(lines, kept, costs)


def _candidates(lines: Sequence[Line]) -> Sequence[Line]:
    """Return the lines, of very many only the first and last ones and those of errors."""
    if len(lines) <= _MAX_LINES:
        return lines
    edge = _MAX_LINES // 3
    end = len(lines) - edge
    texts = [line.text[:_LOOKED_AT] for line in lines[edge:end]]
    middle = [n for n, is_error in enumerate(_errors(texts), edge) if is_error]
    made = list(lines[:edge])
    at = edge
    for index in [*middle[:edge], end]:
        if index > at:
            first, last = lines[at], lines[index - 1]
            gone = last.start + last.length - first.start
            made.append(Line("", 0, -1, first.start, gone, is_cut=True))
        made.append(lines[index])
        at = index + 1
    return [*made, *lines[end + 1 :]]


def _within(line: Line, chars: int) -> Line:
    head = chars * 2 // 3
    gone = len(line.text) - chars
    text = f"{line.text[:head]}[… {gone} characters cut …]{line.text[head + gone :]}"
    return Line(text, 0, line.number, line.start, line.length, is_cut=True, is_part=True)


def _scores(lines: Sequence[Line], named: Named) -> list[float]:
    source = is_listing(lines) or is_code(lines)
    diff = any(line.text.startswith("@@ ") for line in lines)
    texts = list(map(_bare, lines))
    scores = named.weights(texts)
    if diff:
        worth = list(map(_in_diff, texts))
    elif source:
        worth = [0.6 if _DECLARES.search(text[:_LOOKED_AT]) else 0.1 for text in texts]
    else:
        worth = _told(texts)
    seen: set[int] = set()
    for index, line in enumerate(lines):
        scores[index] += worth[index]
        if not texts[index] or texts[index].isspace():
            scores[index] = 0.0
        elif line.hash in seen:
            scores[index] *= 0.3
        elif line.hash:
            seen.add(line.hash)
        else:
            scores[index] += 1.0
    return _spread(scores, 0.2 if diff else 0.8 if source else 0.5)


def _kinds(texts: Iterable[str]) -> list[str]:
    """Return what each line has in common with others of its kind: its first two words."""
    heads = [" ".join(text.split(None, 2)[:2]) for text in texts]
    return _DIGITS.sub("0", "\n".join(heads)).split("\n")


def _in_diff(text: str) -> float:
    if _DIFF_HEAD.match(text):
        return 4.0
    return 1.5 if text[:1] in ("+", "-") else 0.3


def _told(texts: Sequence[str]) -> list[float]:
    """Return what each line of a command's output is worth."""
    texts = [text[:_LOOKED_AT] for text in texts]
    errors = _errors(texts)
    warnings = _found(_WARNING, _WARNING_SIGNS, texts)
    kinds = _kinds(texts)
    frequent = Counter(kinds)
    shapes: dict[str, int] = {}
    made: list[float] = []
    for text, is_error, is_warning, kind in zip(texts, errors, warnings, kinds, strict=True):
        found = 3.0 if is_error else 1.0 if is_warning else 0.0
        if _PLACE.search(text) or _FILE_LINE.search(text):
            found += 1.0
        if found:
            shape = _DIGITS.sub("0", text.strip())[:60]
            shapes[shape] = shapes.get(shape, 0) + 1
            found *= min(1.0, _SHAPES / shapes[shape])
        # What a command says once is news; what it says of each of a hundred files is not.
        made.append(0.1 + found + 1 / frequent[kind])
    return made


def _spread(scores: list[float], factor: float) -> list[float]:
    """Return the scores with some of each given to its neighbours."""
    down = list(scores)
    for order in (range(len(down)), range(len(down) - 1, -1, -1)):
        given = 0.0
        for index in order:
            if down[index] < given:
                down[index] = given
            given = factor * down[index]
    return down


_HEAD, _TAIL = 0.2, 0.2
"""The share of what stays that is its head, and its tail."""
_GAP = 12.0
"""What a mark costs, and is to be worth."""


def _chosen(scores: Sequence[float], costs: Sequence[float], budget: float) -> bytearray:
    kept = bytearray(len(scores))
    spent = 0.0
    for order, share in ((range(len(costs)), _HEAD), (range(len(costs) - 1, -1, -1), _TAIL)):
        used = 0.0
        for index in order:
            if kept[index] or used + costs[index] > share * budget:
                break
            kept[index] = 1
            used += costs[index]
        spent += used
    for index in sorted(range(len(scores)), key=scores.__getitem__, reverse=True):
        if kept[index]:
            continue
        # A line apart from the others brings a mark with it.
        beside = kept[index - 1 : index] == b"\1" or kept[index + 1 : index + 2] == b"\1"
        cost = costs[index] + (0.0 if beside else _GAP)
        if spent + cost > budget:
            if spent > 0.97 * budget:
                break
            continue
        kept[index] = 1
        spent += cost
    return kept


def _marked(lines: Sequence[Line], kept: bytearray, costs: Sequence[float]) -> list[Line]:
    made: list[Line] = []
    index = 0
    while index < len(lines):
        if kept[index]:
            made.append(lines[index])
            index += 1
            continue
        end = index
        while end < len(lines) and not kept[end]:
            end += 1
        if sum(costs[index:end]) <= _GAP:
            made.extend(lines[index:end])
        else:
            first, last = lines[index], lines[end - 1]
            gone = last.start + last.length - first.start
            mark = _mark(first, last, gone)
            made.append(Line(mark, 0, -1, first.start, gone, is_cut=True))
        index = end
    return made


def _mark(first: Line, last: Line, gone: int) -> str:
    if first.number >= 0 and last.number - first.number == gone - 1 > 0:
        return f"[… lines {first.number}-{last.number} cut …]"
    return f"[… {gone} lines cut …]" if gone > 1 else "[… 1 line cut …]"
