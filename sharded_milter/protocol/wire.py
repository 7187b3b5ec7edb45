"""Framing. A packet is four bytes of length, one letter, and the payload.

The length counts the letter and the payload, not itself. In this package "packet" always means
the whole of it, length included, because transcripts keep packets as they came.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from sharded_milter.errors import RemoteProtocolError

LENGTH_BYTES = 4
LETTER = LENGTH_BYTES  # the offset of the letter
HEAD = struct.Struct(">IB")  # the length and the letter
PAYLOAD = LETTER + 1  # the offset of the payload

# The largest packet that we take, letter and payload. Postfix and Sendmail send at most 65,536;
# a libmilter built with MDS_1M may be asked for 1,048,575 bytes of payload.
MAX_PACKET = 1_048_576

# The largest payload that every MTA takes from a filter (MILTER_CHUNK_SIZE).
MAX_CHUNK = 65_535


def frame(letter: bytes, payload: bytes = b"") -> bytes:
    """The packet of one letter and its payload."""
    return (1 + len(payload)).to_bytes(LENGTH_BYTES, "big") + letter + payload


def checked_length(prefix: bytes | bytearray) -> int:
    """The length that the first four bytes of a packet say.

    Raises RemoteProtocolError when it is 0 or above MAX_PACKET.
    """
    length = int.from_bytes(prefix, "big")
    if 1 <= length <= MAX_PACKET:
        return length
    raise RemoteProtocolError(f"packet length {length} is not within 1 and {MAX_PACKET}")


class Framer:
    """Cuts a stream into packets, whatever pieces it arrives in.

    What is not taken yet begins at `at` in `buffer`; whoever can, reads it there.
    """

    __slots__ = ("_skip", "at", "buffer")

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.at = 0
        self._skip = 0  # bytes to come that belong to a packet which was cut short

    @property
    def waiting(self) -> int:
        """How many bytes are not taken yet."""
        return len(self.buffer) - self.at

    def feed(self, data: bytes) -> None:
        """More has arrived."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self.buffer += data

    def compact(self) -> None:
        """Lets go of what is taken."""
        del self.buffer[: self.at]
        self.at = 0

    def next(self) -> bytes:
        """Takes the next packet; empty while it is not complete.

        Raises RemoteProtocolError on a length that no packet can have, before waiting for or
        storing what it announces.
        """
        start, buffer = self.at, self.buffer
        if len(buffer) - start < LENGTH_BYTES:
            return b""
        length = int.from_bytes(buffer[start : start + LENGTH_BYTES], "big")
        if not 1 <= length <= MAX_PACKET:
            checked_length(buffer[start : start + LENGTH_BYTES])
        end = start + LENGTH_BYTES + length
        if end > len(buffer):
            return b""
        self.at = end
        with memoryview(buffer) as view:
            return bytes(view[start:end])

    def head(self) -> tuple[int, int] | None:
        """Length and letter of the packet that is next, complete or not; None while unknown."""
        return HEAD.unpack_from(self.buffer, self.at) if self.waiting >= PAYLOAD else None

    def cut_short(self, packet: bytes) -> None:
        """Puts `packet` in the place of the next one, whose rest is dropped as it comes."""
        length, _ = HEAD.unpack_from(self.buffer, self.at)
        self._skip = LENGTH_BYTES + length - self.waiting
        self.buffer[self.at :] = packet

    def peek(self, start: int) -> Iterator[tuple[int, int]]:
        """The whole packets from `start` on, none of which is taken: letter, and where it ends.

        Raises RemoteProtocolError on a length that no packet can have.
        """
        buffer, size, head = self.buffer, len(self.buffer), HEAD.unpack_from
        while start + PAYLOAD <= size:
            length, letter = head(buffer, start)
            if not 1 <= length <= MAX_PACKET:
                checked_length(buffer[start : start + LENGTH_BYTES])
            start += LENGTH_BYTES + length
            if start > size:
                return
            yield letter, start
        if start + LENGTH_BYTES == size:
            checked_length(buffer[start:])

    def receive(self, data: bytes) -> list[bytes]:
        """The packets that `data` completes, in order, all of them taken; raises as `next`."""
        self.feed(data)
        found = list(iter(self.next, b""))
        self.compact()
        return found


def packets(buffer: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """The packets of a complete buffer: letter, where its payload begins, where it ends.

    Raises RemoteProtocolError when the buffer is not made of whole packets.
    """
    start, size = 0, len(buffer)
    while start < size:
        # Said here once more, without a call: whole transcripts are read this way.
        length = int.from_bytes(buffer[start : start + LENGTH_BYTES], "big")
        end = start + LENGTH_BYTES + length
        if not 1 <= length <= MAX_PACKET or end > size:
            checked_length(bytes(buffer[start : start + LENGTH_BYTES]))
            raise RemoteProtocolError(f"packet of {end - start} bytes cut off at {size - start}")
        yield buffer[start + LETTER], start + PAYLOAD, end
        start = end
