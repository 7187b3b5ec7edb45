"""Clocks of jobs (queue wait, stack dump, deadline) and of attempts (waiting behind another job,
running on when the answer is not wanted). They kill a shard whose scan hangs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from twisted.logger import Logger

from sharded_milter.alarms import Alarm
from sharded_milter.dispatch.job import Attempt, Blame, Job, Loss
from sharded_milter.errors import DeadlineExceeded, JobFailed, Overloaded
from sharded_milter.limits import Limits
from sharded_milter.protocol.stages import Stage

# The share of a deadline after which a worker is asked where it hangs.
SOFT_LIMIT = 0.8

# A scan that has run for a larger share of its deadline is what has kept the MTA waiting: its
# worker is killed, and the message may be poison.
MOST = 0.5


# A job that has waited behind another for so long, seconds, is taken over by a shard that is or
# becomes idle. That is more than what stands before a job whose shard was given several, and less
# than a scan that is not to have any behind it.
PATIENCE = 0.01


class Deadlines:
    """Calls `ring` with each job that has had `share` of the time that its stage may take.

    The end of a message may take longer than a command before it.
    """

    def __init__(
        self, reactor: Any, limits: Limits, ring: Callable[[Job], object], share: float = 1.0
    ) -> None:
        self._at_end = Alarm(reactor, share * limits.deadline(Stage.EOM), ring)
        self._before = Alarm(reactor, share * limits.deadline(None), ring)

    def set(self, job: Job) -> None:
        """Its time begins now; `job.alarm` stops it."""
        alarm = job.alarm = self._at_end if job.stage is Stage.EOM else self._before
        alarm.set(job)


class AttemptClocks:
    """How long an attempt may wait behind another, and run once its answer is not awaited.

    `behind_too_long` is called with an attempt that another shard should take over.
    """

    def __init__(
        self,
        limits: Limits,
        counters: Counter[str],
        reactor: Any,
        behind_too_long: Callable[[Attempt], object],
    ) -> None:
        self._limits = limits
        self._counters = counters
        self._reactor = reactor
        self._patience = Alarm(reactor, PATIENCE, behind_too_long)

    def wait_behind(self, attempt: Attempt) -> None:
        """It waits behind another from now on."""
        self._patience.set(attempt)

    def begun(self, attempt: Attempt) -> None:
        """It waits no longer."""
        self._patience.stop(attempt)

    def limit(self, attempt: Attempt) -> None:
        """Ends an attempt whose answer is not awaited when its own time is over."""
        deadline = self._limits.deadline(attempt.job.stage)
        left = max(0.0, attempt.began + deadline - self._reactor.seconds())
        if attempt.limit is None:
            attempt.limit = self._reactor.callLater(left, self._past_limit, attempt, deadline)

    def _past_limit(self, attempt: Attempt, deadline: float) -> None:
        attempt.limit = None
        attempt.pipeline.shard.catch_up()
        pipeline = attempt.pipeline
        if not pipeline.available or attempt.number not in pipeline.attempts:
            return  # it is killed already, or has answered while this process slept
        self._counters["deadlines"] += 1
        reason = f"{attempt.job.about} was not answered within {deadline:g} s"
        attempt.pipeline.shard.kill(Loss(reason, Blame.MESSAGE, attempt.number))

    def stop(self, attempt: Attempt) -> None:
        """Nothing more is due for an attempt."""
        self._patience.stop(attempt)
        limit, attempt.limit = attempt.limit, None
        if limit is not None and limit.active():
            limit.cancel()


class JobOwner(Protocol):
    """Who ends jobs: `Ends`."""

    def fail(self, job: Job, error: JobFailed) -> None: ...
    def fail_alone(self, job: Job, error: JobFailed) -> None: ...
    def fail_hung(self, job: Job, reason: str) -> None: ...


class JobClocks:
    """How long a job may wait in the queue, and be in hand at all."""

    log = Logger()

    def __init__(
        self, limits: Limits, counters: Counter[str], reactor: Any, owner: JobOwner
    ) -> None:
        self._limits = limits
        self._counters = counters
        self._reactor = reactor
        self._owner = owner
        self._soft = Deadlines(reactor, limits, self._past_soft_limit, SOFT_LIMIT)
        self._hard = Deadlines(reactor, limits, self._past_deadline, 1 - SOFT_LIMIT)
        self._waits = Alarm(reactor, limits.queue_wait, self._waited_too_long)

    def submitted(self, job: Job) -> None:
        """The MTA waits for its answer from now on; `job.alarm` stops that."""
        self._soft.set(job)

    def queued(self, job: Job) -> None:
        """It waits in the queue from now on."""
        self._waits.set(job)

    def left_queue(self, job: Job) -> None:
        """It waits there no longer."""
        self._waits.stop(job)

    def _waited_too_long(self, job: Job) -> None:
        self._counters["overload_queue_wait"] += 1
        self._owner.fail(
            job, Overloaded(f"no worker was free within {self._limits.queue_wait:g} s")
        )

    def _past_soft_limit(self, job: Job) -> None:
        """Most of the time is over: if its scan hangs, the worker shows where."""
        self._hard.set(job)
        for attempt in job.attempts:
            if attempt.pipeline.first is attempt:
                self.log.warn(
                    "{shard} has not answered {about} for {n:g} s; its stacks follow",
                    shard=attempt.pipeline.shard,
                    about=job.about,
                    n=self._reactor.seconds() - attempt.began,
                )
                attempt.pipeline.shard.dump_stacks()

    def _past_deadline(self, job: Job) -> None:
        """The deadline: the MTA hears at once; a shard is killed if this scan took the time.

        It may have answered while this process slept.
        """
        for attempt in list(job.attempts):
            attempt.pipeline.shard.catch_up()
        if job.done:
            return
        self._counters["deadlines"] += 1
        deadline, now = self._limits.deadline(job.stage), self._reactor.seconds()
        reason = f"{job.about} was not answered within {deadline:g} s"
        begun = [each for each in job.attempts if each.pipeline.first is each]
        hung = [each for each in begun if now - each.began >= MOST * deadline]
        if not hung:
            error = DeadlineExceeded(reason) if begun else Overloaded(reason)
            self._owner.fail_alone(job, error)
            return
        self._owner.fail_hung(job, reason)
        for attempt in hung:
            attempt.pipeline.shard.kill(Loss(reason, Blame.MESSAGE, attempt.number))
