"""What was used last, within a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

K = TypeVar("K")
V = TypeVar("V")
P = ParamSpec("P")


class Lru(Generic[K, V]):
    """A mapping that forgets its least recently used values once they are larger together than ``limit``.

    ``size_of`` gives a value's size, in the limit's unit; without it each counts one. A value that alone exceeds the
    limit is not kept, and the others stay. Not for several threads.
    """

    def __init__(self, limit: int, size_of: Callable[[V], int] | None = None) -> None:
        if limit < 0:
            raise ValueError(f"limit {limit}: must not be negative")
        self._limit = limit
        self._size_of = size_of or (lambda _: 1)
        self._values: OrderedDict[K, V] = OrderedDict()
        self.size = 0
        """Of all values together."""

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: K) -> bool:
        """Whether a value is held; it is not used by that."""
        return key in self._values

    def get(self, key: K) -> V | None:
        """The value, which is used last now; None: there is none."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Keep a value, in place of the key's other one."""
        self.pop(key)
        size = self._size_of(value)
        if size > self._limit:  # the others would go for nothing
            return
        self._values[key] = value
        self.size += size
        while self.size > self._limit:
            self.pop(next(iter(self._values)))

    def pop(self, key: K) -> V | None:
        """Forget a value; it, or None."""
        value = self._values.pop(key, None)
        if value is not None:
            self.size -= self._size_of(value)
        return value

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()
        self.size = 0


def remembering(make: Callable[P, V], limit: int, size_of: Callable[[V], int]) -> Callable[P, V]:
    """``make``, with its latest values kept in an ``Lru`` by their arguments."""
    known: Lru[tuple[object, ...], V] = Lru(limit, size_of)

    def known_or_made(*arguments: P.args, **named: P.kwargs) -> V:
        key = (*arguments, *named.items())
        value = known.get(key)
        if value is None:
            value = make(*arguments, **named)
            known.put(key, value)
        return value

    return known_or_made
