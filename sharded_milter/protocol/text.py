"""The one codec between the wire's bytes and Python's text.

The milter protocol names no character set: names, values and addresses may hold any byte but
NUL. UTF-8 with surrogateescape is lossless both ways, so a value that is copied back is
byte-exact whatever it held.
"""

from __future__ import annotations

from sharded_milter.errors import RemoteProtocolError

ENCODING = "utf-8"
ERRORS = "surrogateescape"


def to_text(raw: bytes | memoryview) -> str:
    """The text of wire bytes; bytes that are not UTF-8 become lone surrogates."""
    return str(raw, ENCODING, ERRORS)


def to_wire(text: str) -> bytes:
    """The bytes of a text; the inverse of `to_text`."""
    return text.encode(ENCODING, ERRORS)


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
