"""The master's end of the connection to one worker, and what both ends share: AMP over a socket.

Questions and answers are written and read here without AMP's own bookkeeping, which costs more
than all the rest of a short message. Everything else is AMP's own business.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from ampoule.commands import Shutdown
from twisted.internet.protocol import connectionDone
from twisted.protocols import amp
from twisted.protocols.amp import AmpBox
from twisted.python.failure import Failure

from sharded_milter.ipc.memory import Memory, release
from sharded_milter.ipc.messages import (
    ANSWER,
    Answer,
    LoadFailed,
    Ready,
    Sandboxed,
    Withdraw,
    question_box,
)
from sharded_milter.ipc.sockets import is_still, read_now, send_now

# Reads of 64 KB from a worker's socket before other work goes on: it holds a few of them.
MAX_CATCH_UP = 16

# The tag of a question's box. AMP's own tags are bare numbers.
_OURS = b"q"
_TAG = _OURS + b"%x"

# AMP's own limit on the length of a key; a longer one is no AMP.
MAX_KEY = 0xFF

_LENGTH = 2

# Without AmpBox's own constructor, which looks at keys that are not there.
_new_box = AmpBox.__new__


_NO_BOX = AmpBox()


class Boxes:
    """Mixed into an AMP protocol: its boxes leave at once, and are read without a call a string.

    The format is AMP's: keys and values, each behind its length in two bytes, then two NULs.
    """

    transport: Any
    ampBoxReceived: Any
    _unread = b""
    _reading = False

    def sendBox(self, box: Any) -> None:
        """Sends one box."""
        send_now(self.transport, box.serialize())

    def dataReceived(self, data: bytes) -> None:
        """Takes all boxes that are complete now; who sends anything else is not listened to.

        What a box leads to may read from the same socket: those boxes come behind it.
        """
        self._unread += data
        if self._reading:
            return
        self._reading, start, end = True, 0, 0
        box: AmpBox | None = _NO_BOX
        try:
            while box is not None and start < len(self._unread):
                box, end = _box_at(self._unread, start)
                if box is not None:
                    start = end
                    self.ampBoxReceived(box)
        finally:
            self._reading = False
            self._unread = self._unread[start:]
        if end < 0:
            self.transport.loseConnection()


def _box_at(data: bytes, at: int) -> tuple[AmpBox | None, int]:
    """The box that begins there and where it ends; None if it is not complete, -1 if it is none."""
    box = _new_box(AmpBox)
    size = len(data)
    while at + _LENGTH <= size:
        length = data[at] << 8 | data[at + 1]
        at += _LENGTH
        if not length:
            return box, at
        if length > MAX_KEY:
            return None, -1
        key = data[at : at + length]
        at += length
        if at + _LENGTH > size:
            break
        length = data[at] << 8 | data[at + 1]
        at += _LENGTH
        if at + length > size:
            break
        box[key] = data[at : at + length]
        at += length
    return None, 0


class Owner(Protocol):
    """Who hears what a worker says: its shard."""

    def ready(self, milters: list[dict[str, bytes]], code: bytes, socket: bytes) -> None: ...
    def load_failed(self, reason: bytes, details: bytes) -> None: ...
    def sandboxed(self, text: bytes, incomplete: bool) -> None: ...
    def answered(self, number: int, answer: Answer) -> None: ...
    def broke_rule(self, why: str) -> None: ...
    def channel_closed(self) -> None: ...


class MasterChannel(Boxes, amp.AMP):
    """The master's end: it asks and withdraws by number, and hands on what the worker says."""

    def __init__(self, owner: Owner, reactor: Any) -> None:
        super().__init__()
        self._owner = owner
        self._reactor = reactor
        self._unanswered = 0
        self._held: list[bytes] = []  # boxes for a worker that has something to do
        # Memory whose descriptor waits in the socket: a number that is closed and given to another
        # file would give the worker that.
        self._sending: list[Memory] = []
        self._ignores_all = False

    def ask(
        self,
        number: int,
        head: tuple[bytes, int, int, int],
        connection: bytes | Memory,
        message: bytes | Memory,
        command: bytes | Memory = b"",
    ) -> None:
        """Asks a question, whose answer will bear the number."""
        parts = (connection, message, command)
        self._held.append(question_box(_TAG % number, head, *parts, self))
        self._unanswered += 1
        memory = [part for part in parts if isinstance(part, Memory)]
        self._sending += memory
        # A descriptor waits in the transport already, which breaks if no data is behind it when
        # the socket is writable.
        if self._unanswered == 1 or memory:
            self._send_held()
        elif len(self._held) == 1:
            self._reactor.callLater(0, self._send_held)

    def withdraw(self, number: int) -> None:
        """Asks the worker not to begin a question; it answers that it has not, or answers it."""
        self._send_held()
        self.callRemote(Withdraw, tag=_TAG % number)

    def _send_held(self) -> None:
        """At once, if the worker waits for it; else with whatever else comes in this turn."""
        held, self._held = self._held, []
        if held:
            send_now(self.transport, b"".join(held))
            if self._sending:
                self._let_go()

    def _let_go(self) -> None:
        if is_still(self.transport):
            self._sending.clear()

    def ampBoxReceived(self, box: AmpBox) -> None:
        """Takes answers to questions here."""
        if self._ignores_all:
            return
        tag = box.get(amp.ANSWER)
        if tag is None or not tag.startswith(_OURS):
            try:
                super().ampBoxReceived(box)
            except Exception as error_of_worker:
                self._owner.broke_rule(f"it has said something odd: {error_of_worker!r}")
            return
        try:
            number = int(tag[len(_OURS) :], 16)
            answer = Answer._make(
                part if type(part) is bytes else _taken(part) for part in ANSWER.read(box, self)
            )
        except Exception as error_of_worker:
            self._owner.broke_rule(f"its answer cannot be read: {error_of_worker!r}")
            return
        self._unanswered -= 1
        if self._sending:
            self._let_go()
        self._owner.answered(number, answer)

    @Ready.responder
    def _ready(self, milters: list[dict[str, bytes]], code: bytes, socket: bytes) -> dict[str, Any]:
        self._owner.ready(milters, code, socket)
        return {}

    @LoadFailed.responder
    def _load_failed(self, reason: bytes, details: bytes) -> dict[str, Any]:
        self._owner.load_failed(reason, details)
        return {}

    @Sandboxed.responder
    def _sandboxed(self, text: bytes, incomplete: bytes) -> dict[str, Any]:
        self._owner.sandboxed(text, bool(incomplete))
        return {}

    def unhandledError(self, failure: Failure) -> None:
        """What AMP cannot make anything of."""
        self._owner.broke_rule(f"it has said something odd: {failure.getErrorMessage()}")

    def catch_up(self) -> None:
        """Takes the answers that the worker has sent until now."""
        if getattr(self.transport, "connected", False):
            read_now([self.transport], MAX_CATCH_UP)

    def shut_down(self) -> None:
        """Tells the worker to exit, once it has answered what it was asked."""
        done = self.callRemote(Shutdown)
        done.addCallbacks(lambda _: self.transport.loseConnection(), lambda _: None)

    def stop_listening(self) -> None:
        """Takes nothing more from a worker that has broken a rule."""
        self._ignores_all = True

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The socket is closed; the exit that follows says why."""
        self._held.clear()
        self._sending.clear()
        while self._descriptors:  # of boxes that were not read
            os.close(self._descriptors.popitem()[1])
        super().connectionLost(reason)
        self._owner.channel_closed()

    def abort(self) -> None:
        """Closes the socket at once."""
        transport: Any = self.transport
        if transport is not None:
            transport.abortConnection()


def _taken(part: memoryview) -> bytes:
    """The bytes of a part that came as memory, whose mapping is given up."""
    taken = bytes(part)
    release(part)
    return taken
