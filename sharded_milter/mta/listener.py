"""Listening sockets: how they are opened and closed."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from twisted.internet.protocol import Factory
from twisted.logger import Logger

from sharded_milter.errors import (
    ConfigError,
    NotPermitted,
    SocketTaken,
    StartError,
    SystemRefused,
)
from sharded_milter.mta.accepting import Acceptor, Gate
from sharded_milter.mta.addresses import Address
from sharded_milter.mta.unix_path import UnixPath

# Connections that the kernel holds while the reactor is busy; the kernel's own limit
# (net.core.somaxconn) is 4096 on Linux.
BACKLOG = 1024


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
        self._acceptor: Acceptor | None = None  # while it is served
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

    @property
    def host(self) -> str:
        """The address that is really bound; empty for a path."""
        return "" if self.address.path else str(self._socket.getsockname()[0])

    def serve(self, factory: Factory, gate: Gate, reactor: Any) -> None:
        """Listens, and gives every connection to a protocol of `factory`, as `gate` lets it in.

        Raises SocketTaken when another server has taken the place since it was bound.
        """
        try:
            if self._path is not None and not self._path.is_ours():
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            self._socket.listen(BACKLOG)
        except OSError as error:
            raise _explained(self.address, error) from None
        self._socket.setblocking(False)
        self._acceptor = Acceptor(self._socket, self.address.spec, gate, factory, reactor)

    def close(self) -> None:
        """Stops listening and removes the path, unless somebody else has taken that."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        self._socket.close()
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
