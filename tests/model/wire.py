"""A UNIX socket between the master and one worker, in memory.

What a worker has sent waits until the master reads it, and what the master sends waits while the
socket is full. Descriptors are duplicated when the socket takes them, as the kernel does it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ampoule.commands import Shutdown
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure


class Wire:
    """The master's end, as a Twisted transport; the worker's end are `push` and `take`."""

    def __init__(self, protocol: Any, clock: Any) -> None:
        self.connected = True
        self.disconnecting = False
        self.dataBuffer = b""  # what the full socket has not taken
        self._tempDataBuffer: tuple[()] = ()
        self.offset = self._tempDataLen = 0
        self.paused = False  # the master does not read
        self.full = False
        self.eof = False  # the worker has closed its end
        self.lost_at: float | None = None  # when the master has noticed, or closed its own
        self.shut_down_at: float | None = None  # when the master has told the worker to leave
        self.faults: list[str] = []  # what no master does
        self.descriptors: dict[int, int] = {}  # the worker's, by their order
        self._protocol = protocol
        self._clock = clock
        self._readable = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._arrived = b""  # what the master has not read
        self._delivered = b""  # what the worker has not read
        self._waiting: list[int] = []  # descriptors to go with the next bytes
        self._passed = 0

    # What Twisted's transports have

    def write(self, data: bytes) -> None:
        if not self.connected:
            return
        self.dataBuffer += data
        if self.shut_down_at is None and Shutdown.commandName in data:
            self.shut_down_at = self._clock.seconds()
        if not self.full:
            self._flush()

    def writeSomeData(self, data: bytes) -> int:
        if self.full:
            return 0
        self.write(data)
        return len(data)

    def sendFileDescriptor(self, descriptor: int) -> None:
        self._waiting.append(descriptor)

    def loseConnection(self) -> None:
        if self.connected and not self.disconnecting:
            self.disconnecting = True
            self._clock.callLater(0, self.lose)

    abortConnection = loseConnection

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def fileno(self) -> int:
        return self._readable

    def doRead(self) -> object:
        """Hands on what has arrived; not None at the end of it."""
        if not self.connected:
            return ConnectionDone()
        data, self._arrived = self._arrived, b""
        if data:
            if not self.eof:
                os.eventfd_read(self._readable)
            self._protocol.dataReceived(data)
            return None
        return ConnectionDone() if self.eof else None

    def getPeer(self) -> str:
        return "worker"

    getHost = getPeer

    # The socket

    @property
    def is_readable(self) -> bool:
        """Whether the master's reactor would read."""
        return self.connected and not self.paused and bool(self._arrived or self.eof)

    def deliver(self) -> None:
        """The master's reactor finds that the socket is readable."""
        if self.is_readable and self.doRead() is not None:
            self.lose()

    def lose(self) -> None:
        """The master's end is closed."""
        if self.connected:
            self.connected, self.lost_at = False, self._clock.seconds()
            self.dataBuffer = b""  # the kernel never had it
            self._waiting.clear()
            os.close(self._readable)
            self._protocol.connectionLost(Failure(ConnectionDone()))

    def fill(self) -> None:
        """The socket takes nothing."""
        self.full = True

    def drain(self) -> None:
        """The socket takes all again."""
        self.full = False
        if self.dataBuffer:
            self._flush()

    def _flush(self) -> None:
        for descriptor in self._waiting:
            try:
                self.descriptors[self._passed] = os.dup(descriptor)
            except OSError:
                self.faults.append("a descriptor was closed before the socket took it")
            self._passed += 1
        self._waiting.clear()
        self._delivered += self.dataBuffer
        self.dataBuffer = b""

    # The worker's end

    def push(self, data: bytes) -> None:
        """The worker sends; the master has not read it yet."""
        if self.connected and not self.eof:
            self._arrived += data
            os.eventfd_write(self._readable, 1)

    def close(self) -> None:
        """The worker closes its end."""
        if self.connected and not self.eof:
            self.eof = True
            os.eventfd_write(self._readable, 1)

    def take(self) -> Iterator[dict[bytes, bytes]]:
        """The boxes that the worker can read now."""
        data, self._delivered = self._delivered, b""
        return boxes(data)

    def close_descriptors(self) -> None:
        """The worker is gone, with what it had."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()


def boxes(data: bytes) -> Iterator[dict[bytes, bytes]]:
    """The complete AMP boxes of which the bytes consist."""
    box: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        key, at = _prefixed(data, at)
        if not key:
            yield box
            box = {}
            continue
        box[key], at = _prefixed(data, at)
    assert not box


def _prefixed(data: bytes, at: int) -> tuple[bytes, int]:
    start = at + 2
    end = start + int.from_bytes(data[at:start], "big")
    return data[start:end], end
