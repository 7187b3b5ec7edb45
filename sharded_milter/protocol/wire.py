"""Framing. A packet is four bytes of length, one letter, and the payload.

The length counts the letter and the payload, not itself. In this package "packet" always means
the whole of it, length included, because transcripts keep packets as they came.
"""

from __future__ import annotations

from collections.abc import Iterator

from sharded_milter.errors import RemoteProtocolError

LENGTH_BYTES = 4
LETTER = LENGTH_BYTES  # the offset of the letter
PAYLOAD = LETTER + 1  # the offset of the payload

# The largest packet that we take, letter and payload. Postfix and Sendmail send at most 65,536;
# a libmilter built with MDS_1M may be asked for 1,048,575 bytes of payload.
MAX_PACKET = 1_048_576

# The largest payload that every MTA takes from a filter (MILTER_CHUNK_SIZE).
MAX_CHUNK = 65_535


def frame(letter: bytes, payload: bytes = b"") -> bytes:
    """The packet of one letter and its payload."""
    return (1 + len(payload)).to_bytes(LENGTH_BYTES, "big") + letter + payload


def checked_length(prefix: bytes) -> int:
    """The length that the first four bytes of a packet say.

    Raises RemoteProtocolError when it is 0 or above MAX_PACKET.
    """
    length = int.from_bytes(prefix, "big")
    if 1 <= length <= MAX_PACKET:
        return length
    raise RemoteProtocolError(f"packet length {length} is not within 1 and {MAX_PACKET}")


class Framer:
    """Cuts a stream into packets, whatever pieces it arrives in."""

    __slots__ = ("_need", "_rest")

    def __init__(self) -> None:
        self._rest = bytearray()  # the beginning of a packet that is not complete yet
        self._need = 0  # how long _rest must be before another look can pay

    def receive(self, data: bytes) -> list[bytes]:
        """The packets that `data` completes, in order.

        Raises RemoteProtocolError on a length that no packet can have, before waiting for or
        storing what it announces.
        """
        if self._rest:
            # A packet that drips in byte by byte costs one append a byte, not one copy of all.
            self._rest += data
            if len(self._rest) < self._need:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        packets = []
        start, size = 0, len(data)
        self._need = LENGTH_BYTES
        while size - start >= LENGTH_BYTES:
            total = LENGTH_BYTES + checked_length(data[start : start + LENGTH_BYTES])
            if size - start < total:
                self._need = total
                break
            packets.append(data[start : start + total])
            start += total
        if start < size:
            self._rest += data[start:]
        return packets


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
