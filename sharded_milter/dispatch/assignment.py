"""Assignment of jobs to shards, and takeover of jobs that wait behind a slow one.

The dispatcher decides about the results.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

from sharded_milter.alarms import ReactorTime
from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Attempt, Job
from sharded_milter.dispatch.pipeline import Pipeline
from sharded_milter.dispatch.queue import Queue
from sharded_milter.dispatch.shards import Shards
from sharded_milter.dispatch.timeouts import AttemptTimeouts, JobTimeouts
from sharded_milter.errors import JobFailed, Overloaded, Superseded
from sharded_milter.limits import Limits


class Assignment:
    """The queue, the shards, and the attempts between them.

    `failed` is called with a job that cannot be given to a shard, and the error.
    """

    def __init__(
        self,
        limits: Limits,
        counters: Counter[str],
        reactor: ReactorTime,
        job_timeouts: JobTimeouts,
        failed: Callable[[Job, JobFailed], object],
    ) -> None:
        self.queue: Queue[Job, Pipeline] = Queue(limits.max_queue, limits.reserve)
        self._timeouts = AttemptTimeouts(limits, counters, reactor, self._behind_too_long)
        self.shards = Shards(self.queue, self._timeouts, reactor, self.match)
        self._counters = counters
        self._reactor = reactor
        self._job_timeouts = job_timeouts
        self._failed = failed
        self._numbers = itertools.count(1)  # of attempts
        self._matching = False

    # Jobs to shards

    def assign_now(self, job: Job, now: float) -> bool:
        """Give a new job to a shard; return False if it must wait in the queue.

        Raise a JobFailed if no shard can do the job.
        """
        if job.affinity is not None:
            self._assign_object(job, job.affinity)
        pipeline = self.queue.immediate_shard(job)
        if pipeline is not None:
            self._give(job, pipeline, now)
        return pipeline is not None

    def enqueue(self, job: Job, *, requeued: bool = False) -> None:
        """Put the job into the queue; raise Overloaded when that is full."""
        if job.affinity is not None:
            self._assign_object(job, job.affinity)
        try:
            self.queue.add(job, requeued=requeued)
        except Overloaded:
            self._counters["overload_queue_full"] += 1
            raise
        if job.stage is not None:
            self._job_timeouts.start_queue_wait(job)
        self.match()

    def _assign_object(self, job: Job, affinity: ObjectAffinity) -> None:
        """Assign a new object to the shard with the fewest, unless its job must run alone."""
        if affinity.holder is None and not job.solo:
            self.shards.assign_object(affinity, self.queue.capacity.with_fewest_objects())

    def match(self) -> None:
        """Give jobs to shards until none fits; called after every change of capacity."""
        if self._matching:  # the outer call continues until none fits
            return
        self._matching = True
        try:
            while (pair := self.queue.next_pair()) is not None:
                self._give_or_fail(*pair)
        finally:
            self._matching = False

    def _give_or_fail(self, job: Job, pipeline: Pipeline) -> None:
        self._job_timeouts.stop_queue_wait(job)
        if job.attempts and not self._take_over(job, pipeline):
            self.shards.update_capacity(pipeline)
            return
        try:
            self._give(job, pipeline, self._reactor.seconds())
        except JobFailed as error:
            if not job.attempts:  # else the shard that has it may still answer
                self._failed(job, error)

    def _take_over(self, job: Job, pipeline: Pipeline) -> bool:
        """Withdraw a job from the shard where it waits, so that an idle shard can do it.

        Return False, and leave the job there, if it has begun or was answered meanwhile, if the
        other shard is not idle any more, or if the other shard serves another milter.
        """
        if job.manifest is not None and not pipeline.shard.serves(job.milter, job.manifest):
            return False
        attempt = job.attempts[0]
        attempt.pipeline.shard.catch_up()  # it may have answered the jobs before this one
        if attempt not in job.attempts or attempt.pipeline.first is attempt:
            return False
        if pipeline.attempts or pipeline.retired or not pipeline.available:
            self.queue.offer(job)
            return False
        if not attempt.withdrawn:
            self.shards.withdraw(attempt)
        self._counters["taken_over"] += 1
        return True

    def _give(self, job: Job, pipeline: Pipeline, now: float) -> None:
        """Give a job to a shard; raise a JobFailed, and leave the shard free, where that fails."""
        shard = pipeline.shard
        if job.manifest is not None and not shard.serves(job.milter, job.manifest):
            self.shards.update_capacity(pipeline)
            self._counters["refused_reloaded"] += 1
            raise Superseded("the milter was reloaded with other stages")
        if job.affinity is not None and job.affinity.holder is None:  # no shard served before
            self.shards.assign_object(job.affinity, pipeline)
        attempt = Attempt(next(self._numbers), job, pipeline)
        try:
            shard.give(attempt.number, job)
        except OSError as error:
            self.shards.update_capacity(pipeline)
            raise Overloaded(f"no memory for a job: {error.strerror}") from error
        pipeline.add(attempt, now)
        job.attempts.append(attempt)
        self._counters["attempts"] += 1
        if not job.light:
            self.queue.capacity.set_heavy(pipeline)
        self.queue.capacity.set_busy(pipeline, has_room=pipeline.has_room)
        if pipeline.first is not attempt:
            if job.affinity is None:
                self._timeouts.start_waiting(attempt)
        elif job.stage is None:  # no submitter's deadline bounds it
            self._timeouts.start_deadline(attempt)

    def _behind_too_long(self, attempt: Attempt) -> None:
        """Offer a job for takeover: the job before it takes long."""
        self.offer(attempt.job)

    def offer(self, job: Job) -> None:
        """Let a shard that is or becomes idle take over the job, which waits behind another."""
        self.queue.offer(job)
        self.match()
