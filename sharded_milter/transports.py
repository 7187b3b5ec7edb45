"""Transports of stream sockets: Twisted's own, with a shorter way to the system calls.

Twisted takes each read and each write through four more functions, and looks for descriptors in
each read of a UNIX socket. Without that a short message costs the master 6 % fewer instructions.
"""

from __future__ import annotations

import array
import errno
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from twisted.internet import tcp, unix
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IProtocol
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Factory

from sharded_milter.closing import CLOSING

# Bytes of ancillary data of one read: more descriptors than the kernel passes with it (253).
_ANCILLARY = 4096

# What the system says of writing to an end that is closed.
_CLOSED = (errno.EPIPE, errno.ECONNRESET)

_UNNAMED: Any = UNIXAddress(None)
_ADDRESSES = {socket.AF_INET: IPv4Address, socket.AF_INET6: IPv6Address}


class TcpTransport(tcp.Server):
    """A TCP connection: one call reads, and one call writes.

    Its protocol has `fill`, which calls what it is given with a buffer to receive into and returns
    the number of bytes, and `filled`, which processes them.
    """

    _is_reading = False  # the protocol is being given what has arrived
    _is_over = False  # it has closed the connection meanwhile, and all is written

    def doRead(self) -> ConnectionDone | ConnectionLost | None:  # type: ignore[override]
        """Pass on what has arrived. Return why the connection has ended, or None."""
        protocol: Any = self.protocol
        try:
            size = protocol.fill(self.socket.recv_into)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        if not size:
            return CONNECTION_DONE
        self._is_reading = True
        try:
            protocol.filled()
        finally:
            self._is_reading = False
        return CONNECTION_DONE if self._is_over else None

    def writeSomeData(self, data: bytes) -> int | ConnectionLost:
        """Return how many bytes the socket has taken, or why it takes none any more."""
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            return 0 if error.errno == errno.ENOBUFS else CONNECTION_LOST

    def loseConnection(self) -> None:
        """Close the connection once all is written: at the end of `doRead` if it is already.

        Twisted waits for the socket to be writable first, which costs another reactor iteration.
        """
        waits = self.dataBuffer or self._tempDataBuffer or self.producer is not None
        if self._is_reading and not waits:
            self.disconnecting = self._is_over = True
        else:
            super().loseConnection()


class UnixTransport(TcpTransport, unix.Server):
    """A connection of a UNIX socket, by which no descriptors come: the kernel closes them."""


class PassingTransport(TcpTransport, unix.Server):
    """One end of a socket pair that passes descriptors.

    `descriptors_lost` counts the reads with which the kernel has dropped some, because this process
    had no number left for them.
    """

    descriptors_lost = 0

    @classmethod
    def connect(cls, sock: socket.socket, protocol: IProtocol, reactor: Any) -> None:
        """Connect `protocol` to the socket."""
        protocol.makeConnection(cls(sock, protocol, "", None, 0, reactor))

    def doRead(self) -> ConnectionDone | ConnectionLost | None:  # type: ignore[override]
        """Pass on what has arrived, descriptors first, as `TcpTransport.doRead` does."""
        try:
            data, ancillary, flags, _ = self.socket.recvmsg(self.bufferSize, _ANCILLARY)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        if flags & socket.MSG_CTRUNC:
            self.descriptors_lost += 1
        if ancillary:
            self._hand_on(_descriptors(ancillary))
        if not data:
            return CONNECTION_DONE
        self.protocol.dataReceived(data)
        return None

    def _hand_on(self, descriptors: list[int]) -> None:
        """Give the protocol each of them; where it raises an error, the rest is closed."""
        protocol: Any = self.protocol
        try:
            while descriptors:
                protocol.fileDescriptorReceived(descriptors.pop(0))
        finally:
            for fd in descriptors:
                CLOSING.close(fd)

    def writeSomeData(self, data: bytes) -> int | ConnectionLost:
        """As `TcpTransport` does; descriptors that wait leave with the first bytes.

        What is written to an end that is closed is dropped: the connection's end is found by
        reading, behind all that the other end has sent before it.

        Raise OSError (ETOOMANYREFS) where the system passes no descriptors now, because processes
        of this user have too many on their way. Nothing has left then, and none waits any more.
        """
        waiting = self._sendmsgQueue
        try:
            if not waiting:
                return self.socket.send(data)
            numbers = array.array("i", waiting)
            sent = self.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return 0
            if error.errno in _CLOSED:
                waiting.clear()
                return len(data)
            if error.errno == errno.ETOOMANYREFS:
                waiting.clear()
                raise
            return CONNECTION_LOST
        waiting.clear()
        return sent

    def doWrite(self) -> ConnectionDone | ConnectionLost | None:  # type: ignore[override]
        """Write what waits. Return why the connection has ended, or None.

        Bytes whose descriptors the system does not pass leave without them: the other end misses
        them as if the kernel had dropped them on their way.
        """
        why: ConnectionDone | ConnectionLost | None
        try:
            why = super().doWrite()
        except OSError:
            why = super().doWrite()
        return why

    def _closeSocket(self, orderly: bool) -> None:
        """Shut the socket down, and leave it to the closing thread.

        The kernel closes with it the descriptors that were not read from it.
        """
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        fd = self.socket.detach()
        if fd >= 0:
            CLOSING.close(fd)


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
    return found.tolist()


def adopt(connection: socket.socket, peer: Any, factory: Factory, reactor: Any) -> None:
    """Give an accepted connection of `peer` to a protocol of the factory."""
    connection.setblocking(False)
    kind: Any = TcpTransport
    port, address = 0, _UNNAMED
    if connection.family == socket.AF_UNIX:
        kind = UnixTransport
    else:
        port = peer[1]
        address = _ADDRESSES[connection.family]("TCP", *peer)
    protocol: Any = factory.buildProtocol(address)
    transport: Any = kind(connection, protocol, peer, None, port, reactor)
    transport.repstr = transport.logstr  # Twisted names it by the port that has accepted it
    protocol.makeConnection(transport)
