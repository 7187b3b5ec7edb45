"""The worker's end of the AMP connection: it answers questions with reply packets.

The law: no exception is raised through AMP, which would close the connection and lose the next
jobs. Every question is answered, whatever a milter's code does.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ampoule.child import AMPChild
from twisted.internet import defer
from twisted.internet.protocol import connectionDone
from twisted.protocols import amp
from twisted.python.failure import Failure

from ..coroutines import drive
from ..dialects.loader import Dialect, code_digest, load
from ..errors import BrokenRule, MilterError, MilterLoadError
from ..forks import guarded
from ..ipc.boxes import Boxes
from ..ipc.fields import MAX_TEXT
from ..ipc.memory import Memory, Received, packed, release
from ..ipc.messages import (
    MAX_LINE,
    WITHDRAWN,
    Answer,
    Ask,
    LoadFailed,
    Ping,
    Question,
    Ready,
    Sandboxed,
    Withdraw,
    answer_box,
    check_answer,
    drop_question,
    read_question,
)
from ..ipc.sockets import has_sent_all, read_now, send_now, send_rest
from ..protocol.negotiation import Manifest
from ..protocol.stages import STAGES
from ..protocol.text import ENCODING, to_wire
from ..protocol.wire import PAYLOAD
from .sandbox import NO_SANDBOX, Sandbox

Bytes = bytes | memoryview

# Reads of 64 KB from the master's socket in one go: it holds a few of them.
MAX_CATCH_UP = 16

# Questions that are begun in one reactor iteration: a master that always has one more must not
# block the milter's own timers and threads.
MAX_PER_ITERATION = 16


class Child(Boxes, AMPChild):  # type: ignore[misc]  # ampoule is not typed
    """Loads its milters when the connection is made, then answers questions with them.

    `loading` returns the milter of a spec. `socket` is the address that a script asks to listen
    on. `sandbox` is entered after the milters are loaded.
    """

    def __init__(
        self,
        specs: Sequence[str],
        loading: Callable[[str], Dialect] = load,
        socket: str = "",
        sandbox: Sandbox = NO_SANDBOX,
    ) -> None:
        super().__init__()
        self._specs = specs
        self._loading = loading
        self._socket = socket
        self._sandbox = sandbox
        self._is_sandboxed = False
        self._dialects: list[Dialect] = []
        self._questions: deque[amp.AmpBox] = deque()
        self._at_work = False
        self._replies: list[Memory] = []  # kept until their descriptors are sent

    def connectionMade(self) -> None:
        """Load the milters, enter the sandbox, and send the master the result."""
        super().connectionMade()
        self._arrived_more = select.poll()
        self._arrived_more.register(self.transport.fileno(), select.POLLIN)
        try:
            self._dialects = [guarded(self._loading, spec) for spec in self._specs]
            code = code_digest(self._specs)
            report = self._sandbox.enter(self._dialects, self._specs)
        except (MilterError, MemoryError) as error:
            details = error.details if isinstance(error, MilterLoadError) else ""
            reason = _log_text(str(error))[:MAX_TEXT]
            self._send_command(LoadFailed, reason=reason, details=_log_text(details)[-MAX_TEXT:])
            return
        milters = [_manifest_fields(dialect.manifest) for dialect in self._dialects]
        self._is_sandboxed = report.entered
        if report.text:
            text = _log_text(report.text)[:MAX_TEXT]
            self._send_command(Sandboxed, text=text, incomplete=b"yes" * report.incomplete)
        self._send_command(Ready, milters=milters, code=code, socket=to_wire(self._socket))

    def stop(self) -> None:
        """Close the connection after the answers so far: the milter itself ends the loop."""
        self.shutdown = True  # so that ampoule treats the closed connection as intended
        self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Begin no more questions: the master has exited or closed the connection."""
        self._questions.clear()
        super().connectionLost(reason)

    def after_fork(self) -> None:
        """Close the connection in a process that the milter has forked."""
        self._questions.clear()
        if self.transport is not None:
            self.transport.socket.close()

    def _send_command(self, command: Any, **arguments: Any) -> None:
        self.callRemote(command, **arguments)

    def dataReceived(self, data: bytes) -> None:
        """Take all boxes that have arrived, then answer the questions in them."""
        super().dataReceived(data)
        if not self._at_work:
            self._answer_questions()

    def ampBoxReceived(self, box: amp.AmpBox) -> None:
        """Take a box; questions bypass AMP's own dispatch, which takes longer than parsing."""
        command = box.get(amp.COMMAND)
        if command == Ask.commandName:
            self._questions.append(box)
        elif command == Withdraw.commandName:
            self._withdraw(box[b"tag"])
        else:
            super().ampBoxReceived(box)

    @Ping.responder
    def _pong(self) -> dict[str, Any]:
        return {}

    def _withdraw(self, tag: bytes) -> None:
        """Drop a question that has not begun, and confirm it."""
        for box in self._questions:
            if box[amp.ASK] == tag:
                self._questions.remove(box)
                drop_question(box, self)
                self._send(tag, WITHDRAWN)
                return

    def _answer_questions(self, *, waited: bool = False) -> None:
        """Answer the questions in order: the master blames the first for a death.

        If they have `waited`, read the socket first: one of them may have been withdrawn.
        """
        self._at_work = True
        for _ in range(MAX_PER_ITERATION):
            if waited and self._questions and self._arrived_more.poll(0):
                read_now([self.transport], MAX_CATCH_UP)
            if not self._questions:
                self._at_work = False
                return
            if not self._ask(self._questions.popleft()):
                return  # continued when the coroutine has ended
            waited = True
        _next_iteration(lambda: self._answer_questions(waited=True))

    def claim(self, inode: int, size: int) -> memoryview:
        """Return the memory of a question, mapped; raise OSError if its descriptor was lost."""
        fd = self._arrived.claim(inode)
        if fd is None:  # the kernel has dropped it: no descriptor number was free
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return Received(fd, size).mapped()

    def _ask(self, box: amp.AmpBox) -> bool:
        """Answer one question; return False if a coroutine will answer it later."""
        tag = box[amp.ASK]
        try:
            question = read_question(box, self)
        except (OSError, MemoryError) as error:
            self._send(tag, _shortage("cannot take a question", error))
            return True
        except BrokenRule as rule:
            self._send(tag, Answer(error=f"the question cannot be read: {rule}".encode()))
            return True
        views: list[Bytes] = []
        try:
            replies = self._replies_to(question, views)
            if not isinstance(replies, bytes):
                later: defer.Deferred[Any] = drive(replies, guarded)
                later.addCallback(Answer).addErrback(self._failed)
                later.addCallback(self._answer, tag, views).addErrback(self.unhandledError)
                later.addCallback(lambda _: self._answer_questions(waited=True))
                return False
            answer = Answer(replies)
        except BaseException:  # SystemExit, too: no job may end the worker
            answer = self._failed(Failure())
        self._answer(answer, tag, views)
        return True

    def _replies_to(self, question: Question, views: list[Bytes]) -> Any:
        """Call the milter for a question; append the views that must be unmapped after it."""
        head = question.head
        rest = question.message[head.start :]  # of memory, it is a separate view
        views += (rest, question.connection, question.message, question.command)
        message = bytes(rest) + bytes(question.command) if question.command else rest
        stage = STAGES.get(head.stage[0])
        answer = self._dialects[head.milter].answer
        return guarded(answer, stage, bytes(question.connection), message, head.session)

    def _answer(self, answer: Answer, tag: bytes, views: Sequence[Bytes]) -> None:
        for view in views:
            release(view)
        try:
            check_answer(answer.replies)
            replies = packed(answer.replies)
        except BrokenRule as rule:
            self._send(tag, Answer(error=f"the answer is too large: {rule}".encode()))
            return
        except (OSError, MemoryError) as error:
            self._send(tag, _shortage("cannot pass its answer on", error))
            return
        if isinstance(replies, Memory):
            self._send_memory(tag, replies, answer)
        else:
            self._send(tag, (replies, *answer[1:]))
        if self._replies and has_sent_all(self.transport):
            self._replies.clear()

    def _send_memory(self, tag: bytes, replies: Memory, answer: Answer) -> None:
        """Send an answer with a descriptor at once, so that a failure is known here."""
        send_rest(self.transport)
        self._replies.append(replies)
        try:
            self._send(tag, (replies, *answer[1:]))
        except OSError as error:
            self._send(tag, _shortage("cannot pass its answer on", error))

    def _send(self, tag: bytes, answer: tuple[Any, ...]) -> None:
        send_now(self.transport, answer_box(tag, answer, self))

    def _failed(self, failure: Any) -> Answer:
        error = failure.value
        traceback.print_exception(type(error), error, failure.getTracebackObject())
        hint = self._sandbox.hint(error) if self._is_sandboxed else ""
        if hint:
            print(hint, file=sys.stderr)
        sys.stderr.flush()
        summary = " ".join("".join(traceback.format_exception_only(error)).split())
        return Answer(error=_log_text(summary)[:MAX_LINE] or b"?")


def _next_iteration(call: Callable[[], None]) -> None:
    from twisted.internet import reactor  # not at the top: it is installed after that

    reactor.callLater(0, call)


def _shortage(what: str, error: OSError | MemoryError) -> Answer:
    why = "there is no memory left" if isinstance(error, MemoryError) else error.strerror
    return Answer(short=f"it {what}: {why}".encode())


def _manifest_fields(manifest: Manifest) -> dict[str, bytes]:
    return {
        "name": to_wire(manifest.name),
        "negotiation": manifest.to_packet()[PAYLOAD:],
        "light": b"".join(stage.value for stage in manifest.light),
        "shard_by": to_wire(manifest.shard_by),
        "affinity": to_wire(manifest.affinity.value),
    }


def _log_text(text: str) -> bytes:
    """Encode a text of an author's code, which may contain any character."""
    return text.encode(ENCODING, "backslashreplace")
