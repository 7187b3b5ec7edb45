"""One answer out of several milters' answers to the same question. Pure.

Each milter saw the original message. A refusal or a discard is the answer by itself; else the
changes of all are made, in the order in which the milters were named.
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

# The final replies after which others are still heard; ACCEPT says that a milter wants no more.
ACCEPT = _ACCEPT[LETTER]
GO_ON = frozenset((_CONTINUE[LETTER], ACCEPT))
_BODY = ReplaceBody.letter[0]
_CHANGE = ChangeHeader.letter[0]
_INDEX = PAYLOAD + INT_BYTES

# Where the name of a header field begins in the packets that add one.
_ADDS = {AddHeader.letter[0]: PAYLOAD, InsertHeader.letter[0]: _INDEX}

# Said twice by two milters they would be done twice, or fail the second time.
_ONCE = frozenset(kind.letter[0] for kind in (AddRecipient, AddRecipientPar, DeleteRecipient))


def merged(answers: Sequence[bytes], *, accept: bool) -> tuple[bytes, int]:
    """The answer that all milters give together, and how many new bodies were left out.

    None of `answers` refuses or discards; they are in the milters' order. Only the first new
    body is taken. `accept` says that no milter wants to hear more.
    """
    lists = [[packet for packet in _cut(answer) if packet[LETTER] not in GO_ON]
             for answer in answers]  # fmt: skip
    with_body = [at for at, actions in enumerate(lists) if any(map(_is_body, actions))]
    for at in with_body[1:]:
        lists[at] = [packet for packet in lists[at] if not _is_body(packet)]
    actions = _in_order(lists)
    return b"".join(actions) + (_ACCEPT if accept else _CONTINUE), len(with_body[1:])


def _cut(answer: bytes) -> Iterator[bytes]:
    for _, start, end in packets(answer):
        yield answer[start - PAYLOAD : end]


def _is_body(packet: bytes) -> bool:
    return packet[LETTER] == _BODY


def _in_order(lists: Sequence[list[bytes]]) -> list[bytes]:
    """All actions, each milter's behind those of the milters before it.

    An index means a header field as every milter saw it. So where several milters act, changed
    fields go first, then deleted ones from the highest index down, because Postfix counts anew
    after each; a milter that changes a field which it has added itself means that one, and is
    left alone.
    """
    acting = [actions for actions in lists if actions]
    if len(acting) < 2:
        return acting[0] if acting else []
    changes: list[bytes] = []
    deletions: dict[tuple[bytes, bytes], bytes] = {}
    rest: list[bytes] = []
    said: dict[bytes, bytes] = {}  # what other milters have said last of a recipient
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
                if said.get(recipient) != packet or recipient in own:
                    rest.append(packet)
                own[recipient] = packet
        said |= own
    down = sorted(deletions.items(), key=lambda item: item[0], reverse=True)
    return [*changes, *(packet for _, packet in down), *rest]


def _name(packet: bytes, start: int) -> bytes:
    return packet[start : packet.index(0, start)].lower()


def _field(packet: bytes) -> tuple[bytes, bytes]:
    """Which header field is meant: index 0 means the first, as 1 does."""
    index = packet[PAYLOAD:_INDEX]
    first = (1).to_bytes(INT_BYTES, "big")
    return max(index, first), _name(packet, _INDEX)
