"""A load client: the MTA's side of many connections in one process, with precomputed packets.

It sends only the commands that were negotiated, waits only for the replies that are due, and
follows them. Like Postfix it writes commands without a reply together with the next command that
has one (`coalesced`); or, like Sendmail, every packet by itself, with Nagle's algorithm on. It
reports its own CPU time, because on a small machine it competes with the milter. It is one file,
so that a reader of a figure can read everything that produced it.
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

# The verdicts of the final replies. The first digit of a reply code tells a reject from a tempfail.
VERDICTS = {"c": "continue", "a": "accept", "r": "reject", "t": "tempfail", "d": "discard",
         "s": "skip"}  # fmt: skip
_REPLY_CODE_VERDICTS = {"4": "tempfail", "5": "reject"}
_REFUSALS = ("reject", "tempfail")

# The number of messages of a run that is limited by its time.
UNLIMITED = 10**9

# Seconds, more than any reply in a benchmark takes. A milter that hangs ends the benchmark.
TIMEOUT = 120.0

# When its time is over, a run waits this many seconds for the messages that have no verdict yet,
# or this many times the longest latency so far if that is more.
GRACE = 10.0
GRACE_BY_LATENCY = 2.0

# A run that is limited by its number of messages ends when no message has got its verdict for this
# many seconds.
IDLE_TIMEOUT = TIMEOUT

# Seconds: the longest time between two calls of `on_progress`, for a progress bar.
TICK = 0.1

_RECEIVE = 65_536


@dataclass
class Result:
    """The figures of a run; times in seconds."""

    seconds: float
    latencies: list[float] = field(repr=False)
    verdicts: dict[str, int]
    client_cpu: float = 0.0
    #: The time that all connections together have waited for replies, by stage.
    waits: dict[Stage, float] = field(default_factory=dict)
    #: Messages that had no verdict when the run ended.
    unanswered: int = 0

    @property
    def messages(self) -> int:
        """The number of messages that got a verdict."""
        return len(self.latencies)

    @property
    def rate(self) -> float:
        """Messages per second."""
        return self.messages / self.seconds

    def percentile(self, share: float) -> float:
        """Return the latency in seconds that this share (0 to 1) of the messages did not exceed."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def connect(address: str) -> socket.socket:
    """Return a socket that is connected to a path or to HOST:PORT; raise OSError."""
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
    sock.settimeout(TIMEOUT)
    return sock


@dataclass(frozen=True, slots=True)
class _Script:
    """The writes for one message: those before the first reply, before the second, and so on."""

    writes: list[list[bytes]]
    stages: list[Stage]  # of the replies
    recipients: int


class _Traffic:
    """The state that the connections of a run share: the messages and the measured times.

    Milters repeat their replies, so each is parsed once for all connections: `verdict_of` has the
    verdict of every reply that has arrived in one piece before.
    """

    def __init__(self, content: Sequence[Sequence[Packet]], messages: int, coalesced: bool) -> None:
        self.coalesced = coalesced
        self.left = messages
        self.verdict_of: dict[bytes, str] = {}
        self.waits: defaultdict[Stage, float] = defaultdict(float)
        self._content = content
        self._scripts: dict[Protocol, list[_Script]] = {}
        self._begun = 0

    def prepare(self, protocol: Protocol) -> None:
        """Encode the packets now, so that this takes no time of the run."""
        if protocol not in self._scripts:
            self._scripts[protocol] = [self._script(packets, protocol) for packets in self._content]

    def _script(self, packets: Sequence[Packet], protocol: Protocol) -> _Script:
        groups, _ = exchanges(packets, protocol)
        stages = [STAGES[group[-1][LETTER]] for group in groups]
        if self.coalesced:  # Postfix sends ABORT before each message
            groups[0].insert(0, commands.Abort().encode())
        recipients = sum(isinstance(packet, commands.Rcpt) for packet in packets)
        return _Script([self.writes(group) for group in groups], stages, recipients)

    def writes(self, group: list[bytes]) -> list[bytes]:
        """Return the writes that send a group of packets."""
        return [b"".join(group)] if self.coalesced else group

    def next(self, protocol: Protocol) -> _Script:
        """Return the next message; after the last the first comes again."""
        self.left -= 1
        self._begun += 1
        return self._scripts[protocol][(self._begun - 1) % len(self._content)]


class _Connection:
    """One MTA connection that sends one message after the other."""

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
        """Negotiate, and send CONNECT and HELO.

        Raise ConfigError if the milter's verdict on the client is not `continue`.
        """
        self._send([OFFER.encode()])
        (answer,) = self._framer.receive(self.socket.recv(_RECEIVE))
        self._protocol = Protocol(commands.Negotiate.parse(answer[PAYLOAD:]).protocol)
        self._traffic.prepare(self._protocol)
        groups, lead = exchanges(greeting(), self._protocol)
        for group in groups:
            self._send(self._traffic.writes(group))
            while not (verdict := self._answer()):
                pass
            stage = STAGES[group[-1][LETTER]]
            self._traffic.waits[stage] += time.perf_counter() - self._asked
            if verdict != "continue":
                raise ConfigError(
                    f"the milter's verdict at {stage.word} is {verdict}: no message would reach it"
                )
        self._lead = lead if self._traffic.coalesced else []
        if lead and not self._traffic.coalesced:
            self._send(lead)

    def _send(self, writes: list[bytes]) -> None:
        self._asked = time.perf_counter()
        for data in writes:
            self.socket.sendall(data)

    def begin(self) -> None:
        """Begin the next message."""
        self._script = self._traffic.next(self._protocol)
        self._at = self._refused = 0
        first = self._script.writes[0]
        if self._lead:  # commands after HELO that have no reply
            first, self._lead = [b"".join([*self._lead, *first])], []
        self._send(first)
        self.began = self._asked

    def receive(self) -> str:
        """Read a reply and send the next command.

        Return the verdict that ends the message, or "" if the message has not ended.
        """
        verdict = self._answer()
        if not verdict:
            return ""
        stages = self._script.stages
        stage = stages[self._at]
        self._traffic.waits[stage] += time.perf_counter() - self._asked
        if stage is Stage.RCPT and verdict in _REFUSALS:
            self._refused += 1
            if self._refused == self._script.recipients:
                return verdict
        elif verdict not in ("continue", "skip"):
            return verdict
        self._at += 1
        while verdict == "skip" and self._at < len(stages) and stages[self._at] is stage:
            self._at += 1
        if self._at == len(stages):
            return verdict
        self._send(self._script.writes[self._at])
        return ""

    def _answer(self) -> str:
        """Read what has arrived; return the verdict of the final reply, "" if it is incomplete."""
        data = self.socket.recv(_RECEIVE)
        verdict = self._traffic.verdict_of.get(data) if not self._unframed else None
        return self._parse(data) if verdict is None else verdict

    def _parse(self, data: bytes) -> str:
        if not data:
            raise ConnectionError("the milter closed the connection")
        began_whole = not self._unframed
        packets = self._framer.receive(data)
        self._unframed += len(data) - sum(map(len, packets))
        finals = [packet for packet in packets if LEGAL[packet[LETTER]].final]
        if len(finals) > 1:
            raise ConnectionError(
                f"the milter sent {len(finals)} replies to one command: {data[:80]!r}"
            )
        verdict = _verdict(finals[0]) if finals else ""
        if began_whole and not self._unframed:
            self._traffic.verdict_of[data] = verdict
        return verdict


def _verdict(packet: bytes) -> str:
    return VERDICTS.get(chr(packet[LETTER])) or _REPLY_CODE_VERDICTS[chr(packet[PAYLOAD])]


def run(
    address: str,
    connections: int,
    messages: int,
    *,
    seconds: float = float("inf"),
    content: Sequence[Sequence[Packet]] = (),
    coalesced: bool = True,
    grace: float | None = None,
    on_progress: Callable[[float, int], object] = lambda seconds, answered: None,
    during: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Result:
    """Send this many messages over this many connections at the same time; none after `seconds`.

    Then wait for the verdicts that are missing, as described at GRACE, or at `grace` in its place;
    without `seconds`, until IDLE_TIMEOUT.

    `content` has the commands of each message; after the last the first is sent again.
    `on_progress` is called about every TICK with the seconds that have passed and the number of
    verdicts. `during` is a context that is entered when all connections are open and left after
    the last verdict. Raise ConfigError if the milter refuses the client, ConnectionError and
    TimeoutError if it closes a connection or does not answer.
    """
    connections = min(connections, messages)
    content = content or [transaction(generated(number)) for number in range(connections)]
    traffic = _Traffic(content, messages, coalesced)
    with ExitStack() as stack:
        opened = []
        for _ in range(connections):
            opened.append(_Connection(address, traffic))
            stack.callback(opened[-1].socket.close)
            opened[-1].open()
        with during():
            cpu = time.process_time()
            wait = GRACE if grace is None else grace
            result = _Run(opened, traffic, seconds, wait).run(on_progress)
            result.client_cpu = time.process_time() - cpu
        return result


def run_for(
    address: str,
    connections: int,
    seconds: float,
    content: Sequence[Sequence[Packet]] = (),
    grace: float | None = None,
) -> Result:
    """Send messages over this many connections for that time, at least one over each."""
    return run(address, connections, UNLIMITED, seconds=seconds, content=content, grace=grace)


class _Run:
    """The measured part of a run: from the first message to the last verdict."""

    def __init__(
        self, opened: Sequence[_Connection], traffic: _Traffic, seconds: float, grace: float
    ) -> None:
        self._busy = {connection.socket.fileno(): connection for connection in opened}
        self._traffic = traffic
        self._seconds = seconds
        self._grace = grace
        self._latencies: list[float] = []
        self._longest = 0.0
        self._verdicts: Counter[str] = Counter()

    def run(self, on_progress: Callable[[float, int], object]) -> Result:
        with select.epoll() as poll:
            self._started = self._last = told = now = time.perf_counter()
            for descriptor, connection in self._busy.items():
                poll.register(descriptor, select.EPOLLIN)
                connection.begin()
            while self._busy and now < self._give_up_at():
                for descriptor, _ in poll.poll(TICK):
                    if not self._receive_from(self._busy[descriptor]):
                        poll.unregister(descriptor)
                        del self._busy[descriptor]
                if (now := time.perf_counter()) - told >= TICK:
                    told = now
                    on_progress(now - self._started, len(self._latencies))
        spent = self._last - self._started
        if self._busy and self._seconds != float("inf"):
            spent = max(spent, self._seconds)  # without the grace, in which no verdict came
        return Result(
            spent,
            self._latencies,
            dict(self._verdicts),
            waits=dict(self._traffic.waits),
            unanswered=len(self._busy),
        )

    def _receive_from(self, connection: _Connection) -> bool:
        """Read a reply; return False if the connection has no more messages to send."""
        verdict = connection.receive()
        if not verdict:
            return True
        self._last = now = time.perf_counter()
        latency = now - connection.began
        self._latencies.append(latency)
        self._longest = max(self._longest, latency)
        self._verdicts[verdict] += 1
        if not self._traffic.left or now - self._started >= self._seconds:
            return False
        connection.begin()
        return True

    def _give_up_at(self) -> float:
        if self._seconds == float("inf"):
            return self._last + IDLE_TIMEOUT
        grace = max(self._grace, min(TIMEOUT, GRACE_BY_LATENCY * self._longest))
        return self._started + self._seconds + grace
