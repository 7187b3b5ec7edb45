"""One MTA connection: bytes to packets, packets to the session, questions to the pool.

The law: the MTA gets one answer to each command that waits for one, in order, and no closed
socket instead of an answer. Commands that come while a job is out wait, except those that say
that nobody wants its answer any more.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import Any, Protocol

from twisted.internet import interfaces
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure

from sharded_milter.errors import JobFailed, LocalProtocolError, RemoteProtocolError
from sharded_milter.jobs import blob
from sharded_milter.master.limits import Limits
from sharded_milter.master.policy import NO_ROOM, STOPPING, TOO_LARGE, answer_for
from sharded_milter.master.pool import Job
from sharded_milter.master.transcript import Transcript
from sharded_milter.protocol.commands import Abort, Quit, QuitNc
from sharded_milter.protocol.negotiation import Handling, Manifest, negotiate
from sharded_milter.protocol.replies import Continue, Progress
from sharded_milter.protocol.session import Keep, Leaves, Session, State
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.wire import LETTER, Framer, packets

_CONTINUE = Continue().encode()
_PROGRESS = Progress().encode()
# How log lines call a final reply; one in our own words goes by its code.
VERDICT_NAMES = {
    "a": "accept",
    "c": "continue",
    "d": "discard",
    "r": "reject",
    "t": "tempfail",
}
_LEAVING = frozenset(kind.letter[0] for kind in (Abort, Quit, QuitNc))


class Answers(Protocol):
    """Who answers jobs: the pool."""

    def submit(self, job: Job) -> Deferred[bytes]: ...
    def cancel(self, job: Job) -> None: ...


class Home(Protocol):
    """What a connection needs of the service it belongs to."""

    manifest: Manifest
    limits: Limits
    on_error: str
    reactor: Any

    @property
    def pool(self) -> Answers: ...

    def connected(self, connection: MilterConnection) -> None: ...
    def disconnected(self, connection: MilterConnection) -> None: ...


class MilterConnection(TwistedProtocol, TimeoutMixin):
    """Speaks the milter protocol with one MTA."""

    log = Logger()

    def __init__(self, home: Home) -> None:
        self._home = home
        self._session = Session()
        self._framer = Framer()
        self._transcript = Transcript()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._job: Job | None = None
        self._progress: Any = None
        self._unsent: list[bytes] | None = None  # answers, while commands are taken
        self._refusal = b""  # set: the message is not kept, and this answers its questions

    # What Twisted calls

    def connectionMade(self) -> None:
        transport: Any = self.transport
        if interfaces.ITCPTransport.providedBy(transport):
            transport.setTcpNoDelay(True)
        self.setTimeout(self._home.limits.idle_timeout)
        self._home.connected(self)

    def callLater(self, period: float, function: Any) -> Any:
        """TimeoutMixin's clock."""
        return self._home.reactor.callLater(period, function)

    def timeoutConnection(self) -> None:
        """The MTA has said nothing for longer than any SMTP client may be idle."""
        if self._job is not None:  # it waits for us
            self.setTimeout(self._home.limits.idle_timeout)
            return
        self.log.info("closing a connection that was idle for too long")
        self._close()

    def dataReceived(self, data: bytes) -> None:
        self.resetTimeout()
        try:
            received = self._framer.receive(data)
        except RemoteProtocolError as error:
            self._break_off(error)
            self._close()
            return
        for packet in received:
            if self._job is not None and packet[LETTER] in _LEAVING:
                self._cancel()
            self._waiting.append(packet)
            self._waiting_bytes += len(packet)
        self._advance()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.setTimeout(None)
        self._cancel()
        self._waiting.clear()
        self._transcript = Transcript()
        self._session.state = State.CLOSED
        self._home.disconnected(self)

    # Commands

    def _advance(self, answer: bytes = b"") -> None:
        """Takes commands until one needs a milter; writes `answer` and then theirs at once."""
        self._unsent = [answer]
        try:
            while self._waiting and self._job is None and self._session.state is not State.CLOSED:
                packet = self._waiting.popleft()
                self._waiting_bytes -= len(packet)
                self._unsent.append(self._take(packet))
        except RemoteProtocolError as error:
            self._break_off(error)
        answers, self._unsent = b"".join(self._unsent), None
        if answers:
            self._write(answers)
        self._restrain()
        if self._session.state is State.CLOSED:
            self._close()

    def _take(self, packet: bytes) -> bytes:
        """Follows one command; what can be answered without a milter is returned."""
        step = self._session.receive(packet)
        if step.offer is not None:
            agreement = negotiate(step.offer, [self._home.manifest])
            self._session.agree(agreement)
            answer = agreement.reply.encode()
            self._transcript.keep(answer)
            return answer
        self._forget(step.leaves)
        self._keep(step.keep, packet)
        if step.stage is None or step.handling is Handling.SILENT:
            return b""
        if step.handling is Handling.CONTINUE:
            return self._decided(step.stage, _CONTINUE)
        job = self._question(step.stage, step.keep, packet)
        if job is None:
            return self._decided(step.stage, self._refusal)
        self._ask(job)
        return b""

    def _forget(self, leaves: Leaves) -> None:
        if leaves in (Leaves.MESSAGE, Leaves.CLIENT):
            self._message_over()
        if leaves is Leaves.CLIENT:
            self._transcript.clear_client()

    def _message_over(self) -> None:
        self._transcript.clear_message()
        self._refusal = b""

    def _keep(self, keep: Keep, packet: bytes) -> None:
        match keep:
            case Keep.NO:
                return
            case Keep.SLOT:
                self._transcript.keep(packet)
                return
            case Keep.BEGIN:
                self._message_over()
        if self._refusal:
            return
        limit = self._home.limits.max_message_size
        if self._transcript.size + len(packet) > limit:
            self._refuse(TOO_LARGE, f"it has more than {limit} bytes")
            return
        try:
            self._transcript.append(packet)
        except OSError as error:
            self._refuse(NO_ROOM, f"no memory for it: {error.strerror}")

    def _refuse(self, reply: bytes, why: str) -> None:
        self.log.warn("{about} is not scanned, {why}", about=self._about(), why=why)
        self._transcript.clear_message()
        self._refusal = reply

    # Questions to the milter

    def _question(self, stage: Stage, keep: Keep, packet: bytes) -> Job | None:
        """The job that asks the milter; None when the message is refused anyway."""
        if self._refusal:
            return None
        light = stage in self._home.manifest.light
        try:
            connection = blob(self._transcript.connection_part())
            message = self._transcript.message_part(complete=stage is Stage.EOM)
            if keep is Keep.NO:
                message = blob(packet)  # UNKNOWN belongs to no message
        except OSError as error:
            self._refuse(NO_ROOM, f"no memory for it: {error.strerror}")
            return None
        return Job(stage, light, connection, message, self._about)

    def _ask(self, job: Job) -> None:
        self._job = job
        result = self._home.pool.submit(job)
        result.addErrback(self._policy, job.stage)
        result.addCallback(self._answered, job)
        result.addErrback(self._lost)
        if self._job is job and (job.stage is Stage.EOM or self._takes_progress):
            self._report_progress()

    def _policy(self, failure: Failure, stage: Stage) -> bytes:
        if not failure.check(JobFailed):
            self.log.failure("the pool failed", failure)
        answer = answer_for(failure.value, self._home.on_error, stage)
        self.log.error(
            "{about} at {stage}: {why}; answered by policy",
            about=self._about(),
            stage=stage.word,
            why=failure.getErrorMessage(),
        )
        return answer

    def _answered(self, replies: bytes, job: Job) -> None:
        if self._job is not job:
            return
        self._job = None
        self._rest()
        about, size = self._about(), self._transcript.size
        answer = self._decided(job.stage, replies)
        if self._unsent is None:
            self._advance(answer)
        else:  # at once, while commands are taken: that goes on
            self._unsent.append(answer)
        if job.stage is Stage.EOM:
            self._log_message(job, about, size, answer)

    def _lost(self, failure: Failure) -> None:
        """A defect of ours: the MTA hears the end of the connection instead of nothing."""
        self.log.failure("a verdict got lost", failure)
        self._close()

    def _decided(self, stage: Stage, replies: bytes) -> bytes:
        """The replies, after the session has approved of them; the policy's verdict if not."""
        try:
            decision = self._session.decide(stage, replies)
        except LocalProtocolError as error:
            self.log.error("{about}: {why}; not sent", about=self._about(), why=str(error))
            replies = answer_for(error, self._home.on_error, stage)
            decision = self._session.decide(stage, replies)
        if decision.mark and not self._refusal:
            self._transcript.append(decision.mark)
        if decision.ended:
            self._message_over()
        return replies

    def _log_message(self, job: Job, about: str, size: int, answer: bytes) -> None:
        """One line for every message: what it was, what became of it, what it cost."""
        replies = list(packets(answer))
        final, start, _ = replies[-1]
        verdict = VERDICT_NAMES.get(chr(final)) or answer[start : start + 3].decode()
        now = self._home.reactor.seconds()
        self.log.info(
            "{about} size={size} verdict={verdict} actions={actions} shard={shard}"
            " queue_ms={queued:.1f} scan_ms={scanned:.1f}",
            about=about,
            size=size,
            verdict=verdict,
            actions=len(replies) - 1,
            shard=job.slot,
            queued=1000 * ((job.started or now) - job.submitted),
            scanned=1000 * (now - (job.started or now)),
        )

    def _cancel(self) -> None:
        """Nobody wants the answer of the job that is out."""
        job, self._job = self._job, None
        if job is not None:
            self._rest()
            self._home.pool.cancel(job)

    @cached_property
    def _takes_progress(self) -> bool:
        """Whether the MTA takes PROGRESS before the end of a message too.

        Postfix does. Sendmail takes it for a bogus answer there and gives the milter up.
        """
        return self._transcript.mta().startswith("Postfix")

    def _report_progress(self) -> None:
        self._progress = self._home.reactor.callLater(
            self._home.limits.progress_interval, self._send_progress
        )

    def _send_progress(self) -> None:
        self._write(_PROGRESS)
        self._report_progress()

    def _rest(self) -> None:
        if self._progress is not None:
            self._progress.cancel()
            self._progress = None

    # The socket

    def finish(self) -> None:
        """The service stops now: whoever waits gets a verdict, then the connection ends."""
        job = self._job
        if job is not None:
            self._cancel()
            self._write(self._decided(job.stage, STOPPING))
        self._close()

    def _about(self) -> str:
        queue_id = self._transcript.queue_id()
        return f"qid={queue_id}" if queue_id else "message without queue id"

    def _write(self, data: bytes) -> None:
        transport: Any = self.transport
        transport.write(data)

    def _restrain(self) -> None:
        """Stops reading while too much waits, and goes on when it is worked off."""
        transport: Any = self.transport
        if self._waiting_bytes > self._home.limits.max_waiting:
            transport.pauseProducing()
        elif not transport.disconnecting:
            transport.resumeProducing()

    def _break_off(self, error: RemoteProtocolError) -> None:
        """The MTA does not speak our protocol: nothing of what it sends is taken any more."""
        self.log.warn("closing a connection: {why}", why=str(error))
        self._session.state = State.CLOSED

    def _close(self) -> None:
        self._cancel()
        self._session.state = State.CLOSED
        self._waiting.clear()
        transport: Any = self.transport
        transport.loseConnection()
