"""What surrounds a connection in the fuzzer: a service, a pool that answers at random, a log."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogEvent, LogLevel
from zope.interface import implementer

from sharded_milter.context import ServerContext
from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.policy import Policy
from sharded_milter.errors import JobFailed
from sharded_milter.ipc.memory import Memory
from sharded_milter.limits import Limits
from sharded_milter.mta.members import worker_members
from sharded_milter.protocol.negotiation import Manifest

from . import packets

#: Small, so that few packets reach them.
LIMITS = Limits(max_message_size=3000, max_waiting=200, progress_interval=5.0, idle_timeout=600.0)


def size_of(part: bytes | Memory) -> int:
    return len(part)


@implementer(ILogObserver)
class Problems:
    """The failures that were logged and not raised."""

    def __init__(self) -> None:
        self.events: list[LogEvent] = []

    def __call__(self, event: LogEvent) -> None:
        if event["log_level"] is LogLevel.critical:
            self.events.append(event)


class RandomPool:
    """Answers at once when it was told how, else when it is asked to."""

    def __init__(self, asked: Callable[[Job], None], cancelled: Callable[[Job], None]) -> None:
        self._asked = asked
        self._cancelled = cancelled
        self.prompt: deque[bytes | JobFailed] = deque()
        self.open: Job | None = None
        self.late: list[Job] = []
        self.counters: Counter[str] = Counter()

    def submit(self, job: Job) -> bytes | Deferred[bytes]:
        assert self.open is None, "two jobs of one connection at once"
        self._asked(job)
        if self.prompt:
            answer = self.prompt.popleft()
            if not isinstance(answer, JobFailed):
                return in_full(answer, job)
            try:
                raise answer
            finally:
                del answer  # whose traceback would keep this call, and the job with it
        self.open = job
        job.answer = Deferred()
        return job.answer

    def cancel(self, job: Job) -> None:
        assert job is self.open, "a job is cancelled that is not out"
        self.open = job.answer = None
        self.late.append(job)
        self._cancelled(job)

    def release(self, affinity: ObjectAffinity) -> None:
        raise AssertionError("functions are no objects")

    def answer(self, answer: bytes | JobFailed) -> None:
        job, self.open = self.open, None
        assert job is not None
        awaited, job.answer = job.answer, None
        assert awaited is not None
        if isinstance(answer, JobFailed):
            awaited.errback(answer)
        else:
            awaited.callback(in_full(answer, job))


def in_full(answer: bytes, job: Job) -> bytes:
    """What a milter answers; SIGNED is different for every stage."""
    return packets.signed(job.letter.decode()) if answer == packets.SIGNED else answer


class Surroundings(ServerContext):
    """What a connection needs around it."""

    reactor: Any  # a Clock, which the tests advance

    def __init__(self, manifest: Manifest, on_error: str, inflight: int, pool: RandomPool) -> None:
        limits = replace(LIMITS, max_inflight_bytes=inflight)
        super().__init__(limits, Policy(on_error), Clock(), pool.counters)
        self.members = worker_members([manifest], pool)
        self.pool = pool
