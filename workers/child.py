"""The worker's end of the AMP connection: a job in, reply packets out.

The law: nothing is ever raised through AMP, which would take the worker down with the next job.
Whatever a milter's code does, an answer goes back.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from ampoule.child import AMPChild
from twisted.internet import defer

from ..coroutines import driven
from ..dialects.loader import Dialect, load
from ..errors import MilterError, MilterLoadError
from ..jobs import MAX_TEXT, Ask, LoadFailed, Memory, Ready, blob, release
from ..protocol.negotiation import Manifest
from ..protocol.stages import STAGES
from ..protocol.text import ENCODING, to_wire
from ..protocol.wire import PAYLOAD

# What a `Blob` arrives as.
Bytes = bytes | memoryview


class Child(AMPChild):  # type: ignore[misc]  # ampoule is not typed
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
        self._reply: bytes | Memory = b""  # kept until the next job shows that it was received

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

    @Ask.responder
    def ask(
        self,
        stage: bytes,
        connection: Bytes,
        message: Bytes,
        milter: int,
        session: int,
        start: int,
        command: Bytes,
    ) -> defer.Deferred[dict[str, Any]]:
        """Answers one job; fires when the milter has, at once unless it is a coroutine."""
        self._reply = b""
        asked = STAGES.get(stage[0])
        news: Bytes = message[start:]  # of memory it is a view of its own
        if command:
            news = bytes(news) + bytes(command)
        dialect = self._dialects[milter]
        # Not maybeDeferred: it would run coroutines itself, and cannot do what asyncio does.
        answer: Any = defer.execute(dialect.answer, asked, bytes(connection), news, session)
        answer.addCallback(_awaited)
        answer.addCallback(self._answered)
        answer.addErrback(self._failed)
        answer.addBoth(_released, news, connection, message, command)
        return cast("defer.Deferred[dict[str, Any]]", answer)

    def _answered(self, replies: bytes) -> dict[str, Any]:
        self._reply = blob(replies)
        return {"replies": self._reply, "error": b""}

    def _failed(self, failure: Any) -> dict[str, Any]:
        error = failure.value
        traceback.print_exception(type(error), error, failure.getTracebackObject())
        sys.stderr.flush()
        summary = " ".join("".join(traceback.format_exception_only(error)).split())
        return {"replies": b"", "error": _log_text(summary)[:MAX_TEXT]}


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


def _awaited(answer: bytes | Awaitable[bytes]) -> Any:
    if isinstance(answer, bytes):
        return answer
    return driven(answer)


def _released(result: Any, *blobs: Bytes) -> Any:
    for value in blobs:
        release(value)
    return result
