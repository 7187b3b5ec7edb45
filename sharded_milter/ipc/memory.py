"""Anonymous memory that processes share: how a large transcript reaches a worker without a copy.

The law: memory leaves this process only when no process can change it any more. A worker could
write to it, or cut it off, and what the master and other workers see would be what it likes; that
its descriptor were read-only would not help, for it can be opened anew. So what still grows is
never passed on, but a sealed copy of it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress

from sharded_milter.errors import BrokenRule

# Up to here bytes go into the AMP box: copying them twice costs less than a descriptor and a
# mapping. AMP's own limit is 65,535.
MAX_INLINE = 48 * 1024

# With all of them nothing about the memory can change, not even its seals.
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

# Bytes that are read of another process's memory at a time: about 2 ms of the reactor.
PIECE = 4 * 1024 * 1024


class Memory:
    """Anonymous memory that grows at its end until it is sealed, and is then passed on.

    This process's descriptor is closed with the object; the memory is freed when every process
    that got a descriptor has closed it, however it ends.
    """

    __slots__ = ("fd", "is_sealed", "size")

    def __init__(self) -> None:
        self.fd = os.memfd_create("sharded-milter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = 0
        self.is_sealed = False

    def __len__(self) -> int:
        """The bytes that are in it."""
        return self.size

    @property
    def inode(self) -> int:
        """What tells it from all other memory that there is."""
        return os.fstat(self.fd).st_ino

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Writes all of `data` behind what is there; raises OSError where the system refuses."""
        end = self.size + len(data)
        with memoryview(data) as view:  # which an error must not keep: `data` could not change
            while self.size < end:
                with view[self.size - end :] as rest:
                    self.size += os.write(self.fd, rest)

    def view(self) -> memoryview:
        """What is in it now, read-only. It is a copy where no descriptor is left to map it."""
        try:
            return memoryview(mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ))
        except OSError as error:
            if error.errno != errno.EMFILE:  # Python's mmap takes a descriptor of its own
                raise
            return memoryview(os.pread(self.fd, self.size, 0))

    def seal(self) -> None:
        """From now on no process can change it, so no process needs to copy it."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        self.is_sealed = True

    def __del__(self) -> None:
        # The channel keeps the object until the socket has taken the descriptor, whose number
        # must not be closed and reused meanwhile.
        if hasattr(self, "fd"):
            os.close(self.fd)


def packed(data: bytes | memoryview) -> bytes | Memory:
    """What carries `data` to another process: the data itself while small, else sealed memory.

    Raises OSError where the system has no memory or no descriptor left.
    """
    if len(data) <= MAX_INLINE:
        return bytes(data)
    memory = Memory()
    memory.append(data)
    memory.seal()
    return memory


def passable(part: bytes | Memory, start: int = 0) -> bytes | Memory:
    """What another process may be given of a part, from `start` on: a copy of it if it still grows.

    Sealed memory is passed on whole, from whatever `start`. Raises OSError as `packed` does.
    """
    if isinstance(part, bytes):
        return part[start:]
    if part.is_sealed:
        return part
    with part.view() as view, view[start:] as rest:
        return packed(rest)


class Received:
    """Memory that another process has passed on, sealed, in a descriptor that closes with this.

    Raises BrokenRule where it is not of the size that it is said to be.
    """

    __slots__ = ("fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        there = os.fstat(fd).st_size
        if there != size:
            raise BrokenRule(f"it calls memory of {there} bytes {size} bytes long")

    def mapped(self) -> memoryview:
        """A read-only view of it; raises OSError where it cannot be mapped."""
        return memoryview(mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ))

    def pieces(self) -> Iterator[bytes]:
        """What is in it, PIECE by PIECE. It is read, for what is read cannot fault as maps can."""
        for start in range(0, self.size, PIECE):
            yield os.pread(self.fd, min(PIECE, self.size - start), start)

    def __del__(self) -> None:
        os.close(self.fd)


def is_sealed(fd: int) -> bool:
    """Whether it is memory that nothing can change; says so without waiting for any file system."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:  # no memory at all
        return False


def view_of(part: bytes | Memory) -> memoryview:
    """The bytes of a part, wherever they are."""
    return memoryview(part) if isinstance(part, bytes) else part.view()


def release(value: bytes | memoryview) -> None:
    """Unmaps what was mapped, unless a view of it is kept somewhere."""
    if isinstance(value, memoryview):
        mapping = value.obj
        value.release()
        with suppress(BufferError):  # the milter keeps a piece: it lives as long as that
            mapping.close()  # type: ignore[attr-defined]  # it is the mmap of `mapped`
