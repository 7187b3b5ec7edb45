"""What kept a milter under load from being faster. PURE.

What can be concluded from averages over a run:

- A process that computes all the time cannot do more: the master and the load client have one
  core each at most, W workers have W.
- Where the cores of the machine are used up, whoever has most of them is what there is too much
  of; who else wants a core waits for it, though it never seems busy all the time.
- Other programs that use up the cores slow a scan down, but whoever is ready to compute gets its
  share now and then. Workers that have messages and hardly compute do not want to.
- Where neither is so, somebody waits for something that is no CPU. If messages wait while all
  workers have one, the scans do: for the network, a disk, a lock. If no message waits for a
  worker, there were too few of them at a time to say anything.
- A worker that dies is missed until there is another, and one that never answers is missed for
  good. Messages wait for them then, and the averages do not show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# The share of the time that is "all the time". Nobody reaches 1: each message has moments between
# two processes, and other programs want the cores too.
ALL_THE_TIME = 0.85

# This share of the cores is no noise when other programs have it.
NOTEWORTHY = 0.1

# So many messages must wait on average for one to be sure that they do.
WAITING = 0.5

# A worker that has a message and uses less than this of a core waits for something that is no CPU.
# One that is ready gets more even at a niceness of 10 beside two busy programs for each core.
HARDLY = 0.05


# Clocks of CPU time tick every 10 ms: in less than this a few ticks more or less look like a share.
SHORT = 0.5


class Limit(Enum):
    """What there is too little of."""

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
    """Averages over a run: cores that were used, and messages that were somewhere."""

    seconds: float
    cores: int
    workers: int
    connections: int  # each has one message at a time
    master: float  # cores
    computing: float  # cores: all workers together
    client: float  # cores
    others: float  # cores: everything else on the machine
    queued: float  # messages that waited for a worker
    asked: float  # messages that the milter had, at whatever stage
    lost: int = 0  # workers that died
    unanswered: int = 0  # messages that the run has given up

    @property
    def total(self) -> float:
        """The cores in use."""
        return self.master + self.computing + self.client + self.others

    @property
    def short(self) -> bool:
        """Whether it took too little time to tell who computed."""
        return self.seconds < SHORT

    @property
    def full(self) -> bool:
        """Whether the machine's cores are used up."""
        return self.total >= ALL_THE_TIME * self.cores

    @property
    def taken(self) -> float:
        """Messages that a worker had."""
        return min(self.asked, self.workers)

    @property
    def waiting(self) -> float:
        """Messages that no worker had yet."""
        return self.queued + max(0.0, self.asked - self.workers)

    @property
    def short_of_workers(self) -> bool:
        """Whether messages waited because all workers had one."""
        taken = self.taken >= ALL_THE_TIME * self.workers
        return self.workers > 0 and taken and self.waiting >= WAITING

    @property
    def computes(self) -> bool:
        """Whether the workers want a core for what they do."""
        return self.computing >= HARDLY * self.taken


@dataclass(frozen=True)
class Bottleneck:
    """The answer, the figures that prove it, and what follows."""

    limit: Limit
    why: str

    def __str__(self) -> str:
        return f"{self.limit.value}: {self.why}"


def bottleneck(use: Use) -> Bottleneck:
    """What limits a run that was like that."""
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
    if limit is Limit.OTHERS and _others_matter(use):
        return limit
    return Limit.QUEUE if use.short_of_workers and not use.short else Limit.NONE


def _others_matter(use: Use) -> bool:
    """Whether the milter would be faster with the cores that other programs have.

    With no more connections than workers there is nothing to be faster with, and scans that wait
    for something else do so anyway.
    """
    if use.connections <= max(1, use.workers):
        return False
    return use.computes or not use.short_of_workers


def _busiest(use: Use) -> Limit | None:
    """Who computes all the time."""
    shares = {
        Limit.MASTER: use.master,
        Limit.WORKERS: use.computing / max(1, use.workers),
        Limit.CLIENT: use.client,
    }
    limit = max(shares, key=lambda limit: shares[limit])
    return limit if shares[limit] >= ALL_THE_TIME else None


def _largest(use: Use) -> Limit:
    """Who has most of the cores."""
    cores = {
        Limit.MASTER: use.master,
        Limit.WORKERS: use.computing,
        Limit.CLIENT: use.client,
        Limit.OTHERS: use.others,
    }
    return max(cores, key=lambda limit: cores[limit])


def _used_up(use: Use) -> str:
    others = (
        f" ({use.others:.1f} by other programs)" if use.others >= NOTEWORTHY * use.cores else ""
    )
    return f"{use.total:.1f} of {use.cores} cores were in use{others}"


def _master(use: Use) -> str:
    what = "more cores help" if use.full else "a second service with a socket of its own helps"
    return (
        f"its one process used {use.master:.2f} of a core, {_used_up(use)}; {what}, more workers"
        " do not"
    )


def _workers(use: Use) -> str:
    why = f"{some(use.workers)} computed on {use.computing:.2f} cores, {_used_up(use)}; "
    return why + (
        "more cores or a cheaper scan help, more workers do not"
        if use.full
        else "more workers help"
    )


def _client(use: Use) -> str:
    return (
        f"this program used {use.client:.2f} of a core, {_used_up(use)}: the milter could do more"
        " than it was sent"
    )


def _others(use: Use) -> str:
    return f"{_used_up(use)}: measure again when the machine is idle"


def _queue(use: Use) -> str:
    return (
        f"{use.waiting:.1f} messages waited for a worker, though {some(use.workers)} computed on"
        f" only {use.computing:.2f} cores: scans wait for something else (network, disk, locks);"
        " more workers help"
    )


def _lost(use: Use) -> str:
    return (
        f"{some(use.lost)} died and messages waited for replacements, {_used_up(use)}: find out"
        " why they die"
    )


def _stuck(use: Use) -> str:
    return (
        f"{counted(use.unanswered, 'message')} never got one, and whoever has them does nothing"
        " else: find out where the scan hangs"
    )


def _none(use: Use) -> str:
    if use.short:
        return f"{use.seconds:.2g} s are too short to find a limit; a longer run would show more"
    if not use.workers:
        return (
            f"{_used_up(use)}; the milter in the master waits; more --connections would show more"
        )
    return (
        f"{_used_up(use)}, and of {some(use.workers)} {use.taken:.1f} had a message: the load was"
        " too light to find a limit; more --connections would show more"
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
    """`1 worker`, `2 workers`."""
    return counted(workers, "worker")


def counted(number: int, word: str) -> str:
    """`1 message`, `2,000 messages`."""
    return f"{number:,} {word}" + "s" * (number != 1)
