"""Poison: messages that take their workers down. Pure, but for the copies that `Keep` writes.

A message whose scan has died twice is not scanned again: the MTA's retries get the policy's
verdict at once, for REMEMBERED_FOR. Messages are known by a digest of envelope and content, since
each retry has another queue id.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sharded_milter.protocol.commands import Body, Eom, Header, Mail, Rcpt
from sharded_milter.protocol.wire import packets

# MTAs retry after minutes at first, later after hours; an hour catches the storm at the start
# and lets a message through again once the operator has mended the milter.
REMEMBERED_FOR = 3600.0

# Digests that are remembered at the most, 32 bytes each; the oldest go first.
MAX_REMEMBERED = 10_000

# Deaths that make a message poison. One may be the machine's fault.
DEADLY = 2

# Transcripts of the same message differ by this much at the most, bytes: queue ids and ports.
SLACK = 512

_CONTENT = frozenset(kind.letter[0] for kind in (Mail, Rcpt, Header, Body, Eom))


class _Record(NamedTuple):
    deaths: int
    at: float  # of the latest
    size: int


def digest(message: memoryview) -> bytes:
    """What two deliveries of the same message have in common: envelope and content."""
    found = hashlib.sha256()
    for code, start, end in packets(message):
        if code in _CONTENT:
            found.update(bytes((code,)))
            found.update((end - start).to_bytes(4, "big"))
            found.update(message[start:end])
    return found.digest()


class Poison:
    """How often messages have killed; `now` is any clock that only runs forward, in seconds."""

    def __init__(self) -> None:
        self._deaths: OrderedDict[bytes, _Record] = OrderedDict()
        self.sizes: Counter[int] = Counter()  # remembered messages by size, in units of SLACK

    def __len__(self) -> int:
        """How many messages are remembered."""
        return len(self._deaths)

    def is_likely(self, size: int, now: float) -> bool:
        """Whether a message of about that size is remembered: others need no digest."""
        self._forget(now)
        unit = size // SLACK
        return any(self.sizes[near] for near in (unit - 1, unit, unit + 1))

    def died(self, message: bytes, size: int, now: float, deaths: int = 1) -> bool:
        """A message of that digest and size has killed so often; whether it is poison now."""
        deaths += self._drop(message)
        self._deaths[message] = _Record(deaths, now, size)
        self.sizes[size // SLACK] += 1
        if len(self._deaths) > MAX_REMEMBERED:
            self._drop(next(iter(self._deaths)))
        return deaths >= DEADLY

    def deaths(self, message: bytes, now: float) -> int:
        """How often the message with this digest has killed of late."""
        self._forget(now)
        record = self._deaths.get(message)
        return record.deaths if record is not None else 0

    def _drop(self, message: bytes) -> int:
        record = self._deaths.pop(message, None)
        if record is None:
            return 0
        unit = record.size // SLACK
        self.sizes[unit] -= 1
        if not self.sizes[unit]:
            del self.sizes[unit]
        return record.deaths

    def _forget(self, now: float) -> None:
        while self._deaths:
            oldest = next(iter(self._deaths))
            if now - self._deaths[oldest].at < REMEMBERED_FOR:
                return
            self._drop(oldest)


class Keep:
    """A directory for copies of poisonous messages, under a quota in bytes."""

    def __init__(self, folder: Path, quota: int) -> None:
        self._folder = folder
        self._quota = quota

    def save(self, name: str, message: memoryview) -> Path | None:
        """Writes the message as `name`.eml and returns its path; None when the quota is used up.

        Raises OSError where the system refuses.
        """
        lines = list(as_eml(message))
        used = sum(entry.stat().st_size for entry in os.scandir(self._folder) if entry.is_file())
        if used + sum(map(len, lines)) > self._quota:
            return None
        path = self._folder / f"{name}.eml"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.writelines(lines)
        return path


def as_eml(message: memoryview) -> Iterator[bytes]:
    """The message of a transcript as an RFC 5322 file, its envelope in fields of its own."""
    envelope: list[bytes] = []
    header: list[bytes] = []
    body: list[bytes] = []
    for code, start, end in packets(message):
        payload = bytes(message[start:end])
        strings = payload.split(b"\0")
        if code == Mail.letter[0]:
            envelope.append(b"X-Envelope-Sender: " + strings[0] + b"\r\n")
        elif code == Rcpt.letter[0]:
            envelope.append(b"X-Envelope-Recipient: " + strings[0] + b"\r\n")
        elif code == Header.letter[0]:
            blank = b"" if strings[1][:1] in (b" ", b"\t") else b" "
            value = strings[1].replace(b"\n", b"\r\n")
            header.append(strings[0] + b":" + blank + value + b"\r\n")
        elif code in (Body.letter[0], Eom.letter[0]):
            body.append(payload)
    parts: Iterable[list[bytes]] = (envelope, header, [b"\r\n"], body)
    for part in parts:
        yield from part
