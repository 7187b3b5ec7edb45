"""A job behind a slow one goes to a shard that is or becomes idle, or it stays."""

from __future__ import annotations

from typing import Any

import pytest
from one_dispatcher import FakeShard, Workers

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Blame
from sharded_milter.dispatch.timeouts import TAKEOVER_AFTER
from sharded_milter.errors import WorkerLost
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

REST = 0.01  # before TAKEOVER_AFTER is over


def behind(workers: Workers) -> tuple[FakeShard, FakeShard, Any, Any]:
    """Two shards with a job each, and one more behind: slow, quick, the first job, the third."""
    workers.warm()
    first, _, third = workers.submit(born=1.0), workers.submit(born=1.0), workers.submit(born=1.0)
    slow, quick = sorted(workers.shards, key=lambda shard: -len(shard.open))
    assert [len(slow.open), len(quick.open)] == [2, 1]
    first = next(r for r in (first, _) if r.job is slow.jobs[0])
    return slow, quick, first, third


def test_jobs_go_behind_others_only_while_no_shard_is_idle() -> None:
    workers = Workers(2)
    workers.warm()
    workers.submit()
    workers.submit()
    assert [len(shard.open) for shard in workers.shards] == [1, 1]
    workers.submit()
    workers.submit()
    assert [len(shard.open) for shard in workers.shards] == [2, 2]
    waiting = workers.submit()
    workers.shards[0].answer()
    assert workers.shards[0].jobs[1] is waiting.job


def test_light_jobs_go_behind_others_too() -> None:
    workers = Workers()
    workers.warm()
    workers.submit()
    workers.submit(Stage.RCPT, light=True)
    assert len(workers.shards[0].open) == 2


def test_a_shard_that_becomes_idle_takes_over_nothing_before_50_ms() -> None:
    workers = Workers(2)
    slow, quick, _, _ = behind(workers)
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER - REST)
    assert (slow.withdrawals, quick.open) == ([], [])


def test_after_50_ms_an_idle_shard_takes_it_over() -> None:
    workers = Workers(2)
    slow, quick, first, third = behind(workers)
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER)
    assert quick.jobs == [third.job]
    assert slow.withdrawals == slow.open[1:]
    assert workers.counters["taken_over"] == 1
    assert slow.confirm() == ""
    quick.answer(b"quick")
    slow.answer(b"slow")
    assert (first.only, third.only, third.job.slot) == (b"slow", b"quick", quick.slot)


def test_where_none_is_idle_the_next_that_becomes_idle_takes_it_over() -> None:
    workers = Workers(2)
    slow, quick, _, third = behind(workers)
    workers.clock.advance(10 * TAKEOVER_AFTER)
    assert (slow.withdrawals, len(quick.open)) == ([], 1)
    quick.answer()
    assert quick.jobs == [third.job]
    assert len(slow.withdrawals) == 1


@pytest.mark.parametrize(("born", "sooner"), [(0.5, True), (2.0, False)])
def test_it_is_taken_over_in_its_turn_by_age(born: float, sooner: bool) -> None:
    workers = Workers(2)
    _, quick, _, third = behind(workers)
    queued = workers.submit(born=5.0)  # behind the quick one
    workers.clock.advance(10 * TAKEOVER_AFTER)
    quick.answer()
    assert quick.jobs == [queued.job]  # it has begun
    waiting = workers.submit(born=born)
    quick.answer()
    assert quick.jobs[0] is (waiting.job if sooner else third.job)


def test_it_stays_where_no_other_shard_becomes_idle() -> None:
    workers = Workers()
    workers.warm()
    first, second = workers.submit(), workers.submit()
    (shard,) = workers.shards
    workers.clock.advance(10 * TAKEOVER_AFTER)
    shard.answer(b"1")
    shard.answer(b"2")
    assert (first.only, second.only) == (b"1", b"2")
    assert (shard.withdrawals, workers.counters["taken_over"]) == ([], 0)


def test_one_that_has_begun_meanwhile_is_not_taken_over() -> None:
    workers = Workers(2)
    slow, quick, _, third = behind(workers)
    workers.clock.advance(TAKEOVER_AFTER)
    slow.answer()
    quick.answer()
    assert quick.open == []
    slow.answer(b"verdict")
    assert third.only == b"verdict"


@pytest.mark.parametrize("answers", [1, 2])
def test_what_a_shard_has_answered_is_read_before_anything_is_taken_over(answers: int) -> None:
    workers = Workers(2)
    slow, quick, first, third = behind(workers)
    slow.arrived = [slow.answer] * answers
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER)
    assert (slow.withdrawals, quick.open) == ([], [])
    assert len(first.values) == 1
    assert len(third.values) == answers - 1


def test_a_shard_that_is_given_a_job_meanwhile_takes_nothing_over() -> None:
    workers = Workers(2)
    slow, quick, first, third = behind(workers)
    another = Workers.submit
    slow.arrived = [lambda: another(workers)]  # who submits while answers are read
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER)
    assert len(quick.open) == 1
    assert quick.jobs != [third.job]
    assert slow.withdrawals == []
    quick.answer()
    assert quick.jobs == [third.job]  # it was not forgotten
    slow.answer()
    assert len(first.values) == 1


@pytest.mark.parametrize("leave", ["unavailable", "retire"])
def test_a_shard_that_leaves_meanwhile_takes_nothing_over(leave: str) -> None:
    workers = Workers(2)
    slow, quick, _, third = behind(workers)
    slow.arrived = [lambda: getattr(workers.dispatcher, leave)(quick)]
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER)
    assert (slow.withdrawals, quick.open) == ([], [])
    assert workers.hire().jobs == [third.job]


def test_a_shard_of_another_milter_takes_nothing_over() -> None:
    workers = Workers(0)
    slow = workers.hire()
    workers.warm()
    results = [workers.submit(manifest=slow._manifest) for _ in range(2)]
    workers.dispatcher.retire(slow)
    new = workers.hire(Manifest("reloaded"))
    workers.clock.advance(10 * TAKEOVER_AFTER)
    assert (slow.withdrawals, new.asked) == ([], [])
    slow.answer()
    slow.answer()
    assert [result.only for result in results] == [b"replies"] * 2
    assert new.asked == []


def test_an_objects_job_is_never_taken_over() -> None:
    workers = Workers(2)
    workers.warm()
    mine = ObjectAffinity(replayable=True)
    workers.ask(mine, Stage.MAIL)
    home: FakeShard = mine.holder.shard
    home.answer()
    workers.submit()
    workers.submit()
    theirs = workers.ask(mine)
    assert home.jobs[1] is theirs.job
    other = next(shard for shard in workers.shards if shard is not home)
    other.answer()
    workers.clock.advance(10 * TAKEOVER_AFTER)
    assert (home.withdrawals, other.open) == ([], [])


def test_several_behind_a_slow_one_are_taken_over_one_by_one() -> None:
    workers = Workers(2)
    workers.warm(0.0)
    results = [workers.submit() for _ in range(8)]
    slow, quick = workers.shards
    assert [len(slow.open), len(quick.open)] == [4, 4]
    while quick.open:
        quick.answer(b"quick")
    workers.clock.advance(TAKEOVER_AFTER)
    while quick.open:
        quick.answer(b"quick")
    assert sum(result.values == [b"quick"] for result in results) == 7
    assert len(slow.withdrawals) == 3
    while slow.withdrawals:
        assert slow.confirm() == ""
    slow.answer()
    assert workers.counters["taken_over"] == 3


# Both have begun


def both_begun(workers: Workers) -> tuple[FakeShard, FakeShard, Any]:
    """The job is withdrawn from the slow shard, which began it before it heard of that."""
    slow, quick, _, third = behind(workers)
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER)
    slow.answer()
    assert slow.jobs == quick.jobs == [third.job]
    return slow, quick, third


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_answer_wins(first: int) -> None:
    workers = Workers(2)
    *shards, third = both_begun(workers)
    shards[first].answer(b"first")
    assert shards[1 - first].answer(b"second") == ""
    assert third.only == b"first"
    assert workers.counters["attempts_superseded"] == 1


def test_the_loser_has_its_own_deadline() -> None:
    workers = Workers(2, eom_deadline=100.0)
    slow, quick, _ = both_begun(workers)
    quick.answer()
    workers.wait(99.0)
    assert slow.told == []
    workers.wait(1.0)
    assert slow.told == ["kill: qid=1 was not answered within 100 s"]


def test_an_attempt_that_was_withdrawn_and_superseded_has_its_deadline_when_it_begins() -> None:
    workers = Workers(2, eom_deadline=100.0)
    slow, quick, _, _ = behind(workers)
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER)
    quick.answer()
    workers.wait(50.0)
    slow.answer()  # the withdrawn one is the first now
    workers.wait(99.5)
    assert not any(told.startswith("kill") for told in slow.told)
    workers.wait(0.5)
    assert any(told.startswith("kill") for told in slow.told)


def test_a_job_waits_for_its_other_attempt_where_one_is_lost() -> None:
    workers = Workers(2)
    slow, quick, third = both_begun(workers)
    quick.exit()
    assert third.values == []
    assert workers.dispatcher.queued == 0
    slow.answer(b"verdict")
    assert third.only == b"verdict"


def test_what_was_withdrawn_and_then_lost_elsewhere_is_queued_again_when_it_is_confirmed() -> None:
    workers = Workers(2)
    slow, quick, _, third = behind(workers)
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER)
    quick.exit("its host is lost", Blame.PLACE)
    assert (third.values, workers.dispatcher.queued) == ([], 0)
    slow.confirm()
    assert workers.hire().jobs == [third.job] or third.job in slow.jobs


def test_what_is_confirmed_after_it_has_killed_too_often_is_not_done_again() -> None:
    workers = Workers(2, retries=0)
    slow, quick, _, third = behind(workers)
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER)
    quick.exit()
    assert isinstance(third.only, WorkerLost)
    slow.confirm()
    assert isinstance(third.only, WorkerLost)
    assert workers.hire().open == []


def test_a_cancelled_job_behind_another_is_withdrawn() -> None:
    workers = Workers(2)
    slow, quick, _, third = behind(workers)
    workers.dispatcher.cancel(third.job)
    assert slow.withdrawals == slow.open[1:]
    quick.answer()
    workers.clock.advance(10 * TAKEOVER_AFTER)
    assert quick.open == []
    slow.confirm()
    slow.answer()
    assert third.values == []


def test_a_cancelled_job_that_was_offered_is_not_taken_over() -> None:
    workers = Workers(2)
    slow, quick, _, third = behind(workers)
    workers.clock.advance(TAKEOVER_AFTER)
    workers.dispatcher.cancel(third.job)
    quick.answer()
    assert quick.open == []
    assert len(slow.withdrawals) == 1


def test_a_shard_that_can_be_told_nothing_is_not_asked_to_withdraw() -> None:
    workers = Workers(2)
    slow, _, _, third = behind(workers)
    workers.dispatcher.unavailable(slow)
    workers.dispatcher.cancel(third.job)
    assert slow.withdrawals == []
