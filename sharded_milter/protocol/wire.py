"""Framing. A packet is four bytes of length, one letter, and the payload.

The length counts the letter and the payload, not itself. In this package "packet" always means
all of it, including the length, because transcripts store packets unchanged.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from sharded_milter.errors import RemoteProtocolError

LENGTH_BYTES = 4
LETTER = LENGTH_BYTES  # the offset of the letter
HEAD = struct.Struct(">IB")  # the length and the letter
PAYLOAD = LETTER + 1  # the offset of the payload

# The largest packet that is accepted from an MTA: letter and payload, in bytes. Postfix and
# Sendmail send at most 65,536; with MDS_1M a payload may have 1,048,575.
MAX_PACKET = 1_048_576

# The largest payload that every MTA accepts from a filter, in bytes (MILTER_CHUNK_SIZE).
MAX_CHUNK = 65_535

# Bytes of one read, which is more than a UNIX socket holds.
MAX_READ = 262_144

# For one read, behind the beginning of a packet of the usual length. With a longer beginning, which
# would be copied with every read, the shared buffer would cost more than it saves.
_SHARED = bytearray(MAX_READ + PAYLOAD + MAX_CHUNK)
_ROOM = memoryview(_SHARED)


def frame(letter: bytes, payload: bytes = b"") -> bytes:
    """Return the packet with this letter and payload."""
    return (1 + len(payload)).to_bytes(LENGTH_BYTES, "big") + letter + payload


def checked_length(prefix: bytes | bytearray) -> int:
    """Return the length in the first four bytes of a packet.

    Raise RemoteProtocolError if it is 0 or above MAX_PACKET.
    """
    length = int.from_bytes(prefix, "big")
    if 1 <= length <= MAX_PACKET:
        return length
    raise RemoteProtocolError(f"packet length {length} is not between 1 and {MAX_PACKET}")


class Framer:
    """Splits a stream of bytes into packets.

    The bytes in `buffer` from offset `at` up to offset `end` are not consumed yet. A caller may
    read packets there and advance `at` itself.
    """

    __slots__ = ("_skip", "at", "buffer", "end")

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.at = 0
        self.end = 0
        self._skip = 0  # bytes still to arrive, and to drop, of a truncated packet

    @property
    def waiting(self) -> int:
        """The number of bytes that are not consumed yet."""
        return self.end - self.at

    def feed(self, data: bytes | memoryview) -> None:
        """Add bytes that have arrived."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self.buffer += data
        self.end = len(self.buffer)

    def fill(self, receive: Callable[[memoryview], int]) -> int:
        """Add the bytes that `receive` writes into a buffer; return their number.

        All framers share that buffer, so that what arrives needs no memory of its own: `compact`
        must follow before another framer is filled. Raise what `receive` raises.
        """
        waiting = self.end
        if self._skip or waiting > len(_SHARED) - MAX_READ:
            size = receive(_ROOM[:MAX_READ])
            self.feed(_ROOM[:size])
            return size
        if waiting:
            _ROOM[:waiting] = self.buffer
        size = receive(_ROOM[waiting : waiting + MAX_READ])
        if size:
            self.buffer, self.end = _SHARED, waiting + size
        return size

    def compact(self) -> None:
        """Drop the consumed bytes, and keep the others in a buffer of its own."""
        if self.buffer is _SHARED:
            self.buffer = self.buffer[self.at : self.end]
        elif self.at:
            del self.buffer[: self.at]
        self.end -= self.at
        self.at = 0

    def next(self) -> bytes:
        """Consume and return the next packet; return b"" while it is incomplete.

        Raise RemoteProtocolError for an invalid length as soon as the length has arrived.
        """
        start, buffer = self.at, self.buffer
        if self.end - start < LENGTH_BYTES:
            return b""
        length = int.from_bytes(buffer[start : start + LENGTH_BYTES], "big")
        if not 1 <= length <= MAX_PACKET:
            checked_length(buffer[start : start + LENGTH_BYTES])
        end = start + LENGTH_BYTES + length
        if end > self.end:
            return b""
        self.at = end
        with memoryview(buffer) as view:
            return bytes(view[start:end])

    def head(self) -> tuple[int, int] | None:
        """Return length and letter of the next packet, complete or not; None until they arrive."""
        return HEAD.unpack_from(self.buffer, self.at) if self.waiting >= PAYLOAD else None

    def truncate(self, packet: bytes) -> None:
        """Replace the next, incomplete packet with `packet`, and drop the rest when it arrives."""
        length, _ = HEAD.unpack_from(self.buffer, self.at)
        self._skip = LENGTH_BYTES + length - self.waiting
        self.buffer = self.buffer[: self.at] + packet
        self.end = len(self.buffer)

    def peek(self, start: int) -> Iterator[tuple[int, int]]:
        """Yield letter and end offset of each whole packet from `start` on; consume none.

        Raise RemoteProtocolError for an invalid length.
        """
        buffer, size, head = self.buffer, self.end, HEAD.unpack_from
        while start + PAYLOAD <= size:
            length, letter = head(buffer, start)
            if not 1 <= length <= MAX_PACKET:
                checked_length(buffer[start : start + LENGTH_BYTES])
            start += LENGTH_BYTES + length
            if start > size:
                return
            yield letter, start
        if start + LENGTH_BYTES == size:
            checked_length(buffer[start:size])

    def receive(self, data: bytes) -> list[bytes]:
        """Add `data`; consume and return the packets that are complete. Raise as `next` does."""
        self.feed(data)
        found = list(iter(self.next, b""))
        self.compact()
        return found


def packets(buffer: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield letter, payload offset and end offset of each packet in a complete buffer.

    Raise RemoteProtocolError if the buffer does not consist of whole packets.
    """
    start, size = 0, len(buffer)
    while start < size:
        # checked_length inlined: whole transcripts are read in this loop.
        length = int.from_bytes(buffer[start : start + LENGTH_BYTES], "big")
        end = start + LENGTH_BYTES + length
        if not 1 <= length <= MAX_PACKET or end > size:
            checked_length(bytes(buffer[start : start + LENGTH_BYTES]))
            raise RemoteProtocolError(f"packet of {end - start} bytes cut off at {size - start}")
        yield buffer[start + LETTER], start + PAYLOAD, end
        start = end
