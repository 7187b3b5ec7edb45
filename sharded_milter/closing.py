"""One thread closes the descriptors that others have passed to this process.

To close a file of a file system in user space, or a socket that lingers, may take for ever. So
the reactor does not close what it does not know, and it starts no thread for that either: a
system that allows no more threads would refuse it just then. The thread is started before the
first worker is.

What waits for the thread is bounded by the descriptors that this process may have open.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from errno import EAGAIN
from queue import SimpleQueue
from threading import Thread

# Such a socket is reset when it is closed, which waits for nothing.
_NO_LINGER = struct.pack("ii", 1, 0)


class Closing:
    """Descriptors that are to be closed, and the thread that closes them."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[int] = SimpleQueue()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Start the thread unless it runs. Raise OSError where the system refuses one."""
        if self._thread is not None and self._thread.is_alive():
            return
        thread = Thread(target=self._run, name="closing", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise OSError(EAGAIN, os.strerror(EAGAIN)) from error
        self._thread = thread

    def close(self, fd: int) -> None:
        """Close a descriptor in the thread, or at once where none was started: in workers."""
        if self._thread is None:
            _close(fd)
        else:
            self._waiting.put(fd)

    def _run(self) -> None:
        while True:
            _close(self._waiting.get())


def _close(fd: int) -> None:
    with suppress(OSError):  # it is no socket
        sock = socket.socket(fileno=fd)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        finally:
            sock.detach()
    with suppress(OSError):
        os.close(fd)


CLOSING = Closing()
