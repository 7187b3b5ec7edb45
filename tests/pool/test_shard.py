"""One shard: what each event means in each state."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from one_shard import ANSWER, FIELDS, LOSS, Room

from sharded_milter.pool.shard import (
    TRANSITIONS,
    Event,
    State,
)

# Every event in every state

DETAILS: dict[Event, tuple[Any, ...]] = {
    Event.READY: ([FIELDS], b"code", b""),
    Event.LOAD_FAILED: (b"milter x: no", b"traceback"),
    Event.ANSWERED: (7, ANSWER),
    Event.DRAIN: (30.0,),
    Event.EXITED: ("exited with code 0",),
    **dict.fromkeys(
        (Event.TOO_SLOW, Event.STOP, Event.EXIT_DUE, Event.KILL, Event.SILENT), (LOSS,)
    ),
}
KILLED = (State.KILLED, ["unavailable", "kill"])
BROKEN = (State.KILLED, ["deaf", "unavailable", "kill"])
ANSWERED = ["read output", "answer 7"]
EXITED = "lost: exited with code 0"

#: What is not said changes nothing.
LAW: dict[State, dict[Event, tuple[State, list[str]]]] = {
    State.STARTING: {
        Event.READY: (State.SERVING, ["ready"]),
        Event.LOAD_FAILED: (State.LEAVING, ["exit"]),
        Event.TOO_SLOW: KILLED,
        Event.ANSWERED: BROKEN,
        Event.DRAIN: (State.LEAVING, ["exit"]),
        Event.STOP: KILLED,
        Event.KILL: KILLED,
        Event.SILENT: KILLED,
        Event.CLOSED: (State.STARTING, ["unavailable"]),
        Event.EXITED: (State.GONE, ["end family", EXITED, "NOT_STARTED"]),
    },
    State.SERVING: {
        Event.READY: BROKEN,
        Event.LOAD_FAILED: BROKEN,
        Event.ANSWERED: (State.SERVING, ANSWERED),
        Event.DRAIN: (State.DRAINING, ["retire"]),
        Event.STOP: (State.KILLED, ["give up objects", "retire", "unavailable", "kill"]),
        Event.KILL: KILLED,
        Event.SILENT: KILLED,
        Event.CLOSED: (State.SERVING, ["unavailable"]),
        Event.EXITED: (State.GONE, ["end family", EXITED, "DIED"]),
    },
    State.DRAINING: {
        Event.READY: BROKEN,
        Event.LOAD_FAILED: BROKEN,
        Event.ANSWERED: (State.DRAINING, ANSWERED),
        Event.LINGERED: (State.DRAINING, ["give up objects"]),
        Event.STOP: KILLED,
        Event.DRAINED: (State.LEAVING, ["exit"]),
        Event.KILL: KILLED,
        Event.SILENT: KILLED,
        Event.CLOSED: (State.DRAINING, ["unavailable"]),
        Event.EXITED: (State.GONE, ["end family", EXITED, "DIED"]),
    },
    State.LEAVING: {
        Event.ANSWERED: (State.LEAVING, ANSWERED),
        Event.EXIT_DUE: KILLED,
        Event.KILL: KILLED,
        Event.EXITED: (State.GONE, ["end family", EXITED, "ENDED"]),
    },
    State.KILLED: {
        Event.ANSWERED: (State.KILLED, ANSWERED),
        Event.EXITED: (State.GONE, ["end family", "lost: for a reason", "NOT_STARTED"]),
    },
    State.GONE: {},
}


def test_the_table_has_a_cell_for_every_event_in_every_state() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(set(row) == set(Event) for row in TRANSITIONS.values())


@pytest.mark.parametrize(
    ("state", "event"), list(product(State, Event)), ids=lambda each: each.name
)
def test_every_event_does_in_every_state_what_the_rules_say(state: State, event: Event) -> None:
    room = Room(state)
    room.shard._happens(event, *DETAILS.get(event, ()))
    after, log = LAW[state].get(event, (state, []))
    assert (room.shard.state, room.log) == (after, log)
    assert TRANSITIONS[state][event].after in (after, State.DRAINING)


@pytest.mark.parametrize("state", list(State))
def test_a_shard_that_is_gone_leaves_nothing_due(state: State) -> None:
    room = Room(state)
    room.shard._happens(Event.CLOSED)
    if state is not State.GONE:
        room.place.exit()
    assert room.clock.getDelayedCalls() == []
    assert room.place.ours.lost
