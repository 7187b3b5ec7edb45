"""Which workers there are: at the start, after deaths, at another size and at the end."""

from __future__ import annotations

from typing import Any

import pytest
from armed import armed
from one_pool import MANIFEST, Bench, FakePlace, noted, states, texts
from twisted.internet.defer import CancelledError
from twisted.logger import capturedLogs

from sharded_milter.errors import ConfigError, MilterLoadError, SystemRefused
from sharded_milter.ipc.messages import Sandboxed
from sharded_milter.pool.pool import TICK
from sharded_milter.pool.shard import MAX_SANDBOX_TEXT, ShardState

# Starting


def test_the_pool_has_started_when_every_worker_is_ready() -> None:
    bench = Bench(2, ready=False)
    assert (bench.pool.socket, bench.pool.manifests) == ("", ())
    bench.start()
    bench.be_ready(0)
    assert (bench.outcome, bench.serving) == ([], [])
    bench.be_ready(1)
    assert bench.outcome == [(MANIFEST,)]
    assert bench.pool.manifests == (MANIFEST,)
    assert bench.pool.socket == "unix:/s"
    assert {shard.slot for shard in bench.pool.shards} == {1, 2}
    assert bench.serving == [0, 1]


@pytest.mark.parametrize(("incomplete", "level"), [(b"", "info"), (b"yes", "warn")])
def test_what_became_of_the_sandbox_is_said_once(incomplete: bytes, level: str) -> None:
    bench = Bench(3, ready=False)
    bench.start()
    with capturedLogs() as events:
        for place, text in zip(bench.places, (b"same", b"same", b"other"), strict=True):
            place.say(Sandboxed, text=text, incomplete=incomplete)
            place.deliver()
        bench.be_ready()
    said = [event for event in events if event["log_format"] == "{text}"]
    assert [event["text"] for event in said] == ["same", "other"]
    assert {event["log_level"].name for event in said} == {level}


def test_a_sentence_of_a_worker_has_an_end() -> None:
    bench = Bench(1, ready=False)
    bench.start()
    bench.places[0].say(Sandboxed, text=b"x" * 60_000, incomplete=b"")
    bench.places[0].deliver()
    assert bench.shards[0].sandbox == ("x" * MAX_SANDBOX_TEXT, False)


def test_a_pool_without_workers_has_started_at_once() -> None:
    bench = Bench(0)
    assert bench.outcome == [()]
    with capturedLogs() as events:
        bench.pool.reload()
        bench.pool.resize(1)
    assert texts(events) == [
        "no milter runs in a worker; those in the master stay as they are",
        "the pool is not resized: no milter runs in a worker",
    ]
    bench.clock.pump([TICK] * 3)
    assert bench.pool.stop().called


def test_a_milter_that_cannot_be_loaded_ends_the_start() -> None:
    bench = Bench(2, ready=False)
    bench.start()
    bench.shards[0].load_failed(b"milter x: no", b"traceback")
    bench.places[0].exit("exited with code 0")
    (error,) = bench.outcome
    assert isinstance(error, MilterLoadError)
    assert (str(error), error.details) == ("milter x: no", "traceback")
    assert bench.killed(1)
    bench.places[1].exit()
    assert bench.pool.shards == []


def test_a_worker_that_takes_too_long_ends_the_start() -> None:
    bench = Bench(2, ready=False, worker_start_timeout=60.0)
    bench.start()
    bench.be_ready(0)
    bench.clock.advance(60.0)
    bench.places[1].exit()
    (error,) = bench.outcome
    assert isinstance(error, ConfigError)
    why = "its worker ended: it was not ready within --worker-start-timeout (60 s)"
    assert str(error) == why


def test_a_system_that_refuses_a_process_ends_the_start() -> None:
    bench = Bench(ready=False)
    bench.refusals.append(OSError(11, "no more"))
    bench.start()
    assert isinstance(bench.outcome[0], SystemRefused)
    assert bench.pool.stop().called


def test_a_worker_less_while_the_last_one_starts_lets_the_start_end() -> None:
    bench = Bench(2, ready=False)
    bench.start()
    bench.be_ready(0)
    bench.pool.resize(-1)
    assert bench.outcome == [(MANIFEST,)]
    assert (bench.serving, bench.killed(1)) == ([0], True)


# Deaths


def test_a_dead_worker_gets_no_jobs_and_its_successor_does() -> None:
    bench = Bench()
    bench.places[0].exit()
    waiting = bench.submit()
    assert bench.until_another() == pytest.approx(0.1, abs=0.06)
    bench.be_ready()
    bench.answer_all(1)
    assert waiting.only == b"replies"
    assert bench.dispatcher.counters["worker_restarts"] == 1


def test_a_crash_loop_goes_on_for_ever() -> None:
    bench = Bench(respawn_longest=0.1)
    for _ in range(200):
        bench.places[-1].exit()
        bench.clock.advance(0.1)
        bench.be_ready(len(bench.shards) - 1)
    assert len(bench.shards) == 201


def test_a_worker_that_has_answered_is_replaced_at_once() -> None:
    bench = Bench()
    for _ in range(7):
        bench.submit()
        bench.answer_all(len(bench.shards) - 1)
        bench.places[-1].exit()
        assert bench.until_another() == pytest.approx(0.0, abs=0.06)
        bench.be_ready()


def test_a_worker_that_dies_of_its_first_job_is_replaced_within_a_second() -> None:
    bench = Bench(retries=0)
    for _ in range(7):
        bench.submit()
        bench.places[-1].exit()
        delay = bench.until_another()
        bench.be_ready()
    assert delay == pytest.approx(1.0, abs=0.06)


def test_a_worker_that_breaks_a_rule_is_replaced_and_its_job_goes_on() -> None:
    bench = Bench(2)
    result = bench.submit()
    guilty = next(n for n in (0, 1) if bench.shards[n].current_queue_id)
    bench.places[guilty].answer(99)
    bench.places[guilty].deliver()
    assert bench.killed(guilty)
    bench.places[guilty].exit()
    bench.answer_all(1 - guilty)
    assert result.only == b"replies"
    assert result.job.blamed == 1  # as by a death: the message may have taken the worker over


def test_a_worker_that_ends_before_its_start_returns_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twisted looks for its exit while it starts it."""
    bench = Bench()
    real = FakePlace.start

    def start(place: FakePlace, owner: Any, channel: Any) -> None:
        real(place, owner, channel)
        place.exit("killed by SIGKILL")

    with monkeypatch.context() as patch:
        patch.setattr(FakePlace, "start", start)
        bench.places[0].exit()
        bench.clock.advance(bench.limits.respawn_first)
        assert len(bench.shards) == 2
        assert bench.places[1].ours.lost
    bench.clock.advance(bench.limits.respawn_longest)
    bench.be_ready(len(bench.places) - 1)
    assert bench.serving == [len(bench.places) - 1]


# Resizing


def test_the_pool_grows_and_shrinks_by_one() -> None:
    bench = Bench()
    bench.pool.resize(1)
    bench.clock.advance(0)
    bench.be_ready(1)
    assert bench.serving == [0, 1]
    bench.pool.resize(-1)
    assert bench.serving == [0]
    assert states(bench)[1] is ShardState.EXITING
    bench.places[1].exit("exited with code 0")
    bench.clock.advance(60.0)
    assert len(bench.shards) == 2


def test_the_last_worker_stays() -> None:
    bench = Bench()
    bench.pool.resize(-1)
    assert (bench.serving, states(bench)) == ([0], [ShardState.SERVING])


def test_a_worker_that_still_starts_is_killed_when_the_pool_shrinks() -> None:
    bench = Bench()
    bench.pool.resize(1)
    bench.clock.advance(0)
    bench.pool.resize(-1)
    assert bench.killed(1)
    bench.places[1].exit()
    bench.clock.advance(60.0)
    assert (bench.serving, len(bench.shards)) == ([0], 2)


@pytest.mark.parametrize(("change", "count"), [(1, 3), (-1, 1)])
def test_what_is_resized_during_a_reload_has_that_size_before_and_after_it(
    change: int, count: int
) -> None:
    bench = Bench(2)
    bench.pool.reload()
    bench.pool.resize(change)
    bench.clock.advance(0)
    bench.be_ready(*[n for n in bench.starting if n > 3])
    bench.be_ready(*bench.starting)
    alive = [shard for shard in bench.shards if shard.state is ShardState.SERVING]
    assert len(alive) == len(bench.serving) == count
    assert min(bench.serving) >= 2


# Stopping


def test_stopping_kills_who_starts_or_works_and_lets_who_is_idle_leave() -> None:
    bench = Bench(2)
    bench.pool.resize(1)
    bench.clock.advance(0)
    bench.submit()
    done: list[object] = []
    noted(bench.pool.stop(), done)
    assert sorted(state.name for state in states(bench)) == ["EXITING", "KILLED", "KILLED"]
    for place in bench.places:
        assert done == []
        place.exit()
    assert done == [None]
    assert (bench.pool.shards, len(bench.shards)) == ([], 3)


@pytest.mark.parametrize("during", ["start", "service", "reload", "death", "drain"])
def test_stopping_leaves_nothing(during: str) -> None:
    bench = Bench(2, ready=during != "start")
    if during == "start":
        bench.start()
    if during == "reload":
        bench.pool.reload()
    if during == "death":
        bench.places[0].exit()
    if during == "drain":
        bench.pool.reload()
        bench.be_ready()
    stopped = bench.pool.stop()
    bench.pool.reload()
    bench.pool.resize(1)
    for place in bench.places:
        if place.is_alive:
            place.exit()
    assert stopped.called
    assert armed(bench.clock) == []
    count = len(bench.shards)
    bench.clock.advance(100.0)
    assert (bench.pool.shards, len(bench.shards)) == ([], count)


def test_stopping_twice_is_the_same_stop() -> None:
    bench = Bench()
    assert bench.pool.stop() is bench.pool.stop()


def test_stopping_a_pool_that_was_never_started_is_done_at_once() -> None:
    assert Bench(ready=False).pool.stop().called


def test_the_start_of_a_pool_that_is_stopped_before_it_is_ready_ends_too() -> None:
    bench = Bench(ready=False)
    bench.start()
    stopped = bench.pool.stop()
    [outcome] = bench.outcome
    assert isinstance(outcome, CancelledError)
    bench.places[0].exit()
    assert (stopped.called, bench.outcome) == (True, [outcome])


def test_a_job_that_is_lost_at_the_end_goes_to_no_other_worker() -> None:
    bench = Bench(2)
    lost = bench.submit()
    busy = next(n for n in (0, 1) if bench.shards[n].current_queue_id)
    bench.pool.stop()
    bench.places[busy].exit()
    bench.places[1 - busy].deliver()
    assert (bench.places[1 - busy].worker.asked, lost.values) == ([], [])


def test_all_workers_can_be_asked_where_they_are() -> None:
    bench = Bench(2)
    bench.pool.dump_stacks()
    assert all("stacks" in place.did for place in bench.places)


def test_what_becomes_of_a_shard_that_the_pool_does_not_know_is_nothing() -> None:
    bench, other = Bench(), Bench()
    bench.pool.shard_ready(other.shards[0])
    bench.pool.recycle_shard(other.shards[0], "why")
    other.shards[0]._owner = bench.pool
    other.places[0].exit()
    assert bench.serving == [0]
