"""Taking connections: in turns, with a spare descriptor, and never leaving one without an end."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from one_listener import OpenGate, Reactor
from twisted.logger import capturedLogs

from sharded_milter.mta.accepting import ACCEPT_PAUSE, ACCEPTS_PER_ITERATION, Acceptor
from sharded_milter.mta.addresses import parse_listen
from sharded_milter.mta.listener import Listener

NO_DESCRIPTORS = OSError(errno.EMFILE, "Too many open files")


class Place:
    """A UNIX socket that is served; `refusals` are raised instead of accepting, one by one."""

    def __init__(self, path: Path) -> None:
        self.gate = OpenGate()
        self.reactor = Reactor()
        self.refusals: list[OSError] = []
        self.listener = Listener(parse_listen(f"unix:{path}"), 0o600, "")
        self.listener.serve(self.reactor.connections, self.gate, self.reactor)
        (self.acceptor,) = self.reactor.readers

    def accept(self, acceptor: Acceptor) -> Any:
        """Stands in for the acceptor's own way to the system."""
        if self.refusals:
            raise self.refusals.pop(0)
        return acceptor._socket.accept()

    def close(self) -> None:
        self.reactor.hang_up()
        self.listener.close()
        self.gate.reserved.release()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = Place(tmp_path / "s")
    monkeypatch.setattr(Acceptor, "_accept", lambda acceptor: place.accept(acceptor))
    yield place
    place.close()


def said(events: Any) -> list[str]:
    return [event["log_format"].format(**event) for event in events]


def test_others_get_their_turn_between_many_connections(place: Place) -> None:
    place.reactor.clients(place.listener, ACCEPTS_PER_ITERATION + 1)
    place.reactor.read()
    assert len(place.reactor.connections) == ACCEPTS_PER_ITERATION
    place.reactor.read()
    assert len(place.reactor.connections) == ACCEPTS_PER_ITERATION + 1


def test_it_takes_no_more_for_as_long_as_the_gate_says(place: Place) -> None:
    place.gate.waits = [0.0, 0.5]
    place.reactor.clients(place.listener, 2)
    place.reactor.read()
    assert (len(place.reactor.connections), place.reactor.readers) == (1, set())
    place.reactor.advance(0.5)
    place.reactor.read()
    assert len(place.reactor.connections) == 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_a_reserved_descriptor_is_used_if_no_other_is_left(place: Place, number: int) -> None:
    place.refusals.append(OSError(number, os.strerror(number)))
    place.reactor.clients(place.listener, 1)
    with capturedLogs() as events:
        place.reactor.read()
    assert len(place.reactor.connections) == 1
    assert said(events) == [
        "no file descriptor is left for a connection to"
        f" {place.listener.address.spec}: {os.strerror(number)}"
    ]


def test_it_is_said_once_while_it_goes_on(place: Place) -> None:
    with capturedLogs() as events:
        for _ in range(5):
            place.refusals.append(NO_DESCRIPTORS)
            place.reactor.clients(place.listener, 1)
            place.reactor.read()
    assert len(events) == 1
    assert len(place.reactor.connections) == 5


def test_what_cannot_be_accepted_at_all_waits_with_the_kernel(place: Place) -> None:
    place.refusals += [NO_DESCRIPTORS] * 2  # with the reserved descriptor, and without
    place.reactor.clients(place.listener, 1)
    place.reactor.read()
    assert (len(place.reactor.connections), place.reactor.readers) == (0, set())
    place.reactor.advance(ACCEPT_PAUSE)
    place.reactor.read()
    assert len(place.reactor.connections) == 1


def test_a_client_that_has_left_already_is_no_trouble(place: Place) -> None:
    place.refusals.append(ConnectionAbortedError())
    place.reactor.clients(place.listener, 2)
    with capturedLogs() as events:
        place.reactor.read()
        place.reactor.read()
    assert (len(place.reactor.connections), events) == (2, [])


def test_one_that_is_closed_while_it_pauses_stays_closed(place: Place) -> None:
    place.gate.waits = [1.0]
    place.reactor.read()
    place.listener.close()
    place.reactor.advance(1.0)
    assert place.reactor.readers == set()


def test_one_that_the_reactor_has_lost_is_closed(place: Place) -> None:
    assert place.acceptor.logPrefix() == place.listener.address.spec
    place.acceptor.connectionLost("reason")
    assert place.reactor.readers == set()
