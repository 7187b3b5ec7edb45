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
from sharded_milter.dispatch.affinity import Pin
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.timeouts import Deadlines
from sharded_milter.errors import CallbackFailed, DeadlineExceeded
from sharded_milter.ipc.messages import Memory, Question
from sharded_milter.limits import Limits
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

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
        self._locks: dict[Pin, DeferredLock] = {}
        self._running: dict[Job, Deferred[Any]] = {}
        dialect.call = self._call

    def submit(self, job: Job) -> Deferred[bytes]:
        """Fires with the reply packets; fails with a JobFailed."""
        result = job.result
        job.submitted = self._reactor.seconds()
        if job.stage is not None:
            self._deadlines.set(job)
        if job.pin is None:
            self._run(job)
        else:
            if job.pin.place is None:
                job.pin.settle(self, next(self._numbers))
                self._locks[job.pin] = DeferredLock()
            self._locks[job.pin].run(self._run, job)
        return result

    def cancel(self, job: Job) -> None:
        """Nobody waits for the answer any more. An object is left to finish what it does."""
        job.abandoned = True
        running = self._running.get(job)
        if running is None:
            self._deadlines.stop(job)
        elif job.pin is None:
            running.cancel()
        job.result.addErrback(lambda _: None)

    def release(self, pin: Pin) -> None:
        """The connection is over, and so is its object."""
        self._locks.pop(pin, None)
        pin.place = None

    # One job

    def _run(self, job: Job) -> Deferred[None]:
        if job.abandoned or job.result.called:  # it has waited too long
            return succeed(None)
        job.started = self._reactor.seconds()
        if job.stage is None:  # nobody waits for it, so its time begins now
            self._deadlines.set(job)
        answer = maybeDeferred(self._answer, job)
        self._running[job] = answer
        answer.addCallbacks(self._succeed, self._failed, callbackArgs=(job,), errbackArgs=(job,))
        return answer

    def _answer(self, job: Job) -> Any:
        question = job.question()
        try:
            answer = self._dialect.answer(
                job.stage, _content(question.connection), _news(question), question.session
            )
        except (SystemExit, KeyboardInterrupt) as error:  # no milter ends the service
            raise CallbackFailed(f"the callback raised {error!r}") from error
        if isinstance(answer, bytes):
            return answer
        return driven(answer, functools.partial(self._step, job))

    def _succeed(self, replies: bytes, job: Job) -> None:
        self._over(job)
        if not job.result.called:
            job.result.callback(replies)

    def _failed(self, failure: Failure, job: Job) -> None:
        self._over(job)
        cancelled = failure.check(CancelledError, asyncio.CancelledError)
        if cancelled and (job.abandoned or job.result.called):
            return
        self.log.failure(
            "{about} at {at} in {milter}", failure, about=job.about(), at=_word(job),
            milter=self.manifest.name,
        )  # fmt: skip
        if not job.result.called:
            summary = " ".join(failure.getErrorMessage().split())
            job.result.errback(CallbackFailed(f"{type(failure.value).__name__}: {summary}"))

    def _over(self, job: Job) -> None:
        self._running.pop(job, None)
        self._deadlines.stop(job)

    def _expire(self, job: Job) -> None:
        """The deadline: the MTA hears now, and a coroutine is cancelled."""
        limit = self._limits.deadline(job.stage)
        self.counters["deadlines"] += 1
        if not job.result.called:
            reason = f"{job.about()} was not answered within {limit:g} s by {self.manifest.name}"
            job.result.errback(DeadlineExceeded(reason))
        running = self._running.get(job)
        if running is not None:
            running.cancel()
        if self._running.pop(job, None) is not None and job.pin is not None:
            # It will not be stopped: the connection goes on with another object.
            self._locks.pop(job.pin, None)
            job.pin.lose()

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
            return send(value)
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


def _word(job: Job) -> str:
    return "close" if job.stage is None else job.stage.word


def _content(part: bytes | Memory) -> bytes:
    return part if isinstance(part, bytes) else bytes(part.view())


def _news(question: Question) -> bytes | memoryview:
    message: bytes | Memory | memoryview = question.message
    if isinstance(message, Memory):
        message = message.view()[question.start :]
    return bytes(message) + _content(question.command) if question.command else message
