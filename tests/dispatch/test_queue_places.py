"""Jobs that not every shard can take: alone, behind a reserve, with an object or a key."""

from __future__ import annotations

import pytest
from queueing import Job, Object, Shard, Waiting

from sharded_milter.dispatch import capacity as module

# Alone


def test_a_job_that_runs_alone_gets_a_fresh_shard_and_no_other() -> None:
    house = Waiting("AB")
    house.b.fresh = False
    alone, other = Job(9.0, solo=True), Job(1.0)
    house.add(alone)
    assert house.next() == (alone, house.a)
    house.a.fresh = False
    house.queue.capacity.set_idle(house.a)
    house.add(Job(solo=True))
    assert house.queue.waits_for_fresh
    assert house.next() is None
    house.add(other)
    assert (house.next() or "--")[0] is other


def test_any_other_job_leaves_the_fresh_shard_to_it() -> None:
    house = Waiting("A")
    alone, older = Job(9.0, solo=True), Job(1.0)
    house.add(older, alone)
    assert not house.queue.waits_for_fresh
    assert house.next() == (alone, house.a)
    assert not house.queue.waits_for_fresh


def test_a_job_that_runs_alone_respects_the_reserve() -> None:
    house = Waiting("AB", reserve=1)
    house.add(Job())
    house.next()
    alone, light = Job(solo=True), Job(5.0, light=True, solo=True)
    house.add(alone, light)
    assert not house.queue.waits_for_fresh  # there is a fresh one, which light jobs may take
    assert (house.next() or "--")[0] is light
    assert house.next() is None


# Reserve


def test_heavy_jobs_leave_the_reserve_to_light_ones() -> None:
    house = Waiting("BA", reserve=1)
    heavy, other, light = Job(), Job(), Job(9.0, True)
    house.add(heavy, other)
    assert house.next() == (heavy, house.a)
    assert house.next() is None
    house.add(light)
    assert house.next() == (light, house.b)
    house.queue.capacity.set_idle(house.b)
    assert house.next() is None
    house.queue.capacity.set_idle(house.a)
    assert house.next() == (other, house.a)


def test_a_heavy_job_may_go_behind_a_heavy_one() -> None:
    house = Waiting("BA", reserve=1)
    house.add(Job(), Job())
    house.next(has_room=True)
    assert (house.next() or "--")[1] is house.a
    house.queue.offer(Job())
    assert house.next() is None


def test_the_death_of_a_heavy_jobs_shard_makes_room_for_the_next() -> None:
    house = Waiting("CBA", reserve=1)
    house.add(Job(), Job(), Job())
    assert [(house.next() or "--")[1] for _ in range(2)] == [house.a, house.b]
    house.queue.remove_shard(house.a)
    assert house.next() is None  # two are left, and one of them is the reserve
    house.queue.capacity.set_idle(Shard(1))
    assert house.next() is not None


@pytest.mark.parametrize("reserve", [1, 2, 10])
def test_a_reserve_of_all_still_lets_one_heavy_job_run(reserve: int) -> None:
    house = Waiting("A", reserve=reserve)
    house.add(Job())
    assert house.next() is not None


def test_a_draining_shards_heavy_job_takes_nothing_of_the_others() -> None:
    house = Waiting("BA", reserve=1)
    house.add(Job(), Job())
    house.next()
    house.queue.capacity.set_retired(house.a)
    assert house.next() is not None  # the last one may do one


# Objects


def test_an_objects_job_runs_on_its_shard_and_nowhere_else() -> None:
    house = Waiting("BA")
    job = Job(affinity=Object(house.b))
    house.add(job)
    assert house.next() == (job, house.b)
    house.add(Job(affinity=Object(house.b)))
    assert house.next() is None
    house.queue.capacity.set_busy(house.b, has_room=True)
    assert house.next() is not None


def test_a_resting_shard_takes_its_objects_jobs_only() -> None:
    house = Waiting("A")
    house.queue.capacity.set_idle_for_objects(house.a)
    job = Job(affinity=Object(house.a))
    house.add(Job())
    assert house.next() is None
    house.add(job)
    assert house.next() == (job, house.a)


def test_an_objects_heavy_job_waits_for_the_reserve() -> None:
    house = Waiting("CBA", reserve=2)
    house.add(Job())
    house.next()
    theirs, its_own = Job(affinity=Object(house.b)), Job(affinity=Object(house.a))
    house.add(theirs)
    assert house.next() is None
    house.queue.capacity.set_busy(house.a, has_room=True)
    house.add(its_own)
    assert house.next() == (its_own, house.a)


def test_the_jobs_of_the_objects_of_a_shard_that_goes_are_handed_back_in_order() -> None:
    house = Waiting("A")
    house.queue.capacity.set_unavailable(house.a)
    home = Object(house.a)
    late, early, left = Job(2.0, affinity=home), Job(1.0, affinity=home), Job(0.0, affinity=home)
    house.add(late, early, left)
    house.queue.remove(left)
    assert house.next() is None
    assert house.queue.remove_shard(house.a) == [early, late]
    assert (len(house.queue), early.entry) == (0, 0)


def test_a_new_object_goes_where_the_fewest_are_and_then_to_the_oldest_shard() -> None:
    house = Waiting()
    assert house.queue.capacity.with_fewest_objects() is None
    house = Waiting("BAC")
    house.b.affinities = {"x"}
    assert house.queue.capacity.with_fewest_objects() is house.a


# Keys


def homes(house: Waiting, keys: range) -> dict[bytes, Shard]:
    """Where each key goes when all shards are idle."""
    found = {}
    for number in keys:
        job = Job(key=str(number).encode())
        house.add(job)
        pair = house.next()
        assert pair is not None
        found[job.key] = pair[1]
        house.queue.capacity.set_idle(pair[1])
    return found


def test_equal_keys_go_to_the_same_shard_and_different_ones_are_spread() -> None:
    house = Waiting("ABC")
    first = homes(house, range(60))
    assert homes(house, range(60)) == first
    assert all(list(first.values()).count(shard) > 8 for shard in house.shards)


def test_only_the_keys_of_a_shard_that_goes_move() -> None:
    house = Waiting("ABC")
    before = homes(house, range(60))
    house.queue.remove_shard(house.c)
    after = homes(house, range(60))
    moved = {key for key in before if before[key] is not after[key]}
    assert moved == {key for key in before if before[key] is house.c}


def test_a_successor_in_the_same_slot_inherits_the_keys() -> None:
    house = Waiting("ABC")
    before = {key: shard.slot for key, shard in homes(house, range(30)).items()}
    house.queue.remove_shard(house.a)
    house.queue.capacity.set_idle(Shard(1))
    assert {key: shard.slot for key, shard in homes(house, range(30)).items()} == before


def test_a_key_never_waits_while_a_shard_is_idle() -> None:
    house = Waiting("ABC")
    home = homes(house, range(1))[b"0"]
    chosen = []
    for _ in range(3):
        house.add(Job(key=b"0"))
        pair = house.next()
        assert pair is not None
        chosen.append(pair[1])
    assert chosen[0] is home
    assert set(chosen) == set(house.shards)
    house.add(Job(key=b"0"))
    assert house.next() is None


def test_a_key_goes_behind_what_its_shard_does_where_that_has_room() -> None:
    house = Waiting("ABC")
    home = homes(house, range(1))[b"0"]
    house.add(Job(key=b"0"))
    house.next(has_room=True)
    house.add(Job(key=b"0"))
    assert (house.next(has_room=True) or "--")[1] is home
    house.queue.offer(Job(key=b"0"))
    assert (house.next() or "--")[1] is not home  # it has waited: an idle one is better


def test_a_light_job_does_not_care_for_its_key() -> None:
    house = Waiting("ABC")
    home = homes(house, range(1))[b"0"]
    house.queue.capacity.set_idle(next(shard for shard in house.shards if shard is not home))
    house.queue.capacity.set_busy(home, has_room=True)
    house.add(Job(light=True, key=b"0"))
    assert (house.next() or "--")[1] is not home


def test_a_key_waits_like_any_other_where_there_is_no_shard() -> None:
    house = Waiting()
    job = Job(key=b"0")
    house.add(job)
    assert house.next() is None
    house.queue.capacity.set_idle(house.a)
    assert house.next() == (job, house.a)


def test_the_shards_of_some_keys_are_remembered_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 4)
    house = Waiting("ABC")
    first = homes(house, range(10))
    assert len(house.queue.capacity._preferred) <= 4
    assert homes(house, range(10)) == first
