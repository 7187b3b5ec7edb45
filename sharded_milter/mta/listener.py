"""Listening sockets: how they are opened and served."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from contextlib import suppress
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
        self._inode = 0
        self._reactor: Any = None
        self._factory: Any = None
        self._accepted: socket.socket | None = None  # and not given to a protocol yet
        try:
            self._socket = (
                _bound_unix(address.path, mode, group) if address.path else _bound(address)
            )
            if address.path:
                self._inode = os.stat(address.path).st_ino
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
            if self._inode and os.stat(self.address.path).st_ino != self._inode:
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
        if self._inode:
            with suppress(FileNotFoundError):
                if os.stat(self.address.path).st_ino == self._inode:
                    os.unlink(self.address.path)
            self._inode = 0

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


def _bound_unix(path: str, mode: int, group: str) -> socket.socket:
    gid = _group_id(group) if group else -1
    if os.path.lexists(path):
        _take_over(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_umask = os.umask(0o177)  # nobody connects before mode and group are set
    try:
        sock.bind(path)
        if gid != -1:
            os.chown(path, -1, gid)
        os.chmod(path, mode)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(old_umask)
    return sock


def _take_over(path: str) -> None:
    """Removes the socket that a server left behind; refuses when one is still there."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConfigError(f"cannot listen on unix:{path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # its backlog is full: it lives
            pass
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _group_id(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"--socket-group {group!r}: there is no such group") from None


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
