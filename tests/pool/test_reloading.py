"""A new generation takes over when all of it is ready, or the old one goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from one_pool import MANIFEST, Bench, states, texts
from twisted.logger import capturedLogs

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.pool.pool import TICK
from sharded_milter.pool.shard import ShardState
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Protocol, Stage

OTHER = Manifest("other", protocol=Protocol.NO_BODY)


def test_a_reload_replaces_all_workers_when_all_new_ones_are_ready() -> None:
    bench = Bench(2)
    bench.pool.reload()
    bench.be_ready(3, manifest=OTHER)
    assert bench.serving == [0, 1]
    assert bench.pool.manifests == (MANIFEST,)
    bench.be_ready(2, manifest=OTHER)
    assert bench.serving == [2, 3]
    assert bench.pool.manifests == (OTHER,)
    assert states(bench)[:2] == [ShardState.EXITING] * 2
    for number in (0, 1):
        bench.places[number].exit("exited with code 0")
    assert len(bench.pool.shards) == 2


def cannot_load(bench: Bench) -> None:
    bench.shards[2].load_failed(b"milter x: no", b"traceback")
    bench.places[2].exit("exited with code 0")


def too_slow(bench: Bench) -> None:
    bench.clock.advance(60.0)
    bench.places[2].exit()


@pytest.mark.parametrize("fail", [cannot_load, too_slow])
def test_a_reload_that_fails_leaves_the_old_workers(fail: Callable[[Bench], None]) -> None:
    bench = Bench(2, worker_start_timeout=60.0)
    bench.pool.reload()
    with capturedLogs() as events:
        fail(bench)
    assert bench.serving == [0, 1]
    assert [text for text in texts(events) if text.startswith("reload failed, the old workers")]
    assert bench.dispatcher.counters["reloads_failed"] == 1
    assert bench.killed(3)
    bench.places[3].exit()
    bench.clock.advance(60.0)
    assert len(bench.shards) == 4


def test_a_reload_that_the_system_refuses_leaves_the_old_workers_and_nothing_else() -> None:
    bench = Bench(2)
    bench.refusals.append(OSError(11, "no more"))
    bench.pool.reload()
    assert bench.serving == [0, 1]
    assert bench.pool._draining == set()
    bench.pool.reload()
    bench.be_ready()
    assert bench.serving == [3, 4]


def test_reloads_during_a_reload_are_one_more() -> None:
    bench = Bench()
    for _ in range(10):
        bench.pool.reload()
    assert len(bench.shards) == 2
    bench.be_ready(1)
    assert len(bench.shards) == 3
    bench.be_ready(2)
    assert (len(bench.shards), bench.serving) == (3, [2])


def test_a_reload_asked_for_during_one_that_fails_is_done_after_it() -> None:
    bench = Bench()
    bench.pool.reload()
    bench.pool.reload()
    bench.places[1].exit()
    assert len(bench.shards) == 3
    bench.be_ready(2)
    assert bench.serving == [2]


def test_a_reload_during_the_start_is_done_after_it() -> None:
    bench = Bench(ready=False)
    bench.start()
    bench.pool.reload()
    assert len(bench.shards) == 1
    bench.be_ready(0)
    bench.be_ready(1)
    assert bench.serving == [1]


def test_a_worker_that_dies_during_a_reload_is_replaced_with_the_code_that_serves() -> None:
    bench = Bench(2)
    bench.pool.reload()
    bench.places[0].exit()
    bench.clock.advance(0.1)
    assert len(bench.shards) == 5
    bench.be_ready(4)
    assert bench.serving == [1, 4]
    bench.be_ready(2, 3, code=b"new")
    assert bench.serving == [2, 3]


def test_all_workers_dead_before_a_reload_are_no_trouble() -> None:
    bench = Bench()
    bench.pool.reload()
    bench.places[0].exit()
    bench.be_ready(1)
    bench.clock.advance(60.0)
    assert (bench.serving, len(bench.shards), bench.pool._draining) == ([1], 2, set())


def test_an_object_of_an_old_worker_is_answered_for_while_that_drains() -> None:
    bench = Bench(graceful_timeout=30.0)
    affinity = ObjectAffinity(replayable=True)
    bench.submit(Stage.CONNECT, affinity=affinity)
    bench.answer_all(0)
    bench.pool.reload()
    bench.be_ready(1)
    assert states(bench)[0] is ShardState.DRAINING
    other, its_own = bench.submit(), bench.submit(affinity=affinity)
    bench.answer_all(0)
    assert (other.values, its_own.values) == ([], [b"replies"])
    bench.clock.advance(30.0)
    assert states(bench)[0] is ShardState.EXITING


# Files that change


def test_a_replacement_with_other_code_makes_a_new_generation_load() -> None:
    bench = Bench(2)
    bench.places[0].exit()
    bench.until_another()
    bench.be_ready(2, code=b"new")
    assert (bench.serving, bench.killed(2)) == ([1], True)
    bench.be_ready(3, 4, manifest=OTHER, code=b"new")
    assert bench.serving == [3, 4]
    assert bench.pool.manifests == (OTHER,)


def test_files_that_change_again_while_a_generation_loads_make_another_load_after_it() -> None:
    bench = Bench(2, worker_lifetime=5.0)
    bench.pool.reload()
    bench.clock.pump([TICK] * 6)
    recycled = [n for n in bench.starting if n > 3]
    bench.be_ready(recycled[0], code=b"new")
    assert bench.killed(recycled[0])
    bench.be_ready(2, 3, code=b"new")
    assert bench.serving == [2, 3]
    count = len(bench.shards)
    bench.clock.advance(0)
    assert len(bench.starting) == 2
    bench.be_ready(count - 2, count - 1, code=b"newer")
    assert bench.serving == [count - 2, count - 1]


def test_files_that_change_while_a_generation_loads_never_mix() -> None:
    bench = Bench(2, ready=False)
    bench.start()
    bench.be_ready(0, code=b"old")
    bench.be_ready(1, code=b"new")
    assert (bench.outcome, bench.killed(0), bench.starting) == ([], True, [2])
    bench.be_ready(2, code=b"new")
    assert (len(bench.outcome), bench.serving) == (1, [1, 2])
