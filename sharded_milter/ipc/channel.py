"""The master's end of the connection to one worker: AMP over a socket.

The law: nothing that comes out of a worker is believed. Whatever is not what a worker may say at
that moment is a broken rule, which its shard hears of once; nothing is read from it any more.

Questions and answers are written and read here without AMP's own bookkeeping, which costs more
than all the rest of a short message. AMP only knows the answers to its own commands.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
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

from sharded_milter.errors import BrokenRule
from sharded_milter.ipc.arrivals import close_in_background
from sharded_milter.ipc.boxes import Boxes
from sharded_milter.ipc.memory import CHUNK, Memory, Received, passable
from sharded_milter.ipc.messages import (
    ANSWER,
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

# Reads of 64 KB from a worker's socket before other work goes on: it holds a few of them.
MAX_CATCH_UP = 16

# Bytes that wait because a worker does not read. It is given no more than 8 questions at a time,
# each with 3 parts of up to 48 KB beside its memory: 1.2 MB, and a few words to withdraw them.
MAX_UNSENT = 4 * 1024 * 1024

# Up to here memory is read at once, which takes the master less than a millisecond.
MAX_READ_AT_ONCE = CHUNK // 4

# The tag of a question's box. AMP's own tags are bare numbers.
_OURS = b"q"
_TAG = _OURS + b"%x"

# What a worker may say besides answers, once: the command, and its owner's method.
_INTRODUCTIONS: dict[bytes, tuple[type[amp.Command], str]] = {
    Ready.commandName: (Ready, "ready"),
    LoadFailed.commandName: (LoadFailed, "load_failed"),
    Sandboxed.commandName: (Sandboxed, "sandboxed"),
}
# After these it says nothing more.
_FINAL = frozenset((Ready.commandName, LoadFailed.commandName))


class ChannelOwner(Protocol):
    """Who hears what a worker says: its shard."""

    def ready(self, milters: list[dict[str, bytes]], code: bytes, socket: bytes) -> None:
        """Raises BrokenRule for milters that cannot be."""

    def load_failed(self, reason: bytes, details: bytes) -> None: ...
    def sandboxed(self, text: bytes, incomplete: bytes) -> None: ...
    def answered(self, number: int, answer: Answer) -> None: ...
    def ponged(self) -> None: ...
    def broke_rule(self, why: str) -> None: ...
    def channel_closed(self) -> None: ...


class MasterChannel(Boxes, amp.AMP):
    """The master's end: it asks and withdraws by number, and hands on what the worker says."""

    log = Logger()

    def __init__(self, owner: ChannelOwner, reactor: Any) -> None:
        super().__init__()
        self._owner = owner
        self._reactor = reactor
        self._unanswered: dict[
            bytes, int
        ] = {}  # numbers of questions without an answer, by their tags
        self._to_send: list[bytes] = []  # boxes for a worker that has something to do
        # Memory whose descriptor waits in the socket: a number that is closed and given to another
        # file would give the worker that.
        self._sending: list[Memory] = []
        self._introductions: set[bytes] = set()  # the introductions that have come
        self._stopped_reading = False
        self._lost = 0  # descriptors that the kernel has dropped, and that were missed already
        self._large: CooperativeTask[Iterator[None]] | None = None  # an answer that is being read

    # Questions

    def ask(
        self,
        number: int,
        head: tuple[bytes, int, int, int],
        connection: bytes | Memory,
        message: bytes | Memory,
        command: bytes | Memory = b"",
    ) -> None:
        """Asks a question, whose answer will bear the number; raises OSError for want of memory.

        Of memory that still grows the worker gets a copy.
        """
        parts = (connection, message, command)
        memory = [part for part in parts if isinstance(part, Memory)]
        if memory:
            parts = (passable(connection), passable(message), passable(command))
            memory = [part for part in parts if isinstance(part, Memory)]
        tag = _TAG % number
        self._to_send.append(question_box(tag, head, *parts, self))
        self._unanswered[tag] = number
        self._sending += memory
        # A descriptor waits in the transport already, which breaks if no data is behind it when
        # the socket is writable.
        if len(self._unanswered) == 1 or memory:
            self._send_all()
        elif len(self._to_send) == 1:
            self._reactor.callLater(0, self._send_all)

    @property
    def is_idle(self) -> bool:
        """Whether the worker has answered all that it was asked."""
        return not self._unanswered

    def withdraw(self, number: int) -> None:
        """Asks the worker not to begin a question; it answers that it has not, or answers it."""
        self._send_all()
        self.callRemote(Withdraw, tag=_TAG % number)

    def ping(self) -> None:
        """Asks the worker whether it listens; its owner hears of the answer."""
        self._send_all()
        self.callRemote(Ping).addCallbacks(lambda _: self._owner.ponged(), lambda _: None)

    def _send_all(self) -> None:
        """At once, if the worker waits for it; else with whatever else comes in this turn."""
        boxes, self._to_send = self._to_send, []
        if boxes:
            has_left = send_now(self.transport, b"".join(boxes))
            if self._sending:
                self._release_sent()
            if not has_left:
                self._reactor.callLater(0, self._check_unsent)  # whoever asks is not to be killed

    def _release_sent(self) -> None:
        if has_sent_all(self.transport):
            self._sending.clear()

    def _check_unsent(self) -> None:
        waiting = unsent_bytes(self.transport) if self.transport is not None else 0
        if waiting > MAX_UNSENT:
            self.broke_rule(f"it has not read {waiting} bytes (the limit is {MAX_UNSENT})")

    # What the worker says

    def ampBoxReceived(self, box: AmpBox) -> None:
        """Takes an answer to a question or to a command of AMP's, or what a worker says first."""
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
            raise BrokenRule(f"it has answered {tag[:40]!r}, which it was not asked")

    def _receive_command(self, box: AmpBox) -> None:
        command = box.get(amp.COMMAND, b"")
        known = _INTRODUCTIONS.get(command)
        if known is None:
            said = {key[:40]: value[:40] for key, value in box.items()}
            raise BrokenRule(f"it has said what no worker says: {said!r:.200}")
        if command in self._introductions or not self._introductions.isdisjoint(_FINAL):
            raise BrokenRule("it has introduced itself twice")
        self._introductions.add(command)
        kind, method = known
        try:
            arguments = kind.parseArguments(box, self)
        except Exception as error:  # whatever AMP makes of what is malformed
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
        """The memory of an answer, or its bytes where they are few."""
        fd = self._arrived.claim(inode)
        if fd is not None:
            memory = Received(fd, size)
            return memory if size > MAX_READ_AT_ONCE else b"".join(memory.chunks())
        if getattr(self.transport, "descriptors_lost", 0) == self._lost:
            raise BrokenRule("it has not sent the memory")
        self._lost += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    # Large answers, which are read piece by piece between other work

    def _read_large(self, number: int, values: list[Any]) -> None:
        self.pause()
        cooperator = Cooperator(scheduler=partial(self._reactor.callLater, 0))
        self._large = cooperator.cooperate(self._slices(number, values))
        self._large.whenDone().addErrback(self._large_failed)

    def _slices(self, number: int, values: list[Any]) -> Iterator[None]:
        try:
            for place, value in enumerate(values):
                if isinstance(value, Received):
                    whole = BytesIO()  # which hands its bytes on without a copy
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
        """A defect of ours, unless it was given up."""
        if failure.check(TaskStopped) is None:
            self.log.failure("an answer got lost", failure)
            self.abort()

    def _cancel_large(self) -> None:
        if self._large is not None:
            large, self._large = self._large, None
            large.stop()

    # The end

    def broke_rule(self, rule: str) -> None:
        """The worker has said what no worker says, or it does not read: its shard hears of it."""
        if not self._stopped_reading:
            self._owner.broke_rule(rule)

    def unhandledError(self, failure: Failure) -> None:
        """What AMP cannot make anything of."""
        self.broke_rule(f"it has said something odd: {failure.getErrorMessage()}")

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """Keeps one that an answer will speak of."""
        if self._stopped_reading:
            close_in_background(descriptor)
        else:
            super().fileDescriptorReceived(descriptor)

    def catch_up(self) -> None:
        """Takes the answers that the worker has sent until now, but for what is behind a large one.

        An answer that is not read whole by the end of its worker is lost with it.
        """
        if getattr(self.transport, "connected", False) and not self._paused:
            read_now([self.transport], MAX_CATCH_UP)

    def shut_down(self) -> None:
        """Tells the worker to exit, once it has answered what it was asked."""
        done = self.callRemote(Shutdown)
        done.addCallbacks(lambda _: self.transport.loseConnection(), lambda _: None)

    def stop_reading(self) -> None:
        """Takes nothing more from a worker that has broken a rule."""
        self._stopped_reading = True
        self._cancel_large()
        self._arrived.close()
        self.pause()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The socket is closed; the exit that follows says why."""
        self._to_send.clear()
        self._sending.clear()
        self._arrived.close()
        super().connectionLost(reason)
        self._owner.channel_closed()

    def abort(self) -> None:
        """Closes the socket at once."""
        self._cancel_large()
        transport: Any = self.transport
        if transport is not None:
            transport.abortConnection()


def _shortage(error: OSError | MemoryError) -> bytes:
    why = "there is no memory left" if isinstance(error, MemoryError) else error.strerror
    return f"the master cannot take the answer: {why}".encode()
