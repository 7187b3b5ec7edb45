"""What one shard does next: how many jobs it is given ahead, and which one it is at work on."""

from __future__ import annotations

from typing import Any

import pytest
from one_dispatcher import FakeShard, Workers
from one_pool import MANIFEST

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Attempt, Job
from sharded_milter.dispatch.pipeline import (
    MAX_PIPELINED,
    MIN_SCANS,
    PIPELINE_SECONDS,
    SHORT_SCAN,
    Pipeline,
)
from sharded_milter.protocol.stages import Stage


class Doing:
    """A pipeline and the time."""

    def __init__(self, scan: float | None = None) -> None:
        self.shard = FakeShard(1, Workers(0).dispatcher, MANIFEST)
        self.pipeline = Pipeline(self.shard)
        self.now = 0.0
        self.numbers = iter(range(1, 10_000))
        if scan is not None:
            for _ in range(MIN_SCANS):
                self.scan(scan)

    def add(self, **options: Any) -> Attempt:
        attempt = Attempt(next(self.numbers), Job(Stage.EOM, b"", b"", **options), self.pipeline)
        self.pipeline.add(attempt, self.now)
        return attempt

    def scan(self, took: float) -> None:
        attempt = self.add()
        self.now += took
        self.pipeline.remove(attempt, self.now, scanned=True)

    def fill(self) -> int:
        """How many it has in hand when it has no room any more."""
        self.add()
        while self.pipeline.has_room:
            self.add()
        return len(self.pipeline.attempts)


@pytest.mark.parametrize(
    ("scan", "jobs"),
    [
        (1.01 * SHORT_SCAN, 1),
        (1.0, 1),
        (0.99 * SHORT_SCAN, 2),
        (1.01 * PIPELINE_SECONDS, 2),
        (0.99 * PIPELINE_SECONDS / 3, 4),
        (PIPELINE_SECONDS / 100, 1 + MAX_PIPELINED),
        (0.0, 1 + MAX_PIPELINED),
    ],
)
def test_the_shorter_the_scans_the_more_jobs_a_shard_gets_ahead(scan: float, jobs: int) -> None:
    assert Doing(scan).fill() == jobs


def test_a_shard_that_has_done_little_gets_one_job_at_a_time() -> None:
    doing = Doing()
    for _ in range(MIN_SCANS - 1):
        doing.scan(0.0)
    assert doing.fill() == 1


def test_the_average_forgets() -> None:
    doing = Doing(10.0)
    for _ in range(80):
        doing.scan(0.0)
    assert doing.fill() > 1


def test_an_idle_shard_or_one_that_can_be_told_nothing_has_no_room() -> None:
    doing = Doing(0.0)
    assert not doing.pipeline.has_room
    doing.add()
    assert doing.pipeline.has_room
    doing.pipeline.available = False
    assert not doing.pipeline.has_room


def test_no_job_goes_behind_one_that_runs_alone() -> None:
    doing = Doing(0.0)
    doing.add(solo=True)
    assert not doing.pipeline.has_room


def test_an_attempt_begins_when_it_is_the_first() -> None:
    doing = Doing()
    first, second = doing.add(queue_id="1"), doing.add()
    assert (doing.pipeline.first, doing.shard.current_queue_id) == (first, "1")
    assert second.pipeline.shard is doing.shard
    doing.now = 3.0
    assert doing.pipeline.remove(first, doing.now, scanned=True) is second
    assert (second.began, doing.pipeline.first) == (3.0, second)
    assert doing.shard.current_queue_id == ""
    assert doing.pipeline.remove(second, doing.now, scanned=True) is None
    assert doing.pipeline.first is None


def test_an_attempt_that_was_withdrawn_is_no_scan() -> None:
    doing = Doing(0.0)
    first, second, third = doing.add(), doing.add(), doing.add()
    doing.now = 100.0
    assert doing.pipeline.remove(second, doing.now, scanned=False) is None
    assert doing.pipeline.remove(first, doing.now, scanned=False) is third
    assert doing.pipeline.has_room


def test_a_shard_is_fresh_until_it_is_given_something() -> None:
    doing = Doing()
    assert doing.pipeline.fresh
    doing.scan(0.0)
    assert not doing.pipeline.fresh


def test_a_retired_shard_is_over_without_attempts_and_objects() -> None:
    doing = Doing()
    assert not doing.pipeline.is_drained
    doing.pipeline.retired = True
    assert doing.pipeline.is_drained
    doing.pipeline.affinities.add(ObjectAffinity(replayable=True))
    assert not doing.pipeline.is_drained
    doing.pipeline.affinities.clear()
    attempt = doing.add()
    assert not doing.pipeline.is_drained
    doing.pipeline.remove(attempt, 0.0, scanned=True)
    assert doing.pipeline.is_drained
