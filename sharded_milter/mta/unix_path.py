"""The path of a UNIX socket, in a directory that another user may own.

A user who may write to that directory can replace the socket with another file at any time. So no
path is resolved twice: the directory is opened once and names are looked up in it; the socket gets
its mode when it is created, and its group through a descriptor of the file itself.
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

# Open the file itself, of any kind, without following a link.
_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class UnixPath:
    """A UNIX socket that is bound to a path. It does not listen yet, so no client can connect."""

    def __init__(self, path: str, mode: int, group: str) -> None:
        """Bind. Replace a socket on which no process listens. An empty group means no change.

        Raise ConfigError, NotPermitted or OSError; then no file and no descriptor is left.
        """
        gid = _group_id(group) if group else None
        self._path = path
        self._name = os.path.basename(path) or "."
        self._identity: tuple[int, int] | None = (
            None  # device and inode of our file, if there is one
        )
        self._directory = os.open(os.path.dirname(path) or ".", _PATH_FLAGS & ~os.O_NOFOLLOW)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._remove_stale()
            self._bind(mode)
            self._set_access(mode, gid, group)
        except BaseException:
            self.socket.close()
            self.remove()
            raise

    def is_ours(self) -> bool:
        """Return True if the path is still this socket."""
        return self._identity is not None and self._is_file(self._identity)

    def remove(self) -> None:
        """Remove the path unless another file has replaced it. Raise OSError if that is refused."""
        if self._directory < 0:
            return
        try:
            if self.is_ours():
                os.unlink(self._name, dir_fd=self._directory)
        finally:
            os.close(self._directory)
            self._directory = -1

    @contextmanager
    def _open(self) -> Iterator[int]:
        """Open the file that has the name now; yield its descriptor."""
        file = os.open(self._name, _PATH_FLAGS, dir_fd=self._directory)
        try:
            yield file
        finally:
            os.close(file)

    def _is_file(self, identity: tuple[int, int]) -> bool:
        with suppress(FileNotFoundError), self._open() as file:
            return _identity(os.fstat(file)) == identity
        return False

    def _remove_stale(self) -> None:
        """Remove the socket of an ended server. Raise OSError if a process listens on it."""
        with suppress(FileNotFoundError), self._open() as file:
            found = os.fstat(file)
            if not stat.S_ISSOCK(found.st_mode):
                raise ConfigError(
                    f"cannot listen on unix:{self._path}: it exists and is not a socket"
                )
            if _is_served(file):
                raise _in_use()
            if not self._is_file(_identity(found)):
                raise _in_use()
            os.unlink(self._name, dir_fd=self._directory)

    def _bind(self, mode: int) -> None:
        before = os.umask(0o777 & ~mode)
        try:
            self.socket.bind(self._path)
        finally:
            os.umask(before)

    def _set_access(self, mode: int, gid: int | None, group: str) -> None:
        """Find the file that bind has created, and set its group and mode."""
        with self._open() as file:
            found = os.fstat(file)
            # At worst, another socket of our own user has replaced it.
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
                raise _in_use()
            self._identity = _identity(found)
            if gid is not None:
                self._set_group(file, gid, group)
            if stat.S_IMODE(found.st_mode) != mode:  # the directory has a default ACL
                os.chmod(_proc_path(file), mode)

    def _set_group(self, file: int, gid: int, group: str) -> None:
        try:
            os.chown(_proc_path(file), -1, gid)
        except PermissionError as error:
            user = accounts.user_name(os.geteuid())
            raise NotPermitted(
                f"cannot listen on unix:{self._path}: {error.strerror}: user {user} cannot give"
                f" the socket to --socket-group {group!r}; make {user} a member of that group, or"
                f" start as root with --user {user}"
            ) from None


def _proc_path(file: int) -> str:
    """Return a path of the descriptor's file, also if that was moved."""
    return f"/proc/self/fd/{file}"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _is_served(file: int) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(_proc_path(file))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # its backlog is full
            pass
    return True


def _in_use() -> OSError:
    return OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _group_id(group: str) -> int:
    try:
        return accounts.group_id(group)
    except ValueError as error:
        raise ConfigError(f"--socket-group {group!r}: {error}") from None
