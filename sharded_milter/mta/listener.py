"""Listening sockets: how they are opened and served."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from zope.interface import implementer

from sharded_milter.errors import (
    ConfigError,
    NotPermitted,
    SocketTaken,
    StartError,
    SystemRefused,
)
from sharded_milter.mta.addresses import Address
from sharded_milter.mta.unix_path import UnixPath

# Connections that the kernel holds while the reactor is busy; the kernel's own limit
# (net.core.somaxconn) is 4096 on Linux.
BACKLOG = 1024

# Connections taken in one turn of the reactor; established ones get their turn in between.
ACCEPTS_PER_TURN = 100

# Seconds without accepting when the system has no descriptor left.
ACCEPT_PAUSE = 1.0


@implementer(IReadDescriptor)
class Listener:
    """A listening socket: bound first, so that a conflict is known early; served later.

    Sockets are ours and not Twisted's ports, which bind and listen at once, open a UNIX socket
    to the world for a moment, and remove its path even when it is another server's by then.
    """

    log = Logger()

    def __init__(self, address: Address, mode: int, group: str) -> None:
        """Binds. A UNIX socket that nobody serves any more is taken over.

        `mode` and `group` are those of a UNIX socket, an empty group leaves it as it is. Raises
        SocketTaken, NotPermitted, ConfigError or SystemRefused, naming the socket and the reason.
        """
        self.address = address
        self._path: UnixPath | None = None
        self._reactor: Any = None
        self._factory: Any = None
        self._accepted: socket.socket | None = None  # and not given to a protocol yet
        try:
            if address.path:
                self._path = UnixPath(address.path, mode, group)
            self._socket = self._path.socket if self._path is not None else _bound(address)
        except OSError as error:
            raise _explained(address, error) from None

    @property
    def port(self) -> int:
        """The TCP port that is really bound; 0 for a path."""
        return 0 if self.address.path else int(self._socket.getsockname()[1])

    def serve(self, factory: Factory, reactor: Any) -> None:
        """Listens, and gives every connection to a protocol of `factory`.

        Raises SocketTaken when another server has taken the place since it was bound.
        """
        self._factory, self._reactor = factory, reactor
        try:
            if self._path is not None and not self._path.is_ours():
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            self._socket.listen(BACKLOG)
        except OSError as error:
            raise _explained(self.address, error) from None
        self._socket.setblocking(False)
        reactor.addReader(self)

    def close(self) -> None:
        """Stops listening and removes the path, unless somebody else has taken that."""
        if self._reactor is not None:
            self._reactor.removeReader(self)
            self._reactor = None
        self._socket.close()
        if self._accepted is not None:
            self._accepted.close()
        if self._path is not None:
            self._remove(self._path)

    def _remove(self, path: UnixPath) -> None:
        try:
            path.remove()
        except OSError as error:  # the service gave up the rights that it was started with
            self.log.warn(
                "cannot remove {path}: {why}; the next start takes it over",
                path=self.address.path,
                why=error.strerror,
            )

    # What the reactor calls (IReadDescriptor)

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return self.address.spec

    def connectionLost(self, reason: object) -> None:
        self.close()

    def doRead(self) -> None:
        """Takes connections until none is left, but not so many that others starve."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection = self._accepted or self._socket.accept()[0]
                self._accepted = connection
                self._adopt(connection)
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:
                if error.errno != errno.ENOTCONN:  # which says that the peer has left again
                    self._pause(error)
                    return
            connection.close()
            self._accepted = None

    def _adopt(self, connection: socket.socket) -> None:
        """Twisted takes a copy of the descriptor; if there is none left, the next turn tries."""
        connection.setblocking(False)
        family = connection.family
        self._reactor.adoptStreamConnection(connection.fileno(), family, self._factory)

    def _pause(self, error: OSError) -> None:
        """No descriptor is left: the kernel holds new connections until some are free."""
        self.log.error("cannot accept on {spec}: {why}", spec=self.address.spec, why=error.strerror)
        reactor = self._reactor
        reactor.removeReader(self)
        reactor.callLater(ACCEPT_PAUSE, lambda: self._reactor and self._reactor.addReader(self))


def _bound(address: Address) -> socket.socket:
    try:
        found = socket.getaddrinfo(
            address.host or "0.0.0.0", address.port, address.family, socket.SOCK_STREAM
        )
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {address.spec}: host {address.host!r}: {error}"
        ) from None
    family, kind, protocol, _, where = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
    except BaseException:
        sock.close()
        raise
    return sock


def _explained(address: Address, error: OSError) -> StartError:
    place = f"cannot listen on {address.spec}"
    match error.errno:
        case errno.EADDRINUSE:
            return SocketTaken(f"{place}: another process listens there")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return NotPermitted(f"{place}: {error.strerror}")
        case errno.ENOENT | errno.ENOTDIR:
            folder = os.path.dirname(address.path)
            return ConfigError(f"{place}: {folder} is not an existing directory")
        case errno.EADDRNOTAVAIL:
            return ConfigError(f"{place}: {address.host} is no address of this machine")
        case _ if "too long" in str(error):
            return ConfigError(f"{place}: the path is too long for a socket")
    return SystemRefused(f"{place}: {error.strerror or error}")
