"""One MTA connection: an answer to each command, in order, and nothing else."""

from __future__ import annotations

import socket
from typing import Any, cast

import pytest
from one_mta import (
    ABORT,
    BODY,
    CLIENT,
    CONTINUE,
    DATA,
    EOH,
    EOM,
    EVERYTHING,
    HELO,
    MAIL,
    MESSAGE,
    NO_REPLIES,
    OFFER,
    OLD_OFFER,
    QUIT,
    RCPT,
    SUBJECT,
    TEMPFAIL,
    UNKNOWN,
    Mta,
    at_the_end,
    content,
    lines,
    packed,
)
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.dispatch.policy import BUSY
from sharded_milter.errors import CallbackFailed, Overloaded
from sharded_milter.mta.connection import MilterConnection, _quick_ack_setter
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import NO_ACTIONS, Protocol, Stage
from sharded_milter.protocol.wire import frame

# Answers

DEFECT = "closing a connection: no verdict because of an internal error"


def test_an_offer_is_answered_with_what_was_agreed() -> None:
    mta = Mta(offer=None)
    mta.say(OFFER)
    reply = commands.Negotiate(6, EVERYTHING.actions, 0)
    assert mta.written() == [packed(reply)]


def test_every_command_is_asked_about_in_order_and_answered_once() -> None:
    mta = Mta()
    conversation = [CLIENT, HELO, MAIL, RCPT, DATA, SUBJECT, EOH, BODY, EOM, UNKNOWN]
    for command in conversation:
        mta.say(command)
        assert mta.written() == []
        mta.answer(CONTINUE)
        assert mta.written() == [packed(CONTINUE)]
    wanted = [Stage(command.letter) for command in conversation]
    assert mta.pool.stages == wanted


def test_commands_that_come_at_once_are_asked_about_one_after_the_other() -> None:
    mta = Mta()
    mta.say(CLIENT, HELO, MAIL, RCPT)
    for number, stage in enumerate([Stage.CONNECT, Stage.HELO, Stage.MAIL, Stage.RCPT], 1):
        assert (len(mta.pool.jobs), mta.job.stage) == (number, stage)
        mta.answer(CONTINUE)
    assert mta.written() == [packed(CONTINUE)] * 4


def test_what_no_milter_cares_for_is_answered_in_one_write() -> None:
    mta = at_the_end(offer=OLD_OFFER)
    mta.written()
    mta.say(MAIL, RCPT, SUBJECT, EOH, BODY, EOM)
    assert mta.written() == [packed(*[CONTINUE] * 5)]
    mta.answer(replies.Accept())
    assert mta.written() == [packed(replies.Accept())]


def test_what_is_agreed_to_go_unanswered_is_not_answered() -> None:
    mta = at_the_end(*MESSAGE)
    assert mta.written() == []
    mta.answer(replies.Accept())
    assert mta.written() == [packed(replies.Accept())]


def test_commands_behind_a_job_are_answered_together_with_it() -> None:
    mta = at_the_end(*MESSAGE[:-1], offer=OLD_OFFER)
    mta.written()
    mta.say(EOM, MAIL, RCPT)
    assert mta.written() == []
    mta.answer(replies.Accept())
    assert mta.written() == [packed(replies.Accept(), CONTINUE, CONTINUE)]


def test_an_answer_at_once_keeps_its_place() -> None:
    mta = Mta(manifest=Manifest("helo", NO_ACTIONS, NO_REPLIES & ~Protocol.NR_HELO),
              offer=OLD_OFFER)  # fmt: skip
    mta.pool.at_once = [packed(TEMPFAIL), Overloaded("full")]
    mta.say(CLIENT, HELO, HELO, MAIL)
    assert mta.written() == [packed(CONTINUE, TEMPFAIL) + BUSY + packed(CONTINUE)]


def test_many_answers_at_once_do_not_pile_up_on_the_stack() -> None:
    mta = Mta(CLIENT)
    mta.answer(CONTINUE)
    mta.written()
    mta.pool.at_once = [packed(CONTINUE)] * 5000
    mta.say(*[HELO] * 5000)
    assert mta.written() == [packed(CONTINUE) * 5000]


def test_it_does_not_matter_how_the_bytes_arrive() -> None:
    mta = at_the_end()
    for byte in packed(*MESSAGE):
        mta.connection.dataReceived(bytes([byte]))
    assert content(mta.job.message) == packed(*MESSAGE)
    mta.answer(CONTINUE)
    assert mta.written() == [packed(CONTINUE)]


# Reading


def test_reading_pauses_while_too_much_waits_and_resumes_when_it_is_worked_off() -> None:
    mta = Mta(CLIENT, max_waiting=100)
    mta.say(commands.Helo("x" * 80))
    assert not mta.paused
    mta.say(commands.Helo("x" * 80))
    assert mta.paused
    mta.answer(CONTINUE)
    assert not mta.paused
    assert mta.pool.stages == [Stage.CONNECT, Stage.HELO]


def test_reading_resumes_when_the_job_is_cancelled() -> None:
    mta = at_the_end(*MESSAGE, max_waiting=100)
    mta.say(commands.Body(b"x" * 200))
    assert mta.paused
    mta.say(ABORT)
    assert mta.closed  # BODY is not legal here: it was taken up and refused


def test_what_a_job_has_is_not_kept_a_second_time() -> None:
    mta = at_the_end(*MESSAGE)
    assert mta.connection._framer.buffer == b""
    mta.say(commands.Mail("<next>"), commands.Abort())
    assert mta.pool.cancelled == [mta.job]
    assert mta.connection._framer.buffer == b""


def test_a_tcp_connection_does_not_wait_to_fill_its_segments() -> None:
    from twisted.internet.interfaces import ITCPTransport
    from zope.interface import directlyProvides

    class Tcp(StringTransport):
        def setTcpNoDelay(self, enabled: bool) -> None:
            self.no_delay = enabled

        def getHandle(self) -> Any:
            return self

        acknowledged = 0

        def setsockopt(self, level: int, option: int, value: int) -> None:
            assert (level, option, value) == (socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            self.acknowledged += 1
            if self.acknowledged == 3:
                raise OSError(107, "not connected")

    tcp = Tcp()  # type: ignore[no-untyped-call]
    directlyProvides(tcp, ITCPTransport)
    connection = MilterConnection(Mta())
    connection.makeConnection(tcp)  # type: ignore[no-untyped-call]
    assert tcp.no_delay
    assert tcp.acknowledged == 1
    for _ in range(2):  # the kernel forgets it, and a connection may be lost meanwhile
        connection.dataReceived(packed(OFFER)[:2])
    assert tcp.acknowledged == 3


# Bad MTAs


@pytest.mark.parametrize(
    "garbage",
    [b"\0" * 4, b"\xff" * 4, b"GET / HTTP/1.0\r\n", frame(b"\0"), packed(OFFER), frame(b"M")],
    ids=repr,
)
def test_who_does_not_speak_the_protocol_is_left(garbage: bytes) -> None:
    mta = at_the_end(offer=OLD_OFFER)
    mta.written()
    with capturedLogs() as events:
        mta.connection.dataReceived(garbage)
    assert mta.closed
    assert mta.written() == []
    assert [line.partition(":")[0] for line in lines(events, LogLevel.warn)] == [
        "closing a connection"
    ]


def test_what_came_before_the_garbage_is_answered() -> None:
    mta = at_the_end(offer=OLD_OFFER)
    mta.written()
    mta.connection.dataReceived(packed(MAIL, RCPT) + frame(b"?"))
    assert mta.written() == [packed(CONTINUE, CONTINUE)]
    assert mta.closed


def test_garbage_behind_a_job_ends_the_connection_when_its_turn_comes() -> None:
    mta = at_the_end(*MESSAGE)
    mta.connection.dataReceived(frame(b"?"))
    assert not mta.closed
    mta.answer(CONTINUE)
    assert mta.written() == [packed(CONTINUE)]
    assert mta.closed


def test_a_stream_that_cannot_be_cut_ends_the_connection_and_the_job() -> None:
    mta = at_the_end(*MESSAGE)
    mta.connection.dataReceived(b"\xff\xff\xff\xff")
    assert mta.closed
    assert mta.pool.cancelled == [mta.job]
    mta.answer(CONTINUE)
    assert mta.written() == []


def test_after_the_end_nothing_is_taken_any_more() -> None:
    mta = at_the_end(QUIT)
    mta.say(*MESSAGE)
    assert mta.pool.jobs == []
    assert mta.written() == []


# Failures


@pytest.mark.parametrize("stage", range(1, 10))
def test_a_failed_job_is_answered_by_policy_at_every_stage(stage: int) -> None:
    mta = Mta()
    conversation = [CLIENT, HELO, MAIL, RCPT, DATA, SUBJECT, EOH, BODY, EOM]
    for command in conversation[:stage]:
        mta.say(command)
        if command is not conversation[stage - 1]:
            mta.answer(CONTINUE)
    mta.written()
    with capturedLogs() as events:
        mta.fail(CallbackFailed("ValueError: bad"))
    assert mta.written() == [packed(TEMPFAIL)]
    assert mta.job.stage is not None
    word = mta.job.stage.word
    assert lines(events, LogLevel.error) == [
        f"message without queue id at {word}: ValueError: bad; answered by policy"
    ]


def test_an_overload_has_a_reply_of_its_own() -> None:
    mta = at_the_end(*MESSAGE, on_error="accept")
    mta.fail(Overloaded("full"))
    assert mta.written() == [BUSY]


def test_a_defect_of_the_pool_is_logged_with_its_traceback_and_answered() -> None:
    mta = at_the_end(*MESSAGE)
    with capturedLogs() as events:
        mta.fail(ZeroDivisionError("ours"))
    assert mta.written() == [packed(TEMPFAIL)]
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [
        ZeroDivisionError
    ]


def test_a_defect_of_ours_ends_the_connection_instead_of_silence() -> None:
    mta = at_the_end(*MESSAGE)
    nonsense: Any = 5
    with capturedLogs() as events:
        mta.pool.answer(mta.job, nonsense)
    assert mta.closed
    assert [event["log_format"] for event in events] == [DEFECT]


def test_a_defect_in_what_is_asked_next_ends_the_connection_too() -> None:
    mta = Mta(CLIENT, HELO)
    mta.pool.at_once = [ZeroDivisionError("ours")]
    with capturedLogs() as events:
        mta.answer(CONTINUE)
    assert mta.closed
    assert [event["log_format"] for event in events] == [DEFECT]


def test_where_the_kernel_has_no_quick_acknowledgements_none_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(socket, "TCP_QUICKACK")
    assert _quick_ack_setter(cast("Any", None)) is None
