"""The worker's end of the AMP connection: a job in, reply packets out.

The law: nothing is ever raised through AMP, which would take the worker down with the next job.
Whatever a milter's code does, an answer goes back.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Awaitable
from typing import Any, cast

from ampoule.child import AMPChild
from twisted.internet import defer

from ..dialects.loader import Dialect, load
from ..errors import MilterError, MilterLoadError
from ..jobs import MAX_TEXT, Ask, LoadFailed, Memory, Ready, blob, release
from ..protocol.stages import STAGES, Stage
from ..protocol.text import ENCODING, to_wire
from ..protocol.wire import PAYLOAD
from .coroutines import bridged

# What a `Blob` arrives as.
Bytes = bytes | memoryview


class Child(AMPChild):  # type: ignore[misc]  # ampoule is not typed
    """Loads one milter when the master is there, then answers jobs with it."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self._spec = spec
        self._dialect: Dialect | None = None
        self._reply: bytes | Memory = b""  # kept until the next job shows that it was received

    def connectionMade(self) -> None:
        """Imports the milter and tells the master how that went."""
        super().connectionMade()
        try:
            self._dialect = load(self._spec)
        except (MilterError, MemoryError) as error:
            details = error.details if isinstance(error, MilterLoadError) else ""
            reason = _log_text(str(error))[:MAX_TEXT]
            self._tell(LoadFailed, reason=reason, details=_log_text(details)[-MAX_TEXT:])
            return
        manifest = self._dialect.manifest
        self._tell(
            Ready,
            name=to_wire(manifest.name),
            negotiation=manifest.to_packet()[PAYLOAD:],
            light=b"".join(stage.value for stage in manifest.light),
            shard_by=to_wire(manifest.shard_by),
        )

    def _tell(self, command: Any, **arguments: bytes) -> None:
        # A master that does not answer is gone; connectionLost ends this process then.
        self.callRemote(command, **arguments).addErrback(lambda _: None)

    @Ask.responder
    def ask(
        self, stage: bytes, connection: Bytes, message: Bytes
    ) -> defer.Deferred[dict[str, Any]]:
        """Answers one job; fires when the milter has, at once unless it is a coroutine."""
        self._reply = b""
        # Not maybeDeferred: it would run coroutines itself, and cannot do what asyncio does.
        answer: Any = defer.execute(self._answer, STAGES[stage[0]], connection, message)
        answer.addCallback(_awaited)
        answer.addCallback(self._answered)
        answer.addErrback(self._failed)
        answer.addBoth(_released, connection, message)
        return cast("defer.Deferred[dict[str, Any]]", answer)

    def _answer(self, stage: Stage, connection: Bytes, message: Bytes) -> Any:
        assert self._dialect is not None  # the master asks nobody who is not READY
        return self._dialect.answer(stage, bytes(connection), message)

    def _answered(self, replies: bytes) -> dict[str, Any]:
        self._reply = blob(replies)
        return {"replies": self._reply, "error": b""}

    def _failed(self, failure: Any) -> dict[str, Any]:
        error = failure.value
        traceback.print_exception(type(error), error, failure.getTracebackObject())
        sys.stderr.flush()
        summary = " ".join("".join(traceback.format_exception_only(error)).split())
        return {"replies": b"", "error": _log_text(summary)[:MAX_TEXT]}


def _log_text(text: str) -> bytes:
    """Bytes of a text that may hold anything an author's code has put into an exception."""
    return text.encode(ENCODING, "backslashreplace")


def _awaited(answer: bytes | Awaitable[bytes]) -> Any:
    if isinstance(answer, bytes):
        return answer
    task = asyncio.get_event_loop().create_task(bridged(answer))
    return defer.Deferred.fromFuture(task)


def _released(result: Any, *blobs: Bytes) -> Any:
    for value in blobs:
        release(value)
    return result
