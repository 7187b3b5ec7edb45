"""Jobs, attempts and processes as the model knows them, and how a broken rule is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Blame, Job
from sharded_milter.errors import JobFailed
from sharded_milter.pool.shard import Shard

from .worker import Worker

# What a light job counts as older, and how long a job may wait behind another, as the rules say.
HEAD_START = 1.0
PATIENCE = 0.01

# Timers are exact here, but for the last bit of a float.
EPSILON = 1e-6


class Broken(AssertionError):
    """A rule is broken."""


# What was found in this run: where it is raised may be below code that catches everything.
broken: list[str] = []


def check(holds: object, rule: str, *about: object) -> None:
    """Raises Broken where the rule does not hold."""
    if not holds:
        broken.append(f"{rule}: {' '.join(map(str, about))}")
        raise Broken(broken[-1])


@dataclass(eq=False)
class Conversation:
    """An MTA's connection, with one milter that is an object or not."""

    number: int
    born: float
    key: bytes
    affinity: ObjectAffinity | None
    replayable: bool
    transcript: bytes = b""  # of the message in hand
    out: Asked | None = None  # the job that it waits for
    stages_left: int = 0  # it asks again as soon as it is answered
    told_to: Process | None = None  # who has the object, if that knows something of the message
    lost: bool = False  # the message is lost with its object


@dataclass(eq=False)
class Asked:
    """A job as who submitted it knows it."""

    number: int
    job: Job
    message: bytes  # what a worker must be asked about
    submitted: float
    conversation: Conversation
    leader: Asked | None = None  # whose answer it waits for
    outcomes: list[bytes | JobFailed] = field(default_factory=list)
    cancelled: bool = False
    expected: bytes | None = None  # the answer that has arrived
    tries: list[Try] = field(default_factory=list)  # those in hand whose answer is wanted
    blamed: int = 0
    queued_since: float = 0.0
    parted: bool = False  # a repeat goes on in its place
    told: bytes | JobFailed | None = None  # what the job was told for whose answer it waited
    counted: bool = False  # as a death of its message
    passed_by: set[Asked] = field(default_factory=set)  # neighbours that were given before it
    neighbours: set[Asked] = field(default_factory=set)
    refused: bool = False  # for want of memory: it stays where it was, if it is anywhere

    def __repr__(self) -> str:
        return f"job {self.number}"

    @property
    def over(self) -> bool:
        """Whether it is answered, or needs no answer."""
        return bool(self.outcomes) or self.cancelled

    @property
    def age(self) -> float:
        """By what the queue is ordered: the smaller, the older."""
        return self.job.born - (HEAD_START if self.job.light else 0.0)

    @property
    def can_move(self) -> bool:
        """Whether any process may do it: it has no object."""
        return self.job.affinity is None

    @property
    def waits(self) -> bool:
        """Whether it waits for a shard."""
        done = self.over or self.parted or self.expected is not None
        return not (done or self.tries or self.leader is not None)

    def is_behind(self, now: float) -> bool:
        """Whether it has waited so long behind another that an idle shard takes it over."""
        if not self.can_move or self.blamed or self.expected is not None or not self.tries:
            return False
        if self.refused:
            return False
        return all(not one.is_first and now - one.given >= PATIENCE for one in self.tries)


@dataclass(eq=False)
class Try:
    """An attempt."""

    number: int
    asked: Asked
    process: Process
    given: float
    began: float | None = None  # when it became the first
    live: bool = True  # its answer is wanted
    withdrawn: bool = False
    said: bytes = b""

    @property
    def tag(self) -> bytes:
        """What it is called on the wire."""
        return b"q%x" % self.number

    @property
    def is_first(self) -> bool:
        """Whether it counts as begun."""
        return bool(self.process.hand) and self.process.hand[0] is self

    def __repr__(self) -> str:
        return f"attempt {self.number} of {self.asked} on {self.process}"


@dataclass(eq=False)
class Process:
    """A shard as the model knows it."""

    number: int
    shard: Shard
    worker: Worker
    started: float
    hand: list[Try] = field(default_factory=list)
    serves: bool = False
    served_since: float = 0.0
    retired: bool = False
    fresh: bool = True
    heavy: bool = False
    answers: int = 0
    died_at_work: bool = False
    first_at_kill: Try | None = None
    blame: Blame | None = None  # who must be blamed, where the test knows

    def __repr__(self) -> str:
        return f"process {self.number} (slot {self.shard.slot})"

    @property
    def is_unavailable(self) -> bool:
        """Whether it can be told nothing more, as far as the master knows."""
        worker = self.worker
        return worker.killed is not None or worker.reaped or not worker.wire.connected

    @property
    def takes_any(self) -> bool:
        """Whether it may be given any job."""
        return self.serves and not (self.retired or self.is_unavailable)

    @property
    def is_idle(self) -> bool:
        """Whether it may be given any job at once."""
        return not self.hand and self.takes_any
