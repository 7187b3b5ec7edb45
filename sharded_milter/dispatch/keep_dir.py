"""Copies of poison messages in a directory (--keep-dir), under a quota in bytes."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from sharded_milter.protocol.commands import Body, Eom, Header, Mail, Rcpt
from sharded_milter.protocol.wire import packets

# The suffix of a copy that is being written, and the age in seconds after which such a file was
# left by a killed process: writing takes seconds.
PARTIAL = ".partial"
ABANDONED_AFTER = 600.0

_ENVELOPE = {
    Mail.letter[0]: b"X-Envelope-Sender: ",
    Rcpt.letter[0]: b"X-Envelope-Recipient: ",
}
_HEADER = (Header.letter[0],)
_TEXT = (Body.letter[0], Eom.letter[0])


class KeepDir:
    """A directory for copies of poison messages; their sizes add up to at most `quota` bytes.

    A copy is complete or absent, also after a power failure. `run` calls a function, in another
    thread where a slow disk must not block the caller; the default calls it at once.
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
        self._lock = threading.Lock()  # two copies must not count the same free space

    def save(self, name: str, message: memoryview) -> Path | None:
        """Write the message as `name`.eml; return its path, or None when the quota is used up.

        Raise OSError, and leave no part of the copy, where the system refuses.
        """
        with self._lock:
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
    """Return the bytes of all files in a directory; remove the abandoned partial ones."""
    used = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process has removed it meanwhile
                found = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(found.st_mode):
                    continue
                if entry.name.endswith(PARTIAL) and time.time() - found.st_mtime > ABANDONED_AFTER:
                    os.unlink(entry.name, dir_fd=folder)
                else:
                    used += found.st_size
    return used


def _write(folder: int, name: str, chunks: Iterable[bytes]) -> None:
    """Write a file of that name, replacing any file or link that has it."""
    partial = f".{name}.{os.getpid()}{PARTIAL}"
    with suppress(FileNotFoundError):  # left by an earlier process with this process id
        os.unlink(partial, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(partial, flags, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(descriptor)
        os.rename(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(partial, dir_fd=folder)
        raise
    os.fsync(folder)


def as_eml(message: memoryview) -> Iterator[bytes]:
    """Yield a transcript's message as an RFC 5322 file, with its envelope in X-Envelope fields.

    No chunk is larger than a packet's payload.
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
