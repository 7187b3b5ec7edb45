"""A listening socket in the reactor: it takes connections, and leaves none without an answer.

Where no descriptor is left for another one, a spare one is given up for it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from zope.interface import implementer

from sharded_milter.descriptors import NONE_LEFT, Spare
from sharded_milter.mta.rarely import Rarely

# Connections taken in one turn of the reactor; established ones get their turn in between.
ACCEPTS_PER_TURN = 100

# Seconds without accepting when not even a spare descriptor is left.
ACCEPT_PAUSE = 1.0

T = TypeVar("T")


class Gate(Protocol):
    """Who decides which connections are served."""

    spare: Spare

    def wait(self) -> float: ...


@implementer(IReadDescriptor)
class Acceptor:
    """Gives every connection of a listening socket to a protocol of a factory."""

    log = Logger()

    def __init__(
        self, sock: socket.socket, spec: str, gate: Gate, factory: Factory, reactor: Any
    ) -> None:
        """Begins at once; `spec` is what log lines call the socket."""
        # Imported now, because until here a mistake is answered without waiting for Twisted's TCP.
        from sharded_milter.transports import adopt

        self._adopt = adopt
        self._socket = sock
        self._spec = spec
        self._gate = gate
        self._factory = factory
        self._reactor = reactor
        self._none_left = Rarely(self.log.error, reactor.seconds)
        self._closed = False
        gate.spare.refill()
        reactor.addReader(self)

    def close(self) -> None:
        """Takes no more; the socket is the caller's."""
        self._closed = True
        self._reactor.removeReader(self)

    # What the reactor calls (IReadDescriptor)

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return self._spec

    def connectionLost(self, reason: object) -> None:
        self.close()

    def doRead(self) -> None:
        """Takes connections until none is left, but not so many that others starve."""
        for _ in range(ACCEPTS_PER_TURN):
            self._gate.spare.refill()
            wait = self._gate.wait()
            if wait:
                self._pause(wait)
                return
            try:
                connection, peer = self._with_spare(self._accept)
            except (BlockingIOError, ConnectionError):
                return
            except OSError:
                self._pause(ACCEPT_PAUSE)  # the kernel holds new connections until then
                return
            self._adopt(connection, peer, self._factory, self._reactor)

    def _accept(self) -> tuple[socket.socket, Any]:
        return self._socket.accept()

    def _with_spare(self, act: Callable[[], T]) -> T:
        """What `act` returns, once enough spare descriptors are given up for it."""
        while True:
            try:
                return act()
            except OSError as error:
                if error.errno not in NONE_LEFT:
                    raise
                line = f"no file descriptor is left for a connection to {self._spec}"
                self._none_left.say(error.errno, f"{line}: {error.strerror}")
                if not self._gate.spare.give():
                    raise

    def _pause(self, seconds: float) -> None:
        self._reactor.removeReader(self)
        self._reactor.callLater(seconds, self._resume)

    def _resume(self) -> None:
        if not self._closed:
            self._reactor.addReader(self)
