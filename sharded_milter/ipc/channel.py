"""The master's end of the AMP connection to one worker, as far as questions go.

Each question and its answer is one box, made and read by hand: AMP's own bookkeeping costs more
than all the rest of a short message. Everything else is AMP's own business.
"""

from __future__ import annotations

import itertools
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.protocols import amp
from twisted.python.failure import Failure

from sharded_milter.ipc.messages import Question, question_box, read_answer
from sharded_milter.ipc.sending import QuickBoxes, read_now, send_now
from sharded_milter.protocol.text import to_text

# Reads of 64 KB from a dead worker's socket: it holds a few of them.
MAX_CATCH_UP = 16

Answer = tuple[bytes, bytes]  # reply packets, and what the milter raised


class Asking(QuickBoxes, amp.AMP):
    """An AMP connection to a process that answers questions."""

    def __init__(self, reactor: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reactor = reactor
        self._numbers = itertools.count()
        self._asked: dict[bytes | None, Deferred[Answer]] = {}  # by the tag of the box
        self._held: list[bytes] = []  # boxes for a worker that has something to do
        self._over: Failure | None = None  # why there will be no answer any more

    def ask(self, question: Question) -> Deferred[Answer]:
        """A Deferred of reply packets and error; fails with `hopeless`'s reason, or at once."""
        if self._over is not None:
            return fail(self._over)
        tag = b"q%x" % next(self._numbers)  # AMP's own tags are bare numbers
        try:
            box = question_box(question, tag, self)
        except Exception:
            return fail()
        self._held.append(box)
        # A descriptor waits in the transport already, which breaks if no data is behind it when
        # the socket is writable.
        if not self._asked or question.has_memory:
            self._send_held()
        elif len(self._held) == 1:
            self._reactor.callLater(0, self._send_held)
        answer = self._asked[tag] = Deferred()
        return answer

    def _send_held(self) -> None:
        """At once, if the worker waits for it; else with whatever else comes in this turn."""
        held, self._held = self._held, []
        if held:
            send_now(self.transport, b"".join(held))

    def ampBoxReceived(self, box: amp.AmpBox) -> None:
        """Takes answers to questions here."""
        tag = box.get(amp.ANSWER) or box.get(amp.ERROR)
        answer = self._asked.pop(tag, None)
        if answer is None:
            super().ampBoxReceived(box)
            return
        try:
            if amp.ERROR in box:
                raise amp.RemoteAmpError(box[amp.ERROR_CODE], to_text(box[amp.ERROR_DESCRIPTION]))
            replies = read_answer(box, self)
        except Exception:
            answer.errback()
        else:
            answer.callback(replies)

    def catch_up(self) -> None:
        """Takes the answers that the worker has sent before it died."""
        if getattr(self.transport, "connected", False):
            read_now([self.transport], MAX_CATCH_UP)

    def hopeless(self, reason: Failure) -> None:
        """Nobody is there any more: what was asked, and what will be, fails with the reason."""
        self._over = reason
        self._held.clear()
        asked, self._asked = self._asked, {}
        for answer in asked.values():
            answer.errback(reason)
