"""The dispatcher's shards: what each has in flight, and what it can take.

Every end of an attempt and every change of a shard's capacity is reported here, so that the queue
always knows the capacity and uses each change at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from sharded_milter.alarms import ReactorTime
from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Attempt, Blame, Job, Loss
from sharded_milter.dispatch.pipeline import Pipeline, ShardControl
from sharded_milter.dispatch.queue import Queue
from sharded_milter.dispatch.timeouts import AttemptTimeouts


class Shards:
    """The shards that serve; `match` is called when one can take a job and jobs wait."""

    def __init__(
        self,
        queue: Queue[Job, Pipeline],
        timeouts: AttemptTimeouts,
        reactor: ReactorTime,
        match: Callable[[], None],
    ) -> None:
        self.pipelines: dict[ShardControl, Pipeline] = {}
        self._queue = queue
        self._timeouts = timeouts
        self._reactor = reactor
        self._match = match
        self._sessions = itertools.count(1)  # of objects

    def serve(self, shard: ShardControl) -> None:
        """Add a shard that is ready."""
        pipeline = self.pipelines[shard] = Pipeline(shard)
        self.update_capacity(pipeline)

    def retire(self, shard: ShardControl) -> None:
        """Give the shard only jobs of its objects; call its `drained` when nothing is left."""
        pipeline = self.pipelines.get(shard)
        if pipeline is None:  # it never served
            shard.drained()
            return
        pipeline.retired = True
        self.update_capacity(pipeline)

    def drop_objects(self, shard: ShardControl) -> list[Job]:
        """Drop the shard's objects; their connections continue with new ones.

        Return the jobs that have waited for the objects.
        """
        pipeline = self.pipelines.get(shard)
        if pipeline is None:
            return []
        waiting = self._queue.remove_object_jobs(pipeline)
        pipeline.lose_objects()
        self.update_capacity(pipeline)
        return waiting

    def unavailable(self, shard: ShardControl) -> None:
        """Give the shard nothing more; its exit should follow."""
        pipeline = self.pipelines.get(shard)
        if pipeline is not None:
            pipeline.available = False
            self._queue.capacity.set_unavailable(pipeline)
            self._match()  # another shard may be allowed heavy jobs now

    def remove(
        self, shard: ShardControl, loss: Loss
    ) -> tuple[list[tuple[Attempt, bool]], list[Job]]:
        """Remove a shard that is gone; its objects are lost.

        Return its attempts, each with a flag that its message is to blame, and the jobs that have
        waited for its objects.
        """
        pipeline = self.pipelines.pop(shard, None)
        if pipeline is None:
            return [], []
        pipeline.available = False
        waiting = self._queue.remove_shard(pipeline)
        pipeline.lose_objects()
        first = pipeline.first
        blamed = first if loss.blame is Blame.MESSAGE else None
        if loss.attempt and (first is None or first.number != loss.attempt):
            blamed = None  # the attempt to blame was answered at the last moment
        attempts = [(attempt, attempt is blamed) for attempt in pipeline.attempts.values()]
        pipeline.attempts.clear()
        pipeline.first = None
        for attempt, _ in attempts:
            self._timeouts.stop(attempt)
            attempt.held = None
        return attempts, waiting

    def update_capacity(self, pipeline: Pipeline) -> None:
        """Report what the shard can take now, and match waiting jobs."""
        if pipeline.retired:
            self._update_retired_capacity(pipeline)
        elif pipeline.available:
            if pipeline.first is None:
                self._queue.capacity.set_idle(pipeline)
            else:
                self._queue.capacity.set_busy(pipeline, has_room=pipeline.has_room)
        if self._queue.has_jobs:
            self._match()

    def _update_retired_capacity(self, pipeline: Pipeline) -> None:
        if not pipeline.available:
            return
        if pipeline.is_drained:
            self.unavailable(pipeline.shard)
            pipeline.shard.drained()
        elif pipeline.first is None:
            self._queue.capacity.set_idle_for_objects(pipeline)
        else:
            self._queue.capacity.set_retired(pipeline)
            self._queue.capacity.set_busy(pipeline, has_room=False)

    # Attempts

    def finish(self, attempt: Attempt, *, scanned: bool) -> None:
        """End an attempt; the shard begins its next one."""
        if attempt.deadline_call is not None:
            self._timeouts.stop(attempt)
        after = attempt.pipeline.remove(attempt, self._reactor.seconds(), scanned=scanned)
        if after is None:
            return
        self._timeouts.stop_waiting(after)
        if after.job.entry:
            self._queue.remove(after.job)  # it has begun, so it is not taken over any more
        if after not in after.job.attempts or after.job.stage is None:
            self._timeouts.start_deadline(after)

    def supersede(self, attempt: Attempt) -> None:
        """Withdraw an attempt whose answer is not wanted; one that has begun runs on."""
        pipeline = attempt.pipeline
        self._timeouts.stop_waiting(attempt)
        if pipeline.first is attempt:
            self._timeouts.start_deadline(attempt)
        elif attempt.job.affinity is None and not attempt.withdrawn and pipeline.available:
            self.withdraw(attempt)

    def withdraw(self, attempt: Attempt) -> None:
        attempt.withdrawn = True
        self._timeouts.stop_waiting(attempt)
        attempt.pipeline.shard.withdraw(attempt.number)

    # Objects

    def assign_object(self, affinity: ObjectAffinity, pipeline: Pipeline | None) -> None:
        """Assign a new object to the shard; do nothing without a shard."""
        if pipeline is not None:
            affinity.assign(pipeline, next(self._sessions))
            pipeline.affinities.add(affinity)

    def release_object(self, affinity: ObjectAffinity) -> None:
        """Forget the object: its connection is closed."""
        pipeline = affinity.holder
        affinity.holder = None
        if pipeline is not None and affinity in pipeline.affinities:
            pipeline.affinities.discard(affinity)
            if pipeline.is_drained:
                self.update_capacity(pipeline)
