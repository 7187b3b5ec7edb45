"""The worker's end of the AMP connection: a job in, reply packets out.

The law: nothing is ever raised through AMP, which would take the worker down with the next job.
Whatever a milter's code does, an answer goes back.
"""

from __future__ import annotations

import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ampoule.child import AMPChild
from twisted.internet import defer
from twisted.protocols import amp
from twisted.python.failure import Failure

from ..coroutines import driven
from ..dialects.loader import Dialect, load
from ..errors import MilterError, MilterLoadError
from ..ipc.messages import (
    MAX_TEXT,
    Ask,
    LoadFailed,
    Memory,
    Ready,
    answer_box,
    blob,
    read_question,
    release,
)
from ..ipc.sending import QuickBoxes, is_still
from ..protocol.negotiation import Manifest
from ..protocol.stages import STAGES
from ..protocol.text import ENCODING, to_wire
from ..protocol.wire import PAYLOAD

# What a `Blob` arrives as.
Bytes = bytes | memoryview


class Child(QuickBoxes, AMPChild):  # type: ignore[misc]  # ampoule is not typed
    """Loads its milters when the master is there, then answers jobs with them.

    `loading` makes a milter of what the operator has named, `socket` is where a script wants to
    be found.
    """

    def __init__(
        self, specs: Sequence[str], loading: Callable[[str], Dialect] = load, socket: str = ""
    ) -> None:
        super().__init__()
        self._specs = specs
        self._loading = loading
        self._socket = socket
        self._dialects: list[Dialect] = []
        self._questions: deque[amp.AmpBox] = deque()
        self._at_work = False  # a coroutine is out
        self._replies: list[Memory] = []  # kept until the socket has taken their descriptors

    def connectionMade(self) -> None:
        """Imports the milters and tells the master how that went."""
        super().connectionMade()
        try:
            self._dialects = [self._loading(spec) for spec in self._specs]
        except (MilterError, MemoryError) as error:
            details = error.details if isinstance(error, MilterLoadError) else ""
            reason = _log_text(str(error))[:MAX_TEXT]
            self._tell(LoadFailed, reason=reason, details=_log_text(details)[-MAX_TEXT:])
            return
        milters = [_introduced(dialect.manifest) for dialect in self._dialects]
        self._tell(Ready, milters=milters, socket=to_wire(self._socket))

    def stop(self) -> None:
        """The milter itself ends this worker's loop; what it has answered is still sent."""
        self.shutdown = True  # so that the end of the connection is no accident
        self.transport.loseConnection()

    def _tell(self, command: Any, **arguments: Any) -> None:
        # A master that does not answer is gone; connectionLost ends this process then.
        self.callRemote(command, **arguments).addErrback(lambda _: None)

    def ampBoxReceived(self, box: amp.AmpBox) -> None:
        """Questions are answered without AMP's own machinery, which takes longer than reading."""
        if box.get(amp.COMMAND) == Ask.commandName:
            self._questions.append(box)
            self._go_on()
        else:
            super().ampBoxReceived(box)

    def _go_on(self) -> None:
        """Answers one question after the other: the master blames the first for a death."""
        while self._questions and not self._at_work:
            self._ask(self._questions.popleft())

    def _ask(self, box: amp.AmpBox) -> None:
        """Answers one job, later if the milter is a coroutine."""
        asked = read_question(box, self)
        news = asked.message[asked.start :]  # of memory it is a view of its own
        views = (news, asked.connection, asked.message, asked.command)
        message = bytes(news) + bytes(asked.command) if asked.command else news
        try:
            replies = self._dialects[asked.milter].answer(
                STAGES.get(asked.stage[0]), bytes(asked.connection), message, asked.session
            )
            if not isinstance(replies, bytes):
                self._at_work = True
                later: defer.Deferred[Any] = driven(replies)
                later.addCallback(self._answered).addErrback(self._failed)
                later.addCallback(self._send, box[amp.ASK], views).addErrback(self.unhandledError)
                later.addCallback(self._done)
                return
            answer = self._answered(replies)
        except BaseException:  # also an exit: no job ends the worker
            answer = self._failed(Failure())
        self._send(answer, box[amp.ASK], views)

    def _done(self, _: object) -> None:
        self._at_work = False
        self._go_on()

    def _send(self, answer: amp.AmpBox, tag: bytes, views: Sequence[Bytes]) -> None:
        for view in views:
            release(view)
        answer[amp.ANSWER] = tag
        self.sendBox(answer)

    def _answered(self, replies: bytes) -> amp.AmpBox:
        if self._replies and is_still(self.transport):
            self._replies.clear()
        reply = blob(replies)
        if isinstance(reply, Memory):
            self._replies.append(reply)
        return answer_box(reply, b"", self)

    def _failed(self, failure: Any) -> amp.AmpBox:
        error = failure.value
        traceback.print_exception(type(error), error, failure.getTracebackObject())
        sys.stderr.flush()
        summary = " ".join("".join(traceback.format_exception_only(error)).split())
        return answer_box(b"", _log_text(summary)[:MAX_TEXT] or b"?", self)


def _introduced(manifest: Manifest) -> dict[str, bytes]:
    return {
        "name": to_wire(manifest.name),
        "negotiation": manifest.to_packet()[PAYLOAD:],
        "light": b"".join(stage.value for stage in manifest.light),
        "shard_by": to_wire(manifest.shard_by),
        "pinning": to_wire(manifest.pinning.value),
    }


def _log_text(text: str) -> bytes:
    """Bytes of a text that may hold anything an author's code has put into an exception."""
    return text.encode(ENCODING, "backslashreplace")
