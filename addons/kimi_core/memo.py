"""A bounded memory for what is dear to compute and cheap to lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Memo(Generic[Key, Value]):
    """A dict of at most 2 x `size` entries that forgets what was not asked for lately.

    Two generations: what is found in the old one moves to the young one; when that is
    full it becomes the old one. A look-up is a dict look-up, unlike with an LRU list.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._young: dict[Key, Value] = {}
        self._old: dict[Key, Value] = {}

    def get(self, key: Key) -> Value | None:
        """Return what was put under `key`, None when nothing was or it is forgotten."""
        found = self._young.get(key)
        if found is None and (found := self._old.get(key)) is not None:
            self.put(key, found)
        return found

    def get_many(self, keys: Sequence[Key]) -> list[Value | None]:
        """Return `get` of each key, in their order, in one go."""
        found = list(map(self._young.get, keys))
        if self._old and None in found:
            return [self.get(key) for key in keys]
        return found

    def put(self, key: Key, value: Value) -> None:
        if len(self._young) >= self._size:
            self._old, self._young = self._young, {}
        self._young[key] = value

    def pop(self, key: Key) -> Value | None:
        """Forget what was put under `key`, and return it."""
        old = self._old.pop(key, None)
        return self._young.pop(key, old)

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())
