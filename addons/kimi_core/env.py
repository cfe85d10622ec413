"""Values that do not stand in rules.yaml: the process environment, then a `.env` file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from dotenv.parser import parse_stream

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
REFERENCE = re.compile(r"\$\{(" + NAME + r")\}")

MAX_BYTES = 1 << 20
"""A file that is longer than this is no settings file, and is refused unread."""


def quoted(text: str) -> str:
    return json.dumps(masked(text[:60] + "…" if len(text) > 60 else text), ensure_ascii=False)


_KEY_LIKE = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-|gsk_|csk-|nvapi-|AIza|ya29\.|Bearer )[\w.~+/=-]{6,}"
    r"|(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{28,}"
)
_USER_INFO = re.compile(r"//[^/@\s\"]*@")


def masked(text: str) -> str:
    """Return `text` without what looks like an API key or a password in a URL."""
    return _USER_INFO.sub("//***@", _KEY_LIKE.sub("***", text))


class Secret:
    """A text that shows as `***` wherever it is printed; `reveal()` gives the text.

    It refuses to be pickled, so that it cannot reach a file by accident.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself, for the one place that sends it."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled")


class DotenvError(Exception):
    """A `.env` file that cannot be read; `line` counts from 1 (0: the file as a whole)."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True, slots=True)
class Variables:
    """Named values, the process environment before the file.

    A name that is set to nothing counts as not set: `NVIDIA_API_KEY=` in a copied
    `.env.example`, and what docker compose passes on for a variable it does not know.
    """

    environ: Mapping[str, str] = field(repr=False)
    dotenv: Mapping[str, str] = field(default_factory=dict, repr=False)
    lines: Mapping[str, int] = field(default_factory=dict, repr=False)

    def get(self, name: str) -> str | None:
        """Return the value without the blanks around it, or None where there is none."""
        return (
            (self.environ.get(name) or "").strip() or (self.dotenv.get(name) or "").strip() or None
        )

    def place(self, name: str) -> str:
        """Return where the value of `name` was found, as the start of an error message."""
        if (self.environ.get(name) or "").strip():
            return "environment"
        return f".env:{self.lines.get(name, 1)}"

    def expand(self, text: str) -> tuple[str, tuple[str, ...]]:
        """Return `text` with each `${NAME}` replaced, and the names that have no value."""
        unset = [name for name in references(text) if self.get(name) is None]
        return REFERENCE.sub(lambda found: self.get(found[1]) or "", text), tuple(unset)


def references(text: str) -> tuple[str, ...]:
    """Return the names that stand as `${NAME}` in `text`, each once, in their order."""
    return tuple(dict.fromkeys(REFERENCE.findall(text)))


def read(path: Path, environ: Mapping[str, str]) -> Variables:
    """Return `environ` before the values of the `.env` file at `path`, which need not exist.

    The syntax is python-dotenv's: `export` in front, quotes, comments, `=` in values.
    `${…}` in the file stays as written, since keys may hold a dollar sign.

    Raises DotenvError when the file is there and cannot be read as such.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return Variables(environ)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DotenvError(0, f"cannot be read ({reason}); make it readable, or remove it") from None
    if len(data) > MAX_BYTES:
        raise DotenvError(0, "is longer than 1 MiB; a .env file holds lines like NAME=value")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DotenvError(line, "is not UTF-8; save the file as UTF-8") from None

    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    for binding in parse_stream(io.StringIO(text)):
        # The parser counts the blank lines before a setting as part of it.
        written = binding.original.string
        blank = written[: len(written) - len(written.lstrip())]
        line = binding.original.line + blank.count("\n")
        if binding.error:
            raise DotenvError(line, "is not a setting; write NAME=value, one to a line")
        if binding.key is not None and binding.value is not None:
            values[binding.key] = binding.value
            lines[binding.key] = line
    return Variables(environ, values, lines)
