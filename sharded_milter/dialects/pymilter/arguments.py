"""Check the arguments of C functions as Python's C interface does, with the same errors.

Scripts tell a wrong call from a refused one by the type of the error, and authors know its text.
"""

from __future__ import annotations

import operator
from typing import Any

from sharded_milter.protocol.text import to_wire

_HIGHEST, _LOWEST = 0x7FFFFFFF, -0x80000000


def count(function: str, arguments: tuple[Any, ...], least: int, most: int) -> None:
    """Raise TypeError unless there are between `least` and `most` arguments."""
    given = len(arguments)
    if least <= given <= most:
        return
    limit = least if given < least else most
    bound = "exactly" if least == most else "at least" if given < least else "at most"
    plural = "" if limit == 1 else "s"
    raise TypeError(f"{function} takes {bound} {limit} argument{plural} ({given} given)")


def text(function: str, number: int, value: Any) -> str:
    """Return a str; raise TypeError for other types, ValueError for a NUL.

    Surrogates stand for bytes that are not UTF-8. Raise UnicodeEncodeError for all others.
    """
    if not isinstance(value, str):
        raise _not_a("str", function, number, value)
    if "\0" in value:
        raise ValueError("embedded null character")
    to_wire(value)  # raises UnicodeEncodeError
    return value


def text_or_none(function: str, number: int, value: Any) -> str | None:
    """Return a str or None; raise as `text`."""
    if value is not None and not isinstance(value, str):
        raise _not_a("str or None", function, number, value)
    return None if value is None else text(function, number, value)


def integer(value: Any) -> int:
    """Return a C int of 32 bits; raise TypeError or OverflowError."""
    number = operator.index(value)
    if number > _HIGHEST:
        raise OverflowError("signed integer is greater than maximum")
    if number < _LOWEST:
        raise OverflowError("signed integer is less than minimum")
    return number


def content(value: Any) -> bytes:
    """Return the bytes of a str or bytes; raise TypeError for other types."""
    if isinstance(value, str):
        return to_wire(value)
    if isinstance(value, bytes):
        return value
    kind = type(value).__name__
    if isinstance(value, bytearray | memoryview):
        raise TypeError(f"argument 1 must be read-only bytes-like object, not {kind}")
    raise TypeError(f"a bytes-like object is required, not {kind!r}")


def function_or_none(name: str, value: Any) -> Any:
    """Return a callable or None; raise TypeError, which names the parameter, for other values."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} parameter must be callable")
    return value


def _not_a(kind: str, function: str, number: int, value: Any) -> TypeError:
    given = "None" if value is None else type(value).__name__
    return TypeError(f"{function} argument {number} must be {kind}, not {given}")
