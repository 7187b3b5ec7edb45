"""Which workers there are: at the start, after deaths, and when the operator wants others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from one_pool import MANIFEST, MESSAGE, FakeShard, Result, noted
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from sharded_milter.dispatch.dispatcher import Dispatch
from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.pipeline import ENOUGH
from sharded_milter.errors import ConfigError, MilterLoadError, SystemRefused
from sharded_milter.limits import Limits
from sharded_milter.pool.pool import HEALTHY_AFTER, JITTER, MEMORY_EVERY, TICK, Pool
from sharded_milter.pool.shard import Events, State
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Protocol, Stage

OTHER = Manifest("other", protocol=Protocol.NO_BODY)


class Bench:
    """A pool with its clock and every shard that it ever started."""

    def __init__(self, size: int = 1, *, ready: bool = True, **limits: Any) -> None:
        self.clock = Clock()
        self.limits = Limits(**limits)
        self.dispatch = Dispatch(self.limits, self.clock)
        self.shards: list[FakeShard] = []
        self.refusals: list[OSError] = []
        self.pool = Pool(self._start_shard, size, self.limits, self.dispatch, self.clock)
        self.outcome: list[Any] = []
        if ready:
            self.start()
            self.be_ready(*self.shards)

    def _start_shard(self, slot: int, events: Events) -> FakeShard:
        if self.refusals:
            raise self.refusals.pop(0)
        shard = FakeShard(slot, self.clock, events)
        shard.pid = 1000 + len(self.shards)
        self.shards.append(shard)
        return shard

    def start(self) -> None:
        noted(self.pool.start(), self.outcome)

    def be_ready(self, *shards: FakeShard, manifest: Manifest = MANIFEST) -> None:
        for shard in shards:
            shard.ready(manifest)

    def submit(self) -> Result:
        result = Result(Job(Stage.RCPT, False, b"", MESSAGE, lambda: "qid=1"))
        noted(self.dispatch.submit(result.job), result.values)
        return result

    @property
    def serving(self) -> list[int]:
        """The numbers, by birth, of those that may get work."""
        return [n for n, shard in enumerate(self.shards) if shard in self.dispatch.schedule._shards]

    @property
    def told(self) -> list[list[str]]:
        return [shard.told for shard in self.shards]

    def until_another(self, longest: float = 60.0) -> float:
        """How long it takes until there is another shard."""
        count, start = len(self.shards), self.clock.seconds()
        while len(self.shards) == count and self.clock.seconds() - start < longest:
            self.clock.advance(0.05)
        return self.clock.seconds() - start


def texts(events: Any) -> list[str]:
    return [event["log_format"].format(**event) for event in events]


# Starting


def test_the_pool_has_started_when_every_worker_is_ready() -> None:
    bench = Bench(2, ready=False)
    bench.start()
    bench.be_ready(bench.shards[0])
    assert bench.outcome == []
    bench.be_ready(bench.shards[1])
    assert bench.outcome == [(MANIFEST,)]
    assert bench.pool.manifests == (MANIFEST,)
    assert [shard.slot for shard in bench.pool.shards] == [1, 2]
    assert bench.serving == [0, 1]


def test_a_milter_that_cannot_be_loaded_ends_the_start() -> None:
    bench = Bench(2, ready=False)
    bench.start()
    error = MilterLoadError("milter x: no", "traceback")
    bench.shards[0].load_error = error
    bench.shards[0].exit("exited with code 0")
    bench.shards[1].exit()
    assert bench.outcome == [error]


def test_a_worker_that_ends_early_ends_the_start() -> None:
    bench = Bench(ready=False)
    bench.start()
    bench.shards[0].exit("exited with code 3")
    (error,) = bench.outcome
    assert isinstance(error, ConfigError)
    assert str(error) == "its worker ended: exited with code 3"


def test_a_worker_that_takes_too_long_ends_the_start() -> None:
    bench = Bench(2, ready=False, worker_start_timeout=60.0)
    bench.start()
    bench.be_ready(bench.shards[0])
    bench.clock.advance(60.0)
    assert bench.told == [[], ["kill: it was not ready within 60 s"]]
    bench.shards[1].exit()
    (error,) = bench.outcome
    assert isinstance(error, ConfigError)
    assert str(error) == "its worker ended: it was not ready within 60 s"


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_system_that_refuses_a_process_ends_the_start(before: int) -> None:
    bench = Bench(3, ready=False)
    real = bench.pool._start_shard

    def start(slot: int, events: Events) -> Any:
        if slot > before:
            raise OSError(11, "Resource temporarily unavailable")
        return real(slot, events)

    bench.pool._start_shard = start
    bench.start()
    (error,) = bench.outcome
    assert isinstance(error, SystemRefused)
    assert str(error) == "cannot start a worker: Resource temporarily unavailable"
    assert len(bench.shards) == before


# Deaths


def test_a_worker_that_ends_is_replaced_later_and_later() -> None:
    bench = Bench()
    delays = []
    for _ in range(12):
        bench.shards[-1].exit()
        delays.append(bench.until_another())
        bench.be_ready(bench.shards[-1])
    expected = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0, 30.0]
    assert delays == pytest.approx(expected, abs=0.06)


def test_a_crash_loop_goes_on_for_ever() -> None:
    bench = Bench(respawn_longest=0.1)
    for _ in range(2000):
        bench.shards[-1].exit()
        bench.clock.advance(0.1)
    assert len(bench.shards) == 2001


def test_a_healthy_run_makes_the_next_start_quick_again() -> None:
    bench = Bench()
    for _ in range(5):
        bench.shards[-1].exit()
        bench.until_another()
        bench.be_ready(bench.shards[-1])
    bench.clock.advance(HEALTHY_AFTER)
    bench.shards[-1].exit()
    assert bench.until_another() == pytest.approx(0.1, abs=0.06)


def test_a_worker_that_never_was_ready_was_not_healthy() -> None:
    bench = Bench()
    for _ in range(3):
        bench.shards[-1].exit()
        bench.until_another()
    bench.clock.advance(HEALTHY_AFTER)
    bench.shards[-1].exit()
    assert bench.until_another() == pytest.approx(0.8, abs=0.06)


def test_a_dead_worker_gets_no_jobs_and_its_successor_does() -> None:
    bench = Bench()
    bench.shards[0].exit()
    waiting = bench.submit()
    bench.until_another()
    bench.be_ready(bench.shards[1])
    bench.shards[1].answer(b"replies")
    assert waiting.only == b"replies"
    assert bench.dispatch.counters["worker_restarts"] == 1


def test_a_deaf_worker_gets_no_jobs_and_is_replaced_when_it_ends() -> None:
    bench = Bench(2)
    bench.pool.shard_deaf(bench.shards[0])
    assert bench.serving == [1]
    bench.shards[0].exit()
    bench.until_another()
    bench.be_ready(bench.shards[2])
    assert bench.serving == [1, 2]


def test_a_refused_respawn_is_tried_again_and_logged() -> None:
    bench = Bench()
    bench.refusals += [OSError(11, "no more"), OSError(11, "no more")]
    with capturedLogs() as events:
        bench.shards[0].exit()
        bench.clock.pump([0.05] * 40)
    assert len(bench.shards) == 2
    assert texts(events) == [
        "shard 1 is gone: killed by SIGSEGV",
        "cannot start shard 1: no more",
        "cannot start shard 1: no more",
    ]


def test_a_successor_that_cannot_load_the_milter_is_told_with_its_traceback() -> None:
    bench = Bench()
    bench.shards[0].exit()
    bench.until_another()
    bench.shards[1].load_error = MilterLoadError("milter x: no", "traceback\n")
    with capturedLogs() as events:
        bench.shards[1].exit("exited with code 0")
    assert texts(events) == ["shard 1 has not started: milter x: no\ntraceback"]
    bench.until_another()
    bench.be_ready(bench.shards[2])
    assert bench.serving == [2]


def test_a_respawned_worker_that_is_never_ready_is_killed() -> None:
    bench = Bench(worker_start_timeout=60.0)
    bench.shards[0].exit()
    bench.until_another()
    bench.clock.advance(60.0)
    assert bench.shards[1].told == ["kill: it was not ready within 60 s"]


# Recycling: the successor first


def recycled_by_count(bench: Bench) -> None:
    for _ in range(round(100 * (1 + JITTER))):
        bench.submit()
        bench.shards[0].answer()
    bench.clock.advance(0)


def test_a_shard_that_is_never_idle_is_replaced_as_well() -> None:
    bench = Bench(max_messages=100)
    for _ in range(ENOUGH):
        bench.submit()
        bench.shards[0].answer()
    bench.submit()
    for _ in range(round(100 * (1 + JITTER))):
        bench.submit()
        bench.shards[0].answer()
    assert bench.shards[0].state is State.BUSY
    bench.clock.advance(0)
    assert len(bench.shards) == 2


def recycled_by_age(bench: Bench) -> None:
    bench.clock.pump([TICK] * 100)


def recycled_by_memory(bench: Bench) -> None:
    bench.shards[0].memory = 1001
    bench.clock.pump([TICK] * (MEMORY_EVERY + 1))


RECYCLING: dict[str, tuple[dict[str, Any], Callable[[Bench], None], str]] = {
    "count": ({"max_messages": 100}, recycled_by_count, "it has answered"),
    "age": ({"worker_lifetime": 99.0}, recycled_by_age, "it has served for 99 s"),
    "memory": ({"worker_max_rss": 1000}, recycled_by_memory, "it uses more than 1000 bytes"),
}


@pytest.mark.parametrize(("limits", "act", "why"), RECYCLING.values(), ids=RECYCLING)
def test_a_worker_that_has_served_enough_is_replaced_by_one_that_is_ready(
    limits: dict[str, Any], act: Callable[[Bench], None], why: str
) -> None:
    bench = Bench(**limits)
    with capturedLogs() as events:
        act(bench)
    assert len(bench.shards) == 2
    assert [text for text in texts(events) if why in text]
    assert bench.serving == [0]
    bench.be_ready(bench.shards[1])
    assert bench.serving == [1]
    assert bench.told == [["drain"], []]
    assert bench.dispatch.counters["recycled"] == 1
    bench.shards[0].exit("exited with code 0")
    bench.clock.advance(60.0)
    assert bench.dispatch.counters["worker_restarts"] == 0


@pytest.mark.parametrize(("limits", "act", "why"), RECYCLING.values(), ids=RECYCLING)
def test_a_worker_without_a_limit_is_never_replaced(
    limits: dict[str, Any], act: Callable[[Bench], None], why: str
) -> None:
    bench = Bench()
    act(bench)
    assert len(bench.shards) == 1


def test_a_worker_whose_successor_cannot_start_goes_on() -> None:
    bench = Bench(worker_lifetime=5.0)
    bench.clock.pump([TICK] * 6)
    bench.shards[1].load_error = MilterLoadError("milter x: no")
    bench.shards[1].exit()
    assert bench.serving == [0]
    bench.until_another()
    bench.be_ready(bench.shards[2])
    assert bench.serving == [2]


def test_a_worker_that_dies_while_its_successor_starts_needs_no_other() -> None:
    bench = Bench(worker_lifetime=5.0)
    bench.clock.pump([TICK] * 6)
    bench.shards[0].exit()
    bench.clock.advance(30.0)
    assert len(bench.shards) == 2
    bench.be_ready(bench.shards[1])
    assert bench.serving == [1]


def test_counts_are_spread_so_that_not_all_workers_start_cold_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = iter([0, 10])
    asked = []

    def randint(low: int, high: int) -> int:
        asked.append((low, high))
        return next(drawn)

    monkeypatch.setattr("random.randint", randint)
    bench = Bench(2, max_messages=100)
    assert asked == [(0, 10), (0, 10)]
    assert [slot.messages for slot in bench.pool._slots] == [100, 110]


# Reloading


def test_a_reload_replaces_all_workers_when_all_new_ones_are_ready() -> None:
    bench = Bench(2)
    bench.pool.reload()
    bench.be_ready(bench.shards[3], manifest=OTHER)
    assert bench.serving == [0, 1]
    assert bench.pool.manifests == (MANIFEST,)
    bench.be_ready(bench.shards[2], manifest=OTHER)
    assert bench.serving == [2, 3]
    assert bench.pool.manifests == (OTHER,)
    assert bench.told == [["drain"], ["drain"], [], []]


def failed_import(bench: Bench) -> None:
    bench.shards[2].load_error = MilterLoadError("milter x: no", "traceback")
    bench.shards[2].exit("exited with code 0")


def too_slow(bench: Bench) -> None:
    bench.clock.advance(60.0)
    bench.shards[2].exit()


@pytest.mark.parametrize("fail", [failed_import, too_slow])
def test_a_reload_that_fails_leaves_the_old_workers(fail: Callable[[Bench], None]) -> None:
    bench = Bench(2, worker_start_timeout=60.0)
    bench.pool.reload()
    with capturedLogs() as events:
        fail(bench)
    assert bench.serving == [0, 1]
    assert bench.told[:2] == [[], []]
    assert bench.shards[3].told[-1] == "kill: the reload has failed"
    assert [text for text in texts(events) if text.startswith("not reloaded, the old workers go")]
    assert bench.dispatch.counters["reloads_failed"] == 1
    bench.shards[3].exit()
    bench.clock.advance(60.0)
    assert len(bench.shards) == 4


def test_a_reload_that_the_system_refuses_leaves_the_old_workers() -> None:
    bench = Bench(2)
    bench.refusals.append(OSError(11, "no more"))
    bench.pool.reload()
    assert bench.serving == [0, 1]
    bench.pool.reload()
    bench.be_ready(*bench.shards[2:])
    assert bench.serving == [2, 3]


def test_reloads_during_a_reload_are_one_more() -> None:
    bench = Bench()
    for _ in range(10):
        bench.pool.reload()
    assert len(bench.shards) == 2
    bench.be_ready(bench.shards[1])
    assert len(bench.shards) == 3
    bench.be_ready(bench.shards[2])
    assert len(bench.shards) == 3
    assert bench.serving == [2]


def test_a_reload_during_the_start_is_done_after_it() -> None:
    bench = Bench(ready=False)
    bench.start()
    bench.pool.reload()
    assert len(bench.shards) == 1
    bench.be_ready(bench.shards[0])
    bench.be_ready(bench.shards[1])
    assert bench.serving == [1]


def test_a_worker_that_dies_during_a_reload_is_replaced_by_it() -> None:
    bench = Bench(2)
    bench.pool.reload()
    bench.shards[0].exit()
    bench.clock.advance(50.0)
    assert len(bench.shards) == 4
    bench.be_ready(*bench.shards[2:])
    assert bench.serving == [2, 3]


def test_a_worker_that_dies_during_a_reload_that_fails_is_replaced_after_it() -> None:
    bench = Bench(2)
    bench.pool.reload()
    bench.shards[0].exit()
    failed_import(bench)
    bench.until_another()
    bench.be_ready(bench.shards[-1])
    assert bench.serving == [1, 4]


def test_a_reload_gives_up_a_successor_that_may_have_read_the_old_code() -> None:
    bench = Bench(worker_lifetime=5.0)
    bench.clock.pump([TICK] * 6)
    bench.pool.reload()
    assert bench.shards[1].told == ["kill: a reload has begun"]
    bench.be_ready(bench.shards[1], bench.shards[2])
    assert bench.serving == [2]


def test_a_respawned_worker_with_another_milter_makes_all_of_them_new() -> None:
    bench = Bench(2)
    bench.shards[0].exit()
    bench.until_another()
    bench.be_ready(bench.shards[2], manifest=OTHER)
    assert bench.serving == [1]
    assert bench.shards[2].told == ["kill: a reload has begun"]
    bench.be_ready(*bench.shards[3:], manifest=OTHER)
    assert bench.serving == [3, 4]
    assert bench.pool.manifests == (OTHER,)


# Resizing


def test_the_pool_grows_and_shrinks_by_one() -> None:
    bench = Bench()
    bench.pool.resize(1)
    bench.clock.advance(0)
    bench.be_ready(bench.shards[1])
    assert bench.serving == [0, 1]
    bench.pool.resize(-1)
    assert bench.serving == [0]
    assert bench.told == [[], ["drain"]]
    bench.shards[1].exit("exited with code 0")
    bench.clock.advance(60.0)
    assert len(bench.shards) == 2


def test_the_last_worker_stays() -> None:
    bench = Bench()
    bench.pool.resize(-1)
    assert bench.serving == [0]
    assert bench.told == [[]]


def test_a_worker_that_still_starts_is_killed_when_the_pool_shrinks() -> None:
    bench = Bench()
    bench.pool.resize(1)
    bench.clock.advance(0)
    bench.pool.resize(-1)
    assert bench.shards[1].told == ["kill: the pool shrinks"]
    bench.be_ready(bench.shards[1])
    assert bench.serving == [0]


def test_the_pool_keeps_its_size_during_a_reload() -> None:
    bench = Bench()
    bench.pool.reload()
    bench.pool.resize(1)
    bench.clock.advance(1.0)
    assert len(bench.shards) == 2


# Stopping


def test_stopping_kills_who_starts_or_works_and_drains_who_is_idle() -> None:
    bench = Bench(2)
    bench.pool.resize(1)
    bench.clock.advance(0)
    noted(bench.dispatch.submit(Job(Stage.RCPT, False, b"", MESSAGE, lambda: "qid=1")), [])
    done: list[object] = []
    noted(bench.pool.stop(), done)
    assert bench.told == [
        ["kill: the service stops"],
        ["drain"],
        ["kill: the service stops"],
    ]
    for shard in bench.shards:
        assert done == []
        shard.exit()
    assert done == [None]
    bench.clock.advance(60.0)
    assert len(bench.shards) == 3


def test_stopping_waits_for_those_that_leave() -> None:
    bench = Bench()
    bench.pool.reload()
    bench.be_ready(bench.shards[1])
    stopped = bench.pool.stop()
    bench.shards[1].exit()
    assert not stopped.called
    bench.shards[0].exit()
    assert stopped.called


def test_stopping_twice_is_the_same_stop() -> None:
    bench = Bench()
    assert bench.pool.stop() is bench.pool.stop()
    assert bench.shards[0].told == ["drain"]


def test_stopping_while_nobody_runs_is_done_at_once() -> None:
    bench = Bench()
    bench.shards[0].exit()
    assert bench.pool.stop().called
    bench.clock.advance(60.0)
    assert len(bench.shards) == 1
    assert bench.clock.getDelayedCalls() == []


def test_a_pool_that_is_stopped_before_it_is_ready_just_ends() -> None:
    bench = Bench(ready=False)
    bench.start()
    stopped = bench.pool.stop()
    bench.shards[0].exit()
    assert stopped.called
    assert bench.outcome == []


def test_nothing_is_reloaded_or_resized_after_the_end() -> None:
    bench = Bench()
    bench.pool.stop()
    bench.pool.reload()
    bench.pool.resize(1)
    bench.clock.advance(60.0)
    assert len(bench.shards) == 1


def test_all_workers_can_be_asked_where_they_are() -> None:
    bench = Bench(2)
    bench.shards[0].state = State.BUSY
    bench.pool.dump_stacks()
    assert bench.told == [["dump stacks"], ["dump stacks"]]


def test_a_job_that_is_lost_at_the_end_goes_to_nobody() -> None:
    bench = Bench(2)
    lost = bench.submit()
    bench.pool.stop()
    bench.shards[0].exit()
    assert bench.shards[1].asked == []
    assert lost.values == []
