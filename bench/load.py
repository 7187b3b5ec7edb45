"""A load client: the MTA's side of many connections in one process, with precomputed packets.

It speaks as Postfix does: what needs no answer is written together with the next command that
does. Its own CPU time is reported, because on a small machine it competes with what it measures.
"""

from __future__ import annotations

import random
import resource
import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass, field

from sharded_milter.protocol import commands
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, VERSION
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import LEGAL
from sharded_milter.protocol.stages import STAGES, Protocol
from sharded_milter.protocol.wire import LETTER, MAX_CHUNK, PAYLOAD, Framer

SEED = 20261122
HEADERS = 20
BODY_BYTES = 10_000


@dataclass
class Result:
    """What a run measured; times in seconds."""

    messages: int
    seconds: float
    latencies: list[float] = field(repr=False)
    client_cpu: float = 0.0
    verdicts: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.messages / self.seconds

    def percentile(self, share: float) -> float:
        """The latency that this share of the messages did not exceed."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def corpus_message(headers: int = HEADERS, body: int = BODY_BYTES) -> list[Packet]:
    """The commands of one message: seeded, so that every run sends the same bytes."""
    rng = random.Random(SEED)
    text = "".join(rng.choices("abcdefghij klmnop\n", k=body)).replace("\n", "\r\n").encode()
    fields = [
        commands.Header(f"X-Field-{n}", " " + "".join(rng.choices("abcdef ", k=50)))
        for n in range(headers)
    ]
    chunks = [commands.Body(text[at : at + MAX_CHUNK]) for at in range(0, len(text), MAX_CHUNK)]
    return [
        commands.Macro("M", (("{mail_addr}", "a@example.org"),)),
        commands.Mail("<a@example.org>", ("SIZE=10000",)),
        commands.Macro("R", (("{rcpt_addr}", "b@example.com"),)),
        commands.Rcpt("<b@example.com>"),
        commands.Macro("T", (("i", "4F3A2B1C0D"),)),
        commands.Data(),
        *fields,
        commands.Macro("N", (("i", "4F3A2B1C0D"),)),
        commands.Eoh(),
        *chunks,
        commands.Macro("E", (("i", "4F3A2B1C0D"),)),
        commands.Eom(),
    ]


def exchanges(message: list[Packet], protocol: Protocol) -> list[bytes]:
    """What is written at a time, each piece ending with a command that is answered."""
    pieces, piece = [], b""
    for command in message:
        stage = STAGES.get(command.letter[0])
        if stage is not None and protocol & stage.suppress:
            continue
        piece += command.encode()
        if stage is not None and not protocol & stage.no_reply:
            pieces.append(piece)
            piece = b""
    return pieces


class _Connection:
    """One MTA connection that sends the same message again and again."""

    def __init__(self, address: str) -> None:
        self.socket = connect(address)
        self.framer = Framer()
        self.pending: deque[bytes] = deque()
        self.left = 0
        self.sent_at = 0.0
        self.socket.sendall(commands.Negotiate(VERSION, KNOWN_ACTIONS, KNOWN_PROTOCOL).encode())
        offer = self.framer.receive(self.socket.recv(65_536))[0]
        protocol = Protocol(commands.Negotiate.parse(offer[PAYLOAD:]).protocol)
        greeting: list[Packet] = [
            commands.Macro("C", (("j", "mx.example.test"), ("v", "Postfix 3.9.0"))),
            commands.Connect("client.example.test", "4", 25, "192.0.2.1"),
            commands.Helo("client.example.test"),
        ]
        self.lead = b""  # what needed no answer yet, as Postfix keeps it in its buffer
        for command in greeting:
            stage = STAGES.get(command.letter[0])
            if stage is not None and protocol & stage.suppress:
                continue
            self.lead += command.encode()
            if stage is not None and not protocol & stage.no_reply:
                self.socket.sendall(self.lead)
                self.socket.recv(65_536)
                self.lead = b""
        self.pieces = exchanges(corpus_message(), protocol)
        self.pieces[0] = commands.Abort().encode() + self.pieces[0]  # as Postfix begins each one

    def begin(self) -> None:
        self.pending.extend(self.pieces)
        self.sent_at = time.perf_counter()
        self.next()

    def next(self) -> None:
        self.socket.sendall(self.lead + self.pending.popleft())
        self.lead = b""


def connect(address: str) -> socket.socket:
    if address.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address)
        return sock
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)))


def run(address: str, connections: int, messages: int) -> Result:
    """`messages` on each of so many connections to a path or HOST:PORT, all at the same time."""
    selector = selectors.DefaultSelector()
    everyone = [_Connection(address) for _ in range(connections)]
    cpu, started = _cpu(), time.perf_counter()
    latencies: list[float] = []
    verdicts: dict[str, int] = {}
    for connection in everyone:
        connection.left = messages
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.begin()
    open_ones = len(everyone)
    while open_ones:
        for key, _ in selector.select():
            connection = key.data
            for packet in connection.framer.receive(connection.socket.recv(65_536)):
                if not LEGAL[packet[LETTER]].final:
                    continue
                if connection.pending:
                    connection.next()
                    continue
                latencies.append(time.perf_counter() - connection.sent_at)
                letter = chr(packet[LETTER])
                verdicts[letter] = verdicts.get(letter, 0) + 1
                connection.left -= 1
                if connection.left:
                    connection.begin()
                else:
                    selector.unregister(connection.socket)
                    connection.socket.close()
                    open_ones -= 1
    seconds = time.perf_counter() - started
    return Result(len(latencies), seconds, latencies, _cpu() - cpu, verdicts)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
