"""A shard without a process, with one list of what became of everything."""

from __future__ import annotations

from collections.abc import Callable

from one_pool import MANIFEST, FakePlace
from twisted.internet.task import Clock

from sharded_milter.dispatch.job import Blame, Loss
from sharded_milter.ipc.messages import Answer
from sharded_milter.pool.shard import (
    Ending,
    Shard,
    ShardState,
)

LOSS = Loss("for a reason", Blame.PLACE)
ANSWER = Answer(b"replies")
FIELDS = {
    "name": b"spamguard",
    "negotiation": MANIFEST.to_packet()[5:],
    "light": b"RH",
    "shard_by": b"sender",
    "affinity": b"none",
}


class Room:
    """A shard with its place, and one list of what became of everything."""

    def __init__(self, state: ShardState = ShardState.STARTING) -> None:
        self.clock = Clock()
        self.log: list[str] = []
        self.broken = ""  # what the dispatcher says of the next answers
        self.has_work = True
        self.place = FakePlace(77)
        self.place.did = self.log
        self.shard = Shard(3, self.place, self, self, self.clock)
        self.shard.start(60.0)
        for name, word in (("shut_down", "exit"), ("stop_reading", "deaf")):
            setattr(self.place.channel, name, self._noting(word, name))
        self.bring(state)
        self.log.clear()

    def _noting(self, word: str, name: str) -> Callable[[], None]:
        real = getattr(self.place.channel, name)

        def call() -> None:
            self.log.append(word)
            real()

        return call

    def bring(self, state: ShardState) -> None:
        if state in (ShardState.SERVING, ShardState.DRAINING, ShardState.EXITING):
            self.place.be_ready()
        if state in (ShardState.DRAINING, ShardState.EXITING):
            self.shard.drain(30.0)
        if state is ShardState.EXITING:
            self.shard.drained()
        if state is ShardState.KILLED:
            self.shard.kill(LOSS)
        if state is ShardState.GONE:
            self.place.exit()
        assert self.shard.state is state

    # The dispatcher

    def retire(self, shard: Shard) -> None:
        self.log.append("retire")
        if not self.has_work:
            shard.drained()

    def drop_objects(self, shard: Shard) -> None:
        self.log.append("give up objects")

    def unavailable(self, shard: Shard) -> None:
        self.log.append("unavailable")

    def answered(self, shard: Shard, number: int, answer: Answer) -> str:
        self.log.append(f"answer {number}")
        return self.broken

    def lost(self, shard: Shard, loss: Loss) -> bool:
        self.log.append(f"lost: {loss.reason}")
        return self.has_work

    # The pool

    def shard_ready(self, shard: Shard) -> None:
        self.log.append("ready")

    def recycle_shard(self, shard: Shard, why: str) -> None:
        self.log.append(f"worn: {why}")

    def shard_gone(self, shard: Shard, ending: Ending) -> None:
        self.log.append(ending.name)
