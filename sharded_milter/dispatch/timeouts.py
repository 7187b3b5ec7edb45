"""Timeouts of jobs (queue wait, stack dump, deadline) and of attempts (waiting behind another job,
running on when the answer is not wanted). A shard whose scan hangs is killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from twisted.logger import Logger

from sharded_milter.alarms import Alarm, ReactorTime
from sharded_milter.dispatch.job import Attempt, Blame, Job, Loss
from sharded_milter.errors import DeadlineExceeded, JobFailed, Overloaded
from sharded_milter.limits import Limits
from sharded_milter.protocol.stages import Stage

# The share of a deadline after which the worker's stacks are logged.
SOFT_LIMIT = 0.8

# A scan that has run for at least this share of its deadline is the cause of the delay: its worker
# is killed, and the message may be poison.
HUNG_SHARE = 0.5


# A job that has waited behind another for so long, seconds, is taken over by a shard that is or
# becomes idle. This is more than PIPELINE_SECONDS, and less than SHORT_SCAN.
TAKEOVER_AFTER = 0.01


class Deadlines:
    """Calls `expired` with each job after `share` of its stage's deadline.

    The deadline at the end of a message is longer than before it.
    """

    def __init__(
        self,
        reactor: ReactorTime,
        limits: Limits,
        expired: Callable[[Job], object],
        share: float = 1.0,
    ) -> None:
        self._at_end = Alarm(reactor, share * limits.deadline(Stage.EOM), expired)
        self._before = Alarm(reactor, share * limits.deadline(None), expired)

    def set(self, job: Job) -> None:
        """Start the job's time; `job.alarm` stops it."""
        alarm = job.alarm = self._at_end if job.stage is Stage.EOM else self._before
        alarm.set(job)


class AttemptTimeouts:
    """Limits the time that an attempt waits behind another, or runs on without a waiting submitter.

    `behind_too_long` is called with an attempt that another shard should take over.
    """

    def __init__(
        self,
        limits: Limits,
        counters: Counter[str],
        reactor: ReactorTime,
        behind_too_long: Callable[[Attempt], object],
    ) -> None:
        self._limits = limits
        self._counters = counters
        self._reactor = reactor
        self._waits_behind = Alarm(reactor, TAKEOVER_AFTER, behind_too_long)

    def start_waiting(self, attempt: Attempt) -> None:
        """Start the time that the attempt may wait behind another."""
        self._waits_behind.set(attempt)

    def stop_waiting(self, attempt: Attempt) -> None:
        """Stop the time that the attempt may wait behind another."""
        self._waits_behind.stop(attempt)

    def start_deadline(self, attempt: Attempt) -> None:
        """Start the deadline of an attempt whose answer is not awaited, from when it began."""
        deadline = self._limits.deadline(attempt.job.stage)
        left = max(0.0, attempt.began + deadline - self._reactor.seconds())
        if attempt.deadline_call is None:
            attempt.deadline_call = self._reactor.callLater(
                left, self._past_attempt_deadline, attempt, deadline
            )

    def _past_attempt_deadline(self, attempt: Attempt, deadline: float) -> None:
        attempt.deadline_call = None
        attempt.pipeline.shard.catch_up()
        pipeline = attempt.pipeline
        if not pipeline.available or attempt.number not in pipeline.attempts:
            return  # the shard is killed already, or has answered while this process slept
        self._counters["deadlines"] += 1
        reason = f"{attempt.job.about} was not answered within {deadline:g} s"
        attempt.pipeline.shard.kill(Loss(reason, Blame.MESSAGE, attempt.number))

    def stop(self, attempt: Attempt) -> None:
        """Stop all timeouts of an attempt."""
        self._waits_behind.stop(attempt)
        limit, attempt.deadline_call = attempt.deadline_call, None
        if limit is not None and limit.active():
            limit.cancel()


class JobOwner(Protocol):
    """Fails jobs whose time is over: `Completion`."""

    def fail(self, job: Job, error: JobFailed) -> None: ...
    def fail_alone(self, job: Job, error: JobFailed) -> None: ...
    def fail_hung(self, job: Job, reason: str) -> None: ...


class JobTimeouts:
    """Limits the time that a job waits in the queue, and the time until its answer."""

    log = Logger()

    def __init__(
        self, limits: Limits, counters: Counter[str], reactor: ReactorTime, owner: JobOwner
    ) -> None:
        self._limits = limits
        self._counters = counters
        self._reactor = reactor
        self._owner = owner
        self._soft = Deadlines(reactor, limits, self._past_soft_limit, SOFT_LIMIT)
        self._hard = Deadlines(reactor, limits, self._past_deadline, 1 - SOFT_LIMIT)
        self._waits = Alarm(reactor, limits.queue_wait, self._waited_too_long)

    def start(self, job: Job) -> None:
        """Start the job's deadline; `job.alarm` stops it."""
        self._soft.set(job)

    def start_queue_wait(self, job: Job) -> None:
        """Start the time that the job may wait in the queue."""
        self._waits.set(job)

    def stop_queue_wait(self, job: Job) -> None:
        """Stop the time that the job may wait in the queue."""
        self._waits.stop(job)

    def _waited_too_long(self, job: Job) -> None:
        self._counters["overload_queue_wait"] += 1
        self._owner.fail(
            job, Overloaded(f"no worker was free within {self._limits.queue_wait:g} s")
        )

    def _past_soft_limit(self, job: Job) -> None:
        """Log the stacks of the workers that run the job: it may hang."""
        self._hard.set(job)
        for attempt in job.attempts:
            if attempt.pipeline.first is attempt:
                self.log.warn(
                    "{shard} has been scanning {about} for {n:g} s; its stacks follow",
                    shard=attempt.pipeline.shard,
                    about=job.about,
                    n=self._reactor.seconds() - attempt.began,
                )
                attempt.pipeline.shard.dump_stacks()

    def _past_deadline(self, job: Job) -> None:
        """Fail the job; kill each shard whose scan of it took most of the time.

        A shard may have answered while this process slept, so arrived answers are read first.
        """
        for attempt in list(job.attempts):
            attempt.pipeline.shard.catch_up()
        if job.done:
            return
        self._counters["deadlines"] += 1
        deadline, now = self._limits.deadline(job.stage), self._reactor.seconds()
        reason = f"{job.about} was not answered within {deadline:g} s"
        begun = [each for each in job.attempts if each.pipeline.first is each]
        hung = [each for each in begun if now - each.began >= HUNG_SHARE * deadline]
        if not hung:
            error = DeadlineExceeded(reason) if begun else Overloaded(reason)
            self._owner.fail_alone(job, error)
            return
        self._owner.fail_hung(job, reason)
        for attempt in hung:
            attempt.pipeline.shard.kill(Loss(reason, Blame.MESSAGE, attempt.number))
