"""Hostile messages, drawn from a seed: wrong types, deep and huge ones, noise, metadata of all kinds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from tests.system.rpcs import Rpc, all_rpcs

_INTEGERS = (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_DOUBLES = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    "",
    " ",
    "default",
    "public",
    "a" * 70_000,
    "\x00",
    "\u202e\ufeff",
    "../../etc/passwd",
    "'; DROP TABLE documents; --",
    "{{7*7}}",
    "<|im_end|>",
    "é" * 300,
    "\U0010ffff",
    "%s%n",
    "00-" + "f" * 32 + "-" + "f" * 16 + "-01",
)


class Generator:
    """Makes hostile requests; the same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self._kinds: tuple[Callable[[Rpc], bytes], ...] = (
            self._noise,
            self._filled,
            self._filled,
            self._filled,
            self._flipped,
            self._cut,
            self._of_another,
            self._many,
            self._deep,
        )

    def messages(self, rpc: Rpc) -> list[bytes]:
        """What to send: one message, or several where the method takes a stream."""
        count = self.draw.randint(0, 5) if rpc.client_streaming else 1
        return [self.draw.choice(self._kinds)(rpc) for _ in range(count)]

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """Mostly none; else of all kinds that gRPC lets through."""
        if self.draw.random() < 0.7:
            return []
        kinds: tuple[tuple[str, str | bytes], ...] = (
            ("authorization", self._ascii()),
            ("authorization", "Bearer " + self._ascii()),
            ("request_id", self._ascii()),
            ("traceparent", self._ascii()),
            ("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-00"),
            ("multiplexed_model_id", self._ascii()),
            ("session_id", self._ascii()),
            ("x-long", "v" * self.draw.randint(1, 4000)),
            ("x-bytes-bin", self.draw.randbytes(self.draw.randint(0, 1000))),
            ("grpc-encoding", "gzip"),
        )
        return [self.draw.choice(kinds) for _ in range(self.draw.randint(1, 4))]

    def fill(self, message: Message, depth: int = 0) -> None:
        """Sets some fields of a message to values at and beyond the edges of what they may be."""
        for descriptor in message.DESCRIPTOR.fields:
            if self.draw.random() < 0.3:
                continue
            if _is_map(descriptor):
                self._fill_map(message, descriptor)
            elif descriptor.is_repeated:
                for _ in range(self.draw.choice((0, 1, 2, 3, 40))):
                    if descriptor.message_type is not None:
                        if depth < 5:
                            self.fill(getattr(message, descriptor.name).add(), depth + 1)
                    else:
                        getattr(message, descriptor.name).append(self.value(descriptor))
            elif descriptor.message_type is not None:
                if depth < 5:
                    getattr(message, descriptor.name).SetInParent()
                    self.fill(getattr(message, descriptor.name), depth + 1)
            else:
                setattr(message, descriptor.name, self.value(descriptor))

    def value(self, descriptor: FieldDescriptor) -> Any:
        """A scalar that the field can hold."""
        kind = descriptor.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            if descriptor.type == FieldDescriptor.TYPE_BYTES:
                return self.draw.randbytes(self.draw.choice((0, 1, 100, 70_000)))
            return self._text()
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self.draw.random() < 0.5
        if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return self.draw.choice(_DOUBLES)
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            return self.draw.choice((0, 1, 2, 3, 99, 2**31 - 1, -1))
        bits = 32 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
        signed = kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
        most = 2 ** (bits - signed) - 1
        return self.draw.choice([*(each for each in _INTEGERS if each <= most), *((-1, -most - 1) if signed else ())])

    def _fill_map(self, message: Message, descriptor: FieldDescriptor) -> None:
        of = getattr(message, descriptor.name)
        value = descriptor.message_type.fields_by_name["value"]
        for _ in range(self.draw.randint(0, 3)):
            if value.message_type is not None:
                self.fill(of[self._text()], 4)
            else:
                of[self._text()] = self.value(value)

    def _noise(self, rpc: Rpc) -> bytes:
        return self.draw.randbytes(self.draw.choice((0, 1, 2, 10, 1000, 100_000)))

    def _filled(self, rpc: Rpc) -> bytes:
        message = rpc.request()
        self.fill(message)
        return message.SerializeToString()

    def _flipped(self, rpc: Rpc) -> bytes:
        data = bytearray(self._filled(rpc))
        for _ in range(min(len(data), self.draw.randint(1, 8))):
            data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        return bytes(data)

    def _cut(self, rpc: Rpc) -> bytes:
        data = self._filled(rpc)
        return data[: self.draw.randint(0, len(data))]

    def _of_another(self, rpc: Rpc) -> bytes:
        return self._filled(self.draw.choice(all_rpcs()))

    def _many(self, rpc: Rpc) -> bytes:
        message = rpc.request()
        self.fill(message, depth=4)
        repeated = [each for each in message.DESCRIPTOR.fields if each.is_repeated and not _is_map(each)]
        if repeated:
            descriptor = self.draw.choice(repeated)
            held = getattr(message, descriptor.name)
            for _ in range(self.draw.choice((1_000, 30_000))):
                if descriptor.message_type is not None:
                    held.add()
                else:
                    held.append(0 if descriptor.cpp_type != FieldDescriptor.CPPTYPE_STRING else "x")
        return message.SerializeToString()

    def _deep(self, rpc: Rpc) -> bytes:
        """As deep as the parser allows, or deeper, where a field takes it."""
        message = rpc.request()
        self.fill(message, depth=4)
        nested = Struct()
        inner = nested
        for _ in range(self.draw.choice((10, 30, 45))):
            inner = inner.fields["x"].struct_value
        data = message.SerializeToString()
        for descriptor in message.DESCRIPTOR.fields:
            if descriptor.message_type is not None and descriptor.message_type.full_name == Struct.DESCRIPTOR.full_name:
                body = nested.SerializeToString()
                data += _tag(descriptor.number) + _varint(len(body)) + body
        # An unknown field of groups within groups: the parser has to walk it.
        depth = self.draw.choice((20, 99, 101, 5000))
        return data + b"\xa3\x06" * depth + b"\xa4\x06" * depth

    def _text(self) -> str:
        if self.draw.random() < 0.7:
            return self.draw.choice(_TEXTS)
        return "".join(chr(self.draw.randrange(1, 0xD7FF)) for _ in range(self.draw.randint(1, 200)))

    def _ascii(self) -> str:
        return "".join(chr(self.draw.randrange(0x20, 0x7F)) for _ in range(self.draw.randint(1, 200))).strip() or "x"


def _is_map(descriptor: FieldDescriptor) -> bool:
    of = descriptor.message_type
    return of is not None and of.GetOptions().map_entry


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _tag(number: int) -> bytes:
    return _varint(number << 3 | 2)
