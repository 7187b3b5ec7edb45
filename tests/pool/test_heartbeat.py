"""Workers that are stopped, or deaf while they are idle, are found and replaced; no others are."""

from __future__ import annotations

from itertools import product

import pytest
from one_pool import Bench
from one_shard import ANSWER, Room

from sharded_milter.dispatch.job import Blame, Job
from sharded_milter.pool.heartbeat import (
    PING_AFTER,
    PING_TIMEOUT,
    STOPPED_TIMEOUT,
    Heartbeat,
    Pulse,
)
from sharded_milter.pool.pool import TICK
from sharded_milter.pool.shard import ShardEvent, ShardState
from sharded_milter.protocol.stages import Stage

# The count of looks


def looks(heart: Heartbeat, count: int, *, idle: bool = True, stopped: bool = False) -> list[Pulse]:
    return [heart.check(idle=idle, stopped=stopped) for _ in range(count)]


def test_an_idle_worker_is_pinged_when_it_has_been_silent_and_again_after_it_has_answered() -> None:
    heart = Heartbeat()
    for _ in range(3):
        assert looks(heart, PING_AFTER) == [Pulse.FINE] * (PING_AFTER - 1) + [Pulse.PING_DUE]
        heart.ping_sent()
        assert looks(heart, 1) == [Pulse.FINE]
        heart.pong_received()


def test_one_that_does_not_answer_the_ping_is_deaf_whatever_it_was_given_since() -> None:
    heart = Heartbeat()
    heart.ping_sent()
    assert looks(heart, PING_TIMEOUT + 1, idle=False) == [Pulse.FINE] * PING_TIMEOUT + [
        Pulse.UNRESPONSIVE
    ]


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_a_busy_worker_is_never_pinged(count: int) -> None:
    assert set(looks(Heartbeat(), count, idle=False)) == {Pulse.FINE}


def test_an_answer_to_a_question_is_a_sign_of_life_but_not_to_the_ping() -> None:
    heart = Heartbeat()
    heart.ping_sent()
    for _ in range(5):
        assert looks(heart, PING_TIMEOUT) == [Pulse.FINE] * PING_TIMEOUT
        heart.reset()
    assert looks(heart, PING_TIMEOUT + 1)[-1] is Pulse.UNRESPONSIVE


def test_one_that_stays_stopped_is_found_whether_busy_or_not() -> None:
    for idle in (True, False):
        heart = Heartbeat()
        assert looks(heart, STOPPED_TIMEOUT, idle=idle, stopped=True)[-1] is Pulse.STOPPED


def test_one_that_is_continued_before_the_next_look_is_fine() -> None:
    heart = Heartbeat()
    for _ in range(10):
        assert looks(heart, STOPPED_TIMEOUT - 1, idle=False, stopped=True) == [Pulse.FINE] * (
            STOPPED_TIMEOUT - 1
        )
        assert looks(heart, 1, idle=False) == [Pulse.FINE]


def test_it_is_quiet_once_a_look_has_passed_without_a_word() -> None:
    heart = Heartbeat()
    assert not heart.is_quiet
    looks(heart, 1)
    assert heart.is_quiet
    heart.reset()
    assert not heart.is_quiet
    looks(heart, 1)
    heart.ping_sent()
    looks(heart, 1)
    assert not heart.is_quiet


# One shard

WATCHED = (ShardState.SERVING, ShardState.DRAINING)


@pytest.mark.parametrize(
    ("state", "trouble"), list(product(ShardState, ("stopped", "deaf"))), ids=lambda each: str(each)
)
def test_who_serves_or_drains_is_killed_for_it_and_others_have_their_own_clocks(
    state: ShardState, trouble: str
) -> None:
    room = Room(state)
    room.place.stopped = trouble == "stopped"
    room.place.listens = trouble != "deaf"
    for _ in range(PING_AFTER + PING_TIMEOUT + 1):
        room.shard.check_heartbeat()
    if state in WATCHED:
        assert (room.shard.state, room.log) == (ShardState.KILLED, ["unavailable", "kill"])
        assert room.shard.loss is not None
    else:
        assert (room.shard.state, room.log) == (state, [])


@pytest.mark.parametrize("state", list(ShardState))
def test_an_answer_to_a_ping_that_comes_late_changes_nothing(state: ShardState) -> None:
    room = Room(state)
    room.shard._handle_event(ShardEvent.PONGED)
    assert (room.shard.state, room.log) == (state, [])


def test_there_is_one_ping_at_a_time() -> None:
    room = Room(ShardState.SERVING)
    room.place.listens = False
    for _ in range(PING_AFTER + PING_TIMEOUT):
        room.shard.check_heartbeat()
    assert room.place.pings == 1
    room.shard.ponged()
    for _ in range(PING_AFTER):
        room.shard.check_heartbeat()
    assert room.place.pings == 2
    assert room.shard.state is ShardState.SERVING


def test_a_long_scan_is_not_taken_for_deafness() -> None:
    room = Room(ShardState.SERVING)
    room.place.listens = False
    room.shard.give(1, Job(Stage.EOM, b"", b"message"))
    for _ in range(1000):
        room.shard.check_heartbeat()
    assert (room.shard.state, room.place.pings) == (ShardState.SERVING, 0)


def test_a_job_for_one_that_was_quiet_follows_a_ping_and_is_not_to_blame() -> None:
    room = Room(ShardState.SERVING)
    room.place.listens = False
    room.shard.check_heartbeat()
    room.shard.give(1, Job(Stage.EOM, b"", b"message"))
    room.shard.give(2, Job(Stage.EOM, b"", b"message"))
    assert room.place.pings == 1
    for _ in range(PING_TIMEOUT + 1):
        room.shard.check_heartbeat()
    assert room.shard.loss is not None
    assert (room.shard.state, room.shard.loss.blame) == (ShardState.KILLED, Blame.PLACE)


def test_a_job_for_one_that_has_just_answered_follows_no_ping() -> None:
    room = Room(ShardState.SERVING)
    room.shard.check_heartbeat()
    room.shard.answered(1, ANSWER)
    room.shard.give(2, Job(Stage.EOM, b"", b"message"))
    assert room.place.pings == 0


@pytest.mark.parametrize(("answers", "blame"), [(True, Blame.MESSAGE), (False, Blame.PLACE)])
def test_the_message_is_to_blame_where_the_worker_has_listened_and_stopped_then(
    answers: bool, blame: Blame
) -> None:
    room = Room(ShardState.SERVING)
    room.place.listens = answers
    room.shard.check_heartbeat()
    room.shard.give(1, Job(Stage.EOM, b"", b"message"))
    room.place.stopped = True
    for _ in range(STOPPED_TIMEOUT):
        room.shard.check_heartbeat()
    assert room.shard.loss is not None
    assert (room.shard.loss.reason, room.shard.loss.blame) == ("it was stopped by a signal", blame)


def test_one_that_a_debugger_holds_is_left_alone() -> None:
    room = Room(ShardState.SERVING)
    room.place.listens, room.place.traced = False, True
    for _ in range(PING_AFTER + 10 * PING_TIMEOUT):
        room.shard.check_heartbeat()
    assert room.log == []
    room.place.traced = False
    room.shard.check_heartbeat()
    assert room.log == ["unavailable", "kill"]


# The pool


def test_a_deaf_worker_is_replaced_before_the_next_mail() -> None:
    bench = Bench(2)
    bench.places[0].listens = False
    bench.clock.pump([TICK] * (PING_AFTER + PING_TIMEOUT + 1))
    assert bench.killed(0)
    assert not bench.killed(1)
    bench.places[0].exit("killed by SIGKILL")
    bench.until_another()
    bench.be_ready()
    assert bench.serving == [1, 2]


def test_the_job_of_a_deaf_worker_goes_on_elsewhere_unblamed() -> None:
    bench = Bench(2)
    bench.places[0].listens = bench.places[1].listens = False
    bench.clock.advance(TICK)
    result = bench.submit()
    given = next(n for n in (0, 1) if bench.shards[n].current_queue_id)
    bench.places[1 - given].listens = True
    bench.clock.pump([TICK] * (PING_TIMEOUT + 1))
    assert bench.killed(given)
    bench.places[given].exit("killed by SIGKILL")
    bench.answer_all(1 - given)
    assert (result.only, result.job.blamed) == (b"replies", 0)


def test_a_master_that_has_slept_kills_nobody() -> None:
    """Its clock has run on by an hour, its workers have answered, and it has not read that yet."""
    bench = Bench(2)
    for place in bench.places:
        place.listens = False
    bench.clock.pump([TICK] * PING_AFTER)
    for place in bench.places:
        assert place.pings == 1
    bench.clock.advance(3600)
    assert not any(bench.killed(n) for n in (0, 1))
    for shard in bench.shards:
        shard.ponged()
    bench.clock.pump([TICK] * 3)
    assert not any(bench.killed(n) for n in (0, 1))
