"""The codec between the wire's bytes and Python's text.

The milter protocol defines no character set: names, values and addresses may have any byte but
NUL. UTF-8 with surrogateescape is lossless in both directions, so a value that is sent back
unchanged has exactly the same bytes.
"""

from __future__ import annotations

import re

from sharded_milter.errors import RemoteProtocolError

ENCODING = "utf-8"
ERRORS = "surrogateescape"


def to_text(raw: bytes | memoryview) -> str:
    """Decode wire bytes; bytes that are not UTF-8 become lone surrogates."""
    return str(raw, ENCODING, ERRORS)


def to_wire(text: str) -> bytes:
    """Encode text; the inverse of `to_text`."""
    return text.encode(ENCODING, ERRORS)


# Characters that would end a value in a log line of `key=value`, or look like our own marks.
_SPECIAL = re.compile(r"[\s\"'=\\\[\]]")

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

# The most characters of a value that a log line shows. Queue ids have about twelve.
MAX_SHOWN = 100


def printable(text: str) -> str:
    """Return the text as a part of one line, with unprintable characters escaped as in Python.

    These are control characters, line breaks, and characters that hide text or change its
    direction. A lone surrogate is shown as the byte that it stands for.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def quoted(text: str) -> str:
    """Return the text as an unambiguous value in a log line of `key=value`.

    A text without special characters is returned as it is. Any other is put in quotes, with its
    spaces, quotes, backslashes, brackets and equals signs escaped too. A text above MAX_SHOWN
    characters is cut.
    """
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    if shown.isprintable() and not _SPECIAL.search(shown):
        return shown
    return f'"{printable(_SPECIAL.sub(lambda found: _escaped(found[0]), shown))}"'


def _escaped(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape
        code -= 0xDC00
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def split_strings(payload: bytes | memoryview) -> list[str]:
    """Return the NUL-terminated strings in `payload`; `[]` if it is empty.

    Raise RemoteProtocolError if the last string has no NUL.
    """
    if not payload:
        return []
    if payload[-1]:
        raise RemoteProtocolError(
            f"string without its final NUL in payload {bytes(payload[-40:])!r}"
        )
    # No multi-byte UTF-8 sequence has a NUL, so it is safe to decode before splitting.
    return to_text(payload[:-1]).split("\0")


def join_strings(strings: tuple[str, ...]) -> bytes:
    """Return the strings, each followed by NUL; the inverse of `split_strings`."""
    return b"".join(to_wire(string) + b"\0" for string in strings)
