"""What a script cannot do while its main program runs, and what it is told."""

from __future__ import annotations

import builtins
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sharded_milter.workers import daemon_calls
from sharded_milter.workers.daemon_calls import DaemonCalls


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_daemons_calls_do_nothing_and_are_named_once(said: list[str]) -> None:
    with DaemonCalls(said.append).active():
        for _ in range(2):
            assert os.fork() == 0
            os.setsid()
            os.setuid(12345)
            os.setgroups([])
            os.chroot("/nowhere")
        assert (os.umask(0), os.umask(0o77), os.umask(0)) == (0o022, 0, 0o77)
        assert [line.partition(" is ignored")[0] for line in said] == [
            *("os.fork()", "os.setsid()", "os.setuid()", "os.setgroups()", "os.chroot()"),
            "os.umask()",
        ]
        assert os.getuid() != 12345


def test_the_masters_signals_are_not_for_scripts(said: list[str]) -> None:
    with DaemonCalls(said.append).active():
        before = signal.getsignal(signal.SIGTERM)
        assert signal.signal(signal.SIGTERM, lambda *_: None) == before
        assert signal.getsignal(signal.SIGTERM) == before
        old = signal.signal(signal.SIGALRM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
        signal.signal(signal.SIGALRM, old)
        assert said == ["the handler of SIGTERM is ignored: the master has the signals"]


def test_inherited_descriptors_stay(said: list[str]) -> None:
    reader, writer = os.pipe()
    with DaemonCalls(said.append).active():
        own = os.dup(reader)
        os.close(writer)
        os.closerange(own, own + 1)
        assert os.dup2(os.open(os.devnull, os.O_RDWR), writer) == writer
        spare = os.dup2(writer, own)
        os.write(spare, b"x")
        os.close(spare)
        os.closerange(writer, writer + 1)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)
    assert [line.partition(" is ignored")[0] for line in said] == [
        "closing of inherited descriptors",
        "redirecting of standard streams",
    ]


def test_a_pid_file_is_the_workers_own(said: list[str], tmp_path: Path) -> None:
    with DaemonCalls(said.append).active():
        path = tmp_path / "x.pid"
        path.write_text("of another")  # by a script, too: it goes elsewhere
        assert path.read_text() == "of another"
        assert path.exists()
        assert os.path.isfile(str(path))
        os.chmod(path, 0o600)
        os.chown(os.fsencode(path), -1, -1)
        assert os.listdir(tmp_path) == []
        os.remove(path)
        assert not os.path.exists(path)
        with pytest.raises(FileNotFoundError):
            os.unlink(path)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        with builtins.open(path, "a") as file:
            file.write("mine")
        assert os.listdir(tmp_path) == []
        assert said == [f"pid file {path} is ignored: the master is the one to watch"]


def test_other_files_and_descriptors_are_as_ever(said: list[str], tmp_path: Path) -> None:
    with DaemonCalls(said.append).active():
        path = tmp_path / "x.txt"
        path.write_text("text")
        fd = os.open(path, os.O_RDONLY)
        assert os.stat(fd).st_size == os.stat(path).st_size == 4
        with open(fd) as file:
            assert file.read() == "text"


def test_nothing_holds_while_the_milter_serves_and_afterwards(
    said: list[str], tmp_path: Path
) -> None:
    before = os.fork, os.umask, builtins.open, io.open, signal.signal, os.stat
    path = tmp_path / "x.pid"
    with (found := DaemonCalls(said.append)).active():
        path.write_text("mine")
        with found.suspended():
            assert (os.fork, os.umask, builtins.open, io.open, signal.signal, os.stat) == before
            assert not path.exists()
        assert path.read_text() == "mine"
        [folder] = [found._files]
    assert (os.fork, os.umask, builtins.open, io.open, signal.signal, os.stat) == before
    assert not os.path.exists(folder)


def test_processes_of_multiprocessing_are_real(said: list[str]) -> None:
    script = """
import multiprocessing, os
from sharded_milter.workers import daemon_calls
from sharded_milter.workers.daemon_calls import DaemonCalls

def work(queue):
    queue.put(os.getpid())

with DaemonCalls(print).active():
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(queue.get() == process.pid != os.getpid())
    process.join()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_without_proc_the_first_descriptors_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(os, "listdir", refuse)
    assert daemon_calls._open_descriptors() == {0, 1, 2, 3}
