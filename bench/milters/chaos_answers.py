"""What the milters of `bench.chaos` have in common: what they answer to a message.

Everything in an answer can be made of its own message alone: the digests of its parts, and its
number, which is the local part of its sender. Its field X-Order says what else is wanted.
"""

import hashlib

ORDER = "X-Order"


def octets(text):
    """The bytes on the wire."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


class Seen:
    """A message as a milter has seen it so far."""

    def __init__(self, sender):
        self.number = sender.strip("<>").partition("@")[0]
        self._orders = []
        self._envelope, self._header, self._body = (hashlib.sha256() for _ in range(3))
        self.address(sender)

    def address(self, raw):
        """The sender, then each recipient that was not refused."""
        self._envelope.update(octets(raw) + b"\0")

    def field(self, name, value):
        """A field of the header."""
        self._header.update(octets(name) + b"\0" + octets(value) + b"\0")
        if octets(name) == ORDER.encode():
            self._orders = octets(value).decode("ascii").split()

    def body(self, chunk):
        """A piece of the body."""
        self._body.update(chunk)

    @property
    def mark(self):
        """The value of the field that an accepted message gets."""
        parts = (self._envelope, self._header, self._body)
        return " ".join([self.number, *(part.hexdigest()[:16] for part in parts)])

    @property
    def refusal(self):
        """The words of a refusal, empty where none is wanted."""
        return f"refused {self.number}" if "refuse" in self._orders else ""

    @property
    def recipient(self):
        """A further recipient, empty where none is wanted."""
        return f"<added-{self.number}@example.com>" if "recipient" in self._orders else ""

    @property
    def new_body(self):
        """A new body, empty where none is wanted."""
        sizes = [int(o.removeprefix("body=")) for o in self._orders if o.startswith("body=")]
        return f"{self.number} ".encode() * sizes[0] if sizes else b""


def refused_recipient(raw):
    """The words of a recipient's refusal; empty for one that is welcome."""
    local = raw.strip("<>").partition("@")[0]
    return f"not {local}" if local.startswith("no-") else ""
