"""Replies in OpenAI's chat.completions shape, until one is enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kimi_core.attempts.turn import AttemptStage, Call, Message, Text, Turn, made
from kimi_core.dialects.base import any_text, mappings, text
from kimi_core.document import Document, Path, Shape, decode, encode, splice
from kimi_core.sse import Event

_REASONING = ("reasoning_content", "reasoning")
_FIELDS = ("content", *_REASONING)
_DETAILS = "reasoning_details"
_USAGES: tuple[Path, ...] = (("usage",), ("choices", 0, "usage"), ("x_groq", "usage"))
_IDENTITY = ("id", "object", "created", "model")
_SHAPE = Shape("choices", "usage")
_OF_A_CALL = ("index", "id", "type", "function", "custom")


class _Chunk:
    """An event with a choice, and the calls of which it brings a piece."""

    __slots__ = ("calls", "choice", "delta", "event", "payload")

    def __init__(self, event: Event, payload: dict[str, Any]) -> None:
        self.event = event
        self.payload = payload
        choice = payload["choices"][0]
        self.choice: dict[str, Any] = choice if isinstance(choice, dict) else {}
        delta = self.choice.get("delta")
        self.delta: dict[str, Any] = delta if isinstance(delta, dict) else {}
        self.calls: list[tuple[Call, dict[str, Any]]] = []

    @property
    def finish_reason(self) -> str:
        return text(self.choice.get("finish_reason"))

    def without_delta(self) -> _Chunk:
        data = splice(self.event.data, ("choices", 0, "delta"), {})
        choice = {**self.choice, "delta": {}}
        return _Chunk(made(data, self.event.type), {**self.payload, "choices": [choice]})


class ChatAttempt(AttemptStage):
    """One of several replies of chat.completions that are one to the client."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self._calls: dict[str, Call] = {}
        self._latest: dict[str, str] = {}
        self._sent_calls = 0
        self._said: defaultdict[str, Text] = defaultdict(Text)
        self._details: list[dict[str, Any]] = []
        self._begun: set[str] = set()  # the fields of which the client has got something
        self._usage: dict[Path, Any] = {}
        self._held: list[_Chunk | Event] = []

    def _event(self, event: Event, payload: dict[str, Any]) -> Iterable[Event]:
        groq = payload.get("x_groq")
        if payload.get("error") or (isinstance(groq, dict) and groq.get("error")):
            self._left_alone = True
            return [*self._cut(), event]
        self._read_usage(payload)
        choices = payload.get("choices")
        if not isinstance(choices, list):
            return (event,)
        if not choices:
            if self._finish_reason or payload.get("usage"):
                self._held.append(event)
                return ()
            return () if self._continues else (event,)
        if not self._turn.identity:
            self._turn.identity = {key: payload[key] for key in _IDENTITY if key in payload}
        chunk = _Chunk(event, payload)
        self._read(chunk.delta, chunk)
        self._finish_reason = chunk.finish_reason or self._finish_reason
        if self._finish_reason:
            self._held.append(chunk)
            return ()
        return self._rendered(chunk)

    def _done(self, event: Event) -> Iterable[Event]:
        self._is_over = True
        self._held.append(event)
        return ()

    # -- what a reply says

    def _read_usage(self, payload: dict[str, Any]) -> None:
        for path in _USAGES:
            if isinstance(usage := _at(payload, path), dict):
                self._usage[path] = usage

    def _read(self, message: dict[str, Any], chunk: _Chunk | None = None) -> list[Call]:
        """Take a delta, or a whole message; return the calls it has a piece of."""
        calls: list[Call] = []
        for field in _FIELDS:
            if said := _text(message.get(field)):
                self._said[field].add(said)
        self._details += [detail for _, detail in mappings(message.get(_DETAILS))]
        for position, piece in mappings(message.get("tool_calls")):
            call = self._call(position if chunk is None else piece.get("index", position), piece)
            calls.append(call)
            if chunk is not None:
                chunk.calls.append((call, piece))
        if isinstance(old := message.get("function_call"), dict):
            self._call("function_call", {"function": old})
        return calls

    def _call(self, index: Any, piece: dict[str, Any]) -> Call:
        place, id_ = repr(index), text(piece.get("id"))
        key = self._latest.get(place, place)
        call = self._calls.get(key)
        if call is None or (id_ and call.id and id_ != call.id):
            # Gemini's OpenAI endpoint and others give each of several calls the index 0.
            key = self._latest[place] = f"{place} {len(self._calls)}"
            call = self._calls[key] = Call(self._turn)
        call.id = call.id or id_
        for holder, key in (("function", "arguments"), ("custom", "input")):
            if isinstance(function := piece.get(holder), dict):
                call.name = call.name or text(function.get("name"))
                call.add(any_text(function.get(key)))
        call.extra |= {key: value for key, value in piece.items() if key not in _OF_A_CALL}
        return call

    def _decide(self, finish_reason: str) -> str:
        """Settle whether the reply is enough; return the reason for its end, if so."""
        turn, calls = self._turn, list(self._calls.values())
        turn.decide(calls, finish_reason, not self._said["content"].is_blank)
        if turn.rejected:
            turn.history = self._history()
            for path, usage in self._usage.items():
                turn.usage[path] = turn.with_usage(path, usage)
            for field, said in list(self._said.items()):
                turn.said[field].add(turn.spaced(field, str(said)))
            return ""
        call = "function_call" if finish_reason == "function_call" else "tool_calls"
        return turn.finish_reason(calls, finish_reason, call=call, stop="stop")

    def _history(self) -> list[Message]:
        kept = self._turn.kept
        if self._said["content"].is_blank and not kept:
            return []
        # Thinking goes back in the field that it came in: others may be refused.
        field = next((name for name in _REASONING if not self._said[name].is_blank), "")
        content = None if self._said["content"].is_blank else str(self._said["content"])
        said: Message = {"role": "assistant", "content": content}
        if field:
            said[field] = str(self._said[field])
        if kept:
            if self._details:
                said[_DETAILS] = _joined(self._details)
            said["tool_calls"] = [_for_history(call) for call in kept]
        return [said]

    # -- streamed

    def _end(self) -> Iterable[Event]:
        held, self._held = self._held, []
        chunks = [one for one in held if isinstance(one, _Chunk)]
        reason = self._decide(self._finish_reason)
        if self._turn.rejected:
            # Not its end, but what else the last chunks say.
            return [event for one in chunks for event in self._rendered(one, None)]
        return self._finished(held, reason)

    def _finished(self, held: list[_Chunk | Event], reason: str) -> Iterator[Event]:
        answer = self._answer()
        for one in held:
            if isinstance(one, _Chunk):
                if answer and one.finish_reason:
                    yield from self._rendered(one, None)
                    yield from answer
                    answer, one = [], one.without_delta()
                yield from self._rendered(one, reason if one.finish_reason else "")
            elif one.data.strip() == b"[DONE]":
                yield from answer
                if reason and not self._finish_reason:
                    yield self._made({}, reason)
                yield one
            else:
                yield self._changed(one, decode(one.data), [])

    def _cut(self) -> Iterable[Event]:
        held, self._held = self._held, []
        out = self._answer()
        for one in held:
            out += self._rendered(one) if isinstance(one, _Chunk) else [one]
        return out

    def _rendered(self, chunk: _Chunk, reason: str | None = "") -> list[Event]:
        """Return a chunk as the client gets it, with `reason` for its end, unless that is ""."""
        delta = {**chunk.delta}
        if chunk.calls:
            delta["tool_calls"] = [p for one in chunk.calls for p in self._pieces(*one)]
            if not delta["tool_calls"]:
                del delta["tool_calls"]
        if self._continues:
            delta.pop("role", None)
            for field in _FIELDS:
                if delta.get(field):
                    delta[field] = self._spaced(field, delta[field])
        changed: list[tuple[Path, Any]] = []
        if delta != chunk.delta:
            changed.append((("choices", 0, "delta"), delta))
        said = chunk.choice.get("finish_reason")
        if reason != "" and reason != said:
            changed.append((("choices", 0, "finish_reason"), reason))
            said = reason
        if not any(delta.values()) and not said and (changed or self._continues):
            return []
        return [self._changed(chunk.event, chunk.payload, changed)]

    def _changed(
        self, event: Event, payload: dict[str, Any], changed: list[tuple[Path, Any]]
    ) -> Event:
        if self._continues:
            identity = self._turn.identity.items()
            changed += [((key,), value) for key, value in identity if payload.get(key) != value]
        for path in _USAGES if self._turn.usage else ():
            if isinstance(usage := _at(payload, path), dict):
                changed.append((path, self._turn.with_usage(path, usage)))
        data = event.data
        for path, value in changed:
            data = splice(data, path, value)
        return event if data == event.data else made(data, event.type)

    def _pieces(self, call: Call, piece: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the pieces of a call that are for the client, by its place among those."""
        call.waiting.append(piece)
        if not call.is_real:
            return []
        if call.number is None:
            call.number = self._sent_calls
            self._sent_calls += 1
        pieces, call.waiting = call.waiting, []
        return [one if "index" not in one else {**one, "index": call.number} for one in pieces]

    def _spaced(self, field: str, value: Any) -> Any:
        """Return a piece of text; the first of this attempt after a blank line."""
        said = _text(value)
        if field in self._begun or not said.strip():
            return value
        self._begun.add(field)
        spaced = self._turn.spaced(field, said)
        if isinstance(value, str) or spaced == said:
            return spaced if isinstance(value, str) else value
        return [*_part("\n\n"), *value]

    def _answer(self) -> list[Event]:
        """Return what the answer of `done` adds to the text."""
        said = self._turn.untold(list(self._calls.values()), str(self._said["content"]))
        return [self._made({"content": said})] if said else []

    def _made(self, delta: dict[str, Any], reason: str | None = None) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return made(encode({**self._turn.identity, "choices": [choice]}))

    # -- whole

    def _whole(self, event: Event, payload: dict[str, Any]) -> Iterable[Event]:
        message = _at(payload, ("choices", 0, "message"))
        self._left_alone = True  # whatever it is: nothing comes after it
        if payload.get("error") or not isinstance(message, dict):
            return (event,)
        self._read_usage(payload)
        calls = self._read(message)
        said = text(_at(payload, ("choices", 0, "finish_reason")))
        reason = self._decide(said)
        if self._turn.rejected:
            parts = mappings(message.get("content"))
            self._turn.parts += [part for _, part in parts if not text(part.get("text"))]
            return ()
        document = Document(event.data, _SHAPE)
        mended = self._message(message, calls)
        if mended != message:
            document.set(("choices", 0, "message"), mended)
        if reason != said:
            document.set(("choices", 0, "finish_reason"), reason)
        for path, usage in self._usage.items():
            if path in self._turn.usage:
                document.set(path, self._turn.with_usage(path, usage))
        data = document.encode()
        return (event,) if data is event.data else (Event(data, data, "body"),)

    def _message(self, message: dict[str, Any], calls: list[Call]) -> dict[str, Any]:
        """Return a whole message with what other attempts have said, and only real calls."""
        turn, mended = self._turn, {**message}
        if not all(call.is_real for call in calls):
            pieces = [piece for _, piece in mappings(message["tool_calls"])]
            real = [piece for call, piece in zip(calls, pieces, strict=True) if call.is_real]
            mended["tool_calls"] = real
            if not real:
                del mended["tool_calls"]
        for field in _FIELDS:
            value, said = message.get(field), str(self._said[field])
            after = turn.untold(calls, said) if field == "content" else ""
            before, spaced = str(turn.said[field]), turn.spaced(field, said)
            if field == "content" and turn.parts:
                value = [*turn.parts, *(value if isinstance(value, list) else _part(said))]
            if isinstance(value, list):
                lead = before + ("\n\n" if spaced != said else "")
                mended[field] = [*_part(lead), *value, *_part(after)]
            elif before or after:
                mended[field] = before + spaced + after
        return mended


def _at(payload: Any, path: Path) -> Any:
    for step in path:
        if isinstance(step, int):
            payload = payload[step] if isinstance(payload, list) and payload else None
        else:
            payload = payload.get(step) if isinstance(payload, dict) else None
    return payload


def _part(said: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": said}] if said else []


def _text(value: Any) -> str:
    """Return a content's text, be it a string or a list of parts."""
    if isinstance(value, list):
        return "".join(text(part.get("text")) for _, part in mappings(value))
    return text(value)


def _for_history(call: Call) -> Message:
    """Return a call as a message of the model's has it; arguments that are none are left out."""
    arguments = call.arguments if call.given else "{}"
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function, **call.extra}


def _joined(details: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return OpenRouter's reasoning_details with the pieces of each put together.

    It takes them back as they are in a whole reply only; pieces of one have the same index.
    """
    joined: list[dict[str, Any]] = []
    for detail in details:
        last = joined[-1] if joined else {}
        same = all(last.get(key) == detail.get(key) for key in ("type", "index"))
        if not (joined and same and "index" in detail):
            joined.append({**detail})
            continue
        for key, value in detail.items():
            both = isinstance(value, str) and isinstance(last.get(key), str)
            if both and key in ("text", "summary", "data"):
                last[key] += value
            elif value is not None:
                last[key] = value
    return joined
