"""The replies: packets to the MTA (SMFIR), and the SMTP reply text inside one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sharded_milter.protocol.packets import Packet, parse_packet
from sharded_milter.protocol.stages import NO_ACTIONS, Actions, Stage
from sharded_milter.protocol.text import to_wire

# SMTP allows 512 bytes a reply line with its CRLF (RFC 5321 4.5.3.1.5); an MTA may put an
# address in front, so text is wrapped well below.
MAX_REPLY_LINE = 480

# libmilter's limit on the lines of one reply; nobody reads more.
MAX_REPLY_LINES = 32


@dataclass(frozen=True, slots=True)
class Continue(Packet):
    """Go on; at end of message: deliver (SMFIR_CONTINUE)."""

    letter: ClassVar[bytes] = b"c"


@dataclass(frozen=True, slots=True)
class Accept(Packet):
    """Ask no more about this message, or at connect and helo this connection (SMFIR_ACCEPT)."""

    letter: ClassVar[bytes] = b"a"


@dataclass(frozen=True, slots=True)
class Reject(Packet):
    """A permanent refusal in the MTA's words (SMFIR_REJECT)."""

    letter: ClassVar[bytes] = b"r"


@dataclass(frozen=True, slots=True)
class TempFail(Packet):
    """A temporary refusal in the MTA's words (SMFIR_TEMPFAIL)."""

    letter: ClassVar[bytes] = b"t"


@dataclass(frozen=True, slots=True)
class Discard(Packet):
    """Say yes to the client and deliver nothing (SMFIR_DISCARD)."""

    letter: ClassVar[bytes] = b"d"


@dataclass(frozen=True, slots=True)
class Skip(Packet):
    """Send no more of the body (SMFIR_SKIP)."""

    letter: ClassVar[bytes] = b"s"


@dataclass(frozen=True, slots=True)
class ReplyCode(Packet):
    """A refusal in our own words (SMFIR_REPLYCODE); `text` as `reply_text` makes it."""

    letter: ClassVar[bytes] = b"y"
    text: str


@dataclass(frozen=True, slots=True)
class Progress(Packet):
    """Still working (SMFIR_PROGRESS); restarts the MTA's timer."""

    letter: ClassVar[bytes] = b"p"


@dataclass(frozen=True, slots=True)
class AddHeader(Packet):
    """A new header field (SMFIR_ADDHEADER)."""

    letter: ClassVar[bytes] = b"h"
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class InsertHeader(Packet):
    """A new header field at a place (SMFIR_INSHEADER)."""

    letter: ClassVar[bytes] = b"i"
    index: int
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ChangeHeader(Packet):
    """A new value for the index-th field of a name (SMFIR_CHGHEADER); empty deletes it."""

    letter: ClassVar[bytes] = b"m"
    index: int
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ReplaceBody(Packet):
    """A piece of the new body (SMFIR_REPLBODY), without a NUL at its end."""

    letter: ClassVar[bytes] = b"b"
    chunk: bytes


@dataclass(frozen=True, slots=True)
class AddRecipient(Packet):
    """A further recipient (SMFIR_ADDRCPT)."""

    letter: ClassVar[bytes] = b"+"
    recipient: str


@dataclass(frozen=True, slots=True)
class AddRecipientPar(Packet):
    """A further recipient with ESMTP parameters, one string (SMFIR_ADDRCPT_PAR)."""

    letter: ClassVar[bytes] = b"2"
    recipient: str
    esmtp: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeleteRecipient(Packet):
    """One recipient less (SMFIR_DELRCPT)."""

    letter: ClassVar[bytes] = b"-"
    recipient: str


@dataclass(frozen=True, slots=True)
class ChangeSender(Packet):
    """Another envelope sender (SMFIR_CHGFROM); ESMTP parameters are one string or none."""

    letter: ClassVar[bytes] = b"e"
    sender: str
    esmtp: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Quarantine(Packet):
    """Hold the message (SMFIR_QUARANTINE)."""

    letter: ClassVar[bytes] = b"q"
    reason: str


REPLIES: dict[int, type[Packet]] = {
    kind.letter[0]: kind
    for kind in (
        Continue, Accept, Reject, TempFail, Discard, Skip, ReplyCode, Progress, AddHeader,
        InsertHeader, ChangeHeader, ReplaceBody, AddRecipient, AddRecipientPar, DeleteRecipient,
        ChangeSender, Quarantine,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Legality:
    """At which stages a reply may be sent, and which action must have been negotiated."""

    stages: frozenset[Stage]
    action: Actions = NO_ACTIONS
    final: bool = False  # it answers the command; the others come before the answer


_ANY = frozenset(Stage)
_MESSAGE = _ANY - {Stage.CONNECT, Stage.HELO, Stage.UNKNOWN}
_EOM = frozenset({Stage.EOM})

LEGAL: dict[int, Legality] = {
    Continue.letter[0]: Legality(_ANY, final=True),
    Accept.letter[0]: Legality(_ANY - {Stage.UNKNOWN}, final=True),  # Postfix panics at UNKNOWN
    Reject.letter[0]: Legality(_ANY, final=True),
    TempFail.letter[0]: Legality(_ANY, final=True),
    ReplyCode.letter[0]: Legality(_ANY, final=True),
    Discard.letter[0]: Legality(_MESSAGE, final=True),
    Skip.letter[0]: Legality(frozenset({Stage.BODY}), final=True),
    Progress.letter[0]: Legality(_EOM),  # elsewhere Sendmail drops the filter
    AddHeader.letter[0]: Legality(_EOM, Actions.ADDHDRS),
    InsertHeader.letter[0]: Legality(_EOM, Actions.ADDHDRS),
    ChangeHeader.letter[0]: Legality(_EOM, Actions.CHGHDRS),
    ReplaceBody.letter[0]: Legality(_EOM, Actions.CHGBODY),
    AddRecipient.letter[0]: Legality(_EOM, Actions.ADDRCPT),
    AddRecipientPar.letter[0]: Legality(_EOM, Actions.ADDRCPT_PAR),
    DeleteRecipient.letter[0]: Legality(_EOM, Actions.DELRCPT),
    ChangeSender.letter[0]: Legality(_EOM, Actions.CHGFROM),
    Quarantine.letter[0]: Legality(_EOM, Actions.QUARANTINE),
}


def parse_reply(packet: bytes) -> Packet:
    """The reply in a whole packet.

    Raises RemoteProtocolError for a letter that is no reply's, or a malformed payload.
    """
    return parse_packet(REPLIES, packet)


def reply_text(code: int, xcode: str, text: str) -> str:
    """The SMTP reply for a `ReplyCode`: code, enhanced code, text, on every line.

    Lines end where `text` has a line break and are wrapped at MAX_REPLY_LINE bytes; at most
    MAX_REPLY_LINES are kept. `%` is doubled, because the MTAs take the text for a format.
    """
    lines = [piece for line in text.splitlines() or [""] for piece in _wrapped(line)]
    lines = lines[:MAX_REPLY_LINES]
    prefixes = [f"{code}-"] * (len(lines) - 1) + [f"{code} "]
    return "\r\n".join(
        f"{prefix}{xcode} {line}".rstrip().replace("%", "%%")
        for prefix, line in zip(prefixes, lines, strict=True)
    )


def _wrapped(line: str) -> list[str]:
    """The line cut so that each piece fits, at a space where there is one."""
    pieces = []
    while len(raw := to_wire(line)) > MAX_REPLY_LINE:
        cut = len(raw[:MAX_REPLY_LINE].decode(errors="ignore"))
        space = line.rfind(" ", 1, cut + 1)
        cut = space if space > 0 else max(cut, 1)
        pieces.append(line[:cut])
        line = line[cut:].lstrip(" ")
    return [*pieces, line]
