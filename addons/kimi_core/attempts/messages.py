"""Replies in the shape of Anthropic's messages, until one is enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kimi_core.attempts.turn import AttemptStage, Call, Message, Text, Turn, made
from kimi_core.dialects.base import json_text, mappings, text
from kimi_core.document import Document, NotJSON, Path, Shape, decode, encode, splice
from kimi_core.sse import Event

_USAGE: Path = ("usage",)
# message_delta may leave them out, but what rejected replies took is nowhere else to be read.
_INPUTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
_SHAPE = Shape("stop_reason", "usage", arrays=("content",))


class _Block:
    """A content block as far as it has come; `call` when it is one of the model's."""

    __slots__ = ("call", "citations", "content", "number", "said")

    def __init__(self, content: dict[str, Any], turn: Turn) -> None:
        self.content = content
        self.number: int | None = None
        """Its place among the blocks that the client gets."""
        self.said: defaultdict[str, Text] = defaultdict(Text)
        self.citations: list[Any] = []
        self.call: Call | None = None
        if content.get("type") == "tool_use":
            self.call = Call(turn, text(content.get("name")), text(content.get("id")))
            if given := content.get("input"):  # in a stream it comes later, in pieces
                self.call.add(json_text(given))
        for key in ("text", "thinking", "signature"):
            if first := text(content.get(key)):
                self.said[key].add(first)

    @property
    def text(self) -> str:
        return str(self.said["text"]) if self.content.get("type") == "text" else ""

    @property
    def is_for_client(self) -> bool:
        return self.call is None or self.call.is_real

    def add(self, delta: dict[str, Any]) -> None:
        if self.call is not None:
            self.call.add(text(delta.get("partial_json")))
        for key in ("text", "thinking", "signature", "partial_json"):
            if piece := text(delta.get(key)):
                self.said[key].add(piece)
        if delta.get("citation"):
            self.citations.append(delta["citation"])

    def for_history(self, kept: Sequence[Call]) -> list[dict[str, Any]]:
        """Return it as the model has to get it again: with the signatures of its thinking."""
        said = {key: value for key, value in self.content.items() if value is not None}
        type_ = said.get("type")
        if self.call is not None:
            input_ = self.call.given or {}
            return [{**said, "id": self.call.id, "input": input_}] if self.call in kept else []
        if type_ == "text":
            cited = {"citations": self.citations} if self.citations else {}
            # Anthropic: "text content blocks must contain non-whitespace text"
            return [{**said, "text": self.text, **cited}] if self.text.strip() else []
        if type_ == "thinking":
            return [said | {key: str(self.said[key]) for key in ("thinking", "signature")}]
        if pieces := str(self.said["partial_json"]):  # a call that the provider itself answers
            return [{**said, "input": _object(pieces)}]
        return [said]


class MessagesAttempt(AttemptStage):
    """One of several replies of Anthropic's messages that are one to the client."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self._blocks: dict[str, _Block] = {}
        self._begun = False  # the client has got some of this attempt's text
        self._usage: dict[str, Any] = {}
        self._held: list[tuple[Event, dict[str, Any]]] = []

    def _event(self, event: Event, payload: dict[str, Any]) -> Iterable[Event]:
        type_ = text(payload.get("type"))
        if type_ == "error" or payload.get("error"):
            self._left_alone = True
            return [*self._cut(), event]
        if type_ == "message_start":
            message = payload.get("message")
            self._read_usage(message if isinstance(message, dict) else {})
            return () if self._continues else (event,)
        if type_ in ("message_delta", "message_stop"):
            self._read_usage(payload)
            delta = payload.get("delta")
            if isinstance(delta, dict):
                self._finish_reason = text(delta.get("stop_reason")) or self._finish_reason
            self._is_over = self._is_over or type_ == "message_stop"
            self._held.append((event, payload))
            return ()
        if type_.startswith("content_block_"):
            return self._block(event, payload, type_)
        return (event,)

    def _block(self, event: Event, payload: dict[str, Any], type_: str) -> Iterable[Event]:
        index = repr(payload.get("index"))
        delta, content = payload.get("delta"), payload.get("content_block")
        if type_ == "content_block_start" and isinstance(content, dict):
            self._blocks[index] = block = _Block(content, self._turn)
            if block.is_for_client:
                block.number = self._turn.blocks
                self._turn.blocks += 1
        found = self._blocks.get(index)
        if found is None:
            return (event,)
        if isinstance(delta, dict):
            found.add(delta)
        if found.number is None:
            return ()
        data = event.data
        if payload.get("index") != found.number:
            data = splice(data, ("index",), found.number)
        if isinstance(delta, dict) and text(delta.get("text")).strip() and not self._begun:
            self._begun = True
            if (spaced := self._turn.spaced("content", delta["text"])) != delta["text"]:
                data = splice(data, ("delta", "text"), spaced)
        return (event,) if data is event.data else (made(data, event.type),)

    # -- what a reply says

    def _read_usage(self, holder: dict[str, Any]) -> None:
        if isinstance(usage := holder.get("usage"), dict):
            # "The token counts shown in the usage field of the message_delta event are
            # cumulative." -- https://docs.anthropic.com/en/api/messages-streaming
            self._usage |= {key: value for key, value in usage.items() if value is not None}

    def _calls(self) -> list[Call]:
        return [block.call for block in self._blocks.values() if block.call is not None]

    def _text(self) -> str:
        return "".join(block.text for block in self._blocks.values())

    def _decide(self, stop_reason: str) -> str:
        """Settle whether the reply is enough; return the reason for its end, if so."""
        turn, calls, said = self._turn, self._calls(), self._text()
        turn.decide(calls, stop_reason, bool(said.strip()))
        if turn.rejected:
            turn.history = self._history(said)
            turn.usage[_USAGE] = turn.with_usage(_USAGE, self._usage)
            turn.said["content"].add(turn.spaced("content", said))
            return ""
        return turn.finish_reason(calls, stop_reason, call="tool_use", stop="end_turn")

    def _history(self, said: str) -> list[Message]:
        kept = self._turn.kept
        if not said.strip() and not kept:
            return []
        content = [one for block in self._blocks.values() for one in block.for_history(kept)]
        return [{"role": "assistant", "content": content}]

    # -- streamed

    def _end(self) -> Iterable[Event]:
        held, self._held = self._held, []
        reason = self._decide(self._finish_reason)
        return () if self._turn.rejected else self._finished(held, reason)

    def _finished(
        self, held: Sequence[tuple[Event, dict[str, Any]]], reason: str
    ) -> Iterator[Event]:
        yield from self._answer()
        for event, payload in held:
            data, delta = event.data, payload.get("delta")
            if isinstance(delta, dict) and delta.get("stop_reason") not in (None, reason):
                data = splice(data, ("delta", "stop_reason"), reason)
            if self._turn.usage and isinstance(usage := payload.get("usage"), dict):
                total = self._turn.with_usage(_USAGE, self._usage)
                told = {key: total[key] for key in (*usage, *_INPUTS) if key in total}
                data = splice(data, _USAGE, usage | told)
            yield event if data is event.data else made(data, event.type)

    def _cut(self) -> Iterable[Event]:
        held, self._held = self._held, []
        return [*self._answer(), *(event for event, _ in held)]

    def _answer(self) -> Iterator[Event]:
        """Yield the answer of `done` as a block of its own, if it adds to the text."""
        said = self._turn.untold(self._calls(), self._text())
        if not said:
            return
        for type_, more in (
            ("content_block_start", {"content_block": {"type": "text", "text": ""}}),
            ("content_block_delta", {"delta": {"type": "text_delta", "text": said}}),
            ("content_block_stop", {}),
        ):
            yield made(encode({"type": type_, "index": self._turn.blocks, **more}), type_)

    # -- whole

    def _whole(self, event: Event, payload: dict[str, Any]) -> Iterable[Event]:
        content = payload.get("content")
        self._left_alone = True  # whatever it is: nothing comes after it
        if not isinstance(content, list):
            return (event,)
        self._read_usage(payload)
        for index, block in mappings(content):
            self._blocks[repr(index)] = _Block(block, self._turn)
        said = text(payload.get("stop_reason"))
        turn, document = self._turn, Document(event.data, _SHAPE)
        blocks = self._whole_blocks(document)
        reason = self._decide(said)
        if turn.rejected:
            turn.whole_blocks += blocks
            return ()
        if answer := turn.untold(self._calls(), self._text()):
            blocks.append(encode({"type": "text", "text": answer}))
        if turn.whole_blocks or answer or len(blocks) < len(content):
            document.set_raw(("content",), b"[" + b",".join([*turn.whole_blocks, *blocks]) + b"]")
        if reason != said:
            document.set(("stop_reason",), reason)
        if turn.usage and isinstance(payload.get("usage"), dict):
            document.set(_USAGE, turn.with_usage(_USAGE, payload["usage"]))
        data = document.encode()
        return (event,) if data is event.data else (Event(data, data, "body"),)

    def _whole_blocks(self, document: Document) -> list[bytes]:
        """Return the blocks that are for the client, as JSON text."""
        kept: list[bytes] = []
        begun = False
        for index, raw in enumerate(document.elements("content")):
            block = self._blocks.get(repr(index))
            data = bytes(raw)
            if block is not None and block.text.strip() and not begun:
                begun = True
                if (spaced := self._turn.spaced("content", block.text)) != block.text:
                    data = splice(data, ("text",), spaced)
            if block is None or block.is_for_client:
                kept.append(data)
        return kept


def _object(pieces: str) -> dict[str, Any]:
    try:
        value = decode(pieces.encode("utf-8", "surrogatepass"))
    except NotJSON:
        return {}
    return value if isinstance(value, dict) else {}
