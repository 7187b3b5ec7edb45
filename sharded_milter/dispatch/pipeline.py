"""A pipeline: the attempts that one shard has in hand, in the order in which it was given them.

A shard with short scans spends much of its time waiting for the master to hear of one and to send
the next. So it is given more while it does one, if no other shard is idle: a second where a scan
takes some milliseconds, several where it takes a fraction of one, which then leave in one write.
Pure: `now` is a clock's, in seconds.
"""

from __future__ import annotations

from typing import Protocol

from sharded_milter.dispatch.affinity import Affinity
from sharded_milter.dispatch.job import Attempt, Job, Loss
from sharded_milter.protocol.negotiation import Manifest

# Scans that take less than this on average are worth it, seconds: the gap between two jobs is a
# fraction of a millisecond.
SHORT = 0.015

# Scans that are shorter still: as many are given as take so long, seconds, together. A write costs
# both sides as much as the shortest scan; that of several jobs costs no more than that of one.
AHEAD = 0.004

# But not more than these: they are promised to one shard while another may become idle.
MAX_AHEAD = 7

# How much the latest scan counts in the average, and how many scans make one.
WEIGHT = 0.1
ENOUGH = 20


class Shard(Protocol):
    """What dispatch needs of a process that answers jobs."""

    slot: int
    working_on: str  # the queue id of what it does, or did last

    def serves(self, milter: int, manifest: Manifest) -> bool: ...
    def give(self, number: int, job: Job) -> None: ...
    def withdraw(self, number: int) -> None: ...
    def catch_up(self) -> None: ...
    def emptied(self) -> None: ...
    def kill(self, loss: Loss) -> None: ...
    def dump_stacks(self) -> None: ...


class Pipeline:
    """What one shard does and does next, and how long it takes."""

    __slots__ = (
        "_answered",
        "_average",
        "affinities",
        "attempts",
        "available",
        "first",
        "fresh",
        "retired",
        "shard",
        "slot",
    )

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.slot = shard.slot
        self.attempts: dict[int, Attempt] = {}  # by number, in order
        self.affinities: set[Affinity] = set()  # whose objects the shard has
        self.first: Attempt | None = None  # the one that the shard is at work on
        self.fresh = True  # it has never been given anything
        self.retired = False  # it takes what its objects are told, and nothing else
        self.available = True  # False: nothing can be told to it any more
        self._answered = 0
        self._average = 0.0

    @property
    def is_over(self) -> bool:
        """Whether a retired shard has nothing left to do."""
        return self.retired and not self.attempts and not self.affinities

    def lose_objects(self) -> None:
        """Its objects are lost, or have had their time."""
        affinities, self.affinities = self.affinities, set()
        for affinity in affinities:
            affinity.lose()

    def add(self, attempt: Attempt, now: float) -> None:
        """The shard has been given a job more."""
        self.fresh = False
        self.attempts[attempt.number] = attempt
        if self.first is None:
            self._begin(attempt, now)

    def end(self, attempt: Attempt, now: float, *, scanned: bool) -> Attempt | None:
        """The shard has answered it; returns the attempt that begins now, if there is one.

        `scanned` is False for one that was withdrawn, which may not have been the first.
        """
        del self.attempts[attempt.number]
        attempt.held = None
        if attempt is not self.first:
            return None
        if scanned:
            self._answered += 1
            weight = max(WEIGHT, 1 / self._answered)
            self._average += weight * (now - attempt.began - self._average)
        self.first = None
        for after in self.attempts.values():
            self._begin(after, now)
            return after
        return None

    def _begin(self, attempt: Attempt, now: float) -> None:
        self.first = attempt
        attempt.began = now
        self.shard.working_on = attempt.job.queue_id

    @property
    def has_room(self) -> bool:
        """Whether the shard has something in hand, and may be given another job behind it."""
        if not self.available or self._answered < ENOUGH or self._average >= SHORT:
            return False
        first = self.first
        if first is None or first.job.solo:
            return False
        ahead = AHEAD // self._average if self._average else MAX_AHEAD
        return len(self.attempts) <= max(1, min(MAX_AHEAD, ahead))
