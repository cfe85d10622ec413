"""A YAML text as plain values, with the line on which each was written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kimi_core.env import MAX_BYTES, masked, quoted
from kimi_core.rules_schema import Place

MAX_VALUES = 50_000
"""Anchors may repeat parts of the file; past this many values they are an attack, or a slip."""


class Wrong(Exception):
    """One error that ends the reading."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


class Reader:
    """A YAML text as plain values, with the line of each.

    Mappings become dicts whose keys are the text as written (a model called 4.1 stays "4.1"),
    lists become tuples. What is wrong but lets reading go on is in `problems`.
    """

    def __init__(self) -> None:
        self.lines: dict[Place, int] = {(): 1}
        self.written: dict[Place, str] = {}
        self.problems: list[tuple[int, str]] = []
        self._constructor = yaml.constructor.SafeConstructor()
        self._open: set[int] = set()
        self._reported: set[int] = set()
        self._values = 0

    def read(self, text: str) -> Any:
        for number, line in enumerate(text.split("\n"), 1):
            if found := yaml.reader.Reader.NON_PRINTABLE.search(line):
                raise Wrong(number, f"the character U+{ord(found[0]):04X} is not allowed in YAML")
        try:
            # The loader on libyaml is five times faster, but a file that nests deeply enough
            # makes it overrun the stack, and takes the process with it.
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            return None if root is None else self.value(root, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            if "stream" in (error.problem or "") and error.context_mark:
                mark = error.context_mark  # where what never ends began
            raise Wrong(mark.line + 1 if mark else 1, _explained(error)) from None
        except RecursionError:
            raise Wrong(1, "the file nests too deeply; rules need five levels") from None

    def value(self, node: yaml.Node, path: Place) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise Wrong(1, f"the file holds more than {MAX_VALUES} values; do its anchors repeat?")
        if id(node) in self._open:
            raise Wrong(_line(node), f"{shown_path(path)}: holds itself; remove the alias")
        if isinstance(node, yaml.ScalarNode):
            self.written[path] = node.value
            return self._scalar(node, path)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                self._refuse_tag(node, path, "map")
                return self._mapping(node, path)
            self._refuse_tag(node, path, "seq")
            return tuple(self._item(item, (*path, index)) for index, item in enumerate(node.value))
        finally:
            self._open.discard(id(node))

    def _item(self, node: yaml.Node, path: Place) -> Any:
        self.lines[path] = _line(node)
        return self.value(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, (key_node, value_node) in self._entries(node, path).items():
            inner = (*path, key)
            # A merged value keeps the line where it was written.
            self.lines[inner] = _line(key_node)
            result[key] = self.value(value_node, inner)
        return result

    def _entries(
        self, node: yaml.MappingNode, path: Place
    ) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return the entries by key, those merged by `<<` first and overridden by the others."""
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                sources = (
                    value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                )
                for source in sources:
                    if not isinstance(source, yaml.MappingNode) or source is node:
                        raise Wrong(
                            _line(value_node),
                            f"{shown_path((*path, '<<'))}: is not a mapping to merge",
                        )
                    if id(source) in self._open:
                        raise Wrong(_line(value_node), f"{shown_path((*path, '<<'))}: holds itself")
                    self._open.add(id(source))
                    for key, entry in self._entries(source, path).items():
                        merged.setdefault(key, entry)
                    self._open.discard(id(source))
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise Wrong(_line(key_node), f"{shown_path(path)}: has a key that is not a text")
            key = key_node.value
            if key in own:
                if id(key_node) not in self._reported:
                    self._reported.add(id(key_node))
                    self.problems.append(
                        (
                            _line(key_node),
                            f"{shown_path((*path, key))}: stands in line {_line(own[key][0])} "
                            "already; remove one of them",
                        )
                    )
                continue
            own[key] = (key_node, value_node)
        return {**merged, **own}

    def _scalar(self, node: yaml.ScalarNode, path: Place) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        constructor = self._constructor
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return constructor.construct_yaml_bool(node)
            if kind == "int":
                return constructor.construct_yaml_int(node)
            if kind == "float":
                return constructor.construct_yaml_float(node)
        except (ValueError, KeyError, IndexError, OverflowError):
            raise Wrong(_line(node), f"{shown_path(path)}: cannot be read as {kind}") from None
        if kind not in ("str", "timestamp", "value", "merge"):
            self._refuse_tag(node, path, "str")
        return node.value

    @staticmethod
    def _refuse_tag(node: yaml.Node, path: Place, kind: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise Wrong(_line(node), f"{shown_path(path)}: has a tag (!…); remove it")


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def _explained(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "is not YAML"
    if "'\\t'" in problem:
        return "a tab, where YAML wants spaces; indent with spaces"
    if "single document" in (error.context or ""):
        return "a second document (---) begins here; put everything into one"
    context = f" {error.context}:" if error.context and error.context != problem else ""
    return masked(f"is not YAML:{context} {problem}")


def shown_path(path: Place) -> str:
    """Return the place as `models."nvidia/kimi-k2.5".targets[0].provider`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            plain = re.fullmatch(r"[\w/*:@+-]+", step)
            text += ("." if text else "") + (masked(step) if plain else quoted(step))
    return text or "the file"


def read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise Wrong(0, f"there is no such file in {path.parent}") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise Wrong(0, f"cannot be read ({reason})") from None
    if len(data) > MAX_BYTES:
        raise Wrong(0, "is longer than 1 MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Wrong(line, "is not UTF-8; save the file as UTF-8") from None


def plain_value(text: str) -> Any:
    """Return what the text would be in YAML, without quotes: 40 is a number, null is None."""
    tag: str = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    start = yaml.Mark("", 0, 0, 0, None, 0)
    try:
        return Reader().value(yaml.ScalarNode(tag, text, start, start), ())
    except Wrong:
        return text
