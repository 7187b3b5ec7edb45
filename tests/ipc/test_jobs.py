"""What master and workers send each other: blobs over a real socket pair, whatever their size."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_milter.ipc.messages import MAX_INLINE, Blob, Memory, blob, release


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class Wire:
    """What a Blob needs of an AMP protocol: descriptors that go over and come back out."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def _sendFileDescriptor(self, fd: int) -> int:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(ours, [b"x"], [fd])
            _, (received,), _, _ = socket.recv_fds(theirs, 1, 1)
        self.descriptors.append(received)
        return len(self.descriptors) - 1

    def _getDescriptor(self, ordinal: int) -> int:
        return self.descriptors[ordinal]


def sent(value: bytes | Memory) -> Any:
    """What the other side receives, and that the box itself is one AMP can carry."""
    wire = Wire()
    box: dict[bytes, bytes] = {}
    received: dict[str, Any] = {}
    argument: Any = Blob()
    argument.toBox(b"value", box, {"value": value}, wire)
    assert len(box[b"value"]) <= 0xFFFF
    argument.fromBox(b"value", box, received, wire)
    return received["value"]


@pytest.mark.parametrize("size", [0, 1, MAX_INLINE])
def test_a_small_blob_is_bytes_all_the_way(size: int) -> None:
    data = os.urandom(size)
    assert blob(data) is data
    assert sent(data) == data


@pytest.mark.parametrize("size", [MAX_INLINE + 1, 65_536, 3_000_000])
def test_a_large_blob_is_sealed_memory_that_the_receiver_maps(size: int) -> None:
    before = descriptors()
    data = os.urandom(size)
    memory = blob(data)
    assert isinstance(memory, Memory)
    assert fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    view = sent(memory)
    assert isinstance(view, memoryview)
    assert view.readonly
    assert view == data
    release(view)
    del memory, view
    assert descriptors() == before


@settings(max_examples=30)
@given(st.binary(max_size=200), st.integers(0, 3))
def test_what_looks_like_a_mark_is_content(data: bytes, repeat: int) -> None:
    assert sent(b"@" * repeat + data) == b"@" * repeat + data
    assert sent(b"=" * repeat + data) == b"=" * repeat + data


def test_a_descriptor_does_not_survive_a_mapping_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = blob(b"x" * (MAX_INLINE + 1))
    before = descriptors()

    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="no memory"):
        sent(memory)
    assert descriptors() == before


def test_memory_grows_until_it_is_sealed() -> None:
    memory = Memory()
    memory.append(b"one")
    memory.append(bytearray(b" two"))
    assert (memory.size, os.pread(memory.fd, 100, 0)) == (7, b"one two")
    memory.seal()
    with pytest.raises(PermissionError):
        memory.append(b"x")


def test_memory_that_could_not_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError("none left")

    before = descriptors()
    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(OSError, match="none left"):
        Memory()
    assert descriptors() == before


def test_bytes_need_no_release() -> None:
    release(b"data")


def test_a_piece_that_a_milter_keeps_stays_readable() -> None:
    view = sent(blob(b"x" * (MAX_INLINE + 1)))
    piece = view[:3]
    release(view)
    assert bytes(piece) == b"xxx"
    with pytest.raises(ValueError, match="released"):
        len(view)
