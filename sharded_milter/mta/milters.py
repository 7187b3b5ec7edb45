"""The milters of one connection: asked side by side, answered with one voice.

Every milter sees the original message, on whatever shard or in this process. The first refusal
or discard to arrive is the answer, and nobody waits for the others; a milter that accepts is not
asked again about this message, or this client; and changes are made in the order in which the
milters were named, whoever is done first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.dispatch.affinity import Pin
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.policy import Policy, answer_for
from sharded_milter.errors import JobFailed, LocalProtocolError
from sharded_milter.ipc.messages import Memory
from sharded_milter.mta.merge import ACCEPT, GO_ON, merged
from sharded_milter.protocol.answers import check_replies
from sharded_milter.protocol.negotiation import Agreement, Manifest, Pinning
from sharded_milter.protocol.replies import Continue
from sharded_milter.protocol.stages import Protocol as ProtocolBits
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.wire import LETTER

_CONTINUE = Continue().encode()
_CLIENT = frozenset({Stage.CONNECT, Stage.HELO})


class Answers(Protocol):
    """Who answers jobs: dispatch, for the milters in workers."""

    def submit(self, job: Job) -> Deferred[bytes]: ...
    def cancel(self, job: Job) -> None: ...
    def release(self, pin: Pin) -> None: ...


@dataclass(frozen=True)
class Member:
    """A milter as the service knows it: what it wants, who answers for it, by which number."""

    manifest: Manifest
    answers: Answers
    number: int = 0


class Facts(NamedTuple):
    """What all milters are asked about, put together once for all."""

    stage: Stage
    connection: bytes | Memory
    message: bytes | Memory
    about: Callable[[], str]
    key: Callable[[str], bytes]  # by a manifest's shard_by
    client: bytes = b""
    command: bytes | Memory = b""
    refused: bool = False  # a recipient that the MTA itself has refused


Answered = Callable[[Facts, bytes, list[Job]], None]


class _Silence(Enum):
    """How long a milter is not asked any more."""

    NONE = auto()
    MESSAGE = auto()
    CLIENT = auto()


class _Link:
    """A milter's part in one connection."""

    __slots__ = ("answer", "job", "member", "pin", "silence")

    def __init__(self, member: Member) -> None:
        self.member = member
        self.pin = self.new_pin()
        self.silence = _Silence.NONE
        self.job: Job | None = None  # the one that is out, or was last
        self.answer: bytes | None = None  # to the present question

    def new_pin(self) -> Pin | None:
        """For another object, if the milter is one."""
        pinning = self.member.manifest.pinning
        if pinning is Pinning.NONE:
            return None
        return Pin(replayable=pinning is Pinning.REPLAYABLE)

    def is_asked(self, facts: Facts) -> bool:
        manifest = self.member.manifest
        if facts.refused and not manifest.protocol & ProtocolBits.RCPT_REJ:
            return False
        return self.silence is _Silence.NONE and manifest.answers(facts.stage)

    def make_job(self, facts: Facts) -> Job:
        manifest = self.member.manifest
        self.job = Job(
            facts.stage,
            facts.stage in manifest.light,
            facts.connection,
            facts.message,
            facts.about,
            facts.key(manifest.shard_by) if manifest.shard_by else b"",
            facts.client,
            manifest,
            self.member.number,
            self.pin,
            facts.command,
        )
        return self.job


class Chain:
    """Asks the milters of one connection.

    `answered` gets the one answer to each question, with the jobs that it was made of; `lost` is
    called where a defect of ours has lost it.
    """

    log = Logger()

    def __init__(
        self,
        members: Sequence[Member],
        policy: Policy,
        answered: Answered,
        lost: Callable[[], None],
    ) -> None:
        self._facts: Facts | None = None  # what is asked about now
        self._links = [_Link(member) for member in members]
        self._pinned = [link for link in self._links if link.pin is not None]
        self._policy = policy
        self._answered = answered
        self._report_lost = lost
        self._agreement: Agreement | None = None
        self._waiting: list[_Link] = []  # those that are asked now

    @property
    def asked(self) -> Stage | None:
        """The stage that is asked about now."""
        return self._facts.stage if self._facts is not None else None

    @property
    def is_asked(self) -> bool:
        """Whether anything is."""
        return self._facts is not None

    @property
    def has_objects(self) -> bool:
        """Whether a milter is an object, which is told of what happens between questions."""
        return bool(self._pinned)

    @property
    def manifests(self) -> list[Manifest]:
        """What the milters want, in their order."""
        return [link.member.manifest for link in self._links]

    def agree(self, agreement: Agreement) -> None:
        """What was negotiated with the MTA for all of them."""
        self._agreement = agreement

    # Questions

    def ask(self, facts: Facts) -> None:
        """Asks all whom it concerns; the answer may come before this returns."""
        self._facts = facts
        self._waiting = [link for link in self._links if link.is_asked(facts)]
        for link in self._waiting:
            link.answer = None
        if not self._waiting:
            self._finish(_CONTINUE)
        for link in self._waiting.copy():
            if self._facts is not facts:  # one has ended it for all
                break
            job = link.make_job(facts)
            result = link.member.answers.submit(job)
            result.addCallbacks(
                self._take, self._by_policy, callbackArgs=(link, job), errbackArgs=(link, job)
            )
            result.addErrback(self._lost, link, job)

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        self._facts = None
        waiting, self._waiting = self._waiting, []
        for link in waiting:
            job, link.job = link.job, None
            if link.answer is None and job is not None:
                link.member.answers.cancel(job)
            link.answer = None  # it may be megabytes

    def _by_policy(self, failure: Failure, link: _Link, job: Job) -> None:
        """A milter has not answered, so its policy does."""
        if link.job is not job or job.stage is None:
            return  # nobody waits for it
        if not failure.check(JobFailed):
            self.log.failure("dispatch failed", failure)
        self.log.error(
            "{about} at {stage}: {why}; answered by policy",
            about=job.about(),
            stage=job.stage.word,
            why=failure.getErrorMessage(),
        )
        self._take(answer_for(failure.value, self._policy, job.stage), link, job)

    def _take(self, answer: bytes, link: _Link, job: Job) -> None:
        """A milter has answered."""
        if link.job is not job or job.stage is None:
            return
        if len(self._links) == 1:  # the session has its own check, and silences it by itself
            link.answer = answer
            self._finish(answer)
            return
        final, answer = self._checked(answer, job)
        link.answer = answer
        if final == ACCEPT:
            link.silence = _Silence.CLIENT if job.stage in _CLIENT else _Silence.MESSAGE
        if final not in GO_ON:
            self._finish(answer)
        elif all(each.answer is not None for each in self._waiting):
            self._finish(self._merged(job))

    def _checked(self, answer: bytes, job: Job) -> tuple[int, bytes]:
        """The final reply's letter and the answer, or the policy's if it is not legal."""
        assert job.stage is not None  # it was asked
        assert self._agreement is not None  # and that comes after negotiating
        try:
            return check_replies(job.stage, answer, self._agreement), answer
        except LocalProtocolError as error:
            self.log.error("{about}: {why}; not sent", about=job.about(), why=str(error))
            answer = answer_for(error, self._policy, job.stage)
            return answer[LETTER], answer

    def _merged(self, job: Job) -> bytes:
        answers = [link.answer for link in self._waiting if link.answer is not None]
        all_silent = all(link.silence is not _Silence.NONE for link in self._links)
        answer, left_out = merged(answers, accept=all_silent)
        if left_out:
            self.log.warn(
                "{about}: {n} milters want another body besides the first one that does; theirs"
                " is not used",
                about=job.about(),
                n=left_out,
            )
        return answer

    def _finish(self, answer: bytes) -> None:
        facts = self._facts
        assert facts is not None  # whoever ended it first has cancelled the others
        jobs = [link.job for link in self._waiting if link.answer is not None and link.job]
        self.cancel()
        self._answered(facts, answer, jobs)

    def _lost(self, failure: Failure, link: _Link, job: Job) -> None:
        """A defect of ours."""
        self.log.failure("a verdict got lost", failure)
        self.cancel()
        self._report_lost()

    # What objects are told besides

    def learn(self, slot: bytes, packet: bytes) -> None:
        """A packet of the connection's part was kept."""
        for link in self._pinned:
            assert link.pin is not None
            link.pin.learn(slot, packet)

    def message_over(self) -> None:
        """The message in hand is answered or dropped."""
        for link in self._links:
            if link.silence is _Silence.MESSAGE:
                link.silence = _Silence.NONE
            if link.pin is not None:
                link.pin.message_over()

    def client_over(self, about: Callable[[], str]) -> None:
        """The client has left, or the MTA: objects end, and whoever comes gets new ones."""
        self.cancel()
        self.message_over()
        for link in self._links:
            link.silence = _Silence.NONE
        for link in self._pinned:
            pin, link.pin = link.pin, link.new_pin()
            assert pin is not None
            if pin.known:
                self._say_farewell(link.member, pin, about)
            elif pin.place is not None:  # its first job was withdrawn
                link.member.answers.release(pin)

    def _say_farewell(self, member: Member, pin: Pin, about: Callable[[], str]) -> None:
        job = Job(None, False, b"", b"", about, manifest=member.manifest, milter=member.number,
                  pin=pin)  # fmt: skip
        done = member.answers.submit(job)
        done.addErrback(
            lambda failure: self.log.info(
                "{about} at its end: {why}", about=about(), why=failure.getErrorMessage()
            )
        )
        done.addCallback(lambda _: member.answers.release(pin))


def workers_members(manifests: Iterable[Manifest], answers: Answers) -> list[Member]:
    """The milters that the workers serve."""
    return [Member(manifest, answers, number) for number, manifest in enumerate(manifests)]
