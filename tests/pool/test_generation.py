"""One load of the milters' code: what each event means in each state, and how it loads."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from one_generation import FakeShard, Owner
from one_pool import MANIFEST, texts
from twisted.logger import capturedLogs

from sharded_milter.dispatch.job import Blame, Loss
from sharded_milter.errors import ConfigError, MilterLoadError, SystemRefused
from sharded_milter.limits import Limits
from sharded_milter.pool.generation import (
    MAX_RESTARTS,
    TRANSITIONS,
    Generation,
    GenerationEvent,
    GenerationState,
)

# Every event in every state


def slot_of(owner: Owner) -> Any:
    return owner.generation.slots[0]


def a_stranger(owner: Owner) -> FakeShard:
    """One that is ready though its slot does not wait for it."""
    shard = FakeShard(1, owner.log, 9, None)
    shard.manifests, shard.code = (MANIFEST,), b"code"
    shard.loss = Loss("killed by SIGSEGV", Blame.MESSAGE)
    return shard


def details(event: GenerationEvent, owner: Owner) -> tuple[Any, ...]:
    if event is GenerationEvent.READY:
        return (a_stranger(owner),)
    if event in (GenerationEvent.NOT_STARTED, GenerationEvent.DIED):
        return slot_of(owner), a_stranger(owner)
    return (1,) if event is GenerationEvent.RESIZED else ()


LATE = ["kill 9"]

#: What is not said changes nothing. There is one slot: its shard starts, or serves.
LAW: dict[GenerationState, dict[GenerationEvent, tuple[GenerationState, list[str]]]] = {
    GenerationState.LOADING: {
        GenerationEvent.READY: (GenerationState.LOADING, []),  # it is not all
        GenerationEvent.NOT_STARTED: (GenerationState.ENDED, ["kill 0", "failed"]),
        GenerationEvent.DIED: (GenerationState.ENDED, ["kill 0", "failed"]),
        GenerationEvent.RESIZED: (GenerationState.LOADING, ["start 1"]),
        GenerationEvent.COMPLETE: (GenerationState.SERVING, ["serve 0", "took over"]),
        GenerationEvent.STOPPED: (GenerationState.ENDED, ["stop 0"]),
    },
    GenerationState.SERVING: {
        GenerationEvent.READY: (GenerationState.SERVING, LATE),
        GenerationEvent.NOT_STARTED: (GenerationState.SERVING, ["start 1"]),
        GenerationEvent.DIED: (GenerationState.SERVING, ["worker_restarts", "start 1"]),
        GenerationEvent.RESIZED: (GenerationState.SERVING, ["start 1"]),
        GenerationEvent.SUCCEEDED: (GenerationState.DRAINING, ["drain 0"]),
        GenerationEvent.STOPPED: (GenerationState.ENDED, ["stop 0"]),
    },
    GenerationState.DRAINING: {
        GenerationEvent.READY: (GenerationState.DRAINING, LATE),
        GenerationEvent.STOPPED: (GenerationState.ENDED, ["stop 0"]),
    },
    GenerationState.ENDED: {GenerationEvent.READY: (GenerationState.ENDED, LATE)},
}


def test_the_table_has_a_cell_for_every_event_in_every_state() -> None:
    assert set(TRANSITIONS) == set(GenerationState)
    assert all(set(row) == set(GenerationEvent) for row in TRANSITIONS.values())


@pytest.mark.parametrize(
    ("state", "event"), list(product(GenerationState, GenerationEvent)), ids=lambda each: each.name
)
def test_every_event_does_in_every_state_what_the_rules_say(
    state: GenerationState, event: GenerationEvent
) -> None:
    owner = Owner(state=state)
    owner.generation.handle_event(event, *details(event, owner))
    owner.clock.advance(0.1)  # the shortest back-off
    assert (owner.generation.state, owner.log) == LAW[state].get(event, (state, []))
    assert TRANSITIONS[state][event].after is owner.generation.state


@pytest.mark.parametrize("state", list(GenerationState))
def test_a_generation_that_is_stopped_starts_nothing_more(state: GenerationState) -> None:
    owner = Owner(2, state)
    if state is GenerationState.SERVING:
        owner.gone(0)  # whose successor is to start
        owner.log.clear()
    owner.generation.handle_event(GenerationEvent.STOPPED)
    for number, shard in enumerate(list(owner.made)):
        if shard in owner.generation.shards:
            owner.gone(number)
    owner.clock.advance(100.0)
    assert not [word for word in owner.log if word.startswith("start")]
    assert (owner.generation.shards, owner.clock.getDelayedCalls()) == (set(), [])


# Loading


def test_it_serves_when_all_of_its_shards_are_ready() -> None:
    owner = Owner(2)
    assert not owner.generation.manifests
    owner.ready(1)
    assert owner.log == []
    owner.ready(0)
    assert owner.log == ["serve 0", "serve 1", "took over"]
    assert owner.generation.manifests == (MANIFEST,)


@pytest.mark.parametrize("ready_before", [True, False])
def test_one_that_ends_while_it_loads_ends_it_with_the_reason(ready_before: bool) -> None:
    owner = Owner(2)
    if ready_before:
        owner.ready(0)
    owner.gone(0, "exited with code 3")
    assert owner.log == ["kill 1", "failed"]
    (error,) = owner.errors
    assert isinstance(error, ConfigError)
    assert str(error) == "its worker ended: exited with code 3"


def test_the_reason_of_a_load_that_failed_is_told() -> None:
    owner = Owner()
    owner.made[0].load_error = error = MilterLoadError("milter x: no", "traceback")
    owner.gone(0)
    assert owner.errors == [error]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_system_that_refuses_a_process_ends_it(before: int) -> None:
    owner = Owner(1)
    owner.refusals = [None] * before + [OSError(11, "Resource temporarily unavailable")]
    generation = Generation(3, Limits(), owner, owner.clock)
    generation.load()
    (error,) = owner.errors
    assert isinstance(error, SystemRefused)
    assert str(error) == "cannot start a worker: Resource temporarily unavailable"
    assert len(generation.shards) == before
    assert generation.state is GenerationState.ENDED


def test_when_it_shrinks_while_the_last_shard_starts_it_serves() -> None:
    owner = Owner(2)
    owner.ready(0)
    owner.generation.handle_event(GenerationEvent.RESIZED, -1)
    assert owner.log == ["kill 1", "serve 0", "took over"]
    owner.gone(1)
    owner.clock.advance(100.0)
    assert len(owner.made) == 2


def test_when_it_shrinks_before_any_is_ready_it_still_loads() -> None:
    owner = Owner(2)
    owner.generation.handle_event(GenerationEvent.RESIZED, -1)
    assert owner.log == ["kill 1"]
    owner.ready(0)
    assert owner.log[-1] == "took over"


def test_when_it_grows_while_it_loads_it_waits_for_the_new_shard() -> None:
    owner = Owner(1)
    owner.generation.handle_event(GenerationEvent.RESIZED, 1)
    owner.ready(0)
    assert owner.log == ["start 1"]
    owner.ready(1)
    assert owner.log[-1] == "took over"


def test_files_that_change_while_it_loads_make_those_with_other_code_load_anew() -> None:
    owner = Owner(3)
    owner.ready(0, b"old")
    owner.ready(1, b"new")
    assert owner.log == []
    with capturedLogs() as events:
        owner.ready(2, b"new")
    assert texts(events) == [
        "the milter's files have changed while it was loaded; loading it again"
    ]
    assert owner.log == ["kill 0", "start 3"]
    owner.gone(0)
    owner.ready(3, b"new")
    assert owner.log[2:] == ["serve 3", "serve 1", "serve 2", "took over"]


def test_old_and_new_code_that_become_ready_in_turns_cost_two_rounds_at_most() -> None:
    owner = Owner(12)
    for number in range(12):
        owner.ready(number, b"new" if number % 2 else b"old")
    for number in range(12, 18):
        owner.ready(number, b"new")
    assert owner.log[-1] == "took over"
    assert owner.generation.code == (b"new", (MANIFEST,))


def test_a_system_that_refuses_when_it_loads_anew_ends_it_once() -> None:
    owner = Owner(3)
    owner.refusals = [OSError(11, "no more")]
    for number, code in enumerate((b"1", b"2", b"3")):
        owner.ready(number, code)
    assert owner.log == ["kill 0", "kill 1", "kill 2", "failed"]


def test_a_generation_never_mixes_however_often_files_change() -> None:
    """Where each worker sees other files, loading ends with a reason."""
    owner = Owner(2)
    rounds = 0
    while owner.generation.state is GenerationState.LOADING:
        rounds += 1
        for number, shard in enumerate(list(owner.made)):
            if not shard.manifests and owner.generation.state is GenerationState.LOADING:
                owner.ready(number, b"%d" % number)
    assert rounds == 1 + MAX_RESTARTS
    assert [str(error) for error in owner.errors] == [
        "the milter's files differ from worker to worker"
    ]
    assert "took over" not in owner.log
