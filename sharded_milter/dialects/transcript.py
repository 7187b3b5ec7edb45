"""Reading a transcript: from the packets that the MTA sent to what an author sees.

A transcript has two parts: the connection's (our own negotiation packet, then connect and helo
with their macros) and the message's. Behind a RCPT or DATA that was refused stands a REJECT packet,
so that whoever reads it knows that it does not count.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
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
from sharded_milter.errors import RemoteProtocolError
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
from sharded_milter.protocol.text import split_strings
from sharded_milter.protocol.wire import packets

# libmilter's search order: what a later stage said hides what an earlier one did.
_MACRO_ORDER = "CHMRTNE"

_FAMILIES = {"4": "inet", "6": "inet6", "L": "unix"}
_REFUSED = Reject.letter[0]


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
            return Headers([Header(name, value) for name, value in self.headers])
        return Headers(
            [
                Header(name, value[1:]) if value[:1] == " " else Header(name, value, "")
                for name, value in self.headers
            ]
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
    for part in (memoryview(connection), memoryview(message)):
        before = 0
        for code, start, end in packets(part):
            reader = _READERS.get(code)
            if reader is not None:
                reader(transcript, part[start:end])
            elif code == _REFUSED:
                _undo(transcript, before)
            before = code
    return transcript


def _header(transcript: Transcript, payload: memoryview) -> None:
    # Most packets of a message are these: no value is built that nobody keeps.
    try:
        name, value = split_strings(payload)
    except ValueError:
        raise RemoteProtocolError(
            f"header of other than two strings: {bytes(payload[:80])!r}"
        ) from None
    transcript.headers.append((name, value))


def _macro(transcript: Transcript, payload: memoryview) -> None:
    macro = Macro.parse(bytes(payload))
    transcript.macros[macro.stage] = macro.pairs


def _rcpt(transcript: Transcript, payload: memoryview) -> None:
    recipient, *esmtp = split_strings(payload)
    transcript.recipients.append(Address(recipient, tuple(esmtp)))


def _mail(transcript: Transcript, payload: memoryview) -> None:
    mail = Mail.parse(bytes(payload))
    transcript.sender = Address(mail.sender, mail.esmtp)


def _connect(transcript: Transcript, payload: memoryview) -> None:
    transcript.connect = Connect.parse(bytes(payload))


def _helo(transcript: Transcript, payload: memoryview) -> None:
    transcript.helo = Helo.parse(bytes(payload)).name


def _options(transcript: Transcript, payload: memoryview) -> None:
    transcript.protocol = Protocol(Negotiate.parse(bytes(payload)).protocol)


def _unknown(transcript: Transcript, payload: memoryview) -> None:
    transcript.command = Unknown.parse(bytes(payload)).command


def _content(transcript: Transcript, payload: memoryview) -> None:
    transcript.chunks.append(payload)


_READERS: Mapping[int, Callable[[Transcript, memoryview], None]] = {
    HeaderCommand.letter[0]: _header,
    Macro.letter[0]: _macro,
    Rcpt.letter[0]: _rcpt,
    Mail.letter[0]: _mail,
    Connect.letter[0]: _connect,
    Helo.letter[0]: _helo,
    Negotiate.letter[0]: _options,
    Unknown.letter[0]: _unknown,
    Body.letter[0]: _content,
    Eom.letter[0]: _content,
}


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def _undo(transcript: Transcript, refused: int) -> None:
    if refused == Rcpt.letter[0]:
        transcript.recipients.pop()
