"""The server: from the first READY to the last QUIT."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest
from armed import armed
from one_mta import Transport, packed
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.policy import BUSY, STOPPING, Policy
from sharded_milter.errors import MilterLoadError
from sharded_milter.limits import Limits
from sharded_milter.mta.connection import MilterConnection
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, Manifest
from sharded_milter.server import FLUSH_GRACE, Server

MANIFEST = Manifest("test")
BEGIN = [
    commands.Negotiate(6, KNOWN_ACTIONS, KNOWN_PROTOCOL),
    commands.Connect("client", "U"),
]


class FakeListener:
    """Notes what it is told."""

    def __init__(self, told: list[str], refusal: Exception | None = None) -> None:
        self.told = told
        self.refusal = refusal
        self.factory: Any = None

    def serve(self, factory: Any, gate: Any, reactor: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.told.append("serve")
        self.factory = factory

    def close(self) -> None:
        self.told.append("close")


class FakePool:
    """Starts and stops when the test says so."""

    def __init__(self, told: list[str]) -> None:
        self.told = told
        self.manifests: tuple[Manifest, ...] = ()
        self.socket = "unix:/script"
        self.started: Deferred[tuple[Manifest, ...]] = Deferred()
        self.stopped: Deferred[None] = Deferred()

    def start(self) -> Deferred[tuple[Manifest, ...]]:
        return self.started

    def stop(self) -> Deferred[None]:
        self.told.append("stop workers")
        return self.stopped

    def dump_stacks(self) -> None:
        self.told.append("dump stacks")


class FakeDispatcher:
    """Answers nothing."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter(retries=2, deadlines=1)
        self.queued = 3
        self.jobs: list[Job] = []
        self.parting: Deferred[Any] = succeed(None)

    def submit(self, job: Job) -> Deferred[bytes]:
        self.jobs.append(job)
        job.answer = Deferred()
        return job.answer

    def answer(self, answer: bytes) -> None:
        """The first job is answered."""
        awaited = self.jobs[0].answer
        assert awaited is not None
        awaited.callback(answer)

    def cancel(self, job: Job) -> None:
        self.jobs.remove(job)

    def when_sessions_ended(self) -> Deferred[Any]:
        return self.parting


class House:
    """A server with all that it stands on faked."""

    def __init__(
        self,
        *,
        ready: bool = True,
        refusal: Exception | None = None,
        late: bool = False,
        **limits: Any,
    ):
        self.told: list[str] = []
        self.clock = Clock()
        self.pool = cast("Any", FakePool(self.told))
        self.dispatcher = cast("Any", FakeDispatcher())
        self.listener = cast("Any", FakeListener(self.told, refusal))
        self.server = Server(
            *([] if late else [self.listener], self.pool, self.dispatcher, Limits(**limits)),
            *(Policy(), cast("Any", self.clock)),
            bind=self._bind,
        )
        self.outcome: list[Any] = []
        self.server.start().addCallbacks(
            self.outcome.append, lambda f: self.outcome.append(f.value)
        )
        if ready:
            self.pool.manifests = (MANIFEST,)
            self.pool.started.callback((MANIFEST,))

    def _bind(self, socket: str) -> list[Any]:
        self.told.append(f"bind {socket}")
        return [self.listener]

    def mta(self) -> tuple[MilterConnection, Transport]:
        connection = self.listener.factory.buildProtocol(None)
        transport = Transport()
        connection.makeConnection(transport)
        return connection, transport

    def busy_mta(self) -> tuple[MilterConnection, Transport]:
        """One that waits for the answer of a milter."""
        connection, transport = self.mta()
        connection.dataReceived(packed(*BEGIN))
        transport.writes.clear()
        return connection, transport


def test_mtas_are_served_when_the_workers_are_ready_and_not_before() -> None:
    house = House(ready=False)
    assert house.told == []
    house.pool.manifests = (MANIFEST,)
    house.pool.started.callback((MANIFEST,))
    assert house.told == ["serve"]
    assert house.outcome == [None]
    assert [member.manifest for member in house.server.members] == [MANIFEST]


def test_new_connections_have_the_milters_that_a_reload_brought() -> None:
    house = House()
    before = house.server.members
    assert house.server.members is before
    house.pool.manifests = (MANIFEST, Manifest("other"))
    assert [member.manifest.name for member in house.server.members] == ["test", "other"]


def test_workers_that_cannot_start_end_the_start() -> None:
    house = House(ready=False)
    error = MilterLoadError("milter x: no")
    house.pool.started.errback(error)
    assert house.outcome == [error]
    assert house.told == []


def test_a_scripts_socket_is_bound_when_the_workers_have_named_it() -> None:
    house = House(ready=False, late=True)
    assert house.told == []
    house.pool.started.callback((MANIFEST,))
    assert house.told == ["bind unix:/script", "serve"]
    house.server.stop()
    assert "close" in house.told


def test_a_server_that_stops_binds_no_socket_any_more() -> None:
    house = House(ready=False, late=True)
    house.server.stop()
    house.pool.started.callback((MANIFEST,))
    assert house.told == ["stop workers"]


def test_a_socket_that_was_taken_meanwhile_ends_the_start() -> None:
    error = MilterLoadError("taken")
    assert House(refusal=error).outcome == [error]


def test_without_connections_the_workers_are_stopped_at_once() -> None:
    house = House()
    stopped = house.server.stop()
    assert house.told == ["serve", "close", "stop workers"]
    assert not stopped.called
    house.pool.stopped.callback(None)
    assert stopped.called
    assert armed(house.clock) == []


def test_before_the_workers_are_ready_a_stop_waits_for_no_connection() -> None:
    house = House(ready=False)
    with capturedLogs() as events:
        house.server.stop()
    assert house.told == ["close", "stop workers"]
    assert list(events) == []


def test_sessions_may_reach_their_end() -> None:
    house = House(graceful_timeout=30.0)
    connection, transport = house.busy_mta()
    house.server.stop()
    house.clock.advance(29.0)
    house.dispatcher.answer(packed(replies.Continue()))
    assert transport.writes == [packed(replies.Continue())]
    assert house.told == ["serve", "close"]
    connection.connectionLost()
    assert house.told == ["serve", "close", "stop workers"]
    house.pool.stopped.callback(None)
    assert armed(house.clock) == []


def test_after_the_grace_pending_questions_are_answered_and_connections_closed() -> None:
    house = House(graceful_timeout=30.0)
    _, transport = house.busy_mta()
    _, idle = house.mta()
    house.server.stop()
    house.clock.advance(30.0)
    assert transport.writes == [STOPPING]
    assert idle.writes == []
    assert transport.disconnecting
    assert idle.disconnecting
    assert house.dispatcher.jobs == []
    assert not transport.aborted


def test_who_does_not_read_the_last_answer_is_cut_off() -> None:
    house = House(graceful_timeout=30.0)
    connection, transport = house.busy_mta()
    house.server.stop()
    house.clock.advance(30.0)
    house.clock.advance(FLUSH_GRACE)
    assert transport.aborted
    connection.connectionLost()
    assert house.told == ["serve", "close", "stop workers"]


@pytest.mark.parametrize("first", [False, True])
def test_a_quick_stop_waits_for_no_session(first: bool) -> None:
    house = House(graceful_timeout=30.0)
    _, transport = house.busy_mta()
    if not first:
        house.server.stop()
        house.clock.advance(10.0)
    stopped = house.server.stop(quick=True)
    house.clock.advance(0)
    assert transport.writes == [STOPPING]
    assert stopped is house.server.stop(quick=True)
    assert house.told == ["serve", "close"]


def test_quick_stops_are_the_same_stop_at_any_time() -> None:
    house = House()
    connection, transport = house.busy_mta()
    for _ in range(3):
        house.server.stop(quick=True)
        house.clock.advance(0.5)
    assert transport.writes == [STOPPING]
    connection.connectionLost()
    house.server.stop(quick=True)
    assert house.told == ["serve", "close", "stop workers"]


def test_one_connection_too_many_is_refused() -> None:
    house = House(max_connections=1)
    first, _ = house.mta()
    connection, transport = house.mta()
    connection.dataReceived(packed(*BEGIN))
    assert transport.writes[-1].endswith(BUSY)
    assert house.dispatcher.jobs == []
    assert house.dispatcher.counters["overload_connections"] == 1
    connection.connectionLost()
    first.connectionLost()
    house.busy_mta()
    assert len(house.dispatcher.jobs) == 1


def test_the_state_of_things_is_one_line() -> None:
    house = House()
    house.mta()
    with capturedLogs() as events:
        house.server.dump()
    assert [event["log_format"].format(**event) for event in events] == [
        "1 connections, 3 jobs queued, 0 bytes in flight; deadlines=1 retries=2"
    ]
    assert house.told == ["serve", "dump stacks"]


@pytest.mark.parametrize("ends", [True, False])
def test_the_workers_end_after_the_last_objects_but_not_for_ever(ends: bool) -> None:
    house = House()
    house.dispatcher.parting = Deferred()
    stopped = house.server.stop()
    assert "stop workers" not in house.told
    if ends:
        house.dispatcher.parting.callback(None)
    else:
        house.clock.advance(FLUSH_GRACE)
    assert "stop workers" in house.told
    assert not stopped.called
