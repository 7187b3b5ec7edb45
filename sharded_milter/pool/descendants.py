"""Descendants: processes that milters have started and that outlive their worker.

A daemon leaves its session and its parent, so neither identifies its worker. But a process inherits
its parent's resource limits through fork and exec. So each worker gets a number of its own, its
mark, as the limit RLIMIT_LOCKS, which Linux has not enforced since 2.4.25. A process with the mark
of a worker that is gone descends from that worker and is killed; nothing else is killed here.

The master is a subreaper: it becomes the parent of orphans, and of their orphans. It reads the list
of its children from a descriptor that it keeps open, and needs no other to find and kill them.
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

from twisted.internet.process import reapProcessHandlers

from sharded_milter.alarms import DelayedCall, ReactorTime
from sharded_milter.forks import MARKED_LIMIT
from sharded_milter.prctl import set_subreaper

# Seconds between sweeps for orphans, and until the next sweep after some were killed: that finds
# the orphans of those.
SWEEP_INTERVAL = 1.0
SWEEP_AGAIN_AFTER = 0.05

# Sweeps after which a zombie that a milter in the master may have started is reaped: the milter has
# fetched its exit code by then, if it wants that.
REAP_AFTER_SWEEPS = 60

# Seconds for which `finish` waits until the orphans are gone.
FINAL_SWEEPS = 1.0

# The marks of one master are 2^32 numbers from a random one on; two masters must rarely overlap.
_MARKS = 1 << 32
_LEAST = 1 << 20
_MOST = 1 << 30


class Descendants:
    """Kills what marked workers leave running, and reaps the orphans that this process inherits.

    `shares` says that milters run in this process, too, and reap their own children.
    """

    def __init__(self, reactor: ReactorTime, *, shares: bool = False) -> None:
        self._reactor = reactor
        self._reap_after = REAP_AFTER_SWEEPS if shares else 0
        self._first = _first_mark()
        self._count = 0
        self._live_marks: set[int] = set()  # of workers that are not gone
        self._children = -1  # the descriptor of the list of children
        self._zombies: dict[int, int] = {}  # sweeps since they have ended, by process id
        self._call: DelayedCall | None = None

    def begin(self) -> None:
        """Become a subreaper and start sweeping; without Linux only process groups are killed."""
        if sys.platform != "linux":
            return
        set_subreaper(True)
        with suppress(OSError):  # /proc is missing, or belongs to another namespace
            if os.readlink("/proc/self") == str(os.getpid()):
                self._children = os.open("/proc/thread-self/children", os.O_RDONLY | os.O_CLOEXEC)
        self._call = self._reactor.callLater(SWEEP_INTERVAL, self._sweep_later)

    def mark(self) -> int:
        """Return a mark for a worker that is to be started; 0 if the limits allow none."""
        if not self._first:
            return 0
        self._count += 1
        mark = self._first + self._count % _MARKS
        self._live_marks.add(mark)
        return mark

    def end(self, mark: int) -> None:
        """Kill what the worker with the mark, which is gone, has left running."""
        self._live_marks.discard(mark)
        self._sweep()

    def finish(self) -> None:
        """Kill what all workers have left; return when that is gone, or after FINAL_SWEEPS."""
        self._live_marks.clear()
        if self._call is not None and self._call.active():
            self._call.cancel()
        end = time.monotonic() + FINAL_SWEEPS
        while self.sweep() and time.monotonic() < end:
            time.sleep(SWEEP_AGAIN_AFTER / 10)
        if self._children >= 0:
            os.close(self._children)
            self._children = -1
        if self._call is not None:
            set_subreaper(False)

    def _sweep_later(self) -> None:
        if self._zombies:
            listed = self._list_children()
            self._zombies = {pid: looks for pid, looks in self._zombies.items() if pid in listed}
        self._call = self._reactor.callLater(SWEEP_INTERVAL, self._sweep_later)
        self._sweep()

    def _sweep(self) -> None:
        if self.sweep() and self._call is not None:
            self._call.reset(SWEEP_AGAIN_AFTER)

    def sweep(self) -> int:
        """Kill orphans of workers that are gone, reap zombies; return how many were killed."""
        ended = 0
        for pid in self._list_children():
            if pid in reapProcessHandlers:  # Twisted waits for it
                continue
            mark = _mark_of(pid)
            if self._first and self._first <= mark < self._first + _MARKS:
                if mark not in self._live_marks:
                    ended += _kill(pid)
                _reap(pid)
            elif self._may_reap(pid):
                _reap(pid)
        return ended

    def _list_children(self) -> Collection[int]:
        """Return the children of this process's main thread, which include orphans."""
        if self._children < 0:
            return ()
        found, at = b"", 0
        with suppress(OSError):
            while data := os.pread(self._children, 1 << 16, at):
                found, at = found + data, at + len(data)
        return {int(pid) for pid in found.split()}

    def _may_reap(self, pid: int) -> bool:
        """Return whether a child may be reaped: its milter had time to fetch its exit code."""
        if not self._reap_after:
            return True
        if not _has_ended(pid):
            return False
        self._zombies[pid] = self._zombies.get(pid, 0) + 1
        return self._zombies[pid] > self._reap_after


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
    except OSError:  # it is gone, or the number belongs to another user's process by now
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
