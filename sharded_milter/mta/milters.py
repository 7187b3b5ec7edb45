"""The milters of one connection: asked side by side, answered with one voice.

Every milter sees the original message, on whatever shard or in this process. The first refusal
or discard to arrive is the answer, and the others are cancelled; a milter that accepts is not
asked again about this message, or this client; and changes are made in the order in which the
milters were named, whichever is done first. A milter that fails is answered for by policy, here.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.dispatch.affinity import Affinity
from sharded_milter.dispatch.job import Job, settled
from sharded_milter.dispatch.policy import NO_ROOM, Policy, answer_for
from sharded_milter.errors import JobFailed, LocalProtocolError
from sharded_milter.mta.inflight import SMALL_ANSWER, Claim
from sharded_milter.mta.members import Member
from sharded_milter.mta.merge import ACCEPT, GO_ON, merged
from sharded_milter.mta.transcript import Transcript
from sharded_milter.protocol.answers import check_replies
from sharded_milter.protocol.negotiation import Agreement, Manifest, SessionAffinity
from sharded_milter.protocol.replies import Continue
from sharded_milter.protocol.stages import Protocol as ProtocolBits
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.wire import LETTER

_CONTINUE = Continue().encode()
_CLIENT = frozenset({Stage.CONNECT, Stage.HELO})


class _Silence(Enum):
    """How long a milter is not asked any more."""

    NONE = auto()
    MESSAGE = auto()
    CLIENT = auto()


class _Milter:
    """A milter's part in one connection."""

    __slots__ = ("affinity", "answer", "held", "job", "manifest", "number", "server", "silence")

    def __init__(self, member: Member) -> None:
        self.manifest = member.manifest
        self.server = member.server
        self.number = member.number
        self.affinity = self.new_affinity()
        self.silence = _Silence.NONE
        self.job: Job | None = None  # the one that is out
        self.answer: bytes | None = None  # to the present question
        self.held: Claim | None = None  # counts the answer while others are awaited

    def new_affinity(self) -> Affinity | None:
        """For another object, if the milter is one."""
        affinity = self.manifest.affinity
        if affinity is SessionAffinity.NONE:
            return None
        return Affinity(replayable=affinity is SessionAffinity.REPLAYABLE)

    def is_asked(self, job: Job) -> bool:
        if job.refused and not self.manifest.protocol & ProtocolBits.RCPT_REJ:
            return False
        return self.silence is _Silence.NONE and job.stage in self.manifest.answered

    def submit(self, job: Job, transcript: Transcript) -> bytes | Deferred[bytes]:
        """Submits the job as this milter's."""
        manifest = self.manifest
        job.manifest, job.milter, job.affinity = manifest, self.number, self.affinity
        job.light = job.stage in manifest.light
        if manifest.shard_by:
            job.key = transcript.key(manifest.shard_by)
        self.job, self.answer, self.held = job, None, None
        return self.server.submit(job)


class Milters:
    """Asks the milters of one connection."""

    log = Logger()

    def __init__(self, members: Sequence[Member], policy: Policy, transcript: Transcript) -> None:
        self._milters = [_Milter(member) for member in members]
        self._objects = [milter for milter in self._milters if milter.affinity is not None]
        self._policy = policy
        self._transcript = transcript
        self._agreement: Agreement | None = None
        self._asked: list[_Milter] = []  # those that are asked now
        self._answer: Deferred[bytes] | None = None  # that of all, where several are asked

    @property
    def has_objects(self) -> bool:
        """Whether a milter is an object, which is told of what happens between questions."""
        return bool(self._objects)

    @property
    def manifests(self) -> list[Manifest]:
        """What the milters want, in their order."""
        return [milter.manifest for milter in self._milters]

    def agree(self, agreement: Agreement) -> None:
        """What was negotiated with the MTA for all of them."""
        self._agreement = agreement

    # Questions

    def ask(self, job: Job) -> tuple[list[Job], bytes | Deferred[bytes]]:
        """Asks all whom a job's question concerns: their jobs, and the one answer.

        The answer is reply packets, or a Deferred of them that has not fired.
        """
        self._asked = [milter for milter in self._milters if milter.is_asked(job)]
        if not self._asked:
            return [], _CONTINUE
        if len(self._milters) == 1:
            return [job], self._ask_only(self._asked[0], job)
        jobs = [job.copy() for _ in self._asked]
        return jobs, self._ask_all(jobs)

    def _ask_only(self, milter: _Milter, job: Job) -> bytes | Deferred[bytes]:
        """Asks the only milter: the session checks the answer, and knows when it is silent."""
        try:
            answer = milter.submit(job, self._transcript)
        except JobFailed as error:
            milter.job = None
            return self._by_policy(error, job)
        if isinstance(answer, bytes):
            milter.job = None
            return answer
        return answer.addCallbacks(self._only_answered, self._only_failed, errbackArgs=(job,))

    def _only_answered(self, answer: bytes) -> bytes:
        self._milters[0].job = None
        return answer

    def _only_failed(self, failure: Failure, job: Job) -> bytes:
        self._milters[0].job = None
        return self._by_policy(failure.value, job)

    def _ask_all(self, jobs: list[Job]) -> bytes | Deferred[bytes]:
        awaited = self._answer = Deferred()
        for milter, job in zip(self._asked.copy(), jobs, strict=True):
            try:
                answer = milter.submit(job, self._transcript)
            except JobFailed as error:
                answer = self._by_policy(error, job)
            if self._answer is None:  # by asking this one another has been brought to decide
                break
            if isinstance(answer, bytes):
                decided = self._note(answer, milter, job)
                if decided is not None:
                    return decided
            else:
                answer.addErrback(self._one_failed, job)
                answer.addCallback(self._one_answered, milter, job)
                answer.addErrback(self._defect)
        return settled(awaited)

    def _one_failed(self, failure: Failure, job: Job) -> bytes:
        return self._by_policy(failure.value, job)

    def _one_answered(self, answer: bytes, milter: _Milter, job: Job) -> None:
        awaited = self._answer
        decided = self._note(answer, milter, job)
        if decided is not None and awaited is not None:
            awaited.callback(decided)

    def _defect(self, failure: Failure) -> None:
        awaited = self._answer
        self.cancel()
        if awaited is not None:
            awaited.errback(failure)

    def _note(self, answer: bytes, milter: _Milter, job: Job) -> bytes | None:
        """Notes one milter's answer; returns that of all once it is known."""
        milter.job = None
        final, answer = self._checked(answer, job)
        milter.answer, milter.held = answer, self._transcript.inflight.claim(len(answer))
        if milter.held is None and len(answer) > SMALL_ANSWER:
            self.log.warn(
                "{about}: there is no room for an answer of {n} bytes",
                about=job.about,
                n=len(answer),
            )
            final, answer = NO_ROOM[LETTER], NO_ROOM
        if final == ACCEPT:
            milter.silence = _Silence.CLIENT if job.stage in _CLIENT else _Silence.MESSAGE
        if final not in GO_ON:
            self.cancel()
            return answer
        if any(each.answer is None for each in self._asked):
            return None
        answer = self._merged(job)
        self.cancel()
        return answer

    def _checked(self, answer: bytes, job: Job) -> tuple[int, bytes]:
        """The final reply's letter and the answer, or the policy's if it is not legal."""
        assert job.stage is not None  # it was asked
        assert self._agreement is not None  # and that comes after negotiating
        try:
            return check_replies(job.stage, answer, self._agreement), answer
        except LocalProtocolError as error:
            self.log.error("{about}: {why}; not sent", about=job.about, why=str(error))
            answer = answer_for(error, self._policy, job.stage)
            return answer[LETTER], answer

    def _merged(self, job: Job) -> bytes:
        answers = [milter.answer for milter in self._asked if milter.answer is not None]
        all_silent = all(milter.silence is not _Silence.NONE for milter in self._milters)
        answer, left_out = merged(answers, accept=all_silent)
        if left_out:
            self.log.warn(
                "{about}: {n} milters want another body besides the first one that does; theirs"
                " is not used",
                about=job.about,
                n=left_out,
            )
        return answer

    def _by_policy(self, error: BaseException | None, job: Job) -> bytes:
        """A milter has not answered, so the policy does."""
        assert job.stage is not None  # it was asked
        if not isinstance(error, JobFailed):
            self.log.failure("dispatch failed", Failure(error))
        self.log.error(
            "{about} at {stage}: {why}; answered by policy",
            about=job.about,
            stage=job.stage.word,
            why=str(error),
        )
        return answer_for(error, self._policy, job.stage)

    def cancel(self) -> None:
        """The answer is not wanted any more; its Deferred does not fire."""
        asked, self._asked = self._asked, []
        self._answer = None
        for milter in asked:
            job, milter.job = milter.job, None
            milter.answer = milter.held = None  # it may be megabytes
            if job is not None:
                milter.server.cancel(job)
                job.held = None  # whoever is still at work on it counts its bytes

    # What objects are told besides

    def learn(self, slot: bytes, packet: bytes) -> None:
        """A packet of the connection's part was kept."""
        for milter in self._objects:
            assert milter.affinity is not None
            milter.affinity.learn(slot, packet)

    def message_over(self) -> None:
        """The message in hand is answered or dropped."""
        for milter in self._milters:
            if milter.silence is _Silence.MESSAGE:
                milter.silence = _Silence.NONE
            if milter.affinity is not None:
                milter.affinity.message_over()

    def client_over(self, born: float) -> None:
        """The client, who came at `born`, has left: objects end, the next client gets new ones."""
        self.cancel()
        self.message_over()
        for milter in self._milters:
            milter.silence = _Silence.NONE
        for milter in self._objects:
            affinity, milter.affinity = milter.affinity, milter.new_affinity()
            assert affinity is not None
            if affinity.exists:
                job = Job(None, b"", b"", queue_id=self._transcript.queue_id, born=born)
                job.manifest, job.milter, job.affinity = milter.manifest, milter.number, affinity
                _end_session(milter, job)
            elif affinity.holder is not None:  # its first job was cancelled
                milter.server.release(affinity)


def _end_session(milter: _Milter, job: Job) -> None:
    """Tells an object that its session is over."""
    affinity = job.affinity
    assert affinity is not None  # it is an object

    def failed(failure: Failure) -> None:
        why = failure.getErrorMessage()
        Milters.log.info("{about} at its end: {why}", about=job.about, why=why)

    def release(_: object) -> None:
        milter.server.release(affinity)

    try:
        done = milter.server.submit(job)
    except JobFailed:
        failed(Failure())
        done = b""
    if isinstance(done, bytes):
        release(done)
    else:
        done.addErrback(failed).addCallback(release)
