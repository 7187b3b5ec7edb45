"""The master's transcript of a connection: the packets of the MTA that still matter.

The connection's part has one slot for each kind of packet, so a client that repeats HELO uses no
more memory. The message's part grows within limits. Above SPOOL_ABOVE bytes it is moved into
anonymous memory, which workers map instead of receiving a copy once the message is complete. While
it still grows, they receive a copy of the part that is new to them.
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

# Bytes up to which a message is sent in one AMP box, without memory of its own.
SPOOL_ABOVE = MAX_INLINE

# Bytes of a connection's part that are included in CONNECTION_COST. Postfix and Sendmail send about
# a quarter of this.
USUAL_HEAD = 2048

_MACRO = Macro.letter[0]
_SLOTS = (b"O", b"DC", b"C", b"DH", b"H")
_KEYS = {"sender": Mail.letter[0], "recipient": Rcpt.letter[0]}
_FIRST_LETTERS = frozenset(_KEYS.values())
QUEUE_ID = frozenset((b"i", b"{i}"))
MTA = frozenset((b"v", b"{v}"))
# The macro with which the MTA marks a recipient that it has refused itself (SMFIP_RCPT_REJ).
REFUSED_RCPT = b"{rcpt_mailer}\0error\0"


class Refusal(Enum):
    """The reason why a message is not stored."""

    TOO_LARGE = auto()
    NO_ROOM = auto()
    NO_MEMORY = auto()  # the system has no memory left


class Transcript:
    """The packets of one connection."""

    __slots__ = (
        "_first_packets",
        "_frozen",
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
        """`max_size` is the limit for one message; `inflight` counts the bytes of all messages.

        `new_memory` may raise OSError.
        """
        self.size = 0  # bytes of the message's part
        self.refusal: Refusal | None = None  # set once the message is not stored any more
        self.refuses_client = (
            False  # there is no room for the client's packets, so its mail is refused
        )
        self._max_size = max_size
        self.inflight = inflight
        self._slots: dict[bytes, bytes] = {}
        self._head: bytes | None = b""
        self._new_memory = new_memory
        self._head_claim = Claim(inflight)  # for its bytes above USUAL_HEAD
        # Counts the bytes of the message's part; a job that has the part holds the claim too.
        self.claim: Claim | None = None
        # The message's part: the bytes of the last question, which its job shares, or memory;
        # and the bytes that came later.
        self._frozen = b""
        self._memory: Memory | None = None
        self._recent = bytearray()
        self._macros: dict[int, bytes] = {}  # the message's latest macros by stage, for log lines
        self._first_packets: dict[int, bytes] = {}  # the message's first MAIL and RCPT, for `key`
        self._queue_id: str | None = ""  # None: to be looked up in the macros

    def connection_part(self) -> bytes:
        """Return the packets of negotiation, connect and helo, with their macros."""
        if self._head is None:
            self._head = b"".join(self._slots[name] for name in _SLOTS if name in self._slots)
        return self._head

    def message_part(self, *, complete: bool = False) -> bytes | Memory:
        """Return the packets of the message. If `complete`, no packet may be added afterwards.

        Set `refusal` and return b"" if the system has no memory for it.
        """
        if self._memory is None:
            if self._recent:
                self._frozen += self._recent
                self._recent.clear()
            return self._frozen
        try:
            self._flush(self._memory)
            if complete:
                self._memory.seal()
        except OSError as error:
            self._refuse(Refusal.NO_MEMORY, str(error))
            return b""
        return self._memory

    def store(self, packet: bytes) -> bytes:
        """Store a packet of the connection's part in its slot, and return the slot's name.

        Refuse the client if there is no room for the packet. Raise RemoteProtocolError for a packet
        of another kind.
        """
        name = packet[LETTER:PAYLOAD]
        if packet[LETTER] == _MACRO:
            name += packet[PAYLOAD : PAYLOAD + 1]
        if name not in _SLOTS:
            raise RemoteProtocolError(f"packet {name!r} does not belong to the connection's part")
        before = self._slots.get(name, b"")
        self._slots[name] = packet
        self._head = None
        if not self._has_room_for_head():
            self._slots[name] = before
            self._refuse_client(len(packet))
        return name

    def _has_room_for_head(self) -> bool:
        claim = self._head_claim
        # Twice, because it is held as packets and joined for jobs.
        size = 2 * max(0, sum(map(len, self._slots.values())) - USUAL_HEAD)
        if size > claim.size:
            return claim.grow(size - claim.size)
        claim.set(size)
        return True

    def _refuse_client(self, size: int) -> None:
        if not self.refuses_client:
            self.log.warn(
                "a client is refused: {used} bytes are in flight (--max-inflight-bytes), and its"
                " packet has {size} more",
                used=self.inflight.used,
                size=size,
            )
        self.refuses_client = True

    def append(self, packet: bytes) -> None:
        """Add a packet to the message's part; refuse the message if there is no room."""
        self._add(packet, (packet,))

    def extend(self, run: memoryview, others: Iterable[bytes]) -> None:
        """Add several packets to the message's part, with the same effect as `append` for each.

        `others` are those of them that are not content.
        """
        if self.size + len(run) <= self._max_size and self.inflight.has_room(len(run)):
            self._add(run, others)
            return
        for _, start, end in packets(run):  # one of them exceeds the limit
            self.append(bytes(run[start - PAYLOAD : end]))

    def _add(self, data: bytes | memoryview, others: Iterable[bytes]) -> None:
        size = len(data)
        if self.refusal is not None or self.refuses_client:
            return
        if self.size + size > self._max_size:
            self._refuse(Refusal.TOO_LARGE, f"it is larger than {self._max_size} bytes")
            return
        if self.claim is None:
            self.claim = Claim(self.inflight)
        if not self.claim.grow(size + self._remember(others)):
            self.refuse_no_room()
            return
        self.size += size
        if len(self._frozen) + len(self._recent) + size <= SPOOL_ABOVE:
            self._recent += data
        else:
            self._spool(data)

    def _remember(self, others: Iterable[bytes]) -> int:
        """Remember the packets that log lines and keys need; return the bytes that this adds."""
        size = 0
        for packet in others:
            code = packet[LETTER]
            if code == _MACRO:
                stage = packet[PAYLOAD]
                size += len(packet) - len(self._macros.get(stage, b""))
                self._macros[stage] = packet
                self._queue_id = None
            elif code in _FIRST_LETTERS and code not in self._first_packets:
                size += len(packet)
                self._first_packets[code] = packet
        return size

    def _spool(self, data: bytes | memoryview) -> None:
        """Add to the memory that workers map; refuse the message if the system has none."""
        try:
            if self._memory is None:
                self._memory = self._new_memory()
            self._flush(self._memory)
            self._memory.append(data)  # without copying it first
        except OSError as error:
            self._refuse(Refusal.NO_MEMORY, str(error))

    def _flush(self, memory: Memory) -> None:
        if self._frozen:
            memory.append(self._frozen)
            self._frozen = b""
        if self._recent:
            memory.append(self._recent)
            self._recent.clear()

    def refuse_no_room(self) -> None:
        """Refuse the current or next message: there is no room for its bytes."""
        used = self.inflight.used
        self._refuse(Refusal.NO_ROOM, f"{used} bytes are in flight (--max-inflight-bytes)")

    def _refuse(self, refusal: Refusal, why: str) -> None:
        self.log.warn("{about} is refused: {why}", about=self.about, why=why)
        self.clear_message()
        self.refusal = refusal

    def clear_message(self) -> None:
        """Drop the message. Memory that a job refers to lives as long as the job."""
        self.size = 0
        self.refusal = None
        self._frozen = b""
        self._recent.clear()
        self._memory = self.claim = None
        self._macros.clear()
        self._first_packets.clear()
        self._queue_id = ""

    def clear_client(self) -> None:
        """Drop the client's and the message's packets; the negotiated options stay."""
        self.clear_message()
        self._slots = {name: packet for name, packet in self._slots.items() if name == b"O"}
        self._head = None
        self._head_claim.set(0)
        self.refuses_client = False

    # Values that the master itself needs

    @property
    def queue_id(self) -> str:
        """The MTA's queue id of the message; empty if there is none."""
        if self._queue_id is None:
            self._queue_id = _macro_value(QUEUE_ID, reversed(self._macros.values()))
        return self._queue_id

    @property
    def about(self) -> str:
        """The message's name in log lines."""
        return f"qid={quoted(self.queue_id)}" if self.queue_id else "message without queue id"

    def is_recipient_refused(self) -> bool:
        """Return True if the MTA itself has refused the latest recipient."""
        return REFUSED_RCPT in self._macros.get(Rcpt.letter[0], b"")

    def mta(self) -> str:
        """Return the MTA's name and version, such as `Postfix 3.9.0`; empty if it sent none."""
        return _macro_value(MTA, filter(None, [self._slots.get(b"DC")]))

    def client(self) -> bytes:
        """Return the client's CONNECT without its port: equal for all connections of one client."""
        packet = self._slots.get(b"C", b"")
        if not packet:
            return b""
        connect = Connect.parse(packet[PAYLOAD:])
        return Connect(connect.hostname, connect.family, 0, connect.address).encode()

    def key(self, shard_by: str) -> bytes:
        """Return the key that messages for the same shard have in common; empty for none.

        `shard_by` is `sender`, `recipient` (the first), `client`, or `session` (this connection).
        """
        if shard_by == "session":
            return id(self).to_bytes(8, "big")
        if shard_by == "client":
            return self.client()
        packet = self._first_packets.get(_KEYS.get(shard_by, 0), b"")
        return packet[PAYLOAD:].partition(b"\0")[0].lower()


def _macro_value(names: frozenset[bytes], packets: Iterable[bytes]) -> str:
    """Return the value of a macro in the first packet that has it; empty if none has."""
    for packet in packets:
        strings = packet[PAYLOAD + 1 :].split(b"\0")
        for name, value in zip(strings[::2], strings[1::2], strict=False):
            if name in names:
                return to_text(value)
    return ""
