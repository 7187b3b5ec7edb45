"""A second job for a shard whose scans are short, and what becomes of it where one is not."""

from __future__ import annotations

import pytest
from one_pool import FakeShard, Workers

from sharded_milter.dispatch.pipeline import AHEAD, ENOUGH, MAX_AHEAD, PATIENCE, SHORT, Turn, Turns
from sharded_milter.errors import Overloaded, Superseded
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage


def warm(workers: Workers, scan: float = AHEAD) -> None:
    """All shards have done enough scans that took so long."""
    for _ in range(ENOUGH):
        for _ in workers.shards:
            workers.submit()
        workers.clock.advance(scan)
        for shard in workers.shards:
            shard.answer()


def jobs_of(shard: FakeShard) -> int:
    return len(shard.jobs)


def test_a_shard_with_short_scans_gets_a_second_job_when_nobody_is_idle() -> None:
    workers = Workers(2)
    warm(workers)
    results = [workers.submit() for _ in range(5)]
    assert [jobs_of(shard) for shard in workers.shards] == [2, 2]
    workers.shards[0].answer(b"first")
    assert results[0].values == [b"first"]
    assert [jobs_of(shard) for shard in workers.shards] == [2, 2]  # the fifth came behind


@pytest.mark.parametrize(
    ("scan", "jobs"),
    [
        (0.99 * SHORT, 2),
        (1.01 * AHEAD, 2),
        (0.99 * AHEAD / 3, 4),
        (AHEAD / 100, 1 + MAX_AHEAD),
        (0.0, 1 + MAX_AHEAD),
    ],
)
def test_the_shorter_the_scans_the_more_jobs_a_shard_gets_ahead(scan: float, jobs: int) -> None:
    workers = Workers(1)
    warm(workers, scan)
    for _ in range(2 * MAX_AHEAD):
        workers.submit()
    assert jobs_of(workers.shards[0]) == jobs


def test_jobs_ahead_are_dealt_out_evenly() -> None:
    workers = Workers(2)
    warm(workers, 0.0)
    for _ in range(8):
        workers.submit()
    assert [jobs_of(shard) for shard in workers.shards] == [4, 4]


def test_all_jobs_behind_one_that_takes_long_are_given_to_somebody_else() -> None:
    workers = Workers(2)
    warm(workers, 0.0)
    results = [workers.submit() for _ in range(8)]
    slow, quick = workers.shards
    while jobs_of(quick):
        quick.answer(b"quick")
    workers.clock.advance(PATIENCE)
    while jobs_of(quick):
        quick.answer(b"quick")
    assert sum(result.values == [b"quick"] for result in results) == 7
    assert jobs_of(slow) == 4
    assert workers.dispatch.counters["given_elsewhere"] == 3


def test_whoever_is_idle_goes_first() -> None:
    workers = Workers(2)
    warm(workers)
    workers.submit()
    workers.submit()
    assert [jobs_of(shard) for shard in workers.shards] == [1, 1]


@pytest.mark.parametrize("scan", [1.5 * SHORT, 1.0])
def test_a_shard_with_long_scans_gets_one_job_at_a_time(scan: float) -> None:
    workers = Workers(1)
    warm(workers, scan)
    for _ in range(3):
        workers.submit()
    assert jobs_of(workers.shards[0]) == 1


def test_a_second_job_that_waits_too_long_is_given_to_somebody_else() -> None:
    workers = Workers(2)
    warm(workers)
    long, other, second = workers.submit(), workers.submit(), workers.submit()
    slow, quick = workers.shards
    if jobs_of(slow) == 1:
        slow, quick = quick, slow
    quick.answer(b"other")
    workers.clock.advance(PATIENCE)
    assert jobs_of(quick) == 1
    quick.answer(b"quick")
    assert second.only == b"quick"
    assert second.job.attempts == 1
    slow.answer(b"long")
    slow.answer(b"too late")
    assert {long.only, other.only} == {b"long", b"other"}
    assert second.only == b"quick"
    assert workers.dispatch.counters["given_elsewhere"] == 1


def test_a_second_job_is_not_to_blame_for_the_death_of_its_shard() -> None:
    workers = Workers(1, retries=0)
    warm(workers)
    first, second = workers.submit(), workers.submit()
    assert jobs_of(workers.shards[0]) == 2
    workers.shards[0].exit()
    assert len(first.values) == 1
    assert second.values == []
    workers.hire().answer(b"verdict")
    assert second.only == b"verdict"


def test_time_counts_from_when_its_turn_has_come() -> None:
    workers = Workers(1)
    warm(workers)
    _, second = workers.submit(), workers.submit()
    workers.clock.advance(0.01)
    workers.shards[0].answer()
    assert second.job.started == workers.clock.seconds()


def test_light_jobs_are_given_likewise() -> None:
    workers = Workers(1)
    warm(workers)
    workers.submit()
    workers.submit(Stage.RCPT, light=True)
    assert jobs_of(workers.shards[0]) == 2


def test_a_cancelled_second_job_is_not_given_elsewhere() -> None:
    workers = Workers(1)
    warm(workers)
    workers.submit()
    second = workers.submit()
    workers.dispatch.cancel(second.job)
    second.job.result.addErrback(lambda _: None)
    workers.clock.advance(PATIENCE)
    assert workers.dispatch.counters["given_elsewhere"] == 0


def test_the_average_forgets() -> None:
    turns = Turns()
    now = 0.0
    for took in [10.0] * ENOUGH + [0.0] * 80:
        turn = Turn("job", "shard", turns)
        turns.add(turn, now)
        now += took
        turns.end(turn, now)
    turns.add(Turn("job", "shard", turns), now)
    assert turns.take_one_more


def test_a_busy_shard_that_cannot_do_a_job_is_not_taken_for_an_idle_one() -> None:
    workers = Workers(2)
    warm(workers)
    workers.submit()
    workers.submit()
    refused = workers.submit(manifest=Manifest("old"))
    assert isinstance(refused.only, Superseded)
    workers.shards[1].answer()
    workers.submit()
    assert [jobs_of(shard) for shard in workers.shards] == [1, 1]


def test_a_job_that_meets_its_deadline_behind_another_kills_nobody() -> None:
    deadline = 0.9 * PATIENCE
    workers = Workers(1, command_deadline=deadline)
    warm(workers)
    first, second = workers.submit(), workers.submit(Stage.RCPT)
    workers.clock.advance(0.8 * deadline)
    workers.clock.advance(0.2 * deadline)
    assert isinstance(second.only, Overloaded)
    shard = workers.shards[0]
    assert not any(told.startswith("kill") for told in shard.told)
    shard.answer(b"first")
    shard.answer(b"nobody waits for it")
    assert first.only == b"first"
    assert workers.submit().values == []
    assert jobs_of(shard) == 1


def test_a_full_queue_gives_nothing_elsewhere() -> None:
    workers = Workers(1, max_queue=1)
    warm(workers)
    results = [workers.submit() for _ in range(3)]
    workers.clock.advance(PATIENCE)
    shard = workers.shards[0]
    assert jobs_of(shard) == 2
    while jobs_of(shard):
        shard.answer(b"verdict")
    assert [result.only for result in results] == [b"verdict"] * 3


def test_a_death_counts_once_whatever_the_shard_had_ahead() -> None:
    workers = Workers(1)
    warm(workers, 0.0)
    for _ in range(4):
        workers.submit()
    workers.shards[0].exit()
    assert workers.dispatch.counters["workers_lost"] == 1
