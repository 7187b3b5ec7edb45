"""The MTA's side of the milter protocol: a small blocking client for demos, tests and benches.

It behaves as Postfix and Sendmail do: it sends only what was negotiated, waits for an answer
only where one was promised, and takes its orders from the answers.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, VERSION
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import parse_reply
from sharded_milter.protocol.stages import STAGES, Protocol
from sharded_milter.protocol.text import to_text
from sharded_milter.protocol.wire import LETTER, MAX_CHUNK, PAYLOAD, Framer

# Longer than Postfix waits for the content.
TIMEOUT = 310.0

_RECEIVE = 65_536


@dataclass(frozen=True)
class Mail:
    """A message and its envelope; `raw` is RFC 5322 with CRLF."""

    raw: bytes
    sender: str = "sender@example.org"
    recipients: Sequence[str] = ("recipient@example.com",)
    queue_id: str = "TEST"


@dataclass
class Outcome:
    """What became of a mail: the final reply, the actions before it, the recipients refused."""

    verdict: Packet = field(default_factory=replies.Continue)
    stage: str = "eom"
    actions: list[Packet] = field(default_factory=list)
    refused: dict[str, Packet] = field(default_factory=dict)
    seconds: float = 0.0


class MtaClient:
    """One connection of an MTA to a milter."""

    def __init__(
        self, sock: socket.socket, *, mta: str = "Postfix 3.9.0", timeout: float = TIMEOUT
    ) -> None:
        self._socket = sock
        self._socket.settimeout(timeout)
        self._framer = Framer()
        self._packets: list[bytes] = []
        self.protocol = Protocol(0)
        self._negotiate(mta)

    @classmethod
    def to_path(cls, path: str) -> Self:
        """A connection to a UNIX socket."""
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
        """Says QUIT and closes."""
        try:
            self._socket.sendall(commands.Quit().encode())
        except OSError:  # the milter has left first
            pass
        finally:
            self._socket.close()

    def _negotiate(self, mta: str) -> None:
        self._send(commands.Negotiate(VERSION, KNOWN_ACTIONS, KNOWN_PROTOCOL))
        packet = self._receive()
        if packet[LETTER] != commands.Negotiate.letter[0]:
            raise RemoteProtocolError(f"the milter answered the negotiation with {packet[:40]!r}")
        self.protocol = Protocol(commands.Negotiate.parse(packet[PAYLOAD:]).protocol)
        self._macros("C", j="mx.example.test", v=mta)
        self._ask(commands.Connect("client.example.test", "4", 25, "192.0.2.1"))
        self._ask(commands.Helo("client.example.test"))

    def deliver(self, mail: Mail) -> Outcome:
        """Sends one mail; the verdict is the first that ends it."""
        started = time.perf_counter()
        outcome = Outcome()
        for command in self._commands(mail, outcome):
            answer = self._ask(command, outcome.actions)
            if isinstance(command, commands.Rcpt) and not isinstance(answer, replies.Continue):
                outcome.refused[command.recipient] = answer
            elif not isinstance(answer, replies.Continue | replies.Skip):
                outcome.verdict = answer
                outcome.stage = STAGES[command.letter[0]].word
                break
        self._send(commands.Abort())
        outcome.seconds = time.perf_counter() - started
        return outcome

    def _commands(self, mail: Mail, outcome: Outcome) -> Iterator[Packet]:
        header, _, body = mail.raw.partition(b"\r\n\r\n")
        self._macros("M")
        yield commands.Mail(f"<{mail.sender}>")
        for recipient in mail.recipients:
            yield commands.Rcpt(f"<{recipient}>")
        if len(outcome.refused) == len(mail.recipients):
            return
        self._macros("T", i=mail.queue_id)
        yield commands.Data()
        for line in _unfolded(header):
            name, _, value = line.partition(b":")
            if not self.protocol & Protocol.HDR_LEADSPC:
                value = value.removeprefix(b" ")
            yield commands.Header(to_text(name), to_text(value))
        yield commands.Eoh()
        for start in range(0, len(body), MAX_CHUNK):
            yield commands.Body(body[start : start + MAX_CHUNK])
        self._macros("E", i=mail.queue_id)
        yield commands.Eom()

    def _macros(self, stage: str, **values: str) -> None:
        self._send(commands.Macro(stage, tuple(values.items())))

    def _ask(self, command: Packet, actions: list[Packet] | None = None) -> Packet:
        """The final reply to a command, or CONTINUE where none is due."""
        stage = STAGES[command.letter[0]]
        if self.protocol & stage.suppress:
            return replies.Continue()
        self._send(command)
        if self.protocol & stage.no_reply:
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


def _unfolded(header: bytes) -> list[bytes]:
    """The fields, each with its continuation lines joined by a bare LF."""
    fields: list[bytes] = []
    for line in header.split(b"\r\n"):
        if line[:1] in (b" ", b"\t") and fields:
            fields[-1] += b"\n" + line
        elif line:
            fields.append(line)
    return fields
