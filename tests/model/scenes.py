"""How the runs of the machine begin and end, and what its rules choose from."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
)

from sharded_milter.limits import Limits
from sharded_milter.protocol.stages import Stage

from .records import Asked, Conversation, Process, check
from .world import MANIFEST, World, inode

# How long it takes until everything is over whatever has happened, seconds.
ALL_OVER = 200.0

# What an example may begin with.
SCENES = ["empty", "cold", "warm", "crowded", "queued", "aged", "objects", "withdrawn"]

# Jobs that a shard may be given, at the most, while it does short ones.
MOST_AHEAD = 8

# Short scans that make a shard's pipeline grow.
ENOUGH = 20


class Scenes(RuleBasedStateMachine):
    """A world that begins in some scene, and must be in order at the end."""

    scene = ""  # what all examples begin with; else it is drawn

    def __init__(self) -> None:
        super().__init__()
        self.world: World = None  # type: ignore[assignment]  # before `begin`
        self.code = b"code"
        self.manifest = MANIFEST

    # Which ones there are to choose from

    def processes(self, wanted: Any = None) -> list[Process]:
        return [each for each in self.world.processes() if wanted is None or wanted(each)]

    def pick(self, among: list[Any], index: int) -> Any:
        return among[index % len(among)]

    @property
    def busy(self) -> list[Process]:
        return self.processes(lambda each: each.worker.alive and each.worker.current)

    @property
    def alive(self) -> list[Process]:
        return self.processes(lambda each: each.worker.alive)

    @property
    def starting(self) -> list[Process]:
        return [each for each in self.alive if not each.worker.ready and not each.worker.why_not]

    @property
    def open(self) -> list[Asked]:
        return [each for each in self.world.book.open.values() if each.job.stage is not None]

    @property
    def talking(self) -> list[Conversation]:
        return [each for each in self.world.book.conversations if not self._is_parting(each)]

    def _is_parting(self, conversation: Conversation) -> bool:
        out = conversation.out
        return out is not None and out.job.stage is None

    # The scene

    @initialize(
        size=st.integers(1, 3),
        retries=st.integers(0, 2),
        reserve=st.sampled_from([0, 0, 1]),
        join=st.booleans(),
        max_queue=st.sampled_from([2, 100]),
        max_messages=st.sampled_from([0, 0, 30]),
        lifetime=st.sampled_from([0.0, 0.0, 15.0]),
        scene=st.sampled_from(SCENES),
    )
    def begin(
        self,
        size: int,
        retries: int,
        reserve: int,
        join: bool,
        max_queue: int,
        max_messages: int,
        lifetime: float,
        scene: str,
    ) -> None:
        limits = Limits(
            command_deadline=10.0,
            eom_deadline=40.0,
            queue_wait=20.0,
            retries=retries,
            reserve=reserve,
            join_retries=join,
            max_queue=max_queue,
            worker_start_timeout=5.0,
            max_messages=max_messages,
            worker_lifetime=lifetime,
            graceful_timeout=3.0,
        )
        self.world = World(size, limits)
        self.world.start()
        self.world.settle()
        scene = self.scene or scene
        if scene != "empty":
            for process in self.starting:
                process.worker.load((self.manifest,), self.code)
            self.world.settle()
        if scene not in ("empty", "cold"):
            self.warm_up()
        if scene not in ("empty", "cold", "warm"):
            self.crowd(scene, 2 * size + 1)
        self.world.check()

    def warm_up(self) -> None:
        """Every shard has done short scans, so that more than one job is given to it."""
        conversation = self.world.converse(pinned=False, replayable=False)
        for _ in range(ENOUGH):
            for _ in self.world.processes():
                conversation.out = None
                self.world.submit(conversation, Stage.RCPT)
            self.world.advance(0.001)
            while self.busy:
                for process in self.busy:
                    process.worker.answer()
                self.world.settle()
        self.world.end(conversation)

    def crowd(self, scene: str, most: int) -> None:
        """Every shard has a job, and others that wait behind it; some may wait in the queue."""
        if scene in ("queued", "aged", "withdrawn"):
            most = MOST_AHEAD * most
        for number in range(most):
            pinned = scene == "objects" and number > most / 2
            conversation = self.world.converse(pinned=pinned, replayable=False)
            self.world.submit(conversation, Stage.EOM if number % 2 else Stage.RCPT)
            self.world.advance(0.001)
            if self.world.dispatcher.queued > 1:
                break
        if scene == "aged":
            self.world.advance(1.5)
        if scene == "withdrawn":
            self.withdraw_too_late()

    def withdraw_too_late(self) -> None:
        """What a worker has begun is cancelled before the master reads that it has."""
        for process in [each for each in self.busy if len(each.hand) > 2]:
            self.answer_unread(process)
            self.world.cancel(process.hand[1].asked)
            self.step()

    def answer_unread(self, process: Process) -> None:
        """The master is busy: it reads the answer only after whatever happens next."""
        self.world.reads = False
        process.worker.answer()
        self.world.settle()
        self.world.check()

    def step(self) -> None:
        """All that follows from a rule happens, and the laws are checked."""
        self.world.settle()
        self.world.reads = True
        self.world.settle()
        self.world.check()

    # The end

    def teardown(self) -> None:
        if self.world is None:
            return
        world = self.world
        note("the end")
        self._be_good()
        self._must_recover()
        world.stop()
        self.step()
        for conversation in self.talking:
            if conversation in world.book.conversations:
                world.end(conversation)
        world.advance(ALL_OVER)
        check(world.stopped, "6 a stop ends")
        check(not world.processes(), "6 no process is left")
        check(not world.book.open, "1 each job is answered", world.book.open)
        check(not world.book.clock.getDelayedCalls(), "6 no timer is left")
        for descriptor, number in world.memory:
            check(inode(descriptor) != number, "6 no memory is left", descriptor)

    def _be_good(self) -> None:
        world = self.world
        world.reaps = True
        world.book.short_of.clear()
        for process in self.processes():
            worker = process.worker
            worker.asleep = worker.stubborn = False
            with suppress(AttributeError):
                worker.wire.drain()
        self.step()

    def _must_recover(self) -> None:
        """Where all goes well, all that serve are there again, and all is answered."""
        world = self.world
        for _ in range(40):
            for _ in range(30):
                for process in self.starting:
                    process.worker.load((self.manifest,), self.code)
                for process in self.busy:
                    process.worker.answer()
                self.step()
                if not self.starting and not self.busy:
                    break
            world.advance(1.0)
        if not world.outcome or not isinstance(world.outcome[0], tuple):
            return
        check(not world.book.open, "1 each job is answered", world.book.open)
        serving = [each for each in world.processes() if each.takes_any]
        check(len(serving) >= world.spares.size, "5 all slots serve", serving)
