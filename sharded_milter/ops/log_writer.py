"""Write a log without blocking, also if its reader is slow or gone or its disk is full.

A line is written at once, in the thread that logs it, if the descriptor takes it. If not, it is
buffered, up to MAX_WAITING bytes, and a thread writes the buffer in order. A line that does not
fit, or whose write fails, is dropped and counted; the next line that can be written is preceded by
one with that count.

A write that does not block needs O_NONBLOCK, but this flag belongs to the open file, which
standard error shares with the shell and other programs. So a pipe or a terminal is opened a second
time, and a socket is written with MSG_DONTWAIT. If neither is possible, the thread writes
everything. A regular file does not block for long: the page cache takes the line, or the write
fails because the disk is full.
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

# Bytes of buffered lines, with OVERHEAD bytes for each: about 5,000 usual lines, which a busy
# service logs in a few seconds.
MAX_WAITING = 1024 * 1024
OVERHEAD = 100

# Seconds in which buffered lines may still be written when the process ends.
END_GRACE = 1.0


class _Entry(NamedTuple):
    """Bytes that are written together, and the number of lines that are lost if they are not."""

    data: bytes
    lines: int
    is_rest: bool = False  # the beginning of the line is written already


class LogWriter:
    """Writes lines to a descriptor in order, from any thread, without blocking.

    `notice` returns the line that reports a number of dropped lines.
    """

    def __init__(self, descriptor: int, notice: Callable[[int], bytes]) -> None:
        self._notice = notice
        self._write, self._at_once, self._fd = _open_writer(descriptor)
        self._waiting: deque[_Entry] = deque()
        self._size = 0  # bytes of `_waiting`, with OVERHEAD
        self._dropped = 0
        self._torn = False  # the last line that was written is incomplete
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, data: bytes) -> None:
        """Write one line, or several that belong together; each ends with a newline."""
        with self._changed:
            if self._dropped and not self._is_full(data):
                self._write_or_queue(self._take_notice())
            self._write_or_queue(_Entry(data, data.count(b"\n")))

    def close(self, grace: float = END_GRACE) -> None:
        """Wait until the buffer is written, at most `grace` seconds; twice that with a notice."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, grace)
            if self._dropped and not self._waiting:
                self._write_or_queue(self._take_notice())
                self._changed.wait_for(lambda: not self._waiting, grace)

    def _take_notice(self) -> _Entry:
        """Return the notice and reset the count; dropping the notice restores the count."""
        dropped, self._dropped = self._dropped, 0
        return _Entry(self._notice(dropped), dropped)

    def _is_full(self, data: bytes) -> bool:
        return bool(self._waiting) and self._size + len(data) + OVERHEAD > MAX_WAITING

    def _write_or_queue(self, record: _Entry) -> None:
        if self._is_full(record.data):
            self._dropped += record.lines
        elif self._waiting or not self._at_once:
            self._queue(record)
        else:
            try:
                rest = self._write_now(record)
            except OSError:  # the disk is full, or the reader has closed the pipe
                self._dropped += record.lines
                return
            if rest is not None:
                self._queue(rest)

    def _write_now(self, record: _Entry) -> _Entry | None:
        """Write as much as possible now; return the rest, or None. Raise OSError if it fails."""
        data = record.data
        if self._torn and not record.is_rest:
            data = b"\n" + data
        try:
            written = self._write(data)
        except BlockingIOError:
            return record
        self._torn = data[written - 1 : written] != b"\n"
        return record._replace(data=data[written:], is_rest=True) if written < len(data) else None

    # The buffer

    def _queue(self, record: _Entry) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no thread can be started now; the next line tries again
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
            complete = self._write_fully(record)
            with self._changed:
                self._waiting.popleft()
                self._size -= len(record.data) + OVERHEAD
                if not complete:
                    self._dropped += record.lines
                elif self._dropped and not self._waiting:
                    self._write_or_queue(self._take_notice())
                self._changed.notify_all()

    def _write_fully(self, record: _Entry) -> bool:
        """Write all of it, and wait as long as that takes; return False if a write fails."""
        rest: _Entry | None = record
        while rest is not None:
            before = rest
            try:
                rest = self._write_now(before)
            except OSError:
                return False
            if rest is before:
                _wait_until_writable(self._fd)
        return True


def _open_writer(descriptor: int) -> tuple[Callable[[bytes], int], bool, int]:
    """Return a write function, True if it never blocks, and the descriptor to poll."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(descriptor))
        return lambda data: sock.send(data, socket.MSG_DONTWAIT), True, sock.fileno()
    own = descriptor
    if stat.S_ISFIFO(mode) or os.isatty(descriptor):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with suppress(OSError):  # it belongs to another user, or has no reader any more
            own = os.open(f"/proc/self/fd/{descriptor}", flags)
        if own == descriptor:
            return lambda data: os.write(descriptor, data), False, descriptor
    return lambda data: os.write(own, data), True, own


def _wait_until_writable(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()
