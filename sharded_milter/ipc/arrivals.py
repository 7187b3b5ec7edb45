"""Descriptors that have arrived and that no box has claimed yet.

The kernel drops a descriptor on its way where the receiver has no number left for it, and what is
counted on both sides differs from then on: one answer's memory would be taken for another's. So a
box does not say which in the row its descriptor is, but which file it leads to.
"""

from __future__ import annotations

import os
from threading import Thread

from sharded_milter.errors import BrokenRule
from sharded_milter.ipc.memory import is_sealed

# A worker has at most 8 questions in hand, and 3 parts of an answer may be memory; its socket may
# send the descriptors of all before the first byte that speaks of them.
MAX_UNCLAIMED = 32


class Arrivals:
    """Keeps descriptors by the inodes of their files."""

    __slots__ = ("_by_inode", "_count")

    def __init__(self) -> None:
        self._by_inode: dict[int, list[int]] = {}  # the same memory may come more than once
        self._count = 0

    def add(self, fd: int) -> None:
        """One has arrived. Raises BrokenRule, and lets go of it, where it is not to be kept."""
        if not is_sealed(fd):
            dismiss(fd)
            raise BrokenRule("it has sent a descriptor of something else than sealed memory")
        if self._count == MAX_UNCLAIMED:
            dismiss(fd)
            raise BrokenRule(
                f"it has sent {MAX_UNCLAIMED + 1} descriptors that no box speaks of"
                f" (the limit is {MAX_UNCLAIMED})"
            )
        self._by_inode.setdefault(os.fstat(fd).st_ino, []).append(fd)
        self._count += 1

    def claim(self, inode: int) -> int | None:
        """One that leads to the file, which is the caller's from now on; None if there is none."""
        found = self._by_inode.get(inode)
        if found is None:
            return None
        fd = found.pop()
        if not found:
            del self._by_inode[inode]
        self._count -= 1
        return fd

    def close(self) -> None:
        """Nothing will claim them any more."""
        for found in self._by_inode.values():
            for fd in found:
                os.close(fd)
        self._by_inode.clear()
        self._count = 0


def dismiss(fd: int) -> None:
    """Closes a descriptor of whatever it may be.

    To close a file of a file system in user space, or a socket that lingers, may take for ever: a
    thread waits for that, which holds up nothing, not even the end of this process.
    """
    if is_sealed(fd):
        os.close(fd)
    else:
        Thread(target=os.close, args=(fd,), daemon=True).start()
