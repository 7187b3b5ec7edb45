"""Parse a transcript: from the MTA's packets to the values that callbacks get.

A transcript has two parts: the connection's (our own negotiation packet, then CONNECT and HELO
with their macros) and the message's. A RCPT or DATA that was refused is followed by a REJECT
packet, so that the parser ignores it.
"""

from __future__ import annotations

import ipaddress
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from sharded_milter.api.values import (
    Address,
    Connection,
    Envelope,
    Header,
    Headers,
    Lazy,
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
from sharded_milter.protocol.stages import NO_PROTOCOL, Protocol
from sharded_milter.protocol.text import split_strings, to_text
from sharded_milter.protocol.wire import HEAD, LENGTH_BYTES, PAYLOAD

# libmilter's search order: the value of a later stage hides that of an earlier one.
_MACRO_ORDER = b"CHMRTNE"

_FAMILIES = {"4": "inet", "6": "inet6", "L": "unix"}
# Parsed envelopes that are kept: more than the connections that one worker has before content.
MAX_ENVELOPES = 64

_HEADER, _REFUSED = HeaderCommand.letter[0], Reject.letter[0]
_CONTENT = (Body.letter[0], Eom.letter[0])


@dataclass(slots=True)
class ParsedTranscript:
    """A parsed transcript; its methods make the values that callbacks get.

    Header fields and macros are kept as bytes, and decoded at their first use.
    """

    protocol: Protocol = NO_PROTOCOL
    connect: Connect | None = None
    helo: str = ""
    sender: Address | None = None
    recipients: list[Address] = field(default_factory=list)
    command: str = ""
    macros: dict[int, bytes] = field(default_factory=dict)  # payloads by the stage's letter
    headers: list[bytes] = field(default_factory=list)  # payloads
    chunks: list[memoryview] = field(default_factory=list)
    client: Connection | None = None  # from the connection's part

    def copied(self) -> ParsedTranscript:
        """Return a copy of a connection's transcript, to which a message is added."""
        transcript = ParsedTranscript(self.protocol, self.connect, self.helo)
        transcript.command, transcript.client = self.command, self.client
        transcript.macros = self.macros.copy()
        return transcript

    def connection_value(self) -> Connection:
        """Return the client, with the macros of CONNECT and HELO."""
        if self.client is not None:
            return self.client
        return Connection(
            *client_of(self.connect or Connect("", "U")), self.helo, self._macros_at(b"CH")
        )

    def envelope_value(self, recipients: Iterable[Address] | None = None) -> Envelope:
        """Return the envelope, with all macros so far."""
        chosen = self.recipients if recipients is None else recipients
        sender = self.sender or Address("")
        return Envelope(
            self.connection_value(), sender, tuple(chosen), self._macros_at(_MACRO_ORDER)
        )

    def header_names(self) -> list[str]:
        """Return the names of the header fields, in order."""
        return [to_text(payload[: payload.index(0)]) for payload in self.headers]

    def headers_value(self) -> Headers:
        """Return the header; the space after the colon is separated from the value."""
        leading_space = bool(self.protocol & Protocol.HDR_LEADSPC)
        return Headers(Lazy(_fields, self.headers, leading_space))

    def message_value(self) -> Message:
        """Return the whole message; its content is not copied."""
        return Message.from_chunks(self.envelope_value(), self.headers_value(), self.chunks)

    def _macros_at(self, stages: bytes) -> Macros:
        payloads = [self.macros[stage] for stage in stages if stage in self.macros]
        return Macros(Lazy(_pairs, payloads))


def _fields(payloads: list[bytes], leading_space: bool) -> Iterator[Header]:
    for payload in payloads:
        name, value = split_strings(payload)
        if not leading_space:
            yield Header(name, value)
        elif value[:1] == " ":
            yield Header(name, value[1:])
        else:
            yield Header(name, value, "")


def _pairs(payloads: list[bytes]) -> Iterator[tuple[str, str]]:
    for payload in payloads:
        yield from Macro.parse(payload).pairs


def client_of(connect: Connect) -> tuple[str, str, str, int]:
    """Return hostname, family, address and port of a client, as in `Connection`."""
    family = _FAMILIES.get(connect.family, "unknown")
    address = connect.address
    if family == "inet6" and address[:5].lower() == "ipv6:":
        address = address[5:]  # Sendmail's spelling
    if family in ("inet", "inet6") and not _is_ip(address):
        family, address = "unknown", ""  # Postfix sends "unknown" for some proxied clients
    return connect.hostname, family, address, connect.port


def read(connection: bytes, message: bytes | memoryview) -> ParsedTranscript:
    """Parse a transcript of these two parts; raise RemoteProtocolError if it is malformed."""
    transcript = _read_connection(connection).copied()
    _read_part(transcript, message)
    return transcript


# All jobs of one connection have the same connection part.
@lru_cache(maxsize=1024)
def _read_connection(connection: bytes) -> ParsedTranscript:
    transcript = ParsedTranscript()
    _read_part(transcript, connection)
    transcript.client = transcript.connection_value()
    return transcript


class EnvelopeReader:
    """Parses envelopes that grow from job to job, and keeps the last one of each connection.

    A message with a thousand recipients has a thousand jobs. Parsing it from its beginning for
    each of them would be a million packets.
    """

    def __init__(self) -> None:
        self._read_before: OrderedDict[bytes, tuple[bytes, ParsedTranscript, int]] = OrderedDict()

    def read(self, connection: bytes, message: bytes | memoryview) -> ParsedTranscript:
        """Parse as `read` does, but only the packets that are new."""
        whole = bytes(message)
        before, transcript, last = self._read_before.pop(connection, (b"", None, 0))
        if transcript is None or not whole.startswith(before):
            before, transcript, last = b"", read(connection, b""), 0
        last = _read_part(transcript, whole[len(before) :], last)
        self._read_before[connection] = whole, transcript, last
        if len(self._read_before) > MAX_ENVELOPES:
            self._read_before.popitem(last=False)
        return transcript


def _read_part(transcript: ParsedTranscript, part: bytes | memoryview, before: int = 0) -> int:
    """Parse more packets; `before` is the letter of the last one before them.

    Return the letter of the last packet. Framing and the most frequent packets are parsed without
    a call, because for a cheap message a worker does almost nothing else.
    """
    head = HEAD.unpack_from
    view = memoryview(part)  # the content may have megabytes, so it is not copied
    at, size = 0, len(part)
    try:
        while at < size:
            length, code = head(part, at)
            start, at = at + PAYLOAD, at + LENGTH_BYTES + length
            if not length or at > size:
                raise RemoteProtocolError(
                    f"a packet of {length} bytes ends at byte {at} of a transcript of {size}"
                )
            if code == _HEADER:
                payload = bytes(part[start:at])
                if payload.count(0) != 2 or payload[-1]:
                    raise RemoteProtocolError(f"a header has not two strings: {payload!r:.80}")
                transcript.headers.append(payload)
            elif code in _CONTENT:
                transcript.chunks.append(view[start:at])
            elif code in _READERS:
                _READERS[code](transcript, bytes(part[start:at]))
            elif code == _REFUSED:
                _drop_refused(transcript, before)
            before = code
    except struct.error:
        raise RemoteProtocolError(f"a packet is cut off at byte {size}") from None
    return before


def _macro(transcript: ParsedTranscript, payload: bytes) -> None:
    if not payload or payload.count(0, 1) % 2 or (payload[1:] and payload[-1]):
        Macro.parse(payload)  # raises the error
    transcript.macros[payload[0]] = payload
    if payload[0] in b"CH":
        transcript.client = None


def _address(payload: bytes) -> Address:
    if not payload:
        raise RemoteProtocolError("a MAIL or RCPT command has no address")
    raw, *esmtp = split_strings(payload)
    return Address(raw, tuple(esmtp))


def _rcpt(transcript: ParsedTranscript, payload: bytes) -> None:
    transcript.recipients.append(_address(payload))


def _mail(transcript: ParsedTranscript, payload: bytes) -> None:
    transcript.sender = _address(payload)


def _connect(transcript: ParsedTranscript, payload: bytes) -> None:
    transcript.connect, transcript.client = Connect.parse(payload), None


def _helo(transcript: ParsedTranscript, payload: bytes) -> None:
    transcript.helo, transcript.client = Helo.parse(payload).name, None


def _options(transcript: ParsedTranscript, payload: bytes) -> None:
    transcript.protocol = Protocol(Negotiate.parse(payload).protocol)


def _unknown(transcript: ParsedTranscript, payload: bytes) -> None:
    transcript.command = Unknown.parse(payload).command


_READERS: Mapping[int, Callable[[ParsedTranscript, bytes], None]] = {
    Macro.letter[0]: _macro,
    Rcpt.letter[0]: _rcpt,
    Mail.letter[0]: _mail,
    Connect.letter[0]: _connect,
    Helo.letter[0]: _helo,
    Negotiate.letter[0]: _options,
    Unknown.letter[0]: _unknown,
}


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def _drop_refused(transcript: ParsedTranscript, refused: int) -> None:
    if refused == Rcpt.letter[0]:
        transcript.recipients.pop()
