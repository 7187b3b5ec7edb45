"""The milters of one connection: asked in parallel, their answers merged into one.

Every milter sees the original message, on a shard or in this process. The first refusal or discard
to arrive is the answer, and the other jobs are cancelled. A milter that accepts is not asked again
about this message, or at connect and helo about this client. Changes are made in the order in which
the milters were named, not in the order of their answers. If a milter fails, the policy's verdict
takes the place of its answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Job, result_of
from sharded_milter.dispatch.policy import NO_ROOM, Policy, answer_for
from sharded_milter.errors import JobFailed, LocalProtocolError
from sharded_milter.mta.inflight import SMALL_ANSWER, Claim
from sharded_milter.mta.members import Member
from sharded_milter.mta.merge import ACCEPT, GO_ON, merge
from sharded_milter.mta.transcript import Transcript
from sharded_milter.protocol.answers import check_replies
from sharded_milter.protocol.negotiation import Agreement, Manifest, SessionAffinity
from sharded_milter.protocol.replies import Continue
from sharded_milter.protocol.session import Scope
from sharded_milter.protocol.stages import Protocol as ProtocolBits
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.wire import LETTER

_CONTINUE = Continue().encode()
_CLIENT_STAGES = frozenset({Stage.CONNECT, Stage.HELO})


class _Participant:
    """A milter in one connection."""

    __slots__ = ("accepted", "affinity", "answer", "executor", "held", "job", "manifest", "number")

    def __init__(self, member: Member) -> None:
        self.manifest = member.manifest
        self.executor = member.executor
        self.number = member.number
        self.affinity = self.new_affinity()
        self.accepted = Scope.NONE
        self.job: Job | None = None  # the one that is not answered yet
        self.answer: bytes | None = None  # to the current question
        self.held: Claim | None = None  # counts the answer's bytes while others are awaited

    def new_affinity(self) -> ObjectAffinity | None:
        """Return the affinity of a new object; None if the milter has no objects."""
        required = self.manifest.affinity
        if required is SessionAffinity.NONE:
            return None
        return ObjectAffinity(replayable=required is SessionAffinity.REPLAYABLE)

    def is_concerned(self, job: Job) -> bool:
        """Return True if the milter must be asked this question."""
        if job.refused and not self.manifest.protocol & ProtocolBits.RCPT_REJ:
            return False
        return self.accepted is Scope.NONE and job.stage in self.manifest.answered

    def submit(self, job: Job, transcript: Transcript) -> bytes | Deferred[bytes]:
        """Submit the job to this milter's executor."""
        manifest = self.manifest
        job.manifest, job.milter, job.affinity = manifest, self.number, self.affinity
        job.light = job.stage in manifest.light
        if manifest.shard_by:
            job.key = transcript.key(manifest.shard_by)
        self.job, self.answer, self.held = job, None, None
        return self.executor.submit(job)


class Milters:
    """Asks all milters of one connection."""

    log = Logger()

    def __init__(self, members: Sequence[Member], policy: Policy, transcript: Transcript) -> None:
        self._milters = [_Participant(member) for member in members]
        self._objects = [milter for milter in self._milters if milter.affinity is not None]
        self._policy = policy
        self._transcript = transcript
        self._agreement: Agreement | None = None
        self._asked: list[_Participant] = []  # those that are being asked
        self._answer: Deferred[bytes] | None = None  # the merged answer, if several are asked

    @property
    def has_objects(self) -> bool:
        """True if a milter has objects, which need all packets of the connection."""
        return bool(self._objects)

    @property
    def manifests(self) -> list[Manifest]:
        """The milters' manifests, in their order."""
        return [milter.manifest for milter in self._milters]

    def agree(self, agreement: Agreement) -> None:
        """Set the result of option negotiation."""
        self._agreement = agreement

    # Questions

    def ask(self, job: Job) -> tuple[list[Job], bytes | Deferred[bytes]]:
        """Submit the job to all milters that it concerns; return their jobs and the answer.

        The answer is reply packets, or a Deferred of them that has not fired.
        """
        self._asked = [milter for milter in self._milters if milter.is_concerned(job)]
        if not self._asked:
            return [], _CONTINUE
        if len(self._milters) == 1:
            return [job], self._ask_only(self._asked[0], job)
        jobs = [job.copy() for _ in self._asked]
        return jobs, self._ask_all(jobs)

    def _ask_only(self, milter: _Participant, job: Job) -> bytes | Deferred[bytes]:
        """Ask the only milter. The session checks its answer and follows what it accepts."""
        try:
            answer = milter.submit(job, self._transcript)
        except JobFailed as error:
            milter.job = None
            return self._answer_by_policy(error, job)
        if isinstance(answer, bytes):
            milter.job = None
            return answer
        return answer.addCallbacks(self._finish_only, self._fail_only, errbackArgs=(job,))

    def _finish_only(self, answer: bytes) -> bytes:
        self._milters[0].job = None
        return answer

    def _fail_only(self, failure: Failure, job: Job) -> bytes:
        self._milters[0].job = None
        return self._answer_by_policy(failure.value, job)

    def _ask_all(self, jobs: list[Job]) -> bytes | Deferred[bytes]:
        awaited = self._answer = Deferred()
        for milter, job in zip(self._asked.copy(), jobs, strict=True):
            try:
                answer = milter.submit(job, self._transcript)
            except JobFailed as error:
                answer = self._answer_by_policy(error, job)
            if self._answer is None:  # submitting this job made another one's answer decide
                break
            if isinstance(answer, bytes):
                decided = self._record_answer(answer, milter, job)
                if decided is not None:
                    return decided
            else:
                answer.addErrback(self._fail_one, job)
                answer.addCallback(self._finish_one, milter, job)
                answer.addErrback(self._fail_all)
        return result_of(awaited)

    def _fail_one(self, failure: Failure, job: Job) -> bytes:
        return self._answer_by_policy(failure.value, job)

    def _finish_one(self, answer: bytes, milter: _Participant, job: Job) -> None:
        awaited = self._answer
        decided = self._record_answer(answer, milter, job)
        if decided is not None and awaited is not None:
            awaited.callback(decided)

    def _fail_all(self, failure: Failure) -> None:
        awaited = self._answer
        self.cancel()
        if awaited is not None:
            awaited.errback(failure)

    def _record_answer(self, answer: bytes, milter: _Participant, job: Job) -> bytes | None:
        """Record one milter's answer; return the answer of all once it is known."""
        milter.job = None
        final, answer = self._check(answer, job)
        milter.answer, milter.held = answer, self._transcript.inflight.claim(len(answer))
        if milter.held is None and len(answer) > SMALL_ANSWER:
            self.log.warn(
                "{about}: no room for an answer of {n} bytes (--max-inflight-bytes)",
                about=job.about,
                n=len(answer),
            )
            final, answer = NO_ROOM[LETTER], NO_ROOM
        if final == ACCEPT:
            milter.accepted = Scope.CLIENT if job.stage in _CLIENT_STAGES else Scope.MESSAGE
        if final not in GO_ON:
            self.cancel()
            return answer
        if any(each.answer is None for each in self._asked):
            return None
        answer = self._merge(job)
        self.cancel()
        return answer

    def _check(self, answer: bytes, job: Job) -> tuple[int, bytes]:
        """Return the final reply's letter and the answer; the policy's if the answer is illegal."""
        assert job.stage is not None  # it was asked
        assert self._agreement is not None  # negotiation comes first
        try:
            return check_replies(job.stage, answer, self._agreement), answer
        except LocalProtocolError as error:
            self.log.error("{about}: {why}; not sent", about=job.about, why=str(error))
            answer = answer_for(error, self._policy, job.stage)
            return answer[LETTER], answer

    def _merge(self, job: Job) -> bytes:
        answers = [milter.answer for milter in self._asked if milter.answer is not None]
        all_accept = all(milter.accepted is not Scope.NONE for milter in self._milters)
        answer, left_out = merge(answers, accept=all_accept)
        if left_out:
            self.log.warn(
                "{about}: more than one milter replaces the body; only the first one's is used, {n}"
                " left out",
                about=job.about,
                n=left_out,
            )
        return answer

    def _answer_by_policy(self, error: BaseException | None, job: Job) -> bytes:
        """Return the policy's verdict for a milter that failed, and log why."""
        assert job.stage is not None  # it was asked
        if not isinstance(error, JobFailed):
            self.log.failure("internal error in dispatch", Failure(error))
        self.log.error(
            "{about} at {stage}: {why}; answered by policy",
            about=job.about,
            stage=job.stage.word,
            why=str(error),
        )
        return answer_for(error, self._policy, job.stage)

    def cancel(self) -> None:
        """Cancel the jobs of the current question; its Deferred does not fire."""
        asked, self._asked = self._asked, []
        self._answer = None
        for milter in asked:
            job, milter.job = milter.job, None
            milter.answer = milter.held = None  # it may be megabytes
            if job is not None:
                milter.executor.cancel(job)
                job.held = None  # an attempt that still runs counts its bytes itself

    # Packets and events between questions

    def store_packet(self, slot: bytes, packet: bytes) -> None:
        """Pass a packet of the connection's part on to the objects."""
        for milter in self._objects:
            assert milter.affinity is not None
            milter.affinity.add_packet(slot, packet)

    def end_message(self) -> None:
        """End the current message: it was answered or dropped."""
        for milter in self._milters:
            if milter.accepted is Scope.MESSAGE:
                milter.accepted = Scope.NONE
            if milter.affinity is not None:
                milter.affinity.end_message()

    def end_client(self, born: float) -> None:
        """End the client's session, which began at `born`; the next client gets new objects."""
        self.cancel()
        self.end_message()
        for milter in self._milters:
            milter.accepted = Scope.NONE
        for milter in self._objects:
            affinity, milter.affinity = milter.affinity, milter.new_affinity()
            assert affinity is not None
            if affinity.exists:
                job = Job(None, b"", b"", queue_id=self._transcript.queue_id, born=born)
                job.manifest, job.milter, job.affinity = milter.manifest, milter.number, affinity
                _end_session(milter, job)
            elif affinity.holder is not None:  # its first job was cancelled
                milter.executor.release(affinity)


def _end_session(milter: _Participant, job: Job) -> None:
    """Submit the end-of-session job of an object; its reply is ignored."""
    affinity = job.affinity
    assert affinity is not None  # it is an object

    def failed(failure: Failure) -> None:
        why = failure.getErrorMessage()
        Milters.log.info("{about} at end of session: {why}", about=job.about, why=why)

    def release(_: object) -> None:
        milter.executor.release(affinity)

    try:
        done = milter.executor.submit(job)
    except JobFailed:
        failed(Failure())
        done = b""
    if isinstance(done, bytes):
        release(done)
    else:
        done.addErrback(failed).addCallback(release)
