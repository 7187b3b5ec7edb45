"""Memory that processes share: it grows, is sealed, is passed on, and nothing of it is left."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os

import pytest

from sharded_milter.errors import BrokenRule
from sharded_milter.ipc.memory import (
    MAX_INLINE,
    Memory,
    Received,
    packed,
    passable,
    release,
    view_of,
)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def received(memory: Memory) -> memoryview:
    """The memory as another process maps it, with a descriptor of its own."""
    return Received(os.dup(memory.fd), memory.size).mapped()


@pytest.mark.parametrize("size", [0, 1, MAX_INLINE])
def test_little_data_travels_as_it_is(size: int) -> None:
    data = os.urandom(size)
    assert packed(data) is data
    assert view_of(data) == data


@pytest.mark.parametrize("size", [MAX_INLINE + 1, 65_536, 3_000_000])
def test_much_data_is_sealed_memory_that_the_receiver_maps(size: int) -> None:
    before = descriptors()
    data = os.urandom(size)
    memory = packed(data)
    assert isinstance(memory, Memory)
    assert fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    view = received(memory)
    assert view.readonly
    assert view == view_of(memory) == data
    release(view)
    del memory, view
    assert descriptors() == before


def test_memory_grows_until_it_is_sealed() -> None:
    memory = Memory()
    memory.append(b"one")
    memory.append(bytearray(b" two"))
    memory.append(memoryview(b" three"))
    assert (len(memory), os.pread(memory.fd, 100, 0)) == (13, b"one two three")
    memory.seal()
    with pytest.raises(PermissionError):
        memory.append(b"x")
    assert len(memory) == 13


def test_empty_memory_is_nothing() -> None:
    assert not Memory()


def test_what_the_system_takes_in_pieces_is_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:3])))
    memory = Memory()
    memory.append(b"0123456789")
    assert bytes(memory.view()) == b"0123456789"


@pytest.mark.parametrize(("number", "copied"), [(errno.EMFILE, True), (errno.ENOMEM, False)])
def test_memory_is_read_where_no_descriptor_is_left_to_map_it(
    monkeypatch: pytest.MonkeyPatch, number: int, copied: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    memory = Memory()
    memory.append(b"0123456789")
    monkeypatch.setattr(mmap, "mmap", refuse)
    if copied:
        assert bytes(memory.view()) == b"0123456789"
        assert memory.view().readonly
        return
    with pytest.raises(OSError, match="Cannot allocate memory"):
        memory.view()


def test_data_that_could_not_be_written_can_be_changed_afterwards() -> None:
    memory, data = Memory(), bytearray(b"data")
    memory.seal()
    with pytest.raises(PermissionError):
        memory.append(data)
    data += b"more"


def test_memory_that_could_not_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError("none left")

    before = descriptors()
    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(OSError, match="none left"):
        Memory()
    assert descriptors() == before


def test_a_descriptor_does_not_survive_a_mapping_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Memory()
    memory.append(b"x")
    before = descriptors()

    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="no memory"):
        received(memory)
    assert descriptors() == before


def test_more_than_there_is_cannot_be_mapped() -> None:
    memory = Memory()
    memory.append(b"x")
    before = descriptors()
    with pytest.raises(
        BrokenRule, match="it has sent memory of 1 bytes and says that it has 4000000"
    ):
        Received(os.dup(memory.fd), 4_000_000)
    assert descriptors() == before


def test_bytes_need_no_release() -> None:
    release(b"data")


def test_a_piece_that_a_milter_keeps_stays_readable() -> None:
    memory = Memory()
    memory.append(b"x" * 9)
    view = received(memory)
    piece = view[:3]
    release(view)
    assert bytes(piece) == b"xxx"
    with pytest.raises(ValueError, match="released"):
        len(view)


@pytest.mark.parametrize("start", [0, 1, 60_000, 200_000])
def test_what_still_grows_is_passed_on_as_a_sealed_copy_of_what_is_new(start: int) -> None:
    memory, data = Memory(), os.urandom(200_000)
    memory.append(data)
    part = passable(memory, start)
    assert part is not memory
    assert isinstance(part, Memory) == (200_000 - start > MAX_INLINE)
    assert view_of(part) == data[start:]
    assert part == b"" or isinstance(part, bytes) or part.is_sealed
    memory.append(b"it can still grow")


def test_sealed_memory_is_passed_on_as_it_is_and_bytes_from_where_they_are_new() -> None:
    memory = packed(bytes(MAX_INLINE + 1))
    assert passable(memory, 7) is memory
    data = b"0123"
    assert (passable(data), passable(data, 3)) == (data, b"3")
    assert passable(data) is data
