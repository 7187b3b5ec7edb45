"""One worker process as the master sees it. Only the process and the socket pair are faked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from amp_link import Link, deliver
from ampoule import commands as ampoule_commands
from twisted.internet import error
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.protocols import amp
from twisted.python.failure import Failure

from sharded_milter.errors import CallbackFailed, WorkerLost
from sharded_milter.ipc.messages import MAX_INLINE, Ask, LoadFailed, Memory, Question, Ready, blob
from sharded_milter.pool.shard import EXIT_GRACE, SILENCE_GRACE, Shard, State
from sharded_milter.pool.spawned import (
    MAX_CATCH_UP,
    MAX_LOG_LINE,
    OUTPUT_GRACE,
    Workplace,
    worker_environment,
)
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

NO_PROCESS = 2**22 + 1  # above every process id that Linux gives


class Pipe:
    """A pipe that the worker writes to; what waits in it comes piece by piece."""

    def __init__(self, process: Process, fd: int) -> None:
        self.process = process
        self.fd = fd
        self.pieces: list[int] = []
        self.reads = 0
        self.reader, self.writer = os.pipe()

    def say(self, *pieces: bytes) -> None:
        self.pieces += map(len, pieces)
        os.write(self.writer, b"".join(pieces))

    def fileno(self) -> int:
        return self.reader

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


class Worker(amp.AMP):
    """The other side; answers what the test put into `answers`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answers: list[Deferred[dict[str, Any]]] = []
        self.asked: list[tuple[bytes, bytes, bytes]] = []

    @Ask.responder
    def ask(
        self, head: bytes, connection: Any, message: Any, **rest: Any
    ) -> Deferred[dict[str, Any]]:
        self.asked.append((head[:1], bytes(connection), bytes(message)))
        self.rest = rest
        return self.answers.pop(0)

    @ampoule_commands.Shutdown.responder  # type: ignore[untyped-decorator]
    def shut_down(self) -> dict[str, Any]:
        return {}


class Room(Clock):
    """A reactor with one shard, its worker, and the list of what the owner was told."""

    def __init__(self, *, started: bool = True) -> None:
        super().__init__()
        self.told: list[str] = []
        self.refuse: OSError | None = None
        self.no_descriptor: OSError | None = None
        self.worker = Worker()
        self.ours, self.theirs = Link(), Link()
        self.shard = Shard(3, Workplace(("x:milter",), {"LANG": "C"}), self, self)
        if started:
            self.shard.start()

    @property
    def process(self) -> Process:
        process: Process = self.shard.process
        return process

    # What the shard uses of a reactor

    def spawnProcess(self, protocol: Any, executable: str, args: list[str], **rest: Any) -> Process:
        if self.refuse is not None:
            raise self.refuse
        process = Process(protocol, {"executable": executable, "args": args, **rest})
        protocol.transport = process
        protocol.connectionMade()
        return process

    def adoptStreamConnection(self, fd: int, family: int, factory: Any) -> None:
        if self.no_descriptor is not None:
            raise self.no_descriptor
        self.parent: Any = factory.buildProtocol(None)
        self.parent.makeConnection(self.ours)
        self.worker.makeConnection(self.theirs)  # type: ignore[no-untyped-call]

    # What the shard tells its owner

    def shard_ready(self, shard: Shard) -> None:
        self.told.append("ready")

    def shard_answered(self, shard: Shard) -> None: ...

    def shard_idle(self, shard: Shard) -> None:
        self.told.append("idle")

    def shard_deaf(self, shard: Shard) -> None:
        self.told.append("deaf")

    def shard_gone(self, shard: Shard) -> None:
        self.told.append("gone")

    # What the test makes happen

    def deliver(self) -> None:
        """Everything that was sent arrives."""
        deliver((self.ours, self.worker), (self.theirs, self.parent))

    def say(self, command: Any, **arguments: Any) -> None:
        self.worker.callRemote(command, **arguments)  # type: ignore[no-untyped-call]
        self.deliver()

    def be_ready(self) -> None:
        manifest = Manifest("spamguard").to_packet()[5:]
        fields = {"name": b"spamguard", "light": b"RH", "shard_by": b"sender", "pinning": b"none"}
        self.say(Ready, milters=[{**fields, "negotiation": manifest}], socket=b"unix:/s")

    def ask(self, message: bytes | Memory = b"message", answer: Any = None) -> list[Any]:
        """Asks; what the Deferred ends with comes into the list."""
        ended: list[Any] = []
        self.worker.answers.append(answer or Deferred())
        self.open = self.worker.answers[-1]
        asked = self.shard.ask(Question(b"E", b"connection", message))
        asked.addCallbacks(ended.append, lambda failure: ended.append(failure.value))
        self.deliver()
        return ended

    def answer(self, replies: bytes | Memory = b"replies", error: bytes = b"") -> None:
        self.open.callback({"replies": replies, "error": error})
        self.deliver()

    def exit(self, code: int | None = None, number: int | None = None) -> None:
        self.process.pid = None
        status = error.ProcessTerminated(code, number) if code or number else error.ProcessDone(0)
        self.process.protocol.processExited(Failure(status))

    def hang_up(self) -> None:
        """The worker's end of the socket is closed."""
        self.parent.connectionLost(Failure(error.ConnectionDone()))


def ready_room() -> Room:
    room = Room()
    room.be_ready()
    room.told.clear()
    return room


# Starting


def test_a_worker_is_started_without_the_current_directory_and_the_masters_secrets() -> None:
    arguments = Room().process.arguments
    assert arguments["executable"] == sys.executable
    assert arguments["args"][:3] == [sys.executable, "-P", "-c"]
    assert arguments["args"][4:] == ["x:milter"]
    assert f"main({os.getpid()}, sys.argv[1:], " in arguments["args"][3]
    assert arguments["env"] == {"LANG": "C"}
    assert {0: "w", 1: "r", 2: "r"}.items() <= arguments["childFDs"].items()
    assert Room().process.closed == ["stdin"]


def test_a_worker_gets_an_allow_list_of_the_environment() -> None:
    environ = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "SECRET": "x",
        "PYTHONSTARTUP": "x",
        "LD_PRELOAD": "x",
    }
    assert worker_environment(environ, {"EXTRA": "1"}) == {
        "PATH": "/bin",
        "LC_ALL": "C",
        "PYTHONUNBUFFERED": "1",
        "EXTRA": "1",
    }


@pytest.mark.parametrize(("slot", "cpus"), [(1, "(4,)"), (2, "(6,)"), (3, "(4,)")])
def test_cpus_are_dealt_out_in_turn(slot: int, cpus: str) -> None:
    workplace = Workplace(("x:milter",), {}, nice=5, memory_limit=10, cpus=(4, 6))
    assert f"nice=5, memory_limit=10, cpus={cpus}, script=False)" in workplace.bootstrap(slot)
    assert "cpus=(), script=True)" in Workplace(("x.py",), script=True).bootstrap(slot)


def test_a_system_that_refuses_is_an_error_of_the_start() -> None:
    room = Room(started=False)
    room.refuse = OSError(11, "no more")
    with pytest.raises(OSError, match="no more"):
        room.shard.start()


def test_a_worker_that_cannot_be_spoken_to_is_killed() -> None:
    room = Room(started=False)
    room.no_descriptor = OSError(24, "none left")
    with pytest.raises(OSError, match="none left"):
        room.shard.start()
    assert room.process.signals == [signal.SIGKILL]
    assert room.shard.pid == NO_PROCESS  # whose group, and no other, is ended with it


def test_ready_brings_the_manifest() -> None:
    room = Room()
    states = [room.shard.state]
    room.be_ready()
    assert [*states, room.shard.state] == [State.STARTING, State.IDLE]
    assert room.told == ["ready"]
    assert room.shard.manifests == (
        Manifest("spamguard", light=frozenset({Stage.RCPT, Stage.HELO}), shard_by="sender"),
    )


def test_a_milter_that_cannot_be_loaded_is_told_and_the_worker_ends() -> None:
    room = Room()
    room.say(LoadFailed, reason=b"milter x: no", details=b"traceback")
    assert room.shard.load_error is not None
    assert (str(room.shard.load_error), room.shard.load_error.details) == (
        "milter x: no",
        "traceback",
    )
    assert room.ours.lost
    room.exit()
    assert room.told == ["deaf", "gone"]


def test_who_is_killed_meanwhile_is_not_ready_any_more() -> None:
    room = Room()
    room.shard.kill("too slow")
    room.be_ready()
    assert room.shard.state is State.KILLED
    assert room.told == []


# Asking


@pytest.mark.parametrize("size", [0, 100, MAX_INLINE, MAX_INLINE + 1, 300_000])
def test_a_job_goes_over_and_its_answer_comes_back_whatever_their_size(size: int) -> None:
    room = ready_room()
    message, replies = os.urandom(size), os.urandom(size)
    ended = room.ask(blob(message))
    states = [room.shard.state]
    assert room.worker.asked == [(b"E", b"connection", message)]
    room.answer(blob(replies))
    assert ended == [replies]
    assert room.told == ["idle"]
    assert [*states, room.shard.state] == [State.BUSY, State.IDLE]
    assert room.shard.answered == 1


@pytest.mark.parametrize("size", [1, MAX_INLINE + 1])
def test_a_command_that_is_no_part_of_the_transcript_goes_over_too(size: int) -> None:
    room = ready_room()
    room.worker.answers.append(Deferred())
    command = blob(b"x" * size)
    asked = Question(b"U", b"connection", b"message", milter=2, session=3, command=command)
    room.shard.ask(asked)
    room.deliver()
    assert room.worker.asked == [(b"U", b"connection", b"message")]
    assert {name: bytes(value) for name, value in room.worker.rest.items()} == {
        "unknown": b"x" * size
    }


def test_what_the_milter_raised_is_told_and_the_shard_is_idle_again() -> None:
    room = ready_room()
    ended = room.ask()
    room.answer(b"", b"ValueError: bad")
    assert [str(each) for each in ended] == ["ValueError: bad"]
    assert isinstance(ended[0], CallbackFailed)
    assert (room.shard.state, room.told) == (State.IDLE, ["idle"])


def test_a_job_that_cannot_be_sent_costs_the_worker_and_not_the_master() -> None:
    room = ready_room()
    ended = room.ask(b"x" * 100_000)
    assert isinstance(ended[0], WorkerLost)
    assert room.process.signals == [signal.SIGKILL]
    assert "it could not be asked" in room.shard.killed_for
    assert room.shard.state is State.KILLED


def test_a_worker_that_answers_nonsense_is_killed() -> None:
    room = ready_room()
    ended = room.ask()
    with capturedLogs():
        room.open.errback(ZeroDivisionError("raised through AMP"))
        room.deliver()
    assert isinstance(ended[0], WorkerLost)
    assert room.process.signals == [signal.SIGKILL]


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
def test_the_exit_says_why_and_the_job_hears_it(
    code: int | None, number: int | None, reason: str
) -> None:
    room = ready_room()
    ended = room.ask()
    room.hang_up()
    assert ended == []
    room.exit(code, number)
    assert [str(each) for each in ended] == [reason]
    assert isinstance(ended[0], WorkerLost)
    assert room.shard.state is State.GONE
    assert room.told == ["deaf", "deaf", "gone"]
    room.advance(60.0)
    assert room.process.signals == []


def test_an_exit_that_is_seen_before_the_closed_socket_counts_once() -> None:
    room = ready_room()
    ended = room.ask()
    room.exit(1)
    room.hang_up()
    assert len(ended) == 1
    assert room.told == ["deaf", "gone"]
    room.advance(60.0)


def test_a_worker_that_closes_its_socket_and_lives_on_is_killed() -> None:
    room = ready_room()
    room.hang_up()
    assert room.told == ["deaf"]
    room.advance(SILENCE_GRACE / 2)
    assert room.process.signals == []
    room.advance(SILENCE_GRACE / 2)
    assert room.process.signals == [signal.SIGKILL]
    room.exit(None, signal.SIGKILL)
    assert room.shard.exit_reason == "its socket was closed"


def test_who_killed_it_and_why_is_the_reason() -> None:
    room = ready_room()
    room.shard.kill("it took too long")
    room.shard.kill("the service stops")
    room.exit(None, signal.SIGKILL)
    assert room.shard.exit_reason == "it took too long"
    room.shard.kill("again")
    assert room.process.signals == [signal.SIGKILL, signal.SIGKILL]


def test_an_answer_that_comes_after_the_kill_makes_nobody_idle() -> None:
    room = ready_room()
    ended = room.ask()
    room.shard.kill("it took too long")
    room.answer()
    assert ended == [b"replies"]
    assert room.told == []
    assert room.shard.state is State.KILLED


def test_a_signal_to_the_dead_is_nothing() -> None:
    room = ready_room()
    room.process.pid = None
    room.shard.kill("too late")


def test_descendants_are_killed_too() -> None:
    room = ready_room()
    script = (
        "import subprocess; child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        sleeper = psutil.Process(int(worker.stdout.readline()))
        room.shard.pid = worker.pid
        room.shard.kill("it took too long")
        sleeper.wait(10)
        worker.kill()


@pytest.mark.parametrize("exception", [psutil.NoSuchProcess(1), psutil.AccessDenied(1)], ids=repr)
def test_a_descendant_that_is_gone_already_is_no_trouble(
    exception: psutil.Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = []

    class Child:
        def kill(self) -> None:
            killed.append(self)
            raise exception

    class Family:
        def __init__(self, pid: int) -> None: ...

        def children(self, recursive: bool) -> list[Child]:
            return [Child(), Child()]

    monkeypatch.setattr(psutil, "Process", Family)
    room = ready_room()
    room.shard.kill("it took too long")
    assert len(killed) == 2
    assert room.process.signals == [signal.SIGKILL]


# Draining


def test_an_idle_worker_is_shut_down_at_once() -> None:
    room = ready_room()
    room.shard.drain()
    assert room.shard.state is State.LEAVING
    room.deliver()
    assert room.ours.lost
    room.exit()
    assert room.told == ["deaf", "gone"]


def test_a_busy_worker_may_finish_first() -> None:
    room = ready_room()
    ended = room.ask()
    room.shard.drain()
    assert not room.ours.lost
    room.answer()
    assert ended == [b"replies"]
    assert room.told == []
    assert room.ours.lost


@pytest.mark.parametrize("drain", [Shard.drain, lambda shard: shard.kill("no")])
def test_draining_is_done_once(drain: Callable[[Shard], None]) -> None:
    room = ready_room()
    drain(room.shard)
    state = room.shard.state
    room.shard.drain()
    assert room.shard.state is state


def test_a_worker_that_does_not_end_when_told_to_is_killed() -> None:
    room = ready_room()
    room.shard.drain()
    room.advance(EXIT_GRACE)
    assert room.process.signals == [signal.SIGKILL]
    room.exit(None, signal.SIGKILL)
    assert room.shard.exit_reason == "it did not end when it was told to"


def test_a_worker_that_dies_while_it_is_shut_down_is_just_gone() -> None:
    room = ready_room()
    room.shard.drain()
    room.exit(1)
    assert room.told == ["deaf", "gone"]
    room.advance(60.0)
    assert room.process.signals == []


# Output


def lines(room: Room, *chunks: tuple[int, bytes], end: bool = False) -> list[str]:
    with capturedLogs() as events:
        for fd, data in chunks:
            room.process.protocol.childDataReceived(fd, data)
        if end:
            room.exit()
    return [event["log_format"].format(**event) for event in events if "line" in event]


def test_output_is_logged_line_by_line_with_slot_and_message() -> None:
    room = ready_room()
    assert lines(room, (2, b"one\ntwo\nthr")) == ["[3] one", "[3] two"]
    room.shard.label = lambda: "qid=1"
    assert lines(room, (1, b"other\n"), (2, b"ee\n")) == ["[3 qid=1] other", "[3 qid=1] three"]


def test_the_last_words_need_no_line_end() -> None:
    room = ready_room()
    assert lines(room, (2, b"Fatal"), (1, b"x\n"), end=True) == ["[3] x", "[3] Fatal"]


def test_an_endless_line_is_cut() -> None:
    room = ready_room()
    written = lines(room, (2, b"x" * (MAX_LOG_LINE + 1)), (2, b"y\n"))
    assert written == ["[3] " + "x" * MAX_LOG_LINE, "[3] y"]


def test_output_in_no_encoding_is_logged_too() -> None:
    assert lines(ready_room(), (2, b"caf\xe9\n")) == ["[3] caf\udce9"]


def test_what_was_written_during_a_job_is_logged_with_it() -> None:
    room = ready_room()
    room.shard.label = lambda: "qid=1"
    room.ask()
    room.process.pipes[1].say(b"o", b"ne\n")
    room.process.pipes[2].say(b"two\n")
    with capturedLogs() as events:
        room.answer()
        room.shard.label = lambda: "qid=2"
    texts = [event["log_format"].format(**event) for event in events]
    assert sorted(texts) == ["[3 qid=1] one", "[3 qid=1] two"]


def test_a_worker_that_writes_for_ever_does_not_keep_us() -> None:
    room = ready_room()
    room.ask()
    room.process.pipes[1].say(*[b"x\n"] * 1000)
    del room.process.pipes[2]
    room.answer()
    assert room.process.pipes[1].reads == MAX_CATCH_UP


def test_output_that_descendants_hold_open_is_read_for_a_while() -> None:
    room = ready_room()
    room.exit()
    room.advance(OUTPUT_GRACE)
    assert room.process.closed == ["stdin", "all"]
    room.process.protocol.processEnded(Failure(error.ProcessDone(0)))
    assert room.told == ["deaf", "gone"]


# What the pool wants to know


def test_stacks_are_dumped_by_workers_that_understand_the_signal() -> None:
    room = Room()
    room.shard.dump_stacks()
    assert room.process.signals == []
    room.be_ready()
    room.shard.dump_stacks()
    assert room.process.signals == [signal.SIGUSR1]


def test_memory_is_that_of_the_process() -> None:
    room = ready_room()
    assert room.shard.rss() == 0
    room.shard.pid = os.getpid()
    assert room.shard.rss() > 1_000_000


def test_a_shard_prints_its_number_and_process() -> None:
    assert repr(Room().shard) == f"shard 3 (pid {NO_PROCESS})"


def test_a_deferred_answer_may_be_there_already() -> None:
    room = ready_room()
    ended = room.ask(answer=succeed({"replies": b"replies", "error": b""}))
    assert ended == [b"replies"]
