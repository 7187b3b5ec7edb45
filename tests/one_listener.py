"""A reactor that reads when told to, a factory that lists its connections, an open gate."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock

from sharded_milter.descriptors import ReservedDescriptor
from sharded_milter.mta.accepting import Acceptor
from sharded_milter.mta.listener import Listener


class OpenGate:
    """Admits all; `waits` are the delays in seconds that it returns first, one by one."""

    def __init__(self) -> None:
        self.reserved = ReservedDescriptor()
        self.waits: list[float] = []

    def accept_delay(self) -> float:
        return self.waits.pop(0) if self.waits else 0.0


class Connections(Factory):
    """Lists the peers of the connections that it has made a protocol for."""

    def __init__(self) -> None:
        self.peers: list[IAddress | None] = []

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        self.peers.append(addr)
        return Protocol()

    def __len__(self) -> int:
        return len(self.peers)


class Reactor(Clock):
    """Reads of the acceptors that it has; `connections` is a factory for what they accept."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.connections = Connections()
        self._transports: set[Any] = set()
        self._clients: list[socket.socket] = []

    def addReader(self, reader: Any) -> None:
        (self.readers if isinstance(reader, Acceptor) else self._transports).add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def read(self) -> None:
        """Run one reactor iteration."""
        for reader in list(self.readers):
            reader.doRead()

    def clients(self, listener: Listener, count: int) -> list[socket.socket]:
        """Connect `count` clients; they stay connected until `hang_up`."""
        new = [connected(listener) for _ in range(count)]
        self._clients += new
        return new

    def hang_up(self) -> None:
        """All connections end."""
        for end in (*self._clients, *(each.socket for each in self._transports)):
            end.close()


def connected(listener: Listener) -> socket.socket:
    """Return a connected client."""
    if not listener.address.path:
        return socket.create_connection(("127.0.0.1", listener.port), timeout=10)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(listener.address.path)
    return client
