"""Writing to a log that may be slow, full or gone: the writer waits for nothing, and says so.

What can leave now leaves now, from the thread that wrote it. What cannot waits, up to
MAX_WAITING bytes, for a thread that writes it in order; what does not fit, or is refused, is
dropped and counted, and the next line that can be written is preceded by one with the count.

A write that must not wait needs a descriptor that does not block, and O_NONBLOCK belongs to the
open file, which standard error shares with the shell and others. So a pipe or a terminal is opened
once more; a socket is written to with MSG_DONTWAIT; where neither works, the thread does it all.
A regular file takes what it gets into the page cache, or says that the disk is full.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

# Bytes of lines that wait for a reader, and what each costs besides: some 5,000 of the usual
# ones, which is what a busy service logs in a few seconds.
MAX_WAITING = 1024 * 1024
OVERHEAD = 100

# Seconds that lines which still wait get at the end.
END_GRACE = 1.0


class _Entry(NamedTuple):
    """What is written at once; when it is dropped, so many lines are."""

    data: bytes
    lines: int
    is_rest: bool = False  # its beginning is written already


class LogWriter:
    """Writes lines to a descriptor in their order, from any thread, and never waits.

    `notice` makes the line that says how many were dropped.
    """

    def __init__(self, descriptor: int, notice: Callable[[int], bytes]) -> None:
        self._notice = notice
        self._write, self._at_once, self._fd = _way_to(descriptor)
        self._waiting: deque[_Entry] = deque()
        self._size = 0  # of what waits
        self._dropped = 0
        self._torn = False  # the last line that was written lacks its end
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, data: bytes) -> None:
        """Writes a line, or several that belong together, with the line's end."""
        with self._changed:
            if self._dropped and not self._is_full(data):
                self._give(self._due())
            self._give(_Entry(data, data.count(b"\n")))

    def close(self, grace: float = END_GRACE) -> None:
        """Returns when nothing waits any more, or after `grace` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, grace)
            if self._dropped and not self._waiting:
                self._give(self._due())
                self._changed.wait_for(lambda: not self._waiting, grace)

    def _due(self) -> _Entry:
        """The line about what was dropped; if that is dropped too, it counts for as many."""
        dropped, self._dropped = self._dropped, 0
        return _Entry(self._notice(dropped), dropped)

    def _is_full(self, data: bytes) -> bool:
        return bool(self._waiting) and self._size + len(data) + OVERHEAD > MAX_WAITING

    def _give(self, record: _Entry) -> None:
        if self._is_full(record.data):
            self._dropped += record.lines
        elif self._waiting or not self._at_once:
            self._queue(record)
        else:
            try:
                rest = self._attempt(record)
            except OSError:  # the disk is full, the reader is gone
                self._dropped += record.lines
                return
            if rest is not None:
                self._queue(rest)

    def _attempt(self, record: _Entry) -> _Entry | None:
        """Writes what can be written; returns what must wait. Raises OSError when refused."""
        data = record.data
        if self._torn and not record.is_rest:
            data = b"\n" + data
        try:
            written = self._write(data)
        except BlockingIOError:
            return record
        self._torn = data[written - 1 : written] != b"\n"
        return record._replace(data=data[written:], is_rest=True) if written < len(data) else None

    # What waits

    def _queue(self, record: _Entry) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the system has no thread left: the next line tries again
                self._thread = None
                self._dropped += record.lines
                return
        self._waiting.append(record)
        self._size += len(record.data) + OVERHEAD
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                record = self._waiting[0]
            complete = self._persist(record)
            with self._changed:
                self._waiting.popleft()
                self._size -= len(record.data) + OVERHEAD
                if not complete:
                    self._dropped += record.lines
                elif self._dropped and not self._waiting:
                    self._give(self._due())
                self._changed.notify_all()

    def _persist(self, record: _Entry) -> bool:
        """Writes all of it, however long that takes; False when it is refused."""
        rest: _Entry | None = record
        while rest is not None:
            before = rest
            try:
                rest = self._attempt(before)
            except OSError:
                return False
            if rest is before:
                _wait_until_writable(self._fd)
        return True


def _way_to(descriptor: int) -> tuple[Callable[[bytes], int], bool, int]:
    """What writes to a descriptor, whether that never waits, and what can be polled for it."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(descriptor))
        return lambda data: sock.send(data, socket.MSG_DONTWAIT), True, sock.fileno()
    own = descriptor
    if stat.S_ISFIFO(mode) or os.isatty(descriptor):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with suppress(OSError):  # another user's, or no reader is left
            own = os.open(f"/proc/self/fd/{descriptor}", flags)
        if own == descriptor:
            return lambda data: os.write(descriptor, data), False, descriptor
    return lambda data: os.write(own, data), True, own


def _wait_until_writable(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()
