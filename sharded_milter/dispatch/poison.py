"""Poison: messages that take their workers down. Pure, but for the copies that `Keep` writes.

A message whose scan has died twice is not scanned again: the MTA's retries get the policy's
verdict at once, for REMEMBERED_FOR. Messages are known by a digest of envelope and content, since
each retry has another queue id.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
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

# How the name of a copy ends that is being written, and after how many seconds such a file is one
# that a killed process has left behind: writing takes seconds.
PARTIAL = ".partial"
LEFT_BEHIND = 600.0

_ENVELOPE = {
    Mail.letter[0]: b"X-Envelope-Sender: ",
    Rcpt.letter[0]: b"X-Envelope-Recipient: ",
}
_HEADER = (Header.letter[0],)
_TEXT = (Body.letter[0], Eom.letter[0])

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
    """A directory for copies of poisonous messages, under a quota in bytes.

    A copy is complete or absent, also after a power failure. `run` has a function called, in
    another thread where a disk must not hold anything up; without it the function is called now.
    """

    def __init__(
        self,
        folder: Path,
        quota: int,
        run: Callable[[Callable[[], None]], None] = lambda function: function(),
    ) -> None:
        self.run = run
        self._folder = folder
        self._quota = quota
        self._turn = threading.Lock()  # so that two copies do not use the same room

    def save(self, name: str, message: memoryview) -> Path | None:
        """Writes the message as `name`.eml and returns its path; None when the quota is used up.

        Raises OSError where the system refuses; then nothing is left of the copy.
        """
        with self._turn:
            size = sum(map(len, as_eml(message)))
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if _used(folder) + size > self._quota:
                    return None
                _write(folder, f"{name}.eml", as_eml(message))
            finally:
                os.close(folder)
        return self._folder / f"{name}.eml"


def _used(folder: int) -> int:
    """The bytes of all files in a directory, less what was begun and left behind there."""
    used = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process has removed it meanwhile
                found = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(found.st_mode):
                    continue
                if entry.name.endswith(PARTIAL) and time.time() - found.st_mtime > LEFT_BEHIND:
                    os.unlink(entry.name, dir_fd=folder)
                else:
                    used += found.st_size
    return used


def _write(folder: int, name: str, pieces: Iterable[bytes]) -> None:
    """Writes a file of that name, which replaces whatever had it: a link is not followed."""
    partial = f".{name}.{os.getpid()}{PARTIAL}"
    with suppress(FileNotFoundError):  # of an earlier process with this number
        os.unlink(partial, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(partial, flags, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(descriptor)
        os.rename(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(partial, dir_fd=folder)
        raise
    os.fsync(folder)


def as_eml(message: memoryview) -> Iterator[bytes]:
    """The message of a transcript as an RFC 5322 file, its envelope in fields of its own.

    Comes in pieces, the largest of which is a packet.
    """
    for code, payload in _payloads(message, _ENVELOPE):
        yield _ENVELOPE[code] + payload.partition(b"\0")[0] + b"\r\n"
    for _, payload in _payloads(message, _HEADER):
        name, value = payload.split(b"\0")[:2]
        blank = b"" if value[:1] in (b" ", b"\t") else b" "
        yield name + b":" + blank + value.replace(b"\n", b"\r\n") + b"\r\n"
    yield b"\r\n"
    for _, payload in _payloads(message, _TEXT):
        yield payload


def _payloads(message: memoryview, codes: Container[int]) -> Iterator[tuple[int, bytes]]:
    for code, start, end in packets(message):
        if code in codes:
            yield code, bytes(message[start:end])
