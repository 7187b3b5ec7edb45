"""A worker without a process: it answers in order, when the test says so.

As the real one it reads all that has arrived before it begins a question that has waited, skips
what was withdrawn and confirms that, and reads nothing while it works.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Any

from ampoule.commands import Shutdown
from twisted.protocols import amp

from sharded_milter.ipc.memory import Received
from sharded_milter.ipc.messages import (
    WITHDRAWN,
    Answer,
    Ask,
    LoadFailed,
    Ping,
    Question,
    Ready,
    Withdraw,
    answer_box,
    read_question,
)
from sharded_milter.protocol.commands import Abort
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.wire import PAYLOAD

from .wire import Wire

if TYPE_CHECKING:
    from .book import Book
    from .records import Try

ABORT = Abort().encode()


class Worker:
    """A place whose process is played."""

    def __init__(self, book: Book) -> None:
        self.pid = 0
        self.owner: Any = None
        self.wire: Any = None
        self.alive = False
        self.reaped = False
        self.ready = False
        self.asleep = False  # it does not get a core
        self.stubborn = False  # it does not exit when it is told to
        self.hangs_in_kernel = False  # not even a kill ends it
        self.noticed = False  # the master knows that it has broken a rule
        self.introduced = False  # the master knows that it is ready
        self.why_not = b""  # why it cannot load its milters
        self.told_to_leave = False
        self.killed: float | None = None
        self.exit_reason = ""
        self.current: Try | None = None
        self._book = book
        self._questions: deque[tuple[bytes, Question]] = deque()
        self._objects: dict[int, bytes] = {}  # what each object was told of its message

    # What a place has

    def start(self, owner: Any, channel: Any) -> None:
        """Starts it, unless the system refuses."""
        self._book.may_start(owner)
        self.owner, self.alive = owner, True
        self.wire = Wire(channel, self._book.clock)
        self._book.starts(owner)
        channel.makeConnection(self.wire)

    def read_output(self) -> None:
        """It writes nothing."""

    def kill(self) -> None:
        """SIGKILL: it does nothing more, and its exit follows."""
        if self.killed is None:
            self._book.killed(self)
            self.killed = self._book.now
        if not self.hangs_in_kernel:
            self.die("killed by SIGKILL")

    def dump_stacks(self) -> None:
        """It writes nothing."""

    def is_stopped(self) -> bool:
        """No signal stops it."""
        return False

    def is_traced(self) -> bool:
        """No debugger holds it."""
        return False

    def memory(self) -> int:
        """It needs none."""
        return 0

    def kill_descendants(self) -> None:
        """It has none."""

    # What the test makes happen

    def load(self, manifests: tuple[Manifest, ...], code: bytes) -> None:
        """It has loaded its milters."""
        milters = [
            {
                "name": manifest.name.encode(),
                "negotiation": manifest.to_packet()[PAYLOAD:],
                "light": b"".join(stage.value for stage in manifest.light),
                "shard_by": manifest.shard_by.encode(),
                "affinity": manifest.affinity.value.encode(),
            }
            for manifest in manifests
        ]
        self.ready = True
        self._tell(Ready, milters=milters, code=code, socket=b"")

    def fail_to_load(self, reason: bytes) -> None:
        """It cannot load its milters."""
        self.why_not = reason
        self._tell(LoadFailed, reason=reason, details=b"")

    def _tell(self, command: Any, **arguments: Any) -> None:
        box = command.makeArguments(arguments, None)
        box[amp.COMMAND], box[amp.ASK] = command.commandName, b"1"
        self.wire.push(box.serialize())

    def answer(self, *, error: bool = False) -> None:
        """It has done with its question, and begins the next one."""
        assert self.current is not None
        done, self.current = self.current, None
        said = done.said = b"%d by %d" % (done.asked.number, done.number)
        self.say(done.tag, Answer(error=said) if error else Answer(said))
        self.run()

    def say(self, tag: bytes, answer: Answer) -> None:
        """It sends an answer, whether it was asked or not."""
        self.wire.push(answer_box(tag, answer, self.wire))

    def die(self, reason: str) -> None:
        """The process ends; the master is told in its turn."""
        if self.alive:
            self.alive, self.exit_reason = False, reason
            self.wire.close()

    def reap(self) -> None:
        """The master is told that it has ended."""
        self.reaped = True
        self.wire.close_descriptors()
        self.owner.exited(self.exit_reason)

    def tag_of_waiting(self) -> bytes | None:
        """A question that it has read and not begun."""
        return self._questions[-1][0] if self._questions else None

    # What it does by itself

    def run(self) -> None:
        """Reads, unless it works, and begins the next question."""
        if not self.alive or self.asleep or self.current is not None:
            return
        for box in self.wire.take():
            self._read(box)
        if self._questions:
            tag, question = self._questions.popleft()
            self.current = self._begin(tag, question)

    def _read(self, box: dict[bytes, bytes]) -> None:
        command = box.get(amp.COMMAND)
        if command == Ask.commandName:
            self._questions.append((box[amp.ASK], read_question(box, self)))
        elif command == Withdraw.commandName:
            for waiting in list(self._questions):
                if waiting[0] == box[b"tag"]:
                    self._questions.remove(waiting)
                    self.say(waiting[0], WITHDRAWN)
        elif command == Ping.commandName:
            self.wire.push(amp.AmpBox({amp.ANSWER: box[amp.ASK]}).serialize())
        elif command == Shutdown.commandName:
            self.told_to_leave = True
            if not self.stubborn:
                self.die("exited with code 0")

    def claim(self, inode: int, size: int) -> memoryview:
        arrived: dict[int, int] = self.wire.descriptors
        found = next(n for n, fd in arrived.items() if os.fstat(fd).st_ino == inode)
        return Received(arrived.pop(found), size).mapped()

    def _sendFileDescriptor(self, descriptor: int) -> int:
        raise AssertionError("answers are small")

    def _begin(self, tag: bytes, question: Question) -> Try:
        head, connection = question.head, bytes(question.connection)
        message = bytes(question.message)
        if head.session:
            if connection.startswith(ABORT):
                connection = connection[len(ABORT) :]
                self._objects.pop(head.session, None)
            message = self._objects.get(head.session, b"") + message[head.start :]
            self._objects[head.session] = message
        return self._book.begun(self, tag, message)
