"""The mail of the actions' tests, and what of it must be delivered."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

BODY = b"The original body.\r\n"

FIELDS = (
    "From: sender@example.org",
    "Date: Thu, 01 Jan 1970 00:00:00 +0000",
    "X-Four: one",
    "Subject: original",
    "X-Four: two",
    "X-Folded: first\n\tsecond\n third",
    "x-four:three",
    "X-Eight: gr\xfcn \udcff\udcfe",
    "X-Four: four",
    "Message-Id: <1@example.org>",
)


def asking(expression: str) -> bytes:
    """A mail that asks the milter of these tests for a verdict."""
    return _encode([*FIELDS, f"X-Ask: {expression}"]).replace(b"\n", b"\r\n") + BODY


def delivered(
    expression: str,
    replaced: Mapping[str, str | None] = MappingProxyType({}),
    added: Sequence[str] = (),
    *,
    top: Sequence[str] = (),
    body: bytes = BODY,
) -> bytes:
    """What a mailbox gets of `asking(expression)`: fields replaced, removed by None, or added."""
    assert replaced.keys() <= set(FIELDS), replaced
    kept = (replaced.get(field, field) for field in FIELDS)
    fields = [*top, *filter(None, kept), f"X-Ask: {expression}", *added]
    return _encode(fields) + body.replace(b"\r\n", b"\n")


def _encode(fields: Sequence[str]) -> bytes:
    return "\n".join([*fields, "", ""]).encode("utf-8", "surrogateescape")
