"""A socket pair in memory: bytes and descriptors arrive when the test says so."""

from __future__ import annotations

import os
from typing import Any

#: A pipe in which nothing is written: one end is never readable, the other always writable.
SILENT, WRITABLE = os.pipe()


class Link:
    """One end. Descriptors are sent as the kernel sends them: as duplicates, in order."""

    connected = True
    disconnecting = False
    dataBuffer = b""
    _tempDataBuffer: tuple[()] = ()
    offset = _tempDataLen = 0
    socket: Any = None  # it has lost no descriptor
    paused = False

    def __init__(self) -> None:
        self.sent: list[bytes | int] = []
        self.lost = False
        self.descriptors_lost = 0

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def fileno(self) -> int:
        return SILENT

    def writeSomeData(self, data: bytes) -> int:
        self.write(data)
        return len(data)

    def sendFileDescriptor(self, fd: int) -> None:
        self.sent.append(os.dup(fd))

    def loseConnection(self) -> None:
        self.lost = True

    abortConnection = loseConnection

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def getPeer(self) -> str:
        return "peer"

    getHost = getPeer


def deliver(*ways: tuple[Link, Any]) -> None:
    """Everything that was sent on a link arrives at its receiver, and so on until all is still."""
    while any(link.sent for link, _ in ways):
        for link, receiver in ways:
            sent, link.sent = link.sent, []
            for what in sent:
                if isinstance(what, int):
                    receiver.fileDescriptorReceived(what)
                else:
                    receiver.dataReceived(what)
