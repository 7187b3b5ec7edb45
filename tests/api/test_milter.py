"""Registering callbacks, and the verdicts of each stage: every cell of the table."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cells import every

from sharded_milter import (
    Accept,
    AddHeader,
    Discard,
    InvalidValue,
    InvalidVerdict,
    Milter,
    Reject,
    TempFail,
)
from sharded_milter.api.milter import MACRO_STAGES, MAX_MACROS, VERDICTS, Callback, check_verdict

STAGES = list(VERDICTS)
ANSWERS: dict[str, Any] = {
    "continue": None,
    "accept": Accept(),
    "accept with actions": Accept(AddHeader("X", "v")),
    "reject": Reject("no"),
    "tempfail": TempFail("later"),
    "discard": Discard(),
}
#: Written out by hand: the table in the code is what is tested.
LEGAL = {
    "connect": {"continue", "accept", "reject", "tempfail"},
    "helo": {"continue", "accept", "reject", "tempfail"},
    "mail": {"continue", "accept", "reject", "tempfail", "discard"},
    "rcpt": {"continue", "reject", "tempfail"},
    "data": {"continue", "accept", "reject", "tempfail", "discard"},
    "eoh": {"continue", "accept", "reject", "tempfail", "discard"},
    "eom": set(ANSWERS),
    "unknown": {"continue", "reject", "tempfail"},
}


@every(STAGES, ANSWERS)
def test_a_stage_takes_its_verdicts_and_no_others(stage: str, answer: str) -> None:
    verdict = ANSWERS[answer]
    if answer in LEGAL[stage]:
        assert check_verdict(stage, verdict) is verdict
    else:
        with pytest.raises(InvalidVerdict, match=f"the {stage} callback returned"):
            check_verdict(stage, verdict)


@every(STAGES, [True, 0, "accept", Accept, AddHeader("X", "v"), [Accept()]])
def test_what_is_no_verdict_is_refused_with_what_may_be_returned(stage: str, wrong: Any) -> None:
    names = ", ".join(kind.__name__ for kind in VERDICTS[stage])
    with pytest.raises(InvalidVerdict, match=re.escape(f"it may return {names} or None")):
        check_verdict(stage, wrong)


def test_a_forgotten_await_is_named() -> None:
    async def scan() -> None: ...

    never = scan()
    with pytest.raises(InvalidVerdict, match=r"is an `await` missing"):
        check_verdict("eom", never)
    never.close()


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidVerdict) as caught:
        check_verdict("eom", "x" * 10_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_registers_bare_and_with_a_promise(stage: str) -> None:
    def callback(*arguments: object) -> None: ...

    bare, empty, light = Milter("a"), Milter("b"), Milter("c")
    assert getattr(bare, stage)(callback) is callback
    assert getattr(empty, stage)()(callback) is callback
    assert getattr(light, stage)(light=True)(callback) is callback
    assert bare.callbacks == empty.callbacks == {stage: Callback(callback, False)}
    assert light.callbacks == {stage: Callback(callback, True)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_callback(stage: str) -> None:
    milter = Milter("twice")
    getattr(milter, stage)(lambda *_: None)
    with pytest.raises(InvalidValue, match=f"milter twice has two {stage} callbacks"):
        getattr(milter, stage)(lambda *_: None)


@pytest.mark.parametrize("stage", STAGES)
def test_a_callback_can_be_called(stage: str) -> None:
    with pytest.raises(InvalidValue, match=f"{stage} callback 'scan' is not callable"):
        getattr(Milter("a"), stage)("scan")


@pytest.mark.parametrize("name", ["", "a\nb", "\0"])
def test_a_name_is_printable(name: str) -> None:
    with pytest.raises(InvalidValue, match="milter name"):
        Milter(name)


def test_a_milter_prints_its_name_and_stages() -> None:
    milter = Milter("spamguard")
    milter.eom(lambda message: None)
    milter.connect(lambda connection: None)
    assert repr(milter) == "Milter('spamguard', stages=['connect', 'eom'])"


@pytest.mark.parametrize("shard_by", ["", "sender", "recipient", "client", "session"])
def test_shard_by_is_kept(shard_by: Any) -> None:
    assert Milter("a", shard_by=shard_by).shard_by == shard_by


def test_shard_by_is_one_of_few() -> None:
    wrong: Any = "subject"
    with pytest.raises(InvalidValue, match="shard_by 'subject' is not one of sender, recipient"):
        Milter("a", shard_by=wrong)


@pytest.mark.parametrize("stage", MACRO_STAGES)
def test_macros_are_asked_for_by_stage(stage: str) -> None:
    assert Milter("a", macros={stage: ["i", "{auth_authen}"]}).macros == {
        stage: ("i", "{auth_authen}")
    }


@pytest.mark.parametrize("stage", ["unknown", "header", "body", "EOM", ""])
def test_macros_can_be_asked_for_at_seven_stages(stage: str) -> None:
    with pytest.raises(InvalidValue, match="the stages are connect, helo"):
        Milter("a", macros={stage: ["i"]})


@pytest.mark.parametrize("macros", [["i"], "i", 1])
def test_macros_are_a_mapping(macros: Any) -> None:
    with pytest.raises(InvalidValue, match="not a mapping"):
        Milter("a", macros=macros)


@pytest.mark.parametrize("names", ["{auth_authen}", None, 1, {"i"}, ["i"] * (MAX_MACROS + 1)])
def test_the_macros_of_a_stage_are_a_short_list(names: Any) -> None:
    with pytest.raises(InvalidValue, match="not a list of at most 30"):
        Milter("a", macros={"eom": names})


@pytest.mark.parametrize("name", ["", "auth_authen", "{}", "{a b}", "{a", "ü", "{", " ", None, 1])
def test_a_macro_name_is_spelled_as_the_mta_does(name: Any) -> None:
    with pytest.raises(InvalidValue, match="macro"):
        Milter("a", macros={"eom": [name]})


def test_a_milter_opts_in_to_the_sandbox() -> None:
    assert not Milter("x").sandbox
    assert Milter("x", sandbox=True).sandbox
