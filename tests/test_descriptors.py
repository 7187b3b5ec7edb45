"""How a limit of descriptors is shared out."""

from __future__ import annotations

import os
import resource
import sys

import pytest

from sharded_milter import descriptors
from sharded_milter.descriptors import OF_A_PROGRAM, Shares, Spare, needed, short_of
from sharded_milter.errors import SystemRefused

LIMITS = (60, 100, 256, 1024, 4096, 20_000, 1_048_576)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_has_its_share_of_a_limit(limit: int, workers: int) -> None:
    shares = Shares(workers, limit)
    assert 0 < shares.connections < shares.memory < limit
    assert shares.memory - shares.connections == limit // 8
    # Above the last mark: successors of all workers, the start of one, those that are turned away.
    assert limit - shares.memory >= 3 * workers + 6 + shares.turned_away
    assert 1 <= shares.turned_away <= 16


@pytest.mark.parametrize("workers", [0, 1, 8, 500])
@pytest.mark.parametrize("connections", [1, 10, 1000, 100_000])
def test_what_is_needed_is_enough_and_not_too_much(connections: int, workers: int) -> None:
    limit = needed(connections, workers)
    assert Shares(workers, limit).room(OF_A_PROGRAM) >= connections
    assert Shares(workers, limit - 2).room(OF_A_PROGRAM) < connections


def test_the_limit_is_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    assert Shares(1).memory == Shares(1, 100).memory
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 200))
    assert Shares(1).memory == Shares(1, 200).memory
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert Shares(1).memory == Shares(1, sys.maxsize).memory


def test_the_limit_is_raised_and_the_operators_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: told.append(limits))
    assert descriptors.allow() == 100
    assert told == [(200, 200)]


def test_fewer_connections_than_asked_for_are_said_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    shares = Shares(2)
    room = shares.room(10)
    assert short_of(room, shares, 10) == ""
    assert short_of(20_000, shares, 10) == (
        f"about {room:,} MTA connections can be served at a time, instead of 20,000"
        " (--max-connections), for the limit of 1,024 file descriptors leaves no more; raise it"
        " with ulimit -n, or with LimitNOFILE= in the systemd unit"
    )


def test_a_limit_without_room_for_any_connection_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    with pytest.raises(SystemRefused, match="of 100 file descriptors is too low for --workers 50"):
        short_of(1, Shares(50), 10)


def test_what_is_in_use_is_counted() -> None:
    before = descriptors.in_use()
    with open(os.devnull), open(os.devnull):
        assert descriptors.in_use() == before + 2


def test_what_is_in_use_is_guessed_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert descriptors.in_use() == OF_A_PROGRAM


def test_a_spare_descriptor_is_given_up_and_taken_again() -> None:
    spare, before = Spare(), descriptors.in_use()
    assert spare.refill()
    assert descriptors.in_use() == before + 1
    assert [spare.give(), spare.give()] == [True, False]
    assert descriptors.in_use() == before
    assert spare.refill()
    assert spare.give()


def test_spare_descriptors_that_cannot_be_taken_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spare = Spare()
    monkeypatch.setattr(os, "devnull", "/no/such/file")
    assert not spare.refill()
    assert not spare.give()
