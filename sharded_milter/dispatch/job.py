"""Jobs and attempts: what is to be answered, and each time that a shard was given it.

A job is one transcript to be answered at one stage by one milter. It owns its attempts:

    queued ──▶ running (one attempt or two) ──▶ done

An attempt is begun when it is the first that its shard has not answered; before that it may be
withdrawn. It ends answered, lost with its shard, superseded (its answer is no longer wanted) or
withdrawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from sharded_milter.alarms import Alarm
from sharded_milter.dispatch.affinity import Affinity
from sharded_milter.dispatch.poison import digest
from sharded_milter.ipc.memory import Memory, view_of
from sharded_milter.ipc.messages import SESSION_END
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.text import quoted

if TYPE_CHECKING:
    from sharded_milter.dispatch.pipeline import Pipeline


class Blame(Enum):
    """Who is to blame when an attempt is lost."""

    MESSAGE = auto()  # it exited, or used up its memory or its time, at work on the message
    PLACE = auto()  # the process was taken away: a stop, an operator's kill, a lost host


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a shard is gone."""

    reason: str
    blame: Blame
    attempt: int = 0  # the one that has had its time, whichever is the first by now


@dataclass(eq=False, slots=True)
class Job:
    """One transcript to be answered at one stage by one milter; times are the reactor's seconds."""

    stage: Stage | None  # None: an object's session is over, and no answer is awaited
    connection: bytes | Memory  # the transcript's two parts
    message: bytes | Memory
    command: bytes | Memory = b""  # what is asked about, if it is no part of the transcript
    queue_id: str = ""
    born: float = 0.0  # when its message began or, before MAIL, its connection
    client: bytes = b""  # who sent the message, as far as a repeat is concerned
    refused: bool = False  # it is about a recipient that the MTA itself has refused
    held: object = None  # what counts its bytes for as long as anything refers to it
    light: bool = False
    key: bytes = b""  # jobs with an equal one prefer the same shard
    manifest: Manifest | None = None  # what the MTA was told of the milter; None fits any
    milter: int = 0  # its place among those that the workers serve
    affinity: Affinity | None = None  # where its object of this connection is, if it is one

    answer: Deferred[bytes] | None = None  # while it is awaited
    attempts: list[Attempt] = field(default_factory=list)  # those that may still answer it
    followers: list[Job] = field(default_factory=list)  # repeats that wait for the same answer
    leader: Job | None = None  # whose answer this one waits for
    blamed: int = 0  # attempts whose process died of it
    solo: bool = False  # its next attempt runs alone in a fresh process
    answer_lost: bool = False  # the master could not take an answer, and asked once more
    done: bool = False
    alarm: Alarm[Job] | None = None  # that is set for its deadline
    entry: int = 0  # of the queue; 0 while it does not wait there
    submitted: float = math.inf  # not yet
    started: float = 0.0  # when the attempt began that has answered it
    slot: int = 0  # whose shard has answered; 0 for none
    _digest: bytes = b""

    def copy(self) -> Job:
        """The same question, for another milter."""
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
        """The letter of the stage, as the wire has it."""
        return SESSION_END if self.stage is None else self.stage.value

    @property
    def about(self) -> str:
        """What log lines call it."""
        return f"qid={quoted(self.queue_id)}" if self.queue_id else "message without queue id"

    @property
    def size(self) -> int:
        """The bytes of the message's part."""
        return len(self.message)

    @property
    def digest(self) -> bytes:
        """What repeats of the message have in common; computed once, when first asked for."""
        if not self._digest:
            with view_of(self.message) as view:
                self._digest = digest(view)
        return self._digest

    def let_go(self) -> None:
        """It is done: its bytes are freed at once, whoever still knows it."""
        self.connection = self.message = self.command = b""
        self.held = None


class Attempt:
    """A job that was given to a shard; `number` names it on the channel.

    The shard has the job's bytes until it has answered, whether the answer is wanted or not: so
    long they count (`held`).
    """

    __slots__ = ("began", "held", "job", "limit", "number", "pipeline", "withdrawn")

    def __init__(self, number: int, job: Job, pipeline: Pipeline) -> None:
        self.number = number
        self.job = job
        self.held = job.held
        self.pipeline = pipeline
        self.began = 0.0  # when it became the first of its shard
        self.withdrawn = False  # its shard was asked not to begin it, and has not answered yet
        self.limit: Any = None  # the delayed call that ends a superseded one


def settled(answer: Deferred[bytes]) -> bytes | Deferred[bytes]:
    """What a Deferred has fired with, returned or raised; the Deferred itself if it has not."""
    if not answer.called:
        return answer
    found: list[bytes | BaseException] = []

    def note(result: bytes | Failure) -> None:
        found.append(result if isinstance(result, bytes) else result.value or result)

    answer.addBoth(note)
    if isinstance(found[0], bytes):
        return found[0]
    raise found[0]
