"""The outbox: answers that the MTA has not read yet, kept here so that their bytes are counted.

What the socket accepts is sent at once. The rest is given to the transport in slices, each after
the one before was sent. So the number of unread bytes is known, and whether the MTA reads at all.
This works for sockets. Another transport (TLS, in the user's own program) buffers all that it is
given, and reports only that its buffer is full.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet import interfaces
from zope.interface import implementer

from sharded_milter.ipc.sockets import sent_now
from sharded_milter.mta.stream_transport import StreamTransport, is_socket

# Bytes that the transport is given at a time: as many as it writes at a time.
SLICE = 131_072


@implementer(interfaces.IPullProducer)
class Outbox:
    """The unsent answers of one connection.

    `changed` is called when the first bytes stay unread, and whenever the MTA has read some.
    """

    __slots__ = ("_changed", "_is_socket", "_transport", "_waiting", "unread")

    def __init__(self, transport: StreamTransport, changed: Callable[[], None]) -> None:
        self.unread = 0  # bytes that the socket has not accepted
        self._changed = changed
        self._transport = transport
        self._is_socket = is_socket(transport)
        self._waiting = bytearray()  # those of them that the transport was not given yet

    def write(self, data: bytes) -> None:
        """Send `data` after all that was written before."""
        if not self._is_socket:
            self._transport.write(data)
            return
        sent = 0 if self.unread else sent_now(self._transport, data)
        if sent == len(data):
            return
        with memoryview(data) as view, view[sent:] as rest:
            self._waiting += rest
        began = not self.unread
        self.unread += len(data) - sent
        if began:
            self._transport.registerProducer(self, False)  # it calls resumeProducing
            self._changed()

    def resumeProducing(self) -> None:
        """The transport has sent all that it was given: give it the next slice."""
        was_read = len(self._waiting) < self.unread
        self.unread = len(self._waiting)
        if self.unread:
            with memoryview(self._waiting) as view:
                piece = bytes(view[:SLICE])
            del self._waiting[:SLICE]
            self._transport.write(piece)
        else:
            self._transport.unregisterProducer()
        if was_read:
            self._changed()

    def stopProducing(self) -> None:
        """The connection is lost: drop all unread bytes."""
        self.unread = 0
        self._waiting.clear()
