"""The markup of Kimi K2 and its kin: K2-thinking, K2.5 to K2.7-Code, kimi-for-coding.

    section = <|tool_calls_section_begin|> call+ <|tool_calls_section_end|>
    call    = <|tool_call_begin|> [functions.]NAME:N <|tool_call_argument_begin|> JSON
              <|tool_call_end|>

and thinking in <think> tags, of which the opening one may stand in the prompt. After Kimi-K2's
docs/tool_call_guidance.md and chat templates, and what vLLM, SGLang and llama.cpp have to
cope with (read 2026-11-21).
"""

from __future__ import annotations

import re
from typing import Any, Literal

from kimi_core.document import NotJSON, decode
from kimi_core.markup.code import Code
from kimi_core.markup.json_text import MORE, NONE, ObjectEnd
from kimi_core.markup.scanner import HOLD_BYTES, Channel, Found, Markup, Scanner
from kimi_core.markup.tools import Tools

SECTION_BEGINS = (b"<|tool_calls_section_begin|>", b"<|tool_call_section_begin|>")
SECTION_ENDS = (b"<|tool_calls_section_end|>", b"<|tool_call_section_end|>")
CALL = b"<|tool_call_begin|>"
ARGUMENTS = b"<|tool_call_argument_begin|>"
CALL_END = b"<|tool_call_end|>"
END = b"<|im_end|>"
THINK_BEGINS = (b"<think>", b"<thinking>")
THINK_ENDS = (b"</think>", b"</thinking>")

_OF_CALLS = Markup(*SECTION_BEGINS, *SECTION_ENDS, CALL, ARGUMENTS, CALL_END)
_ALL = Markup(*_OF_CALLS.tokens, END, *THINK_BEGINS, *THINK_ENDS)
_TERMINATORS = Markup(CALL, CALL_END, *SECTION_BEGINS, *SECTION_ENDS)

_SPACE = re.compile(rb"\s*+")
_ENDS = re.compile(rb"(?:\s|<\|im_end\|>)*+")
# A closing bracket too many is the commonest slip after arguments.
_SURPLUS = re.compile(rb"[\s}\]]*+")
_PLAUSIBLE = re.compile(rb'\s*+[^\s<>{}"]{0,256}+(?:\s*+:)?+\s*+\d*+\s*+')
# The marker between header and arguments was left out.
_BRACED = re.compile(rb"\s*+([^\s<>{}\"]{1,256}?:\d+)\s*+(?=\{)")

_LONGEST_HEADER = 512

Mode = Literal["text", "section", "attempt", "header", "arguments", "after"]


class K2(Scanner):
    name = "kimi-k2"

    def __init__(self, tools: Tools, *, undecided: bool = False) -> None:
        super().__init__(tools, undecided=undecided)
        self._mode: Mode = "text"
        self._opened = False  # a block of thinking was, by a tag that no other has closed
        self._last_dropped = b""
        # A call in code counts only if it is well formed and its tool is declared: until then its
        # text stays in the buffer, from here to there, and may be text after all.
        self._trial: tuple[int, int] | None = None
        self._taken = b""  # what of the call's markup is no longer in the buffer
        self._begin = 0  # of the header
        self._from: Channel = "content"
        self._header = b""
        self._start = 0  # of the arguments
        self._object: ObjectEnd | None = None
        self._arguments = b""
        self._raw: int | None = None  # the arguments are no JSON, and were searched up to there
        self._seen = 0  # how far a search that waits has come
        self._line_seen = 0  # and one for the end of a code span

    @property
    def _engaged(self) -> bool:
        return self._mode != "text" and self._trial is None

    def _reads(self, text: bytes) -> bool:
        # It may end with a header whose begin marker was left out.
        return self.tools.header_begins_at(text, len(text), self._last) < len(text)

    def _run(self, final: bool) -> None:
        going = True
        while going:
            match self._mode:
                case "text":
                    going = self._read_text(final)
                case "section":
                    going = self._read_section(final)
                case "attempt":
                    going = self._read_attempt(final)
                case "header":
                    going = self._read_header(final)
                case "arguments":
                    going = self._read_arguments(final)
                case "after":
                    going = self._read_after(final)

    # -- outside of markup

    def _read_text(self, final: bool) -> bool:
        buffer = self._buffer
        while (found := _ALL.search(buffer, self._at)) is not None:
            start, end = found.span()
            token = bytes(buffer[start:end])
            in_code = self._in_code(start, end, final)
            if in_code is None:
                return False
            if token == END:
                if not self._pass_end(start, end, in_code, final):
                    return False
            elif in_code:
                if token in (CALL, ARGUMENTS, *SECTION_BEGINS) and self._try(start, end, token):
                    return True
                self._at = end
            elif token in THINK_BEGINS:
                self._begin_thinking(start, token)
            elif token in THINK_ENDS:
                self._end_thinking(start, token)
            elif token == ARGUMENTS and (at := self._header_at(start)) >= 0:
                self._enter(at, 0, "arguments")
                self._header = bytes(buffer[: start - at])
                self._begin_arguments(end - at)
                return True
            elif token == CALL:
                self._enter(start, len(token), "header")
                return True
            elif token in SECTION_BEGINS:
                self._section = True
                self._enter(start, len(token), "section")
                return True
            else:
                self._enter(start, len(token), "text")
                self.changed("marker", token)
        end = len(buffer) if final else self._tail()
        if self._undecided and not final and end <= HOLD_BYTES:
            self._at = max(self._at, end)
            return False
        self._undecided = False
        self._release(end)
        self._at = 0
        return False

    def _tail(self) -> int:
        """Return where something begins that may become markup."""
        buffer = self._buffer
        end = _ALL.tail(buffer, self._at)
        if ARGUMENTS.startswith(bytes(buffer[end:])):
            end = self.tools.header_begins_at(buffer, end, self._last)
        return end

    def _header_at(self, end: int) -> int:
        return self.tools.header_at(self._buffer, end, self._last)

    def _enter(self, start: int, length: int, mode: Mode) -> None:
        """Pass on what stands before a marker, take it out, and go into `mode`."""
        self._release(start)
        self._from = self._channel
        self._taken = bytes(self._buffer[:length])
        self._remove(length)
        self._interrupt_thinking()
        self.changes += 1
        self._begin = 0
        self._mode = mode

    def _interrupt_thinking(self) -> None:
        """A tool marker ends thinking; it has gone on if the tag that closes it still comes."""
        self._undecided = self._opened
        self._thinking = False

    def _begin_thinking(self, start: int, tag: bytes) -> None:
        self._undecided = False
        self._take_tag(start, tag)
        if self._channel == "content":
            self._thinking = self._opened = True

    def _end_thinking(self, start: int, tag: bytes) -> None:
        if self._undecided and start <= HOLD_BYTES:
            self._thinking = True  # the tag that opened it stood in the prompt
        self._undecided = False
        self._take_tag(start, tag)
        self._thinking = self._opened = False

    def _take_tag(self, start: int, tag: bytes) -> None:
        self._release(start)
        self._remove(len(tag))
        self._code[self._channel] = Code()  # thinking and what is said are texts of their own
        self.changed("thinking", tag)

    def _pass_end(self, start: int, end: int, in_code: bool, final: bool) -> bool:
        """Take out the end of the turn; return False when it must wait for what follows."""
        if not self._undecided:
            self._release(start)
            start, end = 0, end - start
        found = _ENDS.match(self._buffer, max(end, start + self._seen))
        after = found.end() if found else end
        rest = bytes(self._buffer[after : after + 40])
        if not final and _ALL.could_begin(rest):
            self._at, self._seen = start, after - start
            return False
        self._seen = 0
        if rest and (in_code or not _ALL.match(self._buffer, after)):
            self._at = after  # words follow: the model speaks of it
            return True
        blank = bytes(self._buffer[start:after]).replace(END, b"")
        self._buffer[start:after] = blank
        self.changed("marker", END)
        self._at = start + len(blank)
        return True

    # -- in code

    def _in_code(self, start: int, end: int, final: bool) -> bool | None:
        """Tell whether a marker stands in code; None when it must wait for what follows."""
        if not self._inside_code(start):
            return False
        code = self._code[self._channel]
        at = code.span_end(self._buffer, max(end, start + self._line_seen), final)
        if at < 0:
            self._line_seen = 0
            return code.inside()
        self._at, self._line_seen = start, at - start
        return None

    def _try(self, start: int, end: int, token: bytes) -> bool:
        """See whether a marker in code begins a call that counts."""
        self._from = self._channel
        self._taken = b""
        self._seen = 0
        if token == ARGUMENTS:
            header = self._header_at(start)
            if header < 0:
                return False
            self._trial = header, end
            self._header = bytes(self._buffer[header:start])
            self._begin_arguments(end)
            return True
        self._trial = start, end
        self._begin = end
        self._mode = "header" if token == CALL else "attempt"
        return True

    def _read_attempt(self, final: bool) -> bool:
        """A section begins in code: a call must follow at once."""
        at = _skip_space(self._buffer, max(self._begin, self._seen))
        if self._buffer.startswith(CALL, at):
            self._begin, self._seen = at + len(CALL), 0
            self._mode = "header"
            return True
        if not final and CALL.startswith(bytes(self._buffer[at : at + len(CALL)])):
            self._seen = at
            return False
        return self._revert()

    def _revert(self) -> bool:
        """It was text: go on behind its first marker."""
        assert self._trial is not None
        self._at = self._trial[1]
        self._trial = None
        self._seen = 0
        self._mode = "text"
        return True

    # -- in a section, between calls

    def _read_section(self, final: bool) -> bool:
        found = _OF_CALLS.search(self._buffer)
        if found is None:
            self._drop(_OF_CALLS.tail(self._buffer))
            if final:
                self._remove(len(self._buffer))  # a marker that was cut
            return False
        start, end = found.span()
        token = bytes(self._buffer[start:end])
        self._drop(start)
        near, self._last_dropped = self._last_dropped, b""
        header = self.tools.header_at(near, len(near)) if token == ARGUMENTS else -1
        self._remove(end - start)
        if token == CALL:
            self._from = self._channel
            self._taken = CALL
            self._begin = 0
            self._mode = "header"
        elif header >= 0:
            self._from = self._channel
            self._header = near[header:]
            self._taken = self._header + ARGUMENTS
            self._begin_arguments(0)
        elif token in SECTION_ENDS:
            self._section = False
            self._dropped.clear()
            self._mode = "text"
            self._again()
        return True

    def _drop(self, length: int) -> None:
        if length:
            text = bytes(self._buffer[:length])
            self._dropped.append(text)
            self._last_dropped = (self._last_dropped + text)[-200:]
            self._remove(length)

    # -- in a call

    def _read_header(self, final: bool) -> bool:
        buffer = self._buffer
        found = _OF_CALLS.search(buffer, max(self._begin, self._seen))
        if found is not None:
            end = found.start()
        else:
            end = len(buffer) if final else _OF_CALLS.tail(buffer, self._begin)
        said = bytes(buffer[self._begin : min(end, self._begin + _LONGEST_HEADER)])
        braced = _BRACED.match(said)
        if braced and self.tools.declares(braced[1].decode("utf-8", "replace")):
            self._header = braced[1]
            return self._begin_arguments(self._begin + braced.end())
        plausible = self._begin + len(said) == end and _PLAUSIBLE.fullmatch(said) is not None
        if plausible and found is not None and found[0] == ARGUMENTS:
            self._header = said.strip()
            if self._trial and not self.tools.declares(self._header.decode("utf-8", "replace")):
                return self._revert()
            return self._begin_arguments(found.end())
        if plausible and found is None and not final:
            self._seen = end
            return False
        self._seen = 0
        if self._trial:
            return self._revert()
        if plausible:
            # Without arguments it is no call; the marker that follows may begin the next one.
            self.changed("dropped", CALL + said)
            self._remove(end)
        else:
            self.changed("marker", CALL)  # somebody speaks of it
        self._leave()
        return True

    def _begin_arguments(self, start: int) -> bool:
        self._start = self._seen = start
        self._object = self._raw = None
        self._mode = "arguments"
        return True

    def _read_arguments(self, final: bool) -> bool:
        """JSON if it is an object, else what stands before the next marker outside of JSON."""
        if self._raw is not None:
            return self._read_raw(final)
        buffer = self._buffer
        if self._object is None:
            at = self._seen = _skip_space(buffer, self._seen)
            if at == len(buffer) and not final:
                return False
            if buffer.startswith((b"{", b"[", b'"'), at):
                self._start, self._object = at, ObjectEnd(at)
        searched = self._start
        if self._object is not None:
            end = self._object.find(buffer)
            if end == MORE and not final:
                return False
            text = bytes(buffer[self._start : end]) if end not in (MORE, NONE) else b""
            value = _value(text)
            if isinstance(value, dict):
                return self._end_arguments(text, end)
            if value is not None:
                searched = end
        if self._trial:
            return self._revert()
        self._raw = searched
        return self._read_raw(final)

    def _read_raw(self, final: bool) -> bool:
        buffer = self._buffer
        found = _TERMINATORS.search(buffer, self._raw or 0)
        if found is not None:
            text = bytes(buffer[self._start : found.start()]).strip()
            return self._end_arguments(text or b"{}", found.start())
        if not final:
            self._raw = _TERMINATORS.tail(buffer, self._raw or 0)
            return False
        text = _without_ends(bytes(buffer[self._start :]))
        broken = _ALL.tail(text)
        if len(text) - broken > 1:
            text = text[:broken]
        text = text.strip()
        if not text and self._cut:
            self.changed("dropped", CALL + self._header + ARGUMENTS)
            self._remove(len(buffer))
            self._leave()
            return True
        return self._end_arguments(text or b"{}", len(buffer))

    def _end_arguments(self, text: bytes, end: int) -> bool:
        self._arguments, self._start, self._seen = text, end, end
        self._mode = "after"
        return True

    def _read_after(self, final: bool) -> bool:
        buffer = self._buffer
        found = _SURPLUS.match(buffer, self._seen)
        at = self._seen = found.end() if found else self._seen
        following = bytes(buffer[at : at + 40])
        if not final and _OF_CALLS.could_begin(following):
            return False
        if following.startswith(CALL_END):
            end = at + len(CALL_END)
        elif following.startswith((CALL, *SECTION_ENDS)):
            end = at
        elif self._trial:
            return self._revert()
        elif len(following) > 1 and _OF_CALLS.could_begin(following):
            end = len(buffer)  # a marker that was cut
        else:
            surplus = bytes(buffer[self._start : at])
            end = self._start + len(surplus.rstrip())
        self._complete(end)
        return True

    def _complete(self, end: int) -> None:
        if self._trial:
            start, _ = self._trial
            in_section = self._buffer.startswith(SECTION_BEGINS, start)
            self._section = self._section or in_section
            self._trial = None
            self._release(start)
            self._interrupt_thinking()
            end -= start
        header = self._header.decode("utf-8", "replace").strip()
        arguments = self._arguments.decode("utf-8", "surrogatepass")
        name = self.tools.name(header, arguments)
        leaked = self._taken + bytes(self._buffer[:end])
        self._remove(end)
        if name:
            self.calls.append(Found(header, name, arguments, self._from))
            self.changed("tool_call", leaked, f"{name}({arguments})")
        else:
            self.changed("dropped", leaked)
        self._leave()

    def _leave(self) -> None:
        """The call is over: back to its section, or to text."""
        self._seen = 0
        self._last_dropped = b""
        self._mode = "section" if self._section else "text"
        if not self._section:
            self._again()


def _skip_space(text: bytearray, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _value(text: bytes) -> Any:
    """Return the value of JSON text, None when it is not."""
    try:
        return decode(text)
    except NotJSON:
        return None


def _without_ends(text: bytes) -> bytes:
    """Return a text without the ends of the turn that stand at its end."""
    at = text.find(END)
    while at >= 0:
        found = _ENDS.match(text, at)
        after = found.end() if found else at
        if after == len(text):
            return text[:at]
        at = text.find(END, after)
    return text
