"""Read the members of a tar block by block. The standard library trusts the offsets in a tar."""

import re
import tarfile
from collections.abc import Iterator

from .parts import Mark
from .streams import Archive, Member

_BLOCK = 512
_PATH = re.compile(rb"^\d+ path=(.*)$", re.M)


def is_tar(data: bytes) -> bool:
    """Return True if a tar header with a valid checksum comes first; old tars have no magic."""
    return _header(data, 0) is not None


def tar_members(archive: Archive) -> Iterator[Member]:
    """Yield each regular file with its long name; devices, links and folders have no data."""
    data, at, long_name = archive.data, 0, ""
    while (info := _header(data, at)) is not None:
        archive.budget.check_time()
        start = at + _BLOCK
        at = start + (info.size + _BLOCK - 1) // _BLOCK * _BLOCK
        stored = data[start : start + info.size]
        if len(stored) < info.size:
            archive.marks.add(Mark.BROKEN)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = stored.rstrip(b"\0").decode("utf-8", "replace")
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            path = _PATH.search(stored)
            long_name = path[1].decode("utf-8", "replace") if path else ""
        elif info.isreg():
            archive.spend(len(stored))
            yield long_name or info.name, stored
            long_name = ""
        else:
            archive.budget.spend_member()
            long_name = ""
    if any(data[at : at + _BLOCK]):
        archive.marks.add(Mark.BROKEN)


def _header(data: bytes, at: int) -> tarfile.TarInfo | None:
    if len(data) < at + _BLOCK:
        return None
    try:
        info = tarfile.TarInfo.frombuf(data[at : at + _BLOCK], "utf-8", "replace")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    return info if info.size >= 0 else None
