"""How operators name a milter. A module of its own, because the master loads no dialect."""

from __future__ import annotations

from sharded_milter.errors import UsageError


def split_spec(spec: str) -> tuple[str, str]:
    """The module or file, and the name in it; UsageError when `spec` is not of that form."""
    where, colon, name = spec.rpartition(":")
    is_place = where.endswith(".py") or all(part.isidentifier() for part in where.split("."))
    if not colon or not is_place or not name.isidentifier():
        raise UsageError(f"milter {spec!r} is neither MODULE:NAME nor FILE.py:NAME")
    return where, name


def checked_spec(spec: str) -> str:
    """The spec itself; UsageError when it is malformed."""
    split_spec(spec)
    return spec
