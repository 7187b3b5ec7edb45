"""One MTA connection without a network: the transport, the clock and the pool are recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel

from sharded_milter.context import ServerContext
from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.policy import Policy
from sharded_milter.ipc.memory import Memory, view_of
from sharded_milter.limits import Limits
from sharded_milter.mta.connection import MilterConnection
from sharded_milter.mta.members import Member, worker_members
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, Manifest
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import NO_PROTOCOL, Actions, Protocol, Stage

OFFER = commands.Negotiate(6, KNOWN_ACTIONS, KNOWN_PROTOCOL)
EVERYTHING = Manifest("everything", Actions(KNOWN_ACTIONS & ~Actions.SETSYMLIST), NO_PROTOCOL)

CONTINUE = replies.Continue()
TEMPFAIL = replies.TempFail()
CLIENT = commands.Connect("client", "4", 25, "192.0.2.1")
HELO = commands.Helo("client")
QUEUE_ID = commands.Macro("M", (("i", "4F1"),))
MAIL = commands.Mail("<a@example.org>")
RCPT = commands.Rcpt("<b@example.net>")
OTHER_RCPT = commands.Rcpt("<c@example.net>")
DATA = commands.Data()
SUBJECT = commands.Header("Subject", " hi")
EOH = commands.Eoh()
BODY = commands.Body(b"text\r\n")
EOM = commands.Eom()
ABORT, QUIT, QUIT_NC = commands.Abort(), commands.Quit(), commands.QuitNc()
UNKNOWN = commands.Unknown("XYZZY")

ENVELOPE = [QUEUE_ID, MAIL, RCPT, DATA]
MESSAGE = [*ENVELOPE, SUBJECT, EOH, BODY, EOM]

#: Asked at the end of a message only; all else is seen and goes unanswered.
NO_REPLIES = Protocol(sum(bit for name, bit in Protocol.__members__.items()
                          if name.startswith("NR_") and name != "NR_EOM"))  # fmt: skip
AT_THE_END = Manifest("end", EVERYTHING.actions, NO_REPLIES)
#: An MTA that cannot leave its commands unanswered.
OLD_OFFER = commands.Negotiate(2, 0x3F, 0x7F)


def packed(*packets: Packet) -> bytes:
    return b"".join(packet.encode() for packet in packets)


class Transport(StringTransport):
    """Keeps each write apart, because one write is one segment on a real socket."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writes: list[bytes] = []
        self.aborted = False

    def abortConnection(self) -> None:
        self.aborted = True

    def write(self, data: bytes) -> None:
        self.writes.append(data)


@dataclass
class RecordedPool:
    """Keeps the jobs until the test answers them; `at_once` is returned or raised instead."""

    jobs: list[Job] = field(default_factory=list)
    cancelled: list[Job] = field(default_factory=list)
    released: list[ObjectAffinity] = field(default_factory=list)
    at_once: list[bytes | Exception] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)
    clock: Clock = field(default_factory=Clock)

    def submit(self, job: Job) -> bytes | Deferred[bytes]:
        self.jobs.append(job)
        job.submitted = self.clock.seconds()
        if self.at_once:
            answer = self.at_once.pop(0)
            if isinstance(answer, bytes):
                return answer
            raise answer
        job.answer = Deferred()
        return job.answer

    def answer(self, job: Job, answer: bytes | Exception) -> None:
        """Answer a job, or let it fail; ignored if it was cancelled."""
        awaited, job.answer = job.answer, None
        if awaited is None:
            return
        if isinstance(answer, Exception):
            awaited.errback(answer)
        else:
            awaited.callback(answer)

    def cancel(self, job: Job) -> None:
        job.answer = None
        self.cancelled.append(job)

    def release(self, affinity: ObjectAffinity) -> None:
        self.released.append(affinity)

    @property
    def stages(self) -> list[Stage | None]:
        return [job.stage for job in self.jobs]


def received(connection: MilterConnection, data: bytes) -> None:
    """Let a transport of ours receive the data."""

    def receive(room: memoryview) -> int:
        nonlocal data
        piece, data = data[: len(room)], data[len(room) :]
        room[: len(piece)] = piece
        return len(piece)

    while data:
        connection.fill(receive)
        connection.filled()


class Mta(ServerContext):
    """The MTA's side, and the context of the connection."""

    reactor: Any  # a Clock, which the tests advance

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
        super().__init__(Limits(**limits), Policy(on_error), self.pool.clock, self.pool.counters)
        self.transport = Transport()
        self._is_ours = False
        self.connection = MilterConnection(self)
        self.connection.makeConnection(self.transport)  # type: ignore[no-untyped-call]
        if offer is not None:
            self.say(offer)
            self.written()
        for command in conversation:
            self.say(command)

    @property
    def members(self) -> list[Member]:
        return worker_members(self.manifests, self.pool)

    def say(self, *packets: Packet) -> None:
        """Send the packets in one segment, by way of a transport of ours and Twisted's in turns."""
        self._is_ours = not self._is_ours
        if self._is_ours:
            received(self.connection, packed(*packets))
        else:
            self.connection.dataReceived(packed(*packets))

    def hang_up(self) -> None:
        self.connection.connectionLost()

    @property
    def job(self) -> Job:
        """The latest job."""
        return self.pool.jobs[-1]

    def answer(self, *packets: Packet) -> None:
        """Answer the latest job."""
        self.pool.answer(self.job, packed(*packets))

    def fail(self, error: Exception) -> None:
        """Let the latest job fail."""
        self.pool.answer(self.job, error)

    def written(self) -> list[bytes]:
        """Return the writes since the last call."""
        writes, self.transport.writes = self.transport.writes, []
        return writes

    @property
    def closed(self) -> bool:
        return bool(self.transport.disconnecting)

    @property
    def aborted(self) -> bool:
        return self.transport.aborted

    @property
    def paused(self) -> bool:
        return bool(self.transport.producerState == "paused")


def transcript_of(job: Job) -> bytes:
    """Return the transcript that a worker reads."""
    return content(job.connection) + content(job.command or job.message)


def content(part: bytes | Memory) -> bytes:
    return bytes(view_of(part))


def at_the_end(*conversation: Packet, **options: Any) -> Mta:
    """Return an MTA with a client; the milter is asked at end of message only."""
    return Mta(CLIENT, HELO, *conversation, manifest=AT_THE_END, **options)


def lines(events: Any, level: LogLevel = LogLevel.info) -> list[str]:
    """Return the lines of one level."""
    return [event["log_format"].format(**event) for event in events if event["log_level"] == level]
