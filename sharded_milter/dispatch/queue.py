"""The queue: the choice of the next job and of its shard. Pure: no clock, no I/O.

The caller reports every change (a job waits; a shard is idle, busy or gone) and then takes pairs
with `next_pair` until there are none; so the queue is drained on every change of capacity.

Order: by the age of the message or connection that the job belongs to, so that what has begun is
finished first and nothing starves. `born` is the time when that began; light jobs count as one
second older.

Shard:
- an object's job runs on the shard that has the object, and nowhere else;
- a job that must run alone (`solo`) runs on an idle shard that has had no job yet;
- a job with a key runs on the key's shard if that is idle or has room behind its first job, else
  on any other, so that no key waits while a shard is idle;
- any other runs on the shard that became idle last, so that caches stay warm and surplus shards
  stay idle;
- where no shard is idle, it waits behind the jobs of a shard that has room;
- a job that has waited too long behind another (`offer`) runs on a shard that is or becomes idle,
  in order of age, or stays. Meanwhile no younger job is put behind another, because shards that
  always have a next job never become idle.
Heavy jobs leave `reserve` shards to light ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

from sharded_milter.dispatch.capacity import Capacity, ShardLoad
from sharded_milter.errors import Overloaded

# Seconds that a light job counts as older: it is done fast, and an SMTP client waits for it.
LIGHT_HEAD_START = 1.0

# Removed jobs stay in the heaps until they come to the top; above this many, the heaps are rebuilt.
MAX_STALE = 64


class QueuedJob(Protocol):
    """What the queue needs of a job; only the queue sets `entry`."""

    stage: Any
    light: bool
    key: bytes
    born: float
    solo: bool
    entry: int
    affinity: Any  # None, or its `holder` is the only shard that can do the job


J = TypeVar("J", bound=QueuedJob)
S = TypeVar("S", bound=ShardLoad)

Entry = tuple[float, int, J]  # age, number, job


class _Heaps(Generic[J]):
    """Two heaps of jobs by age: light and heavy."""

    __slots__ = ("heavy", "light")

    def __init__(self) -> None:
        self.light: list[Entry[J]] = []
        self.heavy: list[Entry[J]] = []

    def push(self, entry: Entry[J]) -> None:
        heapq.heappush(self.light if entry[2].light else self.heavy, entry)

    def tops(self) -> Iterator[list[Entry[J]]]:
        """Yield the heaps that have a job, with the oldest on top."""
        for heap in (self.light, self.heavy):
            while heap and heap[0][2].entry != heap[0][1]:  # it was removed
                heapq.heappop(heap)
            if heap:
                yield heap


class Queue(Generic[J, S]):
    """Jobs that wait, and the capacity of the shards."""

    def __init__(self, max_queue: int, reserve: int = 0) -> None:
        self.capacity: Capacity[S] = Capacity(reserve)
        self._max_queue = max_queue
        self._numbers = count(1)
        self._jobs: dict[int, J] = {}  # that wait for a shard, by entry
        self._offered: dict[int, J] = {}  # that wait behind another job, by entry
        self._common: _Heaps[J] = _Heaps()
        self._solo: _Heaps[J] = _Heaps()
        self._behind: _Heaps[J] = _Heaps()
        self._objects: dict[S, _Heaps[J]] = {}
        self._stale = 0  # entries of removed jobs that are still in a heap

    # Jobs

    def __len__(self) -> int:
        """Return the number of jobs that wait for a shard."""
        return len(self._jobs)

    @property
    def has_jobs(self) -> bool:
        """Whether any job waits, for a shard or behind another job."""
        return bool(self._jobs or self._offered)

    @property
    def is_full(self) -> bool:
        """Whether the limit of waiting jobs is reached.

        Idle shards may not fit the jobs that wait, so each of them raises the limit by one.
        """
        return len(self._jobs) >= self._max_queue + self.capacity.idle_count

    @property
    def waits_for_fresh(self) -> bool:
        """Whether a job waits for a shard that has had no job yet, and none is idle."""
        waits = any(True for _ in self._solo.tops())
        return waits and self.capacity.fresh is None

    def add(self, job: J, *, requeued: bool = False) -> None:
        """Add a job; raise Overloaded when no shard is idle and the queue is full.

        End-of-session notices and `requeued` jobs are never refused.
        """
        if self.is_full and job.stage is not None and not requeued:
            raise Overloaded(f"the queue is full ({self._max_queue} jobs wait)")
        self._add(job, self._jobs)

    def offer(self, job: J) -> None:
        """Offer a job that waits behind another to shards that are or become idle."""
        self._add(job, self._offered)

    def _add(self, job: J, kind: dict[int, J]) -> None:
        job.entry = next(self._numbers)
        kind[job.entry] = job
        self._push(job)

    def _push(self, job: J) -> None:
        age = job.born - LIGHT_HEAD_START if job.light else job.born
        self._heaps_of(job).push((age, job.entry, job))

    def _heaps_of(self, job: J) -> _Heaps[J]:
        if job.entry in self._offered:
            return self._behind
        if job.affinity is not None and job.affinity.holder is not None:
            return self._objects.setdefault(job.affinity.holder, _Heaps())
        return self._solo if job.solo else self._common

    def remove(self, job: J) -> bool:
        """Remove the job; return whether it was waiting for a shard."""
        entry, job.entry = job.entry, 0
        if not entry:
            return False
        self._stale += 1
        waited = self._jobs.pop(entry, None) is not None
        self._offered.pop(entry, None)
        if self._stale > len(self._jobs) + len(self._offered) + MAX_STALE:
            self._rebuild()
        return waited

    def _rebuild(self) -> None:
        self._common, self._solo, self._behind = _Heaps(), _Heaps(), _Heaps()
        self._objects, self._stale = {}, 0
        for job in (*self._jobs.values(), *self._offered.values()):
            self._push(job)

    def remove_shard(self, shard: S) -> list[J]:
        """Forget a shard that is gone; remove and return the jobs of its objects."""
        self.capacity.remove(shard)
        return self.remove_object_jobs(shard)

    def remove_object_jobs(self, shard: S) -> list[J]:
        """Remove and return the jobs of the shard's objects, which are lost."""
        heaps = self._objects.pop(shard, None)
        if heaps is None:
            return []
        entries = sorted(heaps.light + heaps.heavy)
        jobs = [job for _, entry, job in entries if job.entry == entry]
        for job in jobs:
            self.remove(job)
        return jobs

    # Pairs

    def immediate_shard(self, job: J) -> S | None:
        """Return a shard for a new job if no other job waits; None if none can take it now.

        The job does not enter the queue.
        """
        if self._jobs or job.solo:
            return None
        heavy = job.light or self.capacity.allows_heavy
        if job.affinity is None or job.affinity.holder is None:
            return self.capacity.shard_for(job, heavy=heavy, behind=not self._offered)
        holder: S = job.affinity.holder
        return holder if self.capacity.takes_object(holder, heavy=heavy) else None

    def next_pair(self) -> tuple[J, S] | None:
        """Return the next job and its shard, and remove the job; None if none fits.

        The caller must then report what the shard has in flight (`capacity.set_busy`).
        """
        if not self._jobs and not self._offered:
            return None
        found = self._solo_pair() or min(self._pairs(), default=None)
        if found is None:
            return None
        heap, shard = found[2:]
        job: J = heapq.heappop(heap)[2]
        self._jobs.pop(job.entry, None)
        self._offered.pop(job.entry, None)
        job.entry = 0
        return job, shard

    def _solo_pair(self) -> tuple[float, int, list[Entry[J]], S] | None:
        """Return the oldest solo job and a fresh shard: only solo jobs need a fresh one."""
        if not (self._solo.light or self._solo.heavy):
            return None
        fresh = self.capacity.fresh
        if fresh is None:
            return None
        heavy = self.capacity.allows_heavy
        tops = (heap for heap in self._solo.tops() if heap[0][2].light or heavy)
        return min(((*heap[0][:2], heap, fresh) for heap in tops), default=None)

    def _pairs(self) -> Iterator[tuple[float, int, list[Entry[J]], S]]:
        """Yield the oldest job of each heap that a shard can take, with that shard."""
        heavy = self.capacity.allows_heavy
        oldest = min((heap[0][:2] for heap in self._behind.tops()), default=None)
        for heaps in (self._common, self._behind):
            for heap in heaps.tops():
                job = heap[0][2]
                behind = heaps is self._common and (oldest is None or heap[0][:2] < oldest)
                shard = self.capacity.shard_for(job, heavy=job.light or heavy, behind=behind)
                if shard is not None:
                    yield *heap[0][:2], heap, shard
        for shard, heaps in self._objects.items():
            for heap in heaps.tops():
                if self.capacity.takes_object(shard, heavy=heap[0][2].light or heavy):
                    yield *heap[0][:2], heap, shard
