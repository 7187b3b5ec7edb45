"""Which job runs where next, told by examples and, against a simple model, by Hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sharded_milter.dispatch.queue import MAX_DEBRIS, Schedule
from sharded_milter.errors import Overloaded
from sharded_milter.protocol.stages import Stage

ORDER = [
    Stage.EOM, Stage.BODY, Stage.EOH, Stage.HEADER, Stage.DATA, Stage.RCPT, Stage.MAIL, Stage.HELO,
    Stage.CONNECT, Stage.UNKNOWN,
]  # fmt: skip


@dataclass(eq=False)
class Job:
    stage: Stage = Stage.EOM
    light: bool = False
    key: bytes = b""
    place: Shard | None = None


@dataclass(frozen=True)
class Shard:
    slot: int
    sessions: int = 0


A, B, C = Shard(1), Shard(2), Shard(3)


def schedule(
    max_queue: int = 100, queue_wait: float = 10.0, reserve: int = 0
) -> Schedule[Job, Shard]:
    return Schedule(max_queue, queue_wait, reserve)


def drained(jobs: Schedule[Job, Shard]) -> list[Job]:
    """The waiting jobs in the order in which one shard would do them."""
    done = []
    jobs.idle(A)
    while (pair := jobs.next()) is not None:
        done.append(pair[0])
        jobs.idle(A)
    return done


def test_every_stage_has_a_place() -> None:
    assert set(ORDER) == set(Stage)


@pytest.mark.parametrize(("sooner", "later"), list(permutations(ORDER, 2)), ids=lambda s: s.word)
def test_what_is_nearer_to_its_end_goes_first(sooner: Stage, later: Stage) -> None:
    jobs = schedule()
    pair = [Job(later), Job(sooner)]
    for job in pair:
        jobs.submit(job, 0.0)
    first = ORDER.index(sooner) < ORDER.index(later)
    assert drained(jobs) == (pair[::-1] if first else pair)


@pytest.mark.parametrize(("light", "heavy"), list(product(ORDER, ORDER)), ids=lambda s: s.word)
def test_light_goes_before_heavy_at_any_stage(light: Stage, heavy: Stage) -> None:
    jobs = schedule()
    pair = [Job(heavy), Job(light, True)]
    for job in pair:
        jobs.submit(job, 0.0)
    assert drained(jobs) == pair[::-1]


def test_among_equals_the_oldest_goes_first() -> None:
    jobs = schedule()
    three = [Job(), Job(), Job()]
    for job in three:
        jobs.submit(job, 0.0)
    assert drained(jobs) == three


def test_nothing_is_assigned_without_a_job_or_without_a_shard() -> None:
    jobs = schedule()
    assert jobs.next() is None
    jobs.idle(A)
    assert jobs.next() is None
    jobs.gone(A)
    jobs.submit(Job(), 0.0)
    assert jobs.next() is None


def test_the_shard_that_has_run_longest_is_chosen() -> None:
    jobs = schedule()
    for shard in (B, C, A):
        jobs.idle(shard)
    chosen = []
    for _ in range(3):
        jobs.submit(Job(), 0.0)
        pair = jobs.next()
        assert pair is not None
        chosen.append(pair[1])
    assert chosen == [B, C, A]
    jobs.idle(A)
    jobs.idle(B)
    jobs.submit(Job(), 0.0)
    assert (jobs.next() or (None, None))[1] == B


def test_a_shard_that_comes_again_after_its_end_is_young() -> None:
    jobs = schedule()
    jobs.idle(A)
    jobs.idle(B)
    jobs.gone(A)
    jobs.idle(A)
    jobs.submit(Job(), 0.0)
    assert (jobs.next() or (None, None))[1] == B


def test_a_busy_shard_gets_nothing_until_it_is_idle_again() -> None:
    jobs = schedule()
    jobs.idle(A)
    first, second = Job(), Job()
    jobs.submit(first, 0.0)
    jobs.submit(second, 0.0)
    assert jobs.next() == (first, A)
    assert jobs.next() is None
    jobs.idle(A)
    assert jobs.next() == (second, A)


def test_gone_is_no_error_for_a_stranger() -> None:
    schedule().gone(A)


def test_a_full_queue_refuses() -> None:
    jobs = schedule(max_queue=2)
    jobs.submit(Job(), 0.0)
    jobs.submit(Job(), 0.0)
    with pytest.raises(Overloaded, match=r"the queue is full \(2 jobs wait\)"):
        jobs.submit(Job(), 0.0)
    assert len(jobs) == 2


def test_without_a_queue_an_idle_shard_still_gets_work() -> None:
    jobs = schedule(max_queue=0)
    with pytest.raises(Overloaded):
        jobs.submit(Job(), 0.0)
    jobs.idle(A)
    job = Job()
    jobs.submit(job, 0.0)
    assert jobs.next() == (job, A)


def test_a_withdrawn_job_is_not_done_and_makes_room() -> None:
    jobs = schedule(max_queue=2)
    first, second, third = Job(), Job(), Job()
    jobs.submit(first, 0.0)
    jobs.submit(second, 0.0)
    assert jobs.withdraw(first)
    assert not jobs.withdraw(first)
    jobs.submit(third, 0.0)
    assert drained(jobs) == [second, third]


def test_a_job_that_runs_cannot_be_withdrawn() -> None:
    jobs = schedule()
    job = Job()
    jobs.submit(job, 0.0)
    jobs.idle(A)
    assert jobs.next() == (job, A)
    assert not jobs.withdraw(job)


def test_withdrawn_jobs_do_not_pile_up() -> None:
    jobs = schedule(max_queue=10_000)
    kept = [Job() for _ in range(10)]
    for job in kept:
        jobs.submit(job, 0.0)
    for _ in range(1000):
        job = Job()
        jobs.submit(job, 0.0)
        jobs.withdraw(job)
        assert len(jobs._common) <= 2 * len(kept) + MAX_DEBRIS + 1
    assert drained(jobs) == kept


def test_who_waits_too_long_is_handed_back_oldest_first() -> None:
    jobs = schedule(queue_wait=10.0)
    early, late, last = Job(), Job(Stage.MAIL), Job()
    jobs.submit(early, 0.0)
    jobs.submit(late, 1.0)
    jobs.submit(last, 5.0)
    assert jobs.overdue(9.9) == []
    assert jobs.overdue(11.0) == [early, late]
    assert jobs.overdue(11.0) == []
    assert drained(jobs) == [last]


class Model(RuleBasedStateMachine):
    """A list that is sorted anew each time knows what the heap must do."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: Schedule[Job, Shard] = Schedule(5, 10.0)
        self.waiting: list[Job] = []
        self.idle: set[Shard] = set()
        self.ages: list[Shard] = []

    @rule(stage=st.sampled_from(list(Stage)), light=st.booleans())
    def submit(self, stage: Stage, light: bool) -> None:
        job = Job(stage, light)
        if len(self.waiting) >= 5 + len(self.idle):
            with pytest.raises(Overloaded):
                self.jobs.submit(job, 0.0)
        else:
            self.jobs.submit(job, 0.0)
            self.waiting.append(job)

    @rule(shard=st.builds(Shard, st.integers(1, 3)))
    def shard_is_idle(self, shard: Shard) -> None:
        self.jobs.idle(shard)
        self.idle.add(shard)
        if shard not in self.ages:
            self.ages.append(shard)

    @rule(shard=st.builds(Shard, st.integers(1, 3)))
    def shard_is_gone(self, shard: Shard) -> None:
        self.jobs.gone(shard)
        self.idle.discard(shard)
        if shard in self.ages:
            self.ages.remove(shard)

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        if self.waiting:
            job = data.draw(st.sampled_from(self.waiting))
            assert self.jobs.withdraw(job)
            self.waiting.remove(job)

    @rule()
    def assign(self) -> None:
        pair = self.jobs.next()
        if not self.waiting or not self.idle:
            assert pair is None
            return
        job = min(self.waiting, key=lambda job: (not job.light, ORDER.index(job.stage)))
        shard = min(self.idle, key=self.ages.index)
        assert pair == (job, shard)
        self.waiting.remove(job)
        self.idle.remove(shard)

    @invariant()
    def the_same_number_waits(self) -> None:
        assert len(self.jobs) == len(self.waiting)


test_the_schedule_does_what_a_sorted_list_would = Model.TestCase


# Reserve


def test_heavy_jobs_leave_the_reserve_to_light_ones() -> None:
    jobs = schedule(reserve=1)
    for shard in (A, B):
        jobs.idle(shard)
    heavy, other, light = Job(), Job(), Job(Stage.RCPT, light=True)
    for job in (heavy, other):
        jobs.submit(job, 0.0)
    assert jobs.next() == (heavy, A)
    assert jobs.next() is None
    jobs.submit(light, 0.0)
    assert jobs.next() == (light, B)
    jobs.idle(B)
    assert jobs.next() is None
    jobs.idle(A)
    assert jobs.next() == (other, A)


def test_the_death_of_a_heavy_jobs_shard_makes_room_for_the_next() -> None:
    jobs = schedule(reserve=1)
    for shard in (A, B, C):
        jobs.idle(shard)
    for _ in range(3):
        jobs.submit(Job(), 0.0)
    assert [pair[1] for pair in (jobs.next(), jobs.next()) if pair] == [A, B]
    jobs.gone(A)
    assert jobs.next() is None  # two are left, and one of them is the reserve
    jobs.idle(A)
    assert jobs.next() is not None


@pytest.mark.parametrize("reserve", [1, 2, 10])
def test_a_reserve_of_all_still_lets_one_heavy_job_run(reserve: int) -> None:
    jobs = schedule(reserve=reserve)
    jobs.idle(A)
    job = Job()
    jobs.submit(job, 0.0)
    assert jobs.next() == (job, A)


# Keys


def homes(jobs: Schedule[Job, Shard], keys: range) -> dict[bytes, Shard]:
    """Where each key goes when all shards are idle."""
    found = {}
    for number in keys:
        key = str(number).encode()
        jobs.submit(Job(key=key), 0.0)
        pair = jobs.next()
        assert pair is not None
        found[key] = pair[1]
        jobs.idle(pair[1])
    return found


def with_three_idle() -> Schedule[Job, Shard]:
    jobs = schedule()
    for shard in (A, B, C):
        jobs.idle(shard)
    return jobs


def test_equal_keys_go_to_the_same_shard_and_different_ones_are_spread() -> None:
    jobs = with_three_idle()
    first = homes(jobs, range(60))
    assert homes(jobs, range(60)) == first
    assert all(list(first.values()).count(shard) > 8 for shard in (A, B, C))


def test_only_the_keys_of_a_shard_that_goes_move() -> None:
    jobs = with_three_idle()
    before = homes(jobs, range(60))
    jobs.gone(C)
    after = homes(jobs, range(60))
    assert C not in after.values()
    moved = {key for key in before if before[key] != after[key]}
    assert moved == {key for key in before if before[key] == C}


def test_a_job_waits_for_the_shard_of_its_key_while_others_idle() -> None:
    jobs = with_three_idle()
    home = homes(jobs, range(1))[b"0"]
    jobs.submit(Job(key=b"0"), 0.0)
    jobs.submit(Job(key=b"0"), 0.0)
    assert jobs.next() is not None
    assert jobs.next() is None
    free = Job()
    jobs.submit(free, 0.0)
    pair = jobs.next()
    assert pair is not None
    assert pair[0] is free
    assert pair[1] != home
    jobs.idle(home)
    assert (jobs.next() or (None, None))[1] == home


def test_jobs_with_a_key_find_a_new_home_when_theirs_goes() -> None:
    jobs = schedule()
    for shard in (A, B):
        jobs.idle(shard)
    home = homes(jobs, range(1))[b"0"]
    other = B if home == A else A
    jobs.submit(Job(key=b"0"), 0.0)
    assert jobs.next() is not None
    job = Job(key=b"0")
    jobs.submit(job, 0.0)
    assert jobs.next() is None
    jobs.gone(home)
    assert jobs.next() == (job, other)


def test_jobs_with_a_key_wait_when_there_is_no_shard_at_all() -> None:
    jobs = schedule()
    job = Job(key=b"0")
    jobs.submit(job, 0.0)
    assert jobs.next() is None
    jobs.idle(A)
    assert jobs.next() == (job, A)


def test_a_successor_in_the_same_slot_inherits_the_keys() -> None:
    jobs = with_three_idle()
    before = homes(jobs, range(30))
    jobs.gone(A)
    jobs.idle(Shard(1))
    assert homes(jobs, range(30)) == before


def test_the_next_job_that_waits_too_long_is_known() -> None:
    jobs = schedule(queue_wait=10.0)
    assert jobs.next_due is None
    jobs.submit(Job(), 3.0)
    jobs.submit(Job(), 5.0)
    assert jobs.next_due == 13.0


def test_a_withdrawn_job_at_the_top_is_passed_over() -> None:
    jobs = schedule()
    first, second = Job(), Job()
    jobs.submit(first, 0.0)
    jobs.submit(second, 0.0)
    jobs.withdraw(first)
    assert drained(jobs) == [second]


def test_a_light_job_does_not_wait_for_the_shard_of_its_key() -> None:
    jobs = with_three_idle()
    home = homes(jobs, range(1))[b"0"]
    jobs.submit(Job(key=b"0"), 0.0)
    assert (jobs.next() or (None, None))[1] == home
    light = Job(Stage.RCPT, light=True, key=b"0")
    jobs.submit(light, 0.0)
    pair = jobs.next()
    assert pair is not None
    assert pair[0] is light
    assert pair[1] != home


def test_a_shard_that_idles_or_is_gone_has_nothing_to_spare() -> None:
    jobs = schedule()
    jobs.idle(A)
    jobs.spare(A, 1)
    jobs.idle(B)
    jobs.gone(B)
    jobs.spare(B, 1)
    first, second = Job(), Job()
    jobs.submit(first, 0.0)
    jobs.submit(second, 0.0)
    assert jobs.next() == (first, A)
    assert jobs.next() is None
    jobs.spare(A, 1)
    assert jobs.next() == (second, A)
    assert jobs.next() is None


def test_of_busy_shards_the_one_with_the_fewest_jobs_goes_first() -> None:
    jobs = schedule()
    for shard in (A, B, C):
        jobs.idle(shard)
        jobs.submit(Job(), 0.0)
        jobs.next()
    jobs.spare(A, 3)
    jobs.spare(B, 1)
    jobs.spare(C, 1)
    order = []
    for _ in range(3):
        jobs.submit(Job(), 0.0)
        order.append((jobs.next() or (None, None))[1])
    assert order == [B, C, A]
