"""Made-up messages, each unlike any other. PURE: a message is the same for the same name."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

# A body beyond 48 KB travels to a worker in memory of its own, and so does a large answer; the
# sizes lie on both sides of that, and of the 65,535 bytes of a packet.
BODIES = (0, 1, 500, 5_000, 30_000, 47_000, 50_000, 66_000, 150_000)
NEW_BODIES = (1, 10_000, 47_000, 66_000, 150_000)

RECIPIENTS = (1, 1, 1, 2, 3, 12)
FIELDS = (0, 1, 5, 20, 60)

# Shares of the messages.
REFUSED_RECIPIENTS = 0.15
REFUSED = 0.05
NEW_RECIPIENT = 0.1
NEW_BODY = 0.3
FOLDED = 0.2

# Octets of a field's value: letters, UTF-8, and what is none.
_ALPHABET = b"abcdefghijklmnopqrstuvwxyz \xc3\xa9\xff"
_VALUES = bytes(_ALPHABET[octet % len(_ALPHABET)] for octet in range(256))

_RANDOM_BLOCK = 4_096

PARTS = ("envelope", "header", "body")


@dataclass
class Message:
    """A message and its envelope, and what its answer must bring; `accepted` grows as it is sent.

    `number` is in every part of it. `fields` are without the blank behind the colon.
    """

    number: str
    sender: bytes
    recipients: list[bytes]
    fields: list[tuple[bytes, bytes]]
    body: bytes
    refused: bool = False
    new_recipient: bytes = b""
    new_body: bytes = b""
    accepted: list[bytes] = field(default_factory=list)

    def digests(self) -> dict[str, str]:
        """The digest of each part, as the milters write it."""
        addresses = b"".join(address + b"\0" for address in (self.sender, *self.accepted))
        header = b"".join(name + b"\0" + value + b"\0" for name, value in self.fields)
        content = (addresses, header, self.body)
        digests = (hashlib.sha256(part).hexdigest()[:16] for part in content)
        return dict(zip(PARTS, digests, strict=True))


def made(number: str) -> Message:
    """The message of that number."""
    rnd = random.Random(number)
    message = Message(
        number,
        sender=f"<{number}@{rnd.choice(['a', 'b', 'c' * 200])}.example>".encode(),
        recipients=[_recipient(rnd, number, at) for at in range(rnd.choice(RECIPIENTS))],
        fields=[(b"Message-Id", f"<{number}>".encode())],
        body=_body(rnd, number),
        refused=rnd.random() < REFUSED,
    )
    message.fields += [(b"X-%d" % at, _value(rnd)) for at in range(rnd.choice(FIELDS))]
    orders = ["refuse"] if message.refused else []
    if rnd.random() < NEW_RECIPIENT:
        orders.append("recipient")
        message.new_recipient = f"<added-{number}@example.com>".encode()
    if rnd.random() < NEW_BODY:
        times = 1 + rnd.choice(NEW_BODIES) // (len(number) + 1)
        orders.append(f"body={times}")
        message.new_body = f"{number} ".encode() * times
    message.fields.append((b"X-Order", " ".join(orders or ["none"]).encode()))
    return message


def _recipient(rnd: random.Random, number: str, at: int) -> bytes:
    word = "no" if rnd.random() < REFUSED_RECIPIENTS else "to"
    return f"<{word}-{number}-{at}@example.com>".encode()


def _value(rnd: random.Random) -> bytes:
    fold = b"\n\t" if rnd.random() < FOLDED else b""
    return b"v" + rnd.randbytes(rnd.randint(1, 60)).translate(_VALUES) + b"e" + fold + b"end"


def _body(rnd: random.Random, number: str) -> bytes:
    size = rnd.choice((*BODIES, rnd.randint(0, BODIES[-1])))
    block = number.encode() + b" " + rnd.randbytes(min(size, _RANDOM_BLOCK))
    return (block * (1 + size // _RANDOM_BLOCK))[:size]
