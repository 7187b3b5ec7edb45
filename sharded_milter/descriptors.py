"""File descriptors: how the process's limited number of them is divided among its uses.

The kernel always assigns the lowest free number. So when a new descriptor has a number above a
threshold, all numbers below are in use, and nothing has to be counted. Two thresholds divide the
limit:

    any use │ no more MTA connections │ no more message memory │ limit
            └ Shares.connections      └ Shares.memory

Numbers above the second threshold are for the successors of workers, and for connections that are
refused at connect.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from sharded_milter.errors import SystemRefused, UsageError

# Descriptors of a worker in the master: its socket and its two outputs.
WORKER_FDS = 3

# Additional descriptors while a worker starts: the child's ends of those three, both ends of its
# input, and the copy of the socket that Twisted makes.
START_FDS = 6

# Files that are open for a short time: the copy of a poisonous message, /proc, a module.
TRANSIENT_FDS = 4

# The most refused connections that are open at a time: MAX_REFUSED, or 1/REFUSED_SHARE of the
# limit if that is less.
MAX_REFUSED = 16
REFUSED_SHARE = 8

# 1/MEMORY_SHARE of all descriptors is reserved for messages above 48 KB. Such a message has a
# descriptor only from the time that 48 KB of it have arrived until it is answered, and most
# connections are idle.
MEMORY_SHARE = 8

# Descriptors of the reactor, its wakers, and ReservedDescriptor.
REACTOR_FDS = 8

# All others: libraries, log, listeners, pipes. More than the daemon was observed to need.
PROGRAM_FDS = 64

# The errors when no descriptor is left for this process, or for any process.
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


def current_limit() -> int:
    """Return this process's present limit; an administrator can change it at run time."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> int:
    """Raise the limit to the highest that the system allows, and return the old one.

    The old one is usually 1024, because programs that use select() cannot use more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft


def in_use() -> int:
    """Return the number of open descriptors; an estimate if /proc is not readable."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # without the one of the listing itself
    except OSError:
        return PROGRAM_FDS


class _Thresholds(NamedTuple):
    refused: int
    memory: int
    connections: int


@lru_cache(maxsize=16)
def _thresholds(limit: int, workers: int) -> _Thresholds:
    """Return the properties of Shares; computing them takes longer than admitting a connection."""
    refused = max(1, min(MAX_REFUSED, limit // REFUSED_SHARE))
    memory = limit - workers * WORKER_FDS - START_FDS - TRANSIENT_FDS - refused
    return _Thresholds(refused, memory, memory - limit // MEMORY_SHARE)


@dataclass(frozen=True)
class Shares:
    """The thresholds that divide the limit in a master with this number of workers.

    If `limit` is None, each property uses the present limit of the process.
    """

    workers: int
    limit: int | None = None

    @property
    def _limit(self) -> int:
        return current_limit() if self.limit is None else self.limit

    @property
    def refused(self) -> int:
        """The most refused connections that may be open at a time."""
        return _thresholds(self._limit, self.workers).refused

    @property
    def memory(self) -> int:
        """The lowest descriptor that is not used for the memory of a message."""
        return _thresholds(self._limit, self.workers).memory

    @property
    def connections(self) -> int:
        """The lowest descriptor with which a new connection is refused."""
        return _thresholds(self._limit, self.workers).connections

    def room(self, used: int) -> int:
        """Return how many MTA connections fit beside the workers and `used` other descriptors."""
        return self.connections - used - REACTOR_FDS - self.workers * WORKER_FDS


def connections_warning(connections: int, shares: Shares, used: int) -> str:
    """Return a warning if fewer than `connections` can be served; else an empty string.

    Raise SystemRefused if none can be served.
    """
    room = shares.room(used)
    limit = f"the limit of {current_limit():,} file descriptors"
    cure = "raise it with ulimit -n, or with LimitNOFILE= in the systemd unit"
    if room < 1:
        raise SystemRefused(
            f"{limit} is too low for --workers {shares.workers} and any MTA connection; {cure}"
        )
    if room >= connections:
        return ""
    return (
        f"about {room:,} MTA connections can be served at a time, not {connections:,}"
        f" (--max-connections), because of {limit}; {cure}"
    )


def needed_limit(connections: int, workers: int) -> int:
    """Return the lowest limit with which a daemon can serve this number of connections."""
    # The thresholds grow almost in proportion to the limit, so the loop takes few steps.
    limit = connections
    while (missing := connections - Shares(workers, limit).room(PROGRAM_FDS)) > 0:
        limit += missing
    return limit


def check_limit(connections: int, workers: int) -> None:
    """Raise UsageError if the load client or its daemon would run out of descriptors."""
    raise_limit()
    for name, value, wanted in (
        ("--workers", workers, needed_limit(1, workers)),
        ("--connections", connections, connections + PROGRAM_FDS),
        ("--connections", connections, needed_limit(connections, workers)),
    ):
        if wanted > current_limit():
            raise UsageError(
                f"{name} {value} is too high: it needs {wanted:,} file descriptors, and the"
                f" limit (ulimit -Hn) is {current_limit():,}"
            )


class ReservedDescriptor:
    """An open descriptor, kept to be closed when a connection comes and no other is left."""

    def __init__(self) -> None:
        self._held: int | None = None

    def refill(self) -> bool:
        """Open it if it is not open; return True if it is now."""
        if self._held is None:
            with suppress(OSError):
                self._held = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return self._held is not None

    def release(self) -> bool:
        """Close it, so that its number is free; return False if it was not open."""
        held, self._held = self._held, None
        if held is None:
            return False
        os.close(held)
        return True
