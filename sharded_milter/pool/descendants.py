"""What milters leave running: processes that have outlived the worker from which they come.

A daemon leaves its session and its parent, so neither tells whose it was. But a process inherits
the resource limits of its parent, through fork and exec: each worker is started with a number of
its own as the limit of a resource that Linux has not counted since 2.4.25 (RLIMIT_LOCKS). What
bears the number of a worker that is gone descends from that; nothing else is ended here.

The master is a subreaper, so it becomes the parent of orphans, and of what those leave when they
end. It reads their list from a descriptor that it keeps: no other is needed to find and end them.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from twisted.internet.process import reapProcessHandlers

from sharded_milter.forks import MARKED_LIMIT
from sharded_milter.prctl import set_subreaper

# How often it is looked for orphans, seconds, and how soon again where some have been ended: what
# they leave is found then.
LOOK = 1.0
AGAIN = 0.05

# Looks after which a child that has ended, and may have been started by a milter in the master, is
# reaped: who wants its exit code has asked for it by then.
UNASKED = 60

# How long the end of the service waits for orphans to be gone, seconds.
LAST_LOOKS = 1.0

# Marks are the numbers of one master: a random one, and 2^32 that follow it. There must be choice.
_MARKS = 1 << 32
_LEAST = 1 << 20
_MOST = 1 << 30


class Descendants:
    """Ends what marked workers leave, and reaps the orphans that become children of this process.

    `shares` says that milters run in this process: they reap what they have started.
    """

    def __init__(self, reactor: Any, *, shares: bool = False) -> None:
        self._reactor = reactor
        self._unasked = UNASKED if shares else 0
        self._first = _first_mark()
        self._count = 0
        self._alive: set[int] = set()  # the marks of workers that are not gone
        self._children = -1  # the descriptor of their list
        self._ended: dict[int, int] = {}  # looks at children that have ended
        self._call: Any = None

    def begin(self) -> None:
        """From now on orphans come here. Elsewhere than on Linux only process groups are ended."""
        if sys.platform != "linux":
            return
        set_subreaper(True)
        with suppress(OSError):  # where /proc is not there, or another namespace's
            if os.readlink("/proc/self") == str(os.getpid()):
                self._children = os.open("/proc/thread-self/children", os.O_RDONLY | os.O_CLOEXEC)
        self._call = self._reactor.callLater(LOOK, self._look)

    def mark(self) -> int:
        """A mark for a worker that is to be started; 0 where there can be none."""
        if not self._first:
            return 0
        self._count += 1
        mark = self._first + self._count % _MARKS
        self._alive.add(mark)
        return mark

    def end(self, mark: int) -> None:
        """The worker with the mark is gone: what it has left is ended."""
        self._alive.discard(mark)
        self._sweep()

    def finish(self) -> None:
        """All workers are gone: returns when what they have left is gone too, or after a second."""
        self._alive.clear()
        if self._call is not None and self._call.active():
            self._call.cancel()
        end = time.monotonic() + LAST_LOOKS
        while self.sweep() and time.monotonic() < end:
            time.sleep(AGAIN / 10)
        if self._children >= 0:
            os.close(self._children)
            self._children = -1
        if self._call is not None:
            set_subreaper(False)

    def _look(self) -> None:
        if self._ended:
            listed = self._listed()
            self._ended = {pid: looks for pid, looks in self._ended.items() if pid in listed}
        self._call = self._reactor.callLater(LOOK, self._look)
        self._sweep()

    def _sweep(self) -> None:
        if self.sweep() and self._call is not None:
            self._call.reset(AGAIN)

    def sweep(self) -> int:
        """Ends orphans of workers that are gone and reaps what has ended; how many were ended."""
        ended = 0
        for pid in self._listed():
            if pid in reapProcessHandlers:  # Twisted waits for it
                continue
            mark = _mark_of(pid)
            if self._first and self._first <= mark < self._first + _MARKS:
                if mark not in self._alive:
                    ended += _kill(pid)
                _reap(pid)
            elif self._nobody_asks_for(pid):
                _reap(pid)
        return ended

    def _listed(self) -> Collection[int]:
        """The children of this process's main thread, orphans among them."""
        if self._children < 0:
            return ()
        found, at = b"", 0
        with suppress(OSError):
            while data := os.pread(self._children, 1 << 16, at):
                found, at = found + data, at + len(data)
        return {int(pid) for pid in found.split()}

    def _nobody_asks_for(self, pid: int) -> bool:
        """Whether it has ended, and whoever may have started it has had the time to ask how."""
        if not self._unasked:
            return True
        if not _has_ended(pid):
            return False
        self._ended[pid] = self._ended.get(pid, 0) + 1
        return self._ended[pid] > self._unasked


def _first_mark() -> int:
    try:
        _, hard = resource.getrlimit(MARKED_LIMIT)
    except (OSError, ValueError):
        return 0
    choice = _MOST if hard == resource.RLIM_INFINITY else min(_MOST, hard // _MARKS - 1)
    return random.randrange(_LEAST, choice) * _MARKS if choice > _LEAST else 0


def _mark_of(pid: int) -> int:
    try:
        return resource.prlimit(pid, MARKED_LIMIT)[1]
    except OSError:  # it is gone, or somebody else's by now
        return 0


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return False
    return True


def _has_ended(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
