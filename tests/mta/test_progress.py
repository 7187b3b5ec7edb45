"""PROGRESS: when an MTA is told that its answer is still being worked on, and when never."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from armed import armed
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from sharded_milter.context import ServerContext
from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.policy import Policy
from sharded_milter.limits import Limits
from sharded_milter.mta.connection import MilterConnection
from sharded_milter.mta.members import worker_members
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, Manifest
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Actions, Protocol

INTERVAL = 5.0
STEP = 0.125  # a binary fraction: a sum of them is exact
CONTINUE = replies.Continue().encode()
PROGRESS = replies.Progress().encode()

POSTFIX = {"v": "Postfix 3.9.0"}
SENDMAIL = {"j": "mx.example.test", "v": "8.17.1.9"}

CLIENT = [commands.Connect("client.example.test", "4", 25, "192.0.2.1")]
GREETED = [*CLIENT, commands.Helo("client.example.test")]
SENDER = [*GREETED, commands.Mail("<sender@example.org>")]
RECIPIENT = [*SENDER, commands.Rcpt("<recipient@example.com>")]
DATA = [*RECIPIENT, commands.Data()]
HEADER = [*DATA, commands.Header("Subject", " hi"), commands.Eoh()]
MESSAGE = [*HEADER, commands.Body(b"text\r\n"), commands.Eom()]
UNKNOWN = [*CLIENT, commands.Unknown("XYZZY")]

BEFORE_THE_END = pytest.mark.parametrize(
    "conversation",
    [CLIENT, GREETED, SENDER, RECIPIENT, DATA, HEADER, UNKNOWN],
    ids=lambda conversation: type(conversation[-1]).__name__,
)


@dataclass
class SlowPool:
    """Answers when it is told to."""

    jobs: list[Job] = field(default_factory=list)
    cancelled: list[Job] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)

    def submit(self, job: Job) -> Deferred[bytes]:
        self.jobs.append(job)
        job.answer = Deferred()
        return job.answer

    def cancel(self, job: Job) -> None:
        self.jobs.remove(job)
        self.cancelled.append(job)

    def release(self, affinity: ObjectAffinity) -> None: ...


class Slow(ServerContext):
    """A milter that answers all stages but header and body."""

    reactor: Any  # a Clock, which the tests advance

    def __init__(self) -> None:
        self.pool = SlowPool()
        limits = Limits(progress_interval=INTERVAL)
        super().__init__(limits, Policy(), Clock(), self.pool.counters)
        manifest = Manifest("slow", Actions(KNOWN_ACTIONS), Protocol.NR_HEADER | Protocol.NR_BODY)
        self.members = worker_members([manifest], self.pool)


class Mta:
    """One conversation up to a command whose job is left unanswered."""

    def __init__(self, macros: dict[str, str], conversation: list[Packet]) -> None:
        self.context = Slow()
        self.transport = StringTransport()
        self.connection = MilterConnection(self.context)
        self.connection.makeConnection(self.transport)  # type: ignore[no-untyped-call]
        self.say(commands.Negotiate(6, KNOWN_ACTIONS, KNOWN_PROTOCOL))
        self.say(commands.Macro("C", tuple(macros.items())))
        for command in conversation:
            self.answer(CONTINUE)
            self.say(command)
        self.transport.clear()

    def say(self, command: Packet) -> None:
        self.connection.dataReceived(command.encode())

    def answer(self, answer: bytes) -> None:
        """The job that is out, if any, gets its verdict."""
        while self.context.pool.jobs:
            awaited = self.context.pool.jobs.pop(0).answer
            assert awaited is not None
            awaited.callback(answer)

    def wait(self, seconds: float) -> bytes:
        """Let the seconds pass; return the packets written since."""
        self.transport.clear()
        self.context.reactor.pump([STEP] * round(seconds / STEP))
        return bytes(self.transport.value())

    def pending(self) -> int:
        """The timers that run, beside that of an idle connection."""
        return len(armed(self.context.reactor)) - 1


@pytest.mark.parametrize("macros", [POSTFIX, SENDMAIL, {}], ids=["postfix", "sendmail", "nobody"])
def test_at_end_of_message_every_mta_gets_progress_at_each_interval(macros: dict[str, str]) -> None:
    mta = Mta(macros, MESSAGE)
    assert mta.wait(INTERVAL - STEP) == b""
    assert mta.wait(STEP) == PROGRESS
    assert mta.wait(3 * INTERVAL) == 3 * PROGRESS


@BEFORE_THE_END
@pytest.mark.parametrize("name", ["v", "{v}"])
def test_before_the_end_postfix_gets_progress(conversation: list[Packet], name: str) -> None:
    mta = Mta({"j": "mx.example.test", name: "Postfix 3.7.11"}, conversation)
    assert mta.wait(2 * INTERVAL) == 2 * PROGRESS


@BEFORE_THE_END
@pytest.mark.parametrize("macros", [SENDMAIL, {}, {"v": "Not Postfix"}], ids=str)
def test_before_the_end_no_other_mta_gets_progress(
    conversation: list[Packet], macros: dict[str, str]
) -> None:
    mta = Mta(macros, conversation)
    assert mta.wait(3 * INTERVAL) == b""
    assert mta.pending() == 0


def test_an_answer_ends_it() -> None:
    mta = Mta(POSTFIX, MESSAGE)
    mta.wait(INTERVAL)
    mta.transport.clear()
    mta.answer(CONTINUE)
    assert mta.transport.value() == CONTINUE
    assert mta.wait(3 * INTERVAL) == b""


def test_the_replies_of_one_answer_are_not_interrupted() -> None:
    mta = Mta(POSTFIX, MESSAGE)
    body = 3 * replies.ReplaceBody(b"x" * 1000).encode()
    mta.wait(INTERVAL - STEP)
    mta.answer(body + CONTINUE)
    assert mta.transport.value() == body + CONTINUE
    assert mta.wait(INTERVAL) == b""


def test_the_next_command_begins_a_new_interval() -> None:
    mta = Mta(POSTFIX, SENDER)
    mta.wait(INTERVAL - 1)
    mta.answer(CONTINUE)
    mta.say(commands.Rcpt("<recipient@example.com>"))
    assert mta.wait(INTERVAL - STEP) == b""
    assert mta.wait(STEP) == PROGRESS


@pytest.mark.parametrize("farewell", [commands.Abort(), commands.Quit()], ids=repr)
def test_after_a_cancelled_question_no_progress_is_sent(farewell: Packet) -> None:
    mta = Mta(POSTFIX, MESSAGE)
    mta.say(farewell)
    assert len(mta.context.pool.cancelled) == 1
    assert mta.wait(3 * INTERVAL) == b""


def test_after_a_lost_connection_no_progress_is_sent() -> None:
    mta = Mta(POSTFIX, MESSAGE)
    mta.connection.connectionLost()
    assert mta.wait(3 * INTERVAL) == b""
    assert armed(mta.context.reactor) == []


def test_who_the_mta_is_holds_for_the_next_client_on_the_connection() -> None:
    mta = Mta(POSTFIX, SENDER)
    mta.answer(CONTINUE)
    mta.say(commands.QuitNc())
    mta.say(CLIENT[0])
    assert mta.wait(INTERVAL) == PROGRESS
