"""The arguments of C functions: checked as Python's C interface does, with its words.

Scripts tell a wrong call from a refused one by the kind of the error, and authors know its text.
"""

from __future__ import annotations

import operator
from typing import Any

from sharded_milter.protocol.text import to_wire

_HIGHEST, _LOWEST = 0x7FFFFFFF, -0x80000000


def count(function: str, arguments: tuple[Any, ...], least: int, most: int) -> None:
    """Raises TypeError unless there are between `least` and `most` arguments."""
    given = len(arguments)
    if least <= given <= most:
        return
    limit = least if given < least else most
    bound = "exactly" if least == most else "at least" if given < least else "at most"
    plural = "" if limit == 1 else "s"
    raise TypeError(f"{function} takes {bound} {limit} argument{plural} ({given} given)")


def text(function: str, number: int, value: Any) -> str:
    """A text without a NUL; surrogates stand for bytes that are not UTF-8, and may be sent."""
    if not isinstance(value, str):
        raise _not_a("str", function, number, value)
    if "\0" in value:
        raise ValueError("embedded null character")
    to_wire(value)  # raises UnicodeEncodeError for what stands for no byte
    return value


def text_or_none(function: str, number: int, value: Any) -> str | None:
    """A text, or None for none."""
    if value is not None and not isinstance(value, str):
        raise _not_a("str or None", function, number, value)
    return None if value is None else text(function, number, value)


def integer(value: Any) -> int:
    """A C int of 32 bits."""
    number = operator.index(value)
    if number > _HIGHEST:
        raise OverflowError("signed integer is greater than maximum")
    if number < _LOWEST:
        raise OverflowError("signed integer is less than minimum")
    return number


def content(value: Any) -> bytes:
    """The bytes of a str or bytes."""
    if isinstance(value, str):
        return to_wire(value)
    if isinstance(value, bytes):
        return value
    kind = type(value).__name__
    if isinstance(value, bytearray | memoryview):
        raise TypeError(f"argument 1 must be read-only bytes-like object, not {kind}")
    raise TypeError(f"a bytes-like object is required, not {kind!r}")


def function_or_none(name: str, value: Any) -> Any:
    """Something that can be called, or None for nothing; `name` is that of the parameter."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} parameter must be callable")
    return value


def _not_a(kind: str, function: str, number: int, value: Any) -> TypeError:
    given = "None" if value is None else type(value).__name__
    return TypeError(f"{function} argument {number} must be {kind}, not {given}")
