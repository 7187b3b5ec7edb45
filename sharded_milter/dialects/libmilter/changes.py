"""The changes of a message by libmilter's calls: packets, in the order of the calls.

Only the packets of a new body are moved together: Postfix closes the connection if another packet
comes between two of them.
"""

from __future__ import annotations

from sharded_milter.errors import CallRefused
from sharded_milter.protocol import replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import LEGAL
from sharded_milter.protocol.stages import NO_ACTIONS
from sharded_milter.protocol.wire import MAX_CHUNK

_HIGHEST_INDEX = 0x7FFFFFFF


class Changes:
    """The changes of the current message.

    `granted` are the actions that were negotiated with the MTA, `space` is the prefix of header
    values. Each method raises CallRefused, and changes nothing, if its action was not negotiated
    or its arguments cannot be sent; `call` is the name of the author's call, for the message.
    """

    def __init__(self) -> None:
        self.granted = NO_ACTIONS
        self.space = ""
        self._packets: list[bytes] = []
        self._body: bytearray | None = None
        self._body_place = 0

    def clear(self) -> None:
        """Forget the changes; a new message begins."""
        self._packets.clear()
        self._body = None

    def packets(self) -> bytes:
        """Return all packets, in order."""
        body = self._body
        if body is None:
            return b"".join(self._packets)
        starts = range(0, len(body) or 1, MAX_CHUNK)
        run = (replies.ReplaceBody(bytes(body[at : at + MAX_CHUNK])).encode() for at in starts)
        place = self._body_place
        return b"".join([*self._packets[:place], *run, *self._packets[place:]])

    def _add(self, call: str, packet: Packet) -> None:
        self._check_granted(call, packet)
        payload = _payload(call, packet)
        if not LEGAL[packet.letter[0]].payload.fullmatch(payload):
            raise CallRefused(
                f"{call}: {payload[:80]!r} cannot be sent: a name, address or reason must be one"
                " line and not empty, and no value may have a NUL"
            )
        if len(payload) > MAX_CHUNK:
            raise CallRefused(
                f"{call}: the values have {len(payload)} bytes; a packet takes {MAX_CHUNK}"
            )
        self._packets.append(packet.encode())

    def _check_granted(self, call: str, packet: Packet | type[Packet]) -> None:
        action = LEGAL[packet.letter[0]].action
        if action & ~self.granted:
            raise CallRefused(f"{call}: the action {action.name} was not negotiated with the MTA")

    def add_header(self, call: str, name: str, value: str) -> None:
        """Do smfi_addheader: add a field at a position that the MTA chooses."""
        self._add(call, replies.AddHeader(_text(call, name), self._value(call, value)))

    def insert_header(self, call: str, index: int, name: str, value: str) -> None:
        """Do smfi_insheader: insert a field; index 0 is the top."""
        _check_index(call, index)
        self._add(call, replies.InsertHeader(index, _text(call, name), self._value(call, value)))

    def change_header(self, call: str, name: str, index: int, value: str | None) -> None:
        """Do smfi_chgheader: change the index-th field `name`, from 1; delete it if no value."""
        _check_index(call, index)
        text = self._value(call, value) if value else ""
        self._add(call, replies.ChangeHeader(index, _text(call, name), text))

    def change_sender(self, call: str, sender: str, esmtp: str | None) -> None:
        """Do smfi_chgfrom: change the envelope sender."""
        parameters = (_text(call, esmtp),) if esmtp else ()
        self._add(call, replies.ChangeSender(_text(call, sender), parameters))

    def add_recipient(self, call: str, recipient: str) -> None:
        """Do smfi_addrcpt: add a recipient."""
        self._add(call, replies.AddRecipient(_text(call, recipient)))

    def add_recipient_with(self, call: str, recipient: str, esmtp: str | None) -> None:
        """Do smfi_addrcpt_par: add a recipient with ESMTP parameters."""
        parameters = (_text(call, esmtp),) if esmtp else ()
        self._add(call, replies.AddRecipientPar(_text(call, recipient), parameters))

    def delete_recipient(self, call: str, recipient: str) -> None:
        """Do smfi_delrcpt: delete a recipient."""
        self._add(call, replies.DeleteRecipient(_text(call, recipient)))

    def replace_body(self, call: str, chunk: bytes) -> None:
        """Do smfi_replacebody: append a chunk to the new body."""
        self._check_granted(call, replies.ReplaceBody)
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise CallRefused(f"{call}: the body must be bytes, not {type(chunk).__name__}")
        if self._body is None:
            self._body, self._body_place = bytearray(), len(self._packets)
        self._body += chunk

    def quarantine(self, call: str, reason: str) -> None:
        """Do smfi_quarantine: hold the message."""
        self._add(call, replies.Quarantine(_text(call, reason)))

    def _value(self, call: str, value: str) -> str:
        # Both MTAs fold at a bare LF; a CR would stay in the message.
        text = _text(call, value).replace("\r\n", "\n").replace("\r", "\n")
        return self.space + text


def _payload(call: str, packet: Packet) -> bytes:
    try:
        return packet.payload()
    except UnicodeEncodeError as error:
        raise CallRefused(f"{call}: {error.object[:80]!r} cannot be encoded as UTF-8") from None


def _text(call: str, value: str) -> str:
    if not isinstance(value, str):
        raise CallRefused(f"{call}: {value!r:.80} is not a str")
    return value


def _check_index(call: str, index: int) -> None:
    if not isinstance(index, int) or not 0 <= index <= _HIGHEST_INDEX:
        raise CallRefused(f"{call}: index {index!r:.40} is not between 0 and {_HIGHEST_INDEX}")
