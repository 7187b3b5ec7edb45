"""Milters that are objects: told what is new, and of every end, and nothing twice."""

from __future__ import annotations

import pytest
from one_mta import (
    ABORT,
    CLIENT,
    CONTINUE,
    HELO,
    MAIL,
    OFFER,
    QUIT,
    QUIT_NC,
    RCPT,
    content,
    lines,
    packed,
)
from several_milters import WHOLE, B, Several, answering
from twisted.logger import capturedLogs

from sharded_milter.dispatch.job import Job
from sharded_milter.errors import WorkerLost
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import Manifest, SessionAffinity
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Stage

ACCEPT = replies.Accept()


def with_object(name: str, *stages: Stage) -> Manifest:
    return answering(name, *(stages or (Stage.CONNECT, Stage.MAIL, Stage.EOM)),
                     affinity=SessionAffinity.REQUIRED)  # fmt: skip


def told(job: Job) -> bytes:
    """Return the packets that the object would get."""
    assert job.affinity is not None
    news = job.affinity.next_update(job.connection, job.message)
    return content(news.connection) + content(news.message)[news.start :]


def settled(job: Job) -> Job:
    """As the dispatcher does when it gives a job to a shard for the first time."""
    assert job.affinity is not None
    if job.affinity.holder is None:
        job.affinity.assign("shard", 7)
    return job


def test_an_object_gets_new_packets_only() -> None:
    mta = Several(with_object("a"))
    mta.say(CLIENT)
    assert told(settled(mta.out()["a"])).endswith(packed(CLIENT))
    mta.reply("a", CONTINUE)
    mta.say(HELO, MAIL)
    assert told(mta.out()["a"]) == packed(HELO, MAIL)
    mta.reply("a", CONTINUE)
    mta.say(*WHOLE[1:])
    assert told(mta.out()["a"]) == packed(*WHOLE[1:])
    mta.reply("a", CONTINUE)
    mta.say(ABORT, MAIL)
    assert told(mta.out()["a"]) == packed(ABORT, MAIL)


def test_an_object_gets_the_mtas_offer_and_our_reply() -> None:
    mta = Several(with_object("a"), offer=None)
    mta.say(OFFER)
    (ours,) = mta.written()
    mta.say(CLIENT)
    assert told(settled(mta.out()["a"])) == packed(OFFER) + ours + packed(CLIENT)


def test_of_repeated_helos_an_object_gets_the_last() -> None:
    mta = Several(with_object("a", Stage.CONNECT, Stage.EOM))
    mta.say(CLIENT)
    told(settled(mta.out()["a"]))
    mta.reply("a", CONTINUE)
    for number in range(1000):
        mta.say(commands.Helo(str(number)))
    mta.say(*WHOLE)
    assert told(mta.out()["a"]) == packed(commands.Helo("999"), *WHOLE)


@pytest.mark.parametrize("end", [[QUIT], [QUIT_NC], []], ids=str)
def test_an_object_ends_with_its_client(end: list[Packet]) -> None:
    mta = Several(with_object("a"), B)
    mta.say(CLIENT)
    told(settled(mta.out()["a"]))
    mta.reply("a", CONTINUE)
    mta.reply("b", CONTINUE)
    mta.say(*end)
    if not end:
        mta.hang_up()
    (end_of_session,) = mta.out().values()
    assert (end_of_session.stage, end_of_session.letter) == (None, b"Q")
    affinity = end_of_session.affinity
    assert told(end_of_session) == b""
    mta.pool.answer(end_of_session, b"")
    assert mta.pool.released == [affinity]


def test_a_message_ends_before_the_session_of_its_object() -> None:
    mta = Several(with_object("a"))
    mta.say(CLIENT)
    told(settled(mta.out()["a"]))
    mta.reply("a", CONTINUE)
    mta.say(MAIL)
    told(mta.out()["a"])
    mta.reply("a", CONTINUE)
    mta.hang_up()
    assert told(mta.out()["a"]) == packed(ABORT)


def test_without_a_question_there_is_no_end_of_session_job() -> None:
    mta = Several(with_object("a", Stage.EOM))
    mta.say(CLIENT, HELO, QUIT)
    assert (mta.pool.jobs, mta.pool.released) == ([], [])


def test_where_an_object_was_to_be_and_never_was_its_place_is_given_back() -> None:
    mta = Several(with_object("a"))
    mta.say(CLIENT)
    affinity = settled(mta.out()["a"]).affinity
    mta.hang_up()  # before the shard that was chosen has been told anything
    assert mta.out() == {}
    assert mta.pool.released == [affinity]


def with_an_object() -> Several:
    mta = Several(with_object("a"))
    mta.say(CLIENT)
    told(settled(mta.out()["a"]))
    mta.reply("a", CONTINUE)
    return mta


def test_an_end_that_is_answered_at_once_is_over_at_once() -> None:
    mta = with_an_object()
    mta.pool.at_once = [b""]
    mta.hang_up()
    assert mta.pool.released == [mta.job.affinity]


def test_an_end_that_is_refused_is_noted_and_over() -> None:
    mta = with_an_object()
    mta.pool.at_once = [WorkerLost("no place")]
    with capturedLogs() as events:
        mta.hang_up()
    assert lines(events) == ["message without queue id at end of session: no place"]
    assert mta.pool.released == [mta.job.affinity]


def test_an_end_that_fails_is_noted_and_over() -> None:
    mta = with_an_object()
    mta.hang_up()
    with capturedLogs() as events:
        mta.pool.answer(mta.out()["a"], WorkerLost("killed by SIGKILL"))
    assert lines(events) == ["message without queue id at end of session: killed by SIGKILL"]
    assert mta.pool.released == [mta.job.affinity]


def test_an_object_that_accepted_a_message_still_gets_its_end() -> None:
    mta = Several(with_object("a", Stage.MAIL, Stage.RCPT), B)
    mta.go_on(CLIENT)
    mta.say(MAIL)
    told(settled(mta.out()["a"]))
    mta.reply("a", ACCEPT)
    mta.reply("b", CONTINUE)
    assert mta.asked(RCPT) == "b"
    mta.reply("b", CONTINUE)
    mta.say(ABORT, MAIL)
    assert told(mta.out()["a"]) == packed(ABORT, MAIL)
