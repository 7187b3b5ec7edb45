"""End the process even if threads of milters in the master still run.

Python and Twisted would wait without a limit for non-daemon threads and those of thread pools.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

# Seconds that threads have to end after the service has ended: as long as a worker has.
GRACE = 5.0


def exit_after(grace: float, code: int, say: Callable[[str], object]) -> None:
    """End the process with `code` in `grace` seconds, unless it has ended before.

    `say` is called before that with the names of the threads that still run.
    """
    own = threading.current_thread()

    def leave() -> None:
        time.sleep(grace)
        say(
            describe_threads(
                thread for thread in threading.enumerate() if thread not in (own, waiting)
            )
        )
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    waiting = threading.Thread(target=leave, name="end of the service", daemon=True)
    waiting.start()


def describe_threads(threads: Iterable[threading.Thread]) -> str:
    """Return the names of threads, with the function that each runs if it is known."""
    return ", ".join(sorted(_describe(thread) for thread in threads)) or "none"


def _describe(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return thread.name
    return f"{thread.name} (in {frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno})"
