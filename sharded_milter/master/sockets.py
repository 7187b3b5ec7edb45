"""Listening sockets: how operators spell them, and how they are opened.

| spelling                                    | whose                        |
|---------------------------------------------|------------------------------|
| `inet:8890@127.0.0.1`, `inet6:8890@::1`     | Sendmail, libmilter          |
| `inet:127.0.0.1:8890`, `inet:[::1]:8890`    | Postfix                      |
| `unix:/path`, `local:/path`, `/path`        | both, and bare               |
| `tcp:8890:interface=127.0.0.1`, `tcp6:8890` | Twisted                      |
"""

from __future__ import annotations

import errno
import grp
import os
import re
import socket
import stat
from dataclasses import dataclass
from typing import Any

from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory

from sharded_milter.errors import (
    ConfigError,
    NotPermitted,
    SocketTaken,
    StartError,
    SystemRefused,
    UsageError,
)

# Connections that the kernel holds while the reactor is busy; the kernel's own limit
# (net.core.somaxconn) is 4096 on Linux.
BACKLOG = 1024

_SENDMAIL = re.compile(r"(?P<kind>inet6?):(?P<port>\d+)(?:@(?P<host>[^@]+))?")
_POSTFIX = re.compile(r"(?P<kind>inet6?):(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:@]+)):(?P<port>\d+)")
_TWISTED = re.compile(r"(?P<kind>tcp6?):(?:port=)?(?P<port>\d+)(?::interface=(?P<host>.+))?")
_UNIX = re.compile(r"(?:(?:unix|local):)?(?P<path>/.+)")


@dataclass(frozen=True)
class Address:
    """A parsed `--listen`: a path, or a host and a port."""

    spec: str
    path: str = ""
    host: str = ""
    port: int = 0

    def for_postfix(self, port: int) -> str:
        """The same socket as main.cf names it; `port` is the one really bound."""
        if self.path:
            return f"unix:{self.path}"
        host = "127.0.0.1" if self.host in ("", "0.0.0.0") else self.host
        return f"inet:[{host}]:{port}" if ":" in host else f"inet:{host}:{port}"


def parse_listen(spec: str) -> Address:
    """The address that `spec` names; UsageError when it is none of the spellings above."""
    if match := _UNIX.fullmatch(spec):
        return Address(spec, path=match["path"])
    for pattern in (_SENDMAIL, _POSTFIX, _TWISTED):
        if match := pattern.fullmatch(spec):
            found = match.groupdict()
            host = (found.get("v6") or found["host"] or "").strip("[]").replace("\\:", ":")
            if not host and found["kind"].endswith("6"):
                host = "::"
            port = int(found["port"])
            if port > 0xFFFF:
                raise UsageError(f"--listen {spec!r}: port {port} is above 65535")
            return Address(spec, host=host, port=port)
    raise UsageError(
        f"--listen {spec!r} is neither inet:PORT@HOST nor inet:HOST:PORT nor unix:/PATH"
    )


def open_port(address: Address, mode: int, group: str, factory: Factory, reactor: Any) -> Any:
    """Listens; returns Twisted's port, whose `stopListening` also removes a UNIX socket's path.

    A UNIX socket that nobody serves any more is taken over. `mode` and `group` are those of a
    UNIX socket, an empty group leaves it as it is. Raises SocketTaken, NotPermitted, ConfigError
    or SystemRefused, naming the socket and the reason.
    """
    try:
        if address.path:
            return _open_unix(address.path, mode, group, factory, reactor)
        return reactor.listenTCP(address.port, factory, BACKLOG, _interface(address))
    except CannotListenError as error:
        reason = error.socketError
        refusal = reason if isinstance(reason, OSError) else OSError(str(reason))
        raise _explained(address, refusal) from None
    except OSError as error:
        raise _explained(address, error) from None


def _interface(address: Address) -> str:
    """The first IP address of the host: Twisted chooses the family by it."""
    try:
        found = socket.getaddrinfo(address.host or "0.0.0.0", address.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {address.spec}: host {address.host!r}: {error}"
        ) from None
    return str(found[0][4][0])


def _open_unix(path: str, mode: int, group: str, factory: Factory, reactor: Any) -> Any:
    gid = _group_id(group) if group else -1
    if os.path.lexists(path):
        _take_over(path)
    old_umask = os.umask(0o177)  # nobody connects before the mode is set
    try:
        port = reactor.listenUNIX(path, factory, BACKLOG, mode)
    finally:
        os.umask(old_umask)
    if gid != -1:
        os.chown(path, -1, gid)
    return port


def _take_over(path: str) -> None:
    """Removes the socket that a server left behind; SocketTaken when one still listens."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise ConfigError(f"cannot listen on unix:{path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
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
