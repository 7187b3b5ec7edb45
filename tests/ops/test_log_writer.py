"""Writing to a log that is slow, closed or full, with a fake clock and notice."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import socket
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sharded_milter.ops import log_writer as module
from sharded_milter.ops.log_writer import LogWriter

PIPE = 4096  # bytes that the pipes of these tests hold
PATIENCE = 30.0


def notice(dropped: int) -> bytes:
    return b"%d dropped\n" % dropped


class Pipe:
    """A pipe whose reader reads when the test does it."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE)

    def fill(self, writer: LogWriter) -> int:
        """Write lines until some are buffered; return their number."""
        written = 0
        while not writer._waiting:
            writer.write(b"%07d\n" % written)
            written += 1
        return written

    def read(self, enough: Callable[[bytes], bool]) -> bytes:
        """Read until there is enough."""
        said = b""
        while not enough(said):
            said += os.read(self.reader, PIPE)
        return said

    def close(self) -> None:
        for end in (self.reader, self.writer):
            os.close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def numbers(said: bytes) -> list[int]:
    return [int(line) for line in said.split() if line.isdigit()]


def test_lines_leave_at_once_and_in_order(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writer, notice)
    for number in range(3):
        writer.write(b"%d\n" % number)
        assert os.read(pipe.reader, 100) == b"%d\n" % number
    assert writer._thread is None


def test_a_pipe_that_is_not_read_holds_nothing_up_and_loses_no_line_that_fits(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writer, notice)
    count = pipe.fill(writer)
    for number in range(count, count + 100):
        writer.write(b"%07d\n" % number)
    last = b"%07d\n" % (count + 99)
    assert numbers(pipe.read(lambda said: said.endswith(last))) == list(range(count + 100))


def test_what_does_not_fit_is_dropped_and_counted_in_one_line(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 1000)
    writer = LogWriter(pipe.writer, notice)
    count = pipe.fill(writer)
    for number in range(count, count + 1000):
        writer.write(b"%07d\n" % number)
    said = pipe.read(lambda said: b"dropped\n" in said)
    kept = numbers(said)[:-1]
    assert kept == list(range(len(kept)))
    assert said.endswith(b"\n%d dropped\n" % (count + 1000 - len(kept)))
    writer.write(b"after\n")
    assert os.read(pipe.reader, 100) == b"after\n"


def test_the_others_who_have_the_descriptor_may_still_wait(pipe: Pipe) -> None:
    LogWriter(pipe.writer, notice).write(b"x\n")
    assert os.get_blocking(pipe.writer)


def test_a_pipe_of_another_user_is_written_by_a_thread(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        writer = LogWriter(pipe.writer, notice)
    for number in range(2000):  # three times what the pipe holds
        writer.write(b"%07d\n" % number)
    said = pipe.read(lambda said: said.endswith(b"0001999\n"))
    assert numbers(said) == list(range(2000))
    writer.close()


def test_a_reader_that_is_gone_costs_its_lines_only(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writer, notice)
    os.dup2(os.open(os.devnull, os.O_RDONLY), pipe.reader)
    writer.write(b"one\n")
    writer.write(b"two\nthree\n")
    assert writer._dropped == 3
    writer.close()


def test_lines_that_wait_are_lost_with_their_reader(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writer, notice)
    pipe.fill(writer)
    writer.write(b"x\n")
    os.dup2(os.open(os.devnull, os.O_RDONLY), pipe.reader)
    writer.close(PATIENCE)
    assert writer._dropped >= 2


class Disk:
    """A disk with room for this number of bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self.content = b""
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor: int, data: bytes) -> int:
        taken = data[: self.room]
        if data and not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(taken)
        self.content += taken
        return len(taken)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Disk, LogWriter]]:
    with (tmp_path / "log").open("wb") as file:
        yield Disk(monkeypatch, 10), LogWriter(file.fileno(), notice)


def until_nothing_waits(writer: LogWriter) -> None:
    with writer._changed:
        assert writer._changed.wait_for(lambda: not writer._waiting, PATIENCE)


def test_a_full_disk_costs_lines_and_says_how_many(disk: tuple[Disk, LogWriter]) -> None:
    file, writer = disk
    for line in (b"1234567\n", b"torn line\n", b"lost\n"):
        writer.write(line)
        until_nothing_waits(writer)
    file.room = 100
    writer.write(b"after\n")
    assert file.content == b"1234567\nto\n2 dropped\nafter\n"


def test_a_count_that_cannot_be_written_is_not_forgotten(disk: tuple[Disk, LogWriter]) -> None:
    file, writer = disk
    file.room = 0
    for _ in range(5):
        writer.write(b"lost\n")
    file.room = 100
    writer.close()
    assert file.content == b"5 dropped\n"


def test_a_device_that_is_always_full_costs_lines_only() -> None:
    with open("/dev/full", "wb") as full:
        writer = LogWriter(full.fileno(), notice)
        for _ in range(100):
            writer.write(b"lost\n")
        assert writer._dropped == 100
        writer.close()


def test_a_socket_is_written_to_without_waiting() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = LogWriter(ours.fileno(), notice)
        assert ours.getblocking()
        written = 0
        while not writer._waiting:
            writer.write(b"%07d\n" % written)
            written += 1
        said = b""
        while not said.endswith(b"%07d\n" % (written - 1)):
            said += theirs.recv(100_000)
        assert numbers(said) == list(range(written))


def test_a_terminal_that_is_stopped_holds_nothing_up() -> None:
    master, slave = pty.openpty()
    writer = LogWriter(slave, notice)
    termios.tcflow(slave, termios.TCOOFF)  # Ctrl-S
    writer.write(b"seen\n")
    assert writer._waiting
    assert os.get_blocking(slave)
    termios.tcflow(slave, termios.TCOON)
    assert os.read(master, 100) == b"seen\r\n"
    until_nothing_waits(writer)
    os.close(master)
    os.close(slave)


def test_without_a_thread_lines_are_dropped_and_the_next_one_tries_again(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    writer = LogWriter(pipe.writer, notice)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        while not writer._dropped:
            writer.write(b"x" * 1000 + b"\n")
    writer.write(b"later\n")
    said = pipe.read(lambda said: said.endswith(b"later\n"))
    assert said.endswith(b"\n1 dropped\nlater\n")


def test_the_end_waits_for_a_slow_reader_but_not_for_ever(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writer, notice)
    pipe.fill(writer)
    writer.close(0.01)
    assert writer._waiting
    reader = threading.Thread(target=pipe.read, args=(lambda said: b"\nlast\n" in said,))
    reader.start()
    writer.write(b"last\n")
    writer.close(PATIENCE)
    assert not writer._waiting
    reader.join()
