"""Messages from files: a directory of .eml files, a Maildir, an mbox file, or one message."""

from __future__ import annotations

import mailbox
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import getaddresses
from pathlib import Path

from sharded_milter.errors import UsageError
from sharded_milter.protocol.text import to_text
from sharded_milter.testing.dialogue import Mail, split

# Bytes of all messages together. They are kept in memory, and a second time as packets.
MOST_BYTES = 100_000_000

# Postfix's limit for one delivery (default_destination_recipient_limit).
MOST_RECIPIENTS = 50

_SUFFIX = ".eml"
_MAILDIR = ("cur", "new")
_MBOX = b"From "

_LINE_END = re.compile(rb"\r?\n")
_ADDRESS = re.compile(r"[^\s<>\0]+@[^\s<>\0]+")


@dataclass
class Found:
    """The messages that were found, and a line about each file or message that was skipped."""

    mails: list[Mail] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def read(path: Path, most: int = MOST_BYTES) -> Found:
    """Read the messages of a file or below a directory, at most `most` bytes together.

    Raise UsageError if there is none, or if `path` cannot be read.
    """
    found = Found()
    room = most
    try:
        for name, raw in _messages(path, found.skipped):
            if not (content := normalised(raw)):
                why = "it has no header" if raw.strip() else "it is empty"
                found.skipped.append(f"{name}: skipped: {why}")
                continue
            if found.mails and len(content) > room:
                found.skipped.append(
                    f"{name}: skipped with all messages after it: more than {most:,} bytes in all"
                )
                break
            room -= len(content)
            found.mails.append(mail(content, f"{len(found.mails) + 1:010X}"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if not found.mails:
        why = found.skipped[0] if len(found.skipped) == 1 else f"{len(found.skipped)} skipped"
        raise UsageError(f"there is no message in {path}" + f" ({why})" * bool(found.skipped))
    return found


def normalised(raw: bytes) -> bytes:
    """Return the message with CRLF at every line end; b"" if it has no header."""
    raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
    if raw.startswith(_MBOX):
        raw = raw.partition(b"\n")[2]
    raw = _LINE_END.sub(b"\r\n", raw)
    if not split(raw)[0]:
        return b""
    return raw if raw.endswith(b"\r\n") else raw + b"\r\n"


def mail(raw: bytes, queue_id: str) -> Mail:
    """Return the message with an envelope from its header, or with the default addresses."""
    fields = [to_text(line).partition(":") for line in split(raw)[0]]

    def addresses(*names: str) -> list[str]:
        values = [value for name, _, value in fields if name.strip().lower() in names]
        return [address for _, address in getaddresses(values) if _ADDRESS.fullmatch(address)]

    bounce = any(
        name.lower() == "return-path" and value.strip() == "<>" for name, _, value in fields
    )
    senders = addresses("return-path") or addresses("from") or [Mail.sender]
    recipients = addresses("delivered-to") or addresses("to", "cc") or Mail.recipients
    return Mail(raw, "" if bounce else senders[0], tuple(recipients[:MOST_RECIPIENTS]), queue_id)


def _messages(path: Path, skipped: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents; add a line to `skipped` for each file that cannot be read."""
    if not path.is_dir():
        yield from _in_file(path)
        return
    for file in _files(path, skipped):
        try:
            raw = file.read_bytes()
        except OSError as error:
            skipped.append(f"{file}: skipped: {error.strerror}")
        else:
            yield str(file), raw


def _files(folder: Path, skipped: list[str]) -> Iterator[Path]:
    """Yield the .eml files, and the files in the `cur` and `new` folders of a Maildir."""

    def unreadable(error: OSError) -> None:
        skipped.append(f"{error.filename}: skipped: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        for name in sorted(names):
            file = Path(root, name)
            if (file.suffix.lower() == _SUFFIX or file.parent.name in _MAILDIR) and file.is_file():
                yield file


def _in_file(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        if file.read(len(_MBOX)) != _MBOX:
            file.seek(0)
            yield str(path), file.read()
            return
    box = mailbox.mbox(path, create=False)
    try:
        for key in box.iterkeys():
            yield f"{path}: message {int(key) + 1}", box.get_bytes(key)
    finally:
        box.close()
