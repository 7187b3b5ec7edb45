"""Poison: messages whose scans kill their workers. Pure.

After two deaths a message is not scanned again: for REMEMBERED_FOR seconds, the MTA's retries get
the policy's verdict at once. A message is identified by a digest of its envelope and content,
because each retry has another queue id.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from typing import NamedTuple

from sharded_milter.protocol.commands import Body, Eom, Header, Mail, Rcpt
from sharded_milter.protocol.wire import packets

# Seconds. MTAs retry after minutes at first, later after hours: an hour covers the first retries,
# and then the message is scanned again, in case that the operator has fixed the milter.
REMEMBERED_FOR = 3600.0

# Digests remembered at most, 32 bytes each; the oldest are dropped first.
MAX_REMEMBERED = 10_000

# Deaths that make a message poison. A single one may be the machine's fault.
POISON_DEATHS = 2

# Transcripts of the same message differ by at most so many bytes: queue ids and ports.
SIZE_TOLERANCE = 512

_CONTENT = frozenset(kind.letter[0] for kind in (Mail, Rcpt, Header, Body, Eom))


class _DeathRecord(NamedTuple):
    deaths: int
    at: float  # of the latest
    size: int


def digest(message: memoryview) -> bytes:
    """Return a digest of envelope and content, equal for two deliveries of the same message."""
    found = hashlib.sha256()
    for code, start, end in packets(message):
        if code in _CONTENT:
            found.update(bytes((code,)))
            found.update((end - start).to_bytes(4, "big"))
            found.update(message[start:end])
    return found.digest()


class Poison:
    """Counts the workers that each message has killed; `now` is a monotonic time in seconds."""

    def __init__(self) -> None:
        self._deaths: OrderedDict[bytes, _DeathRecord] = OrderedDict()
        self.sizes: Counter[int] = Counter()  # of messages, in units of SIZE_TOLERANCE

    def __len__(self) -> int:
        """Return the number of remembered messages."""
        return len(self._deaths)

    def is_likely(self, size: int, now: float) -> bool:
        """Return whether a message of about that size is remembered; others need no digest."""
        self._expire(now)
        unit = size // SIZE_TOLERANCE
        return any(self.sizes[near] for near in (unit - 1, unit, unit + 1))

    def record(self, message: bytes, size: int, now: float, deaths: int = 1) -> bool:
        """Add deaths to the message with that digest and size; return whether it is poison now."""
        deaths += self._drop(message)
        self._deaths[message] = _DeathRecord(deaths, now, size)
        self.sizes[size // SIZE_TOLERANCE] += 1
        if len(self._deaths) > MAX_REMEMBERED:
            self._drop(next(iter(self._deaths)))
        return deaths >= POISON_DEATHS

    def deaths(self, message: bytes, now: float) -> int:
        """Return the deaths remembered for the message with this digest."""
        self._expire(now)
        record = self._deaths.get(message)
        return record.deaths if record is not None else 0

    def _drop(self, message: bytes) -> int:
        record = self._deaths.pop(message, None)
        if record is None:
            return 0
        unit = record.size // SIZE_TOLERANCE
        self.sizes[unit] -= 1
        if not self.sizes[unit]:
            del self.sizes[unit]
        return record.deaths

    def _expire(self, now: float) -> None:
        while self._deaths:
            oldest = next(iter(self._deaths))
            if now - self._deaths[oldest].at < REMEMBERED_FOR:
                return
            self._drop(oldest)
