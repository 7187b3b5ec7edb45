"""Workers without processes: they do what the test says, at the time that the test says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from sharded_milter.dispatch.dispatcher import Dispatch
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.poison import Keep
from sharded_milter.errors import WorkerLost
from sharded_milter.ipc.messages import Question
from sharded_milter.limits import Limits
from sharded_milter.pool.shard import Events, Shard, State
from sharded_milter.pool.spawned import Workplace
from sharded_milter.protocol.commands import Body, Eom
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import STAGES, Stage

MANIFEST = Manifest("test")
MESSAGE = Body(b"text\r\n").encode() + Eom().encode()


class FakeShard(Shard):
    """A shard without a process behind it."""

    def __init__(self, slot: int, clock: Clock, events: Events) -> None:
        super().__init__(slot, Workplace(("x:milter",)), clock, events)
        self.told: list[str] = []
        self.jobs: list[Deferred[bytes]] = []
        self.asked: list[tuple[Stage | None, object, object]] = []
        self.memory = 0

    def ask(self, question: Question) -> Any:
        assert self.state in (State.IDLE, State.BUSY)
        self.state = State.BUSY
        self.asked.append((STAGES.get(question.stage[0]), question.connection, question.message))
        self.jobs.append(Deferred())
        return self.jobs[-1]

    def kill(self, reason: str) -> None:
        self.told.append(f"kill: {reason}")
        self.killed_for = self.killed_for or reason
        self.state = State.KILLED

    def drain(self, linger: float = 0.0) -> None:
        self.told.append("drain")
        self.state = State.DRAINING

    def dump_stacks(self) -> None:
        self.told.append("dump stacks")

    def rss(self) -> int:
        return self.memory

    # What the test makes happen

    def answer(self, replies: bytes | Exception = b"replies") -> None:
        self.answered += 1
        self._events.shard_answered(self)
        job = self.jobs.pop(0)
        if self.state is State.BUSY and not self.jobs:
            self.state = State.IDLE
            self._events.shard_idle(self)
        if isinstance(replies, bytes):
            job.callback(replies)
        else:
            job.errback(replies)

    def exit(self, reason: str = "killed by SIGSEGV") -> None:
        self.exit_reason = self.killed_for or reason
        self.state = State.GONE
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            job.errback(Failure(WorkerLost(self.exit_reason)))
        self._events.shard_gone(self)


@dataclass
class Result:
    """A job and what it ended with, each time that it ended."""

    job: Job
    values: list[Any] = field(default_factory=list)

    @property
    def only(self) -> Any:
        """The one thing that the job ended with."""
        assert len(self.values) == 1, self.values
        return self.values[0]


def noted(deferred: Deferred[Any], where: list[Any]) -> None:
    """Keeps what a Deferred ends with: its value, or the exception itself."""
    deferred.addCallbacks(where.append, lambda failure: where.append(failure.value))


class Workers:
    """A dispatch with its clock and some shards that are idle."""

    def __init__(self, count: int = 1, keep: Keep | None = None, **limits: Any) -> None:
        self.clock = Clock()
        self.limits = Limits(**limits)
        self.dispatch = Dispatch(self.limits, self.clock, keep)
        self.shards: list[FakeShard] = []
        for _ in range(count):
            self.hire()

    def hire(self, manifest: Manifest = MANIFEST) -> FakeShard:
        shard = FakeShard(len(self.shards) + 1, self.clock, self)
        self.shards.append(shard)
        shard.ready(manifest)
        return shard

    def submit(self, stage: Stage = Stage.EOM, name: str = "qid=1", **options: Any) -> Result:
        job = Job(stage, options.pop("light", False), b"connection",
                  options.pop("message", MESSAGE), lambda: name, **options)  # fmt: skip
        result = Result(job)
        noted(self.dispatch.submit(job), result.values)
        return result

    def wait(self, seconds: float) -> None:
        self.clock.pump([0.5] * round(seconds * 2))

    # Events, as the pool would pass them on

    def shard_answered(self, shard: Shard) -> None: ...

    def shard_ready(self, shard: Shard) -> None:
        self.shard_idle(shard)

    def shard_idle(self, shard: Shard) -> None:
        self.dispatch.schedule.idle(shard)
        self.dispatch.assign()

    def shard_deaf(self, shard: Shard) -> None:
        self.dispatch.schedule.deaf(shard)

    def shard_gone(self, shard: Shard) -> None:
        self.dispatch.lost(shard)
