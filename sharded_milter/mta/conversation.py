"""A conversation with one MTA: it reads commands, asks the milters, and returns the answers.

It uses no socket: it reads packets from the connection's framer and returns reply packets. The
connection must not call `receive` while the milters are asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from sharded_milter.alarms import ReactorTime
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.policy import (
    BUSY,
    NO_ROOM,
    STOPPING,
    TOO_LARGE,
    Policy,
    answer_for,
)
from sharded_milter.errors import LocalProtocolError
from sharded_milter.ipc.memory import Memory
from sharded_milter.limits import Limits
from sharded_milter.mta.inflight import SMALL_ANSWER, Inflight
from sharded_milter.mta.members import Member
from sharded_milter.mta.milters import Milters
from sharded_milter.mta.transcript import Refusal, Transcript
from sharded_milter.protocol.commands import Body, Eom, Header, Negotiate, check_length
from sharded_milter.protocol.negotiation import DATA_SIZES, Handling, Manifest, negotiate
from sharded_milter.protocol.replies import Continue, Quarantine
from sharded_milter.protocol.session import REFUSED, Scope, Session, TranscriptPart
from sharded_milter.protocol.stages import NO_PROTOCOL, Stage
from sharded_milter.protocol.stages import Protocol as ProtocolBits
from sharded_milter.protocol.wire import Framer, packets

_CONTINUE = Continue().encode()

_REPLIES = {
    Refusal.TOO_LARGE: TOO_LARGE,
    Refusal.NO_ROOM: NO_ROOM,
    Refusal.NO_MEMORY: NO_ROOM,
}

# Bytes of an incomplete packet that are kept even if there is no room for them. A packet with more
# is replaced with one without content, and its message is refused. Only these packets can be so
# long.
SMALL_PART = 4096
_TRUNCATED = {kind.letter[0]: kind.encode() for kind in (Header("", ""), Body(b""), Eom())}

# The manifest with which refused connections are negotiated: only CONNECT is sent, so the MTA gets
# the refusal as early as possible.
REFUSED_MANIFEST = Manifest(
    "refused connection",
    protocol=sum(
        (stage.suppress for stage in Stage if stage is not Stage.CONNECT), start=NO_PROTOCOL
    ),
)

# The names of final replies in log lines; a reply with our own text is named by its code.
VERDICT_NAMES = {"a": "accept", "c": "continue", "d": "discard", "r": "reject", "t": "tempfail"}
_QUARANTINE = Quarantine.letter[0]


# Takes the log line of a message.
MessageLog = Callable[[str], object]


class ConversationContext(Protocol):
    """The state that all MTA connections of a service share, as a conversation uses it."""

    limits: Limits
    policy: Policy
    inflight: Inflight
    counters: Counter[str]
    message_log: MessageLog | None  # None: messages get no log line

    @property
    def reactor(self) -> ReactorTime: ...
    @property
    def members(self) -> Sequence[Member]: ...
    def new_memory(self) -> Memory: ...


class Conversation:
    """Answers the commands of one MTA."""

    log = Logger()

    def __init__(self, context: ConversationContext) -> None:
        self._context = context
        self._session = Session()
        self.transcript = Transcript(
            context.limits.max_message_size, context.inflight, context.new_memory
        )
        self._milters = self._new_milters(())
        self._refusal = b""  # of a refused connection: the reply to each question
        self.refusal_sent = False  # the refused connection got its reply
        self._began = context.reactor.seconds()  # the time at which the connection began
        self._message_began = 0.0
        self.pending: Stage | None = None  # the stage at which the milters are asked now
        self.has_negotiated = False  # the MTA's offer was answered
        self.is_over = False  # no command may follow

    def _new_milters(self, members: Sequence[Member]) -> Milters:
        return Milters(members, self._context.policy, self.transcript)

    def refuse(self, answer: bytes) -> None:
        """Refuse the connection: give this answer to each question from now on; ask no milters."""
        self._refusal = answer

    @property
    def is_refused(self) -> bool:
        """True if the connection is refused, so no milters are asked."""
        return bool(self._refusal)

    @cached_property
    def accepts_early_progress(self) -> bool:
        """True if the MTA accepts PROGRESS before the end of a message.

        Postfix does. Sendmail treats it as an invalid reply there, and stops using the milter.
        """
        return self.transcript.mta().startswith("Postfix")

    def receive(self, framer: Framer) -> bytes | Deferred[bytes] | None:
        """Consume the framer's packets up to the first that may need an answer.

        Return the answer, which may be empty: bytes, or a Deferred of them that has not fired if
        milters are asked. Return None if no whole packet waits. Raise RemoteProtocolError if a
        packet is malformed, too long or illegal in this state.
        """
        start, transcript = framer.at, self.transcript
        framer.at, noted = self._session.receive_run(framer.buffer, start, framer.end)
        if framer.at > start and not self._refusal:
            if not transcript.size:
                self._message_began = self._context.reactor.seconds()
            with memoryview(framer.buffer) as view, view[start : framer.at] as run:
                transcript.extend(run, noted)
        packet = framer.next() or self._truncate_next(framer)
        return self._receive_packet(packet) if packet else None

    def _truncate_next(self, framer: Framer) -> bytes:
        """Return the next, incomplete packet without its content if there is no room for it.

        The message is refused then. Else return b"". Raise RemoteProtocolError if the packet is
        longer than its letter allows.
        """
        head = framer.head()
        if head is None:
            return b""
        length, letter = head
        check_length(letter, length)
        size = framer.waiting
        if size <= SMALL_PART or self._context.inflight.has_room(size) or letter not in _TRUNCATED:
            return b""
        self.transcript.refuse_no_room()
        framer.truncate(_TRUNCATED[letter])
        return framer.next()

    def _receive_packet(self, packet: bytes) -> bytes | Deferred[bytes]:
        step = self._session.receive(packet)
        if step.offer is not None:
            return self._negotiate(step.offer)
        if step.ends is not Scope.NONE:
            self._end(step.ends)
        if step.part is not TranscriptPart.NONE and not self._refusal:
            self._store(step.part, packet)
        if step.stage is None or step.handling is Handling.NO_REPLY:
            return b""
        if self._refusal:
            self.refusal_sent = True
            return self._decide(step.stage, self._refusal)
        if step.handling is Handling.CONTINUE:
            return self._decide(step.stage, _CONTINUE)
        transcript = self.transcript
        if transcript.refuses_client or transcript.refusal is not None:
            return self._decide(step.stage, self._refusal_reply(transcript.refusal))
        job = self._new_job(step.stage, step.part, packet)
        if job is None:
            self._count("refused_no_memory")
            return self._decide(step.stage, NO_ROOM)
        return self._ask(job)

    def _negotiate(self, offer: Negotiate) -> bytes:
        context = self._context
        self._milters = self._new_milters(() if self._refusal else context.members)
        manifests = [REFUSED_MANIFEST] if self._refusal else self._milters.manifests
        agreement = negotiate(offer, manifests, DATA_SIZES[context.limits.max_data_size])
        self._session.agree(agreement)
        self.has_negotiated = True
        self._milters.agree(agreement)
        answer = agreement.packet
        offered = offer.encode() if self._milters.has_objects else b""  # for xxfi_negotiate
        self.transcript.store(offered + answer)
        return answer

    def _end(self, scope: Scope) -> None:
        if scope is Scope.MESSAGE:
            self._end_message()
        else:
            self._end_client()
            self.is_over = scope is Scope.CONNECTION

    def _end_message(self) -> None:
        self.transcript.clear_message()
        self._milters.end_message()

    def _end_client(self) -> None:
        self._milters.end_client(self._began)
        self.transcript.clear_client()

    def _store(self, part: TranscriptPart, packet: bytes) -> None:
        if part is TranscriptPart.CONNECTION:
            self._milters.store_packet(self.transcript.store(packet), packet)
            return
        transcript = self.transcript
        new = part is TranscriptPart.NEW_MESSAGE
        if new and (transcript.size or transcript.refusal is not None):
            self._end_message()
        if not transcript.size:
            self._message_began = self._context.reactor.seconds()
        transcript.append(packet)

    def _refusal_reply(self, refusal: Refusal | None) -> bytes:
        """Return the reply for a refused client or message, and count it."""
        if self.transcript.refuses_client or refusal is None:
            self._count("refused_no_room")
            return BUSY
        self._count(f"refused_{refusal.name.lower()}")
        return _REPLIES[refusal]

    def _count(self, name: str) -> None:
        self._context.counters[name] += 1

    # Questions to the milters

    def _new_job(self, stage: Stage, part: TranscriptPart, packet: bytes) -> Job | None:
        """Return a job for the milters; None if the system has no memory for the message."""
        transcript, eom = self.transcript, stage is Stage.EOM
        message = transcript.message_part(complete=eom)
        if transcript.refusal is not None:
            return None
        return Job(
            stage,
            transcript.connection_part(),
            message,
            packet if part is TranscriptPart.NONE else b"",  # UNKNOWN belongs to no message
            transcript.queue_id,
            self._message_began if transcript.size else self._began,
            transcript.client() if eom and self._context.limits.join_retries else b"",
            stage is Stage.RCPT and self._is_recipient_refused(),
            transcript.claim,
        )

    def _is_recipient_refused(self) -> bool:
        """Return True if the MTA itself has refused this recipient (negotiated with RCPT_REJ)."""
        asked_for = self._session.agreement.protocol & ProtocolBits.RCPT_REJ
        return bool(asked_for) and self.transcript.is_recipient_refused()

    def _ask(self, job: Job) -> bytes | Deferred[bytes]:
        jobs, answer = self._milters.ask(job)
        if isinstance(answer, bytes):
            return self._finish_job(answer, job, jobs)
        self.pending = job.stage
        return answer.addCallback(self._finish_job, job, jobs)

    def _finish_job(self, replies: bytes, job: Job, jobs: list[Job]) -> bytes:
        """Check the milters' replies, and return those that the MTA gets."""
        stage = job.stage
        assert stage is not None  # the milters were asked
        self.pending = None
        size = self.transcript.size
        if len(replies) > SMALL_ANSWER:
            replies = self._limit_answer(replies, size if stage is Stage.EOM else 0)
        answer = self._decide(stage, replies, refused=job.refused)
        write = self._context.message_log
        if stage is Stage.EOM and write is not None:
            write(_log_line(job, jobs, size, answer, self._context.reactor.seconds()))
        return answer

    def _limit_answer(self, replies: bytes, freed: int) -> bytes:
        """Return the replies, or a refusal if there is no room for them until the MTA reads them.

        `freed` is the number of bytes that become free with the message.
        """
        if self._context.inflight.has_room(len(replies) - freed):
            return replies
        self.log.warn(
            "{about}: no room for an answer of {n} bytes (--max-inflight-bytes)",
            about=self.transcript.about,
            n=len(replies),
        )
        self._count("refused_no_room")
        return NO_ROOM

    def _decide(self, stage: Stage, replies: bytes, *, refused: bool = False) -> bytes:
        """Return the replies if the session accepts them, else the policy's verdict."""
        try:
            decision = self._session.decide(stage, replies)
        except LocalProtocolError as error:
            about = self.transcript.about
            self.log.error("{about}: {why}; not sent", about=about, why=str(error))
            replies = answer_for(error, self._context.policy, stage)
            decision = self._session.decide(stage, replies)
        if decision.mark or refused:
            self.transcript.append(REFUSED)
        if decision.ended:
            self._end_message()
        return replies

    def cancel(self) -> None:
        """Cancel the pending question; its Deferred does not fire."""
        self.pending = None
        self._milters.cancel()

    def end(self, answer: bytes = STOPPING) -> bytes:
        """End the conversation; return `answer`, checked, for a pending question, or b""."""
        pending = self.pending
        self.cancel()
        answer = self._decide(pending, answer) if pending is not None else b""
        self._session.close()
        if not self.is_over:
            self.is_over = True
            self._end_client()
        return answer


def log_message(line: str) -> None:
    """Log the line about a message in Twisted's way, which takes as long as a short message."""
    Conversation.log.info("{line}", line=line)


def _log_line(job: Job, jobs: list[Job], size: int, answer: bytes, now: float) -> str:
    """Return the log line of a message: its queue id, size, verdict and times."""
    replies = list(packets(answer))
    final, start, _ = replies[-1]
    verdict = VERDICT_NAMES.get(chr(final)) or answer[start : start + 3].decode()
    if any(code == _QUARANTINE for code, _, _ in replies):
        verdict = "quarantine"
    # The MTA has waited for the slowest of several milters' jobs.
    queued = max(((each.started or now) - each.submitted for each in jobs), default=0.0)
    scanned = max((now - (each.started or now) for each in jobs), default=0.0)
    shards = ",".join(str(each.slot) for each in jobs)
    return (
        f"{job.about} size={size} verdict={verdict} actions={len(replies) - 1} shard={shards}"
        f" queue_ms={1000 * queued:.1f} scan_ms={1000 * scanned:.1f}"
    )
