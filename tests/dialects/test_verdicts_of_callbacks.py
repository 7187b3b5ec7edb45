"""The return codes and the calls of each callback: every cell of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from watched import CALLBACKS, EVERY_CALLBACK, PACKETS, Watched, agreed

from sharded_milter.dialects.libmilter.classes import Milter
from sharded_milter.dialects.libmilter.context import ReturnCodes
from sharded_milter.errors import CallRefused, InvalidVerdict
from sharded_milter.protocol import commands
from sharded_milter.protocol.stages import Protocol, Stage
from sharded_milter.protocol.wire import frame

# The letter of the reply to each code, by callback. What is missing is refused.
CLIENT = {"CONTINUE": "c", "REJECT": "r", "ACCEPT": "a", "TEMPFAIL": "t"}
IN_MESSAGE = {**CLIENT, "DISCARD": "d"}
ANSWERS = {
    "xxfi_connect": CLIENT,
    "xxfi_helo": CLIENT,
    "xxfi_envfrom": IN_MESSAGE,
    "xxfi_envrcpt": IN_MESSAGE,
    "xxfi_data": IN_MESSAGE,
    "xxfi_header": {**IN_MESSAGE, "NOREPLY": "c"},
    "xxfi_eoh": {**IN_MESSAGE, "NOREPLY": "c"},
    "xxfi_body": {**IN_MESSAGE, "NOREPLY": "c", "SKIP": "c"},
    "xxfi_eom": IN_MESSAGE,
    "xxfi_unknown": {"CONTINUE": "c", "REJECT": "r", "TEMPFAIL": "t"},
}
NUMBERS = {"CONTINUE": 0, "REJECT": 1, "DISCARD": 2, "ACCEPT": 3, "TEMPFAIL": 4, "NOREPLY": 7,
           "SKIP": 8, "ALL_OPTS": 10}  # fmt: skip
WORDS = {
    "xxfi_connect": "CONTINUE, REJECT, ACCEPT, TEMPFAIL",
    "xxfi_helo": "CONTINUE, REJECT, ACCEPT, TEMPFAIL",
    "xxfi_envfrom": "CONTINUE, REJECT, DISCARD, ACCEPT, TEMPFAIL",
    "xxfi_envrcpt": "CONTINUE, REJECT, DISCARD, ACCEPT, TEMPFAIL",
    "xxfi_data": "CONTINUE, REJECT, DISCARD, ACCEPT, TEMPFAIL",
    "xxfi_header": "CONTINUE, REJECT, DISCARD, ACCEPT, TEMPFAIL, NOREPLY",
    "xxfi_eoh": "CONTINUE, REJECT, DISCARD, ACCEPT, TEMPFAIL, NOREPLY",
    "xxfi_body": "CONTINUE, REJECT, DISCARD, ACCEPT, TEMPFAIL, NOREPLY, SKIP",
    "xxfi_eom": "CONTINUE, REJECT, DISCARD, ACCEPT, TEMPFAIL",
    "xxfi_unknown": "CONTINUE, REJECT, TEMPFAIL",
}
WRONG: list[Any] = [None, 42, -1, True, False, "x", [], "REJECT", object]
by_stage = pytest.mark.parametrize("stage", CALLBACKS, ids=CALLBACKS.__getitem__)


def test_the_codes_are_libmilters() -> None:
    assert {code.name: int(code) for code in ReturnCodes} == NUMBERS
    assert Milter.ReturnCodes is ReturnCodes


@pytest.mark.parametrize("coroutines", [False, True], ids=["plain", "coroutine"])
@pytest.mark.parametrize("code", ReturnCodes, ids=lambda code: code.name)
@by_stage
def test_a_callback_answers_what_the_table_says(
    stage: Stage, code: ReturnCodes, coroutines: bool
) -> None:
    name = CALLBACKS[stage]
    watched = Watched({name: code}, coroutines=coroutines)
    letter = ANSWERS[name].get(code.name)
    if letter is not None:
        assert watched.ask(PACKETS[stage]) == frame(letter.encode())
        return
    with pytest.raises(InvalidVerdict) as refused:
        watched.ask(PACKETS[stage])
    assert str(refused.value) == f"{name} returned {code.name}; it may return {WORDS[name]}"


@by_stage
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_anything_else_is_refused_and_named(stage: Stage, wrong: Any) -> None:
    name = CALLBACKS[stage]
    watched = Watched({name: lambda milter: wrong})
    with pytest.raises(InvalidVerdict) as refused:
        watched.ask(PACKETS[stage])
    assert str(refused.value) == f"{name} returned {wrong!r}; it may return {WORDS[name]}"


@by_stage
def test_the_plain_numbers_are_understood(stage: Stage) -> None:
    name = CALLBACKS[stage]
    assert Watched({name: 4}).ask(PACKETS[stage]) == frame(b"t")


@by_stage
def test_a_callback_that_is_not_there_continues(stage: Stage) -> None:
    watched = Watched(callbacks=[])
    assert watched.ask(PACKETS[stage]) == frame(b"c")


UNANSWERED = {
    Stage.CONNECT: Protocol.NR_CONNECT,
    Stage.HELO: Protocol.NR_HELO,
    Stage.MAIL: Protocol.NR_MAIL,
    Stage.RCPT: Protocol.NR_RCPT,
    Stage.DATA: Protocol.NR_DATA,
    Stage.UNKNOWN: Protocol.NR_UNKNOWN,
}


@pytest.mark.parametrize("stage", UNANSWERED, ids=CALLBACKS.get)
def test_no_reply_is_for_stages_that_were_negotiated_so(stage: Stage) -> None:
    name = CALLBACKS[stage]
    wants = {"xxfi_negotiate": (0, UNANSWERED[stage])}
    watched = Watched({name: ReturnCodes.NOREPLY, **wants})
    assert watched.ask(PACKETS[stage]) == frame(b"c")
    assert not watched.dialect.manifest.answers(stage)
    assert Watched(wants).ask(PACKETS[stage]) == frame(b"c")
    with pytest.raises(InvalidVerdict, match="returned NOREPLY"):
        Watched({name: ReturnCodes.NOREPLY}).ask(PACKETS[stage])


@pytest.mark.parametrize("code", ["REJECT", "DISCARD", "ACCEPT", "TEMPFAIL", "SKIP", "ALL_OPTS"])
@pytest.mark.parametrize("stage", UNANSWERED, ids=CALLBACKS.get)
def test_a_verdict_that_nobody_would_hear_is_refused(stage: Stage, code: str) -> None:
    name = CALLBACKS[stage]
    wants = {"xxfi_negotiate": (0, UNANSWERED[stage])}
    with pytest.raises(InvalidVerdict) as refused:
        Watched({name: ReturnCodes[code], **wants}).ask(PACKETS[stage])
    assert str(refused.value) == f"{name} returned {code}; it may return CONTINUE, NOREPLY"


@pytest.mark.parametrize(
    ("stage", "bit"),
    [
        (Stage.HEADER, Protocol.NR_HEADER),
        (Stage.EOH, Protocol.NR_EOH),
        (Stage.BODY, Protocol.NR_BODY),
    ],
)
def test_a_verdict_on_content_is_heard_at_the_end_whatever_was_negotiated(
    stage: Stage, bit: Protocol
) -> None:
    watched = Watched({CALLBACKS[stage]: ReturnCodes.REJECT, "xxfi_negotiate": (0, bit)})
    assert watched.ask(PACKETS[stage], PACKETS[Stage.EOM]) == frame(b"r")


# Verdicts and the messages they are of

MESSAGE = [Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.HEADER, Stage.EOH, Stage.BODY]
FINAL = [ReturnCodes.REJECT, ReturnCodes.DISCARD, ReturnCodes.ACCEPT, ReturnCodes.TEMPFAIL]
# Where a refusal is of one recipient, or of one DATA command, and the message goes on.
OPEN = {
    (Stage.RCPT, "REJECT"),
    (Stage.RCPT, "TEMPFAIL"),
    (Stage.DATA, "REJECT"),
    (Stage.DATA, "TEMPFAIL"),
}
TEXT = {"REJECT": b"r", "DISCARD": b"d", "ACCEPT": b"a", "TEMPFAIL": b"t"}


@pytest.mark.parametrize("code", FINAL, ids=lambda code: code.name)
@pytest.mark.parametrize("stage", MESSAGE, ids=CALLBACKS.get)
def test_a_verdict_before_the_end_is_the_messages(stage: Stage, code: ReturnCodes) -> None:
    watched = Watched({CALLBACKS[stage]: code})
    answer = watched.ask(*(PACKETS[each] for each in [*MESSAGE, Stage.EOM]))
    if (stage, code.name) in OPEN:
        assert answer == frame(b"c")
        assert watched.names == [CALLBACKS[each] for each in [*MESSAGE, Stage.EOM]]
        return
    assert answer == frame(TEXT[code.name])
    assert watched.names == [CALLBACKS[each] for each in MESSAGE[: MESSAGE.index(stage) + 1]]
    watched.ask(commands.Abort(), PACKETS[Stage.MAIL])
    assert watched.names[-1] == "xxfi_envfrom"
    assert "xxfi_abort" not in watched.names


@pytest.mark.parametrize("code", FINAL, ids=lambda code: code.name)
def test_the_last_piece_of_the_body_may_decide_instead_of_the_end(code: ReturnCodes) -> None:
    watched = Watched({"xxfi_body": code})
    assert watched.ask(PACKETS[Stage.MAIL], commands.Eom(b"end")) == frame(TEXT[code.name])
    assert watched.calls[1:] == [("xxfi_body", b"end")]
    assert watched.ask(PACKETS[Stage.MAIL]) == frame(b"c")


def test_the_end_may_bring_the_last_piece_of_the_body() -> None:
    watched = Watched()
    assert watched.ask(commands.Body(b"one"), commands.Eom(b"two")) == frame(b"c")
    assert watched.calls == [("xxfi_body", b"one"), ("xxfi_body", b"two"), ("xxfi_eom",)]


def test_no_more_of_the_body_comes_after_skip_until_the_next_message() -> None:
    watched = Watched({"xxfi_body": ReturnCodes.SKIP})
    watched.ask(commands.Body(b"one"), commands.Body(b"two"), commands.Eom(b"three"))
    assert watched.calls == [("xxfi_body", b"one"), ("xxfi_eom",)]
    watched.ask(PACKETS[Stage.MAIL], commands.Body(b"four"), commands.Body(b"five"))
    assert watched.calls[2:] == [watched.calls[2], ("xxfi_body", b"four")]


# What may be called where

CHANGES: dict[str, tuple[Any, ...]] = {
    "smfi_addheader": ("X", "v"),
    "smfi_insheader": (0, "X", "v"),
    "smfi_chgheader": ("X", 1, "v"),
    "smfi_chgfrom": ("a@b",),
    "smfi_addrcpt": ("a@b",),
    "smfi_addrcpt_par": ("a@b", "NOTIFY=NEVER"),
    "smfi_delrcpt": ("a@b",),
    "smfi_replacebody": (b"new",),
    "smfi_quarantine": ("odd",),
}
ONLY_AT_EOM = {**CHANGES, "smfi_progress": ()}
ANYWHERE: dict[str, tuple[Any, ...]] = {
    "smfi_getsymval": ("i",),
    "smfi_setreply": ("550", "5.7.1", "no"),
    "smfi_setmlreply": ("450", None, "one", "two"),
}
ONLY_AT_NEGOTIATE: dict[str, tuple[Any, ...]] = {"smfi_setsymlist": (5, "i")}
EVERY_CALL = {**ONLY_AT_EOM, **ANYWHERE, **ONLY_AT_NEGOTIATE}
CALLERS = ["xxfi_negotiate", *EVERY_CALLBACK]
CONVERSATION = [
    *agreed(),
    *(PACKETS[stage] for stage in (Stage.CONNECT, Stage.HELO, *MESSAGE, Stage.EOM)),
    PACKETS[Stage.UNKNOWN],
    PACKETS[Stage.MAIL],
    commands.Abort(),
]


def calling(call: str, heard: list[str], then: Any) -> Callable[[Any], Any]:
    def answer(milter: Any) -> Any:
        try:
            getattr(milter, call)(*EVERY_CALL[call])
        except CallRefused as error:
            heard.append(str(error))
        else:
            heard.append("")
        return then

    return answer


def test_every_call_of_the_class_is_in_the_table() -> None:
    assert set(EVERY_CALL) == {name for name in vars(Milter) if name.startswith("smfi_")}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("call", EVERY_CALL)
def test_a_call_is_allowed_where_libmilter_allows_it(call: str, caller: str) -> None:
    heard: list[str] = []
    then = (0xFF, 0) if caller == "xxfi_negotiate" else ReturnCodes.CONTINUE
    watched = Watched({caller: calling(call, heard, then)})
    watched.ask(*CONVERSATION)
    watched.close()
    place = "xxfi_eom" if call in ONLY_AT_EOM else "xxfi_negotiate"
    allowed = call in ANYWHERE or caller == place
    wanted = "" if allowed else f"{call} is only allowed in {place}, not in {caller}"
    assert set(heard) == {wanted}


@pytest.mark.parametrize("call", [*ONLY_AT_EOM, *ONLY_AT_NEGOTIATE])
def test_between_two_callbacks_nothing_can_be_changed(call: str) -> None:
    kept: list[Any] = []

    def keep(milter: Any) -> ReturnCodes:
        kept.append(milter)
        return ReturnCodes.CONTINUE

    watched = Watched({"xxfi_eom": keep})
    watched.ask(*CONVERSATION)
    place = "xxfi_eom" if call in ONLY_AT_EOM else "xxfi_negotiate"
    with pytest.raises(CallRefused) as refused:
        getattr(kept[0], call)(*EVERY_CALL[call])
    assert str(refused.value) == f"{call} is only allowed in {place}, not in no callback"


def test_a_coroutine_may_call_after_it_has_waited() -> None:
    def change(milter: Any) -> ReturnCodes:
        milter.smfi_addrcpt("a@b")
        return ReturnCodes.CONTINUE

    watched = Watched({"xxfi_eom": change}, coroutines=True)
    assert watched.ask(*agreed(), PACKETS[Stage.EOM]) == frame(b"+", b"a@b\0") + frame(b"c")


def end_of_message(code: ReturnCodes) -> Watched:
    def change(milter: Any) -> ReturnCodes:
        milter.smfi_addrcpt("a@b")
        milter.smfi_progress()
        return code

    return Watched({"xxfi_eom": change})


@pytest.mark.parametrize("code", [ReturnCodes.CONTINUE, *FINAL], ids=lambda code: code.name)
def test_changes_go_with_a_message_that_is_delivered(code: ReturnCodes) -> None:
    watched = end_of_message(code)
    delivered = code.name in ("CONTINUE", "ACCEPT")
    changed = frame(b"+", b"a@b\0") if delivered else b""
    final = frame({"CONTINUE": b"c", **TEXT}[code.name])
    assert watched.ask(*agreed(), PACKETS[Stage.EOM]) == changed + final
    assert watched.ask(PACKETS[Stage.MAIL], PACKETS[Stage.EOM]) == changed + final


def test_changes_before_a_failure_are_forgotten() -> None:
    fails = [True, False]

    def change(milter: Any) -> ReturnCodes:
        milter.smfi_addrcpt("a@b")
        if fails.pop(0):
            raise ZeroDivisionError
        return ReturnCodes.CONTINUE

    watched = Watched({"xxfi_eom": change})
    with pytest.raises(ZeroDivisionError):
        watched.ask(*agreed(), PACKETS[Stage.EOM])
    assert watched.ask(PACKETS[Stage.EOM]) == frame(b"+", b"a@b\0") + frame(b"c")
    assert "xxfi_abort" not in watched.names


ACTIONS = {
    "smfi_addheader": 0x1,
    "smfi_insheader": 0x1,
    "smfi_replacebody": 0x2,
    "smfi_addrcpt": 0x4,
    "smfi_delrcpt": 0x8,
    "smfi_chgheader": 0x10,
    "smfi_quarantine": 0x20,
    "smfi_chgfrom": 0x40,
    "smfi_addrcpt_par": 0x80,
}


@pytest.mark.parametrize("call", CHANGES)
@pytest.mark.parametrize("lacking", ["the MTA", "the milter"])
def test_a_change_needs_what_milter_and_mta_have_agreed_on(call: str, lacking: str) -> None:
    without, bit = 0xFF & ~ACTIONS[call], ACTIONS[call]
    by_mta, by_milter = (without, 0xFF) if lacking == "the MTA" else (0xFF, without)
    heard: list[str] = []
    answers = {
        "xxfi_negotiate": (by_milter, 0),
        "xxfi_eom": calling(call, heard, ReturnCodes.CONTINUE),
    }
    watched = Watched(answers)
    assert watched.ask(*agreed(by_mta), PACKETS[Stage.EOM]) == frame(b"c")
    assert len(heard) == 1
    assert heard[0].startswith(f"{call}: the action ")
    assert heard[0].endswith(" was not negotiated with the MTA")
    watched = Watched({**answers, "xxfi_negotiate": (bit, 0)})
    assert watched.ask(*agreed(bit), PACKETS[Stage.EOM]) != frame(b"c")


# The words of refusals


def saying(rcode: str, then: ReturnCodes) -> Callable[[Any], ReturnCodes]:
    def answer(milter: Any) -> ReturnCodes:
        milter.smfi_setreply(rcode, None, "mine")
        return then

    return answer


@pytest.mark.parametrize("rcode", ["450", "550"])
@pytest.mark.parametrize("code", [ReturnCodes.CONTINUE, *FINAL], ids=lambda code: code.name)
def test_the_words_are_those_of_a_refusal_of_their_class(code: ReturnCodes, rcode: str) -> None:
    watched = Watched({"xxfi_envfrom": saying(rcode, code)})
    fits = (code.name, rcode) in {("REJECT", "550"), ("TEMPFAIL", "450")}
    said = frame(b"y", f"{rcode} mine\0".encode())
    plain = frame({"CONTINUE": b"c", **TEXT}[code.name])
    assert watched.ask(PACKETS[Stage.MAIL]) == (said if fits else plain)


def test_words_that_were_not_said_are_kept_for_the_next_refusal_and_said_once() -> None:
    codes = iter([ReturnCodes.TEMPFAIL, ReturnCodes.REJECT, ReturnCodes.REJECT])
    watched = Watched(
        {
            "xxfi_helo": saying("550", ReturnCodes.CONTINUE),
            "xxfi_envrcpt": lambda milter: next(codes),
        }
    )
    watched.ask(PACKETS[Stage.HELO], PACKETS[Stage.MAIL])
    assert watched.ask(PACKETS[Stage.RCPT]) == frame(b"t")
    assert watched.ask(PACKETS[Stage.RCPT]) == frame(b"y", b"550 mine\0")
    assert watched.ask(PACKETS[Stage.RCPT]) == frame(b"r")


def test_words_in_several_lines() -> None:
    def answer(milter: Any) -> ReturnCodes:
        milter.smfi_setmlreply("550", None, "one", "two")
        return ReturnCodes.REJECT

    said = frame(b"y", b"550-5.0.0 one\r\n550 5.0.0 two\0")
    assert Watched({"xxfi_helo": answer}).ask(PACKETS[Stage.HELO]) == said


def test_the_words_stay_with_a_verdict_that_is_kept_for_the_end() -> None:
    watched = Watched({"xxfi_header": saying("550", ReturnCodes.REJECT)})
    packets = [PACKETS[stage] for stage in (Stage.MAIL, Stage.HEADER, Stage.EOH, Stage.EOM)]
    assert watched.ask(*packets) == frame(b"y", b"550 mine\0")
