"""The real dispatcher, pool and shards, with workers that are played and a clock that is set."""

from __future__ import annotations

import itertools
import os
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Blame, Job, Loss
from sharded_milter.errors import JobFailed
from sharded_milter.ipc.memory import Memory
from sharded_milter.limits import Limits
from sharded_milter.protocol.commands import Body, Eom
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

from .book import Book
from .laws import check_all, check_outcome
from .records import Asked, Broken, Conversation, Process, Try, broken, check
from .spares import Spares
from .watched import WatchedDispatcher, WatchedPool, WatchedShard

MANIFEST = Manifest("model")
OTHER_STAGES = Manifest("model", light=frozenset({Stage.HELO}))

# Steps of the clock at the same time, above which something goes round in circles.
MANY = 1000


class World:
    """Everything, and the actions that machines choose from."""

    def __init__(self, size: int, limits: Limits) -> None:
        broken.clear()
        self.book = Book(limits)
        self.dispatcher = WatchedDispatcher(limits, self.book.clock)
        self.dispatcher.book = self.book
        self.pool = WatchedPool(
            lambda slot, pool: WatchedShard(slot, self, pool),
            size,
            limits,
            self.dispatcher,
            self.book.clock,
        )
        self.pool.world = self
        self.spares = Spares(self.book, size)
        self.book.refused = lambda shard: self.spares.refused(self.pool, shard)
        self.outcome: list[Any] = []  # of the start
        self.stopped: list[Any] = []
        self.reaps = True  # the kernel reaps at once
        self.reads = True  # the reactor reads at once
        self.memory: list[
            tuple[int, tuple[int, int]]
        ] = []  # descriptors and inodes of large messages
        self._numbers = 0

    # The pool

    def start(self) -> None:
        self.pool.start().addCallbacks(
            self.outcome.append, lambda why: self.outcome.append(why.value)
        )

    def resize(self, change: int) -> None:
        self.pool.resize(change)
        if self.spares.size + change >= 1:
            self.spares.resized(self.pool, change)

    def stop(self) -> None:
        self.spares.stopping = True
        self.pool.stop().addCallback(self.stopped.append)

    def processes(self) -> list[Process]:
        """Those that live, or are not reaped."""
        return list(self.book.processes.values())

    # Jobs

    def converse(self, *, pinned: bool, replayable: bool, key: bytes = b"") -> Conversation:
        """An MTA connects."""
        affinity = ObjectAffinity(replayable=replayable) if pinned else None
        self._numbers += 1
        conversation = Conversation(self._numbers, self.book.now, key, affinity, replayable)
        self.book.conversations.append(conversation)
        return conversation

    def submit(
        self,
        conversation: Conversation,
        stage: Stage | None,
        *,
        light: bool = False,
        large: bool = False,
        content: int = 0,
        manifest: Manifest | None = None,
    ) -> Asked:
        """The MTA asks, and waits for the answer."""
        self._numbers += 1
        number = self._numbers
        if conversation.affinity is None:
            conversation.transcript = Body(b"content %d" % (content or number)).encode()
        else:
            conversation.transcript += Body(b"packet %d" % number).encode()
        if stage is Stage.EOM:
            conversation.transcript += Eom().encode()
        message = conversation.transcript if stage is not None else b""
        job = Job(
            stage,
            b"connection",
            self._in_memory(message) if large else message,
            queue_id=str(number),
            born=conversation.born,
            light=light,
            key=conversation.key,
            manifest=manifest,
            affinity=conversation.affinity,
        )
        asked = Asked(number, job, message, self.book.now, conversation)
        asked.queued_since = self.book.now
        self.book.submit(asked)
        del message
        try:
            answer = self.dispatcher.submit(job)
        except JobFailed as error:
            self._ended(error, asked)
            return asked
        check(isinstance(answer, Deferred), "an answer comes later", asked)
        assert isinstance(answer, Deferred)
        if self.dispatcher.counters["joined"] > self.book.counts["joined"]:
            self._joined(asked)
        answer.addBoth(self._ended, asked).addErrback(self._failed)
        return asked

    def _joined(self, asked: Asked) -> None:
        self.book.counts["joined"] += 1
        asked.leader = next(
            other
            for other in self.book.open.values()
            if other is not asked
            and other.leader is None
            and other.message == asked.message
            and any(follower is asked.job for follower in other.job.followers)
        )

    def _in_memory(self, message: bytes) -> Memory:
        memory = Memory()
        memory.append(message)
        memory.seal()
        self.memory.append((memory.fd, inode(memory.fd)))
        return memory

    def _ended(self, outcome: Any, asked: Asked) -> None:
        if isinstance(outcome, Failure):
            outcome = outcome.value
        check_outcome(self.book, asked, outcome)
        self.book.ended(asked, outcome)
        conversation = asked.conversation
        if asked.job.stage is None:
            self._part(conversation)
        elif asked.job.stage is Stage.EOM:
            self._message_over(conversation)
        if conversation.stages_left and asked.job.stage is not None:
            conversation.stages_left -= 1
            self.submit(conversation, Stage.RCPT if conversation.stages_left else Stage.EOM)

    def _failed(self, failure: Failure) -> None:
        broken.append(failure.getErrorMessage())

    def cancel(self, asked: Asked) -> None:
        """The MTA aborts the message, or leaves."""
        self.book.cancel(asked)
        self.dispatcher.cancel(asked.job)
        self._message_over(asked.conversation)

    def end(self, conversation: Conversation) -> None:
        """The MTA leaves, and an object learns that."""
        conversation.stages_left = 0
        if conversation.out is not None:
            self.cancel(conversation.out)
        self._message_over(conversation)
        affinity = conversation.affinity
        if affinity is not None and affinity.exists:
            self.submit(conversation, None)
        else:
            self._part(conversation)

    def _message_over(self, conversation: Conversation) -> None:
        conversation.transcript = b""
        conversation.lost = False
        conversation.told_to = None
        conversation.born = self.book.now
        if conversation.affinity is not None:
            conversation.affinity.end_message()

    def _part(self, conversation: Conversation) -> None:
        self.book.conversations.remove(conversation)
        if conversation.affinity is not None:
            self.dispatcher.release(conversation.affinity)

    # Processes

    def kill_by_operator(self, process: Process) -> None:
        """`sharded-milterctl kill`."""
        if process.worker.killed is None and process.worker.alive:
            process.blame = process.blame or Blame.PLACE
        process.shard.kill(Loss("the operator has killed it", Blame.PLACE))

    # Time

    def settle(self) -> None:
        """All that is due now happens, until nothing more is."""
        for _ in range(MANY):
            if not self._settle_once():
                return
        raise AssertionError("it never settles")

    def _settle_once(self) -> bool:
        moved = False
        for process in self.processes():
            worker = process.worker
            before = worker.current
            worker.run()
            moved |= worker.current is not before
            if self.reads and worker.wire.is_readable:
                worker.wire.deliver()
                moved = True
            if self.reaps and not (worker.alive or worker.reaped):
                worker.reap()
                moved = True
            check(not worker.wire.faults, "a descriptor lives until it is sent", process)
        calls = self.book.clock.getDelayedCalls()
        if any(call.getTime() <= self.book.now for call in calls):
            self.book.clock.advance(0)
            moved = True
        return moved

    def advance(self, seconds: float) -> None:
        """Time passes; every call comes at its time."""
        end = self.book.now + seconds
        self.check()
        for turns in itertools.count():
            assert turns < 10 * MANY, "it goes round in circles"
            calls = self.book.clock.getDelayedCalls()
            due = min((call.getTime() for call in calls), default=end + 1)
            if due > end:
                break
            self._turn(due)
            self.settle()
            self.check()
        self._turn(end)
        self.settle()
        self.check()

    def _turn(self, at: float) -> None:
        clock = self.book.clock
        clock.rightNow = max(at, clock.rightNow)  # exactly: a sum would be rounded
        clock.advance(0)

    def check(self) -> None:
        """The rules hold."""
        if broken:
            raise Broken(broken[0])
        check_all(self.book, self.dispatcher)
        self.spares.check(self.pool, self.outcome, self.stopped)

    def tries(self) -> list[Try]:
        """What workers are at."""
        return [each.worker.current for each in self.processes() if each.worker.current]


def inode(descriptor: int) -> tuple[int, int]:
    """Which file a descriptor is of; zeros where it is closed."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino
