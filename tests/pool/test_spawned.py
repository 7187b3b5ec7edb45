"""A process that is started for a shard. Only the reactor and the process are faked."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from twisted.internet import error
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from sharded_milter.pool.output import MAX_READ, SECOND
from sharded_milter.pool.spawned import (
    MAX_CATCH_UP,
    OUTPUT_GRACE,
    THREADS,
    Spawned,
    WorkerConfig,
    worker_environment,
)

NO_PROCESS = 2**22 + 1  # above every process id that Linux gives


# Those of the test that runs.
SOCKETS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def closed_sockets() -> Iterator[None]:
    """No socket outlives its test."""
    yield
    while SOCKETS:
        SOCKETS.pop().close()


class Pipe:
    """A pipe that the worker writes to; what waits in it comes piece by piece."""

    def __init__(self, process: Process, fd: int) -> None:
        self.process = process
        self.fd = fd
        self.pieces: list[int] = []
        self.reads = 0
        self.held = False
        self.reader, self.writer = os.pipe()

    def say(self, *pieces: bytes) -> None:
        self.pieces += map(len, pieces)
        os.write(self.writer, b"".join(pieces))

    def fileno(self) -> int:
        return self.reader

    def stopReading(self) -> None:
        self.held = True

    def startReading(self) -> None:
        self.held = False

    def doRead(self) -> None:
        self.reads += 1
        self.process.protocol.childDataReceived(self.fd, os.read(self.reader, self.pieces.pop(0)))

    def __del__(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Process:
    """What spawnProcess returns."""

    def __init__(self, protocol: Any, arguments: dict[str, Any]) -> None:
        self.protocol = protocol
        self.arguments = arguments
        self.pid: int | None = NO_PROCESS
        self.signals: list[int] = []
        self.closed: list[str] = []
        self.pipes = {fd: Pipe(self, fd) for fd in (1, 2)}

    def signalProcess(self, number: int) -> None:
        if self.pid is None:
            raise error.ProcessExitedAlready
        self.signals.append(number)

    def closeStdin(self) -> None:
        self.closed.append("stdin")

    def loseConnection(self) -> None:
        self.closed.append("all")


class Room(Clock):
    """A reactor with one process, and what its shard hears of it."""

    def __init__(self, *, started: bool = True) -> None:
        super().__init__()
        self.lines: list[bytes] = []
        self.dropped: list[tuple[int, int]] = []
        self.exits: list[str] = []
        self.refuse: OSError | None = None
        self.channel: Any = Protocol()
        self.marks: list[str] = []
        descendants: Any = self
        workplace = WorkerConfig(("x:milter",), {"LANG": "C"}, descendants=descendants)
        self.place = Spawned(workplace, 3, self)
        if started:
            self.start()

    def start(self) -> None:
        self.place.start(self, self.channel)
        SOCKETS.append(self.channel.transport.socket)

    # A reactor

    def spawnProcess(self, protocol: Any, executable: str, args: list[str], **rest: Any) -> Process:
        if self.refuse is not None:
            raise self.refuse
        process = Process(protocol, {"executable": executable, "args": args, **rest})
        self.process = protocol.transport = process
        protocol.connectionMade()
        return process

    def addReader(self, reader: Any) -> None: ...
    def removeReader(self, reader: Any) -> None: ...
    def removeWriter(self, writer: Any) -> None: ...

    # Descendants

    def mark(self) -> int:
        self.marks.append("marked")
        return 7

    def end(self, mark: int) -> None:
        self.marks.append(f"end {mark}")

    # A shard

    def output(self, line: bytes) -> None:
        self.lines.append(line)

    def output_dropped(self, lines: int, size: int) -> None:
        self.dropped.append((lines, size))

    def exited(self, reason: str) -> None:
        self.exits.append(reason)

    # What the test makes happen

    def exit(self, code: int | None = None, number: int | None = None) -> None:
        self.process.pid = None
        status = error.ProcessTerminated(code, number) if code or number else error.ProcessDone(0)
        self.process.protocol.processExited(Failure(status))

    def write(self, fd: int, data: bytes) -> None:
        self.process.protocol.childDataReceived(fd, data)


# Starting


def test_a_worker_is_started_without_the_current_directory_and_the_masters_secrets() -> None:
    room = Room()
    arguments = room.process.arguments
    assert arguments["executable"] == sys.executable
    assert arguments["args"][:3] == [sys.executable, "-P", "-c"]
    assert arguments["args"][4:] == ["x:milter"]
    assert f"main({os.getpid()}, sys.argv[1:], " in arguments["args"][3]
    assert arguments["env"] == {"LANG": "C"}
    assert {0: "w", 1: "r", 2: "r"}.items() <= arguments["childFDs"].items()
    assert room.process.closed == ["stdin"]
    assert room.place.pid == NO_PROCESS


def test_a_worker_gets_an_allow_list_of_the_environment() -> None:
    environ = {"PATH": "/bin", "LC_ALL": "C", "SECRET": "x", "PYTHONSTARTUP": "x"}
    kept = {"PATH": "/bin", "LC_ALL": "C", "PYTHONUNBUFFERED": "1", "EXTRA": "1"}
    threads = dict.fromkeys(THREADS, "1")
    assert worker_environment(environ, {"EXTRA": "1"}) == {**kept, **threads}


def test_numerical_libraries_start_one_thread_unless_the_operator_says_otherwise() -> None:
    found = worker_environment({"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": ""}, {})
    assert found == {
        "OMP_NUM_THREADS": "4",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "",
        "NUMEXPR_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    assert worker_environment({}, {"OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"


def options(program: str) -> dict[str, Any]:
    """With what the program calls the worker's main function."""
    found: dict[str, Any] = ast.literal_eval(program.partition("**")[2].removesuffix(")"))
    return found


@pytest.mark.parametrize(("slot", "cpus"), [(1, (4,)), (2, (6,)), (3, (4,))])
def test_cpus_are_dealt_out_in_turn(slot: int, cpus: tuple[int]) -> None:
    workplace = WorkerConfig(("x:milter",), {}, nice=5, memory_limit=10, cpus=(4, 6), open_files=9)
    said = options(workplace.bootstrap(slot, 9))
    assert said == {
        "nice": 5,
        "memory_limit": 10,
        "cpus": cpus,
        "mark": 9,
        "script": False,
        "open_files": 9,
        "sandbox": {},
    }
    script = WorkerConfig(("x.py",), script=True, sandbox={"mode": "on"}).bootstrap(slot)
    said = options(script)
    assert (said["cpus"], said["mark"], said["script"]) == ((), 0, True)
    assert said["sandbox"] == {"mode": "on"}


def test_a_system_that_refuses_is_an_error_of_the_start() -> None:
    room = Room(started=False)
    room.refuse = OSError(11, "no more")
    with pytest.raises(OSError, match="no more"):
        room.start()
    room.place.kill_descendants()  # there is none, so no group is signalled


# Ends


@pytest.mark.parametrize(
    ("code", "number", "reason"),
    [
        (None, None, "exited with code 0"),
        (3, None, "exited with code 3"),
        (None, signal.SIGSEGV, "killed by SIGSEGV"),
        (None, signal.SIGKILL, "killed by SIGKILL, perhaps out of memory"),
        (None, 40, "killed by signal 40"),
    ],
)
def test_the_exit_says_why(code: int | None, number: int | None, reason: str) -> None:
    room = Room()
    room.exit(code, number)
    assert room.exits == [reason]
    room.place.kill_descendants()


def test_a_signal_to_a_process_that_is_gone_is_nothing() -> None:
    room = Room()
    room.process.pid = None
    room.place.kill()
    room.place.dump_stacks()
    assert room.process.signals == []


def test_stacks_are_asked_for_by_a_signal() -> None:
    room = Room()
    room.place.dump_stacks()
    assert room.process.signals == [signal.SIGUSR1]


def test_killing_ends_the_group_and_needs_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    room = Room()
    script = (
        "import subprocess; child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    ) as worker:
        assert worker.stdout is not None
        sleeper = psutil.Process(int(worker.stdout.readline()))
        room.place.pid = worker.pid
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            patch.setattr("builtins.open", refuse)
            room.place.kill()
        assert room.process.signals == [signal.SIGKILL]
        sleeper.wait(10)


def test_what_a_dead_worker_has_left_is_ended_by_its_mark() -> None:
    room = Room()
    room.exit()
    assert room.marks == ["marked"]
    room.place.kill_descendants()
    assert room.marks == ["marked", "end 7"]


def test_a_worker_that_was_not_started_leaves_no_mark() -> None:
    room = Room(started=False)
    room.refuse = OSError(11, "no more")
    with pytest.raises(OSError, match="no more"):
        room.start()
    assert room.marks == ["marked", "end 7"]


def test_memory_is_that_of_the_process() -> None:
    room = Room()
    assert room.place.memory() == 0
    room.place.pid = os.getpid()
    assert room.place.memory() > 1_000_000


def test_memory_that_cannot_be_looked_at_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(psutil, "Process", refuse)
    assert Room().place.memory() == 0


# Stopped


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_process_that_a_signal_has_stopped_is_found() -> None:
    room = Room()
    assert not room.place.is_stopped()  # there is none
    with subprocess.Popen(["sleep", "600"]) as worker:
        room.place.pid = worker.pid
        assert not room.place.is_stopped()
        worker.send_signal(signal.SIGSTOP)
        until(room.place.is_stopped)
        assert room.place.is_stopped()  # it stays so
        worker.send_signal(signal.SIGCONT)
        until(lambda: not room.place.is_stopped())
        assert not room.place.is_traced()
        worker.send_signal(signal.SIGSTOP)
        worker.kill()
        assert worker.wait() == -signal.SIGKILL  # whose exit was left to whom it belongs to
        assert not room.place.is_stopped()


def test_a_process_that_a_debugger_has_stopped_is_traced_and_not_stopped() -> None:
    room = Room()
    debugger = (
        "import ctypes, os, sys\n"
        "pid = int(sys.argv[1])\n"
        "assert ctypes.CDLL(None).ptrace(16, pid, 0, 0) == 0\n"  # PTRACE_ATTACH
        "os.waitpid(pid, 0); print('attached', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(["sleep", "600"]) as worker:
        room.place.pid = worker.pid
        with subprocess.Popen(
            [sys.executable, "-c", debugger, str(worker.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as tracer:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == b"attached\n"
            assert psutil.Process(worker.pid).status() == psutil.STATUS_TRACING_STOP
            assert (room.place.is_stopped(), room.place.is_traced()) == (False, True)
            tracer.communicate(timeout=30)
        until(lambda: not room.place.is_traced())
        worker.kill()


# Output


def test_output_comes_line_by_line() -> None:
    room = Room()
    room.write(2, b"one\ntwo\nthr")
    assert room.lines == [b"one", b"two"]
    room.write(1, b"other\n")
    room.write(2, b"ee\n")
    assert room.lines[2:] == [b"other", b"three"]


def test_the_last_words_need_no_line_end() -> None:
    room = Room()
    room.write(2, b"Fatal")
    room.write(1, b"x\n")
    room.exit()
    assert room.lines == [b"x", b"Fatal"]


def test_what_was_written_until_now_can_be_read_at_once() -> None:
    room = Room()
    room.process.pipes[1].say(b"o", b"ne\n")
    room.process.pipes[2].say(b"two\n")
    room.place.read_output()
    assert sorted(room.lines) == [b"one", b"two"]


def test_a_worker_that_writes_for_ever_does_not_keep_us() -> None:
    room = Room()
    room.process.pipes[1].say(*[b"x\n"] * 1000)
    del room.process.pipes[2]
    room.place.read_output()
    assert room.process.pipes[1].reads == MAX_CATCH_UP


def test_a_worker_that_writes_more_than_is_read_has_to_wait_for_the_next_second() -> None:
    room = Room()
    for _ in range(MAX_READ // 8192 + 1):
        room.write(1, b"x" * 8191 + b"\n")
    assert [pipe.held for pipe in room.process.pipes.values()] == [True, True]
    room.process.pipes[1].say(b"later\n")
    room.place.read_output()
    assert room.process.pipes[1].reads == 0
    room.advance(SECOND)
    assert [pipe.held for pipe in room.process.pipes.values()] == [False, False]
    room.place.read_output()
    assert room.lines[-1] == b"later"
    shown = len(room.lines) - 1
    assert room.dropped == [(MAX_READ // 8192 + 1 - shown, (MAX_READ // 8192 + 1 - shown) * 8192)]


def test_output_that_descendants_hold_open_is_read_for_a_while() -> None:
    room = Room()
    room.exit()
    room.advance(OUTPUT_GRACE)
    assert room.process.closed == ["stdin", "all"]
    room.process.protocol.processEnded(Failure(error.ProcessDone(0)))
    assert len(room.exits) == 1
