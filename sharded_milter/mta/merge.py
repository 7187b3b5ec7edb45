"""Merges several milters' answers to the same question into one. Pure.

Each milter saw the original message. Their changes are all made, in the order in which the milters
were named. A refusal or a discard is not merged: it is the answer by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sharded_milter.protocol.packets import INT_BYTES
from sharded_milter.protocol.replies import (
    Accept,
    AddHeader,
    AddRecipient,
    AddRecipientPar,
    ChangeHeader,
    Continue,
    DeleteRecipient,
    InsertHeader,
    ReplaceBody,
)
from sharded_milter.protocol.wire import LETTER, PAYLOAD, packets

_CONTINUE, _ACCEPT = Continue().encode(), Accept().encode()

# The final replies after which the other milters' answers still count. After ACCEPT a milter is
# not asked again.
ACCEPT = _ACCEPT[LETTER]
GO_ON = frozenset((_CONTINUE[LETTER], ACCEPT))
_BODY = ReplaceBody.letter[0]
_CHANGE = ChangeHeader.letter[0]
_INDEX = PAYLOAD + INT_BYTES

# Where the name of a header field begins in the packets that add one.
_ADDS = {AddHeader.letter[0]: PAYLOAD, InsertHeader.letter[0]: _INDEX}

# Actions that must be sent once if two milters want the same: the second would add a recipient
# again, or fail.
_ONCE = frozenset(kind.letter[0] for kind in (AddRecipient, AddRecipientPar, DeleteRecipient))


def merge(answers: Sequence[bytes], *, accept: bool) -> tuple[bytes, int]:
    """Return the merged answer, and the number of replaced bodies that were left out.

    `answers` are in the milters' order; none refuses or discards. Only the first new body is used.
    `accept` is True if no milter must be asked again.
    """
    lists = [[packet for packet in _split(answer) if packet[LETTER] not in GO_ON]
             for answer in answers]  # fmt: skip
    with_body = [at for at, actions in enumerate(lists) if any(map(_is_body, actions))]
    for at in with_body[1:]:
        lists[at] = [packet for packet in lists[at] if not _is_body(packet)]
    actions = _combine(lists)
    return b"".join(actions) + (_ACCEPT if accept else _CONTINUE), len(with_body[1:])


def _split(answer: bytes) -> Iterator[bytes]:
    for _, start, end in packets(answer):
        yield answer[start - PAYLOAD : end]


def _is_body(packet: bytes) -> bool:
    return packet[LETTER] == _BODY


def _combine(lists: Sequence[list[bytes]]) -> list[bytes]:
    """Return all actions in the milters' order, except for changes of header fields.

    An index refers to the header that all milters saw. So if several milters act, changed fields
    come first, then deleted ones from the highest index down, because Postfix counts the fields
    again after each deletion. If a milter changes a field that it has added itself, its action
    keeps its place.
    """
    acting = [actions for actions in lists if actions]
    if len(acting) < 2:
        return acting[0] if acting else []
    changes: list[bytes] = []
    deletions: dict[tuple[bytes, bytes], bytes] = {}
    rest: list[bytes] = []
    latest: dict[bytes, bytes] = {}  # the other milters' last action for each recipient
    for actions in acting:
        added: set[bytes] = set()
        own: dict[bytes, bytes] = {}
        for packet in actions:
            letter = packet[LETTER]
            if letter in _ADDS:
                added.add(_name(packet, _ADDS[letter]))
            if letter == _CHANGE and _name(packet, _INDEX) not in added:
                if packet.endswith(b"\0\0"):
                    deletions[_field(packet)] = packet
                else:
                    changes.append(packet)
            elif letter not in _ONCE:
                rest.append(packet)
            else:
                recipient = _name(packet, PAYLOAD)
                if latest.get(recipient) != packet or recipient in own:
                    rest.append(packet)
                own[recipient] = packet
        latest |= own
    down = sorted(deletions.items(), key=lambda item: item[0], reverse=True)
    return [*changes, *(packet for _, packet in down), *rest]


def _name(packet: bytes, start: int) -> bytes:
    return packet[start : packet.index(0, start)].lower()


def _field(packet: bytes) -> tuple[bytes, bytes]:
    """Return index and name of the header field; index 0 means the first, as 1 does."""
    index = packet[PAYLOAD:_INDEX]
    first = (1).to_bytes(INT_BYTES, "big")
    return max(index, first), _name(packet, _INDEX)
