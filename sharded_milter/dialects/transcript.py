"""Reading a transcript: from the packets that the MTA sent to what an author sees.

A transcript has two parts: the connection's (our own negotiation packet, then connect and helo
with their macros) and the message's. Behind a RCPT or DATA that was refused stands a REJECT packet,
so that whoever reads it knows that it does not count.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field

from sharded_milter.api.values import (
    Address,
    Connection,
    Envelope,
    Header,
    Headers,
    Macros,
    Message,
)
from sharded_milter.protocol.commands import (
    Body,
    Connect,
    Eom,
    Helo,
    Macro,
    Mail,
    Negotiate,
    Rcpt,
    Unknown,
)
from sharded_milter.protocol.commands import Header as HeaderCommand
from sharded_milter.protocol.replies import Reject
from sharded_milter.protocol.stages import Protocol
from sharded_milter.protocol.wire import packets

# libmilter's search order: what a later stage said hides what an earlier one did.
_MACRO_ORDER = "CHMRTNE"

_FAMILIES = {"4": "inet", "6": "inet6", "L": "unix"}
_REFUSED = Reject.letter[0]
_CONTENT = frozenset(kind.letter[0] for kind in (Body, Eom))


@dataclass
class Transcript:
    """What was read; the properties are the values that callbacks get."""

    protocol: Protocol = field(default_factory=lambda: Protocol(0))
    connect: Connect | None = None
    helo: str = ""
    sender: Address | None = None
    recipients: list[Address] = field(default_factory=list)
    command: str = ""
    macros: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    headers: list[tuple[str, str]] = field(default_factory=list)
    chunks: list[bytes | memoryview] = field(default_factory=list)

    def connection_value(self) -> Connection:
        """The client, with the macros of connect and helo."""
        return Connection(
            *client_of(self.connect or Connect("", "U")), self.helo, self._visible("CH")
        )

    def envelope_value(self, recipients: Iterable[Address] | None = None) -> Envelope:
        """The envelope, with all macros that are visible now."""
        chosen = self.recipients if recipients is None else recipients
        sender = self.sender or Address("")
        return Envelope(self.connection_value(), sender, tuple(chosen), self._visible(_MACRO_ORDER))

    def headers_value(self) -> Headers:
        """The header; the blank behind the colon is set apart from the value."""
        if not self.protocol & Protocol.HDR_LEADSPC:
            return Headers(Header(name, value) for name, value in self.headers)
        return Headers(
            Header(name, value[1:]) if value[:1] == " " else Header(name, value, "")
            for name, value in self.headers
        )

    def message_value(self) -> Message:
        """The whole message."""
        return Message(self.envelope_value(), self.headers_value(), b"".join(self.chunks))

    def _visible(self, stages: str) -> Macros:
        return Macros(pair for stage in stages for pair in self.macros.get(stage, ()))


def client_of(connect: Connect) -> tuple[str, str, str, int]:
    """Hostname, family, address and port of a client, as `Connection` has them."""
    family = _FAMILIES.get(connect.family, "unknown")
    address = connect.address
    if family == "inet6" and address[:5].lower() == "ipv6:":
        address = address[5:]  # Sendmail's spelling
    if family in ("inet", "inet6") and not _is_ip(address):
        family, address = "unknown", ""  # Postfix sends "unknown" of some proxied clients
    return connect.hostname, family, address, connect.port


def read(connection: bytes, message: bytes | memoryview) -> Transcript:
    """The transcript with these two parts; raises RemoteProtocolError where they are malformed."""
    transcript = Transcript()
    view = memoryview(message)
    for part in (memoryview(connection), view):
        before = 0
        for code, start, end in packets(part):
            if code in _CONTENT:
                transcript.chunks.append(part[start:end])
            elif code == _REFUSED:
                _undo(transcript, before)
            else:
                _apply(transcript, code, bytes(part[start:end]))
            before = code
    return transcript


def _apply(transcript: Transcript, code: int, payload: bytes) -> None:
    match chr(code):
        case "L":
            header = HeaderCommand.parse(payload)
            transcript.headers.append((header.name, header.value))
        case "D":
            macro = Macro.parse(payload)
            transcript.macros[macro.stage] = macro.pairs
        case "R":
            rcpt = Rcpt.parse(payload)
            transcript.recipients.append(Address(rcpt.recipient, rcpt.esmtp))
        case "M":
            mail = Mail.parse(payload)
            transcript.sender = Address(mail.sender, mail.esmtp)
        case "C":
            transcript.connect = Connect.parse(payload)
        case "H":
            transcript.helo = Helo.parse(payload).name
        case "O":
            transcript.protocol = Protocol(Negotiate.parse(payload).protocol)
        case "U":
            transcript.command = Unknown.parse(payload).command


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def _undo(transcript: Transcript, refused: int) -> None:
    if refused == Rcpt.letter[0]:
        transcript.recipients.pop()
