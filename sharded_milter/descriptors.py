"""How many file descriptors this process and those that it starts may have."""

from __future__ import annotations

import resource
import sys

from sharded_milter.errors import UsageError

# A worker's three pipes to the master, and those of its successor.
OF_A_WORKER = 6

# The rest of a program: libraries, log, listeners, pipes.
OF_A_PROGRAM = 64


def allow() -> int:
    """As many as the system lets us have, and how many these are: 1024 is usual otherwise."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return sys.maxsize if most == resource.RLIM_INFINITY else most


def check(connections: int, workers: int) -> None:
    """Raises UsageError where the load client or its daemon would run out of them."""
    most = allow()
    for name, value, needed in (
        ("--workers", workers, workers * OF_A_WORKER + OF_A_PROGRAM),
        ("--connections", connections, connections + OF_A_PROGRAM),
        ("--connections", connections, connections + workers * OF_A_WORKER + OF_A_PROGRAM),
    ):
        if needed > most:
            raise UsageError(
                f"{name} {value} is too many: that takes {needed:,} file descriptors, and the"
                f" limit (ulimit -Hn) is {most:,}"
            )
