"""A pin: where a milter's object of one connection lives, and what it has been told so far.

A milter that is an object is asked in one place, with nothing but what is new. Whoever answers
settles the pin; when that place is lost the next question goes to a new object, with all there
is, unless the milter cannot be rebuilt and the message in hand is lost with its object.
"""

from __future__ import annotations

from typing import Any

from sharded_milter.ipc.messages import Memory, Question, blob
from sharded_milter.protocol.commands import Abort

_ABORT = Abort().encode()


class Pin:
    """One milter's object of one connection, as the master knows it."""

    __slots__ = ("_aborted", "_news", "_replayable", "_told", "broken", "known", "number", "place")

    def __init__(self, *, replayable: bool) -> None:
        self.place: Any = None  # the shard that has the object, or is to have it
        self.number = 0  # of the object there
        self.known = False  # whether there is an object
        self.broken = False  # the object was lost, and the message in hand with it
        self._replayable = replayable
        self._told = 0  # bytes of the message's part that the object has
        self._aborted = False
        self._news: dict[bytes, bytes] = {}  # by slot; a client may greet for ever

    def learn(self, slot: bytes, packet: bytes) -> None:
        """A packet of the connection's part was kept in a slot."""
        if self.known:
            self._news.pop(slot, None)  # order matters: the latest comes last
            self._news[slot] = packet

    def message_over(self) -> None:
        """The message in hand is answered, or dropped: the next one begins anew."""
        self._aborted = self._aborted or self._told > 0
        self._told = 0
        self.broken = False

    def settle(self, place: Any, number: int) -> None:
        """There is to be a new object, which knows nothing yet."""
        self.place, self.number = place, number
        self._forget()

    def lose(self) -> None:
        """The place is gone with the object."""
        self.broken = self.broken or (self._told > 0 and not self._replayable)
        self.place = None
        self._forget()

    def _forget(self) -> None:
        self.known, self._told, self._aborted = False, 0, False
        self._news.clear()

    def question(
        self, stage: bytes, connection: bytes | Memory, message: bytes | Memory, milter: int,
        command: bytes | Memory,
    ) -> Question:  # fmt: skip
        """What the object must be told for this; it counts as told.

        Raises OSError, and nothing counts as told, where the system has no memory for it.
        """
        start = self._told
        if self.known:
            connection = blob((_ABORT if self._aborted else b"") + b"".join(self._news.values()))
        self._told = len(message) if isinstance(message, bytes) else message.size
        self.known, self._aborted = True, False
        self._news.clear()
        if isinstance(message, bytes):
            message, start = message[start:], 0
        return Question(stage, connection, message, milter, self.number, start, command)
