"""How a limit of descriptors is divided."""

from __future__ import annotations

import os
import resource
import sys

import pytest

from sharded_milter import descriptors
from sharded_milter.descriptors import (
    PROGRAM_FDS,
    ReservedDescriptor,
    Shares,
    connections_warning,
    needed_limit,
)
from sharded_milter.errors import SystemRefused

LIMITS = (60, 100, 256, 1024, 4096, 20_000, 1_048_576)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_has_its_share_of_a_limit(limit: int, workers: int) -> None:
    shares = Shares(workers, limit)
    assert 0 < shares.connections < shares.memory < limit
    assert shares.memory - shares.connections == limit // 8
    # Above the last threshold: successors of all workers, the start of one, refused connections.
    assert limit - shares.memory >= 3 * workers + 6 + shares.refused
    assert 1 <= shares.refused <= 16


@pytest.mark.parametrize("workers", [0, 1, 8, 500])
@pytest.mark.parametrize("connections", [1, 10, 1000, 100_000])
def test_what_is_needed_is_enough_and_not_too_much(connections: int, workers: int) -> None:
    limit = needed_limit(connections, workers)
    assert Shares(workers, limit).room(PROGRAM_FDS) >= connections
    assert Shares(workers, limit - 2).room(PROGRAM_FDS) < connections


def test_the_limit_is_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    assert Shares(1).memory == Shares(1, 100).memory
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 200))
    assert Shares(1).memory == Shares(1, 200).memory
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert Shares(1).memory == Shares(1, sys.maxsize).memory


def test_the_limit_is_raised_and_the_old_one_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: told.append(limits))
    assert descriptors.raise_limit() == 100
    assert told == [(200, 200)]


def test_fewer_connections_than_asked_for_are_said_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    shares = Shares(2)
    room = shares.room(10)
    assert connections_warning(room, shares, 10) == ""
    assert connections_warning(20_000, shares, 10) == (
        f"about {room:,} MTA connections can be served at a time, not 20,000"
        " (--max-connections), because of the limit of 1,024 file descriptors; raise it"
        " with ulimit -n, or with LimitNOFILE= in the systemd unit"
    )


def test_a_limit_without_room_for_any_connection_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    with pytest.raises(SystemRefused, match="of 100 file descriptors is too low for --workers 50"):
        connections_warning(1, Shares(50), 10)


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
    assert descriptors.in_use() == PROGRAM_FDS


def test_a_reserved_descriptor_is_released_and_opened_again() -> None:
    reserved, before = ReservedDescriptor(), descriptors.in_use()
    assert reserved.refill()
    assert descriptors.in_use() == before + 1
    assert [reserved.release(), reserved.release()] == [True, False]
    assert descriptors.in_use() == before
    assert reserved.refill()
    assert reserved.release()


def test_a_reserved_descriptor_that_cannot_be_opened_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reserved = ReservedDescriptor()
    monkeypatch.setattr(os, "devnull", "/no/such/file")
    assert not reserved.refill()
    assert not reserved.release()
