"""The master's end of the connection to one worker: AMP over a socket.

The law: nothing that a worker sends is trusted. Anything that a worker may not send in its state is
a broken rule: its shard is told once, and nothing more is read from the worker.

Questions and answers are written and read here without AMP's own bookkeeping, which costs more
than all the rest of a short message. AMP handles only the answers to its own commands.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from functools import partial
from io import BytesIO
from typing import Any, Protocol

from ampoule.commands import Shutdown
from twisted.internet.protocol import connectionDone
from twisted.internet.task import CooperativeTask, Cooperator, TaskStopped
from twisted.logger import Logger
from twisted.protocols import amp
from twisted.protocols.amp import AmpBox
from twisted.python.failure import Failure

from sharded_milter.alarms import ReactorTime
from sharded_milter.errors import BrokenRule
from sharded_milter.ipc.arrivals import close_in_background
from sharded_milter.ipc.boxes import Boxes
from sharded_milter.ipc.memory import CHUNK, Memory, Received, passable
from sharded_milter.ipc.messages import (
    ANSWER,
    MAX_ANSWER,
    UNCOUNTED,
    Answer,
    LoadFailed,
    Ping,
    Ready,
    Sandboxed,
    Withdraw,
    count_packets,
    question_box,
)
from sharded_milter.ipc.sockets import has_sent_all, read_now, send_now, unsent_bytes

# Reads of 64 KB from a worker's socket in one go: it holds a few of them.
MAX_CATCH_UP = 16

# Bytes that may wait to be sent to a worker that does not read. It has at most 8 questions, each
# with 3 inline parts of up to 48 KB: 1.2 MB, and some bytes to withdraw them.
MAX_UNSENT = 4 * 1024 * 1024

# Steps of reading the large answers that a dead worker has left. Each takes about 2 ms, and the
# largest answer takes half of them.
LAST_STEPS = 2 * MAX_ANSWER // CHUNK

# Memory up to this size is read at once, which takes less than a millisecond. Larger memory is read
# in steps, and its packets are counted.
MAX_READ_AT_ONCE = UNCOUNTED

# The prefix and the form of a question's tag. AMP's own tags are plain numbers.
_OURS = b"q"
_TAG = _OURS + b"%x"

# The commands that a worker may send, once each, and the owner's methods for them.
_INTRODUCTIONS: dict[bytes, tuple[type[amp.Command], str]] = {
    Ready.commandName: (Ready, "ready"),
    LoadFailed.commandName: (LoadFailed, "load_failed"),
    Sandboxed.commandName: (Sandboxed, "sandboxed"),
}
# After one of these it may send no other command.
_FINAL = frozenset((Ready.commandName, LoadFailed.commandName))


class ChannelOwner(Protocol):
    """The shard, as its channel needs it."""

    def ready(self, milters: list[dict[str, bytes]], code: bytes, socket: bytes) -> None:
        """Take the worker's milters; raise BrokenRule for invalid ones."""

    def load_failed(self, reason: bytes, details: bytes) -> None: ...
    def sandboxed(self, text: bytes, incomplete: bytes) -> None: ...
    def answered(self, number: int, answer: Answer) -> None: ...
    def ponged(self) -> None: ...
    def broke_rule(self, why: str) -> None: ...
    def channel_closed(self) -> None: ...


class MasterChannel(Boxes, amp.AMP):
    """The master's end: asks and withdraws questions by number, and passes on what it receives."""

    log = Logger()

    def __init__(self, owner: ChannelOwner, reactor: ReactorTime) -> None:
        super().__init__()
        self._owner = owner
        self._reactor = reactor
        self._unanswered: dict[bytes, int] = {}  # numbers of questions, by tag
        self._to_send: list[bytes] = []  # boxes for a busy worker
        # Memory whose descriptor waits to be sent: if its number were closed and reused, the worker
        # would receive another file.
        self._sending: list[Memory] = []
        self._introductions: set[bytes] = set()  # commands that were received
        self._stopped_reading = False
        self._lost = 0  # descriptors that the kernel has dropped, and that are accounted for
        self._large: CooperativeTask[Iterator[None]] | None = None  # reads a large answer
        self._steps: Iterator[None] = iter(())  # of reading it

    # Questions

    def ask(
        self,
        number: int,
        head: tuple[bytes, int, int, int],
        connection: bytes | Memory,
        message: bytes | Memory,
        command: bytes | Memory = b"",
    ) -> None:
        """Send a question; its answer will have the same number.

        Memory that still grows is copied. Raise OSError if the system has no memory or passes no
        descriptors; then the worker is not asked.
        """
        parts = (connection, message, command)
        memory = [part for part in parts if isinstance(part, Memory)]
        if memory:
            parts = (passable(connection), passable(message), passable(command))
            memory = [part for part in parts if isinstance(part, Memory)]
        tag = _TAG % number
        if memory:
            self._send_all()  # if this question cannot be sent, the others have been
            self._send(question_box(tag, head, *parts, self), memory)
            self._unanswered[tag] = number
            return
        self._to_send.append(question_box(tag, head, *parts, self))
        self._unanswered[tag] = number
        if len(self._unanswered) == 1:
            self._send_all()
        elif len(self._to_send) == 1:
            self._reactor.callLater(0, self._send_all)

    @property
    def is_idle(self) -> bool:
        """Whether the worker has answered all questions."""
        return not self._unanswered

    def withdraw(self, number: int) -> None:
        """Ask the worker not to begin a question; it confirms that, or answers the question."""
        self._send_all()
        self.callRemote(Withdraw, tag=_TAG % number)

    def ping(self) -> None:
        """Ping the worker; its answer calls the owner's `ponged`."""
        self._send_all()
        self.callRemote(Ping).addCallbacks(lambda _: self._owner.ponged(), lambda _: None)

    def _send_all(self) -> None:
        """Write all boxes that wait in one call."""
        boxes, self._to_send = self._to_send, []
        if boxes:
            self._send(b"".join(boxes))

    def _send(self, data: bytes, memory: Iterable[Memory] = ()) -> None:
        has_left = send_now(self.transport, data)
        self._sending += memory
        if self._sending:
            self._release_sent()
        if not has_left:
            # Not here: the caller's shard must not be killed now.
            self._reactor.callLater(0, self._check_unsent)

    def _release_sent(self) -> None:
        if has_sent_all(self.transport):
            self._sending.clear()

    def _check_unsent(self) -> None:
        waiting = unsent_bytes(self.transport) if self.transport is not None else 0
        if waiting > MAX_UNSENT:
            self.broke_rule(f"it has left {waiting} bytes unread (the limit is {MAX_UNSENT})")

    # From the worker

    def ampBoxReceived(self, box: AmpBox) -> None:
        """Take an answer to a question or to an AMP command, or one of the worker's commands."""
        if self._stopped_reading:
            return
        tag = box.get(amp.ANSWER)
        if tag is None:
            self._receive_command(box)
        elif tag in self._unanswered:
            self._answer(tag, box)
        elif tag in (self._outstandingRequests or ()):
            super().ampBoxReceived(box)
        else:
            raise BrokenRule(f"it has answered {tag[:40]!r}, a question that it was not asked")

    def _receive_command(self, box: AmpBox) -> None:
        command = box.get(amp.COMMAND, b"")
        known = _INTRODUCTIONS.get(command)
        if known is None:
            fields = {key[:40]: value[:40] for key, value in box.items()}
            raise BrokenRule(f"it has sent an unknown command: {fields!r:.200}")
        if command in self._introductions or not self._introductions.isdisjoint(_FINAL):
            raise BrokenRule("it has sent its introduction twice")
        self._introductions.add(command)
        kind, method = known
        try:
            arguments = kind.parseArguments(box, self)
        except Exception as error:  # AMP may raise anything for malformed input
            raise BrokenRule(f"its {kind.__name__} cannot be read: {error!r:.200}") from error
        getattr(self._owner, method)(**arguments)

    def _answer(self, tag: bytes, box: AmpBox) -> None:
        number = self._unanswered.pop(tag)
        if self._sending:
            self._release_sent()
        try:
            values = ANSWER.read(box, self)
        except BrokenRule as rule:
            raise BrokenRule(f"its answer cannot be read: {rule}") from None
        except (OSError, MemoryError) as error:
            self._owner.answered(number, Answer(lost=_shortage(error)))
            return
        if Received in map(type, values):
            self._read_large(number, values)
        else:
            self._owner.answered(number, Answer._make((*values, b"")))

    def claim(self, inode: int, size: int) -> bytes | Received:
        """Return the memory that an answer refers to, or its bytes if they are few."""
        fd = self._arrived.claim(inode)
        if fd is not None:
            memory = Received(fd, size)
            return memory if size > MAX_READ_AT_ONCE else b"".join(memory.chunks())
        if getattr(self.transport, "descriptors_lost", 0) == self._lost:
            raise BrokenRule("it has not sent the memory")
        self._lost += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    # Large answers, which are read in chunks between reactor iterations

    def _read_large(self, number: int, values: list[Any]) -> None:
        self.pause()
        next_iteration: Any = partial(self._reactor.callLater, 0)
        cooperator = Cooperator(scheduler=next_iteration)
        self._steps = self._slices(number, values)
        self._large = cooperator.cooperate(self._steps)
        self._large.whenDone().addErrback(self._large_failed)

    def _slices(self, number: int, values: list[Any]) -> Iterator[None]:
        try:
            for place, value in enumerate(values):
                if isinstance(value, Received):
                    whole = BytesIO()  # returns its bytes without a copy
                    for piece in value.chunks():
                        whole.write(piece)
                        yield
                    values[place] = whole.getvalue()
            yield from count_packets(values[0])
            answer = Answer._make((*values, b""))
        except BrokenRule as rule:
            self._large = None
            self.broke_rule(f"its answer cannot be read: {rule}")
            return
        except (OSError, MemoryError) as error:
            answer = Answer(lost=_shortage(error))
        self._large = None
        self._owner.answered(number, answer)
        if not self._stopped_reading:
            self.resume()

    def _large_failed(self, failure: Failure) -> None:
        """Log a defect of ours; a cancelled read is none."""
        if failure.check(TaskStopped) is None:
            self.log.failure("an answer got lost", failure)
            self.abort()

    def _cancel_large(self) -> None:
        if self._large is not None:
            large, self._large = self._large, None
            self._steps = iter(())
            large.stop()

    # The end

    def broke_rule(self, rule: str) -> None:
        """Tell the shard that the worker has broken a rule, unless it was told already."""
        if not self._stopped_reading:
            self._owner.broke_rule(rule)

    def unhandledError(self, failure: Failure) -> None:
        """Treat an AMP error of the worker as a broken rule."""
        self.broke_rule(f"it has caused an AMP error: {failure.getErrorMessage()}")

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """Keep a descriptor until an answer claims it."""
        if self._stopped_reading:
            close_in_background(descriptor)
        else:
            super().fileDescriptorReceived(descriptor)

    def catch_up(self) -> None:
        """Read the answers that have arrived, up to one that is large and still being read."""
        if getattr(self.transport, "connected", False) and not self._paused:
            read_now([self.transport], MAX_CATCH_UP, lambda: self._paused)

    def finish(self) -> None:
        """Read the answers that the worker has sent before its end, also the large ones.

        An answer that needs more than LAST_STEPS is lost with its worker.
        """
        self.catch_up()
        for _ in range(LAST_STEPS):
            if self._large is None:
                break
            next(self._steps, None)
            self.catch_up()

    def shut_down(self) -> None:
        """Tell the worker to exit after its answers."""
        done = self.callRemote(Shutdown)
        done.addCallbacks(lambda _: self.transport.loseConnection(), lambda _: None)

    def stop_reading(self) -> None:
        """Read nothing more from a worker that has broken a rule."""
        self._stopped_reading = True
        self._cancel_large()
        self._arrived.close()
        self.pause()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell the shard that the socket is closed; the worker's exit gives the reason."""
        self._to_send.clear()
        self._sending.clear()
        if self._large is None:  # else the boxes behind it must still claim their memory
            self._arrived.close()
        super().connectionLost(reason)
        self._owner.channel_closed()

    def abort(self) -> None:
        """Close the socket at once."""
        self._cancel_large()
        self._arrived.close()
        transport: Any = self.transport
        if transport is not None:
            transport.abortConnection()


def _shortage(error: OSError | MemoryError) -> bytes:
    why = "there is no memory left" if isinstance(error, MemoryError) else error.strerror
    return f"the master cannot take the answer: {why}".encode()
