"""What an MTA says in a bench: seeded, so that every run sends the same bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sharded_milter.protocol import commands
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, VERSION
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import STAGES, Protocol
from sharded_milter.protocol.wire import MAX_CHUNK

SEED = 20261122

# A mail as most are: the header of a mailing list, a body of a page or two.
HEADERS = 20
BODY_BYTES = 10_000

# Text that is made letter by letter takes seconds for megabytes, so it is repeated.
_BLOCK = 10_000

OFFER = commands.Negotiate(VERSION, KNOWN_ACTIONS, KNOWN_PROTOCOL)
GREETING: tuple[Packet, ...] = (
    commands.Macro("C", (("j", "mx.example.test"), ("v", "Postfix 3.9.0"))),
    commands.Connect("client.example.test", "4", 25, "192.0.2.1"),
    commands.Helo("client.example.test"),
)


def envelope(recipients: int = 1) -> list[Packet]:
    """The sender and so many recipients."""
    pairs = [
        (
            commands.Macro("R", (("{rcpt_addr}", f"b{n}@example.com"),)),
            commands.Rcpt(f"<b{n}@example.com>"),
        )
        for n in range(recipients)
    ]
    return [
        commands.Macro("M", (("{mail_addr}", "a@example.org"),)),
        commands.Mail("<a@example.org>", ("SIZE=10000",)),
        *(command for pair in pairs for command in pair),
    ]


def message(
    headers: int = HEADERS, body: int = BODY_BYTES, recipients: int = 1, connection: int = 0
) -> list[Packet]:
    """The commands of one message; its queue id is that of no other connection."""
    queue_id = (("i", f"4F3A2B{connection:04X}"),)
    rng = random.Random(SEED)
    block = "".join(rng.choices("abcdefghij klmnop\n", k=min(body, _BLOCK)))
    line_ends = block.replace("\n", "\r\n").encode()
    text = (line_ends * (1 + body // max(1, len(line_ends))))[:body]
    fields = [
        commands.Header(f"X-Field-{n}", " " + "".join(rng.choices("abcdef ", k=50)))
        for n in range(headers)
    ]
    chunks = [commands.Body(text[at : at + MAX_CHUNK]) for at in range(0, len(text), MAX_CHUNK)]
    return [
        *envelope(recipients),
        commands.Macro("T", queue_id),
        commands.Data(),
        *fields,
        commands.Macro("N", queue_id),
        commands.Eoh(),
        *chunks,
        commands.Macro("E", queue_id),
        commands.Eom(),
    ]


def exchanges(
    packets: Sequence[Packet], protocol: Protocol
) -> tuple[list[list[bytes]], list[bytes]]:
    """The packets that the milter wants, in groups that each end with one that it answers.

    The second value is what comes after the last answer, and belongs in front of the next group.
    """
    groups: list[list[bytes]] = []
    group: list[bytes] = []
    for packet in packets:
        stage = STAGES.get(packet.letter[0])
        if stage is not None and protocol & stage.suppress:
            continue
        group.append(packet.encode())
        if stage is not None and not protocol & stage.no_reply:
            groups.append(group)
            group = []
    return groups, group
