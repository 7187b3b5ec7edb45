"""Workers that were taken over: whatever they send, their master goes on.

The law that is checked after every step: nothing is raised or logged as a failure; what the master
keeps of a worker's words is bounded; a job ends once, and where its worker has never lied, with
its own answer. In the end, when honest workers are left, all jobs have ended, and the master has as
many descriptors as before.

`FUZZ_SECONDS=60 pytest -s tests/fuzz` goes on with other examples for so long, and says how long
the master was busy at most with one thing.
"""

from __future__ import annotations

import fcntl
import gc
import os
import time
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.defer import Deferred
from twisted.logger import globalLogPublisher
from twisted.protocols import amp

from sharded_milter.dispatch.job import Job
from sharded_milter.errors import JobFailed
from sharded_milter.ipc.arrivals import MAX_UNCLAIMED
from sharded_milter.ipc.channel import MAX_UNSENT
from sharded_milter.ipc.memory import MAX_INLINE, SEALS, packed
from sharded_milter.ipc.messages import MAX_ANSWER
from sharded_milter.ipc.sockets import unsent_bytes
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.wire import frame

from .liar import Liar, Master
from .surroundings import Problems

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))

#: One value of a box, its key and lengths, and one read of the socket.
MOST_UNREAD = 2 + 255 + 2 + 65_535 + 65_536

SETTINGS = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

KEYS = st.sampled_from(
    [amp.ANSWER, amp.ASK, amp.COMMAND, amp.ERROR, b"replies", b"error", b"withdrawn", b"reason",
     b"notes", b"records", b"short", b"milters", b"code", b"socket", b"tag", b"head", b"x"]
)  # fmt: skip
NUMBERS = st.integers(-1, 3) | st.sampled_from([MAX_ANSWER, MAX_ANSWER + 1, 2**64])
VALUES = (
    st.binary(max_size=40)
    | st.sampled_from([b"Ready", b"LoadFailed", b"StartTLS", b"=", b"1"])
    | st.sampled_from([8000, 60_000]).map(lambda size: b"=" + bytes(size))
    | st.builds(lambda inode, size: b"@%d %d" % (inode, size), NUMBERS, NUMBERS)
)
BOXES = st.dictionaries(KEYS, VALUES, max_size=10)
WHICH = st.integers(0, 7)


#: What memory begins with; the rest of it is NULs.
CONTENTS = {
    "none": b"",
    "packets": b"\0\0\0\1b\0\0\0\1c",
    "many packets": b"\0\0\0\1b" * 400_000,
    "large packets": (b"\0\1\0\0b" + bytes(65_535)) * 30,
}


def serialized(box: dict[bytes, bytes]) -> bytes:
    """A box, whatever is in it."""
    pairs = [len(part).to_bytes(2, "big") + part for item in box.items() for part in item]
    return b"".join(pairs) + bytes(2)


def memory(size: int, content: bytes, seals: int) -> int:
    """A descriptor of memory that has some of that in it."""
    fd = os.memfd_create("liar", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, content[:size], 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def other_file(kind: str) -> int:
    """A descriptor of no memory."""
    return os.open({"null": "/dev/null", "zero": "/dev/zero", "folder": "/"}[kind], os.O_RDONLY)


class Channels(RuleBasedStateMachine):
    """Two workers at a time, and jobs for them."""

    longest = 0.0

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self.before = len(os.listdir("/proc/self/fd"))
        self.problems = Problems()
        globalLogPublisher.addObserver(self.problems)
        self.jobs: dict[int, tuple[Job, list[Any]]] = {}

    @initialize(ready=st.booleans())
    def begin(self, ready: bool) -> None:
        self.master = Master(2, eom_deadline=20.0, queue_wait=10.0)
        if ready:
            for liar in self.master.alive:
                liar.be_ready()
        self.master.reactor.run()

    def teardown(self) -> None:
        try:
            self._end()
        finally:
            globalLogPublisher.removeObserver(self.problems)
        assert self.problems.events == []
        Channels.longest = max(Channels.longest, self.master.reactor.longest)
        del self.master
        self.jobs.clear()
        gc.collect()
        for _ in range(100):  # threads close what may take long to be closed
            if len(os.listdir("/proc/self/fd")) <= self.before:
                break
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) <= self.before

    def _end(self) -> None:
        """All workers are honest from now on, and all jobs end."""
        for _ in range(200):
            self._reap()
            for liar in self.master.alive:
                if liar.has_lied:
                    liar.exit()
                elif not liar.is_ready:
                    liar.be_ready()
                self._answer(liar)
            self.master.reactor.run()
            if all(ended for _, ended in self.jobs.values()):
                break
            self.master.reactor.advance(0.5)
        assert all(len(ended) == 1 for _, ended in self.jobs.values())
        self.master.pool.stop()
        for liar in self.master.alive:
            liar.exit()
        self.master.reactor.run()

    def _reap(self) -> None:
        for liar in self.master.alive:
            if liar.killed:
                liar.exit()
        self.master.reactor.run()

    def _liar(self, which: int) -> Liar | None:
        alive = [liar for liar in self.master.alive if not liar.killed]
        return alive[which % len(alive)] if alive else None

    def _lies(self, which: int, data: bytes, *descriptors: int) -> None:
        liar = self._liar(which)
        if liar is None:
            for fd in descriptors:
                os.close(fd)
            return
        liar.has_lied = True
        liar.send(data, descriptors)
        self.master.reactor.run()

    def _tag(self, which: int) -> bytes:
        """That of a question which the worker was asked, or will be."""
        liar = self._liar(which)
        if liar is None:
            return b"q1"
        liar.read()
        return liar.asked.pop(0)[0] if liar.asked else b"q%x" % (len(self.jobs) + 1)

    # Jobs

    @rule(large=st.booleans(), stage=st.sampled_from([Stage.EOM, Stage.RCPT]))
    def a_job(self, large: bool, stage: Stage) -> None:
        number = len(self.jobs)
        message = packed(frame(b"B", b"%d " % number * (MAX_INLINE if large else 1)))
        job, ended = Job(stage, b"connection", message), []  # type: tuple[Job, list[Any]]
        self.jobs[number] = job, ended
        try:
            answer = self.master.dispatcher.submit(job)
        except JobFailed as error:
            ended.append(error)
            return
        if isinstance(answer, Deferred):
            answer.addBoth(ended.append)
        else:
            ended.append(answer)
        self.master.reactor.run()

    @rule(which=WHICH)
    def an_honest_answer(self, which: int) -> None:
        liar = self._liar(which)
        if liar is not None:
            if not liar.is_ready:
                liar.be_ready()
            self._answer(liar)
            self.master.reactor.run()

    def _answer(self, liar: Liar) -> None:
        liar.read()
        asked, liar.asked = liar.asked, []
        for tag, word in asked:
            liar.send(serialized({amp.ANSWER: tag, b"replies": b"=" + word}))

    # Lies

    @rule(which=WHICH, data=st.binary(max_size=300))
    def bytes_of_any_kind(self, which: int, data: bytes) -> None:
        self._lies(which, data)

    @rule(which=WHICH, boxes=st.lists(BOXES, max_size=4), cut=st.integers(0, 30))
    def boxes_of_any_kind(self, which: int, boxes: list[dict[bytes, bytes]], cut: int) -> None:
        data = b"".join(map(serialized, boxes))
        self._lies(which, data[: len(data) - cut])

    @rule(which=WHICH, values=BOXES)
    def an_answer_of_any_kind(self, which: int, values: dict[bytes, bytes]) -> None:
        tag = self._tag(which)
        self._lies(which, serialized({**values, amp.ANSWER: tag}))

    @rule(which=WHICH, number=st.integers(1, 400))
    def the_same_for_ever(self, which: int, number: int) -> None:
        self._lies(which, serialized({amp.COMMAND: b"n" * 200, amp.ASK: b"1"}) * number)

    @rule(which=WHICH)
    def a_box_without_an_end(self, which: int) -> None:
        self._lies(which, b"".join(b"\0\1%d\xff\xff" % n + bytes(65_535) for n in range(9)))

    @rule(
        which=WHICH,
        size=st.sampled_from([1, 5, 60_000, 1_000_000, 2_000_000, MAX_ANSWER + 5]),
        wrong=st.sampled_from([0, 0, 0, 1, -1]),
        content=st.sampled_from(sorted(CONTENTS)),
        seals=st.sampled_from([SEALS, SEALS, SEALS, 0, fcntl.F_SEAL_WRITE]),
        times=st.sampled_from([1, 1, 2, MAX_UNCLAIMED + 1]),
        key=st.sampled_from([b"replies", b"notes", b"connection"]),
    )
    def memory_of_any_kind(
        self, which: int, size: int, wrong: int, content: str, seals: int, times: int, key: bytes
    ) -> None:
        fd = memory(size, CONTENTS[content], seals)
        value = b"@%d %d" % (os.fstat(fd).st_ino, size + wrong)
        box = {amp.ANSWER: self._tag(which), b"replies": b"=", key: value}
        self._lies(which, serialized(box), fd, *(os.dup(fd) for _ in range(times - 1)))

    @rule(
        which=WHICH,
        kinds=st.lists(st.sampled_from(["null", "zero", "folder"]), min_size=1, max_size=40),
        data=st.binary(min_size=1, max_size=9),
    )
    def files_of_any_kind(self, which: int, kinds: list[str], data: bytes) -> None:
        self._lies(which, data, *map(other_file, kinds))

    @rule(which=WHICH)
    def the_socket_is_closed(self, which: int) -> None:
        liar = self._liar(which)
        if liar is not None:
            liar.has_lied = True
            liar.socket.close()
            self.master.reactor.run()

    @rule(which=WHICH)
    def the_process_exits(self, which: int) -> None:
        liar = self._liar(which)
        if liar is not None:
            liar.exit()
            self.master.reactor.run()

    @precondition(lambda self: any(liar.killed for liar in self.master.alive))
    @rule()
    def the_killed_are_reaped(self) -> None:
        self._reap()

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.master.reactor.advance(seconds)
        self.master.reactor.run()

    # The law

    @invariant()
    def what_the_master_keeps_is_bounded(self) -> None:
        for liar in self.master.alive:
            channel = liar.channel
            assert len(channel._unread) <= MOST_UNREAD
            assert channel._arrived._count <= MAX_UNCLAIMED
            if channel.transport is not None:
                assert unsent_bytes(channel.transport) <= MAX_UNSENT

    @invariant()
    def a_job_ends_once_and_honest_workers_answer_their_own(self) -> None:
        slots = {liar.owner.slot for liar in self.master.liars if liar.has_lied}
        for number, (job, ended) in self.jobs.items():
            assert len(ended) <= 1
            if ended and isinstance(ended[0], bytes) and job.slot not in slots:
                assert ended[0] == b"%d" % number

    @invariant()
    def nothing_has_failed(self) -> None:
        assert self.problems.events == []


def test_channels() -> None:
    """Some seconds with the same examples everywhere; FUZZ_SECONDS more with new ones."""
    gc.collect()
    gc.freeze()  # what other tests have left need not be looked at for each example
    run_state_machine_as_test(Channels, settings=SETTINGS)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        run_state_machine_as_test(Channels, settings=settings(SETTINGS, derandomize=False))
    print(f"the longest turn took {1000 * Channels.longest:.1f} ms")
