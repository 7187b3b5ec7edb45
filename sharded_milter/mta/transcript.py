"""The master's side of a transcript: what the MTA has sent that still matters, packet by packet.

The connection's part is a fixed set of slots, one for each kind of packet, so a client that
greets for ever costs no memory. The message's part grows within limits; above SPOOL_ABOVE it
moves into anonymous memory that workers map instead of receiving a copy, once it is complete and
can change no more. Of what still grows they get a copy of what is new to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, auto

from twisted.logger import Logger

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.ipc.memory import MAX_INLINE, Memory
from sharded_milter.mta.inflight import Claim, Inflight
from sharded_milter.protocol.commands import Connect, Macro, Mail, Rcpt
from sharded_milter.protocol.text import quoted, to_text
from sharded_milter.protocol.wire import LETTER, PAYLOAD, packets

# What fits into one AMP box needs no memory of its own.
SPOOL_ABOVE = MAX_INLINE

# Bytes of a connection's part that are counted with the connection itself. Postfix and Sendmail
# send a quarter of this.
USUAL_HEAD = 2048

_MACRO = Macro.letter[0]
_SLOTS = (b"O", b"DC", b"C", b"DH", b"H")
_KEYS = {"sender": Mail.letter[0], "recipient": Rcpt.letter[0]}
_FIRSTS = frozenset(_KEYS.values())
QUEUE_ID = frozenset((b"i", b"{i}"))
MTA = frozenset((b"v", b"{v}"))
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
        "_asked",
        "_firsts",
        "_head",
        "_head_claim",
        "_macros",
        "_max_size",
        "_memory",
        "_new_memory",
        "_queue_id",
        "_recent",
        "_slots",
        "claim",
        "inflight",
        "refusal",
        "refuses_client",
        "size",
    )

    log = Logger()

    def __init__(
        self, max_size: int, inflight: Inflight, new_memory: Callable[[], Memory] = Memory
    ) -> None:
        """A message may have `max_size` bytes; what all messages have is counted in `inflight`.

        `new_memory` raises OSError where a message can have none.
        """
        self.size = 0  # bytes of the message's part
        self.refusal: Refusal | None = None  # set when the message is no longer kept
        self.refuses_client = False  # there is no room for what the client is, nor for its mail
        self._max_size = max_size
        self.inflight = inflight
        self._slots: dict[bytes, bytes] = {}
        self._head: bytes | None = b""
        self._new_memory = new_memory
        self._head_claim = Claim(inflight)  # for what of it is more than USUAL_HEAD
        # What the message's part counts with; whoever is given the part holds it too.
        self.claim: Claim | None = None
        # The message's part: what was asked about, in bytes that the job shares or in memory, and
        # what has come since.
        self._asked = b""
        self._memory: Memory | None = None
        self._recent = bytearray()
        self._macros: dict[int, bytes] = {}  # the message's latest by stage, for log lines
        self._firsts: dict[int, bytes] = {}  # its first MAIL and RCPT, for keys
        self._queue_id: str | None = ""  # None: it is to be looked for

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
            if self._recent:
                self._asked += self._recent
                self._recent.clear()
            return self._asked
        try:
            self._flush(self._memory)
            if complete:
                self._memory.seal()
        except OSError as error:
            self._refuse(Refusal.NO_MEMORY, str(error))
            return b""
        return self._memory

    def keep(self, packet: bytes) -> bytes:
        """Puts a packet of the connection's part into its slot, whose name is returned.

        Where there is no room for it the client is refused from then on.
        """
        name = packet[LETTER:PAYLOAD]
        if packet[LETTER] == _MACRO:
            name += packet[PAYLOAD : PAYLOAD + 1]
        if name not in _SLOTS:
            raise RemoteProtocolError(f"packet {name!r} is no part of a connection")
        before = self._slots.get(name, b"")
        self._slots[name] = packet
        self._head = None
        if not self._has_room_for_head():
            self._slots[name] = before
            self._refuse_client(len(packet))
        return name

    def _has_room_for_head(self) -> bool:
        claim = self._head_claim
        # Twice: packet by packet, and joined for jobs.
        size = 2 * max(0, sum(map(len, self._slots.values())) - USUAL_HEAD)
        if size > claim.size:
            return claim.grow(size - claim.size)
        claim.set(size)
        return True

    def _refuse_client(self, size: int) -> None:
        if not self.refuses_client:
            self.log.warn(
                "a client is refused: {used} bytes are in hand already, and no room for the {size}"
                " that it says of itself",
                used=self.inflight.used,
                size=size,
            )
        self.refuses_client = True

    def append(self, packet: bytes) -> None:
        """Adds a packet to the message's part, or refuses the message for want of room."""
        self._add(packet, (packet,))

    def extend(self, run: memoryview, noted: Iterable[bytes]) -> None:
        """Adds several packets to the message's part, as `append` does one after the other.

        `noted` are those of them that are no content.
        """
        if self.size + len(run) <= self._max_size and self.inflight.has_room(len(run)):
            self._add(run, noted)
            return
        for _, start, end in packets(run):  # one of them is where it ends
            self.append(bytes(run[start - PAYLOAD : end]))

    def _add(self, data: bytes | memoryview, noted: Iterable[bytes]) -> None:
        size = len(data)
        if self.refusal is not None or self.refuses_client:
            return
        if self.size + size > self._max_size:
            self._refuse(Refusal.TOO_LARGE, f"it is larger than {self._max_size} bytes")
            return
        if self.claim is None:
            self.claim = Claim(self.inflight)
        if not self.claim.grow(size + self._note(noted)):
            self.refuse_for_room()
            return
        self.size += size
        if len(self._asked) + len(self._recent) + size <= SPOOL_ABOVE:
            self._recent += data
        else:
            self._spool(data)

    def _note(self, noted: Iterable[bytes]) -> int:
        """Notes what log lines and keys need; returns how many bytes more that takes."""
        size = 0
        for packet in noted:
            code = packet[LETTER]
            if code == _MACRO:
                stage = packet[PAYLOAD]
                size += len(packet) - len(self._macros.get(stage, b""))
                self._macros[stage] = packet
                self._queue_id = None
            elif code in _FIRSTS and code not in self._firsts:
                size += len(packet)
                self._firsts[code] = packet
        return size

    def _spool(self, data: bytes | memoryview) -> None:
        """Adds to memory that workers map, or refuses the message where the system has none."""
        try:
            if self._memory is None:
                self._memory = self._new_memory()
            self._flush(self._memory)
            self._memory.append(data)  # without a copy on the way
        except OSError as error:
            self._refuse(Refusal.NO_MEMORY, str(error))

    def _flush(self, memory: Memory) -> None:
        if self._asked:
            memory.append(self._asked)
            self._asked = b""
        if self._recent:
            memory.append(self._recent)
            self._recent.clear()

    def refuse_for_room(self) -> None:
        """The message, which goes on or begins now, is not kept: as much is in hand as may be."""
        self._refuse(Refusal.NO_ROOM, f"{self.inflight.used} bytes are in hand already")

    def _refuse(self, refusal: Refusal, why: str) -> None:
        self.log.warn("{about} is refused: {why}", about=self.about, why=why)
        self.clear_message()
        self.refusal = refusal

    def clear_message(self) -> None:
        """Forgets the message; memory that a job still has stays alive with the job."""
        self.size = 0
        self.refusal = None
        self._asked = b""
        self._recent.clear()
        self._memory = self.claim = None
        self._macros.clear()
        self._firsts.clear()
        self._queue_id = ""

    def clear_client(self) -> None:
        """Forgets client and message; the negotiated options stay."""
        self.clear_message()
        self._slots = {name: packet for name, packet in self._slots.items() if name == b"O"}
        self._head = None
        self._head_claim.set(0)
        self.refuses_client = False

    # What the master itself must know of it

    @property
    def queue_id(self) -> str:
        """The MTA's queue id of the message, or empty."""
        if self._queue_id is None:
            self._queue_id = _find(QUEUE_ID, reversed(self._macros.values()))
        return self._queue_id

    @property
    def about(self) -> str:
        """What log lines call the message."""
        return f"qid={quoted(self.queue_id)}" if self.queue_id else "message without queue id"

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

        `shard_by` is `sender`, `recipient` (the first), `client`, or `session` (this connection).
        """
        if shard_by == "session":
            return id(self).to_bytes(8, "big")
        if shard_by == "client":
            return self.client()
        packet = self._firsts.get(_KEYS.get(shard_by, 0), b"")
        return packet[PAYLOAD:].partition(b"\0")[0].lower()


def _find(names: frozenset[bytes], packets: Iterable[bytes]) -> str:
    """The value of a macro in the first of the packets that has it, or empty."""
    for packet in packets:
        strings = packet[PAYLOAD + 1 :].split(b"\0")
        for name, value in zip(strings[::2], strings[1::2], strict=False):
            if name in names:
                return to_text(value)
    return ""
