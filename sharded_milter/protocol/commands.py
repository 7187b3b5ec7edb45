"""The commands: packets from the MTA (SMFIC).

A command holds exactly the packet's content, so encoding is the inverse of parsing. The dialects
interpret it for authors (brackets, `IPv6:` prefixes, macro look-up).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, NamedTuple, Self

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol.packets import INT_BYTES, Packet, parse_packet
from sharded_milter.protocol.text import join_strings, split_strings, to_text, to_wire
from sharded_milter.protocol.wire import LENGTH_BYTES, LETTER, MAX_PACKET, PAYLOAD

# Families of a CONNECT that is followed by a port and an address: IPv4, IPv6, UNIX path.
FAMILIES_WITH_ADDRESS = ("4", "6", "L")
PORT_BYTES = 2


@dataclass(frozen=True, slots=True)
class Negotiate(Packet):
    """Option negotiation (SMFIC_OPTNEG), the same letter and shape in both directions.

    `symlists` are pairs of a stage's number and its macro names; only a reply carries them.
    """

    letter: ClassVar[bytes] = b"O"
    version: int
    actions: int
    protocol: int
    symlists: tuple[tuple[int, str], ...] = ()

    def payload(self) -> bytes:
        words = (self.version, self.actions, self.protocol)
        return b"".join(word.to_bytes(INT_BYTES, "big") for word in words) + b"".join(
            number.to_bytes(INT_BYTES, "big") + join_strings((names,))
            for number, names in self.symlists
        )

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Parse our own reply, symbol lists included."""
        words = cls.offer(payload)
        symlists = []
        rest = payload[3 * INT_BYTES :]
        while rest:
            names, nul, after = rest[INT_BYTES:].partition(b"\0")
            if not nul:
                raise RemoteProtocolError(f"symbol list without its final NUL: {rest[:80]!r}")
            symlists.append((int.from_bytes(rest[:INT_BYTES], "big"), to_text(names)))
            rest = after
        return cls(words.version, words.actions, words.protocol, tuple(symlists))

    @classmethod
    def offer(cls, payload: bytes) -> Self:
        """Parse an MTA's offer; bytes after the three words are ignored, as libmilter does."""
        if len(payload) < 3 * INT_BYTES:
            raise RemoteProtocolError(f"option negotiation of {len(payload)} bytes needs 12")
        version, actions, protocol = struct.unpack_from(">III", payload)
        return cls(version, actions, protocol)


@dataclass(frozen=True, slots=True)
class Macro(Packet):
    """Macros (SMFIC_MACRO) for the command whose letter is `stage`; never answered."""

    letter: ClassVar[bytes] = b"D"
    stage: str
    pairs: tuple[tuple[str, str], ...] = ()

    def payload(self) -> bytes:
        return to_wire(self.stage) + join_strings(tuple(chain.from_iterable(self.pairs)))

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        if not payload:
            raise RemoteProtocolError("macro packet without the letter of its stage")
        strings = split_strings(payload[1:])
        if len(strings) % 2:
            raise RemoteProtocolError(f"macro {strings[-1]!r} has no value")
        return cls(to_text(payload[:1]), tuple(zip(strings[::2], strings[1::2], strict=True)))


@dataclass(frozen=True, slots=True)
class Connect(Packet):
    """A client connected (SMFIC_CONNECT).

    `family` is `4`, `6`, `L` (a path) or `U` (unknown, nothing follows); `address` is the MTA's
    own text, which need not be an address (Postfix may send `unknown`).
    """

    letter: ClassVar[bytes] = b"C"
    hostname: str
    family: str
    port: int = 0
    address: str = ""

    def payload(self) -> bytes:
        head = join_strings((self.hostname,)) + to_wire(self.family)
        if self.family not in FAMILIES_WITH_ADDRESS:
            return head
        return head + self.port.to_bytes(PORT_BYTES, "big") + join_strings((self.address,))

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        hostname, nul, rest = payload.partition(b"\0")
        if not nul or not rest:
            raise RemoteProtocolError(f"connect without hostname and family: {payload[:80]!r}")
        family = to_text(rest[:1])
        if family not in FAMILIES_WITH_ADDRESS:
            if rest[1:]:
                raise RemoteProtocolError(
                    f"connect of family {family!r} has bytes after it: {payload[:80]!r}"
                )
            return cls(to_text(hostname), family)
        address = split_strings(rest[1 + PORT_BYTES :])
        if len(address) != 1:
            raise RemoteProtocolError(f"connect without one address: {payload[:80]!r}")
        port = int.from_bytes(rest[1 : 1 + PORT_BYTES], "big")
        return cls(to_text(hostname), family, port, address[0])


@dataclass(frozen=True, slots=True)
class Helo(Packet):
    """The client's HELO or EHLO (SMFIC_HELO); `name` is its argument as the client wrote it."""

    letter: ClassVar[bytes] = b"H"
    name: str


@dataclass(frozen=True, slots=True)
class Mail(Packet):
    """The envelope sender (SMFIC_MAIL) in the client's spelling, and its ESMTP parameters."""

    letter: ClassVar[bytes] = b"M"
    sender: str
    esmtp: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rcpt(Packet):
    """An envelope recipient (SMFIC_RCPT) in the client's spelling, and its ESMTP parameters."""

    letter: ClassVar[bytes] = b"R"
    recipient: str
    esmtp: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Data(Packet):
    """The client's DATA command (SMFIC_DATA)."""

    letter: ClassVar[bytes] = b"T"


@dataclass(frozen=True, slots=True)
class Header(Packet):
    """A header field (SMFIC_HEADER); its folds are bare LF, as the MTA sends them."""

    letter: ClassVar[bytes] = b"L"
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Eoh(Packet):
    """End of headers (SMFIC_EOH)."""

    letter: ClassVar[bytes] = b"N"


@dataclass(frozen=True, slots=True)
class Body(Packet):
    """A chunk of the body (SMFIC_BODY): CRLF line ends; a chunk may end anywhere in a line."""

    letter: ClassVar[bytes] = b"B"
    chunk: bytes


@dataclass(frozen=True, slots=True)
class Eom(Packet):
    """End of message (SMFIC_BODYEOB); may carry the last chunk of the body."""

    letter: ClassVar[bytes] = b"E"
    chunk: bytes = b""


@dataclass(frozen=True, slots=True)
class Abort(Packet):
    """The MTA drops the message (SMFIC_ABORT), not the connection; never answered."""

    letter: ClassVar[bytes] = b"A"


@dataclass(frozen=True, slots=True)
class Quit(Packet):
    """The MTA closes the connection (SMFIC_QUIT); never answered."""

    letter: ClassVar[bytes] = b"Q"


@dataclass(frozen=True, slots=True)
class QuitNc(Packet):
    """The client's session is over, another may follow (SMFIC_QUIT_NC); never answered."""

    letter: ClassVar[bytes] = b"K"


@dataclass(frozen=True, slots=True)
class Unknown(Packet):
    """An SMTP command that the MTA does not know (SMFIC_UNKNOWN)."""

    letter: ClassVar[bytes] = b"U"
    command: str


COMMANDS: dict[int, type[Packet]] = {
    kind.letter[0]: kind
    for kind in (
        Negotiate, Macro, Connect, Helo, Mail, Rcpt, Data, Header, Eoh, Body, Eom, Abort, Quit,
        QuitNc, Unknown,
    )
}  # fmt: skip


def parse_command(packet: bytes) -> Packet:
    """Parse a whole packet as a command.

    Raise RemoteProtocolError for a letter that no command has, or a malformed payload.
    """
    return parse_packet(COMMANDS, packet)


class Shape(NamedTuple):
    """A payload of NUL-terminated strings only: its offset in the packet, and how many strings."""

    start: int
    counts: range


_MANY = MAX_PACKET

# The shapes of commands that consist of strings. Of the others, the payload of Body and Eom may be
# anything, and the rest must be parsed.
SHAPES: Mapping[int, Shape] = {
    Macro.letter[0]: Shape(PAYLOAD + 1, range(0, _MANY, 2)),
    Helo.letter[0]: Shape(PAYLOAD, range(1, 2)),
    Mail.letter[0]: Shape(PAYLOAD, range(1, _MANY)),
    Rcpt.letter[0]: Shape(PAYLOAD, range(1, _MANY)),
    Header.letter[0]: Shape(PAYLOAD, range(2, 3)),
    Unknown.letter[0]: Shape(PAYLOAD, range(1, 2)),
    **{kind.letter[0]: Shape(PAYLOAD, range(1)) for kind in (Data, Eoh, Abort, Quit, QuitNc)},
}
_PARSED: Mapping[int, Callable[[bytes], object]] = {
    Negotiate.letter[0]: Negotiate.offer,
    Connect.letter[0]: Connect.parse,
}


# The longest SMTP command that an MTA reads: AUTH has up to 12,288 octets (RFC 4954), all others
# have fewer (RFC 5321: 512; Postfix and Sendmail: 2,048).
MAX_LINE = 12_288

# Host names have up to 255 octets (RFC 1035), socket paths 108, and the line of a HELO 2,048.
MAX_HOST = 2048 + 256

# Postfix and Sendmail send about twelve macros with a command, each at most a header line long.
MAX_MACROS = 16_384

# An offer has 12 bytes. More are ignored, so that later protocol versions may add some.
MAX_OFFER = 1024

# The maximum lengths of packets that are not content, letter and payload, in bytes. Content is
# limited by the message's maximum size.
LONGEST: Mapping[int, int] = {
    Negotiate.letter[0]: MAX_OFFER,
    Connect.letter[0]: MAX_HOST,
    Helo.letter[0]: MAX_HOST,
    Macro.letter[0]: MAX_MACROS,
    Mail.letter[0]: MAX_LINE,
    Rcpt.letter[0]: MAX_LINE,
    Unknown.letter[0]: MAX_LINE,
}


def check_length(letter: int, length: int) -> None:
    """Raise RemoteProtocolError if `length` exceeds the maximum for the command's letter."""
    longest = LONGEST.get(letter, MAX_PACKET)
    if length > longest:
        name = COMMANDS[letter].__name__
        raise RemoteProtocolError(f"{name} of {length} bytes is longer than {longest} bytes")


def check_command(packet: bytes) -> None:
    """Raise RemoteProtocolError if the command is too long, or if parsing it would raise one.

    No value is built. A command that passes can be stored unparsed and is well-formed when a
    worker parses it.
    """
    letter = packet[LETTER]
    if len(packet) > LENGTH_BYTES + LONGEST.get(letter, MAX_PACKET):
        check_length(letter, len(packet) - LENGTH_BYTES)
    shape = SHAPES.get(letter)
    if shape is not None:
        start, size = shape.start, len(packet)
        strings = packet.count(0, start)
        if size < start or strings not in shape.counts or (size > start and packet[-1]):
            raise RemoteProtocolError(f"malformed command {packet[LETTER:][:80]!r}")
    elif letter in _PARSED:
        _PARSED[letter](packet[PAYLOAD:])
