"""AMP boxes on a socket: written at once, and parsed without one call for each string.

The format is AMP's: keys and values, each preceded by its length in two bytes, then two NULs. Each
byte is parsed once, in pieces of any size, and no more is buffered than one box may have.
"""

from __future__ import annotations

from typing import Any

from twisted.protocols import amp
from twisted.protocols.amp import AmpBox

from sharded_milter.errors import BrokenRule
from sharded_milter.ipc.arrivals import ReceivedDescriptors
from sharded_milter.ipc.sockets import send_now

# No message of ours has more values, and AMP limits each: so no box is longer than 526 KB.
MAX_VALUES = 8

# AMP's own limit on the length of a key; a longer one is no AMP.
MAX_KEY = amp.MAX_KEY_LENGTH

_LENGTH = 2

# Skips AmpBox's constructor, which would process keys that a new box does not have.
_new_box = AmpBox.__new__


class Boxes:
    """A mix-in for AMP protocols, which handle each box in `ampBoxReceived`."""

    transport: Any
    ampBoxReceived: Any
    _unread = b""  # an incomplete value, or data that came while a box was handled
    _reading = False
    _paused = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._box = _new_box(AmpBox)  # the one that is being parsed
        self._arrived = ReceivedDescriptors()

    def sendBox(self, box: Any) -> None:
        """Send one box."""
        send_now(self.transport, box.serialize())

    def broke_rule(self, rule: str) -> None:
        """Stop reading and close the connection: the other end has broken a rule."""
        self.pause()
        self.transport.loseConnection()

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """Keep a descriptor until a box claims it."""
        try:
            self._arrived.add(descriptor)
        except BrokenRule as rule:
            self.broke_rule(str(rule))

    def dataReceived(self, data: bytes) -> None:
        """Handle all boxes that are complete now.

        The handling of a box may read from the same socket; those boxes are handled after it.
        """
        self._unread += data
        if self._reading:
            return
        self._reading, start, complete = True, 0, True
        try:
            while complete and start < len(self._unread) and not self._paused:
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

    def pause(self) -> None:
        """Stop reading until `resume`."""
        self._paused = True
        if self.transport is not None:  # else the connection is lost
            self.transport.pauseProducing()

    def resume(self) -> None:
        """Continue reading."""
        self._paused = False
        if self.transport is not None:
            self.transport.resumeProducing()
        self.dataReceived(b"")


def _read_on(box: AmpBox, data: bytes, at: int) -> tuple[bool, int]:
    """Parse `data` from `at` into the box; return whether it is complete, and the rest's offset.

    Raise BrokenRule for data that is not a box of ours.
    """
    size = len(data)
    while at + _LENGTH <= size:
        length = data[at] << 8 | data[at + 1]
        if not length:
            return True, at + _LENGTH
        if length > MAX_KEY:
            raise BrokenRule(
                f"it has sent a box with a key of {length} bytes (the limit is {MAX_KEY})"
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
