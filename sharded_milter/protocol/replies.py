"""The replies: packets to the MTA (SMFIR), and the SMTP reply text of a ReplyCode."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sharded_milter.protocol.packets import Packet, parse_packet
from sharded_milter.protocol.stages import NO_ACTIONS, NO_PROTOCOL, Actions, Protocol, Stage
from sharded_milter.protocol.text import to_text, to_wire

# Bytes of a reply line with its codes. SMTP allows 512 with CRLF (RFC 5321 4.5.3.1.5); an MTA may
# put an address in front.
MAX_REPLY_LINE = 480

# libmilter's limit on the lines of one reply.
MAX_REPLY_LINES = 32

# SMTP reply text has printable characters and TAB only; a NUL would end the packet's string.
_NO_CONTROLS = {code: " " for code in (*range(0x20), 0x7F) if code != ord("\t")}


@dataclass(frozen=True, slots=True)
class Continue(Packet):
    """Continue; at end of message: deliver the message (SMFIR_CONTINUE)."""

    letter: ClassVar[bytes] = b"c"


@dataclass(frozen=True, slots=True)
class Accept(Packet):
    """Accept now: at connect and helo the client, else the message (SMFIR_ACCEPT)."""

    letter: ClassVar[bytes] = b"a"


@dataclass(frozen=True, slots=True)
class Reject(Packet):
    """A permanent refusal with the MTA's text (SMFIR_REJECT)."""

    letter: ClassVar[bytes] = b"r"


@dataclass(frozen=True, slots=True)
class TempFail(Packet):
    """A temporary refusal with the MTA's text (SMFIR_TEMPFAIL)."""

    letter: ClassVar[bytes] = b"t"


@dataclass(frozen=True, slots=True)
class Discard(Packet):
    """Accept the message from the client, but do not deliver it (SMFIR_DISCARD)."""

    letter: ClassVar[bytes] = b"d"


@dataclass(frozen=True, slots=True)
class Skip(Packet):
    """Request that no more of the body is sent (SMFIR_SKIP)."""

    letter: ClassVar[bytes] = b"s"


@dataclass(frozen=True, slots=True)
class ReplyCode(Packet):
    """A refusal with our own text (SMFIR_REPLYCODE), as `reply_text` returns it."""

    letter: ClassVar[bytes] = b"y"
    text: str


@dataclass(frozen=True, slots=True)
class Progress(Packet):
    """Work is in progress (SMFIR_PROGRESS); restarts the MTA's timer."""

    letter: ClassVar[bytes] = b"p"


@dataclass(frozen=True, slots=True)
class AddHeader(Packet):
    """A new header field (SMFIR_ADDHEADER)."""

    letter: ClassVar[bytes] = b"h"
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class InsertHeader(Packet):
    """A new header field at an index (SMFIR_INSHEADER)."""

    letter: ClassVar[bytes] = b"i"
    index: int
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ChangeHeader(Packet):
    """A new value for the index-th field of this name (SMFIR_CHGHEADER); empty deletes it."""

    letter: ClassVar[bytes] = b"m"
    index: int
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ReplaceBody(Packet):
    """A chunk of the new body (SMFIR_REPLBODY), without a NUL at its end."""

    letter: ClassVar[bytes] = b"b"
    chunk: bytes


@dataclass(frozen=True, slots=True)
class AddRecipient(Packet):
    """An additional recipient (SMFIR_ADDRCPT)."""

    letter: ClassVar[bytes] = b"+"
    recipient: str


@dataclass(frozen=True, slots=True)
class AddRecipientPar(Packet):
    """An additional recipient; ESMTP parameters are one string (SMFIR_ADDRCPT_PAR)."""

    letter: ClassVar[bytes] = b"2"
    recipient: str
    esmtp: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeleteRecipient(Packet):
    """Delete a recipient (SMFIR_DELRCPT)."""

    letter: ClassVar[bytes] = b"-"
    recipient: str


@dataclass(frozen=True, slots=True)
class ChangeSender(Packet):
    """A new envelope sender (SMFIR_CHGFROM); ESMTP parameters are one string or none."""

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
    """The rules for a reply: its stages, its payload, and what must have been negotiated."""

    stages: frozenset[Stage]
    payload: re.Pattern[bytes]
    action: Actions = NO_ACTIONS
    option: Protocol = NO_PROTOCOL
    final: bool = False  # it ends the answer to the command; the other replies come before it


def _payload(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


# If a payload does not match, Postfix closes the connection, and Sendmail ignores the reply without
# logging it.
_NOTHING = _payload(rb"")
_LINE = rb"[^\0\r\n]+\0"  # not empty, and one line
_TEXT = rb"[^\0]*\0"
_INDEX = rb".{4}"
_ONE_LINE = _payload(_LINE)
_ADDRESS_AND_PARAMETERS = _payload(_LINE + rb"(?:" + _LINE + rb")?")
_FIELD = _payload(_LINE + _TEXT)
_INDEXED_FIELD = _payload(_INDEX + _LINE + _TEXT)

# Every line has the same code. A text that begins with a digit must begin with an enhanced code of
# the same class. `%` is doubled, because Sendmail drops a text with a single one. 980 bytes is
# libmilter's limit for the text alone.
_REPLY_LINE = rb"(?:(?!\d)|(?=(?P=class)))(?:\d\.\d{1,3}\.\d{1,3} )?+(?:[^\0\r\n%]|%%){0,980}"
_REPLY = _payload(
    rb"(?P<code>(?P<class>[45])\d\d)(?:-" + _REPLY_LINE + rb"\r\n(?P=code)){0,31} "
    + _REPLY_LINE + rb"\0"
)  # fmt: skip

_ANY = frozenset(Stage)
_MESSAGE = _ANY - {Stage.CONNECT, Stage.HELO, Stage.UNKNOWN}
_EOM = frozenset({Stage.EOM})

LEGAL: dict[int, Legality] = {
    Continue.letter[0]: Legality(_ANY, _NOTHING, final=True),
    # At UNKNOWN it makes Postfix panic.
    Accept.letter[0]: Legality(_ANY - {Stage.UNKNOWN}, _NOTHING, final=True),
    Reject.letter[0]: Legality(_ANY, _NOTHING, final=True),
    TempFail.letter[0]: Legality(_ANY, _NOTHING, final=True),
    ReplyCode.letter[0]: Legality(_ANY, _REPLY, final=True),
    Discard.letter[0]: Legality(_MESSAGE, _NOTHING, final=True),
    Skip.letter[0]: Legality(frozenset({Stage.BODY}), _NOTHING, option=Protocol.SKIP, final=True),
    Progress.letter[0]: Legality(_EOM, _NOTHING),  # at other stages Sendmail stops using the filter
    AddHeader.letter[0]: Legality(_EOM, _FIELD, Actions.ADDHDRS),
    InsertHeader.letter[0]: Legality(_EOM, _INDEXED_FIELD, Actions.ADDHDRS),
    ChangeHeader.letter[0]: Legality(_EOM, _INDEXED_FIELD, Actions.CHGHDRS),
    ReplaceBody.letter[0]: Legality(_EOM, _payload(rb".*"), Actions.CHGBODY),
    AddRecipient.letter[0]: Legality(_EOM, _ONE_LINE, Actions.ADDRCPT),
    AddRecipientPar.letter[0]: Legality(_EOM, _ADDRESS_AND_PARAMETERS, Actions.ADDRCPT_PAR),
    DeleteRecipient.letter[0]: Legality(_EOM, _ONE_LINE, Actions.DELRCPT),
    ChangeSender.letter[0]: Legality(_EOM, _ADDRESS_AND_PARAMETERS, Actions.CHGFROM),
    Quarantine.letter[0]: Legality(_EOM, _ONE_LINE, Actions.QUARANTINE),
}


def parse_reply(packet: bytes) -> Packet:
    """Parse a whole packet as a reply.

    Raise RemoteProtocolError for a letter that no reply has, or a malformed payload.
    """
    return parse_packet(REPLIES, packet)


def reply_text(code: int, xcode: str, text: str) -> str:
    """Return the text of a `ReplyCode`: code, enhanced code and text on every line.

    Lines are split at the line breaks of `text` and wrapped to MAX_REPLY_LINE bytes; lines after
    MAX_REPLY_LINES are dropped. Control characters become spaces. `%` is doubled, because MTAs use
    the text as a format. An empty `xcode` becomes `4.0.0` or `5.0.0`, like the code.
    """
    prefix = f"{xcode or f'{code // 100}.0.0'} "
    room = MAX_REPLY_LINE - len(f"{code} {prefix}")
    lines = [
        piece
        for line in text.splitlines() or [""]
        for piece in _wrapped(to_wire(line.translate(_NO_CONTROLS)), room)
    ][:MAX_REPLY_LINES]
    separators = ["-"] * (len(lines) - 1) + [" "]
    return "\r\n".join(
        f"{code}{separator}{prefix}{line}".rstrip().replace("%", "%%")
        for separator, line in zip(separators, lines, strict=True)
    )


def _wrapped(line: bytes, room: int) -> Iterator[str]:
    """Yield the line in pieces of at most `room` bytes, cut at spaces if possible."""
    while len(line) > room:
        space = line.rfind(b" ", 1, room + 1)
        cut = space if space > 0 else _boundary(line, room)
        yield to_text(line[:cut])
        line = line[cut:].lstrip(b" ")
    yield to_text(line)


def _boundary(line: bytes, cut: int) -> int:
    """Return the last offset up to `cut` that does not split a UTF-8 character."""
    # A character has at most three continuation bytes; with more of them it is not valid UTF-8.
    for place in range(cut, cut - 4, -1):
        if line[place] & 0xC0 != 0x80:
            return place
    return cut
