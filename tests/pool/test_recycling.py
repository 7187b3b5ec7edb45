"""Workers that have served enough, or that a message cannot use, are replaced by fresh ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from one_pool import Bench, states, texts
from twisted.logger import capturedLogs

from sharded_milter.pool.pool import MEMORY_EVERY, TICK
from sharded_milter.pool.shard import ShardState
from sharded_milter.pool.slot import JITTER
from sharded_milter.protocol.stages import Stage


def by_answers(bench: Bench) -> None:
    for _ in range(round(100 * (1 + JITTER))):
        bench.submit()
        bench.answer_all(0)
    bench.clock.advance(0)


def by_age(bench: Bench) -> None:
    bench.clock.pump([TICK] * 100)


def by_memory(bench: Bench) -> None:
    bench.places[0].rss = 1001
    bench.clock.pump([TICK] * (MEMORY_EVERY + 1))


RECYCLING: dict[str, tuple[dict[str, Any], Callable[[Bench], None], str]] = {
    "answers": ({"max_messages": 100}, by_answers, "it has given 1"),
    "age": ({"worker_lifetime": 99.0}, by_age, "it has served for 99 s"),
    "memory": ({"worker_max_rss": 1000}, by_memory, "it uses more than 1000 bytes of memory"),
}


@pytest.mark.parametrize(("limits", "act", "why"), RECYCLING.values(), ids=RECYCLING)
def test_a_worker_that_has_served_enough_is_replaced_by_one_that_is_ready(
    limits: dict[str, Any], act: Callable[[Bench], None], why: str
) -> None:
    bench = Bench(**limits)
    with capturedLogs() as events:
        act(bench)
    assert [text for text in texts(events) if why in text]
    assert (len(bench.shards), bench.serving) == (2, [0])
    bench.be_ready(1)
    assert bench.serving == [1]
    assert states(bench)[0] is ShardState.EXITING
    bench.places[0].exit("exited with code 0")
    bench.clock.advance(0.5)
    assert bench.dispatcher.counters["recycled"] == 1
    assert bench.dispatcher.counters["worker_restarts"] == 0


@pytest.mark.parametrize("act", [act for _, act, _ in RECYCLING.values()], ids=RECYCLING)
def test_a_worker_without_a_limit_is_never_replaced(act: Callable[[Bench], None]) -> None:
    bench = Bench()
    act(bench)
    assert len(bench.shards) == 1


def test_a_worker_below_its_limit_is_not_replaced() -> None:
    bench = Bench(worker_max_rss=1001)
    by_memory(bench)
    assert len(bench.shards) == 1


def test_a_worker_that_is_never_idle_is_replaced_as_well() -> None:
    bench = Bench(max_messages=20)
    bench.submit()
    for _ in range(30):
        bench.submit()
        bench.answer_all(0)
    bench.clock.advance(0)
    assert len(bench.shards) == 2


def test_a_busy_worker_that_is_recycled_finishes_what_it_does() -> None:
    bench = Bench(worker_lifetime=5.0)
    result = bench.submit()
    bench.clock.pump([TICK] * 6)
    bench.be_ready(1)
    assert states(bench)[0] is ShardState.DRAINING
    bench.answer_all(0)
    assert result.only == b"replies"
    assert states(bench)[0] is ShardState.EXITING


def test_a_worker_whose_successor_cannot_start_goes_on() -> None:
    bench = Bench(worker_lifetime=5.0)
    bench.clock.pump([TICK] * 6)
    bench.places[1].exit()
    assert bench.serving == [0]
    bench.until_another()
    bench.be_ready()
    assert bench.serving == [2]


def test_a_slot_whose_worker_is_dead_is_not_recycled() -> None:
    bench = Bench(worker_lifetime=5.0, respawn_first=60.0, respawn_longest=60.0)
    bench.places[0].exit()
    bench.clock.pump([TICK] * 20)
    assert bench.dispatcher.counters["recycled"] == 0


def test_counts_are_spread_so_that_not_all_workers_start_cold_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = iter([0, 10])
    monkeypatch.setattr("random.randint", lambda low, high: next(drawn))
    bench = Bench(2, max_messages=100)
    assert [shard.recycle_after for shard in bench.shards] == [100, 110]


def test_a_message_that_has_killed_gets_a_fresh_worker() -> None:
    bench = Bench(2)
    for _ in range(2):
        bench.submit()
    bench.answer_all(0)
    bench.answer_all(1)
    result = bench.submit(Stage.EOM)
    guilty = next(n for n in (0, 1) if bench.places[n].ours.sent)
    bench.places[guilty].exit()
    bench.clock.advance(0.2)  # its replacement starts, and is fresh
    bench.be_ready(2)
    bench.answer_all(2)
    assert (result.only, result.job.slot) == (b"replies", bench.shards[2].slot)
    assert bench.dispatcher.counters["recycled"] == 0


def test_where_no_worker_is_fresh_the_oldest_is_recycled_for_it() -> None:
    bench = Bench(2)
    for _ in range(2):
        bench.submit()
    bench.answer_all(0)
    bench.answer_all(1)
    result = bench.submit(Stage.EOM, solo=True)
    with capturedLogs() as events:
        bench.clock.pump([TICK] * 3)
    assert "shard 1 is replaced: a message that has killed needs a fresh worker" in texts(events)
    assert len(bench.shards) == 3
    bench.be_ready(2)
    bench.answer_all(2)
    assert result.only == b"replies"
    bench.clock.pump([TICK] * 3)
    assert len(bench.shards) == 3


def test_no_worker_is_recycled_for_it_while_another_starts() -> None:
    bench = Bench(2)
    for _ in range(2):
        bench.submit()
    bench.answer_all(0)
    bench.answer_all(1)
    bench.places[1].exit()
    result = bench.submit(Stage.EOM, solo=True)
    bench.clock.pump([TICK] * 3)
    assert bench.dispatcher.counters["recycled"] == 0
    bench.be_ready(2)
    bench.answer_all(2)
    assert result.only == b"replies"
