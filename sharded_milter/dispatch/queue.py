"""The queue: which job runs next, on which shard. Pure: no clock, no I/O.

The owner tells it what happened (a job waits, a shard is idle, full or gone) and takes pairs with
`next` until there are none; so the queue is drained on every change of capacity, whatever its
cause.

Order: by age of what the job belongs to, so that what has begun is finished first and nothing
starves. `born` says when that was; light jobs count as one second older.

Place:
- an object's job runs on the shard that has the object, and nowhere else;
- a job that runs alone (`solo`) runs on an idle shard that has never been given anything;
- a job with a key runs on the key's shard if that is idle or has room behind what it does, else
  on any other, so that a key never waits while a shard is idle;
- any other runs on the shard that became idle last, so that caches stay warm and surplus idles;
- where no shard is idle, it goes behind what a shard does that has room;
- a job that was given to a shard but has waited there too long (`offer`) runs on a shard that is
  or becomes idle, in its turn by age, or stays; no younger job goes behind another meanwhile, for
  shards that always have a next job never become idle.
Heavy jobs leave `reserve` shards to light ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

from sharded_milter.dispatch.capacity import Capacity, Server
from sharded_milter.errors import Overloaded

# How much older a light job counts, seconds. It is done in no time, and a client waits for it.
LIGHT_HEAD_START = 1.0

# Jobs that leave stay in the heaps until they come up; above this many all are built anew.
MAX_DEBRIS = 64


class Waiting(Protocol):
    """What the queue must know of a job; `entry` is the queue's own."""

    stage: Any
    light: bool
    key: bytes
    born: float
    solo: bool
    entry: int
    affinity: Any  # with the one shard that can do it as its holder, or None


J = TypeVar("J", bound=Waiting)
S = TypeVar("S", bound=Server)

Entry = tuple[float, int, J]  # age, number, job


class _Heaps(Generic[J]):
    """Jobs by age, the light ones apart from the heavy ones."""

    __slots__ = ("heavy", "light")

    def __init__(self) -> None:
        self.light: list[Entry[J]] = []
        self.heavy: list[Entry[J]] = []

    def push(self, entry: Entry[J]) -> None:
        heapq.heappush(self.light if entry[2].light else self.heavy, entry)

    def tops(self) -> Iterator[list[Entry[J]]]:
        """The heaps that have a job, with the oldest on top."""
        for heap in (self.light, self.heavy):
            while heap and heap[0][2].entry != heap[0][1]:  # it has left
                heapq.heappop(heap)
            if heap:
                yield heap


class Queue(Generic[J, S]):
    """Jobs that wait, and shards that may take one."""

    def __init__(self, max_queue: int, reserve: int = 0) -> None:
        self.shards: Capacity[S] = Capacity(reserve)
        self._max_queue = max_queue
        self._numbers = count(1)
        self._jobs: dict[int, J] = {}  # by entry: those that wait for a shard
        self._offered: dict[int, J] = {}  # those that wait behind another job
        self._common: _Heaps[J] = _Heaps()
        self._solo: _Heaps[J] = _Heaps()
        self._behind: _Heaps[J] = _Heaps()
        self._objects: dict[S, _Heaps[J]] = {}
        self._left = 0  # entries of jobs that have left, still in a heap

    # Jobs

    def __len__(self) -> int:
        """How many jobs wait for a shard."""
        return len(self._jobs)

    @property
    def has_jobs(self) -> bool:
        """Whether any job waits, be it behind another."""
        return bool(self._jobs or self._offered)

    @property
    def is_full(self) -> bool:
        """Whether as many jobs wait as may.

        Idle shards need not fit the jobs that wait, so they make room for as many as they are.
        """
        return len(self._jobs) >= self._max_queue + self.shards.idle_count

    @property
    def waits_for_fresh(self) -> bool:
        """Whether a job waits for a shard that has never been given anything, and none is idle."""
        waits = any(True for _ in self._solo.tops())
        return waits and self.shards.fresh is None

    def add(self, job: J, *, again: bool = False) -> None:
        """A job waits; raises Overloaded when no shard is idle and the queue is full.

        Never too many are the end of an object's session, and a job that waits `again`.
        """
        if self.is_full and job.stage is not None and not again:
            raise Overloaded(f"the queue is full ({self._max_queue} jobs wait)")
        self._enter(job, self._jobs)

    def offer(self, job: J) -> None:
        """A job waits behind another: a shard that is or becomes idle may take it over."""
        self._enter(job, self._offered)

    def _enter(self, job: J, kind: dict[int, J]) -> None:
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
        """The job does not wait any more; whether it was waiting for a shard."""
        entry, job.entry = job.entry, 0
        if not entry:
            return False
        self._left += 1
        waited = self._jobs.pop(entry, None) is not None
        self._offered.pop(entry, None)
        if self._left > len(self._jobs) + len(self._offered) + MAX_DEBRIS:
            self._rebuild()
        return waited

    def _rebuild(self) -> None:
        self._common, self._solo, self._behind = _Heaps(), _Heaps(), _Heaps()
        self._objects, self._left = {}, 0
        for job in (*self._jobs.values(), *self._offered.values()):
            self._push(job)

    def gone(self, shard: S) -> list[J]:
        """The shard is no more; returns its objects' jobs, which wait no longer."""
        self.shards.gone(shard)
        return self.take_objects(shard)

    def take_objects(self, shard: S) -> list[J]:
        """The shard's objects are lost; returns their jobs, which wait no longer."""
        heaps = self._objects.pop(shard, None)
        if heaps is None:
            return []
        entries = sorted(heaps.light + heaps.heavy)
        jobs = [job for _, entry, job in entries if job.entry == entry]
        for job in jobs:
            self.remove(job)
        return jobs

    # Pairs

    def place(self, job: J) -> S | None:
        """The shard that does a new job at once, where no other job waits; None where none can.

        The job does not enter the queue.
        """
        if self._jobs or job.solo:
            return None
        heavy = job.light or self.shards.allows_heavy
        if job.affinity is None or job.affinity.holder is None:
            return self.shards.shard_for(job, heavy=heavy, behind=not self._offered)
        holder: S = job.affinity.holder
        return holder if self.shards.takes_object(holder, heavy=heavy) else None

    def next(self) -> tuple[J, S] | None:
        """A job and the shard that does it now; None if none fits.

        The job leaves the queue. The owner says next what the shard has in hand (`busy`).
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
        """One that runs alone gets the first shard that is fresh: any other job can do without."""
        if not (self._solo.light or self._solo.heavy):
            return None
        fresh = self.shards.fresh
        if fresh is None:
            return None
        heavy = self.shards.allows_heavy
        tops = (heap for heap in self._solo.tops() if heap[0][2].light or heavy)
        return min(((*heap[0][:2], heap, fresh) for heap in tops), default=None)

    def _pairs(self) -> Iterator[tuple[float, int, list[Entry[J]], S]]:
        """The oldest job of each heap from which a shard can take one, with that shard."""
        heavy = self.shards.allows_heavy
        oldest = min((heap[0][:2] for heap in self._behind.tops()), default=None)
        for heaps in (self._common, self._behind):
            for heap in heaps.tops():
                job = heap[0][2]
                behind = heaps is self._common and (oldest is None or heap[0][:2] < oldest)
                shard = self.shards.shard_for(job, heavy=job.light or heavy, behind=behind)
                if shard is not None:
                    yield *heap[0][:2], heap, shard
        for shard, heaps in self._objects.items():
            for heap in heaps.tops():
                if self.shards.takes_object(shard, heavy=heap[0][2].light or heavy):
                    yield *heap[0][:2], heap, shard
