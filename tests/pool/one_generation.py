"""A generation whose shards are faked whole, with one list of what became of everything."""

from __future__ import annotations

from typing import Any

from one_pool import MANIFEST, FakePlace
from twisted.internet.task import Clock

from sharded_milter.dispatch.job import Blame, Loss
from sharded_milter.errors import MilterError
from sharded_milter.limits import Limits
from sharded_milter.pool.generation import (
    Generation,
    GenerationEvent,
    GenerationState,
)
from sharded_milter.pool.shard import Ending, Shard


class FakeShard(Shard):
    """A shard that notes what it is told; the test says when it is ready and when it is gone."""

    def __init__(self, slot: int, log: list[str], number: int, refuse: OSError | None) -> None:
        place: Any = FakePlace(0)
        super().__init__(slot, place, place, place, Clock())
        self.number = number
        self._log = log
        self._refuse = refuse

    @property
    def can_serve(self) -> bool:
        return bool(self.manifests)

    def start(self, timeout: float) -> None:
        if self._refuse is not None:
            raise self._refuse
        self._log.append(f"start {self.number}")

    def drain(self, linger: float = 0.0) -> None:
        self._log.append(f"drain {self.number}")

    def stop(self) -> None:
        self._log.append(f"stop {self.number}")

    def kill(self, loss: Loss) -> None:
        self._log.append(f"kill {self.number}")
        self.loss = self.loss or loss


class Owner:
    """A generation with its clock, and one list of what became of everything."""

    def __init__(
        self, size: int = 1, state: GenerationState = GenerationState.LOADING, **limits: Any
    ) -> None:
        self.clock = Clock()
        self.log: list[str] = []
        self.errors: list[MilterError] = []
        self.made: list[FakeShard] = []
        self.refusals: list[OSError | None] = []
        self.generation = Generation(size, Limits(**limits), self, self.clock)
        self.generation.load()
        if state in (GenerationState.SERVING, GenerationState.DRAINING):
            for number in range(size):
                self.ready(number)
        if state is GenerationState.DRAINING:
            self.generation.handle_event(GenerationEvent.SUCCEEDED)
        if state is GenerationState.ENDED:
            self.generation.handle_event(GenerationEvent.STOPPED)
        assert self.generation.state is state
        self.log.clear()

    # What the test makes happen

    def ready(self, number: int, code: bytes = b"code") -> None:
        shard = self.made[number]
        shard.manifests, shard.code = (MANIFEST,), code
        self.generation.handle_event(GenerationEvent.READY, shard)

    def gone(self, number: int, reason: str = "killed by SIGSEGV", answers: int = 0) -> None:
        shard = self.made[number]
        shard.loss = shard.loss or Loss(reason, Blame.MESSAGE)
        shard.answers = answers
        ending = Ending.DIED if shard.manifests else Ending.NOT_STARTED
        self.generation.shard_gone(shard, ending)

    # The pool

    def new_shard(self, slot: int) -> Shard:
        refuse = self.refusals.pop(0) if self.refusals else None
        self.made.append(FakeShard(slot, self.log, len(self.made), refuse))
        return self.made[-1]

    def serve(self, shard: Shard) -> None:
        assert isinstance(shard, FakeShard)
        self.log.append(f"serve {shard.number}")

    def took_over(self, generation: Generation) -> None:
        self.log.append("took over")

    def failed(self, generation: Generation, error: MilterError) -> None:
        self.log.append("failed")
        self.errors.append(error)

    def reload(self) -> None:
        self.log.append("files changed")

    def count(self, name: str) -> None:
        self.log.append(name)
