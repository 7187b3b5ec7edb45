"""A conversation with one MTA: from a command to its answer, if need be by way of a milter.

It knows no socket: it takes packets from the connection's framer and returns answers. The
connection hands it no command while a job is out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.logger import Logger

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

_REFUSALS = {
    Refusal.TOO_LARGE: TOO_LARGE,
    Refusal.NO_ROOM: NO_ROOM,
    Refusal.NO_MEMORY: NO_ROOM,
}

# Bytes of a packet that is not complete which are kept even where there is no room. A packet that
# brings more with it is cut short there, and so is its message; no other than these is as long.
SMALL_PART = 4096
_CUT_SHORT = {kind.letter[0]: kind.encode() for kind in (Header("", ""), Body(b""), Eom())}

# What a connection that is turned away negotiates: to be asked at its beginning, and nothing else,
# so that it hears at once that it must come back.
TURNED_AWAY = Manifest(
    "turned away",
    protocol=sum(
        (stage.suppress for stage in Stage if stage is not Stage.CONNECT), start=NO_PROTOCOL
    ),
)

# How log lines call a final reply; one in our own words goes by its code.
VERDICT_NAMES = {"a": "accept", "c": "continue", "d": "discard", "r": "reject", "t": "tempfail"}
_QUARANTINE = Quarantine.letter[0]


# Takes the line about a message: what it was, what became of it, what it cost.
MessageLog = Callable[[str], object]


class Context(Protocol):
    """What a conversation needs of the service it belongs to."""

    limits: Limits
    policy: Policy
    inflight: Inflight
    counters: Counter[str]
    message_log: MessageLog | None  # writes a line for each message

    @property
    def reactor(self) -> Any: ...
    @property
    def members(self) -> Sequence[Member]: ...
    def new_memory(self) -> Memory: ...


class Conversation:
    """One MTA's commands and our answers."""

    log = Logger()

    def __init__(self, context: Context) -> None:
        self._context = context
        self._session = Session()
        self.transcript = Transcript(
            context.limits.max_message_size, context.inflight, context.new_memory
        )
        self._milters = self._milters_of(())
        self._turned_away = b""  # if it is: what each question is answered then
        self.has_heard = False  # that it is turned away
        self._began = context.reactor.seconds()  # the connection
        self._message_began = 0.0
        self.asked: Stage | None = None  # the stage that the milters are asked about now
        self.has_agreed = False  # with the MTA, on options
        self.is_over = False  # the MTA has left, or we have

    def _milters_of(self, members: Sequence[Member]) -> Milters:
        return Milters(members, self._context.policy, self.transcript)

    def turn_away(self, answer: bytes) -> None:
        """From now on this is the answer, instead of what the milters would say."""
        self._turned_away = answer

    @property
    def is_turned_away(self) -> bool:
        """Whether the milters are not asked."""
        return bool(self._turned_away)

    @cached_property
    def takes_early_progress(self) -> bool:
        """Whether the MTA takes PROGRESS before the end of a message too.

        Postfix does. Sendmail takes it for a bogus answer there and gives the milter up.
        """
        return self.transcript.mta().startswith("Postfix")

    def take(self, framer: Framer) -> bytes | Deferred[bytes] | None:
        """Follows the commands that wait there up to one that may need an answer.

        Returns what is answered: bytes, or a Deferred of them that has not fired, where milters
        are asked; None when no whole packet waits. Raises RemoteProtocolError when a packet is
        malformed, too long or cannot come here.
        """
        start, transcript = framer.at, self.transcript
        framer.at, noted = self._session.receive_run(framer.buffer, start)
        if framer.at > start and not self._turned_away:  # of which nothing is kept
            if not transcript.size:
                self._message_began = self._context.reactor.seconds()
            with memoryview(framer.buffer) as view, view[start : framer.at] as run:
                transcript.extend(run, noted)
        packet = framer.next() or self._cut_short(framer)
        return self._take(packet) if packet else None

    def _cut_short(self, framer: Framer) -> bytes:
        """The packet that is not complete yet, without its content, if there is no room for that.

        Else nothing; raises RemoteProtocolError where no packet of its letter is as long.
        """
        head = framer.head()
        if head is None:
            return b""
        length, letter = head
        check_length(letter, length)
        size = framer.waiting
        if size <= SMALL_PART or self._context.inflight.has_room(size) or letter not in _CUT_SHORT:
            return b""
        self.transcript.refuse_for_room()
        framer.truncate(_CUT_SHORT[letter])
        return framer.next()

    def _take(self, packet: bytes) -> bytes | Deferred[bytes]:
        step = self._session.receive(packet)
        if step.offer is not None:
            return self._negotiate(step.offer)
        if step.ends is not Scope.NONE:
            self._forget(step.ends)
        if step.part is not TranscriptPart.NONE and not self._turned_away:
            self._store(step.part, packet)
        if step.stage is None or step.handling is Handling.NO_REPLY:
            return b""
        if self._turned_away:
            self.has_heard = True
            return self._decided(step.stage, self._turned_away)
        if step.handling is Handling.CONTINUE:
            return self._decided(step.stage, _CONTINUE)
        transcript = self.transcript
        if transcript.refuses_client or transcript.refusal is not None:
            return self._decided(step.stage, self._refusal(transcript.refusal))
        job = self._job(step.stage, step.part, packet)
        if job is None:
            self._count("refused_no_memory")
            return self._decided(step.stage, NO_ROOM)
        return self._ask(job)

    def _negotiate(self, offer: Negotiate) -> bytes:
        context = self._context
        self._milters = self._milters_of(() if self._turned_away else context.members)
        manifests = [TURNED_AWAY] if self._turned_away else self._milters.manifests
        agreement = negotiate(offer, manifests, DATA_SIZES[context.limits.max_data_size])
        self._session.agree(agreement)
        self.has_agreed = True
        self._milters.agree(agreement)
        answer = agreement.reply.encode()
        told = offer.encode() if self._milters.has_objects else b""  # to their xxfi_negotiate
        self.transcript.keep(told + answer)
        return answer

    def _forget(self, leaves: Scope) -> None:
        if leaves is Scope.MESSAGE:
            self._message_over()
        else:
            self._client_over()
            self.is_over = leaves is Scope.CONNECTION

    def _message_over(self) -> None:
        self.transcript.clear_message()
        self._milters.message_over()

    def _client_over(self) -> None:
        self._milters.client_over(self._began)
        self.transcript.clear_client()

    def _store(self, part: TranscriptPart, packet: bytes) -> None:
        if part is TranscriptPart.CONNECTION:
            self._milters.learn(self.transcript.keep(packet), packet)
            return
        transcript = self.transcript
        if keep is TranscriptPart.NEW_MESSAGE and (
            transcript.size or transcript.refusal is not None
        ):
            self._message_over()
        if not transcript.size:
            self._message_began = self._context.reactor.seconds()
        transcript.append(packet)

    def _refusal(self, refusal: Refusal | None) -> bytes:
        """What is answered instead of asking the milters."""
        if self.transcript.refuses_client or refusal is None:
            self._count("refused_no_room")
            return BUSY
        self._count(f"refused_{refusal.name.lower()}")
        return _REFUSALS[refusal]

    def _count(self, name: str) -> None:
        self._context.counters[name] += 1

    # Questions to the milters

    def _job(self, stage: Stage, part: TranscriptPart, packet: bytes) -> Job | None:
        """What the milters are asked; None when there is no memory for it."""
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
            stage is Stage.RCPT and self._is_refused(),
            transcript.claim,
        )

    def _is_refused(self) -> bool:
        """Whether the MTA itself has refused this recipient; it sends those if asked to."""
        asked_for = self._session.agreement.protocol & ProtocolBits.RCPT_REJ
        return bool(asked_for) and self.transcript.is_refused()

    def _ask(self, job: Job) -> bytes | Deferred[bytes]:
        jobs, answer = self._milters.ask(job)
        if isinstance(answer, bytes):
            return self._answered(answer, job, jobs)
        self.asked = job.stage
        return answer.addCallback(self._answered, job, jobs)

    def _answered(self, replies: bytes, job: Job, jobs: list[Job]) -> bytes:
        """The milters have answered: the replies, checked, as the MTA gets them."""
        stage = job.stage
        assert stage is not None  # the milters were asked
        self.asked = None
        size = self.transcript.size
        if len(replies) > SMALL_ANSWER:
            replies = self._bounded(replies, size if stage is Stage.EOM else 0)
        answer = self._decided(stage, replies, refused=job.refused)
        write = self._context.message_log
        if stage is Stage.EOM and write is not None:
            write(_log_line(job, jobs, size, answer, self._context.reactor.seconds()))
        return answer

    def _bounded(self, replies: bytes, freed: int) -> bytes:
        """The replies, or a refusal where there is no room to keep them until the MTA reads.

        So many bytes are `freed` with the message.
        """
        if self._context.inflight.has_room(len(replies) - freed):
            return replies
        self.log.warn(
            "{about}: there is no room for an answer of {n} bytes",
            about=self.transcript.about,
            n=len(replies),
        )
        self._count("refused_no_room")
        return NO_ROOM

    def _decided(self, stage: Stage, replies: bytes, *, refused: bool = False) -> bytes:
        """The replies, after the session has approved of them; the policy's verdict if not."""
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
            self._message_over()
        return replies

    def cancel(self) -> None:
        """The answer to the question that is out is not wanted any more."""
        self.asked = None
        self._milters.cancel()

    def end(self, answer: bytes = STOPPING) -> bytes:
        """The connection ends: what an MTA that waits is told. No command may follow."""
        asked = self.asked
        self.cancel()
        answer = self._decided(asked, answer) if asked is not None else b""
        self._session.close()
        self.is_over = True
        self._client_over()
        return answer


def log_message(line: str) -> None:
    """Log the line about a message in Twisted's way, which takes as long as a short message."""
    Conversation.log.info("{line}", line=line)


def _log_line(job: Job, jobs: list[Job], size: int, answer: bytes, now: float) -> str:
    """What a message was, what became of it, what it cost."""
    replies = list(packets(answer))
    final, start, _ = replies[-1]
    verdict = VERDICT_NAMES.get(chr(final)) or answer[start : start + 3].decode()
    if any(code == _QUARANTINE for code, _, _ in replies):
        verdict = "quarantine"
    # Of several milters' jobs the slowest is what the MTA has waited for.
    queued = max(((each.started or now) - each.submitted for each in jobs), default=0.0)
    scanned = max((now - (each.started or now) for each in jobs), default=0.0)
    shards = ",".join(str(each.slot) for each in jobs)
    return (
        f"{job.about} size={size} verdict={verdict} actions={len(replies) - 1} shard={shards}"
        f" queue_ms={1000 * queued:.1f} scan_ms={1000 * scanned:.1f}"
    )
