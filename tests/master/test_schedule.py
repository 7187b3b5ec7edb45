"""Which job runs where next, told by examples and, against a simple model, by Hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sharded_milter.errors import Overloaded
from sharded_milter.master.schedule import MAX_DEBRIS, Schedule
from sharded_milter.protocol.stages import Stage

ORDER = [
    Stage.EOM, Stage.BODY, Stage.EOH, Stage.HEADER, Stage.DATA, Stage.RCPT, Stage.MAIL, Stage.HELO,
    Stage.CONNECT, Stage.UNKNOWN,
]  # fmt: skip


@dataclass(eq=False)
class Job:
    stage: Stage = Stage.EOM
    light: bool = False


def schedule(max_queue: int = 100, queue_wait: float = 10.0) -> Schedule[Job, str]:
    return Schedule(max_queue, queue_wait)


def drained(jobs: Schedule[Job, str]) -> list[Job]:
    """The waiting jobs in the order in which one shard would do them."""
    done = []
    jobs.idle("only")
    while (pair := jobs.next()) is not None:
        done.append(pair[0])
        jobs.idle("only")
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
    jobs.idle("a")
    assert jobs.next() is None
    jobs.gone("a")
    jobs.submit(Job(), 0.0)
    assert jobs.next() is None


def test_the_shard_that_has_run_longest_is_chosen() -> None:
    jobs = schedule()
    for shard in ("old", "middle", "young"):
        jobs.idle(shard)
    chosen = []
    for _ in range(3):
        jobs.submit(Job(), 0.0)
        pair = jobs.next()
        assert pair is not None
        chosen.append(pair[1])
    assert chosen == ["old", "middle", "young"]
    jobs.idle("young")
    jobs.idle("old")
    jobs.submit(Job(), 0.0)
    assert (jobs.next() or ("", ""))[1] == "old"


def test_a_shard_that_comes_again_after_its_end_is_young() -> None:
    jobs = schedule()
    jobs.idle("a")
    jobs.idle("b")
    jobs.gone("a")
    jobs.idle("a")
    jobs.submit(Job(), 0.0)
    assert (jobs.next() or ("", ""))[1] == "b"


def test_a_busy_shard_gets_nothing_until_it_is_idle_again() -> None:
    jobs = schedule()
    jobs.idle("a")
    first, second = Job(), Job()
    jobs.submit(first, 0.0)
    jobs.submit(second, 0.0)
    assert jobs.next() == (first, "a")
    assert jobs.next() is None
    jobs.idle("a")
    assert jobs.next() == (second, "a")


def test_gone_is_no_error_for_a_stranger() -> None:
    schedule().gone("nobody")


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
    jobs.idle("a")
    job = Job()
    jobs.submit(job, 0.0)
    assert jobs.next() == (job, "a")


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
    jobs.idle("a")
    assert jobs.next() == (job, "a")
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
        assert len(jobs._heap) <= 2 * len(kept) + MAX_DEBRIS + 1
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
        self.jobs: Schedule[Job, int] = Schedule(5, 10.0)
        self.waiting: list[Job] = []
        self.idle: set[int] = set()
        self.ages: list[int] = []

    @rule(stage=st.sampled_from(list(Stage)), light=st.booleans())
    def submit(self, stage: Stage, light: bool) -> None:
        job = Job(stage, light)
        if not self.idle and len(self.waiting) >= 5:
            with pytest.raises(Overloaded):
                self.jobs.submit(job, 0.0)
        else:
            self.jobs.submit(job, 0.0)
            self.waiting.append(job)

    @rule(shard=st.integers(1, 3))
    def shard_is_idle(self, shard: int) -> None:
        self.jobs.idle(shard)
        self.idle.add(shard)
        if shard not in self.ages:
            self.ages.append(shard)

    @rule(shard=st.integers(1, 3))
    def shard_is_gone(self, shard: int) -> None:
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
