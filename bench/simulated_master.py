"""The master that `simulate` asks: the real one, with workers that only let time pass."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from bench.simulated_time import HOP, Clock, Processor, Question
from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.dispatcher import Dispatcher
from sharded_milter.dispatch.job import Job
from sharded_milter.errors import JobFailed
from sharded_milter.ipc.channel import MasterChannel
from sharded_milter.ipc.memory import Memory
from sharded_milter.ipc.messages import SESSION_END, Answer
from sharded_milter.limits import Limits
from sharded_milter.pool.pool import Pool
from sharded_milter.pool.shard import Shard
from sharded_milter.protocol.commands import Body, Eom
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.wire import PAYLOAD

# Seconds from a worker's start to READY, and from its last answer to its exit when told to leave.
START = 0.3
EXIT = 0.005

_MANIFEST = Manifest("simulated")
_READY = {
    "name": b"simulated",
    "negotiation": _MANIFEST.to_packet()[PAYLOAD:],
    "light": b"",
    "shard_by": b"",
    "affinity": _MANIFEST.affinity.value.encode(),
}


class Worker:
    """A process as a shard's place: it lets the time of each scan pass."""

    _pids = itertools.count(1)

    def __init__(self, clock: Clock, processor: Processor) -> None:
        self.pid = next(self._pids)
        self._clock = clock
        self._processor = processor
        self._shard: Any = None
        self._questions: deque[tuple[float, int, Question | None]] = deque()  # when they arrive
        self._withdrawals: list[tuple[float, int]] = []
        self._at_work = False
        self._leaving = False
        self._alive = True

    # As a place

    def start(self, owner: Any, channel: Any) -> None:
        self._shard = owner
        channel.ping = owner.ponged  # it listens at all times
        self._clock.callLater(START, self._tell, owner.ready, [_READY], b"code", b"")

    def kill(self) -> None:
        self._die("killed by SIGKILL")

    def read_output(self) -> None: ...

    def dump_stacks(self) -> None: ...

    def is_stopped(self) -> bool:
        """It is not."""
        return False

    def is_traced(self) -> bool:
        """It is not."""
        return False

    def memory(self) -> int:
        return 0

    def kill_descendants(self) -> None: ...

    # As the other end of the channel

    def catch_up(self) -> None:
        self._processor.catch_up(self)

    def ask(self, number: int, question: Question | None) -> None:
        """A question leaves for the worker; None is the end of a session."""
        arrives = self._clock.seconds() + HOP
        self._questions.append((arrives, number, question))
        if not self._at_work:
            self._at_work = True
            self._clock.callLater(HOP, self._go_on)

    def withdraw(self, number: int) -> None:
        self._withdrawals.append((self._clock.seconds() + HOP, number))

    def leave(self) -> None:
        """It was told to exit once it has answered everything."""
        self._leaving = True
        if not self._at_work:
            self._clock.callLater(HOP + EXIT, self._die, "exited with status 0")

    # What it does

    def _go_on(self) -> None:
        """Reads all that has arrived, then begins the next question."""
        if not self._alive:
            return
        now = self._clock.seconds()
        if self._withdrawals:
            self._read_withdrawals(now)
        if not self._questions:
            self._at_work = False
            if self._leaving:
                self._clock.callLater(EXIT, self._die, "exited with status 0")
        elif self._questions[0][0] > now:
            self._clock.callLater(self._questions[0][0] - now, self._go_on)
        else:
            _, number, question = self._questions.popleft()
            scan = question.scan if question is not None else 0.0
            self._clock.callLater(scan, self._scanned, number, question)

    def _read_withdrawals(self, now: float) -> None:
        arrived = {number for at, number in self._withdrawals if at <= now}
        self._withdrawals = [each for each in self._withdrawals if each[0] > now]
        for entry in [each for each in self._questions if each[1] in arrived]:
            self._questions.remove(entry)
            self._tell(self._shard.answered, entry[1], Answer(withdrawn=b"1"))

    def _scanned(self, number: int, question: Question | None) -> None:
        if not self._alive:
            return
        if question is not None and question.deaths:
            question.deaths -= 1
            self._die("killed by SIGSEGV")
            return
        self._tell(self._shard.answered, number, _ANSWER)
        self._go_on()

    def _tell(self, function: Callable[..., object], *arguments: Any) -> None:
        if self._alive:
            self._clock.callLater(HOP, self._processor.take, self, function, *arguments)

    def _die(self, reason: str) -> None:
        if self._alive:
            self._alive = False
            # The exit is a signal, no message of the worker's, and comes behind those.
            self._clock.callLater(HOP, self._processor.take, None, self._shard.exited, reason)


_ANSWER = Answer(b"replies")


class Line(MasterChannel):
    """The master's end of a channel that ends in a simulated worker."""

    def __init__(self, worker: Worker, questions: list[Question], owner: Any, clock: Any) -> None:
        super().__init__(owner, clock)
        self._worker = worker
        self._questions = questions

    def ask(
        self,
        number: int,
        head: tuple[bytes, int, int, int],
        connection: bytes | Memory,
        message: bytes | Memory,
        command: bytes | Memory = b"",
    ) -> None:
        serial = command or message
        assert isinstance(serial, bytes)
        end = head[0] == SESSION_END
        self._worker.ask(number, None if end else self._questions[int(serial)])

    def withdraw(self, number: int) -> None:
        self._worker.withdraw(number)

    def catch_up(self) -> None:
        self._worker.catch_up()

    def shut_down(self) -> None:
        self._worker.leave()

    def stop_reading(self) -> None: ...

    def abort(self) -> None: ...


class SimulatedShard(Shard):
    """A shard whose process is simulated."""

    def __init__(self, slot: int, master: Master, events: Pool) -> None:
        worker = Worker(master.clock, master.processor)
        super().__init__(slot, worker, master.dispatcher, events, master.clock)
        self._channel = Line(worker, master.questions, self, master.clock)


class Master:
    """The real dispatcher and pool with simulated workers, ready to be asked."""

    def __init__(self, shards: int, limits: Limits, *, objects: bool) -> None:
        self.clock = cast(Any, Clock())  # in place of a reactor
        self.processor = Processor(self.clock)
        self.dispatcher = Dispatcher(limits, self.clock)
        self.questions: list[Question] = []  # by serial
        self._pool = Pool(
            lambda slot, pool: SimulatedShard(slot, self, pool),
            shards, limits, self.dispatcher, self.clock,
        )  # fmt: skip
        self._objects: dict[int, ObjectAffinity] | None = {} if objects else None
        ready = self._pool.start()
        self.clock.run(lambda: bool(ready.called))

    def ask(self, question: Question, done: Callable[[Question], object]) -> None:
        self.processor.take(None, self._submit, question, done)

    def _submit(self, question: Question, done: Callable[[Question], object]) -> None:
        message = Body(b"%d" % question.message).encode() + Eom().encode()
        affinity = self._affinity(question.conversation)
        job = Job(
            question.stage, b"connection", message, b"%d" % question.serial, born=question.born,
            light=question.light, key=question.key, manifest=_MANIFEST, affinity=affinity,
        )  # fmt: skip

        def answered(outcome: object) -> None:
            question.failed = isinstance(outcome, Failure | JobFailed)
            if affinity is not None and question.stage is Stage.EOM:
                affinity.end_message()
            done(question)

        try:
            answer = self.dispatcher.submit(job)
        except JobFailed as error:
            answered(error)
            return
        if isinstance(answer, Deferred):
            answer.addBoth(answered)
        else:
            answered(answer)

    def _affinity(self, conversation: int) -> ObjectAffinity | None:
        if self._objects is None:
            return None
        if conversation not in self._objects:
            self._objects[conversation] = ObjectAffinity(replayable=True)
        return self._objects[conversation]

    def end(self, conversation: int) -> None:
        if self._objects is not None:
            self.processor.take(None, self._end, self._objects.pop(conversation))

    def _end(self, affinity: ObjectAffinity) -> None:
        """The object learns that its session is over."""
        if not affinity.exists:
            self.dispatcher.release(affinity)
            return
        job = Job(None, b"", b"", born=self.clock.seconds(), manifest=_MANIFEST, affinity=affinity)
        answer = self.dispatcher.submit(job)
        assert isinstance(answer, Deferred)
        answer.addBoth(lambda _: self.dispatcher.release(affinity))

    @property
    def counters(self) -> dict[str, int]:
        """What the dispatcher and the pool have counted."""
        return dict(self.dispatcher.counters)
