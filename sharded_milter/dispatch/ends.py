"""How jobs end: each is answered once, or cancelled, and lets go of all that it held.

What ends a job must stop its clocks and take it from the queue and its shards; so both are here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.internet.defer import Deferred

from sharded_milter.dispatch.assignment import Assignment
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.retries import Retries
from sharded_milter.dispatch.timeouts import JobClocks
from sharded_milter.errors import DeadlineExceeded, JobFailed, Poisoned
from sharded_milter.limits import Limits


class Ends:
    """Ends jobs; those without a stage tell objects that their sessions are over."""

    def __init__(
        self, limits: Limits, counters: Counter[str], reactor: Any, retries: Retries
    ) -> None:
        self.clocks = JobClocks(limits, counters, reactor, self)
        self.assignment = Assignment(limits, counters, reactor, self.clocks, self.fail)
        self._reactor = reactor
        self._retries = retries
        self._joins = limits.join_retries
        self._ending: set[Job] = set()  # the ends of sessions that are in hand
        self._ended: Deferred[None] | None = None

    def close(self, job: Job) -> None:
        """The job is done: nothing waits for it, and its bytes are let go."""
        job.done = True
        if job.alarm is not None:
            job.alarm.stop(job)
        if job.entry:
            self.clocks.left_queue(job)
            self.assignment.queue.remove(job)
        attempts, job.attempts = job.attempts, []
        for attempt in attempts:
            self.assignment.shards.supersede(attempt)
        if self._joins:
            self._retries.done(job)
        job.let_go()
        if job.stage is None:
            self._ending.discard(job)
            self._check_ended()

    def fail(self, job: Job, error: JobFailed) -> None:
        """Answers it, and its repeats, with an error."""
        self.close(job)
        self.tell(job, error)

    def fail_alone(self, job: Job, error: JobFailed) -> None:
        """Answers it with an error; a repeat that waits for the same answer takes its place."""
        self.part(job)
        self.tell(job, error)

    def fail_hung(self, job: Job, reason: str) -> None:
        """Answers it and its repeats: its scan hangs, by which the message is known from now on."""
        poison = self._retries.remember(job, job.blamed + 1, self._reactor.seconds())
        self.fail(job, Poisoned(reason) if poison else DeadlineExceeded(reason))

    def tell(self, job: Job, outcome: bytes | JobFailed) -> None:
        """Answers who submitted the job, and who waits for the same answer."""
        followers, job.followers = job.followers, []
        for follower in followers:
            follower.leader = None
            follower.slot, follower.started = job.slot, job.started
            self.close(follower)
        awaited, job.answer = job.answer, None
        if awaited is None:
            pass
        elif isinstance(outcome, bytes):
            awaited.callback(outcome)
        else:
            awaited.errback(outcome)
        for follower in followers:
            self.tell(follower, outcome)

    def part(self, job: Job) -> None:
        """The job needs no answer any more, but a repeat of it may."""
        heirs, job.followers = job.followers, []
        if job.leader is not None:
            job.leader.followers.remove(job)
            job.leader = None
        if not heirs:
            self.close(job)
            return
        heir, *heir.followers = heirs
        heir.leader = None
        for follower in heir.followers:
            follower.leader = heir
        offered, waited = bool(job.entry), self.assignment.queue.remove(job)
        heir.attempts, job.attempts = job.attempts, []
        heir.born, heir.blamed, heir.solo = job.born, job.blamed, job.solo
        for attempt in heir.attempts:
            attempt.job = heir
        self._retries.replaced(job, heir)
        self.close(job)
        if waited:
            self.clocks.left_queue(job)
            self.assignment.enqueue(heir, again=True)
        elif offered:
            self.assignment.offer(heir)

    def session_ends(self, job: Job) -> None:
        """The job by which an object learns that its session is over is in hand."""
        self._ending.add(job)

    def sessions_ended(self) -> Deferred[None]:
        """Fires when all objects have been told that their sessions are over."""
        ended = self._ended = Deferred()
        self._check_ended()
        return ended

    def _check_ended(self) -> None:
        if self._ended is not None and not self._ending:
            ended, self._ended = self._ended, None
            ended.callback(None)
