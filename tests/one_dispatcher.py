"""A dispatcher over shards that are faked whole: they do what the test says, when it says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from one_pool import MANIFEST, MESSAGE, Result, noted
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.dispatcher import Dispatcher
from sharded_milter.dispatch.job import Blame, Job, Loss
from sharded_milter.dispatch.keep_dir import KeepDir
from sharded_milter.dispatch.pipeline import MIN_SCANS, PIPELINE_SECONDS
from sharded_milter.errors import JobFailed
from sharded_milter.ipc.memory import Memory
from sharded_milter.ipc.messages import WITHDRAWN, Answer
from sharded_milter.limits import Limits
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage


@dataclass
class Asked:
    """What a shard was given: the job's number there, and what a worker would be told."""

    number: int
    job: Job
    connection: bytes | Memory
    message: bytes | Memory
    command: bytes | Memory


class FakeShard:
    """What dispatch needs of a shard; it answers when the test says so."""

    def __init__(self, slot: int, dispatcher: Dispatcher, manifest: Manifest) -> None:
        self.slot = slot
        self.current_queue_id = ""
        self.asked: list[Asked] = []
        self.open: list[int] = []  # numbers of what it has not answered
        self.withdrawals: list[int] = []  # that it has not confirmed
        self.told: list[str] = []
        self.refuse: OSError | None = None
        self.arrived: list[Callable[[], object]] = []  # what it has said, and was not read yet
        self._dispatcher = dispatcher
        self._manifest = manifest

    def __repr__(self) -> str:
        return f"shard {self.slot}"

    # What the dispatcher tells it

    def serves(self, milter: int, manifest: Manifest) -> bool:
        return manifest == self._manifest

    def give(self, number: int, job: Job) -> None:
        if self.refuse is not None:
            raise self.refuse
        connection, message, command = job.connection, job.message, job.command
        if job.affinity is not None:
            _, _, connection, message = job.affinity.next_update(connection, message)
        self.asked.append(Asked(number, job, connection, message, command))
        self.open.append(number)

    def withdraw(self, number: int) -> None:
        assert number in self.open
        self.withdrawals.append(number)

    def catch_up(self) -> None:
        arrived, self.arrived = self.arrived, []
        for say in arrived:
            say()

    def drained(self) -> None:
        self.told.append("drained")

    def kill(self, loss: Loss) -> None:
        self.told.append(f"kill: {loss.reason}")
        self._dispatcher.unavailable(self)

    def dump_stacks(self) -> None:
        self.told.append("dump stacks")

    # What the test makes happen

    @property
    def jobs(self) -> list[Job]:
        """What it has not answered, in order."""
        return [asked.job for asked in self.asked if asked.number in self.open]

    def answer(self, replies: bytes = b"replies", *, error: bytes = b"") -> str:
        """It answers the first that it has in hand; returns which rule it has broken."""
        return self.say(self.open[0], Answer(replies, error))

    def confirm(self) -> str:
        """It says that it will not begin the first that was withdrawn."""
        return self.say(self.withdrawals.pop(0), WITHDRAWN)

    def say(self, number: int, answer: Answer) -> str:
        if number in self.open:
            self.open.remove(number)
        if number in self.withdrawals:
            self.withdrawals.remove(number)
        return self._dispatcher.answered(self, number, answer)

    def exit(self, reason: str = "killed by SIGSEGV", blame: Blame = Blame.MESSAGE) -> None:
        self.open.clear()
        self._dispatcher.unavailable(self)
        self._dispatcher.lost(self, Loss(reason, blame))


class Workers:
    """A dispatcher with its clock and some shards that are idle."""

    def __init__(self, count: int = 1, keep: KeepDir | None = None, **limits: Any) -> None:
        self.clock = Clock()
        self.limits = Limits(**limits)
        self.dispatcher = Dispatcher(self.limits, self.clock, keep)
        self.shards: list[FakeShard] = []
        for _ in range(count):
            self.hire()

    def hire(self, manifest: Manifest = MANIFEST) -> FakeShard:
        """One shard more."""
        shard = FakeShard(len(self.shards) + 1, self.dispatcher, manifest)
        self.shards.append(shard)
        self.dispatcher.serve(shard)
        return shard

    def submit(self, stage: Stage | None = Stage.EOM, *, born: float | None = None,
               message: bytes | Memory = MESSAGE, **options: Any) -> Result:  # fmt: skip
        """A job, which was born now if nothing else is said."""
        born = self.clock.seconds() if born is None else born
        options.setdefault("queue_id", "1")
        job = Job(stage, b"connection", message, born=born, **options)
        result = Result(job)
        try:
            answer = self.dispatcher.submit(job)
        except JobFailed as error:
            result.values.append(error)
            return result
        assert isinstance(answer, Deferred)
        noted(answer, result.values)
        return result

    def ask(
        self, affinity: ObjectAffinity, stage: Stage | None = Stage.EOM, **options: Any
    ) -> Result:
        """A job for an object."""
        return self.submit(stage, affinity=affinity, **options)

    def wait(self, seconds: float) -> None:
        self.clock.pump([0.5] * round(seconds * 2))

    def warm(self, scan: float = PIPELINE_SECONDS) -> None:
        """All shards, which are idle, have done enough scans that took so long."""
        for _ in range(MIN_SCANS):
            results = [self.submit() for _ in self.shards]
            self.clock.advance(scan)
            for shard in self.shards:
                shard.answer()
            assert [result.values for result in results] == [[b"replies"]] * len(results)

    @property
    def busy(self) -> list[FakeShard]:
        return [shard for shard in self.shards if shard.open]

    @property
    def counters(self) -> dict[str, int]:
        return self.dispatcher.counters
