"""Generated messages for load. They are seeded, so every run sends the same bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sharded_milter.testing.dialogue import Mail

SEED = 20261122

# The size of a usual message: the header of a mailing list, a body of one or two pages.
HEADERS = 20
BODY_BYTES = 10_000

# Bytes of random text, which is then repeated: a megabyte of random text would take seconds.
_BLOCK = 10_000


def generated(
    number: int = 0,
    *,
    headers: int = HEADERS,
    body: int = BODY_BYTES,
    recipients: Sequence[str] = ("b@example.com",),
) -> Mail:
    """Return message `number`; its text and its queue id differ from those of all others."""
    rng = random.Random(SEED + number)
    named = [
        ("From", "A <a@example.org>"),
        ("To", "B <b@example.com>"),
        ("Subject", f"Message {number}"),
        ("Message-ID", f"<{number}@example.org>"),
        ("Date", "Sun, 22 Nov 2026 12:00:00 +0000"),
    ]
    more = [
        (f"X-Field-{n}", "".join(rng.choices("abcdef ", k=50))) for n in range(headers - len(named))
    ]
    header = "".join(f"{name}: {value}\r\n" for name, value in [*named, *more][:headers])
    block = "".join(rng.choices("abcdefghij klmnop\n", k=min(body, _BLOCK))).replace("\n", "\r\n")
    text = (block * (1 + body // max(1, len(block))))[:body]
    raw = f"{header}\r\n{text}".encode("ascii")
    return Mail(raw, "a@example.org", recipients, f"4F3A2B{number:04X}")
