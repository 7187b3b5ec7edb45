"""Shards as dispatch knows them: what each has in hand, and what it can take.

Whatever ends an attempt, or lets a shard take less or more, is said here; so the queue always
knows the capacity there is, and each change of it is used at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from sharded_milter.dispatch.affinity import Affinity
from sharded_milter.dispatch.job import Attempt, Blame, Job, Loss
from sharded_milter.dispatch.pipeline import Pipeline, Shard
from sharded_milter.dispatch.queue import Queue
from sharded_milter.dispatch.timeouts import AttemptClocks


class Shards:
    """The shards that serve; `match` is called where one can take a job, and jobs wait."""

    def __init__(
        self,
        queue: Queue[Job, Pipeline],
        clocks: AttemptClocks,
        reactor: Any,
        match: Callable[[], None],
    ) -> None:
        self.pipelines: dict[Shard, Pipeline] = {}
        self._queue = queue
        self._clocks = clocks
        self._reactor = reactor
        self._match = match
        self._sessions = itertools.count(1)  # of objects

    def serve(self, shard: Shard) -> None:
        """The shard is ready and takes jobs from now on."""
        pipeline = self.pipelines[shard] = Pipeline(shard)
        self.capacity(pipeline)

    def retire(self, shard: Shard) -> None:
        """The shard takes what its objects are told, and nothing else; it is told when all ends."""
        pipeline = self.pipelines.get(shard)
        if pipeline is None:  # it never served
            shard.emptied()
            return
        pipeline.retired = True
        self.capacity(pipeline)

    def give_up_objects(self, shard: Shard) -> list[Job]:
        """The shard's objects have had their time: their connections go on with new ones.

        Returns the jobs that have waited for the objects.
        """
        pipeline = self.pipelines.get(shard)
        if pipeline is None:
            return []
        waiting = self._queue.take_objects(pipeline)
        pipeline.lose_objects()
        self.capacity(pipeline)
        return waiting

    def unavailable(self, shard: Shard) -> None:
        """The shard can be told nothing more; its exit should follow."""
        pipeline = self.pipelines.get(shard)
        if pipeline is not None:
            pipeline.available = False
            self._queue.shards.unavailable(pipeline)
            self._match()  # one that does heavy jobs counts no more

    def remove(self, shard: Shard, loss: Loss) -> tuple[list[tuple[Attempt, bool]], list[Job]]:
        """The shard is gone, and its objects are lost.

        Returns the attempts that it had in hand, each with whether its message is to blame, and
        the jobs that have waited for its objects.
        """
        pipeline = self.pipelines.pop(shard, None)
        if pipeline is None:
            return [], []
        pipeline.available = False
        waiting = self._queue.gone(pipeline)
        pipeline.lose_objects()
        first = pipeline.first
        blamed = first if loss.blame is Blame.MESSAGE else None
        if loss.attempt and (first is None or first.number != loss.attempt):
            blamed = None  # the one that was to blame was answered in the last moment
        attempts = [(attempt, attempt is blamed) for attempt in pipeline.attempts.values()]
        pipeline.attempts.clear()
        pipeline.first = None
        for attempt, _ in attempts:
            self._clocks.stop(attempt)
            attempt.held = None
        return attempts, waiting

    def capacity(self, pipeline: Pipeline) -> None:
        """Says what the shard can take now, and gives it that."""
        if pipeline.retired:
            self._capacity_of_retired(pipeline)
        elif pipeline.available:
            if pipeline.first is None:
                self._queue.shards.idle(pipeline)
            else:
                self._queue.shards.busy(pipeline, has_room=pipeline.has_room)
        if self._queue.has_jobs:
            self._match()

    def _capacity_of_retired(self, pipeline: Pipeline) -> None:
        if not pipeline.available:
            return
        if pipeline.is_over:
            self.unavailable(pipeline.shard)
            pipeline.shard.emptied()
        elif pipeline.first is None:
            self._queue.shards.resting(pipeline)
        else:
            self._queue.shards.retired(pipeline)
            self._queue.shards.busy(pipeline, has_room=False)

    # Attempts

    def end(self, attempt: Attempt, *, scanned: bool) -> None:
        """The shard has done with an attempt, and begins the next one that it has."""
        if attempt.limit is not None:
            self._clocks.stop(attempt)
        after = attempt.pipeline.end(attempt, self._reactor.seconds(), scanned=scanned)
        if after is None:
            return
        self._clocks.begun(after)
        if after.job.entry:
            self._queue.remove(after.job)  # it is begun, and not to be taken over any more
        if after not in after.job.attempts or after.job.stage is None:
            self._clocks.limit(after)

    def supersede(self, attempt: Attempt) -> None:
        """Its answer is not wanted: it is withdrawn while it can be, else it runs on."""
        pipeline = attempt.pipeline
        self._clocks.begun(attempt)
        if pipeline.first is attempt:
            self._clocks.limit(attempt)
        elif attempt.job.affinity is None and not attempt.withdrawn and pipeline.available:
            self.withdraw(attempt)

    def withdraw(self, attempt: Attempt) -> None:
        attempt.withdrawn = True
        self._clocks.begun(attempt)
        attempt.pipeline.shard.withdraw(attempt.number)

    # Objects

    def settle(self, affinity: Affinity, pipeline: Pipeline | None) -> None:
        """There is to be a new object, on that shard."""
        if pipeline is not None:
            affinity.settle(pipeline, next(self._sessions))
            pipeline.affinities.add(affinity)

    def release(self, affinity: Affinity) -> None:
        """The connection is over, and so is its object."""
        pipeline = affinity.holder
        affinity.holder = None
        if pipeline is not None and affinity in pipeline.affinities:
            pipeline.affinities.discard(affinity)
            if pipeline.is_over:
                self.capacity(pipeline)
