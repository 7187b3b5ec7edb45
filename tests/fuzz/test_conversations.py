"""Random MTAs talk to the master's connection, random milters answer late, wrongly or not at all.

The law that is checked after every step: nothing is raised, whatever comes; every command that
waits for an answer gets one final reply, in order, unless the connection ends; nobody else gets
one; what is kept is bounded; a connection that is over says nothing more and leaves nothing.

`FUZZ_SECONDS=60 pytest tests/fuzz` goes on with other examples for so long.
"""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.testing import StringTransport
from twisted.logger import globalLogPublisher

from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.policy import CHOICES
from sharded_milter.errors import CallbackFailed, JobFailed, Overloaded, WorkerLost
from sharded_milter.mta.connection import MilterConnection
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Actions, Protocol

from . import packets
from .mta import FINAL, MODIFICATIONS, PROGRESS, REPLY_BEARING, Reader, packet
from .surroundings import LIMITS, Problems, RandomPool, Surroundings, size_of

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))

#: No generated packet is longer than this.
LARGEST_PACKET = 2500
#: The connection's part has five slots.
CONNECTION_PART = 5 * LARGEST_PACKET
#: Behind a refused recipient stands a mark of one packet without payload.
MARK = 5

#: Of many thousands: Twisted keeps the last 200 log events with the connections they are of,
#: Hypothesis its last example.
CONNECTIONS_KEPT = 300

SETTINGS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

ERRORS: list[Callable[[], JobFailed]] = [
    lambda: CallbackFailed("it raised"),
    lambda: WorkerLost("it died"),
    lambda: Overloaded("no room"),
]


class Conversation(RuleBasedStateMachine):
    """One MTA after the other on one clock; `due` are the commands that wait for an answer."""

    everything: ClassVar[weakref.WeakSet[MilterConnection]] = weakref.WeakSet()

    def __init__(self) -> None:
        super().__init__()
        self.problems = Problems()
        globalLogPublisher.addObserver(self.problems)

    def teardown(self) -> None:
        try:
            self._lose()
        finally:
            globalLogPublisher.removeObserver(self.problems)
        assert self.problems.events == []

    # A connection

    @initialize(
        protocol=st.sampled_from([0, 0x80080, 0xFF080]) | st.integers(0, 0x1FFFFF),
        actions=st.just(0x1FF) | st.integers(0, 0x1FF),
        on_error=st.sampled_from(CHOICES),
        inflight=st.sampled_from([LIMITS.max_inflight_bytes, 2000]),
        offer=packets.offers,
    )
    def begin(
        self, protocol: int, actions: int, on_error: str, inflight: int, offer: bytes
    ) -> None:
        manifest = Manifest("random", Actions(actions), Protocol(protocol))
        pool = RandomPool(self._asked, self._cancelled)
        self.context = Surroundings(manifest, on_error, inflight, pool)
        self.offer = packet("O", offer)
        self._connect()

    def _connect(self) -> None:
        self.due: deque[tuple[str, int]] = deque()  # each with the place of its end in what we fed
        self.fed = self.read = self.asked_at = 0
        self.negotiated: int | None = None
        self.postfix = False
        self.stopping = False
        self.unsent: deque[bytes] = deque()
        self.largest = 0
        self.heard = Reader()
        self.told = Reader()
        self.transport = StringTransport()
        self.connection = MilterConnection(self.context)
        self.everything.add(self.connection)
        self.connection.makeConnection(self.transport)  # type: ignore[no-untyped-call]
        self._say(self.offer, [])

    @property
    def over(self) -> bool:
        return bool(self.transport.disconnecting)

    def _lose(self) -> None:
        """The socket is gone: nothing of the connection stays."""
        self.connection.connectionLost()
        assert self.context.pool.open is None
        assert self.context.connections == []
        assert not self.context.idle._due
        assert not self.context.progress._due
        assert not self.context.closing._due
        assert self.context.inflight.used == 0

    # The MTA

    def _say(self, data: bytes, cuts: list[int]) -> None:
        for size in cuts:
            self.unsent.append(data[:size])
            data = data[size:]
        self.unsent.append(data)
        self._flush()

    def _flush(self) -> None:
        """Everything that may be sent is sent and what comes back is heard."""
        self._hear()
        while self.unsent and not self.over and self.transport.producerState == "producing":
            data = self.unsent.popleft()
            self.largest = max(self.largest, len(data))
            for letter, payload in self.told.read(data):
                self._expect(letter, payload)
            self.fed += len(data)
            self.connection.dataReceived(data)
            self._hear()

    def _expect(self, letter: str, payload: bytes) -> None:
        self.read += len(packet(letter, payload))
        if letter == "O" and self.negotiated is None:
            self.due.append(("O", self.read))
        elif letter in REPLY_BEARING and not (self.negotiated or 0) & REPLY_BEARING[letter]:
            self.due.append((letter, self.read))
        elif letter == "D" and payload == packets.POSTFIX:
            self.postfix = True

    def _asked(self, job: Job) -> None:
        self._hear()
        self.asked_at = self.fed - self.connection._framer.waiting
        assert size_of(job.message) <= LIMITS.max_message_size + MARK
        assert size_of(job.connection) <= CONNECTION_PART

    def _cancelled(self, job: Job) -> None:
        self._hear()
        cancelled = (job.letter.decode(), self.asked_at)
        if self.stopping:
            assert self.due[0] == cancelled
        else:  # the answers to what came before it in the segment may still come
            self.due.remove(cancelled)

    def _hear(self) -> None:
        data = bytes(self.transport.value())
        self.transport.clear()
        for letter, payload in self.heard.read(data):
            assert self.due, f"reply {letter!r} to nobody"
            command, _ = self.due[0]
            if letter in FINAL:
                assert command in FINAL[letter], f"reply {letter!r} to {command!r}"
                self.due.popleft()
                if payload.startswith(b"550 5.7.1 at "):
                    assert packet(letter, payload) == packets.signed(command)
                if letter == "O":
                    self.negotiated = int.from_bytes(payload[8:12], "big")
            elif letter == PROGRESS:
                assert command == "E" or self.postfix, f"progress at {command!r}"
            else:
                assert letter in MODIFICATIONS, f"unknown reply {letter!r}"
                assert command == "E", f"modification {letter!r} at {command!r}"
        assert self.heard.whole()
        assert not self.heard.broken

    # What happens

    @rule(data=packets.command("C") | packets.command("H") | packets.commands)
    def one_command(self, data: bytes) -> None:
        self._say(data, [])

    @rule(data=packets.conversations(), cuts=st.lists(st.integers(1, 200), max_size=6))
    def a_conversation(self, data: bytes, cuts: list[int]) -> None:
        self._say(data, cuts)

    @rule(data=packets.conversations(), size=st.integers(1, 9))
    def a_conversation_in_small_pieces(self, data: bytes, size: int) -> None:
        self._say(data, [size] * (len(data) // size))

    @rule(data=packets.mutations() | packets.noise, cuts=st.lists(st.integers(1, 5), max_size=3))
    def nonsense(self, data: bytes, cuts: list[int]) -> None:
        self._say(data, cuts)

    @rule(data=packets.command("A") | packets.command("Q") | packets.command("K"))
    def a_farewell(self, data: bytes) -> None:
        self._say(data, [])

    @precondition(lambda self: self.context.pool.open is not None)
    @rule(answer=packets.answers)
    def an_answer(self, answer: bytes) -> None:
        self.context.pool.answer(answer)
        self._flush()

    @precondition(lambda self: self.context.pool.open is not None)
    @rule(answer=packets.intermediate, accept=st.sampled_from("ca"))
    def a_modification(self, answer: bytes, accept: str) -> None:
        self.context.pool.answer(answer + packet(accept))
        self._flush()

    @precondition(lambda self: self.context.pool.open is not None)
    @rule(error=st.sampled_from(ERRORS))
    def a_failure(self, error: Callable[[], JobFailed]) -> None:
        self.context.pool.answer(error())
        self._flush()

    @rule(answers=st.lists(packets.answers | st.sampled_from(ERRORS), max_size=8))
    def the_next_answers_come_at_once(self, answers: list[bytes | Callable[[], JobFailed]]) -> None:
        prompt = self.context.pool.prompt
        prompt.extend(said if isinstance(said, bytes) else said() for said in answers)

    @precondition(lambda self: self.context.pool.open is not None)
    @rule(farewell=st.sampled_from("AQK"), cuts=st.lists(st.integers(1, 5), max_size=2))
    def a_farewell_behind_a_question(self, farewell: str, cuts: list[int]) -> None:
        self._say(packet(farewell), cuts)

    @rule(read=st.booleans())
    def the_mta_reads_or_does_not(self, read: bool) -> None:
        """As the transport says it: what it has buffered is more than it likes."""
        if not self.over:
            connection = self.connection
            connection.resumeProducing() if read else connection.pauseProducing()
            self._flush()

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 30.0, 601.0]))
    def time_passes(self, seconds: float) -> None:
        self.context.reactor.advance(seconds)
        self._flush()

    @rule()
    def the_mta_is_lost(self) -> None:
        self._lose()
        self._connect()

    @rule()
    def the_service_stops(self) -> None:
        answers = 0 if self.context.pool.open is None else 1
        count = len(self.due)
        self.stopping = True
        self.connection.finish()
        self._hear()
        assert self.over
        assert len(self.due) == count - answers

    # The law

    @invariant()
    def every_command_is_answered(self) -> None:
        if not self.over and self.context.pool.open is None:
            assert not self.due, f"no answer to {self.due}"
            assert not self.told.broken

    @invariant()
    def memory_is_bounded(self) -> None:
        connection = self.connection
        transcript = connection._conversation.transcript
        assert transcript.size <= LIMITS.max_message_size + MARK
        assert len(transcript.connection_part()) <= CONNECTION_PART
        assert self.context.inflight.used >= transcript.size
        if connection._conversation.pending is not None:
            assert connection._framer.waiting <= LIMITS.max_waiting + 2 * self.largest

    @invariant()
    def after_its_end_a_connection_is_silent(self) -> None:
        if self.over:
            self.context.reactor.advance(2 * LIMITS.progress_interval)
            assert self.transport.value() == b""
            self._lose()
            self._connect()


def test_conversations() -> None:
    """A few seconds with the same examples everywhere; FUZZ_SECONDS more with new ones."""
    run_state_machine_as_test(Conversation, settings=SETTINGS)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        run_state_machine_as_test(Conversation, settings=settings(SETTINGS, derandomize=False))
        gc.collect()
        assert len(Conversation.everything) <= CONNECTIONS_KEPT, "connections outlive their sockets"
