"""How values of messages are written into AMP's boxes and read: fields, and schemas of fields.

A `Field` says how one value is written and read. `Schema` writes and reads whole messages with
the fields, which are also the arguments of AMP's commands: there is no second format. AMP limits
a value to 65,535 bytes, so a part is inline while small, and anonymous memory when large, whose
descriptor comes beside the box: the box says the memory's inode and size.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from twisted.protocols import amp

from sharded_milter.errors import BrokenRule
from sharded_milter.ipc.memory import Memory

# The longest text (a traceback, a name) that is sent as a plain AMP value.
MAX_TEXT = 60_000

_INLINE = b"="
_MEMORY = re.compile(rb"@(\d{1,20}) (\d{1,20})")  # an inode, a size
_LENGTH = 2  # bytes of a length in AMP's boxes


class Descriptors(Protocol):
    """The end of a channel: it passes descriptors on beside the bytes."""

    def _sendFileDescriptor(self, fd: int) -> int: ...
    def claim(self, inode: int, size: int) -> Any:
        """The memory that has come with the inode; raises BrokenRule, or OSError if it is lost."""


def prefixed(data: bytes) -> bytes:
    """A key or a value as AMP's boxes have it: behind its length."""
    return len(data).to_bytes(_LENGTH, "big") + data


class Field(amp.Argument):
    """One value of a message, which is bytes as it is, and no more of them than `most`."""

    def __init__(self, most: int = MAX_TEXT, *, always: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most
        self.always = always  # it is in every box, also while it is empty

    def pack(self, value: Any, channel: Descriptors) -> bytes:
        """The value as a box has it."""
        return bytes(value)

    def unpack(self, value: bytes, channel: Descriptors) -> Any:
        """What `pack` was given, or what the channel makes of it where it is memory.

        Raises BrokenRule for what `pack` does not write, OSError for memory that got lost.
        """
        self.check(len(value))
        return value

    def check(self, size: int) -> None:
        """Raises BrokenRule for more bytes than a value may have."""
        if size > self.most:
            raise BrokenRule(f"a value of {size} bytes (the limit is {self.most})")

    # What AMP calls, for messages that take its own way.

    def toBox(self, name: bytes, strings: Any, objects: Any, proto: Any) -> None:
        value = objects.pop(name.decode(), None)
        if value or self.always:
            strings[name] = self.pack(value or b"", proto)

    def fromBox(self, name: bytes, strings: Any, objects: Any, proto: Any) -> None:
        if name in strings:
            objects[name.decode()] = self.unpack(strings.pop(name), proto)


class Head(Field):
    """A question's stage letter, milter, session and start, as a `QuestionHead`."""

    _packing = struct.Struct(">cHQQ")

    def pack(self, value: Any, channel: Descriptors) -> bytes:
        data: bytes = self._packing.pack(*value)
        return data

    def unpack(self, value: bytes, channel: Descriptors) -> tuple[bytes, int, int, int]:
        if len(value) != self._packing.size:
            raise BrokenRule(f"a head of {len(value)} bytes instead of {self._packing.size}")
        return self._packing.unpack(value)


class Part(Field):
    """Bytes of any length up to `most`: `bytes` or sealed `Memory` is sent.

    `bytes` arrives, or what the channel makes of memory.
    """

    def pack(self, value: Any, channel: Descriptors) -> bytes:
        if isinstance(value, Memory):
            channel._sendFileDescriptor(value.fd)
            return b"@%d %d" % (value.inode, value.size)
        inline: bytes = value
        return _INLINE + inline

    def unpack(self, value: bytes, channel: Descriptors) -> Any:
        if value.startswith(_INLINE):
            return value[1:]
        found = _MEMORY.fullmatch(value)
        if found is None:
            raise BrokenRule(f"neither bytes nor memory: {value[:40]!r}")
        inode, size = map(int, found.groups())
        self.check(size)
        return channel.claim(inode, size)


class Schema:
    """The fields of a message in order. An empty value is left out of the box, as a rule."""

    def __init__(self, **fields: Field) -> None:
        self._fields = [(name.encode(), field) for name, field in fields.items()]
        self._keyed = [(prefixed(key), field) for key, field in self._fields]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._fields)

    def check(self, key: bytes, size: int) -> None:
        """Raises BrokenRule for more bytes than that field may have."""
        dict(self._fields)[key].check(size)

    @property
    def arguments(self) -> list[tuple[bytes, amp.Argument]]:
        """The message as AMP declares it."""
        return list(self._fields)

    def write(
        self, kind: bytes, tag: bytes, values: tuple[Any, ...], channel: Descriptors
    ) -> bytes:
        """The whole box with that tag; `kind` is what a box of its kind begins with.

        Raises amp.TooLong for an inline value that no box can hold.
        """
        pieces = [kind, len(tag).to_bytes(_LENGTH, "big"), tag]
        for (key, field), value in zip(self._keyed, values, strict=True):
            if value or field.always:
                data = field.pack(value, channel)
                if len(data) > amp.MAX_VALUE_LENGTH:
                    raise amp.TooLong(False, True, data, key[_LENGTH:])
                pieces += (key, len(data).to_bytes(_LENGTH, "big"), data)
        pieces.append(bytes(_LENGTH))
        return b"".join(pieces)

    def read(self, box: Mapping[bytes, bytes], channel: Descriptors) -> list[Any]:
        """The values of a box in the fields' order; empty bytes where it has none.

        Raises BrokenRule for what `write` does not write, OSError for memory that got lost, and
        MemoryError where there is none for it.
        """
        values: list[Any] = []
        lost: Exception | None = None
        for key, field in self._fields:
            if key in box:
                try:
                    values.append(field.unpack(box[key], channel))
                except BrokenRule as rule:
                    raise BrokenRule(f"{key.decode()}: {rule}") from None
                except (OSError, MemoryError) as error:
                    lost = error  # what has come with the other fields is claimed all the same
            elif field.always:
                raise BrokenRule(f"{key.decode()}: it is missing")
            else:
                values.append(b"")
        if lost is not None:
            raise lost
        return values

    def drop(self, box: Mapping[bytes, bytes], channel: Descriptors) -> None:
        """Lets go of the memory that has come with a box which is not read."""
        for key, field in self._fields:
            if key in box:
                with suppress(BrokenRule, OSError, MemoryError):
                    field.unpack(box[key], channel)
