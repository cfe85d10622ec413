"""A request with a summary in the place of the beginning of its conversation."""

from __future__ import annotations

import re
from typing import Any

from kimi_core.compaction.cuts import Head
from kimi_core.context import Context, read
from kimi_core.dialects import GEMINI, RESPONSES
from kimi_core.document import Document, Shape, decode, encode, locate, splice
from kimi_core.exchange import Message

_QUOTED_CHARS = 3_000
_LATEST_CHARS = 4_000
_SHAPE = Shape(arrays=("content", "parts"))
_TAG = re.compile(r"</?summary>", re.IGNORECASE)
_INNER = re.compile(r"<summary>\n(.*)\n</summary>", re.DOTALL)


def stand_in(given: Context, end: int, head: Head, summary: str) -> str:
    """Return the text that stands for the first `end` messages, but for those that stay.

    Besides the summary it quotes what the user said first, where that is too long to stay, and
    last: of an instruction in force the words count.
    """
    gone = [
        (index, read(given.dialect, given.message(index).unit))
        for index in range(end)
        if index not in head.kept
    ]
    said = [(index, text) for index, message in gone if (text := words_of(message))]
    first_answer = next((i for i, message in gone if message.role == "assistant"), end)
    pieces = [
        f"[{len(gone)} messages of this conversation stood here and are summarised, to save "
        "tokens. What they tell has happened; what follows is word for word.]",
        f"<summary>\n{_TAG.sub('', summary).strip()}\n</summary>",
    ]
    opening = [text for index, text in said if index < first_answer]
    if opening:
        quoted = [shortened(text, _QUOTED_CHARS // len(opening)) for text in opening]
        pieces.insert(0, "The user began with:\n" + "\n\n".join(quoted))
    later = [text for index, text in said if index > first_answer]
    if later:
        pieces.append(
            "The user's latest words before what follows:\n" + shortened(later[-1], _LATEST_CHARS)
        )
    return "\n\n".join(pieces)


def summary_in(text: str) -> str:
    """Return the summary in a text that `stand_in` made."""
    found = _INNER.search(text)
    return found[1] if found else text


def compress(document: Document, given: Context, end: int, head: Head, text: str) -> Context:
    """Put `text` in the place of the first `end` messages; those that stay keep their bytes.

    Returns the context as it leaves.
    """
    raws = [
        with_text(given, bytes(given.raw(index)), text)
        if index == head.holder
        else bytes(given.raw(index))
        for index in head.kept
    ]
    if head.holder is None:
        raws.append(_message(given, text))
    raws += [bytes(given.raw(index)) for index in range(end, len(given))]
    edits = document.edits()
    try:
        document.set_raw((given.message(0).unit.path[0],), b"[" + b",".join(raws) + b"]")
        return Context(given.dialect, document)
    except BaseException:
        document.restore(edits)
        raise


def place(head: Head) -> int:
    """Return which of the messages that leave holds the summary."""
    return len(head.kept) if head.holder is None else head.kept.index(head.holder)


def with_text(given: Context, raw: bytes, text: str) -> bytes:
    """Return a message with a text added at its end."""
    key = "parts" if given.dialect is GEMINI else "content"
    content = decode(raw)[key]
    if isinstance(content, str):
        span = locate(raw, 0, (key,))
        assert span is not None
        # Within the quotes, so that what was there keeps its bytes.
        at = span[1] - 1
        return raw[:at] + encode(f"\n\n{text}")[1:-1] + raw[at:]
    block = _block(given, text)
    if isinstance(content, dict):  # Gemini takes a part alone for a list of one
        return splice(raw, (key,), [content, block])
    document = Document(raw, _SHAPE)
    document.append_raw((key,), encode(block))
    return document.encode()


def _message(given: Context, text: str) -> bytes:
    if given.dialect is GEMINI:
        return encode({"role": "user", "parts": [_block(given, text)]})
    if given.dialect is RESPONSES:
        return encode({"type": "message", "role": "user", "content": [_block(given, text)]})
    return encode({"role": "user", "content": text})


def _block(given: Context, text: str) -> dict[str, Any]:
    if given.dialect is GEMINI:
        return {"text": text}
    return {"type": "input_text" if given.dialect is RESPONSES else "text", "text": text}


def words_of(message: Message) -> str:
    """Return what a person, or who speaks for one, said in a message.

    Of an image or a file it tells that there was one.
    """
    if message.role != "user":
        return ""
    words = (
        f"[{part.kind}, left out]" if part.kind in ("image", "file") else part.text
        for part in message.parts
        if part.kind == "text" or (part.kind in ("image", "file") and part.category == "user")
    )
    return "\n".join(words).strip()


def shortened(text: str, size: int) -> str:
    """Return the text, its middle left out where it is longer than `size` characters."""
    if len(text) <= size:
        return text
    tail = size // 3
    left = len(text) - size
    return f"{text[: size - tail]}\n[… {left} characters left out …]\n{text[-tail:]}"
