"""Fields, which write and read the values of messages in AMP boxes, and schemas of fields.

A `Field` writes and reads one value, a `Schema` a whole message. Fields are also the arguments of
the AMP commands, so that there is one format. AMP limits a value to 65,535 bytes. So a small part
is inline, and a large one is anonymous memory, whose descriptor is sent beside the box: the box has
the memory's inode and size.
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
    """The end of a channel, which sends and receives descriptors beside the bytes."""

    def _sendFileDescriptor(self, fd: int) -> int: ...
    def claim(self, inode: int, size: int) -> Any:
        """Return the received memory with the inode; raise BrokenRule, or OSError if lost."""


def prefixed(data: bytes) -> bytes:
    """Return a key or a value with AMP's length prefix."""
    return len(data).to_bytes(_LENGTH, "big") + data


class Field(amp.Argument):
    """One value of a message: at most `most` bytes, sent unchanged."""

    def __init__(self, most: int = MAX_TEXT, *, always: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most
        self.always = always  # it is in every box, even when empty

    def pack(self, value: Any, channel: Descriptors) -> bytes:
        """Return the value in the form that boxes have."""
        return bytes(value)

    def unpack(self, value: bytes, channel: Descriptors) -> Any:
        """Return the value that was packed; for memory, the result of the channel's `claim`.

        Raise BrokenRule for anything that `pack` does not write, OSError for lost memory.
        """
        self.check(len(value))
        return value

    def check(self, size: int) -> None:
        """Raise BrokenRule if a value may not have so many bytes."""
        if size > self.most:
            raise BrokenRule(f"a value of {size} bytes (the limit is {self.most})")

    # Called by AMP, for commands that it sends and receives itself.

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
    """Up to `most` bytes, sent as `bytes` or sealed `Memory`.

    The receiver gets `bytes`, or the result of its channel's `claim`.
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
    """The fields of a message in order. Empty values are not sent, unless a field is `always`."""

    def __init__(self, **fields: Field) -> None:
        self._fields = [(name.encode(), field) for name, field in fields.items()]
        self._keyed = [(prefixed(key), field) for key, field in self._fields]

    def __len__(self) -> int:
        """Return the number of fields."""
        return len(self._fields)

    def check(self, key: bytes, size: int) -> None:
        """Raise BrokenRule if the field may not have so many bytes."""
        dict(self._fields)[key].check(size)

    @property
    def arguments(self) -> list[tuple[bytes, amp.Argument]]:
        """The fields as arguments of an AMP command."""
        return list(self._fields)

    def write(
        self, kind: bytes, tag: bytes, values: tuple[Any, ...], channel: Descriptors
    ) -> bytes:
        """Return the whole box with the tag; `kind` has the bytes that begin a box of its kind.

        Raise amp.TooLong for an inline value that is too long for a box.
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
        """Return the values of a box in the fields' order; empty bytes for missing ones.

        Raise BrokenRule for anything that `write` does not write, OSError for lost memory, and
        MemoryError when there is none left.
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
                    lost = error  # the memory of the other fields must still be claimed
            elif field.always:
                raise BrokenRule(f"{key.decode()}: it is missing")
            else:
                values.append(b"")
        if lost is not None:
            raise lost
        return values

    def drop(self, box: Mapping[bytes, bytes], channel: Descriptors) -> None:
        """Release the memory that came with a box which is not read."""
        for key, field in self._fields:
            if key in box:
                with suppress(BrokenRule, OSError, MemoryError):
                    field.unpack(box[key], channel)
