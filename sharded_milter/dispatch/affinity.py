"""Session affinity: which shard has a milter's object of one connection, and what it has received.

All jobs of such an object go to one shard, and each carries only the new part of the transcript.
When that shard is lost, the next job goes to a new object with the whole transcript. If the milter
is not replayable, the current message is lost with its object.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sharded_milter.ipc.memory import Memory, packed, passable
from sharded_milter.protocol.commands import Abort

_ABORT = Abort().encode()


class SessionUpdate(NamedTuple):
    """The part of a transcript that an object has not received yet.

    `session` is the object's number. `message` begins at byte `start`.
    """

    session: int
    start: int
    connection: bytes | Memory
    message: bytes | Memory


class ObjectAffinity:
    """The master's record of one milter's object of one connection."""

    __slots__ = (
        "_aborted",
        "_before",
        "_replayable",
        "_sent",
        "_unsent",
        "exists",
        "holder",
        "lost",
        "number",
    )

    def __init__(self, *, replayable: bool) -> None:
        self.holder: Any = None  # has the object, or will: a pipeline or an InMaster
        self.number = 0  # of the object at its holder
        self.exists = False
        self.lost = False  # the current message is lost with its object
        self._replayable = replayable
        self._sent = 0  # bytes of the message part that the object has
        self._aborted = False
        # By slot of the transcript, so that repeated commands take no more memory.
        self._unsent: dict[bytes, bytes] = {}
        # The state before the last update, in case that cannot be sent.
        self._before: tuple[bool, int, bool, dict[bytes, bytes]] | None = None

    def add_packet(self, slot: bytes, packet: bytes) -> None:
        """Add a packet that was stored in a slot of the transcript's connection part."""
        if self.exists:
            self._unsent.pop(slot, None)  # so that the packet is last in order
            self._unsent[slot] = packet

    def end_message(self) -> None:
        """End the current message: it is answered, or the MTA has dropped it."""
        self._aborted = self._aborted or self._sent > 0
        self._sent = 0
        self.lost = False

    def undo_update(self) -> None:
        """Record the last update as not sent."""
        if self._before is not None:
            self.exists, self._sent, self._aborted, self._unsent = self._before
            self._before = None

    def assign(self, holder: Any, number: int) -> None:
        """Assign a new object, which has received nothing yet, to a holder."""
        self.holder, self.number = holder, number
        self._forget()

    def lose_object(self) -> None:
        """Record that the object is lost with its holder."""
        self.lost = self.lost or (self._sent > 0 and not self._replayable)
        self.holder = None
        self._forget()

    def _forget(self) -> None:
        self.exists, self._sent, self._aborted = False, 0, False
        self._unsent.clear()

    def next_update(self, connection: bytes | Memory, message: bytes | Memory) -> SessionUpdate:
        """Return what is new of these parts for the object, and record it as sent.

        Raise OSError, and record nothing, where the system has no memory for it.
        """
        start = self._sent
        if self.exists:
            abort = _ABORT if self._aborted else b""
            connection = packed(abort + b"".join(self._unsent.values()))
        rest = passable(message, start)
        if rest is not message:
            start = 0
        self._before = (self.exists, self._sent, self._aborted, self._unsent)
        self._sent = len(message)
        self.exists, self._aborted, self._unsent = True, False, {}
        return SessionUpdate(self.number, start, connection, rest)
