"""Which job goes next, on which shard: by age, and on one that is idle or has room."""

from __future__ import annotations

from typing import Any

import pytest
from queueing import Job, Object, Waiting

from sharded_milter.dispatch.capacity import Capacity
from sharded_milter.dispatch.queue import LIGHT_HEAD_START, MAX_STALE
from sharded_milter.errors import Overloaded

# Order


def test_what_was_born_first_goes_first() -> None:
    house = Waiting()
    late, early, middle = Job(5.0), Job(1.0), Job(3.0)
    house.add(late, early, middle)
    assert house.drained() == [early, middle, late]


def test_of_the_same_age_the_first_that_came_goes_first() -> None:
    house = Waiting()
    three = [Job(), Job(), Job()]
    house.add(*three)
    assert house.drained() == three


@pytest.mark.parametrize("stage", [None, "rcpt", "eom"])
def test_the_stage_makes_no_difference(stage: Any) -> None:
    house = Waiting()
    late, early = Job(2.0), Job(1.0, stage=stage)
    house.add(late, early)
    assert house.drained() == [early, late]


def test_a_light_job_counts_as_a_second_older_and_no_more() -> None:
    house = Waiting()
    heavy = Job(10.0)
    light, later = Job(9.9 + LIGHT_HEAD_START, True), Job(10.1 + LIGHT_HEAD_START, True)
    house.add(later, heavy, light)
    assert house.drained() == [light, heavy, later]


def test_what_waits_behind_another_job_goes_in_its_turn_by_age() -> None:
    house = Waiting()
    first, offered, last = Job(1.0), Job(2.0), Job(3.0)
    house.add(last, first)
    house.queue.offer(offered)
    assert house.drained() == [first, offered, last]


def test_what_waits_behind_another_job_does_not_count_as_waiting() -> None:
    house = Waiting(max_queue=1)
    offered = Job()
    house.queue.offer(offered)
    assert (len(house.queue), house.queue.is_full) == (0, False)
    assert not house.queue.remove(offered)
    assert house.drained() == []


def test_nothing_is_given_without_a_job_or_without_a_shard() -> None:
    house = Waiting()
    assert house.queue.next_pair() is None
    house.add(Job())
    assert house.queue.next_pair() is None
    house = Waiting("A")
    assert house.queue.next_pair() is None


# The bound


def test_a_full_queue_refuses() -> None:
    house = Waiting(max_queue=2)
    house.add(Job(), Job())
    with pytest.raises(Overloaded, match=r"the queue is full \(2 jobs wait\)"):
        house.add(Job())
    assert len(house.queue) == 2


def test_idle_shards_make_room() -> None:
    house = Waiting("A", max_queue=0)
    house.add(Job())
    with pytest.raises(Overloaded):
        house.add(Job())


def test_the_end_of_a_session_and_a_job_that_waits_again_are_never_too_many() -> None:
    house = Waiting(max_queue=0)
    house.queue.add(Job(stage=None))
    house.queue.add(Job(), requeued=True)
    assert len(house.queue) == 2


def test_a_job_that_is_removed_is_not_done_and_makes_room() -> None:
    house = Waiting(max_queue=2)
    first, second = Job(), Job()
    house.add(first, second)
    assert house.queue.remove(first)
    assert not house.queue.remove(first)
    third = Job()
    house.add(third)
    assert house.drained() == [second, third]


def test_jobs_that_have_left_do_not_pile_up() -> None:
    house = Waiting("A")
    home = Object(house.a)
    house.queue.capacity.set_busy(house.a, has_room=False)
    kept = [Job(1.0), Job(2.0, solo=True), Job(3.0, affinity=home)]
    house.add(*kept)
    offered = Job(0.5)
    house.queue.offer(offered)
    for _ in range(10 * MAX_STALE):
        job = Job()
        house.add(job)
        house.queue.remove(job)
        assert len(house.queue._common.heavy) <= MAX_STALE + 5
    assert set(house.drained()) == {*kept, offered}


# Where


def test_the_shard_that_became_idle_last_is_chosen() -> None:
    house = Waiting("BCA")
    house.add(Job(), Job(), Job())
    assert [(house.next() or "--")[1] for _ in range(3)] == [house.a, house.c, house.b]


def test_a_shard_with_room_is_chosen_only_where_none_is_idle() -> None:
    house = Waiting("AB")
    house.add(Job(), Job(), Job(), Job())
    assert (house.next(has_room=True) or "--")[1] is house.b
    assert (house.next() or "--")[1] is house.a
    assert (house.next() or "--")[1] is house.b
    assert house.next() is None


def test_of_shards_with_room_the_one_with_the_fewest_jobs_is_chosen() -> None:
    house = Waiting("ABC")
    for shard, count in ((house.a, 3), (house.b, 1), (house.c, 2)):
        shard.attempts = dict.fromkeys(range(count))
        house.queue.capacity.set_busy(shard, has_room=True)
    house.add(Job())
    assert (house.next() or "--")[1] is house.b


def test_what_waits_behind_another_job_goes_to_an_idle_shard_only() -> None:
    house = Waiting("AB")
    house.queue.capacity.set_busy(house.a, has_room=True)
    house.queue.capacity.set_busy(house.b, has_room=True)
    offered = Job(key=b"key")
    house.queue.offer(offered)
    assert house.queue.next_pair() is None
    house.queue.capacity.set_idle(house.b)
    assert house.queue.next_pair() == (offered, house.b)


def test_a_shard_that_is_gone_gets_nothing() -> None:
    house = Waiting("A")
    house.queue.remove_shard(house.a)
    house.queue.remove_shard(house.b)
    house.add(Job())
    assert house.queue.next_pair() is None


@pytest.mark.parametrize("has_room", [True, False])
def test_a_shard_that_is_unavailable_or_retired_has_no_room(has_room: bool) -> None:
    for leave in (Capacity.set_unavailable, Capacity.set_retired):
        house = Waiting("A")
        leave(house.queue.capacity, house.a)
        house.queue.capacity.set_busy(house.a, has_room=has_room)
        house.add(Job())
        assert house.queue.next_pair() is None


def test_a_new_job_is_placed_at_once_where_no_other_waits() -> None:
    house = Waiting("AB")
    assert house.queue.immediate_shard(Job()) is house.b
    assert house.queue.immediate_shard(Job(solo=True)) is None
    assert house.queue.immediate_shard(Job(affinity=Object(None))) is house.b
    assert house.queue.immediate_shard(Job(affinity=Object(house.a))) is house.a
    assert house.queue.immediate_shard(Job(affinity=Object(house.c))) is None
    assert len(house.queue) == 0
    house.add(Job())
    assert house.queue.immediate_shard(Job()) is None
    assert Waiting().queue.immediate_shard(Job()) is None
