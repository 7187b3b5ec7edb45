"""Encode an author's verdict as reply packets.

If Postfix and Sendmail treat a packet differently, another packet is used that has the same effect
in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sharded_milter.api import verdicts
from sharded_milter.api.verdicts import Action, Verdict
from sharded_milter.protocol import replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Protocol
from sharded_milter.protocol.wire import MAX_CHUNK

# An index that no header has, so both MTAs add the field at the end. Sendmail reads a larger number
# as a negative one, and adds the field at the top.
LAST = 0x7FFFFFFF

_CONTINUE, _ACCEPT, _DISCARD = (
    kind().encode() for kind in (replies.Continue, replies.Accept, replies.Discard)
)


def to_replies(verdict: Verdict, protocol: Protocol, seen: Sequence[str] | None = None) -> bytes:
    """Return the packets of a checked verdict: the actions, then the final reply.

    `seen` are the names of the header fields that the callback got; None if they do not matter.
    """
    match verdict:
        case None:
            return _CONTINUE
        case verdicts.Accept(actions=actions):
            packets = action_packets(actions, protocol, seen)
            return b"".join([*(packet.encode() for packet in packets), _ACCEPT])
        case verdicts.Discard():
            return _DISCARD
        case refusal:
            text = replies.reply_text(refusal.code, refusal.xcode, refusal.text)
            return replies.ReplyCode(text).encode()


def action_packets(
    actions: Iterable[Action], protocol: Protocol, seen: Sequence[str] | None = None
) -> Iterator[Packet]:
    """Yield the packets of an author's actions.

    Indexes count in the header that the callback got. Changes come first, then deletions from the
    highest index down, because Postfix counts again after each deletion and Sendmail does not;
    then all other actions in their order. A deletion that is given twice is sent once: Postfix
    would delete the next field too. A change of a missing field becomes an addition: Sendmail
    would insert it before the first field of that name and count it.
    """
    if seen is not None:
        actions = _with_additions(actions, Counter(name.lower() for name in seen))
    space = " " if protocol & Protocol.HDR_LEADSPC else ""
    deleted = set()
    for action in sorted(actions, key=_rank):
        if isinstance(action, verdicts.DeleteHeader):
            field = action.name.lower(), action.index
            if field in deleted:
                continue
            deleted.add(field)
        yield from _PACKETS[type(action)](action, space)


def _with_additions(actions: Iterable[Action], count: Mapping[str, int]) -> Iterator[Action]:
    for action in actions:
        match action:
            case verdicts.ChangeHeader(name, index, value) if index > count[name.lower()]:
                yield verdicts.AddHeader(name, value)
            case _:
                yield action


def _rank(action: Action) -> tuple[int, int]:
    match action:
        case verdicts.ChangeHeader():
            return 0, 0
        case verdicts.DeleteHeader(index=index):
            return 1, -index
        case _:
            return 2, 0


def _value(text: str, space: str) -> str:
    # Both MTAs fold at a bare LF; a CR would stay in the message.
    return space + text.replace("\r\n", "\n").replace("\r", "\n")


def _bracketed(address: str) -> str:
    return address if address.startswith("<") else f"<{address}>"


def _parameters(esmtp: tuple[str, ...]) -> tuple[str, ...]:
    return (" ".join(esmtp),) if esmtp else ()


def _add_header(action: verdicts.AddHeader, space: str) -> Iterator[Packet]:
    # With ADDHEADER, Sendmail would insert it before the first field of that name.
    yield replies.InsertHeader(LAST, action.name, _value(action.value, space))


def _insert_header(action: verdicts.InsertHeader, space: str) -> Iterator[Packet]:
    yield replies.InsertHeader(action.index, action.name, _value(action.value, space))


def _change_header(action: verdicts.ChangeHeader, space: str) -> Iterator[Packet]:
    yield replies.ChangeHeader(action.index, action.name, _value(action.value, space))


def _delete_header(action: verdicts.DeleteHeader, space: str) -> Iterator[Packet]:
    yield replies.ChangeHeader(action.index, action.name, "")


def _add_recipient(action: verdicts.AddRecipient, space: str) -> Iterator[Packet]:
    address = _bracketed(action.address)
    if action.esmtp:
        yield replies.AddRecipientPar(address, _parameters(action.esmtp))
    else:
        yield replies.AddRecipient(address)


def _delete_recipient(action: verdicts.DeleteRecipient, space: str) -> Iterator[Packet]:
    yield replies.DeleteRecipient(_bracketed(action.address))


def _change_sender(action: verdicts.ChangeSender, space: str) -> Iterator[Packet]:
    yield replies.ChangeSender(_bracketed(action.address), _parameters(action.esmtp))


def _replace_body(action: verdicts.ReplaceBody, space: str) -> Iterator[Packet]:
    for start in range(0, len(action.body) or 1, MAX_CHUNK):
        yield replies.ReplaceBody(action.body[start : start + MAX_CHUNK])


def _quarantine(action: verdicts.Quarantine, space: str) -> Iterator[Packet]:
    yield replies.Quarantine(action.reason)


_PACKETS: dict[type[Action], Callable[[Any, str], Iterator[Packet]]] = {
    verdicts.AddHeader: _add_header,
    verdicts.InsertHeader: _insert_header,
    verdicts.ChangeHeader: _change_header,
    verdicts.DeleteHeader: _delete_header,
    verdicts.AddRecipient: _add_recipient,
    verdicts.DeleteRecipient: _delete_recipient,
    verdicts.ChangeSender: _change_sender,
    verdicts.ReplaceBody: _replace_body,
    verdicts.Quarantine: _quarantine,
}
