"""The schedule: which queued job runs on which idle shard next. Pure: no clock, no I/O.

The owner tells it what happened (`submit`, `idle`, `gone`, `withdraw`) and takes assignments with
`next` until there are none; so the queue is drained on every change of capacity, whatever its
cause.

Order of jobs: light ones first, then later stages before earlier ones (a message that is half
done blocks an MTA; one that has not begun does not), then the oldest.
Place of jobs: one that is pinned runs on its own shard only, also while that takes no others any
more; a heavy one with a key runs on the shard that the key's rendezvous hash chooses among those
there are; any other on the idle shard that has run longest, so that caches stay warm and surplus
idles. Heavy jobs leave `reserve` shards to light ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from operator import itemgetter
from typing import Any, Generic, Protocol, TypeVar

from sharded_milter.errors import Overloaded
from sharded_milter.protocol.stages import Stage

# How far a message has come when a stage asks; UNKNOWN belongs to no message, and nobody waits
# for what has no stage.
PROGRESS: Mapping[Stage | None, int] = {
    **{stage: place for place, stage in enumerate(Stage)},
    Stage.UNKNOWN: -1,
    None: -2,
}

# Withdrawn jobs stay in the heaps until they come up; above this many all are built anew.
MAX_DEBRIS = 64


class Schedulable(Protocol):
    """What the schedule must know of a job.

    Equal non-empty keys go to the same shard; `place` is the only shard that can do it, or None.
    """

    @property
    def stage(self) -> Stage | None: ...
    @property
    def light(self) -> bool: ...
    @property
    def key(self) -> bytes: ...
    @property
    def place(self) -> Any: ...


class Place(Protocol):
    """What the schedule must know of a shard: a successor in the same slot inherits its keys.

    `sessions` is how many connections' objects it has.
    """

    @property
    def slot(self) -> int: ...
    @property
    def sessions(self) -> int: ...


J = TypeVar("J", bound=Schedulable)
S = TypeVar("S", bound=Place)


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

    def __init__(self, max_queue: int, queue_wait: float, reserve: int = 0) -> None:
        self._max_queue = max_queue
        self._queue_wait = queue_wait
        self._reserve = reserve
        self._entries: dict[int, _Entry[J]] = {}  # by id(job): those that wait
        self._common: list[_Entry[J]] = []  # a heap: jobs that any shard can do
        self._homes: dict[int, list[_Entry[J]]] = {}  # heaps by slot: jobs with a key
        self._pinned: dict[Any, list[_Entry[J]]] = {}  # heaps by shard: jobs of its objects
        self._debris = 0
        self._numbers = count()
        self._shards: dict[S, int] = {}  # every shard that may get work, by the order of arrival
        self._idle: set[S] = set()
        self._retired: set[S] = set()  # those that may get pinned jobs only
        self._at_rest: set[S] = set()  # the idle ones of them
        self._heavy: set[S] = set()  # those that do a heavy job
        # Busy ones that take one more if nobody is idle: how many they have, how long they run.
        self._spare: dict[S, tuple[int, int]] = {}

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._entries)

    @property
    def is_full(self) -> bool:
        """Whether as many jobs wait as may."""
        return len(self._entries) >= self._max_queue + len(self._idle)

    def submit(self, job: J, now: float) -> None:
        """A job to be done; raises Overloaded when nobody is idle and the queue is full.

        Idle shards need not fit the jobs that wait, so they make room for as many as they are. A
        job without a stage keeps nobody waiting: it is never too much, nor too late.
        """
        if job.stage is not None and self.is_full:
            raise Overloaded(f"the queue is full ({self._max_queue} jobs wait)")
        due = now + self._queue_wait
        entry = _Entry(not job.light, -PROGRESS[job.stage], next(self._numbers), job, due)
        self._entries[id(job)] = entry
        heapq.heappush(self._heap_of(job), entry)

    def withdraw(self, job: J) -> bool:
        """The job is no longer wanted; whether it was still waiting."""
        entry = self._entries.pop(id(job), None)
        if entry is None:
            return False
        entry.taken = True
        self._debris += 1
        if self._debris > len(self._entries) + MAX_DEBRIS:
            self._rebuild()
        return True

    def least_loaded(self) -> S | None:
        """The shard with the fewest connections' objects, of those the one that has run longest.

        A new object is better placed by how many others share its shard for as long as the
        connection lasts than by who is idle at this moment. None when there is no shard.
        """
        return min(self._shards, key=self._load, default=None)

    def _load(self, shard: S) -> tuple[int, int]:
        return shard.sessions, self._shards[shard]

    def idle(self, shard: S) -> None:
        """The shard, new or known, can take a job."""
        self._heavy.discard(shard)
        self._spare.pop(shard, None)
        if shard in self._retired:
            self._at_rest.add(shard)
            return
        self._idle.add(shard)
        if shard not in self._shards:
            self._shards[shard] = next(self._numbers)
            self._rebuild()

    def spare(self, shard: S, jobs: int) -> None:
        """The shard has so many jobs, and takes one more where nobody is idle."""
        if shard in self._shards and shard not in self._idle:
            self._spare[shard] = jobs, self._shards[shard]

    def retire(self, shard: S) -> None:
        """From now on the shard takes only jobs that are pinned to it."""
        if shard in self._retired:
            return
        self._retired.add(shard)
        self._spare.pop(shard, None)
        if shard in self._idle:
            self._idle.discard(shard)
            self._at_rest.add(shard)
        if self._shards.pop(shard, None) is not None:
            self._rebuild()

    def deaf(self, shard: S) -> None:
        """The shard can be told nothing any more; what is pinned to it waits for it to be gone."""
        self.retire(shard)
        self._at_rest.discard(shard)

    def gone(self, shard: S) -> list[J]:
        """The shard takes no more jobs; the jobs that were pinned to it, which are withdrawn."""
        self._heavy.discard(shard)
        self.retire(shard)
        self._retired.discard(shard)
        self._at_rest.discard(shard)
        left = [entry.job for entry in self._pinned.pop(shard, []) if not entry.taken]
        for job in left:
            self.withdraw(job)
        return left

    def next(self) -> tuple[J, S] | None:
        """A job and the shard that does it now, which is busy from here on; None if none fits."""
        if not self._entries:
            return None
        found = min(self._choices(), default=None, key=itemgetter(0))
        if found is None:
            return None
        entry, heap, shard = found
        heapq.heappop(heap)
        del self._entries[id(entry.job)]
        self._idle.discard(shard)
        self._spare.pop(shard, None)
        self._at_rest.discard(shard)
        if entry.heavy:
            self._heavy.add(shard)
        return entry.job, shard

    def _choices(self) -> Iterable[tuple[_Entry[J], list[_Entry[J]], S]]:
        """The best job of each heap that an idle shard could take, with that shard."""
        heavy = len(self._heavy - self._retired)
        heavy_allowed = heavy < max(1, len(self._shards) - self._reserve)
        places = []
        able = self._idle or self._spare
        if self._idle:
            places = [(self._common, min(self._idle, key=self._shards.__getitem__))]
        elif self._spare:
            places = [(self._common, min(self._spare, key=self._spare.__getitem__))]
        if self._homes:
            places += [(self._homes.get(shard.slot, []), shard) for shard in able]
        if self._pinned:
            ready = (*self._idle, *self._at_rest)
            places += [(self._pinned.get(shard, []), shard) for shard in ready]
        for heap, shard in places:
            while heap and heap[0].taken:
                heapq.heappop(heap)
                self._debris -= 1
            # Nobody else is kept from light jobs by a shard that does heavy ones already.
            allowed = heavy_allowed or shard in self._retired or shard in self._heavy
            if heap and (allowed or not heap[0].heavy):
                yield heap[0], heap, shard

    @property
    def next_due(self) -> float | None:
        """When the first job will have waited too long; None while none waits."""
        return next((entry.due for entry in self._entries.values() if entry.job.stage), None)

    def overdue(self, now: float) -> list[J]:
        """The jobs that have waited too long; they are withdrawn."""
        late = [
            entry.job for entry in self._entries.values() if entry.due <= now and entry.job.stage
        ]
        for job in late:
            self.withdraw(job)
        return late

    def _heap_of(self, job: J) -> list[_Entry[J]]:
        if job.place is not None:
            return self._pinned.setdefault(job.place, [])
        # A light job must not wait behind the scan that holds the shard of its key.
        if job.light or not job.key or not self._shards:
            return self._common
        home = max(self._shards, key=lambda shard: _weight(shard.slot, job.key))
        return self._homes.setdefault(home.slot, [])

    def _rebuild(self) -> None:
        """Places every job anew: the shards are others now, or too many jobs were withdrawn."""
        self._common, self._homes, self._pinned, self._debris = [], {}, {}, 0
        for entry in self._entries.values():
            heapq.heappush(self._heap_of(entry.job), entry)


def _weight(slot: int, key: bytes) -> bytes:
    """Rendezvous hashing: each key ranks all slots; a slot that goes moves only its own keys."""
    return blake2b(key, digest_size=8, salt=slot.to_bytes(8, "big")).digest()
