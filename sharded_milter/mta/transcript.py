"""The master's side of a transcript: what the MTA has sent that still matters, packet by packet.

The connection's part is a fixed set of slots, one for each kind of packet, so a client that
greets for ever costs no memory. The message's part grows within limits; above SPOOL_ABOVE it
moves into anonymous memory that workers map instead of receiving a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from enum import Enum, auto
from functools import partial

from twisted.logger import Logger

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.ipc.messages import MAX_INLINE, Memory
from sharded_milter.mta.inflight import Inflight
from sharded_milter.protocol.commands import Connect, Macro, Mail, Rcpt
from sharded_milter.protocol.wire import LETTER, PAYLOAD, packets

# What fits into one AMP box needs no memory of its own.
SPOOL_ABOVE = MAX_INLINE

_MACRO = Macro.letter[0]
_SLOTS = (b"O", b"DC", b"C", b"DH", b"H")
_KEYS = {"sender": Mail.letter[0], "recipient": Rcpt.letter[0]}
_FIRSTS = frozenset(_KEYS.values())
QUEUE_ID = ("i", "{i}")
MTA = ("v", "{v}")
# How the MTA marks a recipient that it has refused itself (SMFIP_RCPT_REJ).
REFUSED_RCPT = b"{rcpt_mailer}\0error\0"


class Refusal(Enum):
    """Why a message is not kept."""

    TOO_LARGE = auto()
    NO_ROOM = auto()
    NO_MEMORY = auto()  # the system has none left


class Transcript:
    """The packets of one connection."""

    __slots__ = (
        "_firsts",
        "_head",
        "_inflight",
        "_macros",
        "_max_size",
        "_memory",
        "_recent",
        "_slots",
        "refusal",
        "size",
    )

    log = Logger()

    def __init__(self, max_size: int, inflight: Inflight) -> None:
        """A message may have `max_size` bytes; what all messages have is counted in `inflight`."""
        self.size = 0  # bytes of the message's part
        self.refusal: Refusal | None = None  # set when the message is no longer kept
        self._max_size = max_size
        self._inflight = inflight
        self._slots: dict[bytes, bytes] = {}
        self._head: bytes | None = b""
        self._recent = bytearray()  # the message's part, or what of it is not in _memory yet
        self._memory: Memory | None = None
        self._macros: dict[int, bytes] = {}  # the message's latest by stage, for log lines
        self._firsts: dict[int, bytes] = {}  # its first MAIL and RCPT, for keys

    def connection_part(self) -> bytes:
        """Negotiation, connect and helo, with their macros."""
        if self._head is None:
            self._head = b"".join(self._slots[name] for name in _SLOTS if name in self._slots)
        return self._head

    def message_part(self, *, complete: bool = False) -> bytes | Memory:
        """The message so far; `complete` says that nothing will be added any more.

        Sets `refusal` when the system has no memory for it; then nothing of it is returned.
        """
        if self._memory is None:
            return bytes(self._recent)
        try:
            self._flush(self._memory)
        except OSError as error:
            self._refuse(Refusal.NO_MEMORY, str(error))
            return b""
        if complete:
            with suppress(OSError):  # a worker that was asked earlier has it mapped
                self._memory.seal()
        return self._memory

    def keep(self, packet: bytes) -> bytes:
        """Puts a packet of the connection's part into its slot, whose name is returned."""
        name = packet[LETTER:PAYLOAD]
        if packet[LETTER] == _MACRO:
            name += packet[PAYLOAD : PAYLOAD + 1]
        if name not in _SLOTS:
            raise RemoteProtocolError(f"packet {name!r} is no part of a connection")
        self._slots[name] = packet
        self._head = None
        return name

    def append(self, packet: bytes) -> None:
        """Adds a packet to the message's part, or refuses the message for want of room."""
        try:
            self._append(packet)
        except OSError as error:
            self._refuse(Refusal.NO_MEMORY, str(error))

    def extend(self, run: memoryview, noted: Iterable[bytes]) -> None:
        """Adds several packets to the message's part, as `append` does one after the other.

        `noted` are those of them that are no content.
        """
        size = len(run)
        room = self.refusal is None and self.size + size <= self._max_size
        if not room or not self._inflight.take(size):
            for _, start, end in packets(run):  # one of them is where it ends
                self.append(bytes(run[start - PAYLOAD : end]))
            return
        for packet in noted:
            self._note(packet)
        try:
            self._add(run)
        except OSError as error:
            self._refuse(Refusal.NO_MEMORY, str(error))

    def _append(self, packet: bytes) -> None:
        size = len(packet)
        if self.refusal is not None:
            return
        if self.size + size > self._max_size:
            self._refuse(Refusal.TOO_LARGE, f"it is larger than {self._max_size} bytes")
            return
        if not self._inflight.take(size):
            self._refuse(Refusal.NO_ROOM, f"{self._inflight.used} bytes are in hand already")
            return
        self._note(packet)
        self._add(packet)

    def _note(self, packet: bytes) -> None:
        code = packet[LETTER]
        if code == _MACRO:
            self._macros[packet[PAYLOAD]] = packet
        elif code in _FIRSTS:
            self._firsts.setdefault(code, packet)

    def _add(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        if len(self._recent) + len(data) <= SPOOL_ABOVE:
            self._recent += data
            return
        if self._memory is None:
            self._memory = Memory()
        self._flush(self._memory)
        self._memory.append(data)  # without a copy on the way

    def _flush(self, memory: Memory) -> None:
        if self._recent:
            memory.append(self._recent)
            self._recent.clear()

    def _refuse(self, refusal: Refusal, why: str) -> None:
        self.log.warn("{about} is refused: {why}", about=self.about()(), why=why)
        self.clear_message()
        self.refusal = refusal

    def clear_message(self) -> None:
        """Forgets the message; memory that a job still has stays alive with the job."""
        self._inflight.give_back(self.size)
        self.size = 0
        self.refusal = None
        self._recent.clear()
        self._memory = None
        self._macros = {}  # others may still look at the old ones
        self._firsts.clear()

    def clear_client(self) -> None:
        """Forgets client and message; the negotiated options stay."""
        self.clear_message()
        self._slots = {name: packet for name, packet in self._slots.items() if name == b"O"}
        self._head = None

    # What the master itself must know of it

    def about(self) -> Callable[[], str]:
        """What log lines call the message, also when another one is in hand; found when called."""
        return partial(_about, self._macros)

    def is_refused(self) -> bool:
        """Whether the MTA itself has refused the latest recipient."""
        return REFUSED_RCPT in self._macros.get(Rcpt.letter[0], b"")

    def mta(self) -> str:
        """What the MTA calls itself when a client connects, `Postfix 3.9.0`; or empty."""
        return _find(MTA, filter(None, [self._slots.get(b"DC")]))

    def client(self) -> bytes:
        """The client without its port: the same for every connection of the same client."""
        packet = self._slots.get(b"C", b"")
        if not packet:
            return b""
        connect = Connect.parse(packet[PAYLOAD:])
        return Connect(connect.hostname, connect.family, 0, connect.address).encode()

    def key(self, shard_by: str) -> bytes:
        """What messages that belong on the same shard have in common; empty for nothing.

        `shard_by` is `sender`, `recipient` (the first), or `client`.
        """
        if shard_by == "client":
            return self.client()
        packet = self._firsts.get(_KEYS.get(shard_by, 0), b"")
        return packet[PAYLOAD:].partition(b"\0")[0].lower()


def _about(macros: Mapping[int, bytes]) -> str:
    """The MTA's queue id, for log lines only."""
    queue_id = _find(QUEUE_ID, reversed(list(macros.values())))
    return f"qid={queue_id}" if queue_id else "message without queue id"


def _find(names: tuple[str, str], packets: Iterable[bytes]) -> str:
    """The value of a macro in the first of the packets that has it, or empty."""
    for packet in packets:
        for name, value in Macro.parse(packet[PAYLOAD:]).pairs:
            if name in names:
                return value
    return ""
