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
from contextlib import suppress
from dataclasses import dataclass

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


class Listener:
    """An open listening socket; `close` also removes the path of a UNIX socket."""

    def __init__(self, address: Address, sock: socket.socket) -> None:
        self.address = address
        self.socket = sock
        self._inode = os.stat(address.path).st_ino if address.path else 0

    @property
    def port(self) -> int:
        """The TCP port that is really bound; 0 for a path."""
        return 0 if self.address.path else int(self.socket.getsockname()[1])

    def close(self) -> None:
        """Closes the socket and removes its path, unless somebody else has taken that."""
        self.socket.close()
        if self.address.path:
            with suppress(FileNotFoundError):
                if os.stat(self.address.path).st_ino == self._inode:
                    os.unlink(self.address.path)


def listen(address: Address, mode: int, group: str) -> Listener:
    """Opens the socket; a UNIX socket that nobody serves any more is taken over.

    `mode` and `group` are those of a UNIX socket, an empty group leaves it as it is. Raises
    SocketTaken, NotPermitted, ConfigError or SystemRefused, naming the socket and the reason.
    """
    try:
        if address.path:
            return Listener(address, _listen_unix(address.path, mode, group))
        return Listener(address, _listen_tcp(address))
    except OSError as error:
        raise _explained(address, error) from error


def _listen_tcp(address: Address) -> socket.socket:
    flags = socket.AI_PASSIVE
    try:
        found = socket.getaddrinfo(
            address.host or "0.0.0.0", address.port, type=socket.SOCK_STREAM, flags=flags
        )
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {address.spec}: host {address.host!r}: {error}"
        ) from error
    family, kind, protocol, _, where = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _listen_unix(path: str, mode: int, group: str) -> socket.socket:
    gid = _group_id(group) if group else -1
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        old_umask = os.umask(0o177)  # nobody connects before mode and group are set
        try:
            _bind_unix(sock, path)
        finally:
            os.umask(old_umask)
        if gid != -1:
            os.chown(path, -1, gid)
        os.chmod(path, mode)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_unix(sock: socket.socket, path: str) -> None:
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not _is_stale(path):
            raise
        os.unlink(path)
        sock.bind(path)


def _is_stale(path: str) -> bool:
    """Whether the path is a socket that its server left behind without removing it."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise ConfigError(f"cannot listen on unix:{path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


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
