"""One channel, both of whose ends are in memory, and an owner that keeps what it hears."""

from __future__ import annotations

import gc
import os
from typing import Any

from amp_link import Link, deliver
from ampoule.commands import Shutdown
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.protocols import amp
from twisted.python.failure import Failure

from sharded_milter.ipc.boxes import Boxes
from sharded_milter.ipc.channel import MasterChannel
from sharded_milter.ipc.memory import MAX_INLINE, Memory, Received
from sharded_milter.ipc.messages import Answer, Ask, QuestionHead, Withdraw, answer_box

HEAD = QuestionHead(b"E")
LARGE = MAX_INLINE + 1


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class Owner:
    """Keeps what it hears. What it does about an answer, or a broken rule, is the test's."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.then: Any = lambda number: None
        self.then_stop: Any = lambda: None

    def ready(self, milters: list[dict[str, bytes]], code: bytes, socket: bytes) -> None:
        self.heard.append(("ready", milters, code, socket))

    def load_failed(self, reason: bytes, details: bytes) -> None:
        self.heard.append(("load failed", reason, details))

    def sandboxed(self, text: bytes, incomplete: bytes) -> None:
        self.heard.append(("sandboxed", text, incomplete))

    def answered(self, number: int, answer: Answer) -> None:
        self.heard.append(("answered", number, answer))
        self.then(number)

    def ponged(self) -> None: ...

    def broke_rule(self, why: str) -> None:
        self.heard.append(("broke rule", why))
        self.then_stop()

    def channel_closed(self) -> None:
        self.heard.append(("closed",))


class Worker(Boxes, amp.AMP):
    """Speaks AMP, by AMP's own commands."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []
        self.answers: list[Deferred[dict[str, Any]]] = []
        self.withdrawn: list[bytes] = []

    def claim(self, inode: int, size: int) -> memoryview:
        fd = self._arrived.claim(inode)
        assert fd is not None
        return Received(fd, size).mapped()

    @Ask.responder
    def ask(self, head: Any, message: Any = b"", **_: Any) -> Deferred[dict[str, Any]]:
        self.asked.append(bytes(message))
        self.answers.append(Deferred())
        return self.answers[-1]

    @Withdraw.responder
    def withdraw(self, tag: bytes) -> dict[str, Any]:
        self.withdrawn.append(tag)
        return {}

    @Shutdown.responder  # type: ignore[untyped-decorator]
    def shut_down(self) -> dict[str, Any]:
        self.asked.append("shut down")
        return {}


class Room:
    """Both ends of a connection in memory."""

    def __init__(self) -> None:
        self.clock, self.owner = Clock(), Owner()
        self.master, self.worker = MasterChannel(self.owner, self.clock), Worker()
        self.owner.then_stop = self.master.stop_reading  # as its shard does
        self.ours, self.theirs = Link(), Link()
        self.master.makeConnection(self.ours)  # type: ignore[no-untyped-call]
        self.worker.makeConnection(self.theirs)  # type: ignore[no-untyped-call]

    def ask(self, number: int, message: bytes | Memory | None = None) -> None:
        text = b"%d" % number if message is None else message
        self.master.ask(number, HEAD, b"connection", text)

    def pump(self) -> None:
        deliver((self.ours, self.worker), (self.theirs, self.master))

    def work(self) -> None:
        """What the master does in later turns, large answers among it."""
        while self.clock.getDelayedCalls():
            self.clock.advance(0)
        self.pump()

    def say(self, *answers: tuple[int, tuple[Any, ...]], unasked: bool = False) -> None:
        """The worker answers by our own codec, all at once; it has been asked that."""
        for number, _ in answers:
            if not unasked:
                self.master._unanswered.setdefault(b"q%x" % number, number)
        boxes = [answer_box(b"q%x" % number, answer, self.worker) for number, answer in answers]
        self.theirs.write(b"".join(boxes))

    @property
    def rule(self) -> str:
        """The rule that the worker has broken, which is all that the owner has heard."""
        [(kind, why)] = self.owner.heard
        assert kind == "broke rule"
        return str(why)

    def lose(self) -> None:
        self.master.connectionLost(Failure(ConnectionLost()))
