"""A reactor that adopts connections into a list and reads when the test says so; an open gate."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.task import Clock

from sharded_milter.descriptors import Spare
from sharded_milter.mta.listener import Listener


class OpenGate:
    """Lets all in; `waits` says for how long it does not, each time that it is asked."""

    def __init__(self) -> None:
        self.spare = Spare()
        self.waits: list[float] = []

    def wait(self) -> float:
        return self.waits.pop(0) if self.waits else 0.0


class Reactor(Clock):
    """Adopts connections into a list; `refusals` are raised instead, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.adopted: list[tuple[int, Any]] = []
        self.refusals: list[OSError] = []
        self._clients: list[socket.socket] = []

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def adoptStreamConnection(self, fd: int, family: int, factory: Any) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        self.adopted.append((family, factory))

    def read(self) -> None:
        """One turn."""
        for reader in list(self.readers):
            reader.doRead()

    def clients(self, listener: Listener, count: int) -> list[socket.socket]:
        """So many connect; they stay until `hang_up`."""
        new = [connected(listener) for _ in range(count)]
        self._clients += new
        return new

    def hang_up(self) -> None:
        """All clients leave."""
        for client in self._clients:
            client.close()


def connected(listener: Listener) -> socket.socket:
    """A client of the listener."""
    if not listener.address.path:
        return socket.create_connection(("127.0.0.1", listener.port), timeout=10)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(listener.address.path)
    return client
