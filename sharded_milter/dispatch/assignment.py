"""Assignment: which job which shard gets next.

It gives jobs to shards, and takes over those that wait behind a slow one. What becomes of a job is
for the dispatcher to say.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

from sharded_milter.dispatch.affinity import Affinity
from sharded_milter.dispatch.job import Attempt, Job
from sharded_milter.dispatch.pipeline import Pipeline
from sharded_milter.dispatch.queue import Queue
from sharded_milter.dispatch.shards import Shards
from sharded_milter.dispatch.timeouts import AttemptClocks, JobClocks
from sharded_milter.errors import JobFailed, Overloaded, Superseded
from sharded_milter.limits import Limits


class Assignment:
    """Jobs that wait, shards, and the attempts between them.

    `failed` is called with a job that cannot be given to any shard, and why.
    """

    def __init__(
        self,
        limits: Limits,
        counters: Counter[str],
        reactor: Any,
        job_clocks: JobClocks,
        failed: Callable[[Job, JobFailed], object],
    ) -> None:
        self.queue: Queue[Job, Pipeline] = Queue(limits.max_queue, limits.reserve)
        self._clocks = AttemptClocks(limits, counters, reactor, self._behind_too_long)
        self.shards = Shards(self.queue, self._clocks, reactor, self.match)
        self._counters = counters
        self._reactor = reactor
        self._job_clocks = job_clocks
        self._failed = failed
        self._numbers = itertools.count(1)  # of attempts
        self._matching = False

    # Jobs to shards

    def place(self, job: Job, now: float) -> bool:
        """Gives a new job to a shard, if no other waits and one can take it; else it must wait.

        Raises a JobFailed where no shard can do the job.
        """
        if job.affinity is not None:
            self._choose_holder(job, job.affinity)
        pipeline = self.queue.place(job)
        if pipeline is not None:
            self._give(job, pipeline, now)
        return pipeline is not None

    def enqueue(self, job: Job, *, again: bool = False) -> None:
        """The job waits in the queue; raises Overloaded when that is full."""
        if job.affinity is not None:
            self._choose_holder(job, job.affinity)
        try:
            self.queue.add(job, again=again)
        except Overloaded:
            self._counters["overload_queue_full"] += 1
            raise
        if job.stage is not None:
            self._job_clocks.queued(job)
        self.match()

    def _choose_holder(self, job: Job, affinity: Affinity) -> None:
        """A new object goes to the shard with the fewest, unless its job is to run alone."""
        if affinity.holder is None and not job.solo:
            self.shards.settle(affinity, self.queue.shards.fewest_objects())

    def match(self) -> None:
        """Gives jobs to shards until none fits; called after every change of capacity."""
        if self._matching:  # that call goes on until nothing fits
            return
        self._matching = True
        try:
            while (pair := self.queue.next()) is not None:
                self._give_or_fail(*pair)
        finally:
            self._matching = False

    def _give_or_fail(self, job: Job, pipeline: Pipeline) -> None:
        self._job_clocks.left_queue(job)
        if job.attempts and not self._takes_over(job, pipeline):
            self.shards.capacity(pipeline)
            return
        try:
            self._give(job, pipeline, self._reactor.seconds())
        except JobFailed as error:
            if not job.attempts:  # one that is taken over may still be answered where it was
                self._failed(job, error)

    def _takes_over(self, job: Job, pipeline: Pipeline) -> bool:
        """Withdraws a job from the shard where it waits, so that an idle one can do it.

        False where it need not be: it has begun or was answered meanwhile, or the other shard is
        not idle any more. It stays too where the other shard serves another milter.
        """
        if job.manifest is not None and not pipeline.shard.serves(job.milter, job.manifest):
            return False
        attempt = job.attempts[0]
        attempt.pipeline.shard.catch_up()  # it may have answered what stood before
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
        """Gives a job to a shard; raises a JobFailed, and the shard stays free, where it cannot."""
        shard = pipeline.shard
        if job.manifest is not None and not shard.serves(job.milter, job.manifest):
            self.shards.capacity(pipeline)
            self._counters["refused_reloaded"] += 1
            raise Superseded("the milter was reloaded with other stages")
        if job.affinity is not None and job.affinity.holder is None:  # there was no shard before
            self.shards.settle(job.affinity, pipeline)
        attempt = Attempt(next(self._numbers), job, pipeline)
        try:
            shard.give(attempt.number, job)
        except OSError as error:
            self.shards.capacity(pipeline)
            raise Overloaded(f"no memory for a job: {error.strerror}") from error
        pipeline.add(attempt, now)
        job.attempts.append(attempt)
        self._counters["attempts"] += 1
        if not job.light:
            self.queue.shards.does_heavy(pipeline)
        self.queue.shards.busy(pipeline, has_room=pipeline.has_room)
        if pipeline.first is not attempt:
            if job.affinity is None:
                self._clocks.wait_behind(attempt)
        elif job.stage is None:  # no answer is awaited, so its own time bounds it
            self._clocks.limit(attempt)

    def _behind_too_long(self, attempt: Attempt) -> None:
        """The job before it takes long: a shard that is or becomes idle does it."""
        self.offer(attempt.job)

    def offer(self, job: Job) -> None:
        """A shard that is or becomes idle does the job, which waits behind another."""
        self.queue.offer(job)
        self.match()
