"""A load client: the MTA's side of many connections in one process, with precomputed packets.

It sends only what was negotiated, waits only for what was promised and does what the answers say.
As Postfix does, it writes what needs no answer together with the next command that does; or, as
Sendmail does, every packet by itself, with Nagle's algorithm on. Its own CPU time is reported,
because on a small machine it competes with what it measures. It is one file, because whoever
reads a figure of it must be able to read all that has made the figure.
"""

from __future__ import annotations

import select
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field

from sharded_milter.errors import ConfigError
from sharded_milter.protocol import commands
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import LEGAL
from sharded_milter.protocol.stages import STAGES, Protocol, Stage
from sharded_milter.protocol.wire import LETTER, PAYLOAD, Framer
from sharded_milter.testing.dialogue import OFFER, exchanges, greeting, transaction
from sharded_milter.testing.generated import generated

# The final replies. One in the milter's own words is a rejection or a failure by its first digit.
WORDS = {"c": "continue", "a": "accept", "r": "reject", "t": "tempfail", "d": "discard",
         "s": "skip"}  # fmt: skip
_IN_WORDS = {"4": "tempfail", "5": "reject"}
_REFUSALS = ("reject", "tempfail")

# Of a run that ends by the clock.
UNLIMITED = 10**9

# Longer than any answer in any bench takes; a milter that is stuck ends the bench.
PATIENCE = 120.0

# After its time a run waits so long for what is under way, or this many times the longest latency
# so far if that is more: what has not come by then most likely never does.
GRACE = 10.0
GRACE_BY_LATENCY = 2.0

# A run that ends by its number of messages has no time to begin with: it ends when nothing has been
# answered for so long.
SILENCE = PATIENCE

# How often at least `heard` is called, for a progress bar.
TICK = 0.1

_RECEIVE = 65_536


@dataclass
class Result:
    """What a run measured; times in seconds."""

    seconds: float
    latencies: list[float] = field(repr=False)
    verdicts: dict[str, int]
    client_cpu: float = 0.0
    #: How long all connections together have waited for answers, by stage.
    waits: dict[Stage, float] = field(default_factory=dict)
    #: Messages that had no verdict when the run stopped to wait for it.
    unanswered: int = 0

    @property
    def messages(self) -> int:
        """How many were answered."""
        return len(self.latencies)

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.messages / self.seconds

    def percentile(self, share: float) -> float:
        """The latency that this share of the messages did not exceed."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def connect(address: str) -> socket.socket:
    """A socket to a path or to HOST:PORT."""
    if address.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            raise
    else:
        host, _, port = address.rpartition(":")
        sock = socket.create_connection((host, int(port)))
    sock.settimeout(PATIENCE)
    return sock


@dataclass(frozen=True, slots=True)
class _Script:
    """What is written for one message: until the first answer, until the second, and so on."""

    writes: list[list[bytes]]
    stages: list[Stage]  # that are answered
    recipients: int


class _Traffic:
    """What the connections of a run share: the messages, and what has been learnt and measured.

    Milters repeat themselves, so what an answer means is parsed once for all connections: `known`
    has the word for every answer that came in one piece before.
    """

    def __init__(self, content: Sequence[Sequence[Packet]], messages: int, glued: bool) -> None:
        self.glued = glued
        self.left = messages
        self.known: dict[bytes, str] = {}
        self.waits: defaultdict[Stage, float] = defaultdict(float)
        self._content = content
        self._scripts: dict[Protocol, list[_Script]] = {}
        self._begun = 0

    def prepare(self, protocol: Protocol) -> None:
        """Makes the packets, so that this costs no time of the run."""
        if protocol not in self._scripts:
            self._scripts[protocol] = [self._script(packets, protocol) for packets in self._content]

    def _script(self, packets: Sequence[Packet], protocol: Protocol) -> _Script:
        groups, _ = exchanges(packets, protocol)
        stages = [STAGES[group[-1][LETTER]] for group in groups]
        if self.glued:  # as Postfix begins each message; Sendmail only says it when one is dropped
            groups[0].insert(0, commands.Abort().encode())
        recipients = sum(isinstance(packet, commands.Rcpt) for packet in packets)
        return _Script([self.writes(group) for group in groups], stages, recipients)

    def writes(self, group: list[bytes]) -> list[bytes]:
        """A group of packets as it is given to the socket."""
        return [b"".join(group)] if self.glued else group

    def next(self, protocol: Protocol) -> _Script:
        """The next message: all in turn, and again from the first."""
        self.left -= 1
        self._begun += 1
        return self._scripts[protocol][(self._begun - 1) % len(self._content)]


class _Connection:
    """One MTA connection, which sends message after message."""

    def __init__(self, address: str, traffic: _Traffic) -> None:
        self.socket = connect(address)
        self.began = 0.0
        self._traffic = traffic
        self._framer = Framer()
        self._unframed = 0  # bytes of a packet that is not complete yet
        self._asked = 0.0
        self._at = 0
        self._refused = 0  # recipients

    def open(self) -> None:
        """Negotiates and greets.

        Raises ConfigError where the milter wants nothing to do with the client.
        """
        self._send([OFFER.encode()])
        (answer,) = self._framer.receive(self.socket.recv(_RECEIVE))
        self._protocol = Protocol(commands.Negotiate.parse(answer[PAYLOAD:]).protocol)
        self._traffic.prepare(self._protocol)
        groups, lead = exchanges(greeting(), self._protocol)
        for group in groups:
            self._send(self._traffic.writes(group))
            while not (word := self._answer()):
                pass
            stage = STAGES[group[-1][LETTER]]
            self._traffic.waits[stage] += time.perf_counter() - self._asked
            if word != "continue":
                raise ConfigError(
                    f"the milter answers {stage.word} with {word}: no message would reach it"
                )
        self._lead = lead if self._traffic.glued else []
        if lead and not self._traffic.glued:
            self._send(lead)

    def _send(self, writes: list[bytes]) -> None:
        self._asked = time.perf_counter()
        for data in writes:
            self.socket.sendall(data)

    def begin(self) -> None:
        """Begins the next message."""
        self._script = self._traffic.next(self._protocol)
        self._at = self._refused = 0
        first = self._script.writes[0]
        if self._lead:  # what needed no answer at the start
            first, self._lead = [b"".join([*self._lead, *first])], []
        self._send(first)
        self.began = self._asked

    def receive(self) -> str:
        """Goes on where the milter answered; the word that ends the message, empty before."""
        word = self._answer()
        if not word:
            return ""
        stages = self._script.stages
        stage = stages[self._at]
        self._traffic.waits[stage] += time.perf_counter() - self._asked
        if stage is Stage.RCPT and word in _REFUSALS:
            self._refused += 1
            if self._refused == self._script.recipients:
                return word
        elif word not in ("continue", "skip"):
            return word
        self._at += 1
        while word == "skip" and self._at < len(stages) and stages[self._at] is stage:
            self._at += 1
        if self._at == len(stages):
            return word
        self._send(self._script.writes[self._at])
        return ""

    def _answer(self) -> str:
        """The word for the final reply that has arrived, empty before it is complete."""
        data = self.socket.recv(_RECEIVE)
        word = self._traffic.known.get(data) if not self._unframed else None
        return self._parse(data) if word is None else word

    def _parse(self, data: bytes) -> str:
        if not data:
            raise ConnectionError("the milter closed the connection")
        began_whole = not self._unframed
        packets = self._framer.receive(data)
        self._unframed += len(data) - sum(map(len, packets))
        finals = [packet for packet in packets if LEGAL[packet[LETTER]].final]
        if len(finals) > 1:
            raise ConnectionError(f"{len(finals)} answers to one command: {data[:80]!r}")
        word = _word(finals[0]) if finals else ""
        if began_whole and not self._unframed:
            self._traffic.known[data] = word
        return word


def _word(packet: bytes) -> str:
    return WORDS.get(chr(packet[LETTER])) or _IN_WORDS[chr(packet[PAYLOAD])]


def run(
    address: str,
    connections: int,
    messages: int,
    *,
    seconds: float = float("inf"),
    content: Sequence[Sequence[Packet]] = (),
    glued: bool = True,
    grace: float | None = None,
    heard: Callable[[float, int], object] = lambda seconds, answered: None,
    during: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Result:
    """So many messages over so many connections at the same time; none begins after `seconds`.

    What is under way then is waited for as GRACE says, or with `grace` in its place; without
    `seconds`, until nothing has been answered for SILENCE.

    `content` is what is said of each message; they are sent in turn, again and again. `heard` is
    told now and then how long it has taken so far and how many have been answered. `during` is
    entered when all are connected, for as long as messages are sent.
    """
    connections = min(connections, messages)
    content = content or [transaction(generated(number)) for number in range(connections)]
    traffic = _Traffic(content, messages, glued)
    with ExitStack() as stack:
        everyone = []
        for _ in range(connections):
            everyone.append(_Connection(address, traffic))
            stack.callback(everyone[-1].socket.close)
            everyone[-1].open()
        with during():
            cpu = time.process_time()
            wait = GRACE if grace is None else grace
            result = _Drive(everyone, traffic, seconds, wait).run(heard)
            result.client_cpu = time.process_time() - cpu
        return result


def run_for(
    address: str,
    connections: int,
    seconds: float,
    content: Sequence[Sequence[Packet]] = (),
    grace: float | None = None,
) -> Result:
    """As many messages as so many connections can send in that time, and one at least on each."""
    return run(address, connections, UNLIMITED, seconds=seconds, content=content, grace=grace)


class _Drive:
    """The part of a run that counts: from the first message to the last answer."""

    def __init__(
        self, everyone: Sequence[_Connection], traffic: _Traffic, seconds: float, grace: float
    ) -> None:
        self._busy = {connection.socket.fileno(): connection for connection in everyone}
        self._traffic = traffic
        self._seconds = seconds
        self._grace = grace
        self._latencies: list[float] = []
        self._longest = 0.0
        self._verdicts: Counter[str] = Counter()

    def run(self, heard: Callable[[float, int], object]) -> Result:
        with select.epoll() as poll:
            self._started = self._last = told = now = time.perf_counter()
            for descriptor, connection in self._busy.items():
                poll.register(descriptor, select.EPOLLIN)
                connection.begin()
            while self._busy and now < self._patient_until():
                for descriptor, _ in poll.poll(TICK):
                    if not self._goes_on(self._busy[descriptor]):
                        poll.unregister(descriptor)
                        del self._busy[descriptor]
                if (now := time.perf_counter()) - told >= TICK:
                    told = now
                    heard(now - self._started, len(self._latencies))
        spent = self._last - self._started
        if self._busy and self._seconds != float("inf"):
            spent = max(spent, self._seconds)  # but not the grace in which nothing came any more
        return Result(
            spent,
            self._latencies,
            dict(self._verdicts),
            waits=dict(self._traffic.waits),
            unanswered=len(self._busy),
        )

    def _goes_on(self, connection: _Connection) -> bool:
        """Takes what was answered; False when the connection is to send nothing more."""
        word = connection.receive()
        if not word:
            return True
        self._last = now = time.perf_counter()
        latency = now - connection.began
        self._latencies.append(latency)
        self._longest = max(self._longest, latency)
        self._verdicts[word] += 1
        if not self._traffic.left or now - self._started >= self._seconds:
            return False
        connection.begin()
        return True

    def _patient_until(self) -> float:
        if self._seconds == float("inf"):
            return self._last + SILENCE
        grace = max(self._grace, min(PATIENCE, GRACE_BY_LATENCY * self._longest))
        return self._started + self._seconds + grace
