"""An object's jobs: its shard, its loss, and what another object is told."""

from __future__ import annotations

import pytest
from objects import HEAD, REST, began, home_of, mine, shared
from one_dispatcher import Workers

from sharded_milter.dispatch.affinity import SessionUpdate
from sharded_milter.dispatch.job import Blame
from sharded_milter.errors import DeadlineExceeded, Overloaded, WorkerLost
from sharded_milter.ipc.memory import Memory, packed
from sharded_milter.protocol.commands import Abort, Helo
from sharded_milter.protocol.stages import Stage

# Where it is


def test_an_object_stays_on_its_shard_while_others_idle() -> None:
    workers = Workers(2)
    affinity = mine()
    home = began(workers, affinity)
    for _ in range(3):
        workers.ask(affinity)
        assert workers.busy == [home]
        home.answer()
    workers.ask(affinity)
    waiting = workers.ask(affinity)
    assert (len(home.open), waiting.job.attempts) == (1, [])
    home.answer()
    assert home.jobs == [waiting.job]


def test_new_objects_go_where_the_fewest_are() -> None:
    workers = Workers(3)
    objects = [mine() for _ in range(9)]
    for each in objects:
        workers.ask(each, Stage.CONNECT, message=b"")
    assert [len(each.holder.affinities) for each in objects[:3]] == [3, 3, 3]
    for each in objects[:2]:
        workers.dispatcher.release(each)
        workers.dispatcher.release(each)  # which changes nothing
    again = mine()
    workers.ask(again, Stage.CONNECT, message=b"")
    assert len(again.holder.affinities) == 3


def test_a_new_object_goes_where_fewer_are_and_not_to_the_shard_that_became_idle_last() -> None:
    workers = Workers(2)
    first, second = mine(), mine()
    home = began(workers, first)
    assert began(workers, second) is not home


def test_where_there_is_no_shard_the_first_to_come_gets_the_object() -> None:
    workers = Workers(0)
    affinity = mine()
    result = workers.ask(affinity, Stage.CONNECT, message=b"")
    assert (affinity.holder, result.values) == (None, [])
    shard = workers.hire()
    assert home_of(affinity) is shard


def test_an_object_for_a_job_that_runs_alone_is_built_on_a_fresh_shard() -> None:
    workers = Workers(1, retries=0)
    workers.submit()
    workers.shards[0].exit()
    old = workers.hire()
    workers.submit(Stage.RCPT)
    old.answer()
    affinity = mine(replayable=True)
    result = workers.ask(affinity)
    assert (result.job.solo, affinity.holder, workers.busy) == (True, None, [])
    fresh = workers.hire()
    assert home_of(affinity) is fresh
    assert fresh.jobs == [result.job]


# What it is told


def test_only_what_is_new_is_told() -> None:
    workers = Workers()
    affinity = mine()
    home = began(workers, affinity)
    affinity.add_packet(b"H", Helo("x").encode())
    workers.ask(affinity, Stage.EOM, message=HEAD + REST)
    home.answer()
    affinity.end_message()
    workers.ask(affinity, Stage.MAIL, message=HEAD)
    assert [(each.connection, each.message) for each in home.asked] == [
        (b"connection", HEAD),
        (Helo("x").encode(), REST),
        (Abort().encode(), HEAD),
    ]


def test_of_what_replaces_each_other_the_latest_is_told_last() -> None:
    affinity = mine()
    affinity.add_packet(b"x", b"before there was an object")
    affinity.assign("shard", 3)
    assert affinity.next_update(b"connection", b"") == SessionUpdate(3, 0, b"connection", b"")
    affinity.add_packet(b"a", b"1")
    affinity.add_packet(b"b", b"2")
    affinity.add_packet(b"a", b"3")
    assert affinity.next_update(b"connection", b"") == SessionUpdate(3, 0, b"23", b"")


def test_memory_is_told_whole_with_where_the_news_begins() -> None:
    affinity = mine()
    affinity.assign("shard", 3)
    affinity.next_update(b"connection", HEAD)
    large = packed(b"x" * 60_000)
    assert affinity.next_update(b"connection", large) == SessionUpdate(3, len(HEAD), b"", large)


def test_an_object_that_was_told_of_no_message_hears_of_no_end() -> None:
    affinity = mine()
    affinity.assign("shard", 3)
    affinity.next_update(b"connection", b"")
    affinity.end_message()
    assert affinity.next_update(b"connection", HEAD) == SessionUpdate(3, 0, b"", HEAD)


def test_news_that_there_is_no_memory_for_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers()
    affinity = mine()
    home = began(workers, affinity, b"")
    affinity.add_packet(b"H", Helo("x" * 60_000).encode())

    def refuse(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("os.memfd_create", refuse)
    assert isinstance(workers.ask(affinity, Stage.HELO, message=b"").only, Overloaded)
    monkeypatch.undo()
    workers.ask(affinity, Stage.HELO, message=b"")
    assert isinstance(home.asked[-1].connection, Memory)


# Its loss


def test_an_object_that_can_be_rebuilt_goes_on_elsewhere_with_all_there_is() -> None:
    workers = Workers(3)
    affinity = mine(replayable=True)
    first = began(workers, affinity)
    result = workers.ask(affinity, Stage.EOM, message=HEAD + REST)
    first.exit("its host is lost", Blame.PLACE)
    (second,) = workers.busy
    assert second is not first
    assert (second.asked[0].connection, second.asked[0].message) == (b"connection", HEAD + REST)
    second.answer(b"verdict")
    assert result.only == b"verdict"


def test_an_object_that_cannot_costs_the_message_in_hand_and_no_other() -> None:
    workers = Workers(2)
    affinity = mine()
    first = began(workers, affinity)
    result = workers.ask(affinity, Stage.EOM, message=HEAD + REST)
    first.exit()
    assert isinstance(result.only, WorkerLost)
    assert workers.busy == []
    affinity.end_message()
    after = workers.ask(affinity, Stage.MAIL, message=HEAD)
    (second,) = workers.busy
    assert (second.asked[0].connection, second.asked[0].message) == (b"connection", HEAD)
    second.answer(b"verdict")
    assert after.only == b"verdict"


def test_a_message_whose_object_died_between_two_commands_is_lost_to_its_end() -> None:
    workers = Workers(2)
    affinity = mine()
    began(workers, affinity).exit()
    for stage in (Stage.RCPT, Stage.DATA, Stage.EOM):
        assert isinstance(workers.ask(affinity, stage).only, WorkerLost)
    affinity.end_message()
    assert workers.ask(affinity, Stage.MAIL, message=HEAD).values == []


@pytest.mark.parametrize("stage", [Stage.CONNECT, Stage.HELO])
def test_before_a_message_every_object_can_be_built_anew(stage: Stage) -> None:
    workers = Workers(2)
    affinity = mine()
    result = workers.ask(affinity, stage, message=b"")
    home_of(affinity).exit()
    workers.busy[0].answer(b"verdict")
    assert result.only == b"verdict"


@pytest.mark.parametrize("replayable", [True, False])
def test_a_job_that_waited_for_a_shard_that_died_is_not_forgotten(replayable: bool) -> None:
    workers = Workers(2)
    affinity = mine(replayable=replayable)
    home = shared(workers, affinity)
    result = workers.ask(affinity, Stage.EOM, message=HEAD + REST)
    assert result.job.attempts == []
    home.exit()
    if replayable:
        shard = next(each for each in workers.busy if result.job in each.jobs)
        while result.job in shard.jobs:
            shard.answer(b"verdict")
        assert result.only == b"verdict"
    else:
        assert isinstance(result.only, WorkerLost)


@pytest.mark.parametrize("cancels", [True, False])
def test_who_hears_of_a_lost_object_may_cancel_the_jobs_of_others(cancels: bool) -> None:
    """Several milters of one connection: the first that fails answers the question for all."""
    workers = Workers(2)
    first, second = mine(), mine(replayable=True)
    home = shared(workers, first, second)
    lost = workers.ask(first, Stage.EOM, message=HEAD + REST)
    other = workers.ask(second, Stage.EOM, message=HEAD + REST)
    assert lost.job.answer is not None
    if cancels:
        lost.job.answer.addBoth(lambda _: workers.dispatcher.cancel(other.job))
    home.exit()
    assert isinstance(lost.only, WorkerLost)
    assert (other.job in [job for shard in workers.busy for job in shard.jobs]) is not cancels
    assert workers.dispatcher.queued == 0


def test_a_cancelled_job_of_an_object_runs_on_and_is_not_withdrawn() -> None:
    workers = Workers(command_deadline=20.0)
    workers.warm()
    first, second = mine(), mine()
    workers.ask(first, Stage.RCPT)
    cancelled = workers.ask(second, Stage.RCPT)
    (home,) = workers.shards
    assert len(home.open) == 2
    workers.dispatcher.cancel(cancelled.job)
    assert home.withdrawals == []
    workers.wait(10.0)
    home.answer()
    workers.wait(19.5)
    assert not any(told.startswith("kill") for told in home.told)
    workers.wait(0.5)
    assert any(told.startswith("kill") for told in home.told)
    assert cancelled.values == []


def test_a_deadline_costs_the_object_its_shard() -> None:
    workers = Workers(2, command_deadline=20.0)
    affinity = mine()
    result = workers.ask(affinity, Stage.RCPT, message=HEAD)
    home = home_of(affinity)
    workers.wait(20.0)
    assert isinstance(result.only, DeadlineExceeded)
    after = workers.ask(affinity, Stage.DATA, message=HEAD + REST)
    assert after.values == []  # until the exit is known
    home.exit()
    assert isinstance(after.only, WorkerLost)


def test_an_object_whose_shard_is_busy_for_too_long_is_not_waited_for() -> None:
    workers = Workers(2, queue_wait=5.0)
    affinity = mine()
    shared(workers, affinity)
    result = workers.ask(affinity)
    workers.wait(5.0)
    assert isinstance(result.only, Overloaded)


def test_an_object_that_waited_when_its_idle_shard_died_is_lost_with_it() -> None:
    workers = Workers(2, reserve=1)
    affinity = mine()
    home = began(workers, affinity)
    other = mine()
    other.assign(workers.dispatcher._shards.pipelines.get(next(
        shard for shard in workers.shards if shard is not home)), 99)  # fmt: skip
    workers.ask(other)  # the other one scans, and this one is reserved for light jobs
    result = workers.ask(affinity)
    assert (result.job.attempts, result.values) == ([], [])
    home.exit()
    assert isinstance(result.only, WorkerLost)


def test_what_has_not_left_does_not_count_as_told() -> None:
    affinity = mine()
    affinity.assign(None, 7)
    affinity.next_update(b"connection", b"mes")
    affinity.add_packet(b"H", b"helo")
    for _ in range(2):
        assert affinity.next_update(b"connection", b"message") == SessionUpdate(
            7, 0, b"helo", b"sage"
        )
        affinity.undo_update()
    affinity.next_update(b"connection", b"message")
    assert affinity.next_update(b"connection", b"message") == SessionUpdate(7, 0, b"", b"")
