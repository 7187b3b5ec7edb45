"""The dispatcher: every submitted job gets one answer, also when shards are lost meanwhile.

A job is answered exactly once, with reply packets or with a JobFailed, or it is cancelled.
`assignment` and its queue choose the shard and the time; the pool starts and replaces shards. A
shard passes its answers to the dispatcher, which fires the submitter's Deferred. The dispatcher
decides whether a job is retried when its shard is lost; `retries` decides whether it then runs
alone.
"""

from __future__ import annotations

from collections import Counter

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from sharded_milter.alarms import ReactorTime
from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.completion import Completion
from sharded_milter.dispatch.job import Attempt, Job, Loss, result_of
from sharded_milter.dispatch.keep_dir import KeepDir
from sharded_milter.dispatch.pipeline import ShardControl
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

# The error for the rest of a message whose object is lost.
LOST = "the milter's object was lost with its worker, and the current message with it"

# The reason that is logged when a message has killed the shard that took it over.
KILLED = "its scan has killed workers"


class Dispatcher:
    """Runs jobs on the shards that serve."""

    log = Logger()

    def __init__(self, limits: Limits, reactor: ReactorTime, keep: KeepDir | None = None) -> None:
        self.counters: Counter[str] = Counter()
        self._limits = limits
        self._reactor = reactor
        self._retries = Retries(limits, self.counters, keep)
        self._completion = Completion(limits, self.counters, reactor, self._retries)
        self._assignment = self._completion.assignment
        self._queue, self._shards = self._assignment.queue, self._assignment.shards

    @property
    def queued(self) -> int:
        """The number of jobs that wait for a shard."""
        return len(self._queue)

    @property
    def waits_for_fresh(self) -> bool:
        """Whether a job waits for a shard that has had no job yet, and none is idle."""
        return self._queue.waits_for_fresh

    # Jobs in

    def submit(self, job: Job) -> bytes | Deferred[bytes]:
        """Return a Deferred of the reply packets that has not fired; it may fail with a JobFailed.

        Raise a JobFailed if the job is refused without being queued.
        """
        now = job.submitted = self._reactor.seconds()
        try:
            if job.affinity is not None and job.affinity.lost:
                raise WorkerLost(LOST)
            self._retries.admit(job, now)
        except JobFailed:
            self._completion.finish(job)
            raise
        answer = job.answer = Deferred()
        if job.stage is None:
            self._completion.track_session_end(job)
        else:
            self._completion.timeouts.start(job)
        leader = self._retries.leader_of(job) if self._limits.join_retries else None
        if leader is not None:
            job.leader = leader
            leader.followers.append(job)
            return answer
        try:
            if not self._assignment.assign_now(job, now):
                self._assignment.enqueue(job)
        except JobFailed:
            self._completion.finish(job)
            raise
        # It may have failed already: no shard could take it.
        return result_of(answer) if job.done else answer

    def cancel(self, job: Job) -> None:
        """Cancel the job; its Deferred does not fire.

        An attempt that has begun runs on until its own deadline. If a repeat waits for the same
        answer, the repeat takes the job's place.
        """
        job.answer = None
        if not job.done:
            self._completion.detach(job)

    # Events of shards

    def serve(self, shard: ShardControl) -> None:
        """Give jobs to the shard, which is ready, from now on."""
        self._shards.serve(shard)

    def retire(self, shard: ShardControl) -> None:
        """Give the shard only the jobs of its objects from now on.

        Call its `drained` once it has no attempts and no objects.
        """
        self._shards.retire(shard)

    def drop_objects(self, shard: ShardControl) -> None:
        """Drop the shard's objects; their connections continue with new objects elsewhere."""
        for job in self._shards.drop_objects(shard):
            self._completion.timeouts.stop_queue_wait(job)
            self._requeue(job)

    def unavailable(self, shard: ShardControl) -> None:
        """Give the shard nothing more; its exit should follow."""
        self._shards.unavailable(shard)

    def answered(self, shard: ShardControl, number: int, answer: Answer) -> str:
        """Take an answer from the shard; return the protocol error in it, or an empty string."""
        pipeline = self._shards.pipelines.get(shard)
        attempt = pipeline.attempts.get(number) if pipeline is not None else None
        if pipeline is None or attempt is None:
            return "it has answered a question that it was not asked"
        if answer.withdrawn:
            if not attempt.withdrawn:
                return "it has withdrawn a question without being asked to"
            self._attempt_withdrawn(attempt)
            return ""
        if pipeline.first is not attempt:
            return "it has answered questions out of order"
        self._shards.finish(attempt, scanned=True)
        job = attempt.job
        if attempt not in job.attempts:
            self.counters["attempts_superseded"] += 1
            self._shards.update_capacity(pipeline)
            return ""
        job.attempts.remove(attempt)
        job.started, job.slot = attempt.began, pipeline.slot
        if answer.short or answer.lost:
            self._handle_shortage(job, answer)
            self._shards.update_capacity(pipeline)
            return ""
        self.counters["attempts_answered"] += 1
        self._completion.finish(job)
        self._shards.update_capacity(pipeline)
        self._completion.answer(
            job, CallbackFailed(to_text(answer.error)) if answer.error else answer.replies
        )
        return ""

    def _handle_shortage(self, job: Job, answer: Answer) -> None:
        """Retry or fail a job for which worker or master had no memory or no descriptors.

        If the master had none, the message is scanned once more. If the worker had none, the job
        fails and the worker is replaced: until then it would give the same answer again.
        """
        self.counters["attempts_short"] += 1
        if job.affinity is not None:
            self._shards.release_object(job.affinity)  # it is unknown what the object has received
            job.affinity.lose_object()
        elif job.attempts or (answer.lost and not job.answer_lost):
            job.answer_lost = True
            self._retry_or_fail(job, "")
            return
        self._completion.fail(job, Overloaded(to_text(answer.short or answer.lost)))

    def _attempt_withdrawn(self, attempt: Attempt) -> None:
        """The shard has confirmed that it will not begin the attempt."""
        self.counters["attempts_withdrawn"] += 1
        self._shards.finish(attempt, scanned=False)
        job, pipeline = attempt.job, attempt.pipeline
        if attempt in job.attempts:
            job.attempts.remove(attempt)
            if not job.attempts:  # the shard that has taken it over is lost
                self._retry_or_fail(job, KILLED)
        self._shards.update_capacity(pipeline)

    def lost(self, shard: ShardControl, loss: Loss) -> bool:
        """Remove a shard that has exited; return whether it had attempts in flight."""
        attempts, waiting = self._shards.remove(shard, loss)
        for attempt, blamed in attempts:
            self._attempt_lost(attempt, loss, blamed=blamed)
        for job in waiting:
            self._completion.timeouts.stop_queue_wait(job)
            if not job.done:  # a submitter whose job has failed may have cancelled others
                self._requeue(job)
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
            self.log.warn(
                "{s} died while scanning {a}; retrying", s=attempt.pipeline.shard, a=job.about
            )
        self._retry_or_fail(job, loss.reason)

    def _retry_or_fail(self, job: Job, reason: str) -> None:
        """Retry the job after a failed attempt, unless another attempt has begun; or fail it."""
        self._queue.remove(job)  # it may be offered for takeover
        if any(each.pipeline.first is each for each in job.attempts):
            return
        if job.blamed > self._limits.retries:
            self._completion.fail(
                job, self._retries.final_error(job, reason, self._reactor.seconds())
            )
        elif not job.attempts:
            self._requeue(job)
        elif not job.blamed:  # a blamed job may have to run alone, once the withdrawal is confirmed
            self._assignment.offer(job)

    def _requeue(self, job: Job) -> None:
        """Queue the job again; fail it if its object is lost."""
        if job.stage is None or (job.affinity is not None and job.affinity.lost):
            self._completion.fail(job, WorkerLost(LOST))
            return
        self._retries.prepare(job, self._reactor.seconds())
        self._assignment.enqueue(job, requeued=True)

    # Objects

    def release(self, affinity: ObjectAffinity) -> None:
        """Forget the object: its connection is closed."""
        self._shards.release_object(affinity)

    def when_sessions_ended(self) -> Deferred[None]:
        """Return a Deferred that fires when every object has got its end-of-session notice."""
        return self._completion.when_sessions_ended()
