"""Replaces daemonising calls with no-ops while a script's main program runs.

The master does this work. Each replaced function logs once that it is ignored. A pid file goes to a
directory of this worker, because every worker would write it. The calls work as usual while the
milter serves: a callback may fork and open any file.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Ignored functions of `os`, with the result that they return.
_IGNORED: dict[str, object] = {
    **dict.fromkeys(("setuid", "setgid", "seteuid", "setegid", "setreuid", "setregid")),
    **dict.fromkeys(("setresuid", "setresgid", "setgroups", "initgroups", "setsid", "chroot")),
    "setpgid": None,
}

# Signals of the master, and the one that makes a worker write its stacks.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

# Functions of `os` whose first argument is a path.
_ON_PATHS = ("open", "stat", "lstat", "access", "remove", "unlink", "chown", "chmod", "truncate")


class DaemonCalls:
    """The replacements of the functions; `say` gets a line on the first call of each."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()
        self._umask = 0o022
        self._files = ""  # the directory of pid files
        self._kept = _open_descriptors()
        self._originals: list[tuple[Any, str, Any]] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the functions while the script's main program runs."""
        self._kept = _open_descriptors()
        self._begin()
        try:
            yield
        finally:
            self._end()
            if self._files:
                shutil.rmtree(self._files, ignore_errors=True)
                self._files = ""

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Restore the functions while the milter serves."""
        self._end()
        try:
            yield
        finally:
            self._begin()

    def _begin(self) -> None:
        for name, result in _IGNORED.items():
            self._replace(os, name, self._ignoring(name, result))
        self._replace(os, "umask", self._set_umask)
        self._replace(os, "fork", self._fork(os.fork))
        self._replace(os, "close", self._close(os.close))
        self._replace(os, "closerange", self._close_range)
        self._replace(os, "dup2", self._dup2(os.dup2))
        self._replace(signal, "signal", self._signal(signal.signal))
        for name in _ON_PATHS:
            self._replace(os, name, self._elsewhere(getattr(os, name)))
        opening = self._elsewhere(builtins.open)
        self._replace(builtins, "open", opening)
        self._replace(io, "open", opening)

    def _replace(self, module: Any, name: str, function: Any) -> None:
        self._originals.append((module, name, getattr(module, name)))
        setattr(module, name, function)

    def _end(self) -> None:
        while self._originals:
            module, name, function = self._originals.pop()
            setattr(module, name, function)

    def _once(self, what: str, why: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say(f"{what} is ignored: {why}")

    # Daemons

    def _ignoring(self, name: str, result: object) -> Callable[..., Any]:
        def ignored(*_: Any) -> Any:
            self._once(f"os.{name}()", "workers run as the master does")
            return result

        return ignored

    def _set_umask(self, mask: int) -> int:
        self._once("os.umask()", "--socket-mode says who may use the socket")
        before, self._umask = self._umask, mask
        return before

    def _fork(self, fork: Callable[[], int]) -> Callable[[], int]:
        def forked() -> int:
            """Return 0, as in a daemon's child; but fork for multiprocessing."""
            if _caller().startswith("multiprocessing."):
                return fork()
            self._once("os.fork()", "the worker is the master's child already")
            return 0

        return forked

    # Descriptors of the channel, of the log and of the reactor, which must stay open

    def _close(self, close: Callable[[int], None]) -> Callable[[int], None]:
        def closed(fd: int) -> None:
            if fd in self._kept:
                self._once("closing of inherited descriptors", "they lead to the master")
            else:
                close(fd)

        return closed

    def _close_range(self, low: int, high: int) -> None:
        for fd in _open_descriptors():
            if low <= fd < high:
                with suppress(OSError):
                    os.close(fd)

    def _dup2(self, dup2: Callable[..., int]) -> Callable[..., int]:
        def duplicated(fd: int, fd2: int, inheritable: bool = True) -> int:
            if fd2 in self._kept:
                self._once("redirecting of standard streams", "they lead to the master's log")
                return fd2
            return dup2(fd, fd2, inheritable)

        return duplicated

    def _signal(self, set_signal: Callable[..., Any]) -> Callable[..., Any]:
        def set_or_ignored(number: int, handler: Any) -> Any:
            if number not in _SIGNALS:
                return set_signal(number, handler)
            name = signal.Signals(number).name
            self._once(f"the handler of {name}", "the master has the signals")
            return signal.getsignal(number)

        return set_or_ignored

    # Pid files

    def _elsewhere(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def redirected(path: Any, *arguments: Any, **keywords: Any) -> Any:
            return function(self._place_of(path), *arguments, **keywords)

        return redirected

    def _place_of(self, path: Any) -> Any:
        if not isinstance(path, str | bytes | os.PathLike):
            return path
        name = os.fsdecode(path)
        if not name.endswith(".pid"):
            return path
        if not self._files:
            self._files = tempfile.mkdtemp(prefix="sharded-milter-pid-")
        self._once(f"pid file {name}", "the master is the one to watch")
        return os.path.join(self._files, os.path.abspath(name).replace(os.sep, "_"))


def _caller() -> str:
    """Return the name of the module that has called the caller of this function."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def _open_descriptors() -> frozenset[int]:
    try:
        listed = map(int, os.listdir("/proc/self/fd"))
    except OSError:
        return frozenset(range(4))
    return frozenset(filter(_is_open, listed))


def _is_open(fd: int) -> bool:
    """Return whether a descriptor is open; the one of the listing itself is closed by now."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
