"""Jobs, and the attempts of shards to answer them.

A job is one transcript to be answered at one stage by one milter. It owns its attempts:

    queued ──▶ running (one attempt or two) ──▶ done

An attempt begins when it is the first that its shard has not answered; before that it can be
withdrawn. It ends answered, lost with its shard, superseded (its answer is no longer wanted) or
withdrawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from sharded_milter.alarms import Alarm, DelayedCall
from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.poison import digest
from sharded_milter.ipc.memory import Memory, view_of
from sharded_milter.ipc.messages import SESSION_END
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.text import quoted

if TYPE_CHECKING:
    from sharded_milter.dispatch.pipeline import Pipeline


class Blame(Enum):
    """The cause of the loss of an attempt."""

    MESSAGE = auto()  # the process exited, or exceeded its memory or time, while scanning it
    PLACE = auto()  # something outside ended the process: a stop, an operator's kill, a lost host


@dataclass(frozen=True, slots=True)
class Loss:
    """The reason for which a shard is gone."""

    reason: str
    blame: Blame
    attempt: int = 0  # the number of the attempt that was past its deadline; 0: none


@dataclass(eq=False, slots=True)
class Job:
    """One transcript to be answered at one stage by one milter; times are the reactor's seconds."""

    stage: Stage | None  # None: an object's end-of-session notice; its reply is ignored
    connection: bytes | Memory  # the transcript's two parts
    message: bytes | Memory
    command: bytes | Memory = b""  # the command, if it is not part of the transcript
    queue_id: str = ""
    born: float = 0.0  # when its message began or, before MAIL, its connection
    client: bytes = b""  # identifies the SMTP client, to recognise its repeats
    refused: bool = False  # the MTA itself has refused the recipient
    held: object = None  # its claim of in-flight bytes, which ends with the last reference
    light: bool = False
    key: bytes = b""  # jobs with equal keys prefer the same shard
    manifest: Manifest | None = None  # as negotiated with the MTA; None matches any
    milter: int = 0  # its index among the milters that the workers serve
    affinity: ObjectAffinity | None = None  # of the milter's object, if the milter is one

    answer: Deferred[bytes] | None = None  # None: not submitted yet, answered or cancelled
    attempts: list[Attempt] = field(default_factory=list)  # that may still answer it
    followers: list[Job] = field(default_factory=list)  # repeats that wait for its answer
    leader: Job | None = None  # the job whose answer this one waits for
    blamed: int = 0  # attempts that have killed their process
    solo: bool = False  # its next attempt runs alone in a fresh process
    answer_lost: bool = False  # the master could not take its answer, and has retried once
    done: bool = False
    alarm: Alarm[Job] | None = None  # set for its deadline
    entry: int = 0  # its number in the queue; 0 if it is not there
    submitted: float = math.inf  # infinite: not yet
    started: float = 0.0  # when the attempt that answered it began
    slot: int = 0  # of the shard that answered; 0: none
    _digest: bytes = b""

    def copy(self) -> Job:
        """Return a new job with the same input, for another milter."""
        return Job(
            self.stage,
            self.connection,
            self.message,
            self.command,
            self.queue_id,
            self.born,
            self.client,
            self.refused,
            self.held,
        )

    @property
    def letter(self) -> bytes:
        """The stage's letter in the milter protocol, or SESSION_END."""
        return SESSION_END if self.stage is None else self.stage.value

    @property
    def about(self) -> str:
        """The job's name in log lines."""
        return f"qid={quoted(self.queue_id)}" if self.queue_id else "message without queue id"

    @property
    def size(self) -> int:
        """The size of the transcript's message part, bytes."""
        return len(self.message)

    @property
    def digest(self) -> bytes:
        """The digest of the message, equal for its repeats; computed once, on first use."""
        if not self._digest:
            with view_of(self.message) as view:
                self._digest = digest(view)
        return self._digest

    def free(self) -> None:
        """Free the bytes of a finished job at once, even while other objects refer to it."""
        self.connection = self.message = self.command = b""
        self.held = None


class Attempt:
    """A job that was given to a shard once; `number` identifies it on the channel.

    The shard has the job's bytes until it answers, even if the answer is no longer wanted; they
    count as in-flight bytes (`held`) until then.
    """

    __slots__ = ("began", "deadline_call", "held", "job", "number", "pipeline", "withdrawn")

    def __init__(self, number: int, job: Job, pipeline: Pipeline) -> None:
        self.number = number
        self.job = job
        self.held = job.held
        self.pipeline = pipeline
        self.began = 0.0  # the reactor's time when it became the first of its shard
        self.withdrawn = False  # the shard was asked not to begin it, and has not answered yet
        self.deadline_call: DelayedCall | None = None  # kills a shard whose answer is not awaited


def result_of(answer: Deferred[bytes]) -> bytes | Deferred[bytes]:
    """Return or raise the result of a Deferred; return the Deferred itself if it has not fired."""
    if not answer.called:
        return answer
    found: list[bytes | BaseException] = []

    def note(result: bytes | Failure) -> None:
        found.append(result if isinstance(result, bytes) else result.value or result)

    answer.addBoth(note)
    if isinstance(found[0], bytes):
        return found[0]
    raise found[0]
