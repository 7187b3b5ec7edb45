"""AMP's boxes on a socket, sent at once and read without a call a string.

The format is AMP's: keys and values, each behind its length in two bytes, then two NULs. What is
read is looked at once, in whatever pieces it comes, and no more is kept than a box may hold.
"""

from __future__ import annotations

from typing import Any

from twisted.protocols import amp
from twisted.protocols.amp import AmpBox

from sharded_milter.errors import BrokenRule
from sharded_milter.ipc.arrivals import Arrivals
from sharded_milter.ipc.sockets import send_now

# No message of ours has more values, and AMP bounds each: so no box is longer than 526 KB.
MAX_VALUES = 8

# AMP's own limit on the length of a key; a longer one is no AMP.
MAX_KEY = amp.MAX_KEY_LENGTH

_LENGTH = 2

# Without AmpBox's own constructor, which looks at keys that are not there.
_new_box = AmpBox.__new__


class Boxes:
    """Mixed into an AMP protocol, which handles each box in `ampBoxReceived`."""

    transport: Any
    ampBoxReceived: Any
    _unread = b""  # the beginning of a value, or what has come while a box was handled
    _reading = False
    _held = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._box = _new_box(AmpBox)  # the one that is being read
        self._arrived = Arrivals()

    def sendBox(self, box: Any) -> None:
        """Sends one box."""
        send_now(self.transport, box.serialize())

    def broke_rule(self, rule: str) -> None:
        """The other end has sent what it may not: nothing more is read from it."""
        self.hold()
        self.transport.loseConnection()

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """Keeps one that a box will speak of."""
        try:
            self._arrived.add(descriptor)
        except BrokenRule as rule:
            self.broke_rule(str(rule))

    def dataReceived(self, data: bytes) -> None:
        """Takes all boxes that are complete now.

        What a box leads to may read from the same socket: those boxes come behind it.
        """
        self._unread += data
        if self._reading:
            return
        self._reading, start, complete = True, 0, True
        try:
            while complete and start < len(self._unread) and not self._held:
                complete, start = _read_on(self._box, self._unread, start)
                if complete:
                    box, self._box = self._box, _new_box(AmpBox)
                    self.ampBoxReceived(box)
        except BrokenRule as rule:
            start = len(self._unread)
            self.broke_rule(str(rule))
        finally:
            self._reading = False
            self._unread = self._unread[start:]

    def hold(self) -> None:
        """Reads nothing more for now."""
        self._held = True
        if self.transport is not None:  # else the connection is lost
            self.transport.pauseProducing()

    def go_on(self) -> None:
        """Reads on."""
        self._held = False
        if self.transport is not None:
            self.transport.resumeProducing()
        self.dataReceived(b"")


def _read_on(box: AmpBox, data: bytes, at: int) -> tuple[bool, int]:
    """Puts into the box what is there of it; whether that is all, and where the rest begins.

    Raises BrokenRule for what is no box of ours.
    """
    size = len(data)
    while at + _LENGTH <= size:
        length = data[at] << 8 | data[at + 1]
        if not length:
            return True, at + _LENGTH
        if length > MAX_KEY:
            raise BrokenRule(
                f"it has sent no box: a key of {length} bytes (the limit is {MAX_KEY})"
            )
        start = at + _LENGTH
        middle = start + length
        if middle + _LENGTH > size:
            break
        end = middle + _LENGTH + (data[middle] << 8 | data[middle + 1])
        if end > size:
            break
        count = len(box)
        if count == MAX_VALUES:
            raise BrokenRule(f"it has sent a box of more than {MAX_VALUES} values")
        box[data[start:middle]] = data[middle + _LENGTH : end]
        if len(box) == count:
            raise BrokenRule(f"it has sent a box with two values for {data[start:middle]!r}")
        at = end
    return False, at
