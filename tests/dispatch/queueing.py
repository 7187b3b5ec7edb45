"""A queue, with jobs and shards that are nothing but what a queue must know of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sharded_milter.dispatch.queue import Queue


@dataclass(eq=False)
class Job:
    born: float = 0.0
    light: bool = False
    key: bytes = b""
    solo: bool = False
    stage: Any = "stage"
    affinity: Any = None
    entry: int = 0


@dataclass(eq=False)
class Shard:
    slot: int
    fresh: bool = True
    attempts: dict[int, Any] = field(default_factory=dict)
    affinities: set[Any] = field(default_factory=set)

    def __repr__(self) -> str:
        return "ABC"[self.slot - 1]


@dataclass
class Object:
    holder: Any


class Waiting:
    """A queue and three shards, of which some are idle."""

    def __init__(self, idle: str = "", max_queue: int = 100, reserve: int = 0) -> None:
        self.queue: Queue[Job, Shard] = Queue(max_queue, reserve)
        self.a, self.b, self.c = self.shards = [Shard(1), Shard(2), Shard(3)]
        for name in idle:
            self.queue.capacity.set_idle(self["ABC".index(name)])

    def __getitem__(self, number: int) -> Shard:
        return self.shards[number]

    def add(self, *jobs: Job) -> None:
        for job in jobs:
            self.queue.add(job)

    def next(self, *, has_room: bool = False) -> tuple[Job, Shard] | None:
        """The next pair, whose shard is busy then."""
        pair = self.queue.next_pair()
        if pair is not None:
            job, shard = pair
            shard.attempts[len(shard.attempts)] = job
            if not job.light:
                self.queue.capacity.set_heavy(shard)
            self.queue.capacity.set_busy(shard, has_room=has_room)
        return pair

    def drained(self) -> list[Job]:
        """The waiting jobs in the order in which one shard would do them."""
        done = []
        self.queue.capacity.set_idle(self.a)
        while (pair := self.queue.next_pair()) is not None:
            done.append(pair[0])
        return done
