"""The completion of jobs: each is answered once or cancelled, and its memory is freed.

To complete a job is to stop its timeouts and to take it from the queue and its shards, so this
module has both.
"""

from __future__ import annotations

from collections import Counter

from twisted.internet.defer import Deferred

from sharded_milter.alarms import ReactorTime
from sharded_milter.dispatch.assignment import Assignment
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.retries import Retries
from sharded_milter.dispatch.timeouts import JobTimeouts
from sharded_milter.errors import DeadlineExceeded, JobFailed, Poisoned
from sharded_milter.limits import Limits


class Completion:
    """Completes jobs, and tracks the end-of-session notices that are in flight."""

    def __init__(
        self, limits: Limits, counters: Counter[str], reactor: ReactorTime, retries: Retries
    ) -> None:
        self.timeouts = JobTimeouts(limits, counters, reactor, self)
        self.assignment = Assignment(limits, counters, reactor, self.timeouts, self.fail)
        self._reactor = reactor
        self._retries = retries
        self._joins = limits.join_retries
        self._session_ends: set[Job] = set()  # notices that are not answered yet
        self._all_ended: Deferred[None] | None = None

    def finish(self, job: Job) -> None:
        """Mark the job as done, take it from queue and shards, and free its bytes."""
        job.done = True
        if job.alarm is not None:
            job.alarm.stop(job)
        if job.entry:
            self.timeouts.stop_queue_wait(job)
            self.assignment.queue.remove(job)
        attempts, job.attempts = job.attempts, []
        for attempt in attempts:
            self.assignment.shards.supersede(attempt)
        if self._joins:
            self._retries.forget(job)
        job.free()
        if job.stage is None:
            self._session_ends.discard(job)
            self._check_all_ended()

    def fail(self, job: Job, error: JobFailed) -> None:
        """Fail the job and the repeats that wait for it."""
        self.finish(job)
        self.answer(job, error)

    def fail_alone(self, job: Job, error: JobFailed) -> None:
        """Fail the job only; a repeat that waits for its answer takes its place."""
        self.detach(job)
        self.answer(job, error)

    def fail_hung(self, job: Job, reason: str) -> None:
        """Fail a job whose scan hangs, and its repeats; count one more death of its message."""
        poison = self._retries.record_deaths(job, job.blamed + 1, self._reactor.seconds())
        self.fail(job, Poisoned(reason) if poison else DeadlineExceeded(reason))

    def answer(self, job: Job, outcome: bytes | JobFailed) -> None:
        """Fire the Deferred of a finished job, and those of its repeats."""
        followers, job.followers = job.followers, []
        for follower in followers:
            follower.leader = None
            follower.slot, follower.started = job.slot, job.started
            self.finish(follower)
        awaited, job.answer = job.answer, None
        if awaited is None:
            pass
        elif isinstance(outcome, bytes):
            awaited.callback(outcome)
        else:
            awaited.errback(outcome)
        for follower in followers:
            self.answer(follower, outcome)

    def detach(self, job: Job) -> None:
        """Take the job out of its group of repeats, of which the oldest takes its place."""
        waiting, job.followers = job.followers, []
        if job.leader is not None:
            job.leader.followers.remove(job)
            job.leader = None
        if not waiting:
            self.finish(job)
            return
        new_leader, *new_leader.followers = waiting
        new_leader.leader = None
        for follower in new_leader.followers:
            follower.leader = new_leader
        offered, waited = bool(job.entry), self.assignment.queue.remove(job)
        new_leader.attempts, job.attempts = job.attempts, []
        new_leader.born, new_leader.blamed, new_leader.solo = job.born, job.blamed, job.solo
        for attempt in new_leader.attempts:
            attempt.job = new_leader
        self._retries.replace(job, new_leader)
        self.finish(job)
        if waited:
            self.timeouts.stop_queue_wait(job)
            self.assignment.enqueue(new_leader, requeued=True)
        elif offered:
            self.assignment.offer(new_leader)

    def track_session_end(self, job: Job) -> None:
        """Track an end-of-session notice until it is answered."""
        self._session_ends.add(job)

    def when_sessions_ended(self) -> Deferred[None]:
        """Return a Deferred that fires when no end-of-session notice is in flight."""
        ended = self._all_ended = Deferred()
        self._check_all_ended()
        return ended

    def _check_all_ended(self) -> None:
        if self._all_ended is not None and not self._session_ends:
            ended, self._all_ended = self._all_ended, None
            ended.callback(None)
