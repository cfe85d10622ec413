"""Rows of the store as CSV and JSON, streamed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from kimi_core.store.schema import EXCHANGE_COLUMNS

# A spreadsheet runs a cell that starts with one of these as a formula.
# -- https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_csv(
    rows: Iterable[Mapping[str, object]],
    file: TextIO,
    columns: Sequence[str] = EXCHANGE_COLUMNS,
) -> int:
    """Write a header and the rows as RFC 4180 says, and return how many rows there were.

    Open `file` with newline="". A null is an empty cell; a text that a spreadsheet would run as a
    formula gets an apostrophe in front. Text and numbers are told apart by their Python type.
    """
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(columns)
    count = 0
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
        count += 1
    return count


def write_json(rows: Iterable[Mapping[str, object]], file: TextIO) -> int:
    """Write one JSON array, a row a line, and return how many rows there were.

    ASCII only, so that it is valid in whatever encoding `file` has. JSON has no infinity and no
    NaN: they become null.
    """
    count = 0
    for row in rows:
        plain = {name: _finite(value) for name, value in row.items()}
        file.write((",\n" if count else "[\n") + json.dumps(plain, allow_nan=False))
        count += 1
    file.write("\n]\n" if count else "[]\n")
    return count


def _cell(value: object) -> object:
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
