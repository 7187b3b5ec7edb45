"""The base of commands and replies: a frozen dataclass whose fields are the payload's layout.

| field type          | on the wire                              |
|---------------------|------------------------------------------|
| `int`               | four bytes, big-endian                   |
| `str`               | a string and its NUL                     |
| `tuple[str, ...]`   | the remaining strings, each with its NUL |
| `bytes`             | the remaining bytes as they are          |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, TypeVar

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol.text import join_strings, split_strings
from sharded_milter.protocol.wire import LETTER, PAYLOAD, frame

INT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet as a value; subclasses declare its letter and its fields."""

    letter: ClassVar[bytes]

    def encode(self) -> bytes:
        """Return the packet in the wire's format."""
        return frame(self.letter, self.payload())

    def payload(self) -> bytes:
        """Return the payload: the fields in their order."""
        return b"".join(
            _encode_field(getattr(self, name), kind) for name, kind in _layout(type(self))
        )

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Parse a payload. Raise RemoteProtocolError if it does not fit the fields."""
        names = _layout(cls)
        ints = sum(kind == "int" for _, kind in names) * INT_BYTES
        if len(payload) < ints:
            raise RemoteProtocolError(f"{cls.__name__} of {len(payload)} bytes needs {ints}")
        starts = range(0, ints, INT_BYTES)
        words = [int.from_bytes(payload[start : start + INT_BYTES], "big") for start in starts]
        rest = _parse_rest(cls, payload[ints:], [kind for _, kind in names if kind != "int"])
        return cls(*words, *rest)


_layouts: dict[type[Packet], list[tuple[str, str]]] = {}


def _layout(cls: type[Packet]) -> list[tuple[str, str]]:
    """Return names and types of the fields in the order of the wire; cached."""
    if cls not in _layouts:
        _layouts[cls] = [(field.name, str(field.type)) for field in fields(cls)]
    return _layouts[cls]


def _encode_field(value: Any, kind: str) -> bytes:
    match kind:
        case "int":
            return int(value).to_bytes(INT_BYTES, "big")
        case "bytes":
            return bytes(value)
        case "str":
            return join_strings((value,))
        case _:
            return join_strings(value)


def _parse_rest(cls: type[Packet], rest: bytes, kinds: list[str]) -> list[Any]:
    if kinds == ["bytes"]:
        return [rest]
    strings = split_strings(rest)
    single = kinds.count("str")
    open_ended = len(kinds) > single
    if len(strings) < single or (len(strings) > single and not open_ended):
        raise RemoteProtocolError(
            f"{cls.__name__} carries {len(strings)} strings, not {single}: {rest[:80]!r}"
        )
    tail = [tuple(strings[single:])] if open_ended else []
    return [*strings[:single], *tail]


P = TypeVar("P", bound=Packet)


def parse_packet(table: Mapping[int, type[P]], packet: bytes) -> P:
    """Parse a whole packet with the class that `table` has for its letter.

    Raise RemoteProtocolError for an unknown letter or a payload that does not fit.
    """
    try:
        kind = table[packet[LETTER]]
    except LookupError:  # an unknown letter, or a packet without one
        raise RemoteProtocolError(f"unknown packet letter {packet[LETTER:PAYLOAD]!r}") from None
    return kind.parse(packet[PAYLOAD:])
