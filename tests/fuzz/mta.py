"""What the fuzzer knows of the milter protocol. Written from the protocol's description, not with
our codec, so that a mistake in one is seen by the other.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

#: The longest packet that is taken, letter and payload.
MAX_PACKET = 1_048_576

#: Commands that are answered with exactly one final reply, and the bit (SMFIP_NR_*) against that.
REPLY_BEARING = {
    "C": 0x1000,
    "H": 0x2000,
    "M": 0x4000,
    "R": 0x8000,
    "T": 0x10000,
    "L": 0x80,
    "N": 0x40000,
    "B": 0x80000,
    "E": 0,
    "U": 0x20000,
}

#: The final replies and where they are legal.
FINAL = {
    "c": "CHMRTLNBEU",
    "a": "CHMRTLNBE",
    "r": "CHMRTLNBEU",
    "t": "CHMRTLNBEU",
    "y": "CHMRTLNBEU",
    "d": "MRTLNBE",
    "s": "B",
    "O": "O",
}

#: What may come before the final reply to the end of a message.
MODIFICATIONS = "hibm+-2eq"
PROGRESS = "p"


def packet(letter: str, payload: bytes = b"") -> bytes:
    return struct.pack("!I", 1 + len(payload)) + letter.encode("latin-1") + payload


def strings(*texts: bytes) -> bytes:
    return b"".join(text + b"\0" for text in texts)


class Reader:
    """Cuts a stream into letters and payloads; `broken` when no packet can follow."""

    def __init__(self) -> None:
        self._rest = b""
        self.broken = False

    def read(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        self._rest += data
        while len(self._rest) >= 4 and not self.broken:
            length = int.from_bytes(self._rest[:4], "big")
            if not 1 <= length <= MAX_PACKET:
                self.broken = True
            elif len(self._rest) < 4 + length:
                break
            else:
                body, self._rest = self._rest[4 : 4 + length], self._rest[4 + length :]
                yield chr(body[0]), body[1:]

    def whole(self) -> bool:
        return not self._rest
