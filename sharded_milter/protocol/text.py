"""The one codec between the wire's bytes and Python's text.

The milter protocol names no character set: names, values and addresses may hold any byte but
NUL. UTF-8 with surrogateescape is lossless both ways, so a value that is copied back is
byte-exact whatever it held.
"""

from __future__ import annotations

import re

from sharded_milter.errors import RemoteProtocolError

ENCODING = "utf-8"
ERRORS = "surrogateescape"


def to_text(raw: bytes | memoryview) -> str:
    """The text of wire bytes; bytes that are not UTF-8 become lone surrogates."""
    return str(raw, ENCODING, ERRORS)


def to_wire(text: str) -> bytes:
    """The bytes of a text; the inverse of `to_text`."""
    return text.encode(ENCODING, ERRORS)


# What would end a value in a line of `key=value`, or be taken for one of our own marks.
_SPECIAL = re.compile(r"[\s\"'=\\\[\]]")

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

# Characters of a value that a line shows: queue ids have a dozen.
MAX_SHOWN = 100


def printable(text: str) -> str:
    """The text as a part of one line: what is not printable is escaped as in Python.

    That is every control character and line break, and what hides text or turns its direction.
    A lone surrogate is shown as the byte that it stands for.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def quoted(text: str) -> str:
    """The text as a value in a line of `key=value`, where it can be taken for nothing else.

    It stands for itself where it can. Else it is in quotes, and blanks, quotes, backslashes,
    brackets and equals signs in it are escaped too.
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
    """The NUL-terminated strings that fill `payload`; `[]` when it is empty.

    Raises RemoteProtocolError when the last string lacks its NUL.
    """
    if not payload:
        return []
    if payload[-1]:
        raise RemoteProtocolError(
            f"string without its final NUL in payload {bytes(payload[-40:])!r}"
        )
    # NUL is no part of a longer UTF-8 sequence, so decoding first and cutting then is the same.
    return to_text(payload[:-1]).split("\0")


def join_strings(strings: tuple[str, ...]) -> bytes:
    """The strings, each with its NUL; the inverse of `split_strings`."""
    return b"".join(to_wire(string) + b"\0" for string in strings)
