"""Unpack a part and everything in it, at any nesting, within limits.

The type of a file is that of its first bytes, not of its name. An error becomes a mark on the
archive's part.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from .limits import Budget, LimitReached
from .parts import Mark, Part, plain_name
from .streams import GZIP_MAGIC, Archive, Member, bzip2_members, gzip_members, xz_members
from .tars import is_tar, tar_members
from .zips import ZIP_MAGICS, ends_as_zip, zip_members


def expand(part: Part, budget: Budget) -> Iterator[Part]:
    """Yield all parts that are packed into `part`, innermost first, then `part` with its marks."""
    members = _opener(part.data)
    if members is None:
        yield part
        return
    archive = Archive(part.name, part.data, budget, set(part.marks))
    try:
        if part.depth >= budget.limits.archive_depth:
            raise LimitReached(f"archives nested deeper than {budget.limits.archive_depth}")
        for name, data in members(archive):
            budget.spend_member()
            yield from expand(Part(plain_name(name), "", data, part.depth + 1), budget)
    except LimitReached:
        archive.marks.add(Mark.BOMB)
    yield replace(part, marks=frozenset(archive.marks))


def _opener(data: bytes) -> Callable[[Archive], Iterator[Member]] | None:
    if data.startswith(GZIP_MAGIC):
        return gzip_members
    if data.startswith(b"BZh"):
        return bzip2_members
    if data.startswith(b"\xfd7zXZ\x00"):
        return xz_members
    if is_tar(data):
        return tar_members
    if data.startswith(ZIP_MAGICS) or ends_as_zip(data):
        return zip_members
    return None
