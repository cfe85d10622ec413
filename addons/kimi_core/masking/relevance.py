"""Which words a conversation is about: what its user and its model have named."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain

_WORD = re.compile(r"[^\W\d]\w{3,}")
_MAX_WORDS = 1_500
_RECENT, _EARLIER, _PLAIN = 2.0, 1.0, 0.25


class Named:
    """The words that were named, the latest last."""

    def __init__(self) -> None:
        self._turn = 0
        self._turns: dict[str, int] = {}

    def copy(self) -> Named:
        made = Named()
        made._turn, made._turns = self._turn, dict(self._turns)
        return made

    def turn(self) -> None:
        """Begin a message of the model."""
        self._turn += 1

    def read(self, text: str) -> None:
        words = dict.fromkeys(_WORD.findall(text[:_MAX_READ]), self._turn)
        for word in words.keys() & self._turns.keys():
            del self._turns[word]
        self._turns |= words
        surplus = len(self._turns) - _MAX_WORDS
        if surplus > _MAX_WORDS // 4:
            for word in list(self._turns)[:surplus]:
                del self._turns[word]

    def weights(self, lines: Sequence[str]) -> list[float]:
        """Return how much each line is about what was named; a word in every line says nothing."""
        found = [self._in(line) for line in lines]
        counts = Counter(chain.from_iterable(found))
        weights = {word: self._weight(word) / count**0.5 for word, count in counts.items()}
        return [sum(map(weights.__getitem__, words)) for words in found]

    def _in(self, line: str) -> list[str]:
        words = dict.fromkeys(_WORD.findall(line[:_MAX_LINE]))
        return list(filter(self._turns.__contains__, words))

    def _weight(self, word: str) -> float:
        made = _RECENT if self._turns[word] == self._turn else _EARLIER
        is_plain = word.isalpha() and word[1:].islower()
        return made * _PLAIN if is_plain else made


_MAX_READ = 20_000
_MAX_LINE = 1_000
