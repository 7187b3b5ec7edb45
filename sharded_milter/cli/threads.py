"""Threads of milters that run in the master: none of them holds up the end of the service.

Python and Twisted wait for threads that are not daemons, and for those of pools, for ever.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

# How long threads have to end once the service has, seconds: as long as a worker.
GRACE = 5.0


def exit_after(grace: float, code: int, say: Callable[[str], object]) -> None:
    """Ends the process that long from now, unless it has ended by itself; `say` tells why."""
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
    """The names of threads, with what they run where that is known."""
    return ", ".join(sorted(_describe(thread) for thread in threads)) or "none"


def _describe(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return thread.name
    return f"{thread.name} (in {frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno})"
