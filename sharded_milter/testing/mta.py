"""The MTA's side of the milter protocol: a small blocking client for demos, tests and benchmarks.

It behaves like Postfix and Sendmail: it sends only the commands that were negotiated, waits only
for the replies that are due, and follows them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import parse_reply
from sharded_milter.protocol.stages import STAGES, Protocol
from sharded_milter.protocol.wire import LETTER, PAYLOAD, Framer
from sharded_milter.testing.dialogue import MTA, OFFER, Mail, content, envelope, greeting, wanted

__all__ = ["Mail", "MtaClient", "Outcome"]

# Seconds, more than the 300 that Postfix waits at the end of a message.
TIMEOUT = 310.0

_RECEIVE = 65_536


@dataclass
class Outcome:
    """The result for one message: the verdict, the actions, and the refused recipients."""

    verdict: Packet = field(default_factory=replies.Continue)
    stage: str = "eom"
    actions: list[Packet] = field(default_factory=list)
    refused: dict[str, Packet] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        """True if the verdict has ended the message, so that no more of it may be sent."""
        return not isinstance(self.verdict, replies.Continue)


class MtaClient:
    """One connection of an MTA to a milter."""

    def __init__(self, sock: socket.socket, *, mta: str = MTA, timeout: float = TIMEOUT) -> None:
        self._socket = sock
        self._socket.settimeout(timeout)
        self._framer = Framer()
        self._packets: list[bytes] = []
        self.protocol = Protocol(0)
        self._negotiate(mta)

    @classmethod
    def to_path(cls, path: str) -> Self:
        """Connect to a UNIX socket; raise OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(path)
        return cls(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Send QUIT and close the connection."""
        try:
            self._socket.sendall(commands.Quit().encode())
        except OSError:  # the milter has closed the connection already
            pass
        finally:
            self._socket.close()

    def _negotiate(self, mta: str) -> None:
        self._send(OFFER)
        packet = self._receive()
        if packet[LETTER] != commands.Negotiate.letter[0]:
            raise RemoteProtocolError(f"the milter answered the negotiation with {packet[:40]!r}")
        self.protocol = Protocol(commands.Negotiate.parse(packet[PAYLOAD:]).protocol)
        for command in wanted(greeting(mta), self.protocol):
            self._ask(command)

    def deliver(self, mail: Mail) -> Outcome:
        """Send one message and return its result; the first verdict that ends it counts.

        Raise RemoteProtocolError for an illegal reply or a closed connection, TimeoutError for a
        missing reply.
        """
        started = time.perf_counter()
        outcome = Outcome()
        self._send_all(envelope(mail), outcome)
        if not outcome.ended and len(outcome.refused) < len(mail.recipients):
            self._send_all(content(mail), outcome)
        self._send(commands.Abort())
        outcome.seconds = time.perf_counter() - started
        return outcome

    def _send_all(self, packets: Sequence[Packet], outcome: Outcome) -> None:
        for command in wanted(packets, self.protocol):
            answer = self._ask(command, outcome.actions)
            if isinstance(command, commands.Rcpt) and not isinstance(answer, replies.Continue):
                outcome.refused[command.recipient] = answer
            elif not isinstance(answer, replies.Continue | replies.Skip):
                outcome.verdict = answer
                outcome.stage = STAGES[command.letter[0]].word
                return

    def _ask(self, command: Packet, actions: list[Packet] | None = None) -> Packet:
        """Send a command and return its final reply; CONTINUE if the command has none.

        Append the actions before it to `actions`.
        """
        self._send(command)
        stage = STAGES.get(command.letter[0])
        if stage is None or self.protocol & stage.no_reply:
            return replies.Continue()
        while True:
            packet = self._receive()
            reply = parse_reply(packet)
            if replies.LEGAL[packet[LETTER]].final:
                return reply
            if actions is not None and not isinstance(reply, replies.Progress):
                actions.append(reply)

    def _send(self, packet: Packet) -> None:
        self._socket.sendall(packet.encode())

    def _receive(self) -> bytes:
        while not self._packets:
            data = self._socket.recv(_RECEIVE)
            if not data:
                raise RemoteProtocolError("the milter closed the connection")
            self._packets += self._framer.receive(data)
        return self._packets.pop(0)
