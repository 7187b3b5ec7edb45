"""The bytes of a connection count exactly as long as they are held."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from one_mta import (
    ABORT,
    AT_THE_END,
    CLIENT,
    CONTINUE,
    DATA,
    EOH,
    EOM,
    EVERYTHING,
    HELO,
    MAIL,
    QUIT,
    QUIT_NC,
    RCPT,
    Mta,
    Transport,
    at_the_end,
    lines,
    packed,
)
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.dispatch.policy import BUSY, NO_ROOM
from sharded_milter.errors import WorkerLost
from sharded_milter.mta.connection import CLOSE_GRACE, CONNECTION_COST, MAX_BUSY, MAX_UNREAD
from sharded_milter.mta.conversation import SMALL_PART
from sharded_milter.mta.outbox import SLICE
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.packets import Packet

LIMIT = 1_000_000
CHUNK = packed(commands.Body(b"x" * 65_535))
LARGE_ANSWER = [*[replies.ReplaceBody(b"y" * 60_000)] * 5, replies.Accept()]


class Deaf(Transport):
    """A socket that takes nothing while the MTA is deaf, then what the MTA `reads`."""

    connected = True
    dataBuffer = b""
    _tempDataBuffer = b""

    def __init__(self) -> None:
        super().__init__()
        self.deaf = False

    def writeSomeData(self, data: bytes) -> int:
        if self.deaf:
            return 0
        self.writes.append(data)
        return len(data)

    def write(self, data: bytes) -> None:
        assert len(self.dataBuffer) + len(data) <= SLICE
        self.dataBuffer += data

    def registerProducer(self, producer: object, streaming: bool) -> None:
        assert not streaming
        self.producer = producer
        producer.resumeProducing()  # type: ignore[attr-defined]

    def unregisterProducer(self) -> None:
        self.producer = None

    def reads(self) -> None:
        """The MTA reads what the transport has."""
        self.writes.append(self.dataBuffer)
        self.dataBuffer = b""
        if self.producer is not None:
            self.producer.resumeProducing()


class SlowMta(Mta):
    """An MTA that reads or does not; jobs that are answered let go, as the dispatcher's do."""

    def answer(self, *packets: Packet) -> None:
        job = self.pool.jobs.pop()
        job.free()
        self.pool.answer(job, packed(*packets))

    def __init__(
        self, *conversation: Packet, manifest: Manifest = AT_THE_END, **limits: Any
    ) -> None:
        super().__init__(manifest=manifest, offer=None, **limits)
        self.connect()
        for command in conversation:
            self.say(command)

    def connect(self) -> None:
        self.socket = self.transport = Deaf()
        self.connection = type(self.connection)(self)
        self.connection.makeConnection(self.transport)  # type: ignore[no-untyped-call]
        self.say(commands.Negotiate(6, 0x1FF, 0x1FFFFF))
        self.written()


MESSAGE = [MAIL, RCPT, DATA, EOH]


def slow(*conversation: Packet, **limits: Any) -> SlowMta:
    mta = SlowMta(CLIENT, HELO, **limits)
    mta.socket.deaf = True
    for command in conversation:
        mta.say(command)
    return mta


# Answers that are not read


def test_what_an_mta_has_not_read_counts_until_it_has() -> None:
    mta = slow(*MESSAGE, EOM)
    mta.answer(*LARGE_ANSWER)
    size = len(packed(*LARGE_ANSWER))
    for left in (size, size - SLICE, size - 2 * SLICE):
        assert mta.inflight.used == CONNECTION_COST + left
        mta.socket.reads()
    assert mta.inflight.used == 0
    assert b"".join(mta.written()) == packed(*LARGE_ANSWER)


def test_an_mta_that_reads_nothing_is_aborted_after_the_grace_and_all_is_freed() -> None:
    mta = slow(*MESSAGE, EOM)
    mta.answer(*LARGE_ANSWER)
    mta.reactor.advance(CLOSE_GRACE - 1.0)
    assert not mta.aborted
    with capturedLogs() as events:
        mta.reactor.advance(1.0)
    assert mta.aborted
    size = len(packed(*LARGE_ANSWER))
    assert lines(events, LogLevel.warn) == [
        f"closing a connection: the MTA has read nothing for 30 s; {size} bytes wait"
    ]
    mta.hang_up()
    assert mta.inflight.used == 0


def test_more_answers_are_no_sign_that_it_reads() -> None:
    mta = slow(*MESSAGE, EOM)
    mta.answer(*LARGE_ANSWER)
    mta.reactor.advance(CLOSE_GRACE - 1.0)
    mta.say(*MESSAGE, EOM)
    mta.answer(CONTINUE)
    mta.reactor.advance(1.0)
    assert mta.aborted


def test_a_refused_connection_has_the_grace_once_however_it_reads() -> None:
    mta = slow(max_connections=1)  # the fixture has another connection
    assert mta.connection._conversation.is_refused
    for _ in range(3):
        mta.reactor.advance(CLOSE_GRACE / 3)
        mta.say(MAIL)
        mta.socket.reads()
    assert mta.aborted or mta.closed


def test_the_grace_begins_anew_whenever_it_reads() -> None:
    mta = slow(*MESSAGE, EOM)
    mta.answer(*LARGE_ANSWER)
    for _ in range(3):
        mta.reactor.advance(CLOSE_GRACE - 1.0)
        mta.socket.reads()
    mta.reactor.advance(CLOSE_GRACE)
    assert not mta.aborted


def test_but_not_beyond_the_time_of_an_idle_mta() -> None:
    mta = slow(*MESSAGE, EOM, idle_timeout=50.0)
    mta.answer(*LARGE_ANSWER)
    mta.reactor.advance(25.0)
    mta.socket.reads()
    mta.reactor.advance(25.0)
    assert mta.aborted


def test_a_connection_that_ends_gets_what_was_answered_first() -> None:
    mta = slow(*MESSAGE, EOM)
    mta.answer(*LARGE_ANSWER)
    mta.say(QUIT)
    assert mta.closed
    while mta.socket.producer is not None:
        mta.socket.reads()
    assert b"".join(mta.written()) == packed(*LARGE_ANSWER)


def test_it_is_not_read_while_it_does_not_read() -> None:
    mta = slow(*MESSAGE, EOM)
    mta.answer(*LARGE_ANSWER)
    assert mta.paused
    for _ in range(2):
        mta.socket.reads()
    assert len(mta.socket.dataBuffer) <= MAX_UNREAD
    assert not mta.paused


def test_an_answer_for_which_there_is_no_room_is_a_452() -> None:
    mta = slow(*MESSAGE, EOM, max_inflight_bytes=200_000)
    mta.socket.deaf = False
    with capturedLogs() as events:
        mta.answer(*LARGE_ANSWER)
    assert mta.written() == [NO_ROOM]
    size = len(packed(*LARGE_ANSWER))
    assert f"no room for an answer of {size} bytes" in lines(events, LogLevel.warn)[0]
    assert mta.inflight.used == 0


def test_an_answer_takes_the_room_of_its_message() -> None:
    mta = at_the_end(*MESSAGE, *[commands.Body(b"x" * 60_000)] * 5, EOM, max_inflight_bytes=330_000)
    mta.answer(*LARGE_ANSWER)
    assert mta.written() == [packed(*LARGE_ANSWER)]


def test_an_answer_that_waits_for_another_milter_counts_and_may_be_refused() -> None:
    manifests = [Manifest(name, AT_THE_END.actions, AT_THE_END.protocol) for name in "ab"]
    mta = at_the_end(*MESSAGE, EOM, manifests=manifests, max_inflight_bytes=400_000)
    before, size = mta.inflight.used, len(packed(*LARGE_ANSWER))
    mta.pool.answer(mta.pool.jobs[0], packed(*LARGE_ANSWER))
    assert mta.inflight.used == before + size
    mta.say(ABORT)
    mta.pool.jobs.clear()
    mta.pool.cancelled.clear()
    assert mta.inflight.used == 0
    mta.say(*MESSAGE, commands.Body(b"x" * 200_000), EOM)
    assert mta.written() == []
    mta.pool.answer(mta.pool.jobs[-1], packed(*LARGE_ANSWER))
    assert mta.written() == [NO_ROOM]


# What is not complete, and what waits


def test_a_half_packet_counts() -> None:
    mta = at_the_end()
    mta.connection.dataReceived(packed(*MESSAGE) + CHUNK[:60_000])
    message = len(packed(*MESSAGE))
    used = mta.inflight.used
    assert CONNECTION_COST + message + 60_000 <= used < CONNECTION_COST + message + 60_100
    mta.hang_up()
    assert mta.inflight.used == 0


@pytest.mark.parametrize(
    "cut", [CHUNK, packed(commands.Header("X", "y" * 65_000)), packed(commands.Eom(b"x" * 65_000))]
)
def test_where_there_is_no_room_a_half_packet_is_cut_short_and_its_message_refused(
    cut: bytes,
) -> None:
    mta = at_the_end(max_inflight_bytes=50_000)
    mta.connection.dataReceived(packed(*MESSAGE[:3]) + cut[:40_000])
    assert mta.inflight.used > 40_000
    mta.connection.dataReceived(cut[40_000:60_000])
    assert mta.inflight.used == 0
    mta.connection.dataReceived(cut[60_000:])
    if cut[4:5] != b"E":
        mta.say(EOM)
    assert mta.written() == [NO_ROOM]
    assert mta.inflight.used == 0
    mta.say(*MESSAGE, EOM)
    assert len(mta.pool.jobs) == 1


def test_all_who_are_half_way_at_the_limit_come_to_an_end() -> None:
    """Each is finished or refused, and what is refused makes room."""
    mta = at_the_end(max_inflight_bytes=300_000)
    connections = []
    for _ in range(8):
        one = type(mta.connection)(mta)
        transport = Transport()
        one.makeConnection(transport)  # type: ignore[no-untyped-call]
        one.dataReceived(packed(commands.Negotiate(6, 0x1FF, 0x1FFFFF), CLIENT, HELO, *MESSAGE))
        one.dataReceived(CHUNK[:40_000])
        connections.append((one, transport))
    for part in (CHUNK[40_000:], CHUNK, packed(EOM)):
        for one, _ in connections:
            one.dataReceived(part)
    while mta.pool.jobs:
        mta.pool.answer(mta.pool.jobs.pop(), packed(CONTINUE))
    verdicts = [transport.writes[-1] for _, transport in connections]
    assert set(verdicts) == {NO_ROOM, packed(CONTINUE)}
    assert mta.inflight.used == 0


def test_what_waits_behind_a_question_counts_and_ends_the_connection_at_the_limit() -> None:
    mta = at_the_end(*MESSAGE, EOM, max_inflight_bytes=50_000)
    mta.say(*MESSAGE, commands.Body(b"x" * 30_000))
    assert mta.inflight.used > CONNECTION_COST + 30_000
    mta.say(commands.Body(b"x" * 30_000))
    assert mta.written() == [NO_ROOM]
    assert mta.closed
    assert mta.pool.cancelled == mta.pool.jobs
    assert mta.inflight.used == 0


def test_a_client_without_room_for_its_first_packets_gets_451() -> None:
    full = at_the_end(max_inflight_bytes=10_000)
    with capturedLogs() as events:
        for stage in "CH":
            full.say(commands.Macro(stage, (("x", "y" * 5_000),)))
    assert len(lines(events, LogLevel.warn)) == 1
    full.say(*MESSAGE, EOM)
    assert full.written() == [BUSY]
    assert full.pool.jobs == []
    full.say(QUIT_NC, CLIENT, *MESSAGE, EOM)
    assert len(full.pool.jobs) == 1


def test_a_long_beginning_counts_while_the_client_is_there() -> None:
    mta = at_the_end()
    assert mta.inflight.used == 0
    mta.say(commands.Macro("H", (("x", "y" * 5_000),)))
    assert 5_000 < mta.inflight.used < 12_000
    mta.say(commands.Macro("H"))
    assert mta.inflight.used == 0


# A turn of the reactor


def test_one_mta_takes_no_more_than_its_share_of_a_reactor_iteration() -> None:
    mta = Mta(CLIENT, manifest=AT_THE_END)
    ticks = iter(range(10**6))
    clock = mta.reactor
    clock.seconds = lambda: MAX_BUSY * next(ticks) / 10
    mta.say(*[HELO] * 100)
    assert mta.connection._framer.waiting > 80 * len(packed(HELO))
    assert mta.paused
    clock.advance(0)
    assert mta.connection._framer.waiting == 0
    assert not mta.paused


def test_quit_while_commands_wait_for_the_next_iteration_frees_all() -> None:
    mta = Mta(CLIENT, manifest=AT_THE_END)
    ticks = iter(range(10**6))
    mta.reactor.seconds = lambda: MAX_BUSY * next(ticks)
    mta.say(*[HELO] * 100)
    assert mta.inflight.used > 0
    mta.hang_up()
    assert mta.inflight.used == 0
    mta.reactor.advance(0)


# Whatever happens


class Account(RuleBasedStateMachine):
    """Messages in pieces, answers read or not, all ends of connections: the count is what is."""

    @initialize(limit=st.sampled_from([60_000, 200_000, LIMIT]), objects=st.booleans())
    def begin(self, limit: int, objects: bool) -> None:
        manifest = EVERYTHING if objects else AT_THE_END
        self.mta = SlowMta(manifest=manifest, max_inflight_bytes=limit)
        self.limit = limit

    @rule(
        packets=st.lists(
            st.sampled_from([CLIENT, HELO, MAIL, RCPT, DATA, EOH, EOM, ABORT, QUIT_NC]), max_size=6
        )
    )
    def commands(self, packets: list[Packet]) -> None:
        self.mta.say(*packets)

    @rule(size=st.sampled_from([0, 100, 5_000, 50_000]), chunks=st.integers(1, 4))
    def a_message(self, size: int, chunks: int) -> None:
        body = [commands.Body(b"x" * size)] * chunks
        self.mta.say(CLIENT, MAIL, RCPT, EOH, *body)

    @rule(size=st.integers(1, 65_000))
    def half_a_packet(self, size: int) -> None:
        self.mta.say(CLIENT, MAIL, RCPT, EOH)
        self.mta.connection.dataReceived(CHUNK[:size])

    @rule(size=st.sampled_from([0, 3_000, 16_000]))
    def macros(self, size: int) -> None:
        self.mta.say(*[commands.Macro(stage, (("x", "y" * size),)) for stage in "CHMRE"])

    @precondition(lambda self: self.mta.pool.jobs)
    @rule(large=st.booleans())
    def an_answer(self, large: bool) -> None:
        job = self.mta.pool.jobs.pop()
        job.free()
        large = large and job.stage is not None and job.stage.word == "eom"
        self.mta.pool.answer(job, packed(*LARGE_ANSWER) if large else packed(CONTINUE))

    @precondition(lambda self: self.mta.pool.jobs)
    @rule()
    def a_failure(self) -> None:
        self.mta.pool.answer(self.mta.pool.jobs.pop(), WorkerLost("died"))

    @rule(deaf=st.booleans())
    def the_mta_reads_or_does_not(self, deaf: bool) -> None:
        self.mta.socket.deaf = deaf
        self.mta.socket.reads()

    @rule(seconds=st.sampled_from([0.0, 1.0, CLOSE_GRACE]))
    def time_passes(self, seconds: float) -> None:
        self.mta.reactor.advance(seconds)

    @rule(how=st.sampled_from(["lost", "quit", "stop"]))
    def the_end(self, how: str) -> None:
        if how == "quit":
            self.mta.say(QUIT)
        elif how == "stop":
            self.mta.connection.finish()
        self.mta.hang_up()
        self.mta.pool.jobs.clear()
        self.mta.pool.cancelled.clear()
        assert self.mta.inflight.used == 0
        self.mta.connect()

    @invariant()
    def no_more_is_counted_than_is_held_nor_less(self) -> None:
        connection = self.mta.connection
        transcript = connection._conversation.transcript
        held = len(connection._framer.buffer) + transcript.size + connection._outbox.unread
        assert held <= self.mta.inflight.used <= 2 * held + CONNECTION_COST + 80_000
        # A read, and an answer that fitted, are all that may come above the limit.
        assert self.mta.inflight.used <= self.limit + CONNECTION_COST + 300_000 + SMALL_PART

    def teardown(self) -> None:
        self.mta.hang_up()
        self.mta.pool.jobs.clear()
        self.mta.pool.cancelled.clear()
        assert self.mta.inflight.used == 0


def test_the_account_is_even_in_the_end_whatever_happened() -> None:
    gc.disable()  # each claim goes with what it counts, not some time later
    try:
        run(
            Account,
            settings=settings(
                max_examples=60,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        gc.enable()
