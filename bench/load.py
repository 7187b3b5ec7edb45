"""A load client: the MTA's side of many connections in one process, with precomputed packets.

It sends only what was negotiated and waits only for what was promised. As Postfix does, it writes
what needs no answer together with the next command that does; or, as Sendmail does, every packet
by itself, with Nagle's algorithm on. Its own CPU time is reported, because on a small machine it
competes with what it measures.
"""

from __future__ import annotations

import select
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from bench.messages import GREETING, OFFER, exchanges, message
from sharded_milter.protocol import commands
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import LEGAL, Continue
from sharded_milter.protocol.stages import Protocol
from sharded_milter.protocol.wire import LETTER, PAYLOAD, Framer

_RECEIVE = 65_536
_CONTINUE = Continue.letter[0]

# Messages on each connection of a run that ends by the clock.
_UNLIMITED = 10**9

# Longer than any answer in any bench takes; a milter that is stuck ends the bench.
PATIENCE = 120.0


@dataclass
class Result:
    """What a run measured; times in seconds."""

    seconds: float
    latencies: list[float] = field(repr=False)
    verdicts: dict[str, int]
    client_cpu: float = 0.0

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

    def row(self) -> dict[str, Any]:
        """The columns of a table that most benches have."""
        return {
            "mails/s": self.rate,
            "p50 ms": 1000 * self.percentile(0.5),
            "p99 ms": 1000 * self.percentile(0.99),
            "client": f"{self.client_cpu / self.seconds:.0%}",
            "verdicts": "".join(sorted(self.verdicts)),
        }


def pooled(results: Sequence[Result]) -> Result:
    """Several runs of the same as one."""
    verdicts: Counter[str] = Counter()
    for result in results:
        verdicts.update(result.verdicts)
    return Result(
        sum(result.seconds for result in results),
        [latency for result in results for latency in result.latencies],
        dict(verdicts),
        sum(result.client_cpu for result in results),
    )


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


class Connection:
    """One MTA connection that sends the same message again and again.

    Milters repeat themselves, so what an answer means is parsed once for all connections: `known`
    has the final reply of every answer that came in one piece before.
    """

    def __init__(
        self, address: str, packets: Sequence[Packet], glued: bool, known: dict[bytes, int]
    ) -> None:
        self.socket = connect(address)
        self.began = 0.0
        self.left = 0  # messages that are to begin yet
        self._glued = glued
        self._known = known
        self._framer = Framer()
        self._unframed = 0  # bytes of a packet that is not complete yet
        self._at = 0
        protocol = self._negotiate()
        self._lead = self._greet(protocol)
        self._writes = [self._write(group) for group in exchanges(packets, protocol)[0]]
        if glued:  # as Postfix begins each message; Sendmail only says it when one is dropped
            self._writes[0] = [commands.Abort().encode() + self._writes[0][0]]

    def _write(self, group: list[bytes]) -> list[bytes]:
        return [b"".join(group)] if self._glued else group

    def _negotiate(self) -> Protocol:
        self.socket.sendall(OFFER.encode())
        (answer,) = self._framer.receive(self.socket.recv(_RECEIVE))
        return Protocol(commands.Negotiate.parse(answer[PAYLOAD:]).protocol)

    def _greet(self, protocol: Protocol) -> list[bytes]:
        """Returns what is not sent yet because it needs no answer."""
        groups, rest = exchanges(GREETING, protocol)
        for group in groups:
            self._send(self._write(group))
            self.socket.recv(_RECEIVE)
        if self._glued:
            return rest
        self._send(rest)
        return []

    def _send(self, writes: list[bytes]) -> None:
        for data in writes:
            self.socket.sendall(data)

    def begin(self) -> None:
        """Begins the next message."""
        self.left -= 1
        self._at = 0
        self.began = time.perf_counter()
        if self._lead:
            self._send(self._write([*self._lead, *self._writes[0]]))
            self._lead = []
        else:
            self._send(self._writes[0])

    def receive(self) -> int:
        """Goes on where the milter answered; the letter that ends the message, 0 before."""
        data = self.socket.recv(_RECEIVE)
        letter = self._known.get(data) if not self._unframed else None
        if letter is None:
            letter = self._parse(data)
        self._at += letter == _CONTINUE
        if letter != _CONTINUE or self._at == len(self._writes):
            return letter
        self._send(self._writes[self._at])
        return 0

    def _parse(self, data: bytes) -> int:
        """The letter of the final reply that is complete with `data`, 0 when none is."""
        if not data:
            raise ConnectionError("the milter closed the connection")
        began_whole = not self._unframed
        packets = self._framer.receive(data)
        self._unframed += len(data) - sum(map(len, packets))
        finals = [packet[LETTER] for packet in packets if LEGAL[packet[LETTER]].final]
        if len(finals) > 1:
            raise ConnectionError(f"{len(finals)} answers to one command: {data[:80]!r}")
        letter = finals[0] if finals else 0
        if began_whole and not self._unframed:
            self._known[data] = letter
        return letter


def run(
    address: str,
    connections: int,
    messages: int,
    *,
    seconds: float = float("inf"),
    packets: Sequence[Packet] | None = None,
    glued: bool = True,
) -> Result:
    """`messages` on each of so many connections at the same time; none begins after `seconds`."""
    known: dict[bytes, int] = {}
    with ExitStack() as stack:
        everyone = []
        for number in range(connections):
            content = packets or message(connection=number)
            connection = Connection(address, content, glued, known)
            stack.callback(connection.socket.close)
            connection.left = messages
            everyone.append(connection)
        cpu = time.process_time()
        result = _drive(everyone, seconds)
        return replace(result, client_cpu=time.process_time() - cpu)


def run_for(address: str, connections: int, seconds: float) -> Result:
    """As many messages as so many connections can send in that time."""
    return run(address, connections, _UNLIMITED, seconds=seconds)


def _drive(everyone: Sequence[Connection], seconds: float) -> Result:
    busy = {connection.socket.fileno(): connection for connection in everyone}
    latencies: list[float] = []
    verdicts: Counter[int] = Counter()
    with select.epoll() as poll:
        started = time.perf_counter()
        for descriptor, connection in busy.items():
            poll.register(descriptor, select.EPOLLIN)
            connection.begin()
        while busy:
            for descriptor, _ in poll.poll():
                connection = busy[descriptor]
                letter = connection.receive()
                if not letter:
                    continue
                now = time.perf_counter()
                latencies.append(now - connection.began)
                verdicts[letter] += 1
                if connection.left and now - started < seconds:
                    connection.begin()
                else:
                    poll.unregister(descriptor)
                    del busy[descriptor]
        spent = time.perf_counter() - started
    return Result(spent, latencies, verdicts={chr(letter): n for letter, n in verdicts.items()})
