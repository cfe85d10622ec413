"""Token ids and counts of text, by the vocabularies that splintr carries; never any network.

splintr alone, without tiktoken: the ids are the same on 1.4 MB of mixed text and every assigned
code point, it takes 10 ms a MB instead of 80, and 42 MB of memory instead of 86 for o200k.

`count` runs with the GIL released but for a few microseconds a piece; `encode` holds it while
it makes the list. Both are safe from any thread.
"""

import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from struct import iter_unpack

import splintr

from kimi_core.tokens.models import model_tokens

PIECE_CHARS = 65_536
"""Longest text given to the encoder at once.

A run of one character takes 60 times its size in memory (16 MB of spaces: 1.1 GB and 7 s), so
the cost of a hostile text is bounded by the piece."""

# No vocabulary here has a token with a space or newline between two words, and no
# pre-tokenizer's match goes on from a word into a space, or from a newline into a letter or
# digit: ids left and right of such a place do not depend on each other.
_BEFORE_SPACE = re.compile(r"(?<=\w) (?=\S)")
_SAFE = re.compile(r"(?<=\w)(?= \S)|(?<=\n)(?=[^\W_])")
_TAIL_CHARS = 2_048

# These put a space before the text they are given, so a later piece must not bring its own.
_ADDS_SPACE = frozenset({"mistral_v1", "mistral_v2"})

# Non-ASCII text costs the first call 60 to 330 ms.
_WARM_TEXT = "def f(x):\n\treturn 'é' + \"中文\"  # 🚀 1234\r\n"


class _Vocabulary:
    """One loaded vocabulary, shared by every model that has it."""

    def __init__(self, name: str) -> None:
        self.core: splintr.AnyTokenizer = splintr.Tokenizer.from_pretrained(name)
        self.adds_space = name in _ADDS_SPACE
        by_prefix: dict[str, list[str]] = {}
        for token in self.core.special_tokens():
            by_prefix.setdefault(token[:2], []).append(token)
        self._special = tuple((prefix, tuple(tokens)) for prefix, tokens in by_prefix.items())
        self.core.encode_ordinary(_WARM_TEXT)

    def spells_special(self, piece: str) -> bool:
        """Tell whether the text spells out a control token."""
        for prefix, tokens in self._special:
            if prefix in piece and any(token in piece for token in tokens):
                return True
        return False

    def ids(self, piece: str) -> bytes | list[int]:
        """Return the piece's ids, as little-endian uint32 where that is possible.

        A control token that the text spells out is text: providers take what a user writes
        as such. `encode_flat`, which is twice as fast and leaves no list, would match it.
        (Gemma 2 and 3 have HTML tags and turn markers as words of the vocabulary, which
        Google's own tokenizer finds in any text; there they count as one token.)
        """
        if self.spells_special(piece):
            return self.core.encode_ordinary(piece)
        return self.core.encode_flat(piece)

    def pieces(self, text: str, size: int = PIECE_CHARS) -> Iterator[str]:
        """Yield the text in pieces of at most `size`, cut where no token can lie across.

        Where a piece has no such place (one long run, or a text without spaces), the cut
        is hard and may add a token, as in Kimi's own tokenizer, which cuts runs of 25,000.
        """
        start, end = 0, len(text)
        pattern = _BEFORE_SPACE if self.adds_space else _SAFE
        while end - start > size:
            limit = start + size
            # The last safe place, looked for near the end first.
            for low in (max(start + 1, limit - _TAIL_CHARS), start + 1):
                places = deque(pattern.finditer(text, low, limit), maxlen=1)
                if places:
                    break
            cut, resume = places[0].span() if places else (limit, limit)
            yield text[start:cut]
            start = resume
        yield text[start:]


_lock = threading.Lock()
_loaded: dict[str, _Vocabulary] = {}


def _vocabulary(name: str) -> _Vocabulary:
    found = _loaded.get(name)
    if found is None:
        with _lock:
            found = _loaded.get(name)
            if found is None:
                found = _loaded[name] = _Vocabulary(name)
    return found


def _without_lone_surrogates(text: str) -> str:
    """Return the text as a provider reads it: halves of a pair joined, lone ones as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A vocabulary, loaded at its first use (0.1 to 0.4 s; see `warm`).

    `exact` says that the counts are the model's own for plain text, as vectors of its maker
    show; otherwise they are an estimate.
    """

    name: str
    exact: bool

    @property
    def loaded(self) -> bool:
        """Tell whether the next count will not have to load the vocabulary."""
        return self.name in _loaded

    def count(self, text: str) -> int:
        """Return the number of tokens of the text alone, without any chat template."""
        if not text:
            return 0
        vocabulary = _vocabulary(self.name)
        try:
            return _count(vocabulary, text)
        except UnicodeEncodeError:
            return _count(vocabulary, _without_lone_surrogates(text))

    def count_many(self, texts: Iterable[str]) -> list[int]:
        """Return the count of each text; other threads run meanwhile."""
        texts = list(texts)
        # Of many short ones what the checks cost would be most of it.
        if 0 < max(map(len, texts), default=0) <= PIECE_CHARS:
            vocabulary = _vocabulary(self.name)
            if not vocabulary.spells_special("\n".join(texts)):
                with suppress(UnicodeEncodeError):
                    return [len(ids) // 4 for ids in map(vocabulary.core.encode_flat, texts)]
        return [self.count(text) for text in texts]

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, control tokens in it taken as text."""
        if not text:
            return []
        vocabulary = _vocabulary(self.name)
        try:
            return _encode(vocabulary, text)
        except UnicodeEncodeError:
            return _encode(vocabulary, _without_lone_surrogates(text))


def _count(vocabulary: _Vocabulary, text: str) -> int:
    total = 0
    for piece in (text,) if len(text) <= PIECE_CHARS else vocabulary.pieces(text):
        ids = vocabulary.ids(piece)
        total += len(ids) // 4 if isinstance(ids, bytes) else len(ids)
    return total


def _encode(vocabulary: _Vocabulary, text: str) -> list[int]:
    result: list[int] = []
    for piece in vocabulary.pieces(text):
        ids = vocabulary.ids(piece)
        if isinstance(ids, bytes):
            result.extend(number for (number,) in iter_unpack("<I", ids))
        else:
            result.extend(ids)
    return result


@lru_cache(maxsize=1024)
def tokenizer_for(model: str) -> Tokenizer:
    """Return the tokenizer of a model id, of the client's or the provider's spelling."""
    known = model_tokens(model)
    return Tokenizer(known.vocabulary, known.exact)


def warm(models: Iterable[str]) -> None:
    """Load the tokenizers of these models now, so that no later count waits for it."""
    for model in models:
        _vocabulary(tokenizer_for(model).name)
