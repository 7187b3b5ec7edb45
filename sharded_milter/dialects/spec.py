"""The spelling of a milter in options. It is in its own module, as the master loads no dialect."""

from __future__ import annotations

from sharded_milter.errors import UsageError


def split_spec(spec: str) -> tuple[str, str]:
    """Return the module or file, and the name in it; raise UsageError if `spec` is malformed."""
    where, colon, name = spec.rpartition(":")
    is_place = where.endswith(".py") or all(part.isidentifier() for part in where.split("."))
    if not colon or not is_place or not name.isidentifier():
        raise UsageError(f"milter {spec!r} is neither MODULE:NAME nor FILE.py:NAME")
    return where, name


def checked_spec(spec: str) -> str:
    """Return the spec unchanged; raise UsageError if it is malformed."""
    split_spec(spec)
    return spec
