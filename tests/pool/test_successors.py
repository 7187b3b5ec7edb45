"""In a generation that serves, each slot has a shard or will have one: when, and which."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from one_generation import Owner
from one_pool import texts
from twisted.logger import capturedLogs

from sharded_milter.errors import MilterLoadError
from sharded_milter.pool.generation import (
    GenerationEvent,
    GenerationState,
)

# Serving: deaths and back-off


def delays(
    owner: Owner, deaths: int, *, ready: bool, answers: int = 0, at_work: bool = False
) -> list[float]:
    """How long it takes after each death until there is another shard."""
    found = []
    for _ in range(deaths):
        owner.made[-1].died_at_work = at_work
        owner.gone(len(owner.made) - 1, answers=answers)
        count, start = len(owner.made), owner.clock.seconds()
        while len(owner.made) == count:
            owner.clock.advance(min(call.getTime() for call in owner.clock.getDelayedCalls())
                                - owner.clock.seconds())  # fmt: skip
        found.append(round(owner.clock.seconds() - start, 3))
        if ready:
            owner.ready(count)
    return found


DOUBLING = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]


def test_one_that_dies_again_and_again_is_replaced_later_and_later() -> None:
    owner = Owner(state=GenerationState.SERVING)
    assert delays(owner, 11, ready=True) == DOUBLING


def test_one_that_never_starts_is_started_later_and_later() -> None:
    owner = Owner(state=GenerationState.SERVING)
    owner.gone(0)
    owner.clock.advance(0.1)
    assert delays(owner, 10, ready=False) == DOUBLING[1:]


def test_one_that_dies_of_the_first_job_it_is_given_is_replaced_within_a_second() -> None:
    owner = Owner(state=GenerationState.SERVING)
    assert delays(owner, 7, ready=True, at_work=True) == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("at_work", [True, False])
def test_one_that_has_answered_anything_is_replaced_at_once(at_work: bool) -> None:
    owner = Owner(state=GenerationState.SERVING)
    assert delays(owner, 5, ready=True, answers=1, at_work=at_work) == [0.0] * 5


def test_a_message_that_kills_twice_again_and_again_leaves_no_slot_without_a_worker() -> None:
    """Each takes a worker that has answered others, and a fresh one for its second try."""
    owner = Owner(state=GenerationState.SERVING)
    waits = [
        delays(owner, 1, ready=True, answers=answers, at_work=True)[0]
        for answers in (50, 0, 1, 0, 7, 0)
    ]
    assert waits == [0.0, 0.1, 0.0, 0.1, 0.0, 0.1]


@pytest.mark.parametrize(("served", "answers"), [(10.0, 0), (0.0, 1)])
def test_the_back_off_begins_anew_after_a_healthy_run(served: float, answers: int) -> None:
    owner = Owner(state=GenerationState.SERVING)
    delays(owner, 5, ready=True)
    owner.clock.advance(served)
    assert delays(owner, 1, ready=True, answers=answers) == [0.0]
    assert delays(owner, 3, ready=True) == DOUBLING[:3]


def test_a_shorter_run_without_an_answer_is_not_healthy() -> None:
    owner = Owner(state=GenerationState.SERVING)
    owner.clock.advance(9.9)
    assert delays(owner, 1, ready=True) == [0.1]


def test_the_operator_may_say_how_long_is_waited() -> None:
    owner = Owner(state=GenerationState.SERVING, respawn_first=2.0, respawn_longest=3.0)
    assert delays(owner, 3, ready=True) == [2.0, 3.0, 3.0]
    owner = Owner(state=GenerationState.SERVING, respawn_longest=0.05)
    assert delays(owner, 2, ready=True, at_work=True) == [0.05, 0.05]


def test_a_refused_respawn_is_tried_again_and_logged() -> None:
    owner = Owner(state=GenerationState.SERVING)
    owner.refusals = [OSError(11, "no more")]
    with capturedLogs() as events:
        owner.gone(0)
        owner.clock.pump([0.1, 0.2])
    assert owner.log == ["worker_restarts", "start 2"]
    assert texts(events) == [
        "shard 1 is gone: killed by SIGSEGV",
        "shard 1 has not started: cannot start a worker: no more",
    ]


def test_a_successor_that_cannot_load_the_milter_is_told_with_its_traceback() -> None:
    owner = Owner(state=GenerationState.SERVING)
    owner.gone(0)
    owner.clock.advance(0.1)
    owner.made[1].load_error = MilterLoadError("milter x: no", "traceback\n")
    with capturedLogs() as events:
        owner.gone(1)
    assert texts(events) == ["shard 1 has not started: milter x: no\ntraceback"]


# Serving: successors


def recycle(owner: Owner) -> None:
    owner.generation.recycle(owner.generation.slots[0], "it is old")


def test_a_recycled_shard_drains_when_its_successor_is_ready() -> None:
    owner = Owner(state=GenerationState.SERVING)
    recycle(owner)
    recycle(owner)  # which is done already
    owner.clock.advance(0)
    recycle(owner)
    assert owner.log == ["recycled", "start 1"]
    assert owner.generation.is_starting_shards
    owner.ready(1)
    assert owner.log[2:] == ["drain 0", "serve 1"]
    assert not owner.generation.is_starting_shards
    owner.gone(0, "exited with code 0")
    owner.clock.advance(60.0)
    assert len(owner.made) == 2


@pytest.mark.parametrize(
    "state", [GenerationState.LOADING, GenerationState.DRAINING, GenerationState.ENDED]
)
def test_only_a_generation_that_serves_recycles(state: GenerationState) -> None:
    owner = Owner(state=state)
    recycle(owner)
    owner.clock.advance(60.0)
    assert len(owner.made) == 1


def test_a_shard_that_dies_while_its_successor_starts_needs_no_other() -> None:
    owner = Owner(state=GenerationState.SERVING)
    recycle(owner)
    owner.clock.advance(0)
    owner.gone(0)
    owner.clock.advance(60.0)
    assert len(owner.made) == 2
    owner.ready(1)
    assert owner.log[-1] == "serve 1"


def test_a_shard_that_is_worn_is_recycled_unless_it_is_on_its_way_out() -> None:
    owner = Owner(state=GenerationState.SERVING)
    owner.generation.recycle_shard(owner.made[0], "why")
    owner.clock.advance(0)
    owner.ready(1)
    owner.generation.recycle_shard(owner.made[0], "why")
    owner.clock.advance(60.0)
    assert len(owner.made) == 2


def files_changed(owner: Owner, act: Callable[[Owner], None]) -> None:
    act(owner)
    owner.clock.advance(0.1)
    owner.log.clear()
    owner.ready(len(owner.made) - 1, b"other")


def test_a_replacement_with_other_code_does_not_serve() -> None:
    owner = Owner(2, GenerationState.SERVING)
    with capturedLogs() as events:
        files_changed(owner, lambda owner: owner.gone(0))
    assert owner.log == ["kill 2", "files changed"]
    assert texts(events)[-1] == "the milter's files have changed: all workers are replaced"
    owner.gone(2)
    owner.clock.advance(29.0)
    assert len(owner.made) == 3
    owner.clock.advance(1.0)  # should the new code not load, the slot is tried again
    assert len(owner.made) == 4


def test_a_recycled_shard_with_other_code_leaves_the_old_one_at_work() -> None:
    owner = Owner(2, GenerationState.SERVING)
    files_changed(owner, recycle)
    owner.clock.advance(60.0)
    assert owner.log == ["kill 2", "files changed"]


@pytest.mark.parametrize(("wait", "log"), [(False, ["drain 0"]), (True, ["kill 1", "drain 0"])])
def test_when_another_generation_serves_all_of_its_shards_leave(wait: bool, log: list[str]) -> None:
    owner = Owner(state=GenerationState.SERVING)
    recycle(owner)
    if wait:
        owner.clock.advance(0)
    owner.log.clear()
    owner.generation.handle_event(GenerationEvent.SUCCEEDED)
    owner.clock.advance(60.0)
    assert owner.log == log


@pytest.mark.parametrize("starts", [True, False])
def test_when_it_shrinks_the_last_slot_is_given_up(starts: bool) -> None:
    owner = Owner(2, GenerationState.SERVING)
    if starts:
        owner.gone(1)
        owner.clock.advance(0.1)
        owner.log.clear()
    owner.generation.handle_event(GenerationEvent.RESIZED, -1)
    assert owner.log == (["kill 2"] if starts else ["drain 1"])
    if starts:
        owner.ready(2)
        assert owner.log == ["kill 2", "kill 2"]
