"""Several milters on one connection: each asked what concerns it, one answer to the MTA."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import pytest
from one_mta import (
    BODY,
    CLIENT,
    CONTINUE,
    DATA,
    EOH,
    EOM,
    HELO,
    MAIL,
    OTHER_RCPT,
    RCPT,
    SUBJECT,
    TEMPFAIL,
    UNKNOWN,
    content,
    lines,
    packed,
)
from several_milters import ALL_NR, WHOLE, A, B, C, Several, answering
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.errors import CallbackFailed, WorkerLost
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import AddHeader, ReplaceBody
from sharded_milter.protocol.session import REFUSED
from sharded_milter.protocol.stages import Protocol, Stage

ACCEPT, REJECT = replies.Accept(), replies.Reject()
GO_ON = (CONTINUE, ACCEPT)


def test_all_are_asked_in_parallel_and_the_mta_is_answered_after_the_last() -> None:
    mta = Several(A, B, C)
    assert mta.asked(CLIENT) == "abc"
    assert mta.reply("b", CONTINUE) == []
    assert mta.reply("c", CONTINUE) == []
    assert mta.reply("a", CONTINUE) == [packed(CONTINUE)]
    assert mta.asked(HELO) == "abc"


def test_each_is_asked_only_what_it_answers() -> None:
    mta = Several(answering("a", Stage.MAIL), answering("b", Stage.RCPT, Stage.MAIL),
                  answering("c", Stage.EOM))  # fmt: skip
    asked = {}
    for command in [CLIENT, *WHOLE]:
        names = mta.asked(command)
        asked[type(command).__name__] = names
        for name in names:
            mta.reply(name, CONTINUE)
    assert {command: names for command, names in asked.items() if names} == {
        "Mail": "ab",
        "Rcpt": "b",
        "Eom": "c",
    }


VERDICTS: list[Packet] = [
    CONTINUE, ACCEPT, REJECT, TEMPFAIL, replies.Discard(), replies.ReplyCode("550 5.7.1 no"),
    replies.ReplyCode("451 4.7.1 later"),
]  # fmt: skip
LEGAL = {stage: [v for v in VERDICTS if stage in replies.LEGAL[v.letter[0]].stages]
         for stage in Stage}  # fmt: skip
TO_DATA: list[Packet] = [CLIENT, MAIL, RCPT, DATA]
BEFORE: dict[Stage, list[Packet]] = {
    Stage.CONNECT: [], Stage.HELO: [CLIENT], Stage.MAIL: [CLIENT], Stage.RCPT: [CLIENT, MAIL],
    Stage.DATA: [CLIENT, MAIL, RCPT], Stage.UNKNOWN: [CLIENT],
    **dict.fromkeys((Stage.HEADER, Stage.EOH, Stage.BODY, Stage.EOM), TO_DATA),
}  # fmt: skip
COMMANDS: dict[Stage, Packet] = {
    Stage.CONNECT: CLIENT, Stage.HELO: HELO, Stage.MAIL: MAIL, Stage.RCPT: RCPT, Stage.DATA: DATA,
    Stage.HEADER: SUBJECT, Stage.EOH: EOH, Stage.BODY: BODY, Stage.EOM: EOM, Stage.UNKNOWN: UNKNOWN,
}  # fmt: skip


def heard(stage: Stage, given: dict[str, Packet], order: str) -> tuple[list[list[bytes]], str]:
    """Return the replies after each of two answers, and the milters that are still asked."""
    mta = Several(A, B)
    mta.go_on(*BEFORE[stage])
    mta.say(COMMANDS[stage])
    told = [mta.reply(name, given[name]) for name in order if name in mta.out()]
    return told, "".join(mta.out())


def wanted(given: dict[str, Packet], order: str) -> tuple[list[list[bytes]], str]:
    first, second = (given[name] for name in order)
    if first not in GO_ON:  # the first refusal to arrive is the answer
        return [[packed(first)]], ""
    if second not in GO_ON:
        return [[], [packed(second)]], ""
    return [[], [packed(ACCEPT if first == second == ACCEPT else CONTINUE)]], ""


def test_every_pair_of_verdicts_at_every_stage_has_the_outcome_of_the_design() -> None:
    cells = [
        (stage, {"a": first, "b": second}, order)
        for stage in Stage
        for first, second in product(LEGAL[stage], repeat=2)
        for order in ("ab", "ba")
    ]
    assert len(cells) == 2 * sum(len(verdicts) ** 2 for verdicts in LEGAL.values())
    assert [cell for cell in cells if heard(*cell) != wanted(*cell[1:])] == []


@pytest.mark.parametrize("order", list(permutations("abc")), ids="".join)
def test_actions_arrive_in_the_order_of_the_milters_whoever_is_done_first(
    order: tuple[str, ...],
) -> None:
    mta = Several(A, B, C)
    mta.go_on(CLIENT, *WHOLE[:-1])
    mta.say(EOM)
    told = [mta.reply(name, AddHeader(f"X-{name}", "1"), ACCEPT) for name in order]
    actions = [AddHeader(f"X-{name}", "1") for name in "abc"]
    assert told == [[], [], [packed(*actions, ACCEPT)]]


def test_a_milter_that_accepts_is_not_asked_again_about_that_message() -> None:
    mta = Several(A, B)
    mta.go_on(CLIENT)
    assert mta.asked(MAIL) == "ab"
    mta.reply("a", ACCEPT)
    mta.reply("b", CONTINUE)
    for command in WHOLE[1:]:
        assert mta.asked(command) == "b"
        mta.reply("b", CONTINUE)
    assert mta.asked(MAIL) == "ab"


def test_a_milter_that_accepts_a_client_is_not_asked_again_until_the_next() -> None:
    mta = Several(A, B)
    assert mta.asked(CLIENT) == "ab"
    mta.reply("b", ACCEPT)
    mta.reply("a", CONTINUE)
    for command in [HELO, *WHOLE, *WHOLE]:
        assert mta.asked(command) == "a"
        mta.reply("a", CONTINUE)
    assert mta.asked(commands.QuitNc(), CLIENT) == "ab"


def test_when_the_last_accepts_the_mta_gets_accept() -> None:
    mta = Several(A, B)
    mta.go_on(CLIENT)
    assert mta.asked(MAIL) == "ab"
    mta.reply("a", ACCEPT)
    assert mta.reply("b", CONTINUE) == [packed(CONTINUE)]
    assert mta.asked(RCPT) == "b"
    assert mta.reply("b", ACCEPT) == [packed(ACCEPT)]


def test_a_refused_recipient_is_refused_for_all_and_the_message_goes_on() -> None:
    mta = Several(A, B)
    mta.go_on(CLIENT, MAIL)
    assert mta.asked(RCPT) == "ab"
    assert mta.reply("b", REJECT) == [packed(REJECT)]
    assert [job.manifest.name for job in mta.pool.cancelled if job.manifest] == ["a"]
    assert mta.asked(OTHER_RCPT) == "ab"
    kept = content(mta.out()["a"].message)
    assert kept == packed(MAIL, RCPT) + REFUSED + packed(OTHER_RCPT)


def test_what_fails_is_answered_by_policy_and_ends_the_question() -> None:
    mta = Several(A, B, on_error="tempfail")
    mta.go_on(CLIENT)
    mta.say(MAIL)
    assert mta.lose("b", CallbackFailed("ValueError: bad")) == [packed(TEMPFAIL)]
    assert mta.out() == {}


def test_with_the_policy_accept_the_others_decide_after_a_failure() -> None:
    mta = Several(A, B, on_error="accept")
    mta.go_on(CLIENT)
    mta.say(MAIL)
    assert mta.lose("b", WorkerLost("gone")) == []
    assert mta.reply("a", REJECT) == [packed(REJECT)]


def test_an_illegal_answer_is_that_milters_failure_alone() -> None:
    mta = Several(A, B, on_error="accept")
    mta.go_on(CLIENT, *WHOLE[:-1])
    mta.say(EOM)
    with capturedLogs() as events:
        assert mta.reply("a", AddHeader("bad\nname", "1"), ACCEPT) == []
    assert [event["log_level"] for event in events] == [LogLevel.error]
    assert mta.reply("b", AddHeader("X", "1"), ACCEPT) == [packed(AddHeader("X", "1"), CONTINUE)]


def test_a_second_new_body_is_left_out_and_the_log_says_so() -> None:
    mta = Several(A, B)
    mta.go_on(CLIENT, *WHOLE[:-1])
    mta.say(EOM)
    mta.reply("b", ReplaceBody(b"b"), CONTINUE)
    with capturedLogs() as events:
        heard = mta.reply("a", ReplaceBody(b"a"), CONTINUE)
    assert heard == [packed(ReplaceBody(b"a"), CONTINUE)]
    (warning,) = (event for event in events if event["log_level"] is LogLevel.warn)
    assert warning["n"] == 1


def test_answers_that_are_there_at_once_keep_the_order_of_commands() -> None:
    mta = Several(A, B)
    mta.pool.at_once = [
        packed(answer) for answer in (CONTINUE, ACCEPT, CONTINUE, REJECT, CONTINUE, CONTINUE)
    ]
    mta.say(CLIENT, HELO, MAIL, MAIL)  # b has accepted the client
    assert mta.written() == [packed(CONTINUE, CONTINUE, REJECT, CONTINUE)]
    assert mta.pool.at_once == [packed(CONTINUE)]


def test_after_an_immediate_refusal_the_others_are_not_asked() -> None:
    mta = Several(A, B)
    mta.pool.at_once = [packed(REJECT)]
    mta.say(CLIENT)
    assert mta.written() == [packed(REJECT)]
    assert [job.manifest for job in mta.pool.jobs] == [A]


def test_recipients_that_the_mta_refused_are_for_those_who_asked_for_them() -> None:
    curious = answering("a", Stage.RCPT, Stage.EOM, options=Protocol.RCPT_REJ)
    mta = Several(curious, answering("b", Stage.RCPT, Stage.EOM))
    mta.go_on(CLIENT, MAIL)
    refused = commands.Macro("R", (("{rcpt_mailer}", "error"), ("{rcpt_host}", "5.1.1")))
    accepted = commands.Macro("R", (("{rcpt_mailer}", "smtp"),))
    assert mta.asked(refused, RCPT) == "a"
    assert mta.reply("a", CONTINUE) == [packed(CONTINUE)]
    assert mta.asked(accepted, OTHER_RCPT) == "ab"
    kept = content(mta.out()["b"].message)
    assert packed(RCPT) + REFUSED in kept


def test_the_connection_is_closed_after_an_internal_error() -> None:
    mta = Several(A, B)
    mta.say(CLIENT)
    nonsense: Any = None
    with capturedLogs() as events:
        mta.pool.answer(mta.out()["a"], nonsense)
    assert [e["log_format"] for e in events if e["log_level"] is LogLevel.critical] == [
        "closing a connection: no verdict because of an internal error"
    ]
    assert mta.closed
    assert mta.out() == {}


def test_one_negotiation_serves_for_all() -> None:
    mta = Several(answering("a", Stage.EOM, actions=0x1), answering("b", Stage.RCPT, actions=0x4),
                  offer=None)  # fmt: skip
    mta.say(commands.Negotiate(6, 0x1FF, 0x1FFFFF))
    (answer,) = mta.written()
    words = commands.Negotiate.parse(answer[5:])
    assert (words.version, words.actions) == (6, 0x5)
    expected = ALL_NR & ~(Protocol.NR_RCPT | Protocol.NR_EOM)
    assert words.protocol == expected


def test_a_milter_that_is_not_asked_any_more_has_not_waited_either() -> None:
    mta = Several(A, B)
    mta.reactor.advance(1000.0)
    mta.go_on(CLIENT, HELO, *WHOLE[:-1])
    mta.pool.at_once = [packed(replies.Reject())]
    with capturedLogs() as events:
        mta.say(EOM)
    assert [line.partition(" verdict=")[2] for line in lines(events)] == [
        "reject actions=0 shard=0,0 queue_ms=0.0 scan_ms=0.0"
    ]
