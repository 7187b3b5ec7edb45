"""One shard: what each event means in each state."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from one_shard import ANSWER, FIELDS, LOSS, Room

from sharded_milter.pool.shard import (
    TRANSITIONS,
    ShardEvent,
    ShardState,
)

# Every event in every state

DETAILS: dict[ShardEvent, tuple[Any, ...]] = {
    ShardEvent.READY: ([FIELDS], b"code", b""),
    ShardEvent.LOAD_FAILED: (b"milter x: no", b"traceback"),
    ShardEvent.ANSWERED: (7, ANSWER),
    ShardEvent.DRAIN: (30.0,),
    ShardEvent.EXITED: ("exited with code 0",),
    **dict.fromkeys(
        (
            ShardEvent.TOO_SLOW,
            ShardEvent.STOP,
            ShardEvent.EXIT_DUE,
            ShardEvent.KILL,
            ShardEvent.LINGERING,
        ),
        (LOSS,),
    ),
}
KILLED = (ShardState.KILLED, ["unavailable", "kill"])
BROKEN = (ShardState.KILLED, ["deaf", "unavailable", "kill"])
ANSWERED = ["read output", "answer 7"]
EXITED = "lost: exited with code 0"

#: What is not said changes nothing.
LAW: dict[ShardState, dict[ShardEvent, tuple[ShardState, list[str]]]] = {
    ShardState.STARTING: {
        ShardEvent.READY: (ShardState.SERVING, ["ready"]),
        ShardEvent.LOAD_FAILED: (ShardState.EXITING, ["exit"]),
        ShardEvent.TOO_SLOW: KILLED,
        ShardEvent.ANSWERED: BROKEN,
        ShardEvent.DRAIN: (ShardState.EXITING, ["exit"]),
        ShardEvent.STOP: KILLED,
        ShardEvent.KILL: KILLED,
        ShardEvent.LINGERING: KILLED,
        ShardEvent.CLOSED: (ShardState.STARTING, ["unavailable"]),
        ShardEvent.EXITED: (ShardState.GONE, ["end family", EXITED, "NOT_STARTED"]),
    },
    ShardState.SERVING: {
        ShardEvent.READY: BROKEN,
        ShardEvent.LOAD_FAILED: BROKEN,
        ShardEvent.ANSWERED: (ShardState.SERVING, ANSWERED),
        ShardEvent.DRAIN: (ShardState.DRAINING, ["retire"]),
        ShardEvent.STOP: (ShardState.KILLED, ["give up objects", "retire", "unavailable", "kill"]),
        ShardEvent.KILL: KILLED,
        ShardEvent.LINGERING: KILLED,
        ShardEvent.CLOSED: (ShardState.SERVING, ["unavailable"]),
        ShardEvent.EXITED: (ShardState.GONE, ["end family", EXITED, "DIED"]),
    },
    ShardState.DRAINING: {
        ShardEvent.READY: BROKEN,
        ShardEvent.LOAD_FAILED: BROKEN,
        ShardEvent.ANSWERED: (ShardState.DRAINING, ANSWERED),
        ShardEvent.OBJECTS_DUE: (ShardState.DRAINING, ["give up objects"]),
        ShardEvent.STOP: KILLED,
        ShardEvent.DRAINED: (ShardState.EXITING, ["exit"]),
        ShardEvent.KILL: KILLED,
        ShardEvent.LINGERING: KILLED,
        ShardEvent.CLOSED: (ShardState.DRAINING, ["unavailable"]),
        ShardEvent.EXITED: (ShardState.GONE, ["end family", EXITED, "DIED"]),
    },
    ShardState.EXITING: {
        ShardEvent.ANSWERED: (ShardState.EXITING, ANSWERED),
        ShardEvent.EXIT_DUE: KILLED,
        ShardEvent.KILL: KILLED,
        ShardEvent.EXITED: (ShardState.GONE, ["end family", EXITED, "ENDED"]),
    },
    ShardState.KILLED: {
        ShardEvent.ANSWERED: (ShardState.KILLED, ANSWERED),
        ShardEvent.EXITED: (ShardState.GONE, ["end family", "lost: for a reason", "NOT_STARTED"]),
    },
    ShardState.GONE: {},
}


def test_the_table_has_a_cell_for_every_event_in_every_state() -> None:
    assert set(TRANSITIONS) == set(ShardState)
    assert all(set(row) == set(ShardEvent) for row in TRANSITIONS.values())


@pytest.mark.parametrize(
    ("state", "event"), list(product(ShardState, ShardEvent)), ids=lambda each: each.name
)
def test_every_event_does_in_every_state_what_the_rules_say(
    state: ShardState, event: ShardEvent
) -> None:
    room = Room(state)
    room.shard._handle_event(event, *DETAILS.get(event, ()))
    after, log = LAW[state].get(event, (state, []))
    assert (room.shard.state, room.log) == (after, log)
    assert TRANSITIONS[state][event].after in (after, ShardState.DRAINING)


@pytest.mark.parametrize("state", list(ShardState))
def test_a_shard_that_is_gone_leaves_nothing_due(state: ShardState) -> None:
    room = Room(state)
    room.shard._handle_event(ShardEvent.CLOSED)
    if state is not ShardState.GONE:
        room.place.exit()
    assert room.clock.getDelayedCalls() == []
    assert room.place.ours.lost
