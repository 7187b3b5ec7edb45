"""One MTA connection: an answer to each command, in order, and nothing else."""

from __future__ import annotations

import gc
import os
import socket
from typing import Any

import pytest
from armed import armed
from one_mta import EVERYTHING, OFFER, Mta, content, packed, transcript_of
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.dispatch.policy import BUSY, NO_ROOM, STOPPING, TOO_LARGE
from sharded_milter.errors import CallbackFailed, Overloaded, WorkerLost
from sharded_milter.ipc.messages import MAX_INLINE, Memory
from sharded_milter.mta.connection import MilterConnection
from sharded_milter.mta.transcript import SPOOL_ABOVE, Transcript
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, Manifest
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import NO_ACTIONS, Actions, Protocol, Stage
from sharded_milter.protocol.wire import frame

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


def at_the_end(*conversation: Packet, **options: Any) -> Mta:
    """A client is there; its messages are asked about when they are complete."""
    return Mta(CLIENT, HELO, *conversation, manifest=AT_THE_END, **options)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def lines(events: Any, level: LogLevel = LogLevel.info) -> list[str]:
    return [event["log_format"].format(**event) for event in events if event["log_level"] == level]


# Answers


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


# Leaving


@pytest.mark.parametrize("leaving", [ABORT, QUIT, QUIT_NC], ids=repr)
def test_whoever_leaves_cancels_the_job_and_its_late_answer_is_dropped(leaving: Packet) -> None:
    mta = at_the_end(*MESSAGE)
    mta.say(leaving)
    assert mta.pool.cancelled == [mta.job]
    mta.answer(replies.Reject())
    assert mta.written() == []
    assert mta.closed == (leaving is QUIT)


def test_a_late_failure_is_dropped_too() -> None:
    mta = at_the_end(*MESSAGE, ABORT)
    with capturedLogs() as events:
        mta.job.result.errback(WorkerLost("died"))
    assert mta.written() == []
    assert lines(events, LogLevel.warn) == []


def test_a_lost_connection_cancels_the_job() -> None:
    mta = at_the_end(*MESSAGE)
    mta.hang_up()
    assert mta.pool.cancelled == [mta.job]
    mta.answer(CONTINUE)
    assert mta.written() == []
    assert mta.connections == set()
    assert armed(mta.reactor) == []


def test_after_an_abort_the_next_message_is_a_new_one() -> None:
    mta = at_the_end(*MESSAGE, ABORT, *MESSAGE)
    assert len(mta.pool.jobs) == 2
    assert content(mta.job.message) == packed(*MESSAGE)
    mta.answer(CONTINUE)
    assert mta.written() == [packed(CONTINUE)]


def test_postfix_aborts_what_was_answered_and_hears_nothing() -> None:
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


# The transcript


def test_a_job_has_the_whole_conversation() -> None:
    macros = commands.Macro("C", (("j", "mx"),))
    mta = Mta(macros, CLIENT, HELO, *MESSAGE, manifest=AT_THE_END)
    agreed = commands.Negotiate(6, AT_THE_END.actions, AT_THE_END.protocol)
    assert content(mta.job.connection) == packed(agreed, macros, CLIENT, HELO)
    assert content(mta.job.message) == packed(*MESSAGE)
    assert mta.job.about() == "qid=4F1"


def test_the_connections_part_is_the_same_for_the_next_message() -> None:
    mta = at_the_end(*MESSAGE)
    mta.answer(CONTINUE)
    first = content(mta.job.connection)
    mta.say(*MESSAGE)
    assert content(mta.job.connection) == first
    assert content(mta.job.message) == packed(*MESSAGE)


@pytest.mark.parametrize(
    "refusal", [replies.Reject(), TEMPFAIL, replies.ReplyCode("550 no")], ids=repr
)
def test_a_refused_recipient_is_marked_for_those_who_read_on(refusal: Packet) -> None:
    manifest = Manifest("rcpt", EVERYTHING.actions, NO_REPLIES & ~Protocol.NR_RCPT)
    mta = Mta(CLIENT, HELO, MAIL, RCPT, manifest=manifest)
    mta.answer(refusal)
    mta.say(OTHER_RCPT)
    mta.answer(CONTINUE)
    mta.say(DATA, EOH, EOM)
    wanted = packed(MAIL, RCPT, replies.Reject(), OTHER_RCPT, DATA, EOH, EOM)
    assert content(mta.job.message) == wanted


def test_an_unknown_command_is_no_part_of_the_message() -> None:
    mta = Mta(CLIENT)
    for command in (HELO, MAIL, UNKNOWN, RCPT):
        mta.answer(CONTINUE)
        mta.say(command)
    unknown = mta.pool.jobs[-2]
    assert content(unknown.question().message) == packed(UNKNOWN)
    assert content(mta.job.message) == packed(MAIL, RCPT)


def test_a_light_stage_makes_a_light_job() -> None:
    manifest = Manifest("light", NO_ACTIONS, Protocol(0), light=frozenset({Stage.HELO}))
    mta = Mta(CLIENT, HELO, manifest=manifest)
    mta.answer(CONTINUE)
    assert [job.light for job in mta.pool.jobs] == [False, True]


def test_a_verdict_that_ends_the_message_frees_it() -> None:
    mta = Mta(CLIENT)
    mta.answer(CONTINUE)
    mta.say(MAIL)
    mta.answer(replies.Discard())
    mta.say(RCPT, DATA, SUBJECT, EOH, BODY, EOM)
    assert mta.pool.stages == [Stage.CONNECT, Stage.MAIL]
    assert b"".join(mta.written()) == packed(CONTINUE, replies.Discard(), *[CONTINUE] * 6)


# Large messages


LARGE = [commands.Body(bytes([n]) * 60_000) for n in range(4)]


def test_a_large_message_is_sealed_memory_and_freed_in_the_end() -> None:
    before = descriptors()
    mta = at_the_end(*MESSAGE[:-2], *LARGE, EOM)
    memory = mta.job.message
    assert isinstance(memory, Memory)
    assert content(memory) == packed(*MESSAGE[:-2], *LARGE, EOM)
    with pytest.raises(PermissionError):
        os.write(memory.fd, b"x")
    assert descriptors() == before + 1
    mta.answer(CONTINUE)
    mta.pool.jobs.clear()
    del memory
    assert descriptors() == before


@pytest.mark.parametrize("leaving", [ABORT, QUIT, QUIT_NC], ids=repr)
def test_memory_of_a_cancelled_job_lives_until_its_worker_has_answered(leaving: Packet) -> None:
    before = descriptors()
    mta = at_the_end(*ENVELOPE, *LARGE, EOM)
    mta.say(leaving)
    assert descriptors() == before + 1
    assert transcript_of(mta.job).endswith(packed(*LARGE, EOM))
    mta.answer(CONTINUE)
    mta.pool.jobs.clear()
    mta.pool.cancelled.clear()
    mta.hang_up()
    assert descriptors() == before


def test_memory_goes_with_a_connection_that_is_lost_in_a_message() -> None:
    before = descriptors()
    mta = at_the_end(*ENVELOPE, *LARGE)
    assert descriptors() == before + 1
    mta.hang_up()
    assert descriptors() == before


def test_a_too_large_message_is_refused_and_not_kept_and_later_ones_are_fine() -> None:
    before = descriptors()
    mta = at_the_end(*ENVELOPE, max_message_size=100_000)
    with capturedLogs() as events:
        mta.say(*LARGE)
    assert descriptors() == before
    assert mta.written() == []
    assert lines(events, LogLevel.warn) == ["qid=4F1 is refused: it is larger than 100000 bytes"]
    mta.say(EOM)
    assert mta.written() == [TOO_LARGE]
    assert mta.pool.jobs == []
    mta.say(ABORT, *MESSAGE)
    assert content(mta.job.message) == packed(*MESSAGE)
    mta.answer(CONTINUE)
    assert mta.written() == [packed(CONTINUE)]


def test_the_size_that_is_just_right_is_taken() -> None:
    size = len(packed(*MESSAGE))
    assert at_the_end(*MESSAGE, max_message_size=size).pool.stages == [Stage.EOM]
    assert at_the_end(*MESSAGE, max_message_size=size - 1).pool.stages == []


@pytest.mark.parametrize("ending", [[ABORT], [HELO], [QUEUE_ID], [QUIT_NC, CLIENT]], ids=repr)
def test_a_refusal_ends_with_its_message(ending: list[Packet]) -> None:
    mta = at_the_end(*ENVELOPE, *LARGE, max_message_size=100_000)
    mta.say(*ending, *MESSAGE)
    assert mta.pool.stages == [Stage.EOM]


@pytest.mark.parametrize("stage", ["RCPT", "DATA", "EOH", "UNKNOWN"])
def test_a_message_without_room_is_refused_at_the_next_question(stage: str) -> None:
    manifest = Manifest("one", EVERYTHING.actions, NO_REPLIES & ~Protocol[f"NR_{stage}"])
    huge = commands.Macro("M", (("x", "y" * 1000),))
    conversation = [CLIENT, HELO, huge, MAIL, RCPT, DATA, EOH, UNKNOWN]
    mta = Mta(*conversation, manifest=manifest, max_message_size=500)
    assert mta.written() == [TOO_LARGE]
    assert mta.pool.jobs == []


@pytest.mark.parametrize("method", ["_append", "_flush"])
def test_a_message_for_which_there_is_no_memory_is_told_to_come_again(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Transcript, method, refuse)
        mta = at_the_end(*ENVELOPE, *LARGE, EOM)
    assert mta.written() == [NO_ROOM]
    assert not mta.closed
    mta.say(*MESSAGE)
    assert content(mta.job.message) == packed(*MESSAGE)


@pytest.mark.parametrize("size", [MAX_INLINE, 400_000])
def test_parts_too_large_for_amp_go_as_memory(size: int) -> None:
    before = descriptors()
    mta = Mta(CLIENT, commands.Helo("x" * size))
    mta.answer(CONTINUE)
    assert isinstance(mta.job.connection, Memory)
    mta.answer(CONTINUE)
    unknown = commands.Unknown("y" * size)
    mta.say(unknown)
    message = mta.job.question().message
    assert isinstance(message, Memory)
    assert content(message) == packed(unknown)
    del message
    mta.hang_up()
    mta.pool.jobs.clear()
    mta.pool.cancelled.clear()
    assert descriptors() == before


def test_a_message_up_to_one_box_needs_no_memory() -> None:
    mta = at_the_end(*ENVELOPE, commands.Body(b"x" * (SPOOL_ABOVE - 500)), EOM)
    assert isinstance(mta.job.message, bytes)


# What a milter cannot say


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "no final reply at eom"),
        (packed(replies.AddHeader("X", "v")), "no final reply at eom"),
        (packed(CONTINUE, CONTINUE), "after the final one"),
        (packed(replies.Skip()), "not legal at eom"),
        (frame(b"?"), "does not exist"),
        (b"\0\0", "malformed"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    ("on_error", "told"),
    [("tempfail", TEMPFAIL), ("accept", CONTINUE), ("reject", replies.Reject())],
)
def test_an_illegal_answer_never_reaches_the_mta(
    answer: bytes, why: str, on_error: str, told: Packet
) -> None:
    mta = at_the_end(*MESSAGE, on_error=on_error)
    with capturedLogs() as events:
        mta.job.result.callback(answer)
    assert mta.written() == [packed(told)]
    assert [why in line for line in lines(events, LogLevel.error)] == [True]


def test_an_action_that_was_not_negotiated_never_reaches_the_mta() -> None:
    mta = at_the_end(*MESSAGE, offer=commands.Negotiate(6, Actions.ADDHDRS, 0x1FFFFF))
    mta.answer(replies.Quarantine("odd"), replies.Accept())
    assert mta.written() == [packed(TEMPFAIL)]


def test_changes_and_verdict_go_in_one_write() -> None:
    mta = at_the_end(*MESSAGE)
    answer = [replies.InsertHeader(0, "X", " v"), replies.Quarantine("odd"), replies.Accept()]
    with capturedLogs() as events:
        mta.answer(*answer)
    assert mta.written() == [packed(*answer)]
    size = len(packed(*MESSAGE))
    assert lines(events) == [
        f"qid=4F1 size={size} verdict=quarantine actions=2 shard=0 queue_ms=0.0 scan_ms=0.0"
    ]


def test_a_log_that_has_no_lines_for_messages_costs_none() -> None:
    mta = at_the_end(*MESSAGE)
    mta.logs_messages = False
    with capturedLogs() as events:
        mta.answer(CONTINUE)
    assert lines(events) == []


@pytest.mark.parametrize(
    ("final", "word"),
    [(CONTINUE, "continue"), (replies.Reject(), "reject"), (TEMPFAIL, "tempfail"),
     (replies.Discard(), "discard"), (replies.ReplyCode("554 5.7.1 no"), "554")],
    ids=repr,
)  # fmt: skip
def test_the_log_names_every_verdict(final: Packet, word: str) -> None:
    mta = at_the_end(*MESSAGE)
    with capturedLogs() as events:
        mta.answer(final)
    assert [f" verdict={word} " in line for line in lines(events)] == [True]


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
        mta.job.result.errback(CallbackFailed("ValueError: bad"))
    assert mta.written() == [packed(TEMPFAIL)]
    assert mta.job.stage is not None
    word = mta.job.stage.word
    assert lines(events, LogLevel.error) == [
        f"message without queue id at {word}: ValueError: bad; answered by policy"
    ]


def test_an_overload_is_told_as_such() -> None:
    mta = at_the_end(*MESSAGE, on_error="accept")
    mta.job.result.errback(Overloaded("full"))
    assert mta.written() == [BUSY]


def test_a_defect_of_the_pool_is_logged_with_its_traceback_and_answered() -> None:
    mta = at_the_end(*MESSAGE)
    with capturedLogs() as events:
        mta.job.result.errback(ZeroDivisionError("ours"))
    assert mta.written() == [packed(TEMPFAIL)]
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [
        ZeroDivisionError
    ]


def test_a_defect_of_ours_ends_the_connection_instead_of_silence() -> None:
    mta = at_the_end(*MESSAGE)
    nonsense: Any = 5
    with capturedLogs() as events:
        mta.job.result.callback(nonsense)
    assert mta.closed
    assert [event["log_format"] for event in events] == ["a verdict got lost"]


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


def test_a_job_that_is_answered_at_once_leaves_no_progress_behind() -> None:
    mta = at_the_end()
    mta.pool.at_once = [packed(CONTINUE)]
    mta.say(*MESSAGE)
    assert len(armed(mta.reactor)) == 1  # that of an idle connection


# The end of the service


def test_when_the_service_stops_whoever_waits_is_told() -> None:
    mta = at_the_end(*MESSAGE)
    mta.connection.finish()
    assert mta.written() == [STOPPING]
    assert mta.closed
    assert mta.pool.cancelled == [mta.job]
    mta.answer(CONTINUE)
    assert mta.written() == []


def test_when_the_service_stops_an_idle_connection_just_ends() -> None:
    mta = at_the_end(MAIL)
    mta.connection.finish()
    assert mta.written() == []
    assert mta.closed


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


@pytest.mark.parametrize(
    ("size", "offered", "agreed"),
    [
        ("64K", 0x30000000, 0),
        ("256K", 0x30000000, 0x10000000),
        ("1M", 0x30000000, 0x20000000),
        ("1M", 0x10000000, 0),
        ("1M", 0, 0),
    ],
)
def test_larger_packets_are_agreed_only_if_asked_for_and_offered(
    size: str, offered: int, agreed: int
) -> None:
    mta = Mta(offer=None, max_data_size=size)
    mta.say(commands.Negotiate(6, KNOWN_ACTIONS, KNOWN_PROTOCOL | offered))
    [reply] = mta.written()
    assert commands.Negotiate.parse(reply[5:]).protocol & ~KNOWN_PROTOCOL == agreed


def test_what_a_job_has_is_not_kept_a_second_time() -> None:
    mta = at_the_end(*MESSAGE)
    assert mta.connection._framer.buffer == b""
    mta.say(commands.Mail("<next>"), commands.Abort())
    assert mta.pool.cancelled == [mta.job]
    assert mta.connection._framer.buffer == b""
