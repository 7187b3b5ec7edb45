"""The dispatcher: from a submitted job to its one answer, whatever happens to the shards meanwhile.

A job that was submitted is answered exactly once, with reply packets or with a JobFailed, or it
is cancelled. Which shard does it, and when, is for `assignment` and its queue; the pool starts and
replaces shards. Shards tell the dispatcher what they have answered, and it answers the submitter:
nothing stands between. It decides whether a job is tried again whose shard is lost; `retries`
decides whether it then runs alone.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from sharded_milter.dispatch.affinity import Affinity
from sharded_milter.dispatch.ends import Ends
from sharded_milter.dispatch.job import Attempt, Job, Loss, settled
from sharded_milter.dispatch.pipeline import Shard
from sharded_milter.dispatch.poison import Keep
from sharded_milter.dispatch.retries import Retries
from sharded_milter.errors import (
    CallbackFailed,
    JobFailed,
    Overloaded,
    WorkerLost,
)
from sharded_milter.ipc.messages import Answer
from sharded_milter.limits import Limits
from sharded_milter.protocol.text import to_text

# Why the rest of a message cannot be asked about.
LOST = "the milter's object was lost with its worker, and the message with it"

# Why a message is not tried again, where what it has killed was lost before.
KILLED = "its scan has killed workers"


class Dispatcher:
    """Runs jobs on whatever shards there are."""

    log = Logger()

    def __init__(self, limits: Limits, reactor: Any, keep: Keep | None = None) -> None:
        self.counters: Counter[str] = Counter()
        self._limits = limits
        self._reactor = reactor
        self._retries = Retries(limits, self.counters, keep)
        self._ends = Ends(limits, self.counters, reactor, self._retries)
        self._assignment = self._ends.assignment
        self._queue, self._shards = self._assignment.queue, self._assignment.shards

    @property
    def queued(self) -> int:
        """How many jobs wait for a shard."""
        return len(self._queue)

    @property
    def waits_for_fresh(self) -> bool:
        """Whether a job waits for a shard that has never been given anything."""
        return self._queue.waits_for_fresh

    # Jobs in

    def submit(self, job: Job) -> bytes | Deferred[bytes]:
        """A Deferred of the reply packets, which has not fired; it may fail with a JobFailed.

        Raises a JobFailed where the job is answered without being queued.
        """
        now = job.submitted = self._reactor.seconds()
        try:
            if job.affinity is not None and job.affinity.lost:
                raise WorkerLost(LOST)
            self._retries.admit(job, now)
        except JobFailed:
            self._ends.close(job)
            raise
        answer = job.answer = Deferred()
        if job.stage is None:
            self._ends.session_ends(job)
        else:
            self._ends.clocks.submitted(job)
        leader = self._retries.leader_of(job) if self._limits.join_retries else None
        if leader is not None:
            job.leader = leader
            leader.followers.append(job)
            return answer
        try:
            if not self._assignment.place(job, now):
                self._assignment.enqueue(job)
        except JobFailed:
            self._ends.close(job)
            raise
        # It may have failed: it could not be given to a shard.
        return settled(answer) if job.done else answer

    def cancel(self, job: Job) -> None:
        """The answer is not wanted any more; its Deferred does not fire.

        An attempt that has begun runs on; it is killed at its own deadline. Where a repeat waits
        for the same answer, it takes the job's place.
        """
        job.answer = None
        if not job.done:
            self._ends.part(job)

    # What shards tell

    def serve(self, shard: Shard) -> None:
        """The shard is ready and takes jobs from now on."""
        self._shards.serve(shard)

    def retire(self, shard: Shard) -> None:
        """From now on the shard takes what its objects are told, and nothing else.

        It is told when it has nothing in hand and no objects.
        """
        self._shards.retire(shard)

    def give_up_objects(self, shard: Shard) -> None:
        """The shard's objects have had their time: their connections go on with new ones."""
        for job in self._shards.give_up_objects(shard):
            self._ends.clocks.left_queue(job)
            self._again(job)

    def unavailable(self, shard: Shard) -> None:
        """The shard can be told nothing more; its exit should follow."""
        self._shards.unavailable(shard)

    def answered(self, shard: Shard, number: int, answer: Answer) -> str:
        """The shard has answered; returns which rule it has broken by that, or nothing."""
        pipeline = self._shards.pipelines.get(shard)
        attempt = pipeline.attempts.get(number) if pipeline is not None else None
        if pipeline is None or attempt is None:
            return "it has answered what it was not asked"
        if answer.withdrawn:
            if not attempt.withdrawn:
                return "it has withdrawn what it was to answer"
            self._withdrawn(attempt)
            return ""
        if pipeline.first is not attempt:
            return "it has answered out of turn"
        self._shards.end(attempt, scanned=True)
        job = attempt.job
        if attempt not in job.attempts:
            self.counters["attempts_superseded"] += 1
            self._shards.capacity(pipeline)
            return ""
        job.attempts.remove(attempt)
        job.started, job.slot = attempt.began, pipeline.slot
        if answer.short or answer.lost:
            self._came_to_nothing(job, answer)
            self._shards.capacity(pipeline)
            return ""
        self.counters["attempts_answered"] += 1
        self._ends.close(job)
        self._shards.capacity(pipeline)
        self._ends.tell(
            job, CallbackFailed(to_text(answer.error)) if answer.error else answer.replies
        )
        return ""

    def _came_to_nothing(self, job: Job, answer: Answer) -> None:
        """The worker could not take the question, or the master not the answer: both can help it.

        What the master has lost is scanned once more. A worker is replaced; until then it would
        have nothing else to say.
        """
        self.counters["attempts_short"] += 1
        if job.affinity is not None:
            self._shards.release(job.affinity)  # what the object has been told is not known now
            job.affinity.lose()
        elif job.attempts or (answer.lost and not job.answer_lost):
            job.answer_lost = True
            self._go_on(job, "")
            return
        self._ends.fail(job, Overloaded(to_text(answer.short or answer.lost)))

    def _withdrawn(self, attempt: Attempt) -> None:
        """The shard will not begin it."""
        self.counters["attempts_withdrawn"] += 1
        self._shards.end(attempt, scanned=False)
        job, pipeline = attempt.job, attempt.pipeline
        if attempt in job.attempts:
            job.attempts.remove(attempt)
            if not job.attempts:  # the shard that has taken it over is lost
                self._go_on(job, KILLED)
        self._shards.capacity(pipeline)

    def lost(self, shard: Shard, loss: Loss) -> bool:
        """The shard is gone, with its objects; returns whether it had something in hand."""
        attempts, waiting = self._shards.remove(shard, loss)
        for attempt, blamed in attempts:
            self._attempt_lost(attempt, loss, blamed=blamed)
        for job in waiting:
            self._ends.clocks.left_queue(job)
            if not job.done:  # who heard of one that is lost may have cancelled others
                self._again(job)
        self._assignment.match()
        return bool(attempts)

    def _attempt_lost(self, attempt: Attempt, loss: Loss, *, blamed: bool) -> None:
        job = attempt.job
        self.counters["attempts_lost"] += 1
        if blamed:
            self.counters["workers_lost"] += 1
            job.blamed += 1
        if attempt not in job.attempts:
            return
        job.attempts.remove(attempt)
        if blamed and job.blamed <= self._limits.retries:
            self.counters["retries"] += 1
            self.log.warn("{s} died with {a}", s=attempt.pipeline.shard, a=job.about)
        self._go_on(job, loss.reason)

    def _go_on(self, job: Job, reason: str) -> None:
        """An attempt has come to nothing: another follows, unless one has begun already."""
        self._queue.remove(job)  # it may have been offered to other shards
        if any(each.pipeline.first is each for each in job.attempts):
            return
        if job.blamed > self._limits.retries:
            self._ends.fail(job, self._retries.given_up(job, reason, self._reactor.seconds()))
        elif not job.attempts:
            self._again(job)
        elif not job.blamed:  # one that was blamed may have to run alone, once this is confirmed
            self._assignment.offer(job)

    def _again(self, job: Job) -> None:
        """Another shard does the job, unless it needs the object that was lost."""
        if job.stage is None or (job.affinity is not None and job.affinity.lost):
            self._ends.fail(job, WorkerLost(LOST))
            return
        self._retries.prepare(job, self._reactor.seconds())
        self._assignment.enqueue(job, again=True)

    # Objects

    def release(self, affinity: Affinity) -> None:
        """The connection is over, and so is its object."""
        self._shards.release(affinity)

    def sessions_ended(self) -> Deferred[None]:
        """Fires when all objects have been told that their sessions are over."""
        return self._ends.sessions_ended()
