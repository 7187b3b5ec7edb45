"""Listening sockets: binding, listening and closing."""

from __future__ import annotations

import errno
import os
import socket

from twisted.internet.protocol import Factory
from twisted.logger import Logger

from sharded_milter.errors import (
    ConfigError,
    NotPermitted,
    SocketTaken,
    StartError,
    SystemRefused,
)
from sharded_milter.mta.accepting import AcceptGate, Acceptor, AcceptReactor
from sharded_milter.mta.addresses import ListenAddress
from sharded_milter.mta.unix_path import UnixPath

# Connections that the kernel holds while the reactor is busy; the kernel's own limit
# (net.core.somaxconn) is 4096 on Linux.
BACKLOG = 1024


class Listener:
    """A listening socket: bound at once, so that a conflict is found early; served later.

    It is not a port of Twisted's: those bind and listen in one step, leave a UNIX socket open to
    all users for a moment, and remove its path even if another server owns it by then.
    """

    log = Logger()

    def __init__(self, address: ListenAddress, mode: int, group: str) -> None:
        """Bind. Replace a UNIX socket on which no process listens.

        `mode` and `group` are for a UNIX socket; an empty group means no change. Raise SocketTaken,
        NotPermitted, ConfigError or SystemRefused with the socket and the reason.
        """
        self.address = address
        self._path: UnixPath | None = None
        self._acceptor: Acceptor | None = None  # set while it is served
        try:
            if address.path:
                self._path = UnixPath(address.path, mode, group)
            self._socket = self._path.socket if self._path is not None else _bind(address)
        except OSError as error:
            raise _start_error(address, error) from None

    @property
    def port(self) -> int:
        """The TCP port that is bound; 0 for a path."""
        return 0 if self.address.path else int(self._socket.getsockname()[1])

    @property
    def host(self) -> str:
        """The address that is bound; empty for a path."""
        return "" if self.address.path else str(self._socket.getsockname()[0])

    def serve(self, factory: Factory, gate: AcceptGate, reactor: AcceptReactor) -> None:
        """Listen, and accept connections for protocols of `factory` as fast as `gate` allows.

        Raise SocketTaken if another server has replaced the path since it was bound.
        """
        try:
            if self._path is not None and not self._path.is_ours():
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            self._socket.listen(BACKLOG)
        except OSError as error:
            raise _start_error(self.address, error) from None
        self._socket.setblocking(False)
        self._acceptor = Acceptor(self._socket, self.address.spec, gate, factory, reactor)

    def close(self) -> None:
        """Stop listening, and remove the path unless another file has replaced the socket."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        self._socket.close()
        if self._path is not None:
            self._remove(self._path)

    def _remove(self, path: UnixPath) -> None:
        try:
            path.remove()
        except OSError as error:  # the service has changed to --user
            self.log.warn(
                "cannot remove {path}: {why}; the next start replaces it",
                path=self.address.path,
                why=error.strerror,
            )


def _bind(address: ListenAddress) -> socket.socket:
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


def _start_error(address: ListenAddress, error: OSError) -> StartError:
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
            return ConfigError(f"{place}: {address.host} is not an address of this machine")
        case _ if "too long" in str(error):
            return ConfigError(f"{place}: the path is too long for a socket")
    return SystemRefused(f"{place}: {error.strerror or error}")
