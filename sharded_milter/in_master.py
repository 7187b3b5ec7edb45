"""Executes the jobs of a milter in this process: for light, asynchronous milters.

While such a milter uses the CPU, no MTA is answered. So the log names a milter that blocks the
reactor for too long.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred, DeferredLock, maybeDeferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.alarms import ReactorTime
from sharded_milter.coroutines import drive
from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Job, result_of
from sharded_milter.dispatch.timeouts import Deadlines
from sharded_milter.errors import CallbackFailed, DeadlineExceeded, WorkerLost
from sharded_milter.forks import guarded
from sharded_milter.ipc.memory import view_of
from sharded_milter.limits import Limits
from sharded_milter.protocol.commands import Abort
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

_ABORT = Abort().encode()

# Seconds. A callback that blocks the reactor for longer delays every connection.
MAX_BLOCKING = 0.050


class InMasterDialect(Protocol):
    """A milter in any dialect; see `dialects.loader`."""

    manifest: Manifest
    call: Callable[..., Any]

    def answer(
        self, stage: Stage | None, connection: bytes, message: bytes | memoryview, session: int = 0
    ) -> bytes | Awaitable[bytes]: ...


class InMaster:
    """Executes the jobs of one milter in this process, one at a time for each object."""

    log = Logger()

    def __init__(
        self,
        dialect: InMasterDialect,
        limits: Limits,
        reactor: ReactorTime,
        counters: Counter[str],
        stopwatch: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.manifest = dialect.manifest
        self.counters = counters
        self._dialect = dialect
        self._limits = limits
        self._deadlines = Deadlines(reactor, limits, self._expire)
        self._reactor = reactor
        self._stopwatch = stopwatch
        self._numbers = itertools.count(1)
        self._locks: dict[ObjectAffinity, DeferredLock] = {}
        self._running: dict[Job, Deferred[Any]] = {}
        dialect.call = self._call

    def submit(self, job: Job) -> bytes | Deferred[bytes]:
        """Return reply packets, or a Deferred of them that has not fired.

        Raise a JobFailed, or the Deferred fails with one.
        """
        affinity = job.affinity
        if affinity is not None and affinity.lost:
            raise WorkerLost("the milter's object was abandoned, and its message with it")
        answer = job.answer = Deferred()
        job.submitted = self._reactor.seconds()
        if job.stage is not None:
            self._deadlines.set(job)
        if affinity is None:
            self._run(job)
        else:
            self._run_serialized(job, affinity)
        return result_of(answer)

    def _run_serialized(self, job: Job, affinity: ObjectAffinity) -> None:
        if affinity.holder is None:
            affinity.assign(self, next(self._numbers))
            self._locks[affinity] = DeferredLock()
        self._locks[affinity].run(self._run, job)

    def cancel(self, job: Job) -> None:
        """Cancel the job. If an object runs it, let it finish and ignore the answer."""
        job.answer = None
        running = self._running.get(job)
        if running is None:
            _release_job(job)
        elif job.affinity is None:
            running.cancel()

    def release(self, affinity: ObjectAffinity) -> None:
        """Release a connection's object: its session is over."""
        self._locks.pop(affinity, None)
        affinity.holder = None

    # One job

    def _run(self, job: Job) -> Deferred[None]:
        if job.answer is None:  # it was cancelled, or its deadline has passed
            return succeed(None)
        affinity = job.affinity
        if affinity is not None and affinity.holder is None and job.stage is not None:
            self._run_serialized(job, affinity)  # the object for which it waited was abandoned
            return succeed(None)
        job.started = self._reactor.seconds()
        if job.stage is None:  # end of session: its deadline begins when it runs
            self._deadlines.set(job)
        answer = maybeDeferred(self._answer, job)
        self._running[job] = answer
        # The bytes count until this has fired, also if the job is cancelled.
        arguments = job, job.held
        answer.addCallbacks(self._finish, self._fail, callbackArgs=arguments, errbackArgs=arguments)
        return answer

    def _answer(self, job: Job) -> Any:
        message: bytes | memoryview
        if job.affinity is None:
            session, connection = 0, job.connection
            message = view_of(job.command or job.message)
        else:
            update = job.affinity.next_update(job.connection, job.message)
            session, connection = update.session, update.connection
            message = view_of(update.message)[update.start :]
            if job.command:
                message = bytes(message) + bytes(view_of(job.command))
        try:
            answer = guarded(
                self._dialect.answer, job.stage, bytes(view_of(connection)), message, session
            )
        except (SystemExit, KeyboardInterrupt) as error:  # a milter must not end the service
            raise CallbackFailed(f"the callback raised {error!r}") from error
        if isinstance(answer, bytes):
            return answer
        return drive(answer, functools.partial(self._step, job))

    def _finish(self, replies: bytes, job: Job, _: object) -> None:
        self._end(job)
        awaited, job.answer = job.answer, None
        if awaited is not None:
            awaited.callback(replies)

    def _fail(self, failure: Failure, job: Job, _: object) -> None:
        self._end(job)
        awaited, job.answer = job.answer, None
        if awaited is None and failure.check(CancelledError, asyncio.CancelledError):
            return
        self.log.failure(
            "{about} at {at} in {milter}", failure, about=job.about, at=_stage_name(job),
            milter=self.manifest.name,
        )  # fmt: skip
        if awaited is not None:
            summary = " ".join(failure.getErrorMessage().split())
            awaited.errback(CallbackFailed(f"{type(failure.value).__name__}: {summary}"))

    def _end(self, job: Job) -> None:
        self._running.pop(job, None)
        _release_job(job)

    def _expire(self, job: Job) -> None:
        """Fail the job at its deadline, and cancel its coroutine."""
        limit = self._limits.deadline(job.stage)
        self.counters["deadlines"] += 1
        awaited, job.answer = job.answer, None
        if awaited is not None:
            reason = f"{job.about} was not answered within {limit:g} s by {self.manifest.name}"
            awaited.errback(DeadlineExceeded(reason))
        running = self._running.get(job)
        if running is None:  # it still waits for its object
            job.free()
            return
        running.cancel()
        if self._running.pop(job, None) is not None and job.affinity is not None:
            # The coroutine ignores its cancellation: the connection gets a new object.
            self._locks.pop(job.affinity, None)
            running.addCallback(self._close_object, job, job.affinity.number)
            job.affinity.lose_object()

    def _close_object(self, _: object, job: Job, number: int) -> None:
        """Close an abandoned object, now that its callback has ended."""

        def close() -> Any:
            answer = self._dialect.answer(None, _ABORT, b"", number)
            return answer if isinstance(answer, bytes) else drive(answer)

        maybeDeferred(close).addErrback(
            lambda failure: self.log.failure("{about} at close", failure, about=job.about)
        )

    # The time for which callbacks block the reactor

    def _call(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        began = self._stopwatch()
        try:
            return function(*arguments)
        finally:
            self._check_duration(name, self._stopwatch() - began)

    def _step(self, job: Job, send: Callable[[Any], Any], value: Any) -> Any:
        """Make a step of a coroutine, and check how long it took."""
        began = self._stopwatch()
        try:
            return guarded(send, value)
        finally:
            self._check_duration(_stage_name(job), self._stopwatch() - began)

    def _check_duration(self, name: str, seconds: float) -> None:
        """Log a warning if a callback has blocked the reactor for too long."""
        if seconds > MAX_BLOCKING:
            self.counters["blocked_reactor"] += 1
            self.log.warn(
                "{milter} blocked the reactor for {ms:.0f} ms in {name}, above {limit:.0f} ms;"
                " run it in a worker",
                milter=self.manifest.name,
                ms=1000 * seconds,
                name=name,
                limit=1000 * MAX_BLOCKING,
            )


def _release_job(job: Job) -> None:
    """Stop the job's alarm and drop its bytes, although others may still refer to it."""
    if job.alarm is not None:
        job.alarm.stop(job)
    job.free()


def _stage_name(job: Job) -> str:
    return "close" if job.stage is None else job.stage.word
