"""A conversation: what the milters are asked, and what the MTA may hear of their answers."""

from __future__ import annotations

import pytest
from one_mta import (
    AT_THE_END,
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
    OTHER_RCPT,
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
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, Manifest
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import NO_ACTIONS, Actions, Protocol, Stage
from sharded_milter.protocol.wire import frame

# The transcript


def test_a_job_has_the_whole_conversation() -> None:
    macros = commands.Macro("C", (("j", "mx"),))
    mta = Mta(macros, CLIENT, HELO, *MESSAGE, manifest=AT_THE_END)
    agreed = commands.Negotiate(6, AT_THE_END.actions, AT_THE_END.protocol)
    assert content(mta.job.connection) == packed(agreed, macros, CLIENT, HELO)
    assert content(mta.job.message) == packed(*MESSAGE)
    assert mta.job.about == "qid=4F1"


def test_what_a_job_is_called_and_where_it_belongs_are_values() -> None:
    manifest = Manifest("end", EVERYTHING.actions, NO_REPLIES, shard_by="sender")
    mta = Mta(CLIENT, HELO, *MESSAGE, manifest=manifest)
    mta.answer(CONTINUE)
    other = [commands.Macro("M", (("i", "4F2"),)), commands.Mail("<c@example.org>")]
    mta.say(*other, RCPT, DATA, SUBJECT, EOH, BODY, EOM)
    first, second = mta.pool.jobs  # the transcript of both is the same object
    assert (first.queue_id, first.key) == ("4F1", b"<a@example.org>")
    assert (second.queue_id, second.key) == ("4F2", b"<c@example.org>")


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
    assert content(unknown.command) == packed(UNKNOWN)
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
        mta.pool.answer(mta.job, answer)
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
    mta.message_log = None
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
