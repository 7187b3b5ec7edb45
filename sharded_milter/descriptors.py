"""File descriptors, of which a process has a limited number: who may have how many.

The kernel gives out the lowest number that is free. So a descriptor whose number is above a mark
says that everything below it is taken, whoever took it, and nothing has to be counted. Three marks
share out a limit, from below:

    any use │ no more connections of MTAs │ no more memory of messages │ limit
            └ Shares.connections          └ Shares.memory

Above the last mark are the descriptors of successors of workers, and of connections that are told
at once to come back.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass

from sharded_milter.errors import SystemRefused, UsageError

# A worker's socket and its two outputs, in the master.
OF_A_WORKER = 3

# What starting a worker takes for a moment, besides these: the child's ends of them, both ends of
# its input, and the copy of the socket that Twisted makes.
OF_A_START = 6

# Files that are open for a moment: the copy of a poisonous message, /proc, a module.
OF_A_MOMENT = 4

# Connections that are told to come back, at a time; where the limit is low, one in so many.
OF_TURNED_AWAY = 16
TURNED_AWAY_SHARE = 8

# Of all descriptors, one in so many is for messages above 48 KB, whatever connections there are.
# Such a message has its own only from its content's first 48 KB to its answer, and most connections
# are idle.
MEMORY_SHARE = 8

# The reactor and its wakers, and the spare ones.
OF_THE_REACTOR = 8

# The rest of any program: libraries, log, listeners, pipes; more than ours has been seen to need.
OF_A_PROGRAM = 64

# What the system says when there is none left for this process, or for any.
NONE_LEFT = (errno.EMFILE, errno.ENFILE)


def most() -> int:
    """How many this process may have now; an administrator can change that while it runs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def allow() -> int:
    """Raises the limit as far as the system lets us, and returns what it was.

    1024 is usual then, because programs that use select() can have no more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft


def in_use() -> int:
    """How many this process has open; a guess where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # the listing's own
    except OSError:
        return OF_A_PROGRAM


@dataclass(frozen=True)
class Shares:
    """How a limit is shared out in a master with so many workers.

    The limit is the present one each time, unless it is given.
    """

    workers: int
    limit: int | None = None

    @property
    def _most(self) -> int:
        return most() if self.limit is None else self.limit

    @property
    def turned_away(self) -> int:
        """How many connections that are told to come back there may be at a time."""
        return max(1, min(OF_TURNED_AWAY, self._most // TURNED_AWAY_SHARE))

    @property
    def memory(self) -> int:
        """The lowest descriptor that no message gets for its memory."""
        successors = self.workers * OF_A_WORKER + OF_A_START
        return self._most - successors - OF_A_MOMENT - self.turned_away

    @property
    def connections(self) -> int:
        """The lowest descriptor with which a connection is told to come back."""
        return self.memory - self._most // MEMORY_SHARE

    def room(self, used: int) -> int:
        """How many connections there can be beside the workers, when `used` are open without."""
        return self.connections - used - OF_THE_REACTOR - self.workers * OF_A_WORKER


def short_of(connections: int, shares: Shares, used: int) -> str:
    """What the operator must know where fewer connections than asked for can be served.

    Empty where all is well. Raises SystemRefused where there can be none.
    """
    room = shares.room(used)
    limit = f"the limit of {most():,} file descriptors"
    cure = "raise it with ulimit -n, or with LimitNOFILE= in the systemd unit"
    if room < 1:
        raise SystemRefused(
            f"{limit} is too low for --workers {shares.workers} and any MTA connection; {cure}"
        )
    if room >= connections:
        return ""
    return (
        f"about {room:,} MTA connections can be served at a time, instead of {connections:,}"
        f" (--max-connections), for {limit} leaves no more; {cure}"
    )


def needed(connections: int, workers: int) -> int:
    """The lowest limit with which a daemon serves so many connections."""
    # The marks are a little less than proportional to the limit, so few steps are needed.
    limit = connections
    while (missing := connections - Shares(workers, limit).room(OF_A_PROGRAM)) > 0:
        limit += missing
    return limit


def check(connections: int, workers: int) -> None:
    """Raises UsageError where the load client or its daemon would run out of them."""
    allow()
    for name, value, wanted in (
        ("--workers", workers, needed(1, workers)),
        ("--connections", connections, connections + OF_A_PROGRAM),
        ("--connections", connections, needed(connections, workers)),
    ):
        if wanted > most():
            raise UsageError(
                f"{name} {value} is too many: that takes {wanted:,} file descriptors, and the"
                f" limit (ulimit -Hn) is {most():,}"
            )


class Spare:
    """A descriptor that is held so that a connection can be answered when none is left."""

    def __init__(self) -> None:
        self._held: int | None = None

    def refill(self) -> bool:
        """Takes one again if it was given up; returns whether there is one now."""
        if self._held is None:
            with suppress(OSError):
                self._held = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return self._held is not None

    def give(self) -> bool:
        """Gives it up, so that its number is free; returns whether there was one."""
        held, self._held = self._held, None
        if held is None:
            return False
        os.close(held)
        return True
