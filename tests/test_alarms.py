"""Alarms ring for what was set and not stopped, each at its time, with one call of the clock's."""

from __future__ import annotations

import pytest
from armed import armed
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from sharded_milter.alarms import Alarm

DELAY = 10.0


class Ringing:
    def __init__(self) -> None:
        self.clock = Clock()
        self.heard: list[tuple[float, str]] = []
        self.alarm: Alarm[str] = Alarm(self.clock, DELAY, self.ring)

    def ring(self, item: str) -> None:
        self.heard.append((self.clock.seconds(), item))


def test_it_rings_once_for_each_item_at_its_time() -> None:
    house = Ringing()
    house.alarm.set("a")
    house.clock.advance(4.0)
    house.alarm.set("b")
    assert len(house.clock.getDelayedCalls()) == 1
    house.clock.pump([1.0] * 40)
    assert house.heard == [(10.0, "a"), (14.0, "b")]
    assert house.clock.getDelayedCalls() == []


def test_what_is_stopped_does_not_ring() -> None:
    house = Ringing()
    house.alarm.set("a")
    house.alarm.stop("a")
    house.alarm.stop("never set")
    assert armed(house.clock) == []
    house.clock.pump([1.0] * 20)
    assert house.heard == []
    assert house.clock.getDelayedCalls() == []


def test_what_is_set_again_rings_later() -> None:
    house = Ringing()
    house.alarm.set("a")
    house.alarm.set("b")
    house.clock.advance(6.0)
    house.alarm.set("a")
    house.clock.pump([1.0] * 20)
    assert house.heard == [(10.0, "b"), (16.0, "a")]


def test_an_item_may_be_set_anew_or_stopped_while_others_ring() -> None:
    house = Ringing()

    def ring(item: str) -> None:
        house.ring(item)
        if item == "a":
            house.alarm.stop("b")
            house.alarm.set("c")
            house.alarm.set("a")

    house.alarm = Alarm(house.clock, DELAY, ring)
    for item in "abcd":
        house.alarm.set(item)
    house.clock.advance(DELAY)
    assert [item for _, item in house.heard] == ["a", "d"]
    house.clock.advance(DELAY)
    assert [item for _, item in house.heard] == ["a", "d", "c", "a"]


def test_one_that_fails_keeps_no_other_from_ringing() -> None:
    house = Ringing()

    def ring(item: str) -> None:
        if item == "bad":
            raise ZeroDivisionError
        house.ring(item)

    house.alarm = Alarm(house.clock, DELAY, ring)
    house.alarm.set("bad")
    house.alarm.set("good")
    with pytest.raises(ZeroDivisionError):
        house.clock.advance(DELAY)
    house.clock.advance(0.0)
    assert [item for _, item in house.heard] == ["good"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 7)), max_size=30))
def test_it_does_what_a_call_for_each_item_would(steps: list[tuple[str, bool, int]]) -> None:
    house = Ringing()
    plain: list[tuple[float, str]] = []
    calls: dict[str, list[float]] = {}
    for item, stop, wait in steps:
        calls.pop(item, None)
        if stop:
            house.alarm.stop(item)
        else:
            house.alarm.set(item)
            calls[item] = [house.clock.seconds() + DELAY]
        for _ in range(wait):
            house.clock.advance(1.0)
            now = house.clock.seconds()
            for name in [name for name, (due,) in calls.items() if due <= now]:
                plain.append((now, name))
                del calls[name]
    assert house.heard == plain
