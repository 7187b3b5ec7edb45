"""The master's side of a transcript: what the MTA has sent that still matters, packet by packet.

The connection's part is a fixed set of slots, one for each kind of packet, so a client that
greets for ever costs no memory. The message's part grows; above SPOOL_ABOVE it moves into
anonymous memory that workers map instead of receiving a copy.
"""

from __future__ import annotations

from collections.abc import Iterable

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.jobs import MAX_INLINE, Memory
from sharded_milter.protocol.commands import Macro
from sharded_milter.protocol.wire import LETTER, PAYLOAD

# What fits into one AMP box needs no memory of its own.
SPOOL_ABOVE = MAX_INLINE

_MACRO = Macro.letter[0]
_SLOTS = (b"O", b"DC", b"C", b"DH", b"H")
QUEUE_ID = ("i", "{i}")
MTA = ("v", "{v}")


class Transcript:
    """The packets of one connection."""

    __slots__ = ("_head", "_macros", "_memory", "_recent", "_slots")

    def __init__(self) -> None:
        self._slots: dict[bytes, bytes] = {}
        self._head: bytes | None = b""
        self._recent = bytearray()  # the message's part, or what of it is not in _memory yet
        self._memory: Memory | None = None
        self._macros: dict[int, bytes] = {}  # the message's latest by stage, for queue_id

    @property
    def size(self) -> int:
        """The bytes of the message's part."""
        return len(self._recent) + (self._memory.size if self._memory else 0)

    def connection_part(self) -> bytes:
        """Negotiation, connect and helo, with their macros."""
        if self._head is None:
            self._head = b"".join(self._slots[name] for name in _SLOTS if name in self._slots)
        return self._head

    def message_part(self, *, complete: bool = False) -> bytes | Memory:
        """The message so far; `complete` says that nothing will be added any more."""
        if self._memory is None:
            return bytes(self._recent)
        self._flush(self._memory)
        if complete:
            self._memory.seal()
        return self._memory

    def keep(self, packet: bytes) -> None:
        """Puts a packet of the connection's part into its slot."""
        name = packet[LETTER:PAYLOAD]
        if packet[LETTER] == _MACRO:
            name += packet[PAYLOAD : PAYLOAD + 1]
        if name not in _SLOTS:
            raise RemoteProtocolError(f"packet {name!r} is no part of a connection")
        self._slots[name] = packet
        self._head = None

    def append(self, packet: bytes) -> None:
        """Adds a packet to the message's part."""
        if packet[LETTER] == _MACRO:
            self._macros[packet[PAYLOAD]] = packet
        self._recent += packet
        if len(self._recent) > SPOOL_ABOVE:
            if self._memory is None:
                self._memory = Memory()
            self._flush(self._memory)

    def _flush(self, memory: Memory) -> None:
        memory.append(self._recent)
        self._recent.clear()

    def clear_message(self) -> None:
        """Forgets the message; memory that a job still has stays alive with the job."""
        self._recent.clear()
        self._memory = None
        self._macros.clear()

    def clear_client(self) -> None:
        """Forgets client and message; the negotiated options stay."""
        self.clear_message()
        self._slots = {name: packet for name, packet in self._slots.items() if name == b"O"}
        self._head = None

    def queue_id(self) -> str:
        """The MTA's queue id, or empty; looked up when asked, for log lines only."""
        return _find(QUEUE_ID, reversed(self._macros.values()))

    def mta(self) -> str:
        """What the MTA calls itself when a client connects, `Postfix 3.9.0`; or empty."""
        return _find(MTA, filter(None, [self._slots.get(b"DC")]))


def _find(names: tuple[str, str], packets: Iterable[bytes]) -> str:
    """The value of a macro in the first of the packets that has it, or empty."""
    for packet in packets:
        for name, value in Macro.parse(packet[PAYLOAD:]).pairs:
            if name in names:
                return value
    return ""
