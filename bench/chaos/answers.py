"""Which answer is a message's own, and whose it is where it is not. PURE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.chaos.messages import PARTS, Message
from sharded_milter.protocol import replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.text import to_wire


class Wrong(Exception):
    """An answer that must not have come: what the message got, and whose it is."""


@dataclass
class Answer:
    """A final reply, and the changes before it."""

    final: Packet
    changes: list[Packet] = field(default_factory=list)

    @property
    def text(self) -> bytes:
        """The words of a refusal; empty where the MTA has to find some."""
        return to_wire(self.final.text) if isinstance(self.final, replies.ReplyCode) else b""

    @property
    def temporary(self) -> bool:
        """Whether the MTA is to try again."""
        return isinstance(self.final, replies.TempFail) or self.text.startswith(b"4")

    @property
    def ends_connection(self) -> bool:
        """Whether the MTA leaves after it."""
        return self.text.startswith(b"421")

    @property
    def proceeds(self) -> bool:
        """Whether it says go on, and nothing else."""
        return isinstance(self.final, replies.Continue) and not self.changes

    def __str__(self) -> str:
        word = type(self.final).__name__.lower()
        changes = [type(change).__name__ for change in self.changes]
        return " ".join([word, self.text.decode("ascii", "replace"), *changes]).strip()


class Owners:
    """Which message has which digest, of all that were sent to their end."""

    def __init__(self) -> None:
        self._numbers: dict[str, str] = {}

    def add(self, message: Message) -> None:
        """It is about to get an answer."""
        for digest in message.digests().values():
            self._numbers[digest] = message.number

    def of(self, digest: str) -> str:
        """Its number, in words."""
        number = self._numbers.get(digest)
        return f"message {number}" if number else f"no message of this run ({digest})"


def check_recipient(answer: Answer, recipient: bytes) -> bool:
    """Whether the recipient was accepted; raises Wrong for an answer that is not its own."""
    local = recipient.strip(b"<>").partition(b"@")[0]
    if answer.proceeds and local.startswith(b"to-"):
        return True
    if not answer.changes and answer.temporary:
        return False
    if local.startswith(b"no-") and answer.text == b"550 5.1.1 not " + local:
        return False
    raise Wrong(f"got for the recipient {local.decode()}: {answer}")


def check_end(answer: Answer, message: Message, names: Sequence[str], owners: Owners) -> str:
    """`accepted`, `refused` or `tempfail`: what became of a message at its end.

    `names` are the fields that its milters add, one each. Raises Wrong for whatever is not of this
    message, and for what is missing.
    """
    if answer.temporary and not answer.changes:
        return "tempfail"
    _check_marks(_marks(answer), message, owners)
    if message.refused:
        own = b"550 5.7.1 refused " + message.number.encode()
        if answer.text == own and not answer.changes:
            return "refused"
        raise Wrong(f"got {answer}, not {own.decode()}")
    if not isinstance(answer.final, replies.Continue | replies.Accept):
        raise Wrong(f"got {answer}")
    if sorted(name for name, _ in _marks(answer)) != sorted(names):
        raise Wrong(f"got {answer} with the fields {_marks(answer)}, not {sorted(names)}")
    _check_rest(answer.changes, message)
    return "accepted"


def _marks(answer: Answer) -> list[tuple[str, str]]:
    kinds = (replies.InsertHeader, replies.AddHeader)
    return [(c.name, c.value.strip()) for c in answer.changes if isinstance(c, kinds)]


def _check_marks(marks: Sequence[tuple[str, str]], message: Message, owners: Owners) -> None:
    own = message.digests()
    for name, mark in marks:
        number, *digests = mark.split()
        if number != message.number:
            raise Wrong(f"got the answer of message {number} ({name})")
        for part, digest in zip(PARTS, digests, strict=True):
            if digest != own[part]:
                raise Wrong(f"got an answer that has seen the {part} of {owners.of(digest)}")


def _check_rest(changes: Sequence[Packet], message: Message) -> None:
    """The changes besides the fields."""
    kinds = (replies.InsertHeader, replies.AddHeader, replies.ReplaceBody, replies.AddRecipient)
    if others := [change for change in changes if not isinstance(change, kinds)]:
        raise Wrong(f"got changes that nobody asked for: {others}")
    body = b"".join(c.chunk for c in changes if isinstance(c, replies.ReplaceBody))
    if body != message.new_body:
        whose = body[:60].split(b" ")[0].decode("ascii", "replace") or "nobody"
        raise Wrong(
            f"got the new body of message {whose}, {len(body)} bytes, not its own,"
            f" {len(message.new_body)} bytes"
        )
    added = [to_wire(c.recipient) for c in changes if isinstance(c, replies.AddRecipient)]
    if added != [message.new_recipient][: bool(message.new_recipient)]:
        raise Wrong(f"got the new recipients {added}")
