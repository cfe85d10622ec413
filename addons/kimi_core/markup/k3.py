"""The markup of Kimi K3, which has tags of its own:

    turn     = think response [tools] <|close|>message<|sep|> <|end_of_msg|>
    tools    = <|open|>tools<|sep|> call+ <|close|>tools<|sep|>
    call     = <|open|>call tool="NAME" index="1"<|sep|> (argument* | json) <|close|>call<|sep|>
    argument = <|open|>argument key="KEY" type="string"<|sep|> VALUE <|close|>argument<|sep|>
    json     = <|open|>json type="object"<|sep|> JSON <|close|>json<|sep|>

with `<|open|>think<|sep|> … <|close|>think<|sep|>` around thinking and the same for `response`;
the first tag may stand in the prompt. The VALUE of a string is raw text, others are JSON.
After what the parsers of vLLM, SGLang and TensorRT-LLM say of the checkpoint's encoding_k3.py
(read 2026-11-21). Seen besides: blanks inside of a tag where a detokenizer put them (vLLM
#50367), a closing tag that lost its `<|sep|>` (SGLang #32567), and `<|open|>toolscall tool=` or
`<|close|>toolsmessage` where the tokens between two tags were lost (oh-my-pi #8495).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NoReturn

from kimi_core.exchange import MendKind
from kimi_core.markup.code import Code
from kimi_core.markup.json_text import MORE, NONE, ObjectEnd
from kimi_core.markup.scanner import HOLD_BYTES, Channel, Found, Markup, Scanner
from kimi_core.markup.tools import PREFIX, Tools

OPEN = b"<|open|>"
CLOSE = b"<|close|>"
SEP = b"<|sep|>"
END = b"<|end_of_msg|>"
ARGUMENT_END = CLOSE + b"argument" + SEP
MAX_TAG = 1024
"""What has not become a tag after so many bytes is text."""

_TOKENS = Markup(OPEN, CLOSE, END)
_TOKEN_TEXTS = [token.decode() for token in _TOKENS.tokens]
_NEAR = 64
"""How many bytes may stand between a tag and the next for the one to be told by the other."""

_SPACE = re.compile(rb"\s*+")
_LEFT = re.compile(rb"(?:<\|close\|>argument|argument<\|sep\|>)\Z")  # of its closing tag
_NUMBER = re.compile(r"[0-9]{1,9}")
_ENTITY = re.compile(r"&(?:quot|amp|lt|gt);")
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}

_BARE = ("think", "response", "tools")
_WITH_ATTRIBUTES = ("toolscall", "call", "argument", "json", "message")
_CLOSED = (*_BARE, "call", "json", "toolstoolsmessage", "toolsmessage", "message")
_NAME = r"[\w:.-]{1,64}+"
_VALUE = r'"[^"<]*+(?:<(?!\|)[^"<]*+)*+'
_ATTRIBUTE = rf'\s++(?P<name>{_NAME})\s*+=\s*+(?P<value>{_VALUE})"'
_ATTRIBUTES = rf'(?:\s++{_NAME}\s*+=\s*+{_VALUE}")*+'
_BLANK = r"\s{0,8}+"


def _one_of(words: Iterable[str]) -> str:
    return "(?:" + "|".join(map(re.escape, words)) + ")"


def _beginnings(*words: str) -> str:
    """Return a pattern for all that the words begin with, nothing and they themselves included."""
    return _one_of({word[:end]: None for word in words for end in range(len(word), -1, -1)})


def _beginning(name: str) -> re.Pattern[bytes]:
    """Return a pattern for what a tag may begin with, where `name` is that of an attribute."""
    opened = "|".join(
        (
            _beginnings(*_BARE, *_WITH_ATTRIBUTES),
            rf"{_one_of(_BARE)}{_BLANK}{_beginnings('<|sep|>')}",
            rf"{_one_of(_WITH_ATTRIBUTES)}{_ATTRIBUTES}\s*+{_beginnings('<|sep|>')}",
            rf"{_one_of(_WITH_ATTRIBUTES)}{_ATTRIBUTES}\s++{name}",
            rf"{_one_of(_WITH_ATTRIBUTES)}{_ATTRIBUTES}\s++{_NAME}\s*+=\s*+(?:{_VALUE})?",
        )
    )
    closed = "|".join(
        (
            _beginnings(*_CLOSED, "argument"),
            rf"argument{_BLANK}{_beginnings('<|sep|>')}",
            rf"{_one_of(_CLOSED)}{_BLANK}{_beginnings('<|sep|>', *_TOKEN_TEXTS)}",
        )
    )
    tag = rf"<\|open\|>{_BLANK}(?:{opened})|<\|close\|>{_BLANK}(?:{closed})"
    return re.compile(tag.encode())


_TAG = re.compile(
    (
        rf"<\|open\|>{_BLANK}(?P<opened>{'|'.join(_WITH_ATTRIBUTES)})"
        rf"(?P<attributes>{_ATTRIBUTES})\s*+<\|sep\|>"
        rf"|<\|open\|>{_BLANK}(?P<bare>{'|'.join(_BARE)}){_BLANK}<\|sep\|>"
        # One that lost its last token is known by the next tag. The text of a string is more
        # likely to hold it than an argument is to end so.
        rf"|<\|close\|>{_BLANK}(?P<closed>argument(?={_BLANK}<\|sep\|>)|{'|'.join(_CLOSED)})"
        rf"{_BLANK}(?:<\|sep\|>|(?={_one_of(_TOKEN_TEXTS)}))"
    ).encode()
)
_ATTRIBUTE_OF = re.compile(_ATTRIBUTE.encode())
_BEGUN = _beginning(rf"{_NAME}\s*+")
_CUT_OFF = _beginning(_beginnings("tool", "index", "key", "type", "role"))  # no other words

_CALLS = ("call", "toolscall")
_BEGIN_CALLS = (*_CALLS, "tools")
_OUTSIDE = (*_BEGIN_CALLS, "message")  # where one of these opens or closes, no call goes on

Mode = Literal["text", "attempt", "section", "call", "value"]


@dataclass(frozen=True, slots=True)
class Tag:
    name: str
    opens: bool
    attributes: dict[str, str]
    end: int


class K3(Scanner):
    """Finds calls whose ids are `functions.NAME:N`, as K2 has them, N being the call's index.

    The markup itself has no ids, and hosts give K3's calls ids of many forms. The index begins
    with 1 in each reply, so the same id may stand earlier in the conversation.

    A string ends with the first `<|close|>argument<|sep|>`, whatever it held before. If another
    argument begins before that, or none comes, it ends where its call does. A key that comes
    twice means the last value, as in JSON. A call that the limit on the length cut off has the
    arguments that came, as text that is no JSON; without any it is dropped.
    """

    name = "kimi-k3"

    def __init__(self, tools: Tools, *, undecided: bool = False) -> None:
        super().__init__(tools, undecided=undecided)
        self._mode: Mode = "text"
        self._opened = False  # a block of thinking, which a call may have interrupted
        self._responding = False
        self._quoted: Counter[str] = Counter()  # what was opened in code, and is text
        # A call in code counts only if it is well formed and its tool is declared: until then its
        # text stays in the buffer, from here to there, and may be text after all.
        self._trial: tuple[int, int] | None = None
        self._from: Channel = "content"
        self._begin = 0  # of the call
        self._call = Tag("call", True, {}, 0)
        self._members: dict[str, str] = {}
        self._json: str | None = None
        self._stray: list[bytes] = []  # what stands in the call outside of its arguments
        self._after = 0  # the last tag of the call
        self._seen = 0  # how far a search that waits has come
        self._value = self._call
        self._start = 0  # of the value
        self._typed = False  # the value is JSON
        self._looked = True  # and has been skipped as such
        self._object: ObjectEnd | None = None
        self._outside = -1  # where something stands that ends a call

    @property
    def _engaged(self) -> bool:
        return self._mode != "text" and self._trial is None

    def _reads(self, text: bytes) -> bool:
        return self._responding and self._channel == "reasoning"  # `_emit` moves it

    def _run(self, final: bool) -> None:
        going = True
        while going:
            match self._mode:
                case "text":
                    going = self._read_text(final)
                case "attempt":
                    going = self._read_attempt(final)
                case "section":
                    going = self._read_section(final)
                case "call":
                    going = self._read_call(final)
                case "value":
                    going = self._read_value(final)

    def _switch(self, channel: Channel) -> None:
        super()._switch(channel)
        if not self._engaged:
            self._responding = False

    def _emit(self, channel: Channel, text: bytes) -> None:
        # A host that takes the whole turn for thinking has the response in there too.
        if channel == "reasoning" and self._responding and not self._thinking:
            self.changes += 1
            channel = "content"
        super()._emit(channel, text)

    # -- outside of calls

    def _read_text(self, final: bool) -> bool:
        buffer = self._buffer
        end = -1
        while (found := _TOKENS.search(buffer, self._at)) is not None:
            start = found.start()
            tag = _tag(buffer, start)
            begun = tag is None and _begun(buffer, start, final)
            if begun and not final:
                end = start
                break
            if begun and not self._inside_code(start):
                self._take_out(start, len(buffer))  # its end was cut off
                break
            if tag is None and found[0] != END:
                self._at = found.end()  # it only looks like one
                continue
            after = tag.end if tag else found.end()
            in_code = self._in_code(start, after, final)
            if in_code and tag and self._try(start, tag):
                return True
            counts = None if in_code is None else self._counts(tag, after, in_code, final)
            if counts is None:
                end = start
                break
            if not counts:  # somebody speaks of it
                self._at = after
            elif tag is None:
                self._take_out(start, after)
            elif self._obey(start, tag):
                return True
        if end < 0:
            end = len(buffer) if final else _TOKENS.tail(buffer, self._at)
        if self._undecided and not final and end <= HOLD_BYTES:
            self._at = max(self._at, end)
            return False
        self._undecided = False
        self._release(end)
        self._at = 0
        return False

    def _counts(self, tag: Tag | None, after: int, in_code: bool, final: bool) -> bool | None:
        """Tell whether a tag, or the end of the turn, is meant; None if what follows decides."""
        if tag is None:
            return self._ends(after, final, or_markup=not in_code)
        if not in_code:
            return True
        if tag.opens:
            self._quoted[tag.name] += 1
            return False
        if self._quoted[tag.name]:
            self._quoted[tag.name] -= 1
            return False
        # What ends a block ends code in it that was left open, unless it is shown in code.
        thinks = tag.name == "think" and (self._undecided or self._thinking)
        if thinks or (tag.name == "response" and self._responding):
            return self._ends(after, final)
        return False

    def _obey(self, start: int, tag: Tag) -> bool:
        """Do what a tag says; tell whether what follows is no longer text."""
        if tag.opens and tag.name in _BEGIN_CALLS:
            self._release(start)
            self._interrupt()
            self.changes += 1
            if tag.name == "tools":
                self._remove(tag.end - start)
                self._section = True
                self._mode = "section"
            else:
                self._begin_call(0, tag, tag.end - start)
            return True
        # The tag that opened the thinking may have stood in the prompt. Nothing but thinking
        # stands before a response, even if the tag between the two was left out.
        if self._undecided and start <= HOLD_BYTES:
            self._thinking = (tag.name, tag.opens) in (("think", False), ("response", True))
        self._take_out(start, tag.end, "thinking" if tag.name == "think" else "marker")
        if tag.name in ("think", "response"):
            self._responding = False
            self._thinking = tag.name == "think" and tag.opens and self._channel == "content"
            self._opened = self._thinking
            self._end_of_leading("reasoning")
            self._responding = tag.name == "response" and tag.opens
            self._code[self._channel] = Code()  # thinking and what is said are texts of their own
            self._quoted.clear()
        elif tag.name in _OUTSIDE:
            self._thinking = self._opened = self._responding = False
        return False

    def _interrupt(self) -> None:
        """A call ends thinking; it has gone on if the tag that closes it still comes."""
        self._undecided = self._opened
        self._thinking = self._responding = False

    def _take_out(self, start: int, end: int, kind: MendKind = "marker") -> None:
        self._undecided = False
        leaked = bytes(self._buffer[start:end])
        self._release(start)
        self._remove(end - start)
        self.changed(kind, leaked)

    def _ends(self, at: int, final: bool, *, or_markup: bool = True) -> bool | None:
        """Tell whether nothing follows, or markup; None if that has not come yet."""
        near = bytes(self._buffer[at : at + _NEAR])
        rest = near.lstrip()
        if len(near) < _NEAR and _TOKENS.could_begin(rest):
            return not rest if final else None
        return or_markup and rest.startswith(_TOKENS.tokens)

    # -- in code

    def _in_code(self, start: int, end: int, final: bool) -> bool | None:
        """Tell whether a tag stands in code; None when it must wait for what follows."""
        if not self._inside_code(start):
            return False
        code = self._code[self._channel]
        at = code.span_end(self._buffer, max(end, start + self._seen), final)
        self._seen = max(0, at - start)
        return None if at >= 0 else code.inside()

    def _try(self, start: int, tag: Tag) -> bool:
        """See whether a tag in code begins a call that counts."""
        if not tag.opens or not (tag.name == "tools" or self._is_declared(tag)):
            return False
        end = tag.end
        if not self._undecided:  # what stands before need not wait
            self._release(start)
            start, end = 0, end - start
        self._trial = start, end
        if tag.name == "tools":
            self._seen = end
            self._mode = "attempt"
        else:
            self._begin_call(start, tag, end)
        return True

    def _read_attempt(self, final: bool) -> bool:
        """A section begins in code: a call must follow at once."""
        buffer = self._buffer
        at = self._seen = _skip_space(buffer, self._seen)
        tag = _tag(buffer, at)
        if tag is None:
            begun = _TOKENS.could_begin(bytes(buffer[at : at + len(OPEN)])) or _begun(
                buffer, at, final
            )
            return False if begun and not final else self._revert()
        if not tag.opens or not self._is_declared(tag):
            return self._revert()
        self._begin_call(at, tag, tag.end)
        return True

    def _is_declared(self, tag: Tag) -> bool:
        return tag.name in _CALLS and tag.attributes.get("tool", "") in self.tools

    def _revert(self) -> bool:
        """It was text: go on behind its first tag."""
        assert self._trial is not None
        self._at = self._trial[1]
        self._trial = None
        self._seen = 0
        self._mode = "text"
        return True

    # -- in a section, between calls

    def _read_section(self, final: bool) -> bool:
        buffer = self._buffer
        while (found := _TOKENS.search(buffer)) is not None:
            token = found[0]
            self._drop(found.start())
            tag = _tag(buffer, 0)
            if tag is None:
                if _begun(buffer, 0, final):
                    return False
                if token == END:
                    self._remove(len(END))
                else:
                    self._drop(len(token))
            elif tag.opens and tag.name in _CALLS:
                self._begin_call(0, tag, tag.end)
                return True
            elif tag.name == "message" or (tag.opens and tag.name in ("think", "response")):
                return self._leave_section()
            else:
                self._remove(tag.end)
                if tag.name == "tools" and not tag.opens:
                    return self._leave_section()
        self._drop(_TOKENS.tail(buffer))
        return False

    def _drop(self, length: int) -> None:
        if length:
            self._dropped.append(bytes(self._buffer[:length]))
            self._remove(length)

    def _leave_section(self) -> bool:
        self._section = False
        self._dropped.clear()
        self._mode = "text"
        self._again()
        return True

    # -- in a call

    def _begin_call(self, begin: int, tag: Tag, end: int) -> None:
        self._from = self._channel
        self._begin = begin
        self._call = tag
        self._members = {}
        self._json = None
        self._stray = []
        self._after = self._seen = end
        self._mode = "call"

    def _read_call(self, final: bool) -> bool:
        """Look for its arguments and its end."""
        buffer = self._buffer
        while (found := _TOKENS.search(buffer, self._seen)) is not None:
            start = found.start()
            tag = _tag(buffer, start)
            if tag is None and _begun(buffer, start, final):
                if not final:
                    self._seen = start
                    return False
                return self._end_of_call(start)
            if tag is None and found[0] != END:
                self._seen = found.end()
                continue
            stray = bytes(buffer[self._after : start])
            begins = tag is not None and _begins_value(tag)
            closes = tag is not None and tag.name == "call" and not tag.opens
            if self._trial and (stray.strip() or not (begins or closes)):
                return self._revert()
            self._stray.append(stray)
            if tag is None or _ends_calls(tag):
                return self._end_call(tag.end if tag and closes else start)
            self._after = self._seen = tag.end
            if begins:
                return self._begin_value(tag)
        if not final:
            self._seen = _TOKENS.tail(buffer, self._seen)
            return False
        return self._end_of_call(_whole(buffer, self._seen))

    def _begin_value(self, tag: Tag) -> bool:
        self._value = tag
        self._start = self._seen = tag.end
        self._typed = tag.name == "json" or tag.attributes.get("type", "string") != "string"
        self._looked = not self._typed
        self._object = None
        self._outside = -1
        self._mode = "value"
        return True

    def _read_value(self, final: bool) -> bool:
        """Look for the tag that closes an argument, or the JSON of a call."""
        buffer = self._buffer
        if not self._looked and not self._skip_json(final):
            return False
        while (found := _TOKENS.search(buffer, self._seen)) is not None:
            start = found.start()
            tag = _tag(buffer, start)
            if tag is None:
                if _begun(buffer, start, final):
                    if not final:
                        self._seen = start
                        return False
                    return self._end_of_text(start)
                if found[0] == END and self._outside < 0:
                    self._outside = start
                self._seen = found.end()
                continue
            if tag.name == self._value.name and not tag.opens:
                return self._end_value(start, tag.end)
            if _begins_value(tag) and (tag.name == "argument" or self._value.name == "json"):
                return self._end_unclosed(start)
            if self._outside < 0 and _ends_calls(tag):
                self._outside = start
            self._seen = tag.end
        if not final:
            self._seen = _TOKENS.tail(buffer, self._seen)
            return False
        return self._end_of_text(_whole(buffer, self._start))

    def _skip_json(self, final: bool) -> bool:
        """Go on behind an object or array: in its strings may stand what looks like tags."""
        buffer = self._buffer
        if self._object is None:
            at = self._seen = _skip_space(buffer, self._seen)
            if at == len(buffer) and not final:
                return False
            if buffer.startswith((b"{", b"["), at):
                self._object = ObjectEnd(at)
        if self._object is not None:
            end = self._object.find(buffer)
            if end == MORE and not final:
                return False
            whole = end not in (MORE, NONE) and _is_json(_text(buffer[self._start : end]))
            self._seen = end if whole else self._start
        self._looked = True
        return True

    def _end_value(self, end: int, after: int) -> bool:
        value = _text(self._buffer[self._start : end])
        valid = self._typed and _is_json(value)
        if self._value.name == "argument":
            key = self._value.attributes["key"]
            self._members[key] = value.strip() if valid else _string(value)
        elif self._trial and not valid:
            return self._revert()
        else:
            self._json = value.strip()
        self._after = self._seen = after
        self._mode = "call"
        return True

    def _end_unclosed(self, end: int) -> bool:
        """Its closing tag was left out: it ends here, or where the call must have ended."""
        if self._trial:
            return self._revert()
        after = end if self._outside < 0 else self._outside
        left = _LEFT.search(self._buffer, max(self._start, after - len(ARGUMENT_END)), after)
        return self._end_value(left.start() if left else after, after)

    def _end_of_text(self, end: int) -> bool:
        """The text ends within a value."""
        if self._trial or not self._cut:
            return self._end_unclosed(end)
        value = _text(self._buffer[self._start : end])
        if self._value.name == "json":
            return self._complete(len(self._buffer), value.strip())
        members = _joined(self._members)
        if value or members:
            cut = value.lstrip() if self._typed else _string(value)[:-1]
            key = _string(self._value.attributes["key"])
            members = f"{{{members}{',' if members else ''}{key}:{cut}"
        return self._complete(len(self._buffer), members)

    def _end_of_call(self, end: int) -> bool:
        """The text ends within a call."""
        if self._trial:
            return self._revert()
        self._stray.append(bytes(self._buffer[self._after : end]))
        return self._end_call(len(self._buffer), cut=self._cut)

    def _end_call(self, end: int, *, cut: bool = False) -> bool:
        stray = _text(b"".join(self._stray)).strip()
        if self._json is not None:
            arguments = self._json or "{}"
        elif self._members:
            arguments = "{" + _joined(self._members) + ("" if cut else "}")
        else:
            arguments = stray or ("" if cut else "{}")  # without tags, as other models write it
        return self._complete(end, arguments)

    def _complete(self, end: int, arguments: str) -> bool:
        """Take the call out of the text; without arguments it is dropped."""
        if self._trial:
            start, _ = self._trial
            self._section = self._section or start < self._begin
            self._trial = None
            self._release(start)
            self._interrupt()
            end -= start
        self._section = self._section or self._call.name == "toolscall"
        said = self._call.attributes.get("tool", "").strip().removeprefix(PREFIX)
        name = self.tools.fit(said) or said if said else self.tools.by_arguments(arguments)
        index = self._call.attributes.get("index", "")
        if not _NUMBER.fullmatch(index):
            index = str(len(self.calls) + 1)
        leaked = bytes(self._buffer[:end])
        self._remove(end)
        if name and arguments:
            self.calls.append(Found(f"{PREFIX}{name}:{index}", name, arguments, self._from))
            self.changed("tool_call", leaked, f"{name}({arguments})")
        else:
            self.changed("dropped", leaked)
        self._seen = 0
        self._mode = "section" if self._section else "text"
        if not self._section:
            self._again()
        return True


def _tag(text: bytearray, at: int) -> Tag | None:
    """Return the tag that stands at `at`."""
    found = _TAG.match(text, at, at + MAX_TAG)
    if found is None:
        return None
    if bare := found["bare"]:
        return Tag(bare.decode(), True, {}, found.end())
    if closed := found["closed"]:
        name = b"message" if closed.endswith(b"message") else closed
        return Tag(name.decode(), False, {}, found.end())
    attributes = {
        _text(one["name"]): _ENTITY.sub(lambda e: _ENTITIES[e[0]], _text(one["value"][1:]))
        for one in _ATTRIBUTE_OF.finditer(found["attributes"])
    }
    return Tag(found["opened"].decode(), True, attributes, found.end())


def _begun(text: bytearray, at: int, final: bool) -> bool:
    """Tell whether all the text from `at` on is the beginning of a tag.

    With `final`, it is one that was cut off: words that merely might go on as one are text.
    """
    beginning = _CUT_OFF if final else _BEGUN
    return len(text) - at < MAX_TAG and beginning.fullmatch(text, at) is not None


def _ends_calls(tag: Tag) -> bool:
    return tag.name in _OUTSIDE or (tag.opens and tag.name in ("think", "response"))


def _begins_value(tag: Tag) -> bool:
    return tag.opens and (
        tag.name == "json" or (tag.name == "argument" and "key" in tag.attributes)
    )


def _whole(text: bytearray, start: int) -> int:
    """Return where the text ends without the beginning of a token; a "<" alone is none."""
    end = _TOKENS.tail(text, start)
    return end if len(text) - end > 1 else len(text)


def _joined(members: dict[str, str]) -> str:
    return ",".join(f"{_string(key)}:{value}" for key, value in members.items())


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _text(raw: bytes | bytearray) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _skip_space(text: bytearray, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
