"""Anonymous shared memory, which passes large transcripts to workers without a copy.

The law: memory is passed to another process only after it is sealed, when no process can change it
any more. A worker could otherwise write to it or truncate it under the master and other workers; a
read-only descriptor would not help, because it can be reopened for writing. Of memory that still
grows, a sealed copy is passed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress

from sharded_milter.errors import BrokenRule

# Up to so many bytes go into the AMP box itself: copying them twice costs less than a descriptor
# and a mapping. AMP's own limit is 65,535.
MAX_INLINE = 48 * 1024

# With all of these seals nothing about the memory can change, not even its seals.
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

# Bytes that are read from another process's memory at a time: this blocks the reactor for 2 ms.
CHUNK = 4 * 1024 * 1024


class Memory:
    """Anonymous memory that can be appended to until it is sealed, and passed on after that.

    This process's descriptor is closed with the object. The kernel frees the memory when every
    process that has a descriptor has closed it or exited.
    """

    __slots__ = ("fd", "is_sealed", "size")

    def __init__(self) -> None:
        self.fd = os.memfd_create("sharded-milter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = 0
        self.is_sealed = False

    def __len__(self) -> int:
        """Return its size in bytes."""
        return self.size

    @property
    def inode(self) -> int:
        """The inode, which identifies the memory."""
        return os.fstat(self.fd).st_ino

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data`; raise OSError where the system refuses."""
        end = self.size + len(data)
        with memoryview(
            data
        ) as view:  # released also after an error: else `data` could not be resized
            while self.size < end:
                with view[self.size - end :] as rest:
                    self.size += os.write(self.fd, rest)

    def view(self) -> memoryview:
        """Return a read-only view of its bytes, or of a copy if no descriptor is left to map it."""
        try:
            return memoryview(mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ))
        except OSError as error:
            if error.errno != errno.EMFILE:  # Python's mmap takes a descriptor of its own
                raise
            return memoryview(os.pread(self.fd, self.size, 0))

    def seal(self) -> None:
        """Make it immutable for all processes."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        self.is_sealed = True

    def __del__(self) -> None:
        # The channel keeps the object until the descriptor is sent: until then its number must not
        # be closed and reused.
        if hasattr(self, "fd"):
            os.close(self.fd)


def packed(data: bytes | memoryview) -> bytes | Memory:
    """Return `data` in a form that can be sent: as bytes while small, else in sealed memory.

    Raise OSError where the system has no memory or no descriptor left.
    """
    if len(data) <= MAX_INLINE:
        return bytes(data)
    memory = Memory()
    memory.append(data)
    memory.seal()
    return memory


def passable(part: bytes | Memory, start: int = 0) -> bytes | Memory:
    """Return a part, from byte `start` on, in a form that can be sent to another process.

    Memory that still grows is copied. Sealed memory is returned whole, for any `start`. Raise
    OSError as `packed` does.
    """
    if isinstance(part, bytes):
        return part[start:]
    if part.is_sealed:
        return part
    with part.view() as view, view[start:] as rest:
        return packed(rest)


class Received:
    """Sealed memory that another process has sent; the descriptor is closed with this object.

    Raise BrokenRule if its size is not `size`.
    """

    __slots__ = ("fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        there = os.fstat(fd).st_size
        if there != size:
            raise BrokenRule(f"it has sent memory of {there} bytes and says that it has {size}")

    def mapped(self) -> memoryview:
        """Return a read-only view of it; raise OSError where it cannot be mapped."""
        return memoryview(mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ))

    def chunks(self) -> Iterator[bytes]:
        """Yield its bytes in chunks of CHUNK. They are read, because access to a map can fault."""
        for start in range(0, self.size, CHUNK):
            yield os.pread(self.fd, min(CHUNK, self.size - start), start)

    def __del__(self) -> None:
        os.close(self.fd)


def is_sealed(fd: int) -> bool:
    """Return whether it is memory with all seals; this never blocks on a file system."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:  # it is not anonymous memory
        return False


def view_of(part: bytes | Memory) -> memoryview:
    """Return a view of a part's bytes."""
    return memoryview(part) if isinstance(part, bytes) else part.view()


def release(value: bytes | memoryview) -> None:
    """Unmap a view of mapped memory, unless another view of it exists."""
    if isinstance(value, memoryview):
        mapping = value.obj
        value.release()
        with suppress(BufferError):  # the milter keeps a view, which keeps the map
            mapping.close()  # type: ignore[attr-defined]  # it is the mmap of `mapped`
