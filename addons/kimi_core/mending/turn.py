"""One reply of one choice: the calls that came as such, and those found in its text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kimi_core.dialects.base import json_text, text
from kimi_core.document import NotJSON, decode
from kimi_core.exchange import ToolCall
from kimi_core.markup.scanner import Channel, Scanner
from kimi_core.markup.tools import PREFIX

Scanners = Callable[[str], Scanner | None]
"""Makes a scanner for a reply of the model that it names; None: the reply is left alone."""

_NUMBERED = re.compile(r"(?P<head>.*:)(?P<index>\d+)", re.DOTALL)


@dataclass(slots=True)
class Native:
    """A call that came as such; its name and id as the client gets them."""

    id: str
    name: str
    came_as: str
    """The id that the provider gave it."""
    arguments: list[str] = field(default_factory=list)
    begun: bool = False
    """A piece of it has been passed on."""
    nameless: bool = False
    """Its name is a number: only its arguments can tell which tool it means."""

    @property
    def text(self) -> str:
        return "".join(self.arguments)


class Turn:
    """A scanner, and what only the whole message can tell of its calls."""

    def __init__(self, scanner: Scanner) -> None:
        self.scanner = scanner
        self.native: list[Native] = []
        self.reasoning: list[str] = []
        self.ended = False
        self.ids: list[str] = []
        """Of all calls, once the turn has ended."""
        self.complete = False
        """It has ended, and so have the arguments of all its calls."""
        self._used: set[str] = set()
        self._free: dict[str, int] = {}  # by what stands before it, a number not yet in an id
        self._at: dict[str, int] = {}

    def take(self) -> dict[Channel, str]:
        """Return the clean text that has come since the last time, by channel."""
        pieces: dict[Channel, list[str]] = {}
        for channel, piece in self.scanner.out:
            pieces.setdefault(channel, []).append(piece)
        self.scanner.out.clear()
        self.reasoning += pieces.get("reasoning", ())
        return {channel: "".join(said) for channel, said in pieces.items()}

    def call(self, place: Any, id: str, name: str) -> int | None:
        """Return the number of the call that stands at a provider's `place`, a new one maybe.

        None when it is unknown and has no name. Several calls may claim the same place, with
        ids of their own.
        """
        key = repr(place)
        number = self._at.get(key)
        if number is None or (id and name and id != self.native[number].came_as):
            if not name:
                return None
            self._at[key] = number = len(self.native)
            self.native.append(self._native(id, name))
        return number

    def _native(self, id: str, said: str) -> Native:
        name = self._repaired(said)
        native = Native(self._unique(id, name), name, id)
        native.nameless = name.isdecimal() and name not in self.scanner.tools
        if native.id != id:
            self.scanner.changed("id", id.encode("utf-8", "replace"), native.id)
        return native

    def name(self, native: Native) -> None:
        """Name a call by its arguments, which have all come, where they mean one tool."""
        if native.nameless and (fitting := self.scanner.tools.by_arguments(native.text)):
            self.scanner.changed("name", native.name.encode(), fitting)
            native.name = fitting
        native.nameless = False

    def end(self, *, cut: bool) -> list[ToolCall]:
        """Return the calls found in the text that did not come as such too."""
        self.ended = True
        scanner = self.scanner
        scanner.end(cut=cut)
        known = {(call.name, _canonical(call.text)) for call in self.native}
        # Those of the thinking first: it comes before what is said.
        found = sorted(scanner.calls, key=lambda call: call.channel != "reasoning")
        new = [call for call in found if (call.name, _canonical(call.arguments)) not in known]
        if new:
            # Some hosts count from 0 in each reply; clients take a second call of an id for the
            # first one told again.
            self._used.update(scanner.earlier())
        # An id that the model wrote twice is changed the second time, and no other for its sake.
        written = {call.id for call in new}
        calls: list[ToolCall] = []
        for one in new:
            id = self._unique(one.id, one.name, written)
            calls.append(ToolCall(one.name, one.arguments, id))
        self.ids = [*(call.id for call in self.native), *(call.id for call in calls)]
        said = [*(call.text for call in self.native), *(call.arguments for call in calls)]
        self.complete = all(map(is_object, said))
        return calls

    def _repaired(self, name: str) -> str:
        tools = self.scanner.tools
        if not name or name in tools:
            return name
        header = _NUMBERED.fullmatch(name.strip())
        said = header["head"][:-1] if header else name
        fitting = tools.fit(said.strip().removeprefix(PREFIX))
        if not fitting and name.isdecimal():
            fitting = tools.by_arguments("")  # the only one that there is
        if fitting:
            self.scanner.changed("name", name.encode("utf-8", "replace"), fitting)
        return fitting or name

    def _unique(self, id: str, name: str, written: Collection[str] = ()) -> str:
        """Return an id that no other call of the message has: the next number, if it is taken."""
        unique = id or f"{PREFIX}{name}:{len(self._used)}"
        if unique in self._used or (not id and unique in written):
            numbered = _NUMBERED.fullmatch(unique)
            head, number = f"{unique}-", 1
            if numbered and len(numbered["index"]) < 18:
                head, number = numbered["head"], int(numbered["index"])
            number = max(number + 1, self._free.get(head, 0))
            while (unique := f"{head}{number}") in self._used or unique in written:
                number += 1
            self._free[head] = number + 1
        self._used.add(unique)
        return unique


def declared(definitions: Iterable[Any], schema: str = "parameters") -> Mapping[str, Any]:
    """Return the declared tools of a request, each with its schema, by name."""
    found: dict[str, Any] = {}
    for definition in definitions:
        if isinstance(definition, dict):
            inner = definition.get("function")
            holder = inner if isinstance(inner, dict) else definition
            if name := text(holder.get("name")):
                found[name] = holder.get(schema)
    return found


def arguments_text(value: Any) -> str:
    """Return a call's arguments as JSON text, whatever a provider sent."""
    return value if isinstance(value, str) else "" if value is None else json_text(value)


def is_object(arguments: str) -> bool:
    """Tell whether a call's arguments are the text of a JSON object."""
    try:
        return isinstance(decode(arguments.encode("utf-8", "surrogatepass")), dict)
    except NotJSON:
        return False


def _canonical(arguments: str) -> str:
    if not arguments.strip():
        return "{}"
    try:
        value = decode(arguments.encode("utf-8", "surrogatepass"))
        return json.dumps(value, sort_keys=True)
    except (NotJSON, RecursionError, UnicodeError):
        return arguments.strip()
