"""One MTA connection: bytes to packets, packets to the session, questions to the pool.

The law: the MTA gets one answer to each command that waits for one, in order, and no closed
socket instead of an answer. Commands that come while a job is out wait, except those that say
that nobody wants its answer any more.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from twisted.internet import interfaces
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure

from sharded_milter.errors import JobFailed, LocalProtocolError, RemoteProtocolError
from sharded_milter.master.limits import Limits
from sharded_milter.master.policy import STOPPING, TOO_LARGE, answer_for
from sharded_milter.master.pool import Job
from sharded_milter.master.transcript import Transcript
from sharded_milter.protocol.commands import Abort, Quit, QuitNc
from sharded_milter.protocol.negotiation import Handling, Manifest, negotiate
from sharded_milter.protocol.replies import Continue, Progress
from sharded_milter.protocol.session import Keep, Leaves, Session, State, Step
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
        self._too_large = False

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
        self.log.info("closing a connection that was idle for too long")
        self._close()

    def dataReceived(self, data: bytes) -> None:
        self.resetTimeout()
        try:
            packets = self._framer.receive(data)
            for packet in packets:
                if self._job is not None and packet[LETTER] in _LEAVING:
                    self._cancel()
                self._waiting.append(packet)
                self._waiting_bytes += len(packet)
            self._advance()
        except RemoteProtocolError as error:
            self.log.warn("closing a connection: {why}", why=str(error))
            self._close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.setTimeout(None)
        self._cancel()
        self._waiting.clear()
        self._transcript = Transcript()
        self._session.state = State.CLOSED
        self._home.disconnected(self)

    # Commands

    def _advance(self) -> None:
        """Takes commands until one needs a milter, and writes their answers at once."""
        answers = []
        while self._waiting and self._job is None and self._session.state is not State.CLOSED:
            packet = self._waiting.popleft()
            self._waiting_bytes -= len(packet)
            answer = self._take(packet)
            if answer:
                answers.append(answer)
        if answers:
            self._write(b"".join(answers))
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
        if self._too_large:
            return self._decided(step.stage, TOO_LARGE)
        self._ask(step, packet)
        return b""

    def _forget(self, leaves: Leaves) -> None:
        if leaves in (Leaves.MESSAGE, Leaves.CLIENT):
            self._message_over()
        if leaves is Leaves.CLIENT:
            self._transcript.clear_client()

    def _message_over(self) -> None:
        self._transcript.clear_message()
        self._too_large = False

    def _keep(self, keep: Keep, packet: bytes) -> None:
        match keep:
            case Keep.NO:
                return
            case Keep.SLOT:
                self._transcript.keep(packet)
                return
            case Keep.BEGIN:
                self._message_over()
        room = self._home.limits.max_message_size - self._transcript.size
        if len(packet) > room:
            self._too_large = True
            self._transcript.clear_message()
        if not self._too_large:
            self._transcript.append(packet)

    # Questions to the milter

    def _ask(self, step: Step, packet: bytes) -> None:
        stage = step.stage
        assert stage is not None  # only stages are asked about
        transcript = self._transcript
        message = transcript.message_part(complete=stage is Stage.EOM)
        if step.keep is Keep.NO:
            message = packet  # UNKNOWN belongs to no message
        job = Job(
            stage,
            stage in self._home.manifest.light,
            transcript.connection_part(),
            message,
            self._about,
        )
        self._job = job
        result = self._home.pool.submit(job)
        result.addErrback(self._policy, stage)
        result.addCallback(self._answered, job)
        result.addErrback(lambda failure: self.log.failure("a verdict got lost", failure))
        if self._job is job and stage is Stage.EOM:
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
        self._write(answer)
        if job.stage is Stage.EOM:
            self._log_message(job, about, size, answer)
        try:
            self._advance()
        except RemoteProtocolError as error:
            self.log.warn("closing a connection: {why}", why=str(error))
            self._close()

    def _decided(self, stage: Stage, replies: bytes) -> bytes:
        """The replies, after the session has approved of them; the policy's verdict if not."""
        try:
            decision = self._session.decide(stage, replies)
        except LocalProtocolError as error:
            self.log.error("{about}: {why}; not sent", about=self._about(), why=str(error))
            replies = answer_for(error, self._home.on_error, stage)
            decision = self._session.decide(stage, replies)
        if decision.mark:
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

    def _close(self) -> None:
        self._session.state = State.CLOSED
        self._waiting.clear()
        transport: Any = self.transport
        transport.loseConnection()
