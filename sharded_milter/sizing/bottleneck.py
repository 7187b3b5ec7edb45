"""Find what limits the message rate of a milter under load. PURE.

The rules, which use averages over a run:

- A process that computes all the time is the limit. The master and the load client can use one
  core each, W workers can use W.
- If the cores of the machine are all in use, the largest consumer of CPU is the limit. The other
  processes wait for a core, so they do not seem busy all the time.
- Other programs that use all cores slow a scan down, but a process that is ready to compute still
  gets some CPU time. So workers that have messages and use almost no CPU wait for something else.
- If no CPU is the limit and messages wait while every worker has one, the scans wait: for the
  network, a disk, a lock. If no message waits for a worker, the load was too light for a result.
- A worker that died is missing until its replacement is ready; a worker that never answers is
  missing for the rest of the run. Messages wait for both, and the averages do not show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# The share of a core that counts as "computes all the time". No process reaches 1: every message
# spends some time between two processes, and other programs need the cores too.
SATURATED = 0.85

# Other programs that use this share of the cores are mentioned.
NOTABLE_SHARE = 0.1

# Messages count as waiting if at least this many wait on average.
MIN_WAITING = 0.5

# A worker that has a message and uses less of a core than this waits for something other than the
# CPU. A worker that is ready gets more, even at niceness 10 beside two busy programs per core.
MIN_CORES_PER_MESSAGE = 0.05

# CPU clocks tick every 10 ms. In a run shorter than this, in seconds, a few ticks more or less
# would change the result.
MIN_SECONDS = 0.5


class Limit(Enum):
    """The resource, or the event, that limits the message rate."""

    MASTER = "master"
    WORKERS = "workers"
    QUEUE = "queue"
    LOST = "workers died"
    STUCK = "no answer"
    CLIENT = "load client"
    OTHERS = "other programs"
    NONE = "none"


@dataclass(frozen=True)
class Use:
    """Averages over a run: cores in use, and messages by where they waited."""

    seconds: float
    cores: int
    workers: int
    connections: int  # each has one message at a time
    master: float  # cores
    computing: float  # cores: all workers together
    client: float  # cores
    others: float  # cores: everything else on the machine
    queued: float  # messages that waited for a worker
    asked: float  # messages that the milter had, at any stage
    lost: int = 0  # workers that died
    unanswered: int = 0  # messages without a verdict at the end of the run

    @property
    def total(self) -> float:
        """The number of cores in use."""
        return self.master + self.computing + self.client + self.others

    @property
    def short(self) -> bool:
        """True if the run was too short to attribute CPU time."""
        return self.seconds < MIN_SECONDS

    @property
    def full(self) -> bool:
        """True if almost all cores of the machine were in use."""
        return self.total >= SATURATED * self.cores

    @property
    def taken(self) -> float:
        """The average number of messages that a worker had."""
        return min(self.asked, self.workers)

    @property
    def waiting(self) -> float:
        """The average number of messages that waited for a worker."""
        return self.queued + max(0.0, self.asked - self.workers)

    @property
    def short_of_workers(self) -> bool:
        """True if messages waited because every worker already had one."""
        taken = self.taken >= SATURATED * self.workers
        return self.workers > 0 and taken and self.waiting >= MIN_WAITING

    @property
    def computes(self) -> bool:
        """True if the workers that have messages use the CPU."""
        return self.computing >= MIN_CORES_PER_MESSAGE * self.taken


@dataclass(frozen=True)
class Bottleneck:
    """The limit, and one sentence with the figures that show it and what helps."""

    limit: Limit
    why: str

    def __str__(self) -> str:
        return f"{self.limit.value}: {self.why}"


def bottleneck(use: Use) -> Bottleneck:
    """Return what limits a run with these averages."""
    limit = _limit(use)
    return Bottleneck(limit, _WHY[limit](use))


def _limit(use: Use) -> Limit:
    limit = Limit.NONE
    if not use.short:
        limit = _busiest(use) or (_largest(use) if use.full else Limit.NONE)
    if limit not in (Limit.NONE, Limit.OTHERS):
        return limit
    if use.lost:
        return Limit.LOST
    if use.unanswered:
        return Limit.STUCK
    if limit is Limit.OTHERS and _is_slowed_by_others(use):
        return limit
    return Limit.QUEUE if use.short_of_workers and not use.short else Limit.NONE


def _is_slowed_by_others(use: Use) -> bool:
    """Return True if the milter would be faster with the cores that other programs use.

    It would not if it has no more connections than workers, or if its scans wait for something
    other than the CPU.
    """
    if use.connections <= max(1, use.workers):
        return False
    return use.computes or not use.short_of_workers


def _busiest(use: Use) -> Limit | None:
    """Return the process, or the workers, that compute all the time; None if there is none."""
    shares = {
        Limit.MASTER: use.master,
        Limit.WORKERS: use.computing / max(1, use.workers),
        Limit.CLIENT: use.client,
    }
    limit = max(shares, key=lambda limit: shares[limit])
    return limit if shares[limit] >= SATURATED else None


def _largest(use: Use) -> Limit:
    """Return the largest consumer of CPU."""
    cores = {
        Limit.MASTER: use.master,
        Limit.WORKERS: use.computing,
        Limit.CLIENT: use.client,
        Limit.OTHERS: use.others,
    }
    return max(cores, key=lambda limit: cores[limit])


def _cores_text(use: Use) -> str:
    others = (
        f" ({use.others:.1f} by other programs)" if use.others >= NOTABLE_SHARE * use.cores else ""
    )
    return f"{use.total:.1f} of {use.cores} cores were in use{others}"


def _master(use: Use) -> str:
    what = "more cores help" if use.full else "a second service with a socket of its own helps"
    return (
        f"its one process used {use.master:.2f} of a core, {_cores_text(use)}; {what}, more workers"
        " do not"
    )


def _workers(use: Use) -> str:
    why = f"{some(use.workers)} computed on {use.computing:.2f} cores, {_cores_text(use)}; "
    return why + (
        "more cores or a cheaper scan help, more workers do not"
        if use.full
        else "more workers help"
    )


def _client(use: Use) -> str:
    return (
        f"this program used {use.client:.2f} of a core, {_cores_text(use)}: the milter can answer"
        " more messages than this program can send"
    )


def _others(use: Use) -> str:
    return f"{_cores_text(use)}: measure again when the machine is idle"


def _queue(use: Use) -> str:
    return (
        f"{use.waiting:.1f} messages waited for a worker, though {some(use.workers)} computed on"
        f" only {use.computing:.2f} cores: scans wait for something else (network, disk, locks);"
        " more workers help"
    )


def _lost(use: Use) -> str:
    return (
        f"{some(use.lost)} died and messages waited for replacements, {_cores_text(use)}: find out"
        " why they die"
    )


def _stuck(use: Use) -> str:
    return (
        f"{counted(use.unanswered, 'message')} had none, and the workers that scan them take no"
        " others: find out where the scan hangs"
    )


def _none(use: Use) -> str:
    if use.short:
        return f"{use.seconds:.2g} s are too short to find a limit; run it for longer"
    if not use.workers:
        return (
            f"{_cores_text(use)}, and the milter in the master waits: the load was too light to"
            " find a limit; give more --connections"
        )
    return (
        f"{_cores_text(use)}, and {use.taken:.1f} of {some(use.workers)} had a message: the load"
        " was too light to find a limit; give more --connections"
    )


_WHY = {
    Limit.MASTER: _master,
    Limit.WORKERS: _workers,
    Limit.CLIENT: _client,
    Limit.OTHERS: _others,
    Limit.QUEUE: _queue,
    Limit.LOST: _lost,
    Limit.STUCK: _stuck,
    Limit.NONE: _none,
}


def some(workers: int) -> str:
    """Return the number with its noun: `1 worker`, `2 workers`."""
    return counted(workers, "worker")


def counted(number: int, word: str) -> str:
    """Return the number with its noun: `1 message`, `2,000 messages`."""
    return f"{number:,} {word}" + "s" * (number != 1)
