"""Write what comes from code into the documentation: `make docs`.

README.md has places like

    <!-- table: options -->
    ...
    <!-- end -->

whose lines are made by the function of TABLES that has the name. Where the code has no sentence
about a row (a column of the store), the last cell is README's own: it is kept, and a new
row gets an empty one, which test_docs.py refuses.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "addons"))

import click
import yaml
from mitmproxy.test import taddons

import cli
from kimi_core import rules
from kimi_core.rules_schema import described
from kimi_core.store.schema import connect, migrate
from kimi_core.web.mounted import endpoints

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SCHEMA = ROOT / "addons" / "kimi_core" / "rules.schema.json"
RULES = ROOT / "rules.yaml"

_PLACE = re.compile(
    r"(?P<open><!-- table: (?P<name>[\w -]+) -->\n)(?P<lines>.*?)(?P<close><!-- end -->)", re.S
)

Row = tuple[str, ...]


# --- what the code says ---------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option of mitmproxy that our addons declare; `addons`: which of them."""

    name: str
    kind: str
    default: str
    help: str
    addons: tuple[str, ...]


@dataclass(frozen=True)
class Declared:
    """What the addons add to mitmproxy."""

    options: tuple[Option, ...]
    commands: frozenset[str]


def chain() -> list[Any]:
    """Return the addons of all.py, in its order."""
    import all as chain_file

    return list(chain_file.addons)


def declared() -> Declared:
    """Return the options and commands that the addons declare, each loaded alone."""
    return asyncio.run(_declared())


async def _declared() -> Declared:
    found: dict[str, Any] = {}
    owners: dict[str, list[str]] = {}
    commands: set[str] = set()
    for kind in map(type, chain()):
        with taddons.context() as context:
            options, known = context.options, set(context.master.commands.commands)
            before = set(options.keys())
            addon = kind()
            context.master.addons.add(addon)
            for name in options.keys() - before:
                found[name] = options._options[name]
                owners.setdefault(name, []).append(kind.__name__)
            commands |= set(context.master.commands.commands) - known
            context.master.addons.remove(addon)
            # It would go on taking all that is logged, for a loop that has ended.
            context.master._legacy_log_events.uninstall()
    return Declared(
        tuple(
            Option(name, _kind(o.typespec), _default(o.default), o.help, tuple(owners[name]))
            for name, o in sorted(found.items())
        ),
        frozenset(commands),
    )


def _kind(typespec: Any) -> str:
    names = {str: "text", int: "whole number", bool: "true or false"}
    return names.get(typespec) or "list of texts"


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value in ("", []) else str(value)


def subcommands() -> dict[str, click.Command]:
    """Return the commands of kimi-proxy that are not hidden."""
    return {name: one for name, one in cli.main.commands.items() if not one.hidden}


def columns(table: str) -> list[tuple[str, str]]:
    """Return name and SQL type of the columns of a table of the store."""
    return _schema()[table]


def tables() -> list[str]:
    """Return the names of the store's tables."""
    return sorted(_schema())


def _schema() -> dict[str, list[tuple[str, str]]]:
    with tempfile.TemporaryDirectory() as folder:
        db = connect(Path(folder, "kimi.db"), timeout_s=1)
        try:
            migrate(db)
            return {
                table: [(column.name, column.type) for column in db.table(table).columns]
                for table in db.table_names()
            }
        finally:
            db.close()


def shipped_rules() -> rules.Rules:
    """Return the rules of the repository, no variable set."""
    return rules.load(RULES, {})


def schema() -> str:
    """Return the text of the JSON Schema file, as `python -m kimi_core.rules` prints it."""
    return json.dumps(rules.json_schema(), indent=2, ensure_ascii=False) + "\n"


# --- the tables -----------------------------------------------------------------------


def _addons() -> Iterator[Row]:
    yield "addon", "file", "what it does"
    for addon in chain():
        kind = type(addon)
        yield kind.__name__, _code(f"addons/{kind.__module__}.py"), _first_paragraph(kind.__doc__)


def _options() -> Iterator[Row]:
    yield "option", "takes", "default", "meaning"
    for option in declared().options:
        yield _code(option.name), option.kind, _code(option.default), option.help


def _commands() -> Iterator[Row]:
    yield "command", "what it does"
    for name, command in subcommands().items():
        taken = [_argument(p) for p in command.params if isinstance(p, click.Argument)]
        yield _code(" ".join(["kimi-proxy", name, *taken])), _first_paragraph(command.help)


def _argument(argument: click.Argument) -> str:
    name = (argument.name or "").upper()
    return f"-- {name}…" if argument.nargs == -1 else name


def _flags() -> Iterator[Row]:
    yield "option", "of", "meaning"
    found: dict[Row, list[str]] = {}
    for name, command in subcommands().items():
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                found.setdefault((_flag(option), _meaning(option)), []).append(name)
    for (flag, meaning), names in found.items():
        yield flag, ", ".join(names), meaning


def _flag(option: click.Option) -> str:
    takes = "" if option.is_flag else f" {option.metavar or _value(option.type)}"
    return ", ".join(_code(name + takes) for name in option.opts)


def _value(kind: click.ParamType) -> str:
    if isinstance(kind, click.Choice):
        return "|".join(map(str, kind.choices))
    if isinstance(kind, click.Path):
        return "PATH"
    numbers = (click.types.IntParamType, click.types.FloatParamType)
    return "N" if isinstance(kind, numbers) else "TEXT"


def _meaning(option: click.Option) -> str:
    said = " ".join((option.help or "").split())
    default = option.default
    if option.is_flag or not isinstance(default, (int, float, str)):
        return said
    shown = f"{default:g}" if isinstance(default, float) else default
    return f"{said} [default: {shown}]".strip()


def _columns(table: str) -> Callable[[], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        yield "column", "type", "meaning"
        for name, kind in columns(table):
            yield _code(name), kind.lower(), KEPT

    return rows


def _settings() -> Iterator[Row]:
    yield "variable", "in rules.yaml", "default", "meaning"
    for name, place in rules.settings().items():
        _, info, _ = described(place)
        assert info is not None
        shown = _default(info.default) if info.default is not None else ""
        yield _code(name), _code(".".join(map(str, place))), _code(shown), info.description or ""


def _providers() -> Iterator[Row]:
    yield "provider", "speaks", "host", "variable of its key"
    # As written: without its variables, Vertex has neither host nor dialects.
    written = yaml.safe_load(RULES.read_text(encoding="utf-8"))["providers"]
    for name, provider in shipped_rules().providers.items():
        dialects = [written[name]["api"], *written[name].get("also", {})]
        host = urlsplit(written[name]["base_url"]).netloc
        yield (
            _code(name),
            ", ".join(dialects),
            _code(host),
            _code(provider.key_variable or ""),
        )


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().partition("\n\n")[0].split())


def _endpoints() -> Iterator[Row]:
    yield "address", "method", "what it does"
    for endpoint in endpoints(chain()):
        path = re.sub(r"\(\[\^/\]\+\)", "ID", endpoint.pattern)
        yield _code(f"/api/{path}"), endpoint.method, endpoint.summary


KEPT = "\0"
"""The cell that README itself holds."""

TABLES: dict[str, Callable[[], Iterator[Row]]] = {
    "addons": _addons,
    "providers": _providers,
    "options": _options,
    "commands": _commands,
    "command options": _flags,
    "settings": _settings,
    "endpoints": _endpoints,
    **{f"columns of {table}": _columns(table) for table in tables()},
}


# --- into the text --------------------------------------------------------------------


def places(text: str) -> dict[str, str]:
    """Return the lines of each marked place by its table's name."""
    return {found["name"]: found["lines"] for found in _PLACE.finditer(text)}


def render(text: str) -> str:
    """Return `text` with all marked places made anew. Raises KeyError for an unknown table."""
    return _PLACE.sub(
        lambda found: found["open"] + table(found["name"], found["lines"]) + found["close"], text
    )


def table(name: str, before: str = "") -> str:
    """Return a table's lines; `before` are the old ones, whose own cells are kept."""
    kept = {row[0]: row[-1] for row in read_rows(before)}
    header, *rows = TABLES[name]()
    filled = [tuple(kept.get(row[0], "") if cell == KEPT else cell for cell in row) for row in rows]
    return _markdown([header, ("---",) * len(header), *filled])


def read_rows(lines: str) -> list[Row]:
    """Return the cells of a Markdown table's rows, without its header."""
    rows = [
        tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1])
        for line in lines.splitlines()
        if line.startswith("|")
    ]
    return rows[2:]


def _markdown(rows: Sequence[Row]) -> str:
    return "".join(f"| {' | '.join(cell for cell in row)} |\n" for row in map(_escaped, rows))


def _escaped(row: Row) -> Row:
    return tuple(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def main() -> None:
    SCHEMA.write_text(schema(), encoding="utf-8")
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
