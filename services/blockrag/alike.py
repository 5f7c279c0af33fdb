"""One dress of a thing made of another: messages and dataclasses whose fields have the same names.

What differs, in name or in type, is said at each place. A client imports this, so it stays light.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from google.protobuf.message import Message

T = TypeVar("T")


def alike(kind: Callable[..., T], source: Any, **others: Any) -> T:
    """A ``kind``, message or dataclass, with what ``source`` has of its fields, but for ``others``.

    A field that neither names keeps its default; a dataclass without one raises TypeError.
    """
    shared = _shared(kind, source.__class__)
    return kind(**{name: getattr(source, name) for name in shared if name not in others}, **others)


def fields_of(message: Message) -> dict[str, Any]:
    """Fields of a message by name, those that are zero too, and of the messages within it."""
    return {field.name: _plain(getattr(message, field.name), field.is_repeated) for field in message.DESCRIPTOR.fields}


def _plain(value: Any, repeated: bool) -> Any:
    if repeated:
        return [_plain(item, False) for item in value]
    return fields_of(value) if isinstance(value, Message) else value


@cache
def _shared(kind: Any, source: Any) -> tuple[str, ...]:
    return tuple(name for name in _fields(kind) if name in _fields(source))


def _fields(kind: Any) -> Any:
    return kind.DESCRIPTOR.fields_by_name if hasattr(kind, "DESCRIPTOR") else kind.__dataclass_fields__
