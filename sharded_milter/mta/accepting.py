"""A listening socket in the reactor: it accepts connections, so that each gets a reply.

If no file descriptor is left for another connection, it closes a reserved one first.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from zope.interface import implementer

from sharded_milter.alarms import ReactorTime
from sharded_milter.descriptors import NO_DESCRIPTORS, ReservedDescriptor
from sharded_milter.mta.log_limit import LimitedLog

# Connections accepted in one reactor iteration; established ones are served in between.
ACCEPTS_PER_ITERATION = 100

# Seconds without accepting when not even a reserved descriptor is left.
ACCEPT_PAUSE = 1.0

T = TypeVar("T")


class AcceptGate(Protocol):
    """The gate, as an acceptor uses it."""

    reserved: ReservedDescriptor

    def accept_delay(self) -> float: ...


class AcceptReactor(ReactorTime, Protocol):
    """Twisted's IReactorFDSet and IReactorTime, as far as they are used here."""

    def addReader(self, reader: Any, /) -> None: ...
    def removeReader(self, reader: Any, /) -> None: ...


@implementer(IReadDescriptor)
class Acceptor:
    """Accepts the connections of a listening socket, each for a protocol of the factory."""

    log = Logger()

    def __init__(
        self,
        sock: socket.socket,
        spec: str,
        gate: AcceptGate,
        factory: Factory,
        reactor: AcceptReactor,
    ) -> None:
        """Begin to accept. `spec` is the socket's name in log lines."""
        # Imported here, because until now an operator's mistake is reported without waiting for it.
        from sharded_milter.transports import adopt

        self._adopt = adopt
        self._socket = sock
        self._spec = spec
        self._gate = gate
        self._factory = factory
        self._reactor = reactor
        self._shortages = LimitedLog(self.log.error, reactor.seconds)
        self._closed = False
        gate.reserved.refill()
        reactor.addReader(self)

    def close(self) -> None:
        """Stop accepting. The caller closes the socket."""
        self._closed = True
        self._reactor.removeReader(self)

    # Called by the reactor (IReadDescriptor)

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return self._spec

    def connectionLost(self, reason: object) -> None:
        self.close()

    def doRead(self) -> None:
        """Accept waiting connections, at most ACCEPTS_PER_ITERATION."""
        for _ in range(ACCEPTS_PER_ITERATION):
            self._gate.reserved.refill()
            delay = self._gate.accept_delay()
            if delay:
                self._pause(delay)
                return
            try:
                connection, peer = self._with_reserve(self._accept)
            except (BlockingIOError, ConnectionError):
                return
            except OSError:
                self._pause(ACCEPT_PAUSE)  # the kernel holds new connections until then
                return
            self._adopt(connection, peer, self._factory, self._reactor)

    def _accept(self) -> tuple[socket.socket, Any]:
        return self._socket.accept()

    def _with_reserve(self, act: Callable[[], T]) -> T:
        """Return the result of `act`; release reserved descriptors until it gets those it needs.

        Raise its OSError if it still fails.
        """
        while True:
            try:
                return act()
            except OSError as error:
                if error.errno not in NO_DESCRIPTORS:
                    raise
                line = f"no file descriptor is left for a connection to {self._spec}"
                self._shortages.write(error.errno, f"{line}: {error.strerror}")
                if not self._gate.reserved.release():
                    raise

    def _pause(self, seconds: float) -> None:
        self._reactor.removeReader(self)
        self._reactor.callLater(seconds, self._resume)

    def _resume(self) -> None:
        if not self._closed:
            self._reactor.addReader(self)
