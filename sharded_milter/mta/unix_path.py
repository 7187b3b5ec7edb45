"""The path of a UNIX socket, in a directory that may belong to somebody else.

Whoever may write to that directory can put another file in the socket's place at any moment, so
nothing here acts on a path twice. The directory is opened once and names are looked up in it; the
socket gets its mode when it is made, and its group through a descriptor of the very file.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sharded_milter import accounts
from sharded_milter.errors import ConfigError, NotPermitted

# A descriptor that gives access to the file itself, whatever kind it is, and to no other.
_ITSELF = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class UnixPath:
    """A UNIX socket that is bound to a path; it does not listen, so no client connects yet."""

    def __init__(self, path: str, mode: int, group: str) -> None:
        """Binds. A socket that no process serves any more is taken over.

        An empty group leaves it as it is. Raises ConfigError, NotPermitted or OSError; then
        nothing is left behind.
        """
        gid = _group_id(group) if group else None
        self._path = path
        self._name = os.path.basename(path) or "."
        self._identity: tuple[int, int] | None = None  # of our file; None: there is none
        self._folder = os.open(os.path.dirname(path) or ".", _ITSELF & ~os.O_NOFOLLOW)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._take_over()
            self._bind(mode)
            self._own(mode, gid, group)
        except BaseException:
            self.socket.close()
            self.remove()
            raise

    def is_ours(self) -> bool:
        """Whether the path still leads to this socket."""
        return self._identity is not None and self._leads_to(self._identity)

    def remove(self) -> None:
        """Removes the path, unless another file has taken it. Raises OSError where it may not."""
        if self._folder < 0:
            return
        try:
            if self.is_ours():
                os.unlink(self._name, dir_fd=self._folder)
        finally:
            os.close(self._folder)
            self._folder = -1

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of what has the name now."""
        file = os.open(self._name, _ITSELF, dir_fd=self._folder)
        try:
            yield file
        finally:
            os.close(file)

    def _leads_to(self, identity: tuple[int, int]) -> bool:
        with suppress(FileNotFoundError), self._opened() as file:
            return _identity(os.fstat(file)) == identity
        return False

    def _take_over(self) -> None:
        """Removes the socket that a server left behind; refuses when one is still there."""
        with suppress(FileNotFoundError), self._opened() as file:
            found = os.fstat(file)
            if not stat.S_ISSOCK(found.st_mode):
                raise ConfigError(
                    f"cannot listen on unix:{self._path}: it exists and is not a socket"
                )
            if _is_served(file):
                raise _taken()
            if not self._leads_to(_identity(found)):
                raise _taken()
            os.unlink(self._name, dir_fd=self._folder)

    def _bind(self, mode: int) -> None:
        before = os.umask(0o777 & ~mode)
        try:
            self.socket.bind(self._path)
        finally:
            os.umask(before)

    def _own(self, mode: int, gid: int | None, group: str) -> None:
        """Finds the file that bind has made, and gives it to the group."""
        with self._opened() as file:
            found = os.fstat(file)
            # Another socket of our own is the worst that could stand in its place.
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
                raise _taken()
            self._identity = _identity(found)
            if gid is not None:
                self._give(file, gid, group)
            if stat.S_IMODE(found.st_mode) != mode:  # the directory has a default ACL
                os.chmod(_magic(file), mode)

    def _give(self, file: int, gid: int, group: str) -> None:
        try:
            os.chown(_magic(file), -1, gid)
        except PermissionError as error:
            user = accounts.user_name(os.geteuid())
            raise NotPermitted(
                f"cannot listen on unix:{self._path}: {error.strerror}: user {user} cannot give"
                f" the socket to --socket-group {group!r}; make {user} a member of that group, or"
                f" start as root with --user {user}"
            ) from None


def _magic(file: int) -> str:
    """A path that leads to the descriptor's file, wherever that has been moved to."""
    return f"/proc/self/fd/{file}"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _is_served(file: int) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(_magic(file))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # its backlog is full
            pass
    return True


def _taken() -> OSError:
    return OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _group_id(group: str) -> int:
    try:
        return accounts.group_id(group)
    except ValueError as error:
        raise ConfigError(f"--socket-group {group!r}: {error}") from None
