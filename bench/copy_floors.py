"""The least that can be done with the bytes of a large body. `bench/copies.py` runs it.

    python bench/copy_floors.py FLOOR SOCKET MEMORY SIZE

SOCKET and MEMORY are descriptors. A body of SIZE bytes comes out of the socket, or one byte which
says that a worker is to have the body that is in the memory. One byte is the answer to each.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from collections.abc import Callable

# What Twisted is told to read at a time from a connection that brings much.
PIECE = 1 << 18

DONE = b"."

_BUFFER = bytearray(PIECE)


def fresh(sock: socket.socket, memory: int, size: int) -> bool:
    """Reads into new memory, and writes that to memory which another process can map."""
    spool = os.memfd_create("floor")
    left = size
    while left and (piece := sock.recv(min(PIECE, left))):
        left -= os.write(spool, piece)
    os.close(spool)
    return not left


def again(sock: socket.socket, memory: int, size: int) -> bool:
    """Reads into the same buffer again and again, and writes that."""
    spool = os.memfd_create("floor")
    left = size
    with memoryview(_BUFFER) as view:
        while left and (count := sock.recv_into(view[: min(PIECE, left)])):
            left -= os.write(spool, view[:count])
    os.close(spool)
    return not left


def straight(sock: socket.socket, memory: int, size: int) -> bool:
    """Reads into memory which another process can map."""
    spool = os.memfd_create("floor")
    os.truncate(spool, size)
    at = 0
    with mmap.mmap(spool, size) as mapped, memoryview(mapped) as view:
        while at < size:
            with view[at : at + PIECE] as room:
                count = sock.recv_into(room)
            if not count:
                break
            at += count
    os.close(spool)
    return at == size


def look(sock: socket.socket, memory: int, size: int) -> bool:
    """Maps the memory and looks at a byte of each page."""
    with mmap.mmap(memory, size, prot=mmap.PROT_READ) as mapped:
        return bool(sock.recv(1) and mapped[:: mmap.PAGESIZE])


def copy(sock: socket.socket, memory: int, size: int) -> bool:
    """Maps the memory and makes `bytes` of it, which are a milter's to keep."""
    with mmap.mmap(memory, size, prot=mmap.PROT_READ) as mapped:
        return bool(sock.recv(1) and mapped[:])


Floor = Callable[[socket.socket, int, int], bool]
FLOORS: dict[str, Floor] = {each.__name__: each for each in (fresh, again, straight, look, copy)}


def main() -> None:
    floor, descriptor, memory, size = sys.argv[1:]
    with socket.socket(fileno=int(descriptor)) as sock:
        while FLOORS[floor](sock, int(memory), int(size)):
            sock.sendall(DONE)


if __name__ == "__main__":
    main()
