"""The thread that closes descriptors: whoever gives it one waits for nothing."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from sharded_milter import closing
from sharded_milter.closing import Closing


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)


def test_the_thread_closes_what_it_is_given(pipe: tuple[int, int]) -> None:
    read, write = pipe
    closer = Closing()
    closer.start()
    closer.close(write)
    assert os.read(read, 1) == b""  # waits until it is closed


def test_where_no_thread_was_started_it_is_closed_at_once(pipe: tuple[int, int]) -> None:
    read, write = pipe
    Closing().close(write)
    os.set_blocking(read, False)
    assert os.read(read, 1) == b""


def test_there_is_one_thread_however_much_there_is_to_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first descriptor takes for ever."""
    closed: list[int] = []
    goes_on, ended = threading.Event(), threading.Event()

    def close(fd: int) -> None:
        assert goes_on.wait(30)
        closed.append(fd)
        if len(closed) == 300:
            ended.set()

    monkeypatch.setattr(closing, "_close", close)
    closer = Closing()
    before = threading.active_count()
    for number in range(300):
        closer.start()
        closer.close(number)
    assert threading.active_count() == before + 1
    goes_on.set()
    assert ended.wait(30)
    assert closed == list(range(300))


def test_where_no_thread_can_be_started_that_is_an_error_of_the_system(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    closer = Closing()
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        with pytest.raises(BlockingIOError, match="Resource temporarily unavailable"):
            closer.start()
    closer.start()
    closer.close(pipe[1])
    assert os.read(pipe[0], 1) == b""


def test_a_socket_that_lingers_is_reset_instead() -> None:
    """Its closing would wait for a reader that does not read."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        lingering = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
        with accepted:
            lingering.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    lingering.send(bytes(65_536))
            lingering.setblocking(True)
            lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\x3c\0\0\0")
            Closing().close(lingering.detach())
            with suppress(ConnectionResetError):
                while accepted.recv(1 << 20):
                    pass
                pytest.fail("it has ended in good order")


def test_what_is_closed_already_is_no_error() -> None:
    Closing().close(10**6)
