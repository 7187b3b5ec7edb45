"""Objects of a shard that drains, and objects whose session is over."""

from __future__ import annotations

from typing import Any

import pytest
from objects import began, ending, mine
from one_dispatcher import Workers
from one_pool import noted

from sharded_milter.errors import WorkerLost

# A draining shard


def test_a_retired_shard_answers_for_its_objects_only() -> None:
    workers = Workers(2)
    affinity = mine()
    home = began(workers, affinity)
    workers.dispatcher.retire(home)
    for _ in range(4):
        workers.submit()
    assert home.open == []
    result = workers.ask(affinity)
    assert home.jobs == [result.job]
    home.answer()
    assert (home.open, home.told) == ([], [])
    workers.dispatcher.release(affinity)
    assert home.told == ["drained"]


@pytest.mark.parametrize("busy", [True, False])
def test_a_retired_shard_is_emptied_when_it_has_done_what_it_has_in_hand(busy: bool) -> None:
    workers = Workers()
    (shard,) = workers.shards
    if busy:
        workers.submit()
    workers.dispatcher.retire(shard)
    assert shard.told == ([] if busy else ["drained"])
    if busy:
        shard.answer()
    assert shard.told == ["drained"]
    workers.submit()
    assert shard.open == []


def test_a_shard_that_never_served_is_empty_at_once() -> None:
    workers = Workers(0)
    (shard,) = Workers().shards
    workers.dispatcher.drop_objects(shard)
    workers.dispatcher.retire(shard)
    assert shard.told == ["drained"]


@pytest.mark.parametrize("busy", [True, False])
def test_objects_that_have_had_their_time_go_on_elsewhere(busy: bool) -> None:
    workers = Workers(2)
    affinity = mine(replayable=True)
    home = began(workers, affinity)
    if busy:
        workers.ask(affinity)
    workers.dispatcher.retire(home)
    workers.dispatcher.drop_objects(home)
    if busy:
        assert home.told == []
        home.answer()
    assert home.told == ["drained"]
    workers.ask(affinity)
    assert workers.busy == [next(shard for shard in workers.shards if shard is not home)]


# The end of a session


def test_the_end_of_a_session_fails_where_the_object_is_gone() -> None:
    workers = Workers(2)
    affinity = mine(replayable=True)
    home = began(workers, affinity)
    done = ending(workers, affinity)
    home.exit()
    assert isinstance(done.only, WorkerLost)
    assert workers.busy == []


def test_sessions_have_ended_when_the_last_is_answered_or_lost() -> None:
    workers = Workers(2)
    objects = [mine(), mine()]
    homes = [began(workers, each, b"") for each in objects]
    for each in objects:
        ending(workers, each)
    ended: list[Any] = []
    noted(workers.dispatcher.when_sessions_ended(), ended)
    homes[0].answer()
    assert ended == []
    homes[1].exit()
    assert ended == [None]


def test_the_end_of_a_session_waits_as_long_as_it_takes_and_is_never_too_much() -> None:
    workers = Workers(1, max_queue=0, queue_wait=5.0, command_deadline=20.0)
    affinity = mine()
    home = began(workers, affinity)
    workers.ask(affinity)
    done = ending(workers, affinity)
    workers.wait(100.0)
    home.answer()
    assert home.jobs == [done.job]
    home.answer(b"")
    assert done.only == b""
    assert workers.counters["deadlines"] == 0


@pytest.mark.parametrize("ahead", [True, False])
def test_the_end_of_a_session_that_hangs_has_a_deadline_from_when_it_begins(ahead: bool) -> None:
    workers = Workers(1, command_deadline=20.0)
    workers.warm()
    affinity = mine()
    home = began(workers, affinity, b"")
    if ahead:
        workers.submit()
        ending(workers, affinity)
        assert len(home.open) == 2
        workers.wait(15.0)
        home.answer()
    else:
        ending(workers, affinity)
    workers.wait(19.5)
    assert home.told == []
    workers.wait(0.5)
    assert home.told == ["kill: qid=1 was not answered within 20 s"]
    assert workers.counters["deadlines"] == 1


def test_the_end_of_a_session_that_was_cancelled_keeps_its_deadline() -> None:
    workers = Workers(1, command_deadline=20.0)
    affinity = mine()
    home = began(workers, affinity, b"")
    done = ending(workers, affinity)
    assert done.job.letter == b"Q"
    workers.dispatcher.cancel(done.job)
    workers.wait(20.0)
    assert home.told == ["kill: qid=1 was not answered within 20 s"]
    assert done.values == []
