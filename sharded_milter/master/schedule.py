"""The schedule: which queued job runs on which idle shard next. Pure: no clock, no I/O.

The owner tells it what happened (`submit`, `idle`, `gone`, `withdraw`) and takes assignments with
`next` until there are none; so the queue is drained on every change of capacity, whatever its
cause.

Order of jobs: light ones first, then later stages before earlier ones (a message that is half
done blocks an MTA; one that has not begun does not), then the oldest.
Order of shards: the one that has run longest first, so that caches stay warm and surplus idles.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Protocol, TypeVar

from sharded_milter.errors import Overloaded
from sharded_milter.protocol.stages import Stage

# How far a message has come when a stage asks; UNKNOWN belongs to no message.
PROGRESS = {stage: place for place, stage in enumerate(Stage)} | {Stage.UNKNOWN: -1}

# Withdrawn jobs stay in the heap until they come up; above this many it is built anew.
MAX_DEBRIS = 64


class Schedulable(Protocol):
    """What the schedule must know of a job."""

    @property
    def stage(self) -> Stage: ...
    @property
    def light(self) -> bool: ...


J = TypeVar("J", bound=Schedulable)
S = TypeVar("S", bound=Hashable)


@dataclass(order=True, slots=True)
class _Entry(Generic[J]):
    heavy: bool
    unready: int
    number: int
    job: J = field(compare=False)
    due: float = field(compare=False)
    taken: bool = field(compare=False, default=False)


class Schedule(Generic[J, S]):
    """Queued jobs and idle shards; `now` is any clock that only runs forward, in seconds."""

    def __init__(self, max_queue: int, queue_wait: float) -> None:
        self._max_queue = max_queue
        self._queue_wait = queue_wait
        self._heap: list[_Entry[J]] = []
        self._entries: dict[int, _Entry[J]] = {}  # by id(job), those still waiting
        self._numbers = count()
        self._ages: dict[S, int] = {}  # every shard that may get work, by the order of arrival
        self._idle: set[S] = set()

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._entries)

    def submit(self, job: J, now: float) -> None:
        """A job to be done; raises Overloaded when nobody is idle and the queue is full."""
        if not self._idle and len(self._entries) >= self._max_queue:
            raise Overloaded(f"the queue is full ({self._max_queue} jobs wait)")
        due = now + self._queue_wait
        entry = _Entry(not job.light, -PROGRESS[job.stage], next(self._numbers), job, due)
        self._entries[id(job)] = entry
        heapq.heappush(self._heap, entry)

    def withdraw(self, job: J) -> bool:
        """The job is no longer wanted; whether it was still waiting."""
        entry = self._entries.pop(id(job), None)
        if entry is None:
            return False
        entry.taken = True
        if len(self._heap) > 2 * len(self._entries) + MAX_DEBRIS:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
        return True

    def idle(self, shard: S) -> None:
        """The shard, new or known, can take a job."""
        self._ages.setdefault(shard, next(self._numbers))
        self._idle.add(shard)

    def gone(self, shard: S) -> None:
        """The shard takes no more jobs."""
        self._ages.pop(shard, None)
        self._idle.discard(shard)

    def next(self) -> tuple[J, S] | None:
        """A job and the shard that does it now, which is busy from here on; None if none fits."""
        while self._heap and self._heap[0].taken:
            heapq.heappop(self._heap)
        if not self._heap or not self._idle:
            return None
        entry = heapq.heappop(self._heap)
        del self._entries[id(entry.job)]
        shard = min(self._idle, key=self._ages.__getitem__)
        self._idle.discard(shard)
        return entry.job, shard

    def overdue(self, now: float) -> list[J]:
        """The jobs that have waited too long; they are withdrawn."""
        late = [entry.job for entry in self._entries.values() if entry.due <= now]
        for job in late:
            self.withdraw(job)
        return late
