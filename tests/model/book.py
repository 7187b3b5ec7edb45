"""The model's own account of jobs, attempts and processes, from what can be seen from outside.

It sees what is submitted and answered, what shards are given and asked to withdraw, what the
master takes from them, and what happens to processes. `Broken` says which rule was broken.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable

from twisted.internet.task import Clock

from sharded_milter.dispatch.job import Blame, Job, Loss
from sharded_milter.dispatch.poison import POISON_DEATHS
from sharded_milter.errors import JobFailed
from sharded_milter.ipc.messages import Answer
from sharded_milter.limits import Limits
from sharded_milter.pool.shard import Shard
from sharded_milter.protocol.stages import Stage

from .records import EPSILON, Asked, Conversation, Process, Try, check
from .worker import Worker


class Book:
    """All of it."""

    def __init__(self, limits: Limits) -> None:
        self.clock = Clock()
        self.limits = limits
        self.conversations: list[Conversation] = []
        self.open: dict[Job, Asked] = {}  # jobs that are not over
        self.known: dict[Job, Asked] = {}  # those, and those that are in some hand yet
        self.processes: dict[Shard, Process] = {}  # those that are not gone
        self.ever: dict[Shard, Process] = {}
        self.made = self.started = self.gone = 0
        self.counts: Counter[str] = Counter()
        self.deaths: Counter[bytes] = Counter()  # messages that were given up for killing
        self.short_of: set[str] = set()  # what the system has no more of
        self.refused: Callable[[Shard], object] = lambda shard: None

    @property
    def now(self) -> float:
        """The clock's time."""
        return self.clock.seconds()

    # Processes

    def may_start(self, shard: Shard) -> None:
        """A process is to be started; raises OSError where there is no room for it."""
        if "processes" in self.short_of:
            self.refused(shard)
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        self.started += 1

    def starts(self, shard: Shard) -> None:
        """A process was started."""
        worker = shard.place
        assert isinstance(worker, Worker)
        self.made += 1
        worker.pid = self.made
        process = Process(self.made, shard, worker, self.now)
        self.processes[shard] = self.ever[shard] = process

    def serve(self, shard: Shard) -> None:
        """The pool lets a shard serve."""
        process = self.processes[shard]
        check(process.worker.ready, "only a shard that is ready serves", process)
        process.serves, process.served_since = True, self.now

    def retire(self, shard: Shard) -> None:
        """The shard is to get nothing more."""
        self.processes[shard].retired = True

    def killed(self, worker: Worker) -> None:
        """The master kills a process."""
        process = self.processes.get(worker.owner)
        if process is not None and process.hand:
            process.first_at_kill = process.hand[0]

    def lost(self, shard: Shard, loss: Loss) -> None:
        """A process is reaped, and what it had in hand is lost."""
        process = self.processes.pop(shard)
        self.gone += 1
        check(process.blame in (None, loss.blame), "who is to blame for a death", process, loss)
        hand = process.hand.copy()
        process.died_at_work = bool(hand)
        first = process.first_at_kill if process.worker.killed is not None else None
        if process.worker.killed is None and hand:
            first = hand[0]
        together = {one.asked for one in hand if one.live}
        for conversation in self.conversations:
            affinity, out = conversation.affinity, conversation.out
            if affinity is None:
                continue
            given_up = conversation.told_to is process and affinity.lost
            if given_up or (affinity.holder and affinity.holder.shard is shard):
                if conversation.told_to is process:
                    conversation.told_to = None
                    conversation.lost |= not conversation.replayable
                if out is not None and not out.over:
                    together.add(out)
        for one in hand:
            self._end(one, "lost")
            if one is first and loss.blame is Blame.MESSAGE:
                one.asked.blamed += 1
            if one.asked.waits:
                one.asked.queued_since = self.now
        for asked in together:
            asked.neighbours |= together - {asked}

    # Attempts

    def give(self, shard: Shard, number: int, job: Job) -> Try:
        """A shard is given a job."""
        asked, process = self.known[job], self.processes[shard]
        if asked.leader is not None:
            self._inherit(asked.leader)
        one = Try(number, asked, process, self.now)
        if not process.hand:
            one.began = self.now
        process.hand.append(one)
        process.fresh = False
        process.heavy |= not job.light
        asked.tries.append(one)
        self.counts["given"] += 1
        if job.affinity is not None:
            asked.conversation.told_to = process
        return one

    def withdraw(self, shard: Shard, number: int) -> None:
        """A shard is asked not to begin an attempt."""
        one = self._in_hand(shard, number)
        assert one is not None, "it is not in hand"
        check(one.asked.can_move, "an object's attempt is never withdrawn", one)
        check(not one.is_first, "what has begun is not withdrawn", one)
        one.withdrawn = True

    def _in_hand(self, shard: Shard, number: int) -> Try | None:
        hand = self.processes[shard].hand
        return next((one for one in hand if one.number == number), None)

    def answered(self, shard: Shard, number: int, answer: Answer) -> None:
        """The master takes an answer."""
        process, one = self.processes[shard], self._in_hand(shard, number)
        if one is None:
            return
        if answer.withdrawn:
            if one.withdrawn:
                self._end(one, "withdrawn")
                if one.asked.waits:
                    one.asked.queued_since = self.now
            return
        if not one.is_first:
            return
        process.answers += 1
        live = one.live
        if live:
            one.asked.expected = answer.replies or answer.error
        self._end(one, "answered" if live else "superseded")

    def _end(self, one: Try, how: str) -> None:
        hand = one.process.hand
        hand.remove(one)
        if hand and hand[0].began is None:
            hand[0].began = self.now
        if not hand:
            one.process.heavy = False
        if one.live:
            one.asked.tries.remove(one)
        self.counts[how] += 1
        self._forget(one.asked)

    def begun(self, worker: Worker, tag: bytes, message: bytes) -> Try:
        """A worker has read a question and begins it; the message is what it was told."""
        process = self.processes[worker.owner]
        one = next(one for one in process.hand if one.tag == tag)
        check(message == one.asked.message, "8 a worker is asked about its job's message", one)
        return one

    def remember(self, asked: Asked) -> None:
        """A job fails: if its message has killed, that is remembered."""
        if asked.job.stage is not Stage.EOM or asked.counted or asked.leader is not None:
            return
        deadline = self.limits.deadline(Stage.EOM)
        late = self.now - asked.submitted >= deadline - EPSILON
        if asked.blamed > self.limits.retries:
            self.deaths[asked.message] += asked.blamed
            asked.counted = True
        elif late and any(self._hangs(one, deadline) for one in asked.tries):
            self.deaths[asked.message] += 1
            asked.counted = True

    def _hangs(self, one: Try, deadline: float) -> bool:
        return one.began is not None and self.now - one.began >= deadline / 2 - EPSILON

    # Jobs

    def submit(self, asked: Asked) -> None:
        """A job is about to be submitted."""
        self.open[asked.job] = self.known[asked.job] = asked
        asked.conversation.out = asked

    def ended(self, asked: Asked, outcome: bytes | JobFailed) -> None:
        """Who submitted a job hears of it."""
        check(not asked.over, "1 each job is answered once, or cancelled", asked, outcome)
        asked.outcomes.append(outcome)
        if not isinstance(outcome, bytes):
            self.remember(asked)
        self._over(asked)

    def cancel(self, asked: Asked) -> None:
        """A job is about to be cancelled."""
        asked.cancelled = True
        self._over(asked)

    def _over(self, asked: Asked) -> None:
        del self.open[asked.job]
        if asked.conversation.out is asked:
            asked.conversation.out = None
        self._inherit(asked)
        for one in asked.tries:
            one.live = False
        asked.tries.clear()
        self._forget(asked)

    def _inherit(self, asked: Asked) -> None:
        """If another job waits for the same answer, it goes on in the job's place."""
        heirs = [other for other in self.open.values() if other.leader is asked]
        if not heirs:
            return
        heir = heirs[0]
        asked.parted = True
        heir.counted = asked.counted
        for other in heirs:
            other.told = asked.outcomes[0] if asked.outcomes else None
        heir.leader, heir.blamed, heir.expected = None, asked.blamed, asked.expected
        heir.tries, asked.tries = asked.tries, []
        for one in heir.tries:
            one.asked = heir
        heir.queued_since = self.now
        for other in heirs[1:]:
            other.leader = heir

    def _forget(self, asked: Asked) -> None:
        if asked.over and all(one.asked is not asked for one in self.in_hand):
            self.known.pop(asked.job, None)

    @property
    def in_hand(self) -> list[Try]:
        """All attempts that some shard has in hand."""
        return [one for process in self.processes.values() for one in process.hand]

    def must_run_alone(self, asked: Asked) -> bool:
        """Whether another death would make its message poison."""
        if asked.job.stage is not Stage.EOM or asked.job.affinity is not None:
            return False
        return self.deaths[asked.message] + asked.blamed + 1 >= POISON_DEATHS
