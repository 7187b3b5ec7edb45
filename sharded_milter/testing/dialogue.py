"""The commands with which an MTA sends a message to a milter, as negotiated. PURE."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sharded_milter.protocol import commands
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, VERSION
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import STAGES, Protocol
from sharded_milter.protocol.text import to_text
from sharded_milter.protocol.wire import MAX_CHUNK

MTA = "Postfix 3.9.0"
CLIENT, CLIENT_ADDRESS = "client.example.test", "192.0.2.1"

OFFER = commands.Negotiate(VERSION, KNOWN_ACTIONS, KNOWN_PROTOCOL)

# Postfix cuts a longer field (header_size_limit).
FIELD_LIMIT = 102_400

_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:")


@dataclass(frozen=True)
class Mail:
    """A message and its envelope; `raw` is RFC 5322 with CRLF."""

    raw: bytes
    sender: str = "sender@example.org"
    recipients: Sequence[str] = ("recipient@example.com",)
    queue_id: str = "TEST"


def greeting(mta: str = MTA) -> list[Packet]:
    """Return the commands at the beginning of a connection: CONNECT and HELO with their macros."""
    return [
        commands.Macro("C", (("j", "mx.example.test"), ("v", mta))),
        commands.Connect(CLIENT, "4", 25, CLIENT_ADDRESS),
        commands.Helo(CLIENT),
    ]


def envelope(mail: Mail) -> list[Packet]:
    """Return the commands of the envelope: MAIL and RCPT with their macros."""
    packets: list[Packet] = [
        commands.Macro("M", (("{mail_addr}", mail.sender),)),
        commands.Mail(f"<{mail.sender}>", (f"SIZE={len(mail.raw)}",)),
    ]
    for recipient in mail.recipients:
        packets.append(commands.Macro("R", (("{rcpt_addr}", recipient),)))
        packets.append(commands.Rcpt(f"<{recipient}>"))
    return packets


def content(mail: Mail) -> list[Packet]:
    """Return the commands from DATA to the end of the message, with their macros."""
    queue_id = (("i", mail.queue_id),)
    fields, body = split(mail.raw)
    return [
        commands.Macro("T", queue_id),
        commands.Data(),
        *map(_header, fields),
        commands.Macro("N", queue_id),
        commands.Eoh(),
        *(commands.Body(body[at : at + MAX_CHUNK]) for at in range(0, len(body), MAX_CHUNK)),
        commands.Macro("E", queue_id),
        commands.Eom(),
    ]


def transaction(mail: Mail) -> list[Packet]:
    """Return all commands of one message."""
    return [*envelope(mail), *content(mail)]


def split(raw: bytes) -> tuple[list[bytes], bytes]:
    """Split a message into its header fields and its body.

    The lines of a folded field are joined by a bare LF. As in Postfix, the first line that is not
    part of a header field begins the body.
    """
    fields: list[bytes] = []
    at = 0
    while at < len(raw):
        end = raw.find(b"\r\n", at)
        line, after = (raw[at:end], end + 2) if end >= 0 else (raw[at:], len(raw))
        if line[:1] in (b" ", b"\t") and fields:
            fields[-1] += b"\n" + line
        elif _FIELD.match(line):
            fields.append(line)
        else:
            return fields, raw[at if line else after :]
        at = after
    return fields, b""


def _header(field: bytes) -> Packet:
    name, _, value = field[:FIELD_LIMIT].replace(b"\0", b"").partition(b":")
    return commands.Header(to_text(name.rstrip()), to_text(value))


def wanted(packets: Sequence[Packet], protocol: Protocol) -> Iterator[Packet]:
    """Yield the packets of the stages that the milter has negotiated.

    Without HDR_LEADSPC, the space after the colon is removed from header values.
    """
    for packet in packets:
        stage = STAGES.get(packet.letter[0])
        if stage is not None and protocol & stage.suppress:
            continue
        if isinstance(packet, commands.Header) and not protocol & Protocol.HDR_LEADSPC:
            packet = commands.Header(packet.name, packet.value.removeprefix(" "))
        yield packet


def exchanges(
    packets: Sequence[Packet], protocol: Protocol
) -> tuple[list[list[bytes]], list[bytes]]:
    """Return the packets in groups, each of which ends with a packet that has a reply.

    The second value has the packets after the last of these; send them before the next group.
    """
    groups: list[list[bytes]] = []
    group: list[bytes] = []
    for packet in wanted(packets, protocol):
        group.append(packet.encode())
        stage = STAGES.get(packet.letter[0])
        if stage is not None and not protocol & stage.no_reply:
            groups.append(group)
            group = []
    return groups, group
