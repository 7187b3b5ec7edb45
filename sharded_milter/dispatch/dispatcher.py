"""Dispatch: from a submitted job to its one answer, whatever happens to the workers meanwhile.

It decides nothing about order (that is the schedule), starts no process (that is the pool), and
knows nothing of the protocol. A job is answered exactly once, with replies or with a JobFailed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.alarms import Alarm
from sharded_milter.dispatch.affinity import Pin
from sharded_milter.dispatch.job import Job, Worker, view_of
from sharded_milter.dispatch.pipeline import PATIENCE, Turn, Turns
from sharded_milter.dispatch.poison import Keep, Poison
from sharded_milter.dispatch.queue import Schedule
from sharded_milter.dispatch.timeouts import Deadlines
from sharded_milter.errors import (
    CallbackFailed,
    DeadlineExceeded,
    Overloaded,
    Poisoned,
    Superseded,
    WorkerLost,
)
from sharded_milter.limits import Limits
from sharded_milter.protocol.stages import Stage

# The share of a deadline after which a worker is asked where it hangs.
SOFT_LIMIT = 0.8

# The share of a deadline that a scan must have had before the message counts as a killer.
BLAMED_AFTER = 0.5

# A client that gives up and comes back has waited for minutes; a scan that has run this long is
# worth waiting for instead of starting it again.
JOIN_AFTER = 10.0

# Why the rest of a message cannot be asked about.
LOST = "the milter's object was lost with its worker, and the message with it"

# Transcripts of the same message differ by queue ids and ports.
JOIN_SLACK = 512


class Dispatch:
    """Runs jobs on whatever workers there are."""

    log = Logger()

    def __init__(self, limits: Limits, reactor: Any, keep: Keep | None = None) -> None:
        self.counters: Counter[str] = Counter()
        self.schedule: Schedule[Job, Any] = Schedule(
            limits.max_queue, limits.queue_wait, limits.reserve
        )
        self._limits = limits
        self._reactor = reactor
        self._poison = Poison()
        self._keep = keep
        self._running: set[Job] = set()
        self._pins: dict[Worker, set[Pin]] = {}  # whose objects a shard has
        self._numbers = itertools.count(1)  # for objects
        self._farewells: set[Job] = set()
        self._turns: dict[Worker, Turns] = {}
        self._overdue_call: Any = None
        self._soft = Deadlines(reactor, limits, self._warn, SOFT_LIMIT)
        self._hard = Deadlines(reactor, limits, self._expire, 1 - SOFT_LIMIT)
        self._patience = Alarm(reactor, PATIENCE, self._give_elsewhere)

    def submit(self, job: Job) -> Deferred[bytes]:
        """Fires with the reply packets; fails with a JobFailed."""
        result = job.result
        job.submitted = self._reactor.seconds()
        if job.stage is None:
            self._farewells.add(job)
            result.addBoth(self._parted, job)
        else:
            self._soft.set(job)
        if job.pin is not None and job.pin.broken:
            self._fail(job, Failure(WorkerLost(LOST)))
        elif self._is_poison(job):
            self._fail(job, Failure(Poisoned("its scan has killed workers before")))
        elif not self._joined(job):
            self._queue(job)
        return result

    def _disarm(self, job: Job) -> None:
        self._soft.stop(job)
        self._hard.stop(job)

    def _queue(self, job: Job) -> None:
        if job.pin is not None and job.pin.place is None:
            self._settle(job.pin, self.schedule.least_loaded())
        try:
            self.schedule.submit(job, self._reactor.seconds())
        except Overloaded:
            self.counters["overload_queue_full"] += 1
            self._fail(job, Failure())
            return
        self.assign()
        self._watch_queue()

    def assign(self) -> None:
        """Gives work to whoever is idle; called after every change of capacity."""
        while (pair := self.schedule.next()) is not None:
            job, shard = pair
            if job.manifest is None or shard.serves(job.milter, job.manifest):
                self._run(job, shard)
            else:
                self._not_given(shard)
                self.counters["refused_reloaded"] += 1
                self._fail(job, Failure(Superseded("the milter was reloaded with other stages")))

    def _run(self, job: Job, shard: Worker) -> None:
        if job.pin is not None and job.pin.place is None:  # there was no shard before
            self._settle(job.pin, shard)
        try:
            question = job.question()
        except OSError as error:
            self._not_given(shard)
            self._fail(job, Failure(Overloaded(f"no memory for a job: {error.strerror}")))
            return
        if job.stage is None:  # nobody waits for it, so its time begins now
            self._soft.set(job)
        job.shard = shard
        job.slot = shard.slot
        job.started = self._reactor.seconds()
        job.attempts += 1
        self._running.add(job)
        turn = self._begin(job, shard)
        answer = shard.ask(question)
        answer.addCallbacks(
            self._succeeded, self._failed, callbackArgs=(turn,), errbackArgs=(turn,)
        )

    # Whose turn it is

    def _not_given(self, shard: Worker) -> None:
        """The job was not for it after all: it can take another, behind what it does."""
        turns = self._turns.get(shard)
        if turns is not None and turns.turns:
            self.schedule.spare(shard, len(turns.turns))
        else:
            self.schedule.idle(shard)

    def _begin(self, job: Job, shard: Worker) -> Turn:
        turns = self._turns.setdefault(shard, Turns())
        turn = Turn(job, shard, turns)
        if turns.turns:
            self._patience.set(turn)
        else:
            shard.label = job.about
        turns.add(turn, job.started)
        if turns.take_one_more:
            self.schedule.spare(shard, len(turns.turns))
        return turn

    def _end(self, turn: Turn) -> None:
        """The shard has answered; it may do the next one, and take one more behind that."""
        turns, now = turn.turns, self._reactor.seconds()
        turns.end(turn, now)
        self._patience.stop(turn)
        if turns.turns:
            first = turns.turns[0].job
            first.started, turn.shard.label = now, first.about
            if turns.take_one_more:
                self.schedule.spare(turn.shard, len(turns.turns))
                self.assign()

    def _give_elsewhere(self, turn: Turn) -> None:
        """The job before it takes long: whoever is idle does it; twice if need be."""
        if turn not in turn.turns.turns or turn.turns.is_first(turn):
            return
        job = turn.job
        if job not in self._running or (job.abandoned and not job.followers):
            return
        if self.schedule.is_full:
            self._patience.set(turn)
            return
        turn.void = True
        self._running.discard(job)
        job.shard = None
        job.attempts -= 1
        self.counters["given_elsewhere"] += 1
        self._queue(job)

    def cancel(self, job: Job) -> None:
        """Nobody waits for the answer any more.

        A worker that is on it is left to finish, or to be killed at the deadline.
        """
        job.abandoned = True
        if self.schedule.withdraw(job) or job not in self._running:
            self._disarm(job)
        job.result.addErrback(lambda _: None)

    # Objects and their shards

    def farewells(self) -> Deferred[Any]:
        """Fires when all objects have ended whose connections are over."""
        return DeferredList([job.result for job in self._farewells], consumeErrors=True)

    def _parted(self, result: Any, job: Job) -> Any:
        self._farewells.discard(job)
        return result

    def _settle(self, pin: Pin, shard: Worker | None) -> None:
        if shard is not None:
            pin.settle(shard, next(self._numbers))
            self._pins.setdefault(shard, set()).add(pin)
            shard.sessions += 1

    def release(self, pin: Pin) -> None:
        """The connection is over, and so is its object."""
        shard = pin.place
        if shard is not None and pin in self._pins.get(shard, ()):
            self._pins[shard].discard(pin)
            shard.session_over()
        pin.place = None

    def lost(self, shard: Worker) -> None:
        """The shard is gone; its objects are lost, and what waits for them goes elsewhere."""
        waiting = self.schedule.gone(shard)
        self._turns.pop(shard, None)
        for pin in self._pins.pop(shard, ()):
            if pin.place is shard:
                pin.lose()
        for job in waiting:
            self._again(job, Failure(WorkerLost(LOST)))
        self.assign()

    def _again(self, job: Job, failure: Failure) -> None:
        """Another shard takes the job, if it need not have the object that was lost."""
        wanted = not job.abandoned or job.followers
        if job.result.called or not wanted:  # the one before has ended the question for all
            self._disarm(job)
        elif job.stage is None or (job.pin is not None and job.pin.broken):
            self._fail(job, failure)
        else:
            self._queue(job)

    # Ends of a job

    def _succeeded(self, replies: bytes, turn: Turn) -> None:
        self._end(turn)
        if not turn.void:
            self._succeed(replies, turn.job)

    def _succeed(self, replies: bytes, job: Job) -> None:
        self._running.discard(job)
        self._disarm(job)
        for follower in self._take_followers(job):
            follower.slot, follower.started = job.slot, job.started
            self._succeed(replies, follower)
        if not job.result.called:
            job.result.callback(replies)

    def _fail(self, job: Job, failure: Failure) -> None:
        self._running.discard(job)
        self._disarm(job)
        for follower in self._take_followers(job):
            self._fail(follower, failure)
        if not job.result.called:
            job.result.errback(failure)

    def _take_followers(self, job: Job) -> list[Job]:
        followers, job.followers = job.followers, []
        return [follower for follower in followers if not follower.result.called]

    def _failed(self, failure: Failure, turn: Turn) -> None:
        """The worker has not answered, or with an error."""
        job, shard = turn.job, turn.shard
        turns = turn.turns
        began = turns.is_first(turn) and not turns.over
        turns.over = turns.over or bool(failure.check(WorkerLost))
        self._end(turn)
        if turn.void:
            return
        job.shard = None
        self._running.discard(job)
        if failure.check(WorkerLost):
            self.schedule.deaf(shard)  # its exit may be heard of later than its silence
            if began:
                self.counters["workers_lost"] += 1
            else:
                job.attempts -= 1  # the worker did not die of this one
            if job.pin is not None and job.pin.place is shard:
                job.pin.lose()
            if not job.result.called:  # at its deadline it was
                self._worker_lost(job, shard, failure)
            return
        if not failure.check(CallbackFailed):
            self.log.failure("a job failed in an unforeseen way", failure)
        self._fail(job, failure)

    def _worker_lost(self, job: Job, shard: Worker | None, failure: Failure) -> None:
        # Only a job that nobody else finishes counts: a machine short of memory kills workers
        # with many copies of an innocent message in hand.
        wanted = not job.abandoned or job.followers
        if wanted and job.attempts <= self._limits.retries:
            self.counters["retries"] += 1
            self.log.warn("{s} died with {a}; another takes it", s=shard, a=job.about())
            self._again(job, failure)
        elif self._remember(job, job.attempts):
            self._fail(job, Failure(Poisoned(f"it has killed workers; {failure.value}")))
        else:
            self._fail(job, failure)

    # Time

    def _warn(self, job: Job) -> None:
        """The soft limit: while it still hangs, the worker shows where."""
        self._hard.set(job)
        if job.shard is not None:
            self.log.warn(
                "{shard} has not answered {about} for {n:g} s; its stacks follow",
                shard=job.shard,
                about=job.about(),
                n=self._reactor.seconds() - job.started,
            )
            job.shard.dump_stacks()

    def _expire(self, job: Job) -> None:
        """The deadline: whoever has it is killed, and the MTA hears at once."""
        reason = f"{job.about()} was not answered within {self._limits.deadline(job.stage):g} s"
        self.counters["deadlines"] += 1
        if job.shard is None:
            self.schedule.withdraw(job)
            self._fail(job, Failure(Overloaded(reason)))
            return
        turn = next(turn for turn in self._turns[job.shard].turns if turn.job is job)
        if not turn.turns.is_first(turn):  # the one before it has a deadline of its own
            turn.void = True
            self._fail(job, Failure(Overloaded(reason)))
            return
        # One that has waited for most of that time is not to blame.
        ran = self._reactor.seconds() - job.started
        poison = ran >= BLAMED_AFTER * self._limits.deadline(job.stage) and self._remember(job, 1)
        job.shard.kill(reason)
        self._fail(job, Failure(Poisoned(reason) if poison else DeadlineExceeded(reason)))

    def _watch_queue(self) -> None:
        """One timer for all that wait; most do not wait long."""
        due = self.schedule.next_due
        if due is not None and self._overdue_call is None:
            wait = max(0.0, due - self._reactor.seconds())
            self._overdue_call = self._reactor.callLater(wait, self._drop_overdue)

    def _drop_overdue(self) -> None:
        self._overdue_call = None
        wait = self._limits.queue_wait
        for job in self.schedule.overdue(self._reactor.seconds()):
            self.counters["overload_queue_wait"] += 1
            self._fail(job, Failure(Overloaded(f"no worker was free within {wait:g} s")))
        self._watch_queue()

    # Messages that were seen before

    def _is_poison(self, job: Job) -> bool:
        if job.stage is not Stage.EOM or not self._poison:
            return False
        return self._poison.is_poison(job.digest, self._reactor.seconds())

    def _remember(self, job: Job, deaths: int) -> bool:
        """The message has cost workers; whether it is poison now. If so, a copy is kept."""
        if job.stage is not Stage.EOM:
            return False
        if not self._poison.died(job.digest, self._reactor.seconds(), deaths):
            return False
        self.counters["poison"] += 1
        self.log.error("{about} is poison: its scan has killed workers", about=job.about())
        if self._keep is not None:
            self._save(self._keep, job)
        return True

    def _save(self, keep: Keep, job: Job) -> None:
        try:
            with view_of(job.message) as view:
                path = keep.save(job.digest.hex()[:16], view)
        except OSError as error:
            self.log.error("cannot keep a copy: {why}", why=str(error))
        else:
            self.log.info("copy kept: {path}", path=path or "no, the quota is used up")

    def _joined(self, job: Job) -> bool:
        """Whether the job waits for the answer of one that scans the same message already."""
        if not self._limits.join_retries or job.stage is not Stage.EOM or job.pin is not None:
            return False
        asked = job.stage, job.milter, job.manifest, job.client
        since = job.submitted - JOIN_AFTER
        for other in self._running:
            if (
                other.pin is None
                and other.started <= since
                and (other.stage, other.milter, other.manifest, other.client) == asked
                and abs(other.size - job.size) < JOIN_SLACK
                and other.digest == job.digest
            ):
                other.followers.append(job)
                self.counters["joined"] += 1
                self.log.info("{a} waits for the scan of {b}", a=job.about(), b=other.about())
                return True
        return False
