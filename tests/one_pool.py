"""A pool of real shards and generations without processes.

Only the place of a process and the socket to it are faked: they do what the test says, when it
says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from amp_link import Link, deliver
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.protocols import amp
from twisted.python.failure import Failure

from sharded_milter.dispatch.dispatcher import Dispatcher
from sharded_milter.dispatch.job import Job
from sharded_milter.ipc.boxes import Boxes
from sharded_milter.ipc.memory import Received
from sharded_milter.ipc.messages import Answer, Ready, Withdraw, answer_box
from sharded_milter.limits import Limits
from sharded_milter.pool.pool import Pool
from sharded_milter.pool.shard import Shard, ShardState
from sharded_milter.protocol.commands import Body, Eom
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

MANIFEST = Manifest("test")
REPLIES = Answer(b"replies")
MESSAGE = Body(b"text\r\n").encode() + Eom().encode()

#: A file that can always be read.
READABLE = os.open("/dev/null", os.O_RDONLY)


@dataclass
class Result:
    """A job and what it ended with, each time that it ended."""

    job: Job
    values: list[Any] = field(default_factory=list)

    @property
    def only(self) -> Any:
        """The one thing that the job ended with."""
        assert len(self.values) == 1, self.values
        return self.values[0]


def noted(deferred: Deferred[Any], where: list[Any]) -> None:
    """Keeps what a Deferred ends with: its value, or the exception itself."""
    deferred.addCallbacks(where.append, lambda failure: where.append(failure.value))


class Wire(Link):
    """The master's end of a socket: what the worker has sent arrives when it is read."""

    def __init__(self, read: Callable[[], None]) -> None:
        super().__init__()
        self.doRead = read

    def fileno(self) -> int:
        return READABLE


class FakePlace:
    """The place of one shard, with the worker's end of its channel."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.did: list[str] = []
        self.rss = 0
        self.stopped = self.traced = False
        self.pings = 0
        self.listens = True  # it answers pings at once
        self.refuse: OSError | None = None
        self.owner: Any = None
        self.channel: Any = None
        self.worker = FakeWorker()
        self.ours, self.theirs = Wire(self.read), Link()
        self.is_alive = False

    def start(self, owner: Any, channel: Any) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.owner, self.channel, self.is_alive = owner, channel, True
        self.worker.makeConnection(self.theirs)  # type: ignore[no-untyped-call]
        channel.makeConnection(self.ours)
        channel.ping = self.ping

    def ping(self) -> None:
        self.pings += 1
        if self.listens:
            self.owner.ponged()

    def read_output(self) -> None:
        self.did.append("read output")

    def kill(self) -> None:
        self.did.append("kill")

    def dump_stacks(self) -> None:
        self.did.append("stacks")

    def is_stopped(self) -> bool:
        return self.stopped

    def is_traced(self) -> bool:
        return self.traced

    def memory(self) -> int:
        return self.rss

    def kill_descendants(self) -> None:
        self.did.append("end family")

    # What the test makes happen

    def read(self) -> None:
        """What the worker has sent arrives, and nothing else."""
        sent, self.theirs.sent = self.theirs.sent, []
        for data in sent:
            self.channel.dataReceived(data)

    def deliver(self) -> None:
        """Everything that was sent arrives, both ways."""
        deliver((self.ours, self.worker), (self.theirs, self.channel))

    def say(self, command: Any, **arguments: Any) -> None:
        self.worker.callRemote(command, **arguments)  # type: ignore[no-untyped-call]

    def be_ready(self, manifest: Manifest = MANIFEST, code: bytes = b"code") -> None:
        fields = {"name": manifest.name.encode(), "negotiation": manifest.to_packet()[5:],
                  "light": b"", "shard_by": b"", "affinity": b"none"}  # fmt: skip
        self.say(Ready, milters=[fields], code=code, socket=b"unix:/s")
        self.deliver()

    def answer(self, number: int, answer: Answer = REPLIES) -> None:
        """The worker answers a question; nothing arrives until it is read or delivered."""
        tag = b"q%x" % number
        self.channel._unanswered.setdefault(
            tag, number
        )  # whether it was or not, is for dispatch to say
        self.theirs.sent.append(answer_box(tag, answer, self.worker))

    def hang_up(self) -> None:
        """The worker's end of the socket is closed."""
        self.channel.connectionLost(Failure(ConnectionDone()))

    def exit(self, reason: str = "killed by SIGSEGV") -> None:
        assert self.is_alive
        self.is_alive = False
        self.owner.exited(reason)


class FakeWorker(Boxes, amp.AMP):
    """The worker's end: it keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[amp.AmpBox] = []
        self.withdrawn: list[bytes] = []
        self.is_told_to_exit = False

    def ampBoxReceived(self, box: amp.AmpBox) -> None:
        command = box.get(amp.COMMAND)
        if command == b"Ask":
            self.asked.append(box)
        elif command == b"Shutdown":
            self.is_told_to_exit = True
        else:
            super().ampBoxReceived(box)

    def claim(self, inode: int, size: int) -> memoryview:
        fd = self._arrived.claim(inode)
        assert fd is not None
        return Received(fd, size).mapped()

    @Withdraw.responder
    def withdraw(self, tag: bytes) -> dict[str, Any]:
        self.withdrawn.append(tag)
        return {}


class Bench:
    """A pool with its clock and every shard that it ever made."""

    def __init__(self, size: int = 1, *, ready: bool = True, **limits: Any) -> None:
        self.clock = Clock()
        self.limits = Limits(**limits)
        self.dispatcher = Dispatcher(self.limits, self.clock)
        self.shards: list[Shard] = []
        self.places: list[FakePlace] = []
        self.refusals: list[OSError | None] = []  # what the next starts end with
        self.pool = Pool(self._make_shard, size, self.limits, self.dispatcher, self.clock)
        self.outcome: list[Any] = []
        if ready:
            self.start()
            self.be_ready()

    def _make_shard(self, slot: int, pool: Pool) -> Shard:
        place = FakePlace(1000 + len(self.places))
        place.refuse = self.refusals.pop(0) if self.refusals else None
        shard = Shard(slot, place, self.dispatcher, pool, self.clock)
        self.shards.append(shard)
        self.places.append(place)
        return shard

    def start(self) -> None:
        noted(self.pool.start(), self.outcome)

    def be_ready(self, *numbers: int, **what: Any) -> None:
        """Those of the numbers, by birth, are ready; all that start, if no number is said."""
        for number in numbers or range(len(self.shards)):
            if not self.shards[number].manifests and self.places[number].is_alive:
                self.places[number].be_ready(**what)

    def submit(self, stage: Stage = Stage.RCPT, **options: Any) -> Result:
        result = Result(Job(stage, b"connection", MESSAGE, queue_id="1", **options))
        answer = self.dispatcher.submit(result.job)
        assert isinstance(answer, Deferred)
        noted(answer, result.values)
        return result

    def answer_all(self, number: int) -> None:
        """The worker of that number answers what it was asked."""
        self.clock.advance(0)  # questions that were held leave in the next turn
        place = self.places[number]
        place.deliver()
        asked, place.worker.asked = place.worker.asked, []
        for box in asked:
            place.answer(int(box[amp.ASK][1:], 16))
        place.deliver()

    @property
    def serving(self) -> list[int]:
        """The numbers, by birth, of those that may get work."""
        pipelines = map(self.dispatcher._shards.pipelines.get, self.shards)
        return [n for n, each in enumerate(pipelines) if each and each.available
                and not each.retired]  # fmt: skip

    @property
    def starting(self) -> list[int]:
        """The numbers of those that are not ready yet, and not killed."""
        return [n for n, shard in enumerate(self.shards) if not shard.manifests
                and self.places[n].is_alive and not self.killed(n)]  # fmt: skip

    def killed(self, number: int) -> bool:
        return "kill" in self.places[number].did

    def until_another(self, longest: float = 60.0) -> float:
        """How long it takes until there is another shard."""
        count, start = len(self.shards), self.clock.seconds()
        while len(self.shards) == count and self.clock.seconds() - start < longest:
            self.clock.advance(0.05)
        return self.clock.seconds() - start


def texts(events: Any) -> list[str]:
    """What captured log events say."""
    return [event["log_format"].format(**event) for event in events]


def states(bench: Bench) -> list[ShardState]:
    """Those of all shards, by birth."""
    return [shard.state for shard in bench.shards]
