"""Sending and reading at once, and reading AMP's boxes quickly.

A Twisted transport writes in the reactor's next turn, which costs two calls of epoll_ctl and that
turn; what can leave now leaves now.
"""

from __future__ import annotations

import select
from collections.abc import Iterable
from typing import Any

from twisted.protocols.amp import AmpBox


def send_now(transport: Any, data: bytes) -> None:
    """Writes all of `data`; what the socket does not take now leaves as it always would."""
    if is_still(transport):
        sent = transport.writeSomeData(data)
        if isinstance(sent, int):  # else the connection is lost, which the reactor finds out too
            if sent == len(data):
                return
            data = data[sent:]
    transport.write(data)


def is_still(transport: Any) -> bool:
    """Whether nothing waits to be written: nothing would be overtaken, descriptors included."""
    return (
        bool(getattr(transport, "connected", False))
        and not transport.disconnecting
        and not getattr(transport, "dataBuffer", True)
        and not getattr(transport, "_tempDataBuffer", True)
    )


def read_now(readers: Iterable[Any], most: int) -> None:
    """Has Twisted's readers take what has arrived for them, in so many reads of each at most."""
    by_descriptor = {reader.fileno(): reader for reader in readers}
    poll = select.poll()  # one call says that there is nothing, as there is most of the time
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    for _ in range(most):
        said = poll.poll(0)
        if not said:
            break
        for descriptor, _ in said:
            if by_descriptor[descriptor].doRead() is not None:  # that was its end
                poll.unregister(descriptor)


# AMP's own limit on the length of a key; a longer one is no AMP.
MAX_KEY = 0xFF

_LENGTH = 2

# Without AmpBox's own constructor, which looks at keys that are not there.
_new_box = AmpBox.__new__


class QuickBoxes:
    """Mixed into an AMP protocol: its boxes leave at once, and are read without a call a string.

    The format is AMP's: keys and values, each behind its length in two bytes, then two NULs.
    """

    transport: Any
    ampBoxReceived: Any
    _unread = b""

    def sendBox(self, box: Any) -> None:
        """Sends one box."""
        send_now(self.transport, box.serialize())

    def dataReceived(self, data: bytes) -> None:
        """Takes all boxes that are complete now; who sends anything else is not listened to."""
        unread = self._unread + data if self._unread else data
        start = 0
        while True:
            box, end = _box_at(unread, start)
            if box is None:
                break
            start = end
            self.ampBoxReceived(box)
        self._unread = unread[start:]
        if end < 0:
            self._unread = b""
            self.transport.loseConnection()


def _box_at(data: bytes, at: int) -> tuple[AmpBox | None, int]:
    """The box that begins there and where it ends; None if it is not complete, -1 if it is none."""
    box = _new_box(AmpBox)
    size = len(data)
    while at + _LENGTH <= size:
        length = data[at] << 8 | data[at + 1]
        at += _LENGTH
        if not length:
            return box, at
        if length > MAX_KEY:
            return None, -1
        key = data[at : at + length]
        at += length
        if at + _LENGTH > size:
            break
        length = data[at] << 8 | data[at + 1]
        at += _LENGTH
        if at + length > size:
            break
        box[key] = data[at : at + length]
        at += length
    return None, 0
