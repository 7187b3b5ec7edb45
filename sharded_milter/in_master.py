"""Answers jobs with a milter in this process: for light, asynchronous ones.

Whatever such a milter does with the processor, nobody is answered meanwhile; so one that takes
long is named in the log.
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

from sharded_milter.coroutines import driven
from sharded_milter.dispatch.affinity import Affinity
from sharded_milter.dispatch.job import Job, settled
from sharded_milter.dispatch.timeouts import Deadlines
from sharded_milter.errors import CallbackFailed, DeadlineExceeded, WorkerLost
from sharded_milter.forks import guarded
from sharded_milter.ipc.memory import view_of
from sharded_milter.limits import Limits
from sharded_milter.protocol.commands import Abort
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

_ABORT = Abort().encode()

# A reactor that does nothing else for longer is felt by every connection.
BLOCKS_AFTER = 0.050


class Dialect(Protocol):
    """A milter, whatever way it is written; see `dialects.loader`."""

    manifest: Manifest
    call: Callable[..., Any]

    def answer(
        self, stage: Stage | None, connection: bytes, message: bytes | memoryview, session: int = 0
    ) -> bytes | Awaitable[bytes]: ...


class InMaster:
    """Runs jobs of one milter here, one after the other for each object."""

    log = Logger()

    def __init__(
        self,
        dialect: Dialect,
        limits: Limits,
        reactor: Any,
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
        self._locks: dict[Affinity, DeferredLock] = {}
        self._running: dict[Job, Deferred[Any]] = {}
        dialect.call = self._call

    def submit(self, job: Job) -> bytes | Deferred[bytes]:
        """Reply packets, or a Deferred of them that has not fired; raises a JobFailed, or fails."""
        affinity = job.affinity
        if affinity is not None and affinity.lost:
            raise WorkerLost("the milter's object was given up, and the message with it")
        answer = job.answer = Deferred()
        job.submitted = self._reactor.seconds()
        if job.stage is not None:
            self._deadlines.set(job)
        if affinity is None:
            self._run(job)
        else:
            self._run_in_turn(job, affinity)
        return settled(answer)

    def _run_in_turn(self, job: Job, affinity: Affinity) -> None:
        if affinity.holder is None:
            affinity.settle(self, next(self._numbers))
            self._locks[affinity] = DeferredLock()
        self._locks[affinity].run(self._run, job)

    def cancel(self, job: Job) -> None:
        """The answer is not wanted any more. An object is left to finish what it does."""
        job.answer = None
        running = self._running.get(job)
        if running is None:
            _forget(job)
        elif job.affinity is None:
            running.cancel()

    def release(self, affinity: Affinity) -> None:
        """The connection is over, and so is its object."""
        self._locks.pop(affinity, None)
        affinity.holder = None

    # One job

    def _run(self, job: Job) -> Deferred[None]:
        if job.answer is None:  # it was cancelled, or has waited too long
            return succeed(None)
        affinity = job.affinity
        if affinity is not None and affinity.holder is None and job.stage is not None:
            self._run_in_turn(job, affinity)  # the object for which it waited was given up
            return succeed(None)
        job.started = self._reactor.seconds()
        if job.stage is None:  # no answer is awaited, so its time begins now
            self._deadlines.set(job)
        answer = maybeDeferred(self._answer, job)
        self._running[job] = answer
        # The bytes count until this has fired, whether the answer is still wanted or not.
        arguments = job, job.held
        answer.addCallbacks(
            self._succeed, self._failed, callbackArgs=arguments, errbackArgs=arguments
        )
        return answer

    def _answer(self, job: Job) -> Any:
        message: bytes | memoryview
        if job.affinity is None:
            session, connection = 0, job.connection
            message = view_of(job.command or job.message)
        else:
            news = job.affinity.tell(job.connection, job.message)
            session, connection = news.session, news.connection
            message = view_of(news.message)[news.start :]
            if job.command:
                message = bytes(message) + bytes(view_of(job.command))
        try:
            answer = guarded(
                self._dialect.answer, job.stage, bytes(view_of(connection)), message, session
            )
        except (SystemExit, KeyboardInterrupt) as error:  # no milter ends the service
            raise CallbackFailed(f"the callback raised {error!r}") from error
        if isinstance(answer, bytes):
            return answer
        return driven(answer, functools.partial(self._step, job))

    def _succeed(self, replies: bytes, job: Job, _: object) -> None:
        self._over(job)
        awaited, job.answer = job.answer, None
        if awaited is not None:
            awaited.callback(replies)

    def _failed(self, failure: Failure, job: Job, _: object) -> None:
        self._over(job)
        awaited, job.answer = job.answer, None
        if awaited is None and failure.check(CancelledError, asyncio.CancelledError):
            return
        self.log.failure(
            "{about} at {at} in {milter}", failure, about=job.about, at=_word(job),
            milter=self.manifest.name,
        )  # fmt: skip
        if awaited is not None:
            summary = " ".join(failure.getErrorMessage().split())
            awaited.errback(CallbackFailed(f"{type(failure.value).__name__}: {summary}"))

    def _over(self, job: Job) -> None:
        self._running.pop(job, None)
        _forget(job)

    def _expire(self, job: Job) -> None:
        """The deadline: the MTA hears now, and a coroutine is cancelled."""
        limit = self._limits.deadline(job.stage)
        self.counters["deadlines"] += 1
        awaited, job.answer = job.answer, None
        if awaited is not None:
            reason = f"{job.about} was not answered within {limit:g} s by {self.manifest.name}"
            awaited.errback(DeadlineExceeded(reason))
        running = self._running.get(job)
        if running is None:  # it waits for its object, and will not be asked
            job.let_go()
            return
        running.cancel()
        if self._running.pop(job, None) is not None and job.affinity is not None:
            # It will not be stopped now: the connection goes on with another object.
            self._locks.pop(job.affinity, None)
            running.addCallback(self._close, job, job.affinity.number)
            job.affinity.lose()

    def _close(self, _: object, job: Job, number: int) -> None:
        """An object that was given up has come to the end of what it did."""

        def close() -> Any:
            answer = self._dialect.answer(None, _ABORT, b"", number)
            return answer if isinstance(answer, bytes) else driven(answer)

        maybeDeferred(close).addErrback(
            lambda failure: self.log.failure("{about} at close", failure, about=job.about)
        )

    # How long it holds everybody up

    def _call(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        began = self._stopwatch()
        try:
            return function(*arguments)
        finally:
            self._watch(name, self._stopwatch() - began)

    def _step(self, job: Job, send: Callable[[Any], Any], value: Any) -> Any:
        """A step of a coroutine."""
        began = self._stopwatch()
        try:
            return guarded(send, value)
        finally:
            self._watch(_word(job), self._stopwatch() - began)

    def _watch(self, name: str, seconds: float) -> None:
        """Says so if that was too long."""
        if seconds > BLOCKS_AFTER:
            self.counters["blocked_reactor"] += 1
            self.log.warn(
                "{milter} blocked the reactor for {ms:.0f} ms in {name}; more than {limit:.0f} ms"
                " belong in a worker",
                milter=self.manifest.name,
                ms=1000 * seconds,
                name=name,
                limit=1000 * BLOCKS_AFTER,
            )


def _forget(job: Job) -> None:
    """Nothing comes of the job any more, though others may still know it."""
    if job.alarm is not None:
        job.alarm.stop(job)
    job.let_go()


def _word(job: Job) -> str:
    return "close" if job.stage is None else job.stage.word
