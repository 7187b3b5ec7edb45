"""Descriptors that have arrived and that no box has claimed yet.

The kernel drops a descriptor if the receiver has no free number for it, and from then on the two
sides count differently: one answer's memory would be taken for another's. So a box identifies its
descriptor by the inode of its file, not by its position.
"""

from __future__ import annotations

import os

from sharded_milter.closing import CLOSING
from sharded_milter.errors import BrokenRule
from sharded_milter.ipc.memory import is_sealed

# A worker has at most 8 questions, and 3 parts of an answer may be memory; all the descriptors may
# arrive before the first box that claims one.
MAX_UNCLAIMED = 32


class ReceivedDescriptors:
    """Received descriptors, by the inodes of their files."""

    __slots__ = ("_by_inode", "_count")

    def __init__(self) -> None:
        self._by_inode: dict[int, list[int]] = {}  # the same memory may come more than once
        self._count = 0

    def add(self, fd: int) -> None:
        """Add a descriptor; close it and raise BrokenRule if it is not acceptable."""
        if not is_sealed(fd):
            close_in_background(fd)
            raise BrokenRule("it has sent a descriptor that is not sealed memory")
        if self._count == MAX_UNCLAIMED:
            close_in_background(fd)
            raise BrokenRule(
                f"it has sent {MAX_UNCLAIMED + 1} descriptors that no message claims"
                f" (the limit is {MAX_UNCLAIMED})"
            )
        self._by_inode.setdefault(os.fstat(fd).st_ino, []).append(fd)
        self._count += 1

    def claim(self, inode: int) -> int | None:
        """Remove and return a descriptor of the file, or None. The caller must close it."""
        found = self._by_inode.get(inode)
        if found is None:
            return None
        fd = found.pop()
        if not found:
            del self._by_inode[inode]
        self._count -= 1
        return fd

    def close(self) -> None:
        """Close all descriptors."""
        for found in self._by_inode.values():
            for fd in found:
                os.close(fd)
        self._by_inode.clear()
        self._count = 0


def close_in_background(fd: int) -> None:
    """Close a descriptor of any kind without blocking; raise nothing."""
    if is_sealed(fd):
        os.close(fd)
    else:
        CLOSING.close(fd)
