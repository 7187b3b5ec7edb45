"""Milters answer at once or later: what is asked of them is bytes then, or has not fired."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from one_mta import CONTINUE, OFFER, TEMPFAIL, RecordedPool, packed
from several_milters import A, B, C
from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs

from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.policy import BUSY, Policy
from sharded_milter.errors import JobFailed, Overloaded, WorkerLost
from sharded_milter.mta.inflight import Inflight
from sharded_milter.mta.members import Member
from sharded_milter.mta.milters import Milters
from sharded_milter.mta.transcript import Transcript
from sharded_milter.protocol import replies
from sharded_milter.protocol.negotiation import negotiate
from sharded_milter.protocol.stages import Stage

GO_ON, REFUSED = packed(CONTINUE), packed(replies.Reject())
Answer = bytes | JobFailed
#: What a milter may answer, and what the MTA is to hear of it.
TOLD: dict[Answer, bytes] = {
    GO_ON: GO_ON,
    REFUSED: REFUSED,
    Overloaded("full"): BUSY,
    WorkerLost("died"): packed(TEMPFAIL),
}


class Asked:
    """Milters with a server each that are asked one question; some answer it at once."""

    def __init__(self, *at_once: Answer | None) -> None:
        self.pools = [RecordedPool(at_once=[] if said is None else [said]) for said in at_once]
        manifests = [A, B, C][: len(at_once)]
        members = [Member(*each) for each in zip(manifests, self.pools, strict=True)]
        self.milters = Milters(members, Policy(), Transcript(1000, Inflight(1000)))
        self.milters.agree(negotiate(OFFER, manifests))
        self.heard: list[bytes] = []

    def ask(self) -> bytes | Deferred[bytes]:
        _, answer = self.milters.ask(Job(Stage.MAIL, b"", b""))
        return answer

    def later(self, pool: RecordedPool, said: Answer) -> None:
        for job in pool.jobs:
            pool.answer(job, said)


def outcome(case: Sequence[tuple[Answer, bool]]) -> list[bytes]:
    """Return the answer after all were asked, and after each later answer, in order."""
    asked = Asked(*(said if at_once else None for said, at_once in case))
    answer = asked.ask()
    if isinstance(answer, bytes):
        heard = [answer]
    else:
        heard = [b"fired too early" if answer.called else b""]
        answer.addCallback(asked.heard.append)
    for pool, (said, at_once) in zip(asked.pools, case, strict=True):
        if not at_once:
            asked.later(pool, said)
            heard.append(b"".join(asked.heard))
    out = [job for pool in asked.pools for job in pool.jobs if job.answer is not None]
    return heard if not out else [*heard, b"somebody is still asked"]


def expected(case: Sequence[tuple[Answer, bool]]) -> list[bytes]:
    """The first refusal counts, whenever it comes; else the last answer is the end."""
    now = [TOLD[said] for said, at_once in case if at_once]
    later = [TOLD[said] for said, at_once in case if not at_once]
    refusals = [told for told in now if told != GO_ON]
    if refusals or not later:
        return [*(refusals or [GO_ON])[:1], *[b""] * len(later)]
    heard = [b""]
    for number, told in enumerate(later, 1):
        heard.append(heard[-1] or (told if told != GO_ON or number == len(later) else b""))
    return heard


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_answer_is_there_at_once_or_has_not_fired_and_comes_once(count: int) -> None:
    ways = list(product(TOLD, (True, False)))
    with capturedLogs():
        wrong = [c for c in product(ways, repeat=count) if outcome(c) != expected(c)]
    assert wrong == []


def test_whoever_is_not_asked_is_not_waited_for() -> None:
    asked = Asked(None, None)
    asked.ask()
    asked.milters.cancel()
    assert [len(pool.cancelled) for pool in asked.pools] == [1, 1]
    _, answer = Asked().milters.ask(Job(Stage.MAIL, b"", b""))
    assert answer == GO_ON


class Waking(RecordedPool):
    """Asking it wakes another milter, which then answers."""

    def wakes(self, pool: RecordedPool, said: Any) -> None:
        self.pool, self.said = pool, said

    def submit(self, job: Job) -> bytes | Deferred[bytes]:
        for other in self.pool.jobs:
            self.pool.answer(other, self.said)
        return super().submit(job)


def woken(said: Any, own: Answer | None = None) -> tuple[Asked, Waking]:
    """The first milter answers when the second, of three, is asked."""
    asked = Asked(None, own, None)
    pool = asked.pools[1] = Waking(at_once=asked.pools[1].at_once)
    pool.wakes(asked.pools[0], said)
    members = [Member(*each) for each in zip((A, B, C), asked.pools, strict=True)]
    asked.milters = Milters(members, Policy(), Transcript(1000, Inflight(1000)))
    asked.milters.agree(negotiate(OFFER, [A, B, C]))
    return asked, pool


@pytest.mark.parametrize("own", [None, GO_ON], ids=["later", "at once"])
def test_a_refusal_is_the_answer_while_others_are_still_asked(own: Answer | None) -> None:
    asked, second = woken(REFUSED, own)
    assert asked.ask() == REFUSED
    assert second.cancelled == second.jobs
    assert asked.pools[2].jobs == []


def test_one_that_goes_on_while_others_are_asked_is_counted() -> None:
    asked, second = woken(GO_ON)
    answer = asked.ask()
    assert isinstance(answer, Deferred)
    assert not answer.called
    asked.later(second, GO_ON)
    assert not answer.called
    asked.later(asked.pools[2], REFUSED)
    assert answer.result == REFUSED


def test_a_defect_of_a_cancelled_milter_is_ignored() -> None:
    asked = Asked(None, None)
    answer = asked.ask()
    assert isinstance(answer, Deferred)
    late = [job.answer for pool in asked.pools for job in pool.jobs]
    asked.milters.cancel()
    for each in late:
        assert each is not None
        each.callback(nonsense())
    assert not answer.called


def nonsense() -> Any:
    """An object that is no answer of an executor."""


def test_a_defect_while_others_are_asked_is_raised() -> None:
    asked, second = woken(None)
    with capturedLogs(), pytest.raises(TypeError):
        asked.ask()
    assert second.cancelled == second.jobs
