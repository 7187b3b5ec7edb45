"""Anonymous memory that processes share: how a large transcript reaches a worker without a copy."""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress

# Up to here bytes go into the AMP box: copying them twice costs less than a descriptor and a
# mapping. AMP's own limit is 65,535.
MAX_INLINE = 48 * 1024

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Memory:
    """Anonymous memory that grows at its end and is passed on by descriptor.

    This process's descriptor is closed with the object; the memory is freed when every process
    that got a descriptor has closed it, however it ends.
    """

    __slots__ = ("fd", "size")

    def __init__(self) -> None:
        self.fd = os.memfd_create("sharded-milter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = 0

    def __len__(self) -> int:
        """The bytes that are in it."""
        return self.size

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Writes all of `data` behind what is there; raises OSError where the system refuses."""
        end = self.size + len(data)
        with memoryview(data) as view:  # which an error must not keep: `data` could not change
            while self.size < end:
                with view[self.size - end :] as rest:
                    self.size += os.write(self.fd, rest)

    def view(self) -> memoryview:
        """What is in it now, read-only."""
        return memoryview(mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ))

    def seal(self) -> None:
        """From now on no process can change it, so no process needs to copy it."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def __del__(self) -> None:
        # The channel keeps the object until the socket has taken the descriptor, whose number
        # must not be closed and reused meanwhile.
        if hasattr(self, "fd"):
            os.close(self.fd)


def packed(data: bytes) -> bytes | Memory:
    """What carries `data` to another process: the data itself while small, else sealed memory.

    Raises OSError where the system has no memory or no descriptor left.
    """
    if len(data) <= MAX_INLINE:
        return data
    memory = Memory()
    memory.append(data)
    memory.seal()
    return memory


def mapped(fd: int, size: int) -> memoryview:
    """A read-only view of memory that another process has passed on; closes the descriptor."""
    try:
        return memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
    finally:
        os.close(fd)


def view_of(part: bytes | Memory) -> memoryview:
    """The bytes of a part, wherever they are."""
    return memoryview(part) if isinstance(part, bytes) else part.view()


def release(value: bytes | memoryview) -> None:
    """Unmaps what `mapped` has mapped, unless a view of it is kept somewhere."""
    if isinstance(value, memoryview):
        mapping = value.obj
        value.release()
        with suppress(BufferError):  # the milter keeps a piece: it lives as long as that
            mapping.close()  # type: ignore[attr-defined]  # it is the mmap of `mapped`
