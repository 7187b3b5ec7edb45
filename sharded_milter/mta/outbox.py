"""Answers that an MTA has not read yet, kept here so that they can be counted.

What the socket takes leaves at once. The rest is handed to the transport slice by slice, each when
the one before has left; so it is known how much is unread, and whether the MTA reads at all. That
holds for sockets; another transport (TLS, in a program of one's own) keeps what it is given, and
says only when that is too much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet import interfaces
from zope.interface import implementer

from sharded_milter.ipc.sockets import sent_now

# Bytes that the transport is given at a time: as many as it writes at a time.
SLICE = 131_072


def is_socket(transport: Any) -> bool:
    """Whether it is one of Twisted's sockets, whose buffer is known."""
    return hasattr(transport, "dataBuffer")


@implementer(interfaces.IPullProducer)
class Outbox:
    """The answers of one connection on their way.

    `changed` is called when some are left unread where none were, and whenever some are taken.
    """

    __slots__ = ("_changed", "_is_socket", "_transport", "_waiting", "unread")

    def __init__(self, transport: Any, changed: Callable[[], None]) -> None:
        self.unread = 0  # bytes that the socket has not taken
        self._changed = changed
        self._transport = transport
        self._is_socket = is_socket(transport)
        self._waiting = bytearray()  # those of them that the transport has not been given

    def write(self, data: bytes) -> None:
        """Sends all of `data`, in its turn."""
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
            self._transport.registerProducer(self, False)  # which calls resumeProducing
            self._changed()

    def resumeProducing(self) -> None:
        """The transport has nothing left, so all that it was given is taken."""
        taken = len(self._waiting) < self.unread
        self.unread = len(self._waiting)
        if self.unread:
            with memoryview(self._waiting) as view:
                piece = bytes(view[:SLICE])
            del self._waiting[:SLICE]
            self._transport.write(piece)
        else:
            self._transport.unregisterProducer()
        if taken:
            self._changed()

    def stopProducing(self) -> None:
        """The connection is lost: what is unread will not be read."""
        self.unread = 0
        self._waiting.clear()
