"""A job: one transcript to be answered at one stage by one milter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from twisted.internet.defer import Deferred

from sharded_milter.dispatch.affinity import Pin
from sharded_milter.dispatch.poison import digest
from sharded_milter.ipc.messages import FAREWELL, Memory, Question
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage


class Worker(Protocol):
    """What dispatch needs of a shard."""

    slot: int
    label: Callable[[], str]
    sessions: int

    def serves(self, milter: int, manifest: Manifest) -> bool: ...
    def ask(self, question: Question) -> Any: ...
    def session_over(self) -> None: ...
    def kill(self, reason: str) -> None: ...
    def dump_stacks(self) -> None: ...


@dataclass(eq=False)
class Job:
    """One transcript to be answered at one stage by one milter."""

    stage: Stage | None  # None: the client has left, and nobody waits for an answer
    light: bool
    connection: bytes | Memory
    message: bytes | Memory
    about: Callable[[], str]  # what log lines call it
    key: bytes = b""  # jobs with an equal one go to the same shard
    client: bytes = b""  # who sent the message, as far as a repeat is concerned
    manifest: Manifest | None = None  # what the MTA was told of the milter; None fits any
    milter: int = 0  # its place among those that the workers serve
    pin: Pin | None = None  # where its object of this connection is, if it is one
    command: bytes | Memory = b""  # what is asked about, if it is no part of the transcript
    result: Deferred[bytes] = field(default_factory=Deferred)
    attempts: int = 0
    abandoned: bool = False  # nobody waits for the answer
    shard: Worker | None = None
    submitted: float = 0.0
    started: float = 0.0  # when the worker that answered got it
    slot: int = 0  # whose worker answered; 0 for none
    followers: list[Job] = field(default_factory=list)
    _digest: bytes = b""

    @property
    def letter(self) -> bytes:
        """The letter of the stage, as the wire has it."""
        return FAREWELL if self.stage is None else self.stage.value

    @property
    def place(self) -> Worker | None:
        """The only shard that can do it; None where any can."""
        return self.pin.place if self.pin is not None else None

    def question(self) -> Question:
        """What a worker is asked; where that is an object, all this counts as told."""
        if self.pin is None:
            message = self.command or self.message
            return Question(self.letter, self.connection, message, self.milter)
        return self.pin.question(
            self.letter, self.connection, self.message, self.milter, self.command
        )

    @property
    def size(self) -> int:
        """The bytes of the message's part."""
        return len(self.message) if isinstance(self.message, bytes) else self.message.size

    @property
    def digest(self) -> bytes:
        """What repeats of the message have in common; computed once, when first asked for."""
        if not self._digest:
            with view_of(self.message) as view:
                self._digest = digest(view)
        return self._digest


def view_of(message: bytes | Memory) -> memoryview:
    """The bytes of a message's part."""
    return memoryview(message) if isinstance(message, bytes) else message.view()
