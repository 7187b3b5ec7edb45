"""Several milters on one connection: each asked what concerns it, one answer to the MTA."""

from __future__ import annotations

from itertools import permutations, product

import pytest
from one_mta import EVERYTHING, Mta, content, packed
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.dispatch.job import Job
from sharded_milter.errors import CallbackFailed, WorkerLost
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, Manifest, Pinning
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import (
    Accept,
    AddHeader,
    Continue,
    Discard,
    Reject,
    ReplaceBody,
    ReplyCode,
    TempFail,
)
from sharded_milter.protocol.session import REFUSED
from sharded_milter.protocol.stages import NO_PROTOCOL, Actions, Protocol, Stage

CLIENT = commands.Connect("client", "4", 25, "192.0.2.1")
HELO = commands.Helo("client")
MAIL = commands.Mail("<a@example.org>")
RCPT = commands.Rcpt("<b@example.net>")
DATA = commands.Data()
EOM = commands.Eom()
WHOLE = [MAIL, RCPT, DATA, commands.Header("Subject", " hi"), commands.Eoh(),
         commands.Body(b"text\r\n"), EOM]  # fmt: skip

ALL_NR = sum((stage.no_reply for stage in Stage), NO_PROTOCOL)
CONTENT = Protocol.NR_HEADER | Protocol.NR_EOH | Protocol.NR_BODY


def answering(
    name: str,
    *stages: Stage,
    actions: int = KNOWN_ACTIONS & ~0x100,
    options: Protocol = NO_PROTOCOL,
    pinning: Pinning = Pinning.NONE,
) -> Manifest:
    """A milter that sees everything and answers these stages."""
    answered = sum((stage.no_reply for stage in stages), NO_PROTOCOL)
    return Manifest(name, Actions(actions), (ALL_NR & ~answered) | options, pinning=pinning)


A, B, C = (answering(name, *Stage) for name in "abc")


class Several(Mta):
    """An MTA before several milters; jobs are known by the name of the milter."""

    def __init__(self, *manifests: Manifest, **options: object) -> None:
        super().__init__(manifests=manifests, **options)  # type: ignore[arg-type]

    def out(self) -> dict[str, Job]:
        """The latest job of each milter that has not been answered or cancelled."""
        return {
            job.manifest.name: job
            for job in self.pool.jobs
            if job.manifest and not job.result.called and job not in self.pool.cancelled
        }

    def asked(self, *commands: Packet) -> str:
        """Says the commands; the names of the milters that are asked then."""
        self.say(*commands)
        return "".join(self.out())

    def reply(self, name: str, *packets: Packet) -> list[bytes]:
        """A milter answers; what the MTA hears then."""
        self.written()
        self.out()[name].result.callback(packed(*packets))
        return self.written()

    def go_on(self, *commands: Packet) -> None:
        """Says each of the commands, and all milters say CONTINUE."""
        for command in commands:
            self.say(command)
            while self.out():
                self.reply(next(iter(self.out())), Continue())


def test_all_are_asked_at_once_and_the_mta_hears_when_the_last_has_answered() -> None:
    mta = Several(A, B, C)
    assert mta.asked(CLIENT) == "abc"
    assert mta.reply("b", Continue()) == []
    assert mta.reply("c", Continue()) == []
    assert mta.reply("a", Continue()) == [packed(Continue())]
    assert mta.asked(HELO) == "abc"


def test_each_is_asked_only_what_it_answers() -> None:
    mta = Several(answering("a", Stage.MAIL), answering("b", Stage.RCPT, Stage.MAIL),
                  answering("c", Stage.EOM))  # fmt: skip
    asked = {}
    for command in [CLIENT, *WHOLE]:
        names = mta.asked(command)
        asked[type(command).__name__] = names
        for name in names:
            mta.reply(name, Continue())
    assert {command: names for command, names in asked.items() if names} == {
        "Mail": "ab",
        "Rcpt": "b",
        "Eom": "c",
    }


VERDICTS: list[Packet] = [
    Continue(), Accept(), Reject(), TempFail(), Discard(), ReplyCode("550 5.7.1 no"),
    ReplyCode("451 4.7.1 later"),
]  # fmt: skip
LEGAL = {stage: [v for v in VERDICTS if stage in replies.LEGAL[v.letter[0]].stages]
         for stage in Stage}  # fmt: skip
ENVELOPE: list[Packet] = [CLIENT, MAIL, RCPT, DATA]
BEFORE: dict[Stage, list[Packet]] = {
    Stage.CONNECT: [], Stage.HELO: [CLIENT], Stage.MAIL: [CLIENT], Stage.RCPT: [CLIENT, MAIL],
    Stage.DATA: [CLIENT, MAIL, RCPT], Stage.UNKNOWN: [CLIENT],
    **dict.fromkeys((Stage.HEADER, Stage.EOH, Stage.BODY, Stage.EOM), ENVELOPE),
}  # fmt: skip
COMMANDS: dict[Stage, Packet] = {
    Stage.CONNECT: CLIENT, Stage.HELO: HELO, Stage.MAIL: MAIL, Stage.RCPT: RCPT, Stage.DATA: DATA,
    Stage.HEADER: commands.Header("Subject", " hi"), Stage.EOH: commands.Eoh(),
    Stage.BODY: commands.Body(b"text\r\n"), Stage.EOM: EOM, Stage.UNKNOWN: commands.Unknown("X"),
}  # fmt: skip
CELLS = [
    (stage, first, second, order)
    for stage in Stage
    for first, second in product(LEGAL[stage], repeat=2)
    for order in (("a", "b"), ("b", "a"))
]


@pytest.mark.parametrize(("stage", "a", "b", "order"), CELLS,
                         ids=lambda v: v.word if isinstance(v, Stage) else str(v))  # fmt: skip
def test_every_pair_of_verdicts_has_the_outcome_of_the_design(
    stage: Stage, a: Packet, b: Packet, order: tuple[str, str]
) -> None:
    mta = Several(A, B)
    mta.go_on(*BEFORE[stage])
    assert mta.asked(COMMANDS[stage]) == "ab"
    given = {"a": a, "b": b}
    go_on = (Continue(), Accept())
    first, second = order
    heard = mta.reply(first, given[first])
    if given[first] not in go_on:  # the first refusal to arrive is the answer
        assert heard == [packed(given[first])]
        assert mta.out() == {}
        return
    assert heard == []
    heard = mta.reply(second, given[second])
    if given[second] not in go_on:
        assert heard == [packed(given[second])]
    else:
        both = (a, b) == (Accept(), Accept())
        assert heard == [packed(Accept() if both else Continue())]


@pytest.mark.parametrize("order", list(permutations("abc")), ids="".join)
def test_actions_arrive_in_the_order_of_the_milters_whoever_is_done_first(
    order: tuple[str, ...],
) -> None:
    mta = Several(A, B, C)
    mta.go_on(CLIENT, *WHOLE[:-1])
    mta.say(EOM)
    heard = [mta.reply(name, AddHeader(f"X-{name}", "1"), Accept()) for name in order]
    actions = [AddHeader(f"X-{name}", "1") for name in "abc"]
    assert heard == [[], [], [packed(*actions, Accept())]]


def test_a_milter_that_accepts_is_not_asked_again_about_that_message() -> None:
    mta = Several(A, B)
    mta.go_on(CLIENT)
    assert mta.asked(MAIL) == "ab"
    mta.reply("a", Accept())
    mta.reply("b", Continue())
    for command in WHOLE[1:]:
        assert mta.asked(command) == "b"
        mta.reply("b", Continue())
    assert mta.asked(MAIL) == "ab"


def test_a_milter_that_accepts_a_client_is_not_asked_again_until_the_next() -> None:
    mta = Several(A, B)
    assert mta.asked(CLIENT) == "ab"
    mta.reply("b", Accept())
    mta.reply("a", Continue())
    for command in [HELO, *WHOLE, *WHOLE]:
        assert mta.asked(command) == "a"
        mta.reply("a", Continue())
    assert mta.asked(commands.QuitNc(), CLIENT) == "ab"


def test_when_the_last_accepts_the_mta_hears_it() -> None:
    mta = Several(A, B)
    mta.go_on(CLIENT)
    assert mta.asked(MAIL) == "ab"
    mta.reply("a", Accept())
    assert mta.reply("b", Continue()) == [packed(Continue())]
    assert mta.asked(RCPT) == "b"
    assert mta.reply("b", Accept()) == [packed(Accept())]


def test_a_refused_recipient_is_refused_for_all_and_the_message_goes_on() -> None:
    mta = Several(A, B)
    mta.go_on(CLIENT, MAIL)
    assert mta.asked(RCPT) == "ab"
    assert mta.reply("b", Reject()) == [packed(Reject())]
    assert [job.manifest.name for job in mta.pool.cancelled if job.manifest] == ["a"]
    assert mta.asked(commands.Rcpt("<c@x>")) == "ab"
    kept = content(mta.out()["a"].message)
    assert kept == packed(MAIL, RCPT) + REFUSED + packed(commands.Rcpt("<c@x>"))


def test_what_fails_is_answered_by_policy_and_ends_the_question() -> None:
    mta = Several(A, B, on_error="tempfail")
    mta.go_on(CLIENT)
    mta.say(MAIL)
    mta.written()
    with capturedLogs():
        mta.out()["b"].result.errback(CallbackFailed("ValueError: bad"))
    assert mta.written() == [packed(TempFail())]
    assert mta.out() == {}


def test_with_the_policy_accept_a_failure_leaves_it_to_the_others() -> None:
    mta = Several(A, B, on_error="accept")
    mta.go_on(CLIENT)
    mta.say(MAIL)
    mta.written()
    with capturedLogs():
        mta.out()["b"].result.errback(WorkerLost("gone"))
    assert mta.written() == []
    assert mta.reply("a", Reject()) == [packed(Reject())]


def test_an_illegal_answer_is_that_milters_failure_alone() -> None:
    mta = Several(A, B, on_error="accept")
    mta.go_on(CLIENT, *WHOLE[:-1])
    mta.say(EOM)
    with capturedLogs() as events:
        assert mta.reply("a", AddHeader("bad\nname", "1"), Accept()) == []
    assert [event["log_level"] for event in events] == [LogLevel.error]
    assert mta.reply("b", AddHeader("X", "1"), Accept()) == [
        packed(AddHeader("X", "1"), Continue())
    ]


def test_a_second_new_body_is_left_out_and_the_log_says_so() -> None:
    mta = Several(A, B)
    mta.go_on(CLIENT, *WHOLE[:-1])
    mta.say(EOM)
    mta.reply("b", ReplaceBody(b"b"), Continue())
    with capturedLogs() as events:
        heard = mta.reply("a", ReplaceBody(b"a"), Continue())
    assert heard == [packed(ReplaceBody(b"a"), Continue())]
    (warning,) = (event for event in events if event["log_level"] is LogLevel.warn)
    assert warning["n"] == 1


def test_answers_that_are_there_at_once_keep_the_order_of_commands() -> None:
    mta = Several(A, B)
    mta.pool.at_once = [packed(Continue()), packed(Accept()), packed(Continue()), packed(Reject())]
    mta.say(CLIENT, HELO, MAIL)
    assert mta.written() == [packed(Continue(), Continue(), Reject())] or mta.pool.at_once


def test_a_refusal_that_is_there_at_once_leaves_the_others_alone() -> None:
    mta = Several(A, B)
    mta.pool.at_once = [packed(Reject())]
    mta.say(CLIENT)
    assert mta.written() == [packed(Reject())]
    assert [job.manifest for job in mta.pool.jobs] == [A]


def test_recipients_that_the_mta_refused_are_for_those_who_asked_for_them() -> None:
    curious = answering("a", Stage.RCPT, Stage.EOM, options=Protocol.RCPT_REJ)
    mta = Several(curious, answering("b", Stage.RCPT, Stage.EOM))
    mta.go_on(CLIENT, MAIL)
    refused = commands.Macro("R", (("{rcpt_mailer}", "error"), ("{rcpt_host}", "5.1.1")))
    accepted = commands.Macro("R", (("{rcpt_mailer}", "smtp"),))
    assert mta.asked(refused, RCPT) == "a"
    assert mta.reply("a", Continue()) == [packed(Continue())]
    assert mta.asked(accepted, commands.Rcpt("<c@x>")) == "ab"
    kept = content(mta.out()["b"].message)
    assert packed(RCPT) + REFUSED in kept


def test_the_mta_hears_the_end_of_the_connection_when_an_answer_gets_lost() -> None:
    mta = Several(A, B)
    mta.say(CLIENT)
    with capturedLogs() as events:
        mta.out()["a"].result.callback(None)  # type: ignore[arg-type]
    assert [e["log_format"] for e in events if e["log_level"] is LogLevel.critical] == [
        "a verdict got lost"
    ]
    assert mta.closed
    assert mta.out() == {}


# Objects


def pinned(name: str, *stages: Stage) -> Manifest:
    return answering(name, *(stages or (Stage.CONNECT, Stage.MAIL, Stage.EOM)),
                     pinning=Pinning.PINNED)  # fmt: skip


def told(job: Job) -> bytes:
    """What the worker would be told."""
    question = job.question()
    return content(question.connection) + content(question.message)


def settled(job: Job) -> Job:
    """As dispatch does when it gives a job to a shard for the first time."""
    assert job.pin is not None
    if job.pin.place is None:
        job.pin.settle("shard", 7)
    return job


def test_an_object_is_told_only_what_is_new() -> None:
    mta = Several(pinned("a"))
    mta.say(CLIENT)
    assert told(settled(mta.out()["a"])).endswith(packed(CLIENT))
    mta.reply("a", Continue())
    mta.say(HELO, MAIL)
    assert told(mta.out()["a"]) == packed(HELO, MAIL)
    mta.reply("a", Continue())
    mta.say(*WHOLE[1:])
    assert told(mta.out()["a"]) == packed(*WHOLE[1:])
    mta.reply("a", Continue())
    mta.say(commands.Abort(), MAIL)
    assert told(mta.out()["a"]) == packed(commands.Abort(), MAIL)


def test_an_object_is_told_the_mtas_offer_and_ours() -> None:
    mta = Several(pinned("a"))
    mta.say(CLIENT)
    offer, answer = (commands.Negotiate(6, 0x1FF, 0x1FFFFF), mta.connection)
    assert answer is not None
    assert told(settled(mta.out()["a"])).startswith(packed(offer))


def test_a_client_that_greets_for_ever_is_told_of_once() -> None:
    mta = Several(pinned("a", Stage.CONNECT, Stage.EOM))
    mta.say(CLIENT)
    told(settled(mta.out()["a"]))
    mta.reply("a", Continue())
    for number in range(1000):
        mta.say(commands.Helo(str(number)))
    mta.say(*WHOLE)
    assert told(mta.out()["a"]) == packed(commands.Helo("999"), *WHOLE)


@pytest.mark.parametrize("end", [[commands.Quit()], [commands.QuitNc()], []], ids=str)
def test_an_object_ends_with_its_client(end: list[Packet]) -> None:
    mta = Several(pinned("a"), B)
    mta.say(CLIENT)
    told(settled(mta.out()["a"]))
    mta.reply("a", Continue())
    mta.reply("b", Continue())
    mta.say(*end)
    if not end:
        mta.hang_up()
    (farewell,) = mta.out().values()
    assert (farewell.stage, farewell.letter) == (None, b"Q")
    pin = farewell.pin
    assert told(farewell) == b""
    farewell.result.callback(b"")
    assert mta.pool.released == [pin]


def test_an_object_that_is_left_in_a_message_hears_of_its_end_first() -> None:
    mta = Several(pinned("a"))
    mta.say(CLIENT)
    told(settled(mta.out()["a"]))
    mta.reply("a", Continue())
    mta.say(MAIL)
    told(mta.out()["a"])
    mta.reply("a", Continue())
    mta.hang_up()
    assert told(mta.out()["a"]) == packed(commands.Abort())


def test_where_nobody_was_asked_nobody_is_told_of_the_end() -> None:
    mta = Several(pinned("a", Stage.EOM))
    mta.say(CLIENT, HELO, commands.Quit())
    assert (mta.pool.jobs, mta.pool.released) == ([], [])


def test_a_farewell_that_fails_is_noted_and_over() -> None:
    mta = Several(pinned("a"))
    mta.say(CLIENT)
    told(settled(mta.out()["a"]))
    mta.reply("a", Continue())
    mta.hang_up()
    with capturedLogs() as events:
        mta.out()["a"].result.errback(WorkerLost("killed by SIGKILL"))
    assert [event["log_level"] for event in events] == [LogLevel.info]
    assert len(mta.pool.released) == 1


def test_the_chain_negotiates_for_all() -> None:
    mta = Several(answering("a", Stage.EOM, actions=0x1), answering("b", Stage.RCPT, actions=0x4),
                  offer=None)  # fmt: skip
    mta.say(commands.Negotiate(6, 0x1FF, 0x1FFFFF))
    (answer,) = mta.written()
    words = commands.Negotiate.parse(answer[5:])
    assert (words.version, words.actions) == (6, 0x5)
    expected = ALL_NR & ~(Protocol.NR_RCPT | Protocol.NR_EOM)
    assert words.protocol == expected
    assert EVERYTHING.actions
