"""Session affinity: where a milter's object of one connection is, and what it has been told.

A milter that is an object is asked in one place, with what is new and no more. When that place is
lost, the next question goes to a new object with all there is, unless the milter cannot be
rebuilt: then the message in hand is lost with its object.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sharded_milter.ipc.memory import Memory, packed, passable
from sharded_milter.protocol.commands import Abort

_ABORT = Abort().encode()


class News(NamedTuple):
    """What an object has not been told yet; the part of the message begins at `start`."""

    session: int
    start: int
    connection: bytes | Memory
    message: bytes | Memory


class Affinity:
    """One milter's object of one connection, as the master knows it."""

    __slots__ = ("_aborted", "_news", "_replayable", "_told", "exists", "holder", "lost", "number")

    def __init__(self, *, replayable: bool) -> None:
        self.holder: Any = None  # who has the object, or is to have it
        self.number = 0  # of the object there
        self.exists = False
        self.lost = False  # the object is lost, and the message in hand with it
        self._replayable = replayable
        self._told = 0  # bytes of the message's part that the object has
        self._aborted = False
        self._news: dict[bytes, bytes] = {}  # by slot; a client may greet for ever

    def learn(self, slot: bytes, packet: bytes) -> None:
        """A packet of the connection's part was kept in a slot."""
        if self.exists:
            self._news.pop(slot, None)  # order matters: the latest comes last
            self._news[slot] = packet

    def message_over(self) -> None:
        """The message in hand is answered, or dropped: the next one begins anew."""
        self._aborted = self._aborted or self._told > 0
        self._told = 0
        self.lost = False

    def settle(self, holder: Any, number: int) -> None:
        """There is to be a new object, which knows nothing yet."""
        self.holder, self.number = holder, number
        self._forget()

    def lose(self) -> None:
        """The holder is gone with the object."""
        self.lost = self.lost or (self._told > 0 and not self._replayable)
        self.holder = None
        self._forget()

    def _forget(self) -> None:
        self.exists, self._told, self._aborted = False, 0, False
        self._news.clear()

    def tell(self, connection: bytes | Memory, message: bytes | Memory) -> News:
        """What the object must be told of these parts; it counts as told.

        Raises OSError, and nothing counts as told, where the system has no memory for it.
        """
        start = self._told
        if self.exists:
            connection = packed((_ABORT if self._aborted else b"") + b"".join(self._news.values()))
        news = passable(message, start)
        if news is not message:
            start = 0
        self._told = len(message)
        self.exists, self._aborted = True, False
        self._news.clear()
        return News(self.number, start, connection, news)
