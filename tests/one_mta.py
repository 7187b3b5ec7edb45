"""One MTA connection without a network: the transport, the clock and the pool are recorded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from sharded_milter.context import Home
from sharded_milter.dispatch.affinity import Pin
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.policy import Policy
from sharded_milter.ipc.messages import Memory
from sharded_milter.limits import Limits
from sharded_milter.mta.connection import MilterConnection
from sharded_milter.mta.milters import Member, workers_members
from sharded_milter.protocol import commands
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, Manifest
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import NO_PROTOCOL, Actions, Stage

OFFER = commands.Negotiate(6, KNOWN_ACTIONS, KNOWN_PROTOCOL)
EVERYTHING = Manifest("everything", Actions(KNOWN_ACTIONS & ~Actions.SETSYMLIST), NO_PROTOCOL)


def packed(*packets: Packet) -> bytes:
    return b"".join(packet.encode() for packet in packets)


class Transport(StringTransport):
    """Keeps each write apart, because one write is one segment on a real socket."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)


@dataclass
class RecordedPool:
    """Keeps the jobs until the test answers them; or answers at once with `at_once`."""

    jobs: list[Job] = field(default_factory=list)
    cancelled: list[Job] = field(default_factory=list)
    released: list[Pin] = field(default_factory=list)
    at_once: list[bytes | Exception] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)

    def submit(self, job: Job) -> Deferred[bytes]:
        self.jobs.append(job)
        if self.at_once:
            answer = self.at_once.pop(0)
            return succeed(answer) if isinstance(answer, bytes) else fail(answer)
        return job.result

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job)

    def release(self, pin: Pin) -> None:
        self.released.append(pin)

    @property
    def stages(self) -> list[Stage | None]:
        return [job.stage for job in self.jobs]


class Mta(Home):
    """The MTA's side, and the home of the connection."""

    def __init__(
        self,
        *conversation: Packet,
        manifest: Manifest = EVERYTHING,
        manifests: Sequence[Manifest] = (),
        on_error: str = "tempfail",
        offer: Packet | None = OFFER,
        **limits: Any,
    ) -> None:
        self.manifests = manifests or (manifest,)
        self.pool = RecordedPool()
        super().__init__(Limits(**limits), Policy(on_error), Clock(), self.pool.counters)
        self.transport = Transport()
        self.connection = MilterConnection(self)
        self.connection.makeConnection(self.transport)  # type: ignore[no-untyped-call]
        if offer is not None:
            self.say(offer)
            self.written()
        for command in conversation:
            self.say(command)

    @property
    def members(self) -> list[Member]:
        return workers_members(self.manifests, self.pool)

    def say(self, *packets: Packet) -> None:
        """In one segment."""
        self.connection.dataReceived(packed(*packets))

    def hang_up(self) -> None:
        self.connection.connectionLost()

    @property
    def job(self) -> Job:
        """The latest job."""
        return self.pool.jobs[-1]

    def answer(self, *packets: Packet) -> None:
        """The latest job is answered."""
        self.job.result.callback(packed(*packets))

    def written(self) -> list[bytes]:
        """What was written since the last call, write by write."""
        writes, self.transport.writes = self.transport.writes, []
        return writes

    @property
    def closed(self) -> bool:
        return bool(self.transport.disconnecting)

    @property
    def paused(self) -> bool:
        return bool(self.transport.producerState == "paused")


def transcript_of(job: Job) -> bytes:
    """All that a worker would read."""
    question = job.question()
    return content(question.connection) + content(question.message)


def content(part: bytes | Memory) -> bytes:
    return os.pread(part.fd, part.size, 0) if isinstance(part, Memory) else part
