"""The ends of a connection: the MTA leaves, is silent, does not read, or the service stops."""

from __future__ import annotations

import pytest
from armed import armed
from one_mta import (
    ABORT,
    AT_THE_END,
    CLIENT,
    CONTINUE,
    EOM,
    HELO,
    MAIL,
    MESSAGE,
    OLD_OFFER,
    QUIT,
    QUIT_NC,
    RCPT,
    Mta,
    at_the_end,
    content,
    lines,
    packed,
)
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.dispatch.policy import STOPPING
from sharded_milter.errors import WorkerLost
from sharded_milter.mta.connection import CLOSE_GRACE
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Stage

# Leaving


@pytest.mark.parametrize("leaving", [ABORT, QUIT, QUIT_NC], ids=repr)
def test_abort_or_quit_cancels_the_job_and_a_late_answer_is_dropped(leaving: Packet) -> None:
    mta = at_the_end(*MESSAGE)
    mta.say(leaving)
    assert mta.pool.cancelled == [mta.job]
    mta.answer(replies.Reject())
    assert mta.written() == []
    assert mta.closed == (leaving is QUIT)


@pytest.mark.parametrize("leaving", [ABORT, QUIT, QUIT_NC], ids=repr)
def test_abort_or_quit_in_the_segment_of_the_question_cancels_it_too(leaving: Packet) -> None:
    mta = at_the_end(*MESSAGE[:-1])
    mta.say(EOM, leaving)
    assert mta.pool.stages == [Stage.EOM]
    assert mta.pool.cancelled == [mta.job]
    assert mta.written() == []
    assert mta.closed == (leaving is QUIT)


def test_an_incomplete_abort_or_quit_takes_effect_when_it_is_complete() -> None:
    mta = at_the_end(*MESSAGE[:-1])
    conversation = packed(EOM, ABORT)
    mta.connection.dataReceived(conversation[:-1])
    assert mta.pool.cancelled == []
    mta.connection.dataReceived(conversation[-1:])
    assert mta.pool.cancelled == [mta.job]


def test_a_late_failure_is_dropped_too() -> None:
    mta = at_the_end(*MESSAGE, ABORT)
    with capturedLogs() as events:
        mta.fail(WorkerLost("died"))
    assert mta.written() == []
    assert lines(events, LogLevel.warn) == []


def test_a_lost_connection_cancels_the_job() -> None:
    mta = at_the_end(*MESSAGE)
    mta.hang_up()
    assert mta.pool.cancelled == [mta.job]
    mta.answer(CONTINUE)
    assert mta.written() == []
    assert mta.connections == []
    assert armed(mta.reactor) == []


def test_after_an_abort_the_next_message_is_a_new_one() -> None:
    mta = at_the_end(*MESSAGE, ABORT, *MESSAGE)
    assert len(mta.pool.jobs) == 2
    assert content(mta.job.message) == packed(*MESSAGE)
    mta.answer(CONTINUE)
    assert mta.written() == [packed(CONTINUE)]


def test_an_abort_after_the_answer_gets_no_reply() -> None:
    mta = at_the_end(*MESSAGE)
    mta.answer(CONTINUE)
    mta.written()
    mta.say(ABORT, ABORT, QUIT)
    assert mta.written() == []
    assert mta.pool.cancelled == []
    assert mta.closed


def test_commands_that_waited_before_an_abort_are_still_taken() -> None:
    mta = Mta(CLIENT)
    mta.say(HELO, MAIL)
    mta.say(ABORT)
    assert mta.pool.stages == [Stage.CONNECT, Stage.HELO]
    mta.answer(CONTINUE)
    assert mta.pool.stages == [Stage.CONNECT, Stage.HELO, Stage.MAIL]


def test_another_client_may_follow_on_the_same_connection() -> None:
    other = commands.Connect("other", "U")
    mta = at_the_end(*MESSAGE)
    mta.answer(CONTINUE)
    mta.say(QUIT_NC, other, *MESSAGE)
    assert not mta.closed
    agreed = commands.Negotiate(6, AT_THE_END.actions, AT_THE_END.protocol)
    assert content(mta.job.connection) == packed(agreed, other)


def test_quit_closes_once_what_came_before_is_answered() -> None:
    mta = at_the_end(MAIL, RCPT, QUIT, offer=OLD_OFFER)
    assert b"".join(mta.written()) == packed(*[CONTINUE] * 4)
    assert mta.closed


# Time


def test_an_idle_connection_is_closed() -> None:
    mta = at_the_end(*MESSAGE, idle_timeout=60.0)
    mta.answer(CONTINUE)
    mta.reactor.advance(59.0)
    mta.say(ABORT)
    mta.reactor.advance(59.0)
    assert not mta.closed
    mta.reactor.advance(1.0)
    assert mta.closed


def test_an_mta_that_waits_for_us_is_not_idle() -> None:
    mta = at_the_end(*MESSAGE, idle_timeout=60.0, progress_interval=1000.0)
    mta.reactor.pump([60.0] * 3)
    assert not mta.closed
    mta.answer(CONTINUE)
    assert mta.written() == [packed(CONTINUE)]
    mta.reactor.advance(60.0)
    assert mta.closed


def test_progress_stops_with_the_answer() -> None:
    mta = at_the_end(*MESSAGE)
    mta.reactor.advance(5.0)
    assert mta.written() == [packed(replies.Progress())]
    mta.answer(CONTINUE)
    assert mta.written() == [packed(CONTINUE)]
    mta.reactor.pump([5.0] * 3)
    assert mta.written() == []


def test_a_job_that_is_answered_at_once_sets_no_progress_alarm() -> None:
    mta = at_the_end()
    mta.pool.at_once = [packed(CONTINUE)]
    mta.say(*MESSAGE)
    assert len(armed(mta.reactor)) == 1  # that of an idle connection


# Who does not read


def test_a_closed_connection_whose_mta_takes_nothing_is_aborted_after_a_grace() -> None:
    mta = at_the_end(*MESSAGE)
    mta.answer(CONTINUE)
    mta.say(QUIT)
    mta.reactor.advance(CLOSE_GRACE - 1.0)
    assert mta.closed
    assert not mta.aborted
    mta.reactor.advance(1.0)
    assert mta.aborted


def test_an_mta_that_reads_all_within_the_grace_has_no_alarm_left() -> None:
    mta = at_the_end(QUIT)
    mta.hang_up()
    assert armed(mta.reactor) == []
    mta.reactor.advance(CLOSE_GRACE)
    assert not mta.aborted


def test_an_idle_mta_that_does_not_read_its_answers_is_aborted() -> None:
    mta = at_the_end(*MESSAGE, idle_timeout=60.0)
    mta.answer(CONTINUE)
    mta.connection.pauseProducing()
    mta.reactor.advance(59.0)
    assert not mta.aborted
    mta.reactor.advance(1.0)
    assert mta.aborted


def test_it_is_idle_from_when_it_reads_no_more() -> None:
    mta = at_the_end(*MESSAGE, idle_timeout=60.0)
    mta.reactor.advance(50.0)
    mta.answer(CONTINUE)
    mta.connection.pauseProducing()
    mta.reactor.advance(59.0)
    assert not mta.aborted
    mta.reactor.advance(1.0)
    assert mta.aborted


def test_reading_is_a_sign_of_life() -> None:
    mta = at_the_end(*MESSAGE, idle_timeout=60.0)
    mta.answer(CONTINUE)
    mta.connection.pauseProducing()
    mta.reactor.advance(59.0)
    mta.connection.resumeProducing()
    mta.reactor.advance(59.0)
    assert not mta.closed
    mta.reactor.advance(1.0)
    assert (mta.closed, mta.aborted) == (True, False)


def test_its_slot_is_free_for_others_then() -> None:
    mta = at_the_end(idle_timeout=60.0, max_connections=1)
    assert mta.gate.served == {mta.connection}
    mta.connection.pauseProducing()
    mta.reactor.advance(60.0)
    assert mta.aborted
    mta.hang_up()  # as Twisted does in its next turn
    assert mta.gate.is_empty


# The end of the service


def test_when_the_service_stops_a_pending_question_is_answered() -> None:
    mta = at_the_end(*MESSAGE)
    mta.connection.finish()
    assert mta.written() == [STOPPING]
    assert mta.closed
    assert mta.pool.cancelled == [mta.job]
    mta.answer(CONTINUE)
    assert mta.written() == []


def test_a_connection_that_ends_already_is_not_closed_again() -> None:
    mta = at_the_end(QUIT)
    mta.connection.finish()
    assert (mta.written(), mta.closed) == ([], True)


def test_when_the_service_stops_an_idle_connection_just_ends() -> None:
    mta = at_the_end(MAIL)
    mta.connection.finish()
    assert mta.written() == []
    assert mta.closed
