"""A conversation with one MTA: from a command to its answer, if need be by way of a milter.

It knows no socket: packets come in, answers go out. While a job is out it takes no command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

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
from sharded_milter.ipc.messages import blob
from sharded_milter.limits import Limits
from sharded_milter.mta.inflight import Inflight
from sharded_milter.mta.milters import Chain, Facts, Member
from sharded_milter.mta.transcript import Refusal, Transcript
from sharded_milter.protocol.commands import Negotiate
from sharded_milter.protocol.negotiation import DATA_SIZES, Handling, Manifest, negotiate
from sharded_milter.protocol.replies import Continue, Quarantine
from sharded_milter.protocol.session import REFUSED, Keep, Leaves, Session, State
from sharded_milter.protocol.stages import NO_PROTOCOL, Stage
from sharded_milter.protocol.stages import Protocol as ProtocolBits
from sharded_milter.protocol.wire import Framer, packets

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


class Home(Protocol):
    """What a conversation needs of the service it belongs to."""

    limits: Limits
    policy: Policy
    inflight: Inflight
    counters: Counter[str]
    logs_messages: bool  # whether there is a log that has a line for each

    @property
    def reactor(self) -> Any: ...
    @property
    def members(self) -> Sequence[Member]: ...
    @property
    def full(self) -> bool: ...


class Conversation:
    """One MTA's commands and our answers; `send` is called with answers that come later."""

    log = Logger()

    def __init__(self, home: Home, send: Callable[[bytes], None]) -> None:
        self._home = home
        self._send = send
        self._session = Session()
        self._transcript = Transcript(home.limits.max_message_size, home.inflight)
        self._chain = self._chain_of(())
        self._turned_away = False
        self._asking = False
        self._early = b""  # an answer that came before the question was out

    def _chain_of(self, members: Sequence[Member]) -> Chain:
        return Chain(members, self._home.policy, self._answered, self._lost)

    @property
    def asked(self) -> Stage | None:
        """The stage that the milters are asked about now."""
        return self._chain.asked

    @property
    def is_ready(self) -> bool:
        """Whether it takes a command now."""
        return not self._chain.is_asked and self._session.state is not State.CLOSED

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

    def take(self, framer: Framer) -> bytes | None:
        """Follows the commands that wait there up to one that may need an answer.

        What can be answered without a milter is returned; None when no whole packet waits.
        Raises RemoteProtocolError when a packet is malformed or cannot come here.
        """
        start = framer.at
        framer.at, noted = self._session.receive_run(framer.buffer, start)
        if framer.at > start:
            with memoryview(framer.buffer) as view, view[start : framer.at] as run:
                self._transcript.extend(run, noted)
        packet = framer.next()
        return self._take(packet) if packet else None

    def _take(self, packet: bytes) -> bytes:
        step = self._session.receive(packet)
        if step.offer is not None:
            return self._negotiate(step.offer)
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
        facts = self._facts(step.stage, step.keep, packet)
        if facts is None:
            self._count("refused_no_memory")
            return self._decided(step.stage, NO_ROOM)
        return self._ask(facts)

    def _negotiate(self, offer: Negotiate) -> bytes:
        home = self._home
        self._turned_away = home.full
        self._chain = self._chain_of(() if home.full else home.members)
        manifests = [TURNED_AWAY] if home.full else self._chain.manifests
        agreement = negotiate(offer, manifests, DATA_SIZES[home.limits.max_data_size])
        self._session.agree(agreement)
        self._chain.agree(agreement)
        answer = agreement.reply.encode()
        told = offer.encode() if self._chain.has_objects else b""  # to their xxfi_negotiate
        self._transcript.keep(told + answer)
        return answer

    def _forget(self, leaves: Leaves) -> None:
        if leaves is Leaves.MESSAGE:
            self._message_over()
        else:
            self._client_over()

    def _message_over(self) -> None:
        self._transcript.clear_message()
        self._chain.message_over()

    def _client_over(self) -> None:
        self._chain.client_over(self._transcript.about())
        self._transcript.clear_client()

    def _keep(self, keep: Keep, packet: bytes) -> None:
        if keep is Keep.SLOT:
            self._chain.learn(self._transcript.keep(packet), packet)
            return
        if keep is Keep.BEGIN:
            self._message_over()
        self._transcript.append(packet)

    def _refusal(self) -> bytes:
        """What is answered instead of asking the milter; empty when it is to be asked."""
        if self._turned_away:
            self._count("overload_connections")
            return BUSY
        if self._transcript.refusal is not None:
            self._count(f"refused_{self._transcript.refusal.name.lower()}")
            return _REFUSALS[self._transcript.refusal]
        return b""

    def _count(self, name: str) -> None:
        self._home.counters[name] += 1

    # Questions to the milters

    def _facts(self, stage: Stage, keep: Keep, packet: bytes) -> Facts | None:
        """What the milters are asked about; None when there is no memory for it."""
        transcript, eom = self._transcript, stage is Stage.EOM
        try:
            connection = blob(transcript.connection_part())
            command = blob(packet) if keep is Keep.NO else b""  # UNKNOWN belongs to no message
        except OSError as error:
            self.log.error("no memory for a job: {why}", why=error.strerror)
            return None
        message = transcript.message_part(complete=eom)
        if transcript.refusal is not None:
            return None
        return Facts(
            stage,
            connection,
            message,
            transcript.about(),
            self._key,
            transcript.client() if eom and self._home.limits.join_retries else b"",
            command,
            self._is_refused(stage),
        )

    def _is_refused(self, stage: Stage) -> bool:
        """Whether the MTA itself has refused this recipient; it sends those if asked to."""
        if stage is not Stage.RCPT:
            return False
        asked_for = self._session.agreement.protocol & ProtocolBits.RCPT_REJ
        return bool(asked_for) and self._transcript.is_refused()

    def _ask(self, facts: Facts) -> bytes:
        """Asks; an answer that is there at once is returned, to keep the order of commands."""
        self._asking = True
        self._chain.ask(facts)
        self._asking = False
        early, self._early = self._early, b""
        return early

    def _key(self, shard_by: str) -> bytes:
        if shard_by == "session":
            return id(self).to_bytes(8, "big")
        return self._transcript.key(shard_by)

    def _lost(self) -> None:
        """A defect of ours: the MTA hears the end of the connection instead of nothing."""
        self._session.state = State.CLOSED
        self._send(b"")

    def _answered(self, facts: Facts, replies: bytes, jobs: list[Job]) -> None:
        size = self._transcript.size
        answer = self._decided(facts.stage, replies, refused=facts.refused)
        now = self._home.reactor.seconds()
        if self._asking:
            self._early = answer
        else:
            self._send(answer)
        if facts.stage is Stage.EOM and self._home.logs_messages:  # the MTA waits for no log
            self._log_message(jobs, facts.about(), size, answer, now)

    def _decided(self, stage: Stage, replies: bytes, *, refused: bool = False) -> bytes:
        """The replies, after the session has approved of them; the policy's verdict if not."""
        try:
            decision = self._session.decide(stage, replies)
        except LocalProtocolError as error:
            about = self._transcript.about()()
            self.log.error("{about}: {why}; not sent", about=about, why=str(error))
            replies = answer_for(error, self._home.policy, stage)
            decision = self._session.decide(stage, replies)
        if decision.mark or refused:
            self._transcript.append(REFUSED)
        if decision.ended:
            self._message_over()
        return replies

    def cancel(self) -> None:
        """Nobody wants the answer to the question that is out."""
        self._chain.cancel()

    def end(self) -> bytes:
        """The service stops: what an MTA that waits is told. No command may follow."""
        asked = self._chain.asked
        self.cancel()
        answer = self._decided(asked, STOPPING) if asked is not None else b""
        self._session.state = State.CLOSED
        self._client_over()
        return answer

    # Log lines

    def _log_message(
        self, jobs: list[Job], about: str, size: int, answer: bytes, now: float
    ) -> None:
        """One line for every message: what it was, what became of it, what it cost."""
        replies = list(packets(answer))
        final, start, _ = replies[-1]
        verdict = VERDICT_NAMES.get(chr(final)) or answer[start : start + 3].decode()
        if any(code == _QUARANTINE for code, _, _ in replies):
            verdict = "quarantine"
        # Of several milters' jobs the slowest is what the MTA has waited for.
        queued = max((_started(job, now) - job.submitted for job in jobs), default=0.0)
        scanned = max((now - _started(job, now) for job in jobs), default=0.0)
        shards = ",".join(str(job.slot) for job in jobs)
        line = (
            f"{about} size={size} verdict={verdict} actions={len(replies) - 1} shard={shards}"
            f" queue_ms={1000 * queued:.1f} scan_ms={1000 * scanned:.1f}"
        )
        self.log.info("{line}", line=line)  # one field, because Twisted formats each slowly


def _started(job: Job, now: float) -> float:
    return job.started or now
