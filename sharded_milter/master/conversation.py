"""A conversation with one MTA: from a command to its answer, if need be by way of a milter.

It knows no socket: packets come in, answers go out. While a job is out it takes no command.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.errors import JobFailed, LocalProtocolError
from sharded_milter.jobs import blob
from sharded_milter.master.dispatch import Job
from sharded_milter.master.inflight import Inflight
from sharded_milter.master.limits import Limits
from sharded_milter.master.policy import (
    BUSY,
    NO_ROOM,
    RELOADED,
    STOPPING,
    TOO_LARGE,
    Policy,
    answer_for,
)
from sharded_milter.master.transcript import Refusal, Transcript
from sharded_milter.protocol.negotiation import DATA_SIZES, Handling, Manifest, negotiate
from sharded_milter.protocol.replies import Continue, Quarantine
from sharded_milter.protocol.session import Keep, Leaves, Session, State
from sharded_milter.protocol.stages import NO_PROTOCOL, Stage
from sharded_milter.protocol.wire import packets

_CONTINUE = Continue().encode()

_REFUSALS = {
    Refusal.TOO_LARGE: TOO_LARGE,
    Refusal.NO_ROOM: NO_ROOM,
    Refusal.NO_MEMORY: NO_ROOM,
}

# What a connection above --max-connections negotiates: to be asked at its beginning, and nothing
# else, so that it hears at once that it must come back.
TURNED_AWAY = Manifest(
    "turned away",
    protocol=sum(
        (stage.suppress for stage in Stage if stage is not Stage.CONNECT), start=NO_PROTOCOL
    ),
)

# How log lines call a final reply; one in our own words goes by its code.
VERDICT_NAMES = {"a": "accept", "c": "continue", "d": "discard", "r": "reject", "t": "tempfail"}
_QUARANTINE = Quarantine.letter[0]


class Answers(Protocol):
    """Who answers jobs: dispatch."""

    counters: Any

    def submit(self, job: Job) -> Deferred[bytes]: ...
    def cancel(self, job: Job) -> None: ...


class Home(Protocol):
    """What a conversation needs of the service it belongs to."""

    limits: Limits
    policy: Policy
    inflight: Inflight
    reactor: Any

    @property
    def dispatch(self) -> Answers: ...
    @property
    def manifest(self) -> Manifest: ...
    @property
    def full(self) -> bool: ...


class Conversation:
    """One MTA's commands and our answers; `send` is called with answers that come later."""

    log = Logger()

    def __init__(self, home: Home, send: Callable[[bytes], None]) -> None:
        self.job: Job | None = None  # the one that is out
        self._home = home
        self._send = send
        self._session = Session()
        self._transcript = Transcript(home.limits.max_message_size, home.inflight)
        self._manifest = home.manifest
        self._asking = False
        self._early = b""  # an answer that came before the question was out

    @property
    def over(self) -> bool:
        """Whether the MTA has left."""
        return self._session.state is State.CLOSED

    @cached_property
    def takes_early_progress(self) -> bool:
        """Whether the MTA takes PROGRESS before the end of a message too.

        Postfix does. Sendmail takes it for a bogus answer there and gives the milter up.
        """
        return self._transcript.mta().startswith("Postfix")

    def take(self, packet: bytes) -> bytes:
        """Follows one command; what can be answered without a milter is returned.

        Raises RemoteProtocolError when the packet cannot come here.
        """
        step = self._session.receive(packet)
        if step.offer is not None:
            self._manifest = TURNED_AWAY if self._home.full else self._home.manifest
            mds = DATA_SIZES[self._home.limits.max_data_size]
            agreement = negotiate(step.offer, [self._manifest], mds)
            self._session.agree(agreement)
            answer = agreement.reply.encode()
            self._transcript.keep(answer)
            return answer
        if step.leaves is not Leaves.NOTHING:
            self._forget(step.leaves)
        if step.keep is not Keep.NO:
            self._keep(step.keep, packet)
        if step.stage is None or step.handling is Handling.SILENT:
            return b""
        if step.handling is Handling.CONTINUE:
            return self._decided(step.stage, _CONTINUE)
        refusal = self._refusal()
        if refusal:
            return self._decided(step.stage, refusal)
        job = self._question(step.stage, step.keep, packet)
        if job is None:
            self._count("refused_no_memory")
            return self._decided(step.stage, NO_ROOM)
        return self._ask(job)

    def _forget(self, leaves: Leaves) -> None:
        if leaves is Leaves.CLIENT:
            self._transcript.clear_client()
        else:
            self._transcript.clear_message()

    def _keep(self, keep: Keep, packet: bytes) -> None:
        if keep is Keep.SLOT:
            self._transcript.keep(packet)
            return
        if keep is Keep.BEGIN:
            self._transcript.clear_message()
        self._transcript.append(packet)

    def _refusal(self) -> bytes:
        """What is answered instead of asking the milter; empty when it is to be asked."""
        if self._manifest is TURNED_AWAY:
            self._count("overload_connections")
            return BUSY
        if self._transcript.refusal is not None:
            self._count(f"refused_{self._transcript.refusal.name.lower()}")
            return _REFUSALS[self._transcript.refusal]
        current = self._home.manifest
        if self._manifest is not current and self._manifest != current:
            self._count("refused_reloaded")
            return RELOADED
        return b""

    def _count(self, name: str) -> None:
        self._home.dispatch.counters[name] += 1

    # Questions to the milter

    def _question(self, stage: Stage, keep: Keep, packet: bytes) -> Job | None:
        """The job that asks the milter; None when there is no memory for it."""
        transcript, eom = self._transcript, stage is Stage.EOM
        about = self._about()  # as it is now: when the job ends, the MTA may be elsewhere
        try:
            connection = blob(transcript.connection_part())
            # UNKNOWN belongs to no message.
            unkept = keep is Keep.NO
            message = blob(packet) if unkept else transcript.message_part(complete=eom)
        except OSError as error:
            self.log.error("no memory for a job: {why}", why=error.strerror)
            return None
        if transcript.refusal is not None:
            return None
        return Job(
            stage,
            stage in self._manifest.light,
            connection,
            message,
            lambda: about,
            self._key(),
            transcript.client() if eom and self._home.limits.join_retries else b"",
            self._manifest,
        )

    def _ask(self, job: Job) -> bytes:
        """Asks; an answer that is there at once is returned, to keep the order of commands."""
        self.job = job
        self._asking = True
        result = self._home.dispatch.submit(job)
        result.addErrback(self._by_policy, job)
        result.addCallback(self._answered, job)
        result.addErrback(self._lost)
        self._asking = False
        early, self._early = self._early, b""
        return early

    def _lost(self, failure: Failure) -> None:
        """A defect of ours: the MTA hears the end of the connection instead of nothing."""
        self.log.failure("a verdict got lost", failure)
        self._session.state = State.CLOSED
        self._send(b"")

    def _key(self) -> bytes:
        shard_by = self._manifest.shard_by
        if shard_by == "session":
            return id(self).to_bytes(8, "big")
        return self._transcript.key(shard_by) if shard_by else b""

    def _by_policy(self, failure: Failure, job: Job) -> bytes:
        if self.job is not job:
            return b""  # nobody waits for it
        if not failure.check(JobFailed):
            self.log.failure("dispatch failed", failure)
        self.log.error(
            "{about} at {stage}: {why}; answered by policy",
            about=job.about(),
            stage=job.stage.word,
            why=failure.getErrorMessage(),
        )
        return answer_for(failure.value, self._home.policy, job.stage)

    def _answered(self, replies: bytes, job: Job) -> None:
        if self.job is not job:
            return
        self.job = None
        about, size = self._about(), self._transcript.size
        answer = self._decided(job.stage, replies)
        if job.stage is Stage.EOM:
            self._log_message(job, about, size, answer)
        if self._asking:
            self._early = answer
        else:
            self._send(answer)

    def _decided(self, stage: Stage, replies: bytes) -> bytes:
        """The replies, after the session has approved of them; the policy's verdict if not."""
        try:
            decision = self._session.decide(stage, replies)
        except LocalProtocolError as error:
            self.log.error("{about}: {why}; not sent", about=self._about(), why=str(error))
            replies = answer_for(error, self._home.policy, stage)
            decision = self._session.decide(stage, replies)
        if decision.mark:
            self._transcript.append(decision.mark)
        if decision.ended:
            self._transcript.clear_message()
        return replies

    def cancel(self) -> None:
        """Nobody wants the answer of the job that is out."""
        job, self.job = self.job, None
        if job is not None:
            self._home.dispatch.cancel(job)

    def end(self) -> bytes:
        """The service stops: what an MTA that waits is told. No command may follow."""
        job = self.job
        self.cancel()
        answer = self._decided(job.stage, STOPPING) if job is not None else b""
        self._session.state = State.CLOSED
        self._transcript.clear_client()
        return answer

    # Log lines

    def _about(self) -> str:
        queue_id = self._transcript.queue_id()
        return f"qid={queue_id}" if queue_id else "message without queue id"

    def _log_message(self, job: Job, about: str, size: int, answer: bytes) -> None:
        """One line for every message: what it was, what became of it, what it cost."""
        replies = list(packets(answer))
        final, start, _ = replies[-1]
        verdict = VERDICT_NAMES.get(chr(final)) or answer[start : start + 3].decode()
        if any(code == _QUARANTINE for code, _, _ in replies):
            verdict = "quarantine"
        now = self._home.reactor.seconds()
        started = job.started or now
        self.log.info(
            "{about} size={size} verdict={verdict} actions={actions} shard={shard}"
            " queue_ms={queued:.1f} scan_ms={scanned:.1f}",
            about=about,
            size=size,
            verdict=verdict,
            actions=len(replies) - 1,
            shard=job.slot,
            queued=1000 * (started - job.submitted),
            scanned=1000 * (now - started),
        )
