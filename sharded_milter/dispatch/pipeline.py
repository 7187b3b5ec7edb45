"""A pipeline: the attempts that one shard has in flight, oldest first. Pure.

A shard with short scans would spend much of its time waiting for the master's next job. So while
it runs one, and no other shard is idle, it is given more: one where a scan takes some
milliseconds, several, sent in one write, where it takes a fraction of one. `now` is the reactor's
time in seconds.
"""

from __future__ import annotations

from typing import Protocol

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Attempt, Job, Loss
from sharded_milter.protocol.negotiation import Manifest

# Only scans that take less than this on average, seconds, are pipelined: the gap between two jobs
# is a fraction of a millisecond.
SHORT_SCAN = 0.015

# As many scans are pipelined as take this long together, seconds, but at least one. A write costs
# both sides as much as the shortest scan, and a write of several jobs costs no more than of one.
PIPELINE_SECONDS = 0.004

# The most jobs behind the first: they are bound to one shard while another may become idle.
MAX_PIPELINED = 7

# The weight of the latest scan in the average, and the scans after which the average counts.
LATEST_WEIGHT = 0.1
MIN_SCANS = 20


class ShardControl(Protocol):
    """What the dispatcher needs of a shard."""

    slot: int
    current_queue_id: str  # of the job that it runs or has run last

    def serves(self, milter: int, manifest: Manifest) -> bool: ...
    def give(self, number: int, job: Job) -> None: ...
    def withdraw(self, number: int) -> None: ...
    def catch_up(self) -> None: ...
    def drained(self) -> None: ...
    def kill(self, loss: Loss) -> None: ...
    def dump_stacks(self) -> None: ...


class Pipeline:
    """The attempts of one shard, and the average time of its scans."""

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

    def __init__(self, shard: ShardControl) -> None:
        self.shard = shard
        self.slot = shard.slot
        self.attempts: dict[int, Attempt] = {}  # by number, oldest first
        self.affinities: set[ObjectAffinity] = set()  # of the objects that the shard has
        self.first: Attempt | None = None  # the one that the shard runs
        self.fresh = True  # it has had no job yet
        self.retired = False  # it takes only jobs of its objects
        self.available = True  # False: it can be given nothing more
        self._answered = 0
        self._average = 0.0

    @property
    def is_drained(self) -> bool:
        """Whether the shard is retired and has neither attempts nor objects."""
        return self.retired and not self.attempts and not self.affinities

    def lose_objects(self) -> None:
        """Record that all objects of the shard are lost."""
        affinities, self.affinities = self.affinities, set()
        for affinity in affinities:
            affinity.lose_object()

    def add(self, attempt: Attempt, now: float) -> None:
        """Append an attempt that the shard has been given."""
        self.fresh = False
        self.attempts[attempt.number] = attempt
        if self.first is None:
            self._start(attempt, now)

    def remove(self, attempt: Attempt, now: float, *, scanned: bool) -> Attempt | None:
        """Remove an attempt that has ended; return the attempt that begins now, if any.

        `scanned` is False for a withdrawn one, which may not have been the first.
        """
        del self.attempts[attempt.number]
        attempt.held = None
        if attempt is not self.first:
            return None
        if scanned:
            self._answered += 1
            weight = max(LATEST_WEIGHT, 1 / self._answered)
            self._average += weight * (now - attempt.began - self._average)
        self.first = None
        for after in self.attempts.values():
            self._start(after, now)
            return after
        return None

    def _start(self, attempt: Attempt, now: float) -> None:
        self.first = attempt
        attempt.began = now
        self.shard.current_queue_id = attempt.job.queue_id

    @property
    def has_room(self) -> bool:
        """Whether the shard has a job in flight, and may be given another behind it."""
        if not self.available or self._answered < MIN_SCANS or self._average >= SHORT_SCAN:
            return False
        first = self.first
        if first is None or first.job.solo:
            return False
        ahead = PIPELINE_SECONDS // self._average if self._average else MAX_PIPELINED
        return len(self.attempts) <= max(1, min(MAX_PIPELINED, ahead))
