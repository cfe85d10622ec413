"""Replies in OpenAI's chat.completions shape, with what leaked put where it belongs."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kimi_core.dialects.base import mappings, text
from kimi_core.document import NotJSON, Path, decode, decode_once, encode, splice
from kimi_core.markup.scanner import Channel
from kimi_core.mending.turn import Scanners, Turn, arguments_text
from kimi_core.sse import SSE, Event
from kimi_core.stages import StageRank

_LIMITED = ("length", "content_filter")
_OF_TEXT = ("index", "delta", "logprobs")
_HELD = object()
_BLANK_LINES = (b"\n\n", b"\r\n\r\n", b"\r\r")
_sse = SSE()


class _Made(Event):
    """An event of our own."""


@dataclass(slots=True)
class _Waiting:
    """An event that is not yet sent, and what shall become of it."""

    event: Event
    choices: list[tuple[int, dict[str, Any], Turn]] = field(default_factory=list)
    payload: dict[str, Any] = field(default_factory=dict)
    tool_calls: dict[int, list[Any]] = field(default_factory=dict)
    found: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)


# An event that only says who speaks, as most replies begin; `_passes` lets it through.
_SAYS_WHO = re.compile(
    rb'data: ?\{[^{}\[\]\n]*"choices": ?\[\{[^{}\[\]\n]*"delta": ?\{"role": ?"assistant"'
    rb'(?:, ?"(?:content|refusal|reasoning|reasoning_content)": ?(?:""|null))*\}'
    rb"[^{}\[\]\n]*\}\][^{}\[\]\n]*\}\n\n"
)
_ENDS = re.compile(rb'"finish_reason": ?"')


class MendChat:
    """Mends a reply, streamed or whole; what needs no change leaves byte for byte.

    An event waits while its text could still become markup, and with it those that follow.
    Calls found in the text are sent when the turn ends, after those that came as such.
    """

    rank: int = StageRank.MEND
    reads_only = False
    on_failure: Literal["pass", "end"] = "pass"

    def __init__(self, scanners: Scanners) -> None:
        self._scanners = scanners
        self._left_alone = False
        self.turns: dict[int, Turn] = {}
        self._waiting: list[_Waiting] = []
        self._sent_changes = 0
        self._edits = 0
        self._carried = False  # text waits that an event already sent had brought
        self._template: dict[str, Any] = {}
        self._mirror = False  # thinking comes in `reasoning` too
        self._reading: Event | None = None
        self._lost_end = False  # the last event had no blank line, as the last of a stream may

    def feed(self, event: Event) -> Iterable[Event]:
        self._reading = event
        out = self._body(event) if event.type == "body" else self._apart(self._event(event))
        self._reading = None
        return out

    def lets_pass(self, first: bytes) -> bool:
        return _SAYS_WHO.fullmatch(first) is not None and not _ENDS.search(first)

    def end(self) -> Iterable[Event]:
        if self._reading is not None:  # it could not be read; what waited goes as it came
            return [event for event in self._as_they_came() if event is not self._reading]
        return self._apart(self._end())

    @property
    def all_turns(self) -> list[Turn]:
        return list(self.turns.values())

    # -- streamed

    def _event(self, event: Event) -> Iterable[Event]:
        if self._left_alone or not event.data:
            return self._pass(event)
        if not event.data.lstrip().startswith(b"{"):
            done = event.data.strip() == b"[DONE]"
            return [*self._end(cut=False), event] if done else self._pass(event)
        try:
            payload = decode_once(event.data)
        except NotJSON:
            torn = not event.raw.endswith((b"\n", b"\r"))
            return [*self._end(), event] if torn else self._pass(event)
        choices = payload.get("choices")
        if not isinstance(choices, list) or not choices:
            return [*self._end(failed=True), event] if payload.get("error") else self._pass(event)
        if not self._waiting and not self._carried and self._passes(choices):
            self._template = payload
            return (event,)
        entry = _Waiting(event, payload=payload)
        for position, choice in mappings(choices):
            index = choice.get("index", position)
            turn = self._turn(index if isinstance(index, int) else position, payload)
            if turn is None:
                return self._pass(event)
            if not turn.ended:
                entry.choices.append((position, choice, turn))
                self._read(entry, position, choice, turn)
            elif turn.ids and choice.get("finish_reason") == "stop":  # said once more
                entry.finish[position] = "tool_calls"
                self._edits += 1
        if not entry.choices and not entry.finish:
            return self._pass(event)
        self._template = payload
        self._waiting.append(entry)
        changes = self._changes()
        if not self._carried and changes == self._sent_changes:
            if self._pending():
                return ()
            for turn in self.turns.values():
                turn.take()
            return self._as_they_came()
        self._sent_changes = changes
        self._carried = self._pending()
        return self._rewritten({id(turn): turn.take() for turn in self.turns.values()})

    def _passes(self, choices: list[Any]) -> bool:
        """Tell whether an event brings nothing but text that passes as it is, as most do."""
        choice = choices[0]
        if len(choices) > 1 or not isinstance(choice, dict) or choice.get("finish_reason"):
            return False
        index, delta = choice.get("index", 0), choice.get("delta")
        turn = self.turns.get(index if isinstance(index, int) else 0)
        if turn is None and isinstance(delta, dict) and not self._left_alone:
            return delta.get("role") is not None and not any(
                value for key, value in delta.items() if key != "role"
            )  # it only says who speaks
        if turn is None or turn.ended or not isinstance(delta, dict):
            return False
        if any(delta.get(key) for key in ("tool_calls", "reasoning", "reasoning_details")):
            return False
        said, thought = delta.get("content"), delta.get("reasoning_content")
        if isinstance(said, str) and said and not thought:
            return turn.scanner.passes("content", said)
        if isinstance(thought, str) and not said and turn.scanner.passes("reasoning", thought):
            turn.reasoning.append(thought)
            return True
        return False

    def _apart(self, events: Iterable[Event]) -> list[Event]:
        """Return events, ours with a blank line before if what came before has lost its own."""
        out: list[Event] = []
        for event in events:
            apart = self._lost_end and isinstance(event, _Made)
            out.append(Event(event.data, b"\n\n" + event.raw, event.type) if apart else event)
            self._lost_end = not event.raw.endswith(_BLANK_LINES)
        return out

    def _turn(self, index: int, payload: dict[str, Any]) -> Turn | None:
        turn = self.turns.get(index)
        if turn is None:
            scanner = self._scanners(text(payload.get("model")))
            if scanner is None:
                self._left_alone = True
                return None
            turn = self.turns[index] = Turn(scanner)
        return turn

    def _read(self, entry: _Waiting, position: int, choice: dict[str, Any], turn: Turn) -> None:
        delta = choice.get("delta")
        if isinstance(delta, dict):
            self._mirror = self._mirror or bool(text(delta.get("reasoning")))
            if thought := _reasoning(delta):
                turn.scanner.feed("reasoning", thought)
                self._edits += not text(delta.get("reasoning_content"))
            turn.scanner.feed("content", _content(delta.get("content")))
            if isinstance(calls := delta.get("tool_calls"), list) and calls:
                turn.scanner.decide()
                entry.tool_calls[position] = mended = _native(turn, calls, whole=False)
                self._edits += mended != calls
        if reason := text(choice.get("finish_reason")):
            entry.found[position] = found = _calls(turn, cut=reason in _LIMITED)
            self._edits += len(found)
            if reason == "stop" and turn.ids:
                entry.finish[position] = "tool_calls"
                self._edits += 1
                if not found:
                    turn.scanner.changed("finish_reason", b"stop", "tool_calls")

    def _pass(self, event: Event) -> Iterable[Event]:
        if not self._waiting:
            return (event,)
        self._waiting.append(_Waiting(event))
        return ()

    def _changes(self) -> int:
        return self._edits + sum(turn.scanner.changes for turn in self.turns.values())

    def _pending(self) -> bool:
        return any(turn.scanner.pending for turn in self.turns.values())

    def _as_they_came(self) -> list[Event]:
        waiting, self._waiting = self._waiting, []
        return [entry.event for entry in waiting]

    def _rewritten(self, texts: dict[int, dict[Channel, str]]) -> list[Event]:
        """Return the events that wait; the first of each choice carries all its text."""
        out: list[Event] = []
        for entry in self._waiting:
            before, edits, empty = self._rewrite(entry, texts)
            out += [_event(one) for one in before]
            if not edits:
                out.append(entry.event)
            elif not empty:
                data = entry.event.data
                for path, value in edits:
                    data = splice(data, path, value)
                out.append(_event(data, entry.event.type))
        self._waiting = []
        return out

    def _rewrite(
        self, entry: _Waiting, texts: dict[int, dict[Channel, str]]
    ) -> tuple[list[bytes], list[tuple[Path, Any]], bool]:
        """Return new events to go before one, its own edits, and whether they leave nothing."""
        before: list[bytes] = []
        edits: list[tuple[Path, Any]] = []
        empty = not (entry.payload.get("usage") or entry.payload.get("error"))
        for position, choice, turn in entry.choices:
            clean = texts.pop(id(turn), {})
            index = choice.get("index", position)
            old = choice.get("delta")
            found = entry.found.get(position, [])
            if clean and (found or not isinstance(old, dict)):
                before.append(self._synthetic(index, self._delta(_role(old), clean)))
                clean = {}
            before += [self._synthetic(index, {"tool_calls": [call]}) for call in found]
            if isinstance(old, dict):
                delta = self._delta(old, clean)
                if calls := entry.tool_calls.get(position):
                    delta["tool_calls"] = calls
                elif position in entry.tool_calls:
                    del delta["tool_calls"]  # they wait for their names
                if delta != old:
                    edits.append((("choices", position, "delta"), delta))
                empty = empty and not any(delta.values())
            empty = empty and not any(v for k, v in choice.items() if k not in _OF_TEXT)
        for position, reason in entry.finish.items():
            edits.append((("choices", position, "finish_reason"), reason))
            empty = False
        return before, edits, empty

    def _delta(self, old: dict[str, Any], clean: dict[Channel, str]) -> dict[str, Any]:
        """Return a delta with clean text in place of its own."""
        delta = {**old}
        said, thought = clean.get("content", ""), clean.get("reasoning", "")
        if said or _content(old.get("content")):
            delta["content"] = _in_shape_of(old.get("content"), said)
        if thought or text(old.get("reasoning_content")):
            delta["reasoning_content"] = thought
        if thought and self._mirror:
            delta["reasoning"] = thought
        delta.update(_mirrored(old, thought))
        return delta

    def _synthetic(self, index: Any, delta: dict[str, Any], finish: str | None = None) -> bytes:
        kept = {k: v for k, v in self._template.items() if k not in ("choices", "usage", "error")}
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        return encode({**kept, "choices": [choice]})

    def _end(self, *, cut: bool = True, failed: bool = False) -> list[Event]:
        """The stream is over, whether or not each choice has said so; `cut`: without a word."""
        before = self._changes()
        ended = [
            (index, turn, _calls(turn, cut=cut))
            for index, turn in self.turns.items()
            if not turn.ended
        ]
        texts = {id(turn): turn.take() for turn in self.turns.values()}
        if not self._carried and self._changes() == before == self._sent_changes:
            out = self._as_they_came()
            texts.clear()
        else:
            out = self._rewritten(texts)
        self._carried = False
        self._sent_changes = self._changes()
        for index, turn, found in ended:
            deltas = [self._delta({}, clean)] if (clean := texts.get(id(turn))) else []
            deltas += [{"tool_calls": [call]} for call in found]
            out += [_event(self._synthetic(index, delta)) for delta in deltas]
            if turn.ids and not failed and (not cut or turn.complete):
                out.append(_event(self._synthetic(index, {}, "tool_calls")))
        return out

    # -- whole

    def _body(self, event: Event) -> Iterable[Event]:
        try:
            payload = decode(event.data)
        except NotJSON:
            return (event,)
        if not isinstance(payload, dict):
            return (event,)
        data, changed = event.data.removeprefix(BOM_UTF8), False
        for position, choice in mappings(payload.get("choices")):
            message = choice.get("message")
            if not isinstance(message, dict):
                continue
            turn = self._turn(position, payload)
            if turn is None:
                break
            for path, value in _mended(turn, choice, message):
                changed = True
                data = splice(data, ("choices", position, *path), value)
        return (Event(data, data, "body"),) if changed else (event,)


def _mended(
    turn: Turn, choice: dict[str, Any], message: dict[str, Any]
) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Yield what changes in a whole reply: the path below its choice, and the new value."""
    scanner = turn.scanner
    scanner.feed("reasoning", _reasoning(message))
    scanner.feed("content", _content(message.get("content")))
    old_calls = message.get("tool_calls")
    if isinstance(old_calls, list) and old_calls:
        scanner.decide()
    calls = _native(turn, old_calls, whole=True) if isinstance(old_calls, list) else []
    reason = text(choice.get("finish_reason"))
    found = _calls(turn, cut=reason in _LIMITED)
    clean = turn.take()
    if clean.get("content", "") != _content(message.get("content")):
        said = clean.get("content", "")
        blank = None if found and not said.strip() else said
        yield ("message", "content"), _in_shape_of(message.get("content"), blank)
    thought = clean.get("reasoning", "")
    if thought != text(message.get("reasoning_content")):
        yield ("message", "reasoning_content"), thought
    for key, value in _mirrored(message, thought).items():
        yield ("message", key), value
    for call in found:
        del call["index"]
    if (calls := calls + found) and calls != old_calls:
        yield ("message", "tool_calls"), calls
    if turn.ids and reason in ("", "stop"):
        if not found:
            scanner.changed("finish_reason", reason.encode(), "tool_calls")
        yield ("finish_reason",), "tool_calls"


def _native(turn: Turn, calls: Sequence[Any], *, whole: bool) -> list[Any]:
    """Return calls, or pieces of calls, that came as such, as the client gets them."""
    mended = (_piece(turn, call, place, whole) for place, call in enumerate(calls))
    return [call for call in mended if call is not _HELD]


def _piece(turn: Turn, call: Any, place: int, whole: bool) -> Any:
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    id_, name = text(call.get("id")), function.get("name")
    name = str(name) if isinstance(name, int) else text(name)
    number = turn.call(call.get("index", place), id_, name)
    if number is None:
        return call
    native = turn.native[number]
    said = arguments_text(function.get("arguments"))
    native.arguments.append(said)
    if whole:
        turn.name(native)
    elif native.nameless:
        return _HELD  # until all its arguments have come
    mended = {**call}
    if "index" in call or number != place:
        mended["index"] = number
    if not native.begun:
        mended["id"] = native.id
        mended.setdefault("type", "function")
    elif id_:
        mended["id"] = native.id
    native.begun = True
    if function:
        mended["function"] = {**function}
        if name:
            mended["function"]["name"] = native.name
        if "arguments" in function and not isinstance(function["arguments"], str):
            mended["function"]["arguments"] = said
    return mended


def _calls(turn: Turn, *, cut: bool) -> list[dict[str, Any]]:
    """End a turn; return what is still to be said: calls held back, and those found in text."""
    for native in turn.native:
        turn.name(native)
    found = turn.end(cut=cut)
    held = [(number, call) for number, call in enumerate(turn.native) if not call.begun]
    return [
        *(_call(number, call.id, call.name, call.text) for number, call in held),
        *(
            _call(number, call.id, call.name, call.arguments)
            for number, call in enumerate(found, len(turn.native))
        ),
    ]


def _call(number: int, id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"index": number, "id": id, "type": "function", "function": function}


def _role(delta: Any) -> dict[str, Any]:
    role = delta.get("role") if isinstance(delta, dict) else None
    return {"role": role} if role else {}


def _reasoning(message: dict[str, Any]) -> str:
    """Return a message's thinking; mirrored fields count once."""
    for key in ("reasoning_content", "reasoning"):
        if said := text(message.get(key)):
            return said
    return "".join(said for _, said in _details(message))


def _details(message: dict[str, Any]) -> list[tuple[int, str]]:
    return [
        (index, text(detail.get("text")))
        for index, detail in mappings(message.get("reasoning_details"))
        if detail.get("type") == "reasoning.text"
    ]


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "".join(text(part.get("text")) for _, part in mappings(value))


def _in_shape_of(old: Any, said: str | None) -> Any:
    """Return text as a string, or as a list of parts where it came as one."""
    if not isinstance(old, list):
        return said
    rest = [part for part in old if not (isinstance(part, dict) and text(part.get("text")))]
    return [*([{"type": "text", "text": said}] if said else []), *rest]


def _mirrored(message: dict[str, Any], thought: str) -> dict[str, Any]:
    """Return the other fields that carry thinking, where they say something else."""
    changed: dict[str, Any] = {}
    if isinstance(said := message.get("reasoning"), str) and said != thought:
        changed["reasoning"] = thought
    details = _details(message)
    if details and "".join(said for _, said in details) != thought:
        # The first carries it all.
        texts = {index: thought if index == details[0][0] else "" for index, _ in details}
        changed["reasoning_details"] = [
            {**detail, "text": texts[index]} if index in texts else detail
            for index, detail in enumerate(message["reasoning_details"])
        ]
    return changed


def _event(data: bytes, type: str = "") -> Event:
    return _Made(data, _sse.encode(data, type), type)
