"""Replies in Anthropic's Messages shape, with what leaked put where it belongs.

A stream carries the same blocks as a whole reply, each as a start, deltas and a stop.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from kimi_core.dialects.base import json_text, text
from kimi_core.document import Document, NotJSON, Shape, decode, encode, splice
from kimi_core.exchange import ToolCall
from kimi_core.markup.scanner import Channel
from kimi_core.mending import ids
from kimi_core.mending.turn import Scanners, Turn, is_object
from kimi_core.sse import SSE, Event
from kimi_core.stages import StageRank

Kind = Literal["text", "thinking", "other"]
Piece = tuple[Channel, str]

_LIMITED = ("max_tokens", "refusal", "model_context_window_exceeded")
_FINISHED = ("", "end_turn", "stop_sequence", "stop")
"""The stop reasons that a host may give although the turn ends in calls."""
_DUMP = "(Empty response: {"
"""How Kimi Code's endpoint begins a text that dumps thinking and signature."""

_CHANNEL: dict[Kind, Channel] = {"text": "content", "thinking": "reasoning"}
_KIND: dict[Channel, Kind] = {"content": "text", "reasoning": "thinking"}
_EXTRA: dict[Kind, str] = {"text": "citations", "thinking": "signature"}
"""What comes with a text in deltas of its own."""
_REPLY = Shape("type", "model", "stop_reason", arrays=("content",))
_sse = SSE()


@dataclass(slots=True)
class _Block:
    """A block as it comes in: of text or thinking, or any other."""

    kind: Kind
    head: dict[str, Any] = field(default_factory=dict)
    """What it carries beside its text."""
    changes: int = 0
    """What the scanner had changed before it came."""
    unchanged: bool = False
    """It has ended, and the scanner changed nothing of it."""
    blank: bool = True
    """Nothing but white space has come of it."""
    beginning: str | None = None
    """Text that may be the beginning of a dump; None: it is none."""
    dump: list[str] = field(default_factory=list)
    extras: list[Any] = field(default_factory=list)
    number: int = 0
    """Towards the client."""
    call: int | None = None
    """Its number in the turn, if it is one."""
    id: str = ""
    """Of the call, as the client gets it."""
    restarted: bool = False
    """Its input has begun to come in deltas."""


class _Blocks(ABC):
    """The blocks that the client gets: pieces of a kind, one after the other, are one block."""

    def __init__(self) -> None:
        self.open: Kind | None = None
        """The kind of text that is being written."""
        self._kind: Kind | None = None
        self._held: list[str] = []
        """White space that would begin a block; one of nothing else is refused when it returns."""

    def write(self, pieces: Iterable[Piece], block: _Block | None = None) -> None:
        """Add clean text, which came with `block`."""
        for channel, piece in pieces:
            kind = _KIND[channel]
            if kind != self._kind:
                self._kind = kind
                self._held.clear()
            if self.open != kind:
                self._held.append(piece)
                if not piece or piece.isspace():
                    continue
                piece = "".join(self._held)
                self._held.clear()
                self._begin_text(kind, block)
            self._add(kind, piece)

    def end(self, block: _Block) -> None:
        """End a block of text, with what came beside its text."""
        if self.open is None and block.unchanged and block.extras:
            self._begin_text(block.kind, block)
        if self.open == block.kind:
            for extra in block.extras:
                self._extra(extra)
        self.close()

    def call(self, id: str, call: ToolCall) -> None:
        self.close()
        self._call(id, call.name, object_text(call.arguments))

    def close(self) -> None:
        self._held.clear()
        if self.open is not None:
            self._close()
            self.open = None

    def _begin_text(self, kind: Kind, block: _Block | None) -> None:
        self.close()
        self.open = self._kind = kind
        head = block.head if block is not None and block.kind == kind else {}
        begun = {"type": kind, **head, kind: ""}
        if kind == "thinking":
            begun.setdefault("signature", "")
        self._begin(begun)

    @abstractmethod
    def _begin(self, block: dict[str, Any]) -> None: ...

    @abstractmethod
    def _add(self, kind: Kind, piece: str) -> None: ...

    @abstractmethod
    def _extra(self, extra: Any) -> None: ...

    @abstractmethod
    def _call(self, id: str, name: str, input: str) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class _Events(_Blocks):
    """Blocks as the events of a stream, numbered without gaps."""

    def __init__(self) -> None:
        super().__init__()
        self._out: list[Event] = []
        self._number = -1
        """Of the text that is open."""
        self._others: list[int] = []
        """The numbers of those other blocks that have not ended."""
        self._next = 0

    def taken(self) -> list[Event]:
        """Return the events since the last time."""
        out, self._out = self._out, []
        return out

    def passed(self, block: _Block, index: Any) -> None:
        """Go on from a block whose beginning was sent as it came."""
        block.number = index if isinstance(index, int) else self._next
        self._next = max(self._next, block.number + 1)
        if block.kind == "other":
            self._others.append(block.number)
        else:
            self.open, self._number = block.kind, block.number

    def ended(self, block: _Block) -> None:
        """Know that the end of a block was sent."""
        if block.kind != "other":
            self.open = None
        elif block.number in self._others:
            self._others.remove(block.number)

    def other(self, block: _Block) -> None:
        """Number a block that is no text; its events are added by `add`."""
        self.close()
        block.number, self._next = self._next, self._next + 1
        self._others.append(block.number)

    def close_others(self) -> None:
        """End the other blocks, where their host has not said so."""
        for number in self._others:
            self.add(_event("content_block_stop", index=number))
        self._others.clear()

    def add(self, event: Event) -> None:
        self._out.append(event)

    def _begin(self, block: dict[str, Any]) -> None:
        self._number, self._next = self._next, self._next + 1
        self.add(_event("content_block_start", index=self._number, content_block=block))

    def _add(self, kind: Kind, piece: str) -> None:
        delta = {"type": f"{kind}_delta", kind: piece}
        self.add(_event("content_block_delta", index=self._number, delta=delta))

    def _extra(self, extra: Any) -> None:
        self.add(_event("content_block_delta", index=self._number, delta=extra))

    def _call(self, id: str, name: str, input: str) -> None:
        self._begin({"type": "tool_use", "id": id, "name": name, "input": {}})
        self._extra({"type": "input_json_delta", "partial_json": input})
        self._close()

    def _close(self) -> None:
        self.add(_event("content_block_stop", index=self._number))


class _Whole(_Blocks):
    """Blocks as they stand in a whole reply."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[bytes] = []
        self._block: dict[str, Any] = {}
        self._texts: list[str] = []

    def taken(self) -> bytes:
        """Return the blocks as a JSON array."""
        self.close()
        return b"[" + b",".join(self._done) + b"]"

    def add(self, block: bytes) -> None:
        self.close()
        self._done.append(block)

    def _begin(self, block: dict[str, Any]) -> None:
        self._block = block
        self._texts.clear()

    def _add(self, kind: Kind, piece: str) -> None:
        self._texts.append(piece)

    def _extra(self, extra: Any) -> None:
        self._block.update(extra)

    def _call(self, id: str, name: str, input: str) -> None:
        value = decode(input.encode("utf-8", "surrogatepass"))
        self._done.append(encode({"type": "tool_use", "id": id, "name": name, "input": value}))

    def _close(self) -> None:
        said = "".join(self._texts)
        self._done.append(encode({**self._block, self._block["type"]: said}))


@dataclass(slots=True)
class _Waiting:
    """An event that is not yet sent, and what it does; without one, a stop that was left out."""

    event: Event | None
    does: Literal["pass", "start", "add", "stop", "end"] = "pass"
    payload: dict[str, Any] = field(default_factory=dict)
    block: _Block | None = None
    pieces: list[Piece] = field(default_factory=list)
    """The clean text that came out with it."""
    found: list[ToolCall] = field(default_factory=list)
    finish: str = ""


# What a reply begins with; nothing of it is mended.
_SAYS_WHO = re.compile(
    rb'event: message_start\ndata: \{"type": ?"message_start",[^\n]*"content": ?\[\],[^\n]*\n\n'
)


class MendMessages:
    """Mends a reply, streamed or whole; what needs no change leaves byte for byte.

    An event waits while its text could still become markup or the block is blank so far, and
    with it those that follow. Once something was changed, blocks are numbered anew. Calls
    found in the text come last.
    """

    rank: int = StageRank.MEND
    reads_only = False
    on_failure: Literal["pass", "end"] = "pass"

    def __init__(self, scanners: Scanners) -> None:
        self._scanners = scanners
        self._left_alone = False
        self.turn: Turn | None = None
        self._blocks: dict[str, _Block] = {}
        self._open: _Block | None = None
        self._began = 0  # how many blocks have
        self._used: set[str] = set()  # the ids of calls towards the client
        self._waiting: list[_Waiting] = []
        self._out = _Events()
        self._usage: Any = {"output_tokens": 0}
        self._reading: Event | None = None

    def feed(self, event: Event) -> Iterable[Event]:
        self._reading = event
        out = self._body(event) if event.type == "body" else self._event(event)
        self._reading = None
        return out

    def lets_pass(self, first: bytes) -> bool:
        return _SAYS_WHO.fullmatch(first) is not None

    def end(self) -> Iterable[Event]:
        if self._reading is not None:  # it could not be read; what waited goes as it came
            waiting = [entry.event for entry in self._waiting]
            return [event for event in waiting if event and event is not self._reading]
        return self._over()

    @property
    def all_turns(self) -> list[Turn]:
        return [self.turn] if self.turn is not None else []

    # -- streamed: what comes

    def _event(self, event: Event) -> Iterable[Event]:
        payload = self._read(event)
        type_ = text(payload.get("type"))
        if self.turn is None and type_ in ("message_start", "content_block_start"):
            message = payload.get("message")
            self._begin(message if isinstance(message, dict) else {})
        turn = self.turn
        if turn is None or turn.ended or type_ in ("", "ping", "message_start"):
            if not self._waiting:
                return (event,)
            self._waiting.append(_Waiting(event))
            return ()
        if type_ == "error":
            return [*self._over(), event]
        self._take(turn, _Waiting(event, payload=payload), type_)
        return self._send(turn)

    def _read(self, event: Event) -> dict[str, Any]:
        """Return an event's payload, nothing when it is left alone."""
        if self._left_alone or not event.data:
            return {}
        try:
            payload = decode(event.data)
        except NotJSON:
            return {}
        return payload if isinstance(payload, dict) else {}

    def _begin(self, message: dict[str, Any]) -> None:
        scanner = self._scanners(text(message.get("model")))
        if scanner is None:
            self._left_alone = True
            return
        self.turn = Turn(scanner)
        self._usage = message.get("usage") or self._usage

    def _take(self, turn: Turn, entry: _Waiting, type_: str) -> None:
        payload = entry.payload
        place = repr(payload.get("index"))  # whatever type it is of
        if type_ == "message_delta":
            self._usage = payload.get("usage") or self._usage
        if type_ == "content_block_start":
            if isinstance(begun := payload.get("content_block"), dict):
                self._stop_unsaid(turn)
                entry.block = self._open = self._blocks[place] = self._start(turn, begun)
                entry.does = "start"
        elif type_ == "message_stop" or (type_ == "message_delta" and _reason(payload)):
            self._stop_unsaid(turn)
            entry.does = "end"
            entry.found, entry.finish = self._finish(turn, _reason(payload))
        elif (block := self._blocks.get(place)) is not None:
            delta = payload.get("delta")
            if type_ == "content_block_stop":
                entry.block, entry.does = block, "stop"
                self._stop(turn, block)
            elif type_ == "content_block_delta" and isinstance(delta, dict):
                entry.block, entry.does = block, "add"
                self._delta(turn, block, delta)
        entry.pieces = _taken(turn)
        if entry.block is not None:
            entry.block.blank = entry.block.blank and _blank(entry.pieces)
        self._waiting.append(entry)

    def _stop_unsaid(self, turn: Turn) -> None:
        """Stop the text that is open where its host has not said so."""
        if (block := self._open) is not None and block.kind != "other":
            self._stop(turn, block)
            self._waiting.append(_Waiting(None, "stop", block=block, pieces=_taken(turn)))

    def _delta(self, turn: Turn, block: _Block, delta: dict[str, Any]) -> None:
        if block.kind == "other":
            if block.call is not None and (said := text(delta.get("partial_json"))):
                arguments = turn.native[block.call].arguments
                if not block.restarted:
                    arguments.clear()  # they stand in the deltas, whatever the start has said
                    block.restarted = True
                arguments.append(said)
        elif delta.get("type") == f"{block.kind}_delta":
            self._say(turn, block, text(delta.get(block.kind)))
        elif any(value for key, value in delta.items() if key != "type"):
            block.extras.append(delta)

    # -- streamed: what goes

    def _send(self, turn: Turn) -> list[Event]:
        if turn.scanner.changes:
            return self._written(turn)
        block = self._open
        if turn.scanner.pending or (block and block.kind != "other" and block.blank):
            return []
        return self._as_they_came()

    def _as_they_came(self) -> list[Event]:
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            if entry.block is None:
                continue
            entry.block.extras.clear()  # they go as well
            if entry.does == "start":
                self._out.passed(entry.block, entry.payload.get("index"))
            elif entry.does == "stop":
                self._out.ended(entry.block)
        return [entry.event for entry in waiting if entry.event is not None]

    def _written(self, turn: Turn) -> list[Event]:
        """Return what becomes of the events that wait."""
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            if entry.does == "end":
                self._out.close_others()
            self._out.write(entry.pieces, entry.block)
            self._write(turn, entry)
        return self._out.taken()

    def _write(self, turn: Turn, entry: _Waiting) -> None:
        out, block, event = self._out, entry.block, entry.event
        if entry.does == "end":
            out.close()
            self._write_calls(out, entry.found)
            if event is not None:
                self._write_end(event, entry)
        elif block is None:
            if event is not None:
                out.add(event)
        elif block.kind != "other":
            if entry.does == "stop":
                out.end(block)
        elif event is not None:
            if entry.does == "start":
                out.other(block)
            out.add(_mended(turn, block, event, entry.payload))
            if entry.does == "stop":
                out.ended(block)

    def _write_end(self, event: Event, entry: _Waiting) -> None:
        if entry.finish and entry.payload.get("type") == "message_delta":
            data = splice(event.data, ("delta", "stop_reason"), entry.finish)
            event = _again(event, data)
        elif entry.finish:
            delta = {"stop_reason": entry.finish, "stop_sequence": None}
            self._out.add(_event("message_delta", delta=delta, usage=self._usage))
        self._out.add(event)

    def _write_calls(self, out: _Blocks, calls: Iterable[ToolCall]) -> None:
        for call in calls:
            out.call(self._unused(ids.encode(call.id)), call)

    def _unused(self, id: str) -> str:
        """Return the id, or one like it if a call of the message has it already."""
        while id in self._used:
            id += "_"
        self._used.add(id)
        return id

    def _over(self) -> list[Event]:
        """Return what waits: nothing more comes."""
        turn = self.turn
        if turn is None or turn.ended:
            return self._as_they_came()
        self._stop_unsaid(turn)
        found = turn.end(cut=True)
        pieces = _taken(turn)
        if not turn.scanner.changes:
            return self._as_they_came()
        self._waiting.append(_Waiting(None, "end", pieces=pieces, found=found))
        return self._written(turn)

    # -- whole

    def _body(self, event: Event) -> Iterable[Event]:
        try:
            document = Document(event.data, _REPLY)
        except NotJSON:
            return (event,)
        content = document.get("content")
        if document.get("type") != "message" or not isinstance(content, list):
            return (event,)
        self._begin({"model": document.get("model")})
        if self.turn is None:
            return (event,)
        turn, out = self.turn, _Whole()
        for raw, block in zip(document.elements("content"), content, strict=True):
            self._pass_block(turn, out, bytes(raw), block)
        found, finish = self._finish(turn, text(document.get("stop_reason")))
        pieces = _taken(turn)
        if not turn.scanner.changes:
            return (event,)
        out.write(pieces)
        self._write_calls(out, found)
        document.set_raw(("content",), out.taken())
        if finish:
            document.set(("stop_reason",), finish)
        data = document.encode()
        return (Event(data, data, "body"),)

    def _pass_block(self, turn: Turn, out: _Whole, raw: bytes, content: Any) -> None:
        block = self._start(turn, content if isinstance(content, dict) else {})
        if block.kind == "other":
            self._stop(turn, block)
            out.add(_renamed(turn, block, raw, (), content))
            return
        key = _EXTRA[block.kind]
        if block.head.get(key):
            block.extras.append({key: block.head.pop(key)})
        self._stop(turn, block)
        pieces = _taken(turn)
        if turn.scanner.changes:
            out.write(pieces, block)
            out.end(block)
        else:
            out.add(raw)

    # -- both

    def _start(self, turn: Turn, begun: dict[str, Any]) -> _Block:
        type_ = text(begun.get("type"))
        self._began += 1
        if type_ in ("text", "thinking"):
            kind: Kind = "text" if type_ == "text" else "thinking"
            block = _Block(kind, {**begun}, turn.scanner.changes)
            block.beginning = "" if kind == "text" else None
            self._say(turn, block, text(begun.get(kind)))
            return block
        block = _Block("other")
        if type_ == "tool_use":
            turn.scanner.decide()
            block.call = turn.call(self._began, text(begun.get("id")), text(begun.get("name")))
            if block.call is not None:
                native = turn.native[block.call]
                native.arguments.append(json_text(begun.get("input") or {}))
                stays = native.id == native.came_as
                block.id = self._unused(native.id if stays else ids.encode(native.id))
        return block

    def _say(self, turn: Turn, block: _Block, said: str) -> None:
        if block.dump:
            block.dump.append(said)
            return
        if block.beginning is not None:
            said, block.beginning = block.beginning + said, None
            if said.startswith(_DUMP):
                block.dump.append(said)
                return
            if _DUMP.startswith(said):
                block.beginning = said
                return
        turn.scanner.feed(_CHANNEL[block.kind], said)

    def _stop(self, turn: Turn, block: _Block) -> None:
        """No more of a block comes: what could still become markup is text."""
        if block is self._open:
            self._open = None
        if block.dump:
            dumped = "".join(block.dump).encode("utf-8", "surrogatepass")
            turn.scanner.changed("dropped", dumped)
            block.dump.clear()
        elif block.beginning:
            said, block.beginning = block.beginning, None
            turn.scanner.feed("content", said)
        if block.kind != "other":
            turn.scanner.break_off()
            block.unchanged = turn.scanner.changes == block.changes

    def _finish(self, turn: Turn, reason: str) -> tuple[list[ToolCall], str]:
        """End the turn; return the calls found in its text, and its new stop reason if any."""
        found = turn.end(cut=reason in _LIMITED)
        if not (found or turn.native) or reason not in _FINISHED:
            return found, ""
        if not found:
            turn.scanner.changed("finish_reason", reason.encode("utf-8", "replace"), "tool_use")
        return found, "tool_use"


def object_text(arguments: str) -> str:
    """Return a call's arguments as the text of a JSON object, which Anthropic's `input` must be."""
    return arguments if is_object(arguments) else json_text({"_raw": arguments})


def _taken(turn: Turn) -> list[Piece]:
    """Return the clean text that has come since the last time, in its order."""
    pieces = list(turn.scanner.out)
    turn.take()
    return pieces


def _blank(pieces: Iterable[Piece]) -> bool:
    return not any(piece.strip() for _, piece in pieces)


def _reason(payload: dict[str, Any]) -> str:
    delta = payload.get("delta")
    return text(delta.get("stop_reason")) if isinstance(delta, dict) else ""


def _mended(turn: Turn, block: _Block, event: Event, payload: dict[str, Any]) -> Event:
    """Return an event of a block that is no text, with its new number, name and id."""
    data = event.data
    if payload.get("index") != block.number:
        data = splice(data, ("index",), block.number)
    if payload.get("type") == "content_block_start":
        data = _renamed(turn, block, data, ("content_block",), payload["content_block"])
    return event if data == event.data else _again(event, data)


def _renamed(
    turn: Turn, block: _Block, data: bytes, path: tuple[str, ...], begun: dict[str, Any]
) -> bytes:
    """Return JSON text with the name and the id that a call at `path` has by now."""
    if block.call is None:
        return data
    for key, value in (("name", turn.native[block.call].name), ("id", block.id)):
        if begun.get(key) != value:
            data = splice(data, (*path, key), value)
    return data


def _event(type: str, **fields: Any) -> Event:
    data = encode({"type": type, **fields})
    return Event(data, _sse.encode(data, type), type)


def _again(event: Event, data: bytes) -> Event:
    return Event(data, _sse.encode(data, event.type), event.type)
