"""What the MTA hears when a milter gives no verdict: at every stage a legal answer."""

from __future__ import annotations

import pytest

from sharded_milter.dispatch.policy import (
    BUSY,
    CHOICES,
    NO_ROOM,
    RELOADED,
    STOPPING,
    TOO_LARGE,
    Policy,
    answer_for,
)
from sharded_milter.errors import (
    CallbackFailed,
    DeadlineExceeded,
    InvalidValue,
    LocalProtocolError,
    Overloaded,
    Poisoned,
    Superseded,
    WorkerLost,
)
from sharded_milter.protocol.answers import check_replies
from sharded_milter.protocol.commands import Negotiate
from sharded_milter.protocol.negotiation import Agreement
from sharded_milter.protocol.replies import Continue, Reject, ReplyCode, TempFail, parse_reply
from sharded_milter.protocol.stages import Stage

#: Nothing was agreed on: what is legal here is legal with every MTA.
NOTHING = Agreement(Negotiate(2, 0, 0), {}, frozenset())
FAILED = [CallbackFailed("no"), WorkerLost("no"), DeadlineExceeded("no")]
ERRORS = [
    *FAILED,
    Overloaded("no"),
    Poisoned("no"),
    Superseded("no"),
    LocalProtocolError("no"),
    ValueError("a defect of ours"),
    None,
]


@pytest.mark.parametrize("stage", list(Stage), ids=lambda stage: stage.word)
@pytest.mark.parametrize("on_error", CHOICES)
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_the_policys_answer_is_legal_at_every_stage(
    stage: Stage, on_error: str, error: BaseException | None
) -> None:
    answer = answer_for(error, Policy(on_error), stage)
    assert check_replies(stage, answer, NOTHING) == answer[4]


@pytest.mark.parametrize("stage", list(Stage), ids=lambda stage: stage.word)
@pytest.mark.parametrize("answer", [BUSY, TOO_LARGE, STOPPING, NO_ROOM, RELOADED], ids=repr)
def test_the_masters_own_answers_are_legal_at_every_stage(stage: Stage, answer: bytes) -> None:
    assert check_replies(stage, answer, NOTHING) == ord("y")


@pytest.mark.parametrize("error", FAILED, ids=repr)
@pytest.mark.parametrize(
    ("on_error", "answer"), [("tempfail", TempFail()), ("accept", Continue()), ("reject", Reject())]
)
def test_a_failed_job_gets_what_the_operator_wants(
    error: BaseException, on_error: str, answer: object
) -> None:
    assert parse_reply(answer_for(error, Policy(on_error), Stage.RCPT)) == answer


@pytest.mark.parametrize("on_error", CHOICES)
def test_overload_is_temporary_whatever_the_operator_wants(on_error: str) -> None:
    assert answer_for(Overloaded("full"), Policy(on_error), Stage.EOM) == BUSY


@pytest.mark.parametrize(
    ("on_poison", "answer"),
    [("tempfail", TempFail()), ("accept", Continue()), ("reject", Reject())],
)
def test_poison_has_a_policy_of_its_own(on_poison: str, answer: object) -> None:
    policy = Policy("tempfail", on_poison)
    assert parse_reply(answer_for(Poisoned("twice"), policy, Stage.EOM)) == answer


@pytest.mark.parametrize("on_error", CHOICES)
def test_a_reloaded_milter_wants_a_new_connection_whatever_the_policy(on_error: str) -> None:
    assert answer_for(Superseded("new"), Policy(on_error), Stage.EOM) == RELOADED


@pytest.mark.parametrize("on_error", CHOICES)
def test_what_is_not_the_milters_failure_is_temporary_before_the_end(on_error: str) -> None:
    answer = answer_for(LocalProtocolError("odd"), Policy(on_error), Stage.MAIL)
    assert parse_reply(answer) == TempFail()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (BUSY, "451 4.3.2 "),
        (TOO_LARGE, "552 5.3.4 "),
        (STOPPING, "451 4.3.2 "),
        (NO_ROOM, "452 4.3.1 "),
        (RELOADED, "421 4.3.2 "),
    ],
)
def test_the_masters_own_answers_say_why(answer: bytes, text: str) -> None:
    reply = parse_reply(answer)
    assert isinstance(reply, ReplyCode)
    assert reply.text.startswith(text)


@pytest.mark.parametrize("name", ["on_error", "on_poison"])
@pytest.mark.parametrize("choice", ["temp_fail", "Accept", "", "discard"])
def test_another_choice_is_refused_when_the_policy_is_made(name: str, choice: str) -> None:
    words = f"{name} is '{choice}'; it must be one of tempfail, accept, reject"
    with pytest.raises(InvalidValue, match=words):
        Policy(**{name: choice})
