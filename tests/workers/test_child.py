"""The worker's end of AMP: whatever a milter does, an answer goes back and the worker lives."""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from amp_link import WRITABLE, Link, deliver
from ampoule.commands import Echo
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock
from twisted.protocols import amp
from twisted.python.failure import Failure

from sharded_milter.errors import MilterLoadError
from sharded_milter.ipc.channel import MasterChannel
from sharded_milter.ipc.memory import MAX_INLINE, Memory, packed
from sharded_milter.ipc.messages import MAX_LINE, MAX_PACKETS, WITHDRAWN, Answer, Ask
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Protocol, Stage
from sharded_milter.workers.child import MAX_PER_ITERATION, Child
from sharded_milter.workers.sandbox import NO_SANDBOX, Report, Sandbox

MILTER = """
import asyncio, json, sys
from sharded_milter import *
from twisted.internet.defer import succeed

waiting = []
milter = Milter("child", macros={"eom": ["i"]}, shard_by="client")
kept = []

@milter.helo(light=True)
def helo(connection):
    return Reject("no")

@milter.eom
def scan(message):
    body = message.body
    if body.startswith(b"call "):
        return eval(body[5:])
    return Accept(ReplaceBody(body))

def fail(error):
    raise error

began = []

@milter.mail
async def mail(envelope):
    began.append(envelope.sender.raw)
    if envelope.sender.raw.startswith("wait"):
        await waiting[-1]
    await asyncio.sleep(0.001)
    await succeed(None)
    if envelope.sender.raw == "exit":
        sys.exit(3)
    return TempFail(envelope.sender.raw)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with a milter in it, and afterwards the import system as before."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    (tmp_path / "child_milter.py").write_text(MILTER)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        del sys.modules[name]


class Owner:
    """Keeps what the master is told, and the answers by their numbers."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.answers: dict[int, Answer] = {}
        self.code = b""

    def ready(self, milters: list[dict[str, bytes]], code: bytes, socket: bytes) -> None:
        self.told.append(("ready", *milters))
        self.code, self.socket = code, socket

    def load_failed(self, reason: bytes, details: bytes) -> None:
        self.told.append(("load failed", reason, details))

    def sandboxed(self, text: bytes, incomplete: bytes) -> None:
        self.told.append(("sandboxed", text, incomplete))

    def answered(self, number: int, answer: Answer) -> None:
        assert number not in self.answers
        self.answers[number] = answer

    def ponged(self) -> None: ...

    def broke_rule(self, why: str) -> None:
        raise AssertionError(why)

    def channel_closed(self) -> None:
        raise AssertionError


class Room:
    """A child and its master, connected in memory."""

    def __init__(self, spec: str = "child_milter:milter", sandbox: Sandbox = NO_SANDBOX) -> None:
        self.clock, self.owner = Clock(), Owner()
        self.master = MasterChannel(self.owner, self.clock)
        self.child = Child([spec], sandbox=sandbox)
        self.ours, self.theirs = Link(), Link()
        self.master.makeConnection(self.ours)  # type: ignore[no-untyped-call]
        self.child.makeConnection(self.theirs)
        self.pump()

    @property
    def answers(self) -> dict[int, Answer]:
        return self.owner.answers

    @property
    def told(self) -> list[tuple[Any, ...]]:
        return self.owner.told

    def pump(self) -> None:
        deliver((self.ours, self.child), (self.theirs, self.master))

    def together(self) -> None:
        """What the master has said arrives in one read; then everything else."""
        self.clock.advance(0)
        self.ours.sent = [b"".join(part for part in self.ours.sent if isinstance(part, bytes))]
        self.pump()

    def put(self, number: int, stage: Stage, message: bytes, connection: bytes = b"") -> None:
        """A question leaves, sooner or later."""
        self.master.ask(number, (stage.value, 0, 0, 0), packed(connection), packed(message))

    def ask(self, stage: Stage, message: bytes, connection: bytes = b"") -> Answer:
        """What comes back."""
        number = 1000 + len(self.answers)
        self.put(number, stage, message, connection)
        self.pump()
        while number not in self.answers and self.clock.getDelayedCalls():
            self.clock.advance(0)  # the master reads a large answer in later turns
            self.pump()
        return self.answers[number]

    def put_scan(self, number: int, body: bytes) -> None:
        self.put(number, Stage.EOM, commands.Eom(body).encode())

    def scan(self, body: bytes) -> Answer:
        return self.ask(Stage.EOM, commands.Eom(body).encode())

    def call(self, expression: str) -> Answer:
        """The end of message callback returns, or raises, what the expression does."""
        return self.scan(b"call " + expression.encode())


def accepted(body: bytes) -> Answer:
    """The answer of `scan` to a body."""
    return Answer(replies.ReplaceBody(body).encode() + replies.Accept().encode())


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# The start


class Cage(Sandbox):
    """Keeps what is to be shut in, and is never entered."""

    def enter(self, milters: Any, specs: Any) -> Report:
        assert [milter.manifest.name for milter in milters] == ["child"]
        assert specs == ["child_milter:milter"]
        return self._report()

    def _report(self) -> Report:
        return Report("shut in", True, entered=True)

    def hint(self, error: BaseException) -> str:
        return f"do allow {error}"


class Open(Cage):
    def _report(self) -> Report:
        return Report("not shut in")


class Broken(Cage):
    def _report(self) -> Report:
        raise MilterLoadError("no sandbox here")


def test_the_sandbox_is_entered_and_told_before_the_worker_is_ready(
    capsys: pytest.CaptureFixture[str],
) -> None:
    room = Room(sandbox=Cage())
    assert [what for what, *_ in room.told] == ["sandboxed", "ready"]
    assert room.told[0] == ("sandboxed", b"shut in", b"yes")
    room.call("fail(PermissionError('this'))")
    assert capsys.readouterr().err.endswith("PermissionError: this\ndo allow this\n")


def test_a_worker_that_is_not_shut_in_gives_no_advice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Room(sandbox=Open()).call("fail(PermissionError('this'))")
    assert capsys.readouterr().err.endswith("PermissionError: this\n")


def test_a_sandbox_that_cannot_be_entered_is_a_milter_that_cannot_be_loaded() -> None:
    assert Room(sandbox=Broken()).told == [("load failed", b"no sandbox here", b"")]


def test_a_milter_that_is_loaded_is_told_with_its_manifest() -> None:
    ((_, milter),) = Room().told
    negotiation = milter.pop("negotiation")
    assert milter == {
        "name": b"child", "light": b"H", "shard_by": b"client", "affinity": b"none",
    }  # fmt: skip
    manifest = Manifest.from_packet("child", negotiation, frozenset(), "client")
    assert manifest.macros == ((Stage.EOM, ("i",)),)
    assert manifest.answers(Stage.MAIL)
    assert not manifest.answers(Stage.RCPT)
    assert manifest.protocol & Protocol.HDR_LEADSPC


def test_a_milter_that_fails_is_told_with_its_traceback(folder: Path) -> None:
    (folder / "child_milter.py").write_text("1/0")
    ((kind, reason, details),) = Room().told
    assert kind == "load failed"
    assert b"ZeroDivisionError" in reason
    assert b'child_milter.py", line 1' in details


@pytest.mark.parametrize("spec", ["none:milter", "child_milter:none", "nonsense", "./none.py:x"])
def test_a_milter_that_is_not_there_is_told(spec: str) -> None:
    ((kind, reason, details),) = Room(spec).told
    assert (kind, details) == ("load failed", b"")
    assert spec.rpartition(":")[2].encode() in reason or b"./none.py" in reason


def test_a_milter_that_needs_too_much_memory_is_told(folder: Path) -> None:
    (folder / "child_milter.py").write_text("raise MemoryError")
    ((kind, reason, _),) = Room().told
    assert (kind, b"MemoryError" in reason) == ("load failed", True)


@pytest.mark.parametrize("text", ["x" * 200_000, "\\ud800", "caf\\udce9", "\\n" * 100_000 + "end"])
def test_whatever_a_failing_milter_says_can_be_told(folder: Path, text: str) -> None:
    (folder / "child_milter.py").write_text(f"raise ValueError('{text}')")
    ((kind, reason, _),) = Room().told
    assert (kind, b"ValueError" in reason) == ("load failed", True)


# Answers


def test_a_job_is_answered_with_reply_packets() -> None:
    room = Room()
    answer = replies.ReplyCode("550 5.7.1 no").encode()
    assert room.ask(Stage.HELO, b"", commands.Helo("me").encode()) == Answer(answer)


@pytest.mark.parametrize("size", [0, 1000, MAX_INLINE, MAX_INLINE + 1, 300_000])
def test_messages_and_answers_have_any_size(size: int) -> None:
    body = b"x" * size
    answer = Room().scan(body)
    parts = [replies.ReplaceBody(body[n : n + 65_535]) for n in range(0, size or 1, 65_535)]
    assert answer == Answer(b"".join(p.encode() for p in [*parts, replies.Accept()]))


def test_no_descriptor_is_left_behind() -> None:
    before = descriptors()
    room = Room()
    for _ in range(5):
        room.scan(b"x" * 300_000)
        room.call("1/0" + " " * 60_000)
    room.scan(b"")
    assert descriptors() == before


def test_a_piece_that_the_milter_keeps_costs_the_others_nothing() -> None:
    room = Room()
    assert room.call("kept.append(message)" + " " * 60_000).error == b""
    assert room.scan(b"x").error == b""


def test_questions_that_arrive_together_are_answered_in_order() -> None:
    room = Room()
    bodies = [b"one", b"two", b"three"]
    for number, body in enumerate(bodies):
        room.put_scan(number, body)
    room.together()
    assert list(room.answers.items()) == [
        (number, accepted(body)) for number, body in enumerate(bodies)
    ]


def test_what_is_no_question_is_answered_by_amp_itself() -> None:
    room = Room()
    answered: list[Any] = []
    room.master.callRemote(Echo, data=b"x").addCallback(answered.append)  # type: ignore[no-untyped-call]
    room.pump()
    assert answered == [{"response": b"x"}]


# Failures


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("1/0", b"ZeroDivisionError: division by zero"),
        ("fail(ValueError('one\\ntwo\\n three'))", b"ValueError: one two three"),
        ("fail(KeyError('x'))", b"KeyError: 'x'"),
        ("fail(Exception())", b"Exception"),
        ("sys.exit(3)", b"SystemExit: 3"),
        ("fail(KeyboardInterrupt())", b"KeyboardInterrupt"),
        ("fail(asyncio.CancelledError())", b"asyncio.exceptions.CancelledError"),
        ("fail(ValueError(json.loads('\"\\\\ud800\"')))", b"ValueError: \\ud800"),
        ("'accept'", b"sharded_milter.errors.InvalidVerdict: the eom callback returned 'accept'"),
        ("Reject('x', 250)", b"sharded_milter.errors.InvalidValue: reply code 250 is not between"),
        ("(", b"File \"<string>\", line 1 ( ^ SyntaxError: '(' was never closed"),
    ],
)  # fmt: skip
def test_what_a_callback_raises_is_one_line_and_the_next_job_is_fine(
    expression: str, error: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    room = Room()
    told = room.call(expression)
    assert told == Answer(error=told.error)
    assert told.error.startswith(error)
    assert b"\n" not in told.error
    assert "Traceback (most recent call last)" in capfd.readouterr().err
    assert room.scan(b"fine") == accepted(b"fine")


def test_a_long_error_is_cut() -> None:
    assert len(Room().call("fail(ValueError('x' * 10**6))").error) == MAX_LINE


def test_an_exception_that_cannot_be_printed_is_told_all_the_same() -> None:
    room = Room()
    told = room.call("fail(type('Odd', (Exception,), {'__str__': lambda s: 1/0})())")
    assert b"Odd" in told.error


def test_a_malformed_transcript_is_an_error_and_not_the_end() -> None:
    told = Room().ask(Stage.EOM, b"\0\0\0\1")
    assert told == Answer(error=told.error)
    assert told.error.startswith(b"sharded_milter.errors.RemoteProtocolError")


def test_an_answer_for_which_there_is_no_memory_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = Room()

    refusals: list[BaseException] = [MemoryError(), OSError(24, "Too many open files")]

    def refuse(memory: Memory) -> None:
        raise refusals.pop()

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "__init__", refuse)
        told = room.call("Accept(ReplaceBody(b'x' * 100_000))")
        again = room.call("Accept(ReplaceBody(b'x' * 100_000))")
    assert again == Answer(short=b"it cannot pass its answer on: there is no memory left")
    assert told == Answer(short=b"it cannot pass its answer on: Too many open files")
    assert room.scan(b"fine") == accepted(b"fine")


# Questions that cannot be read


def test_an_answer_that_is_larger_than_it_may_be_is_an_error_of_the_milter() -> None:
    room = Room()
    room.child._answer(Answer(replies.ReplaceBody(b"").encode() * (MAX_PACKETS + 1)), b"q1", ())
    room.master._unanswered[b"q1"] = 1
    room.pump()
    error = f"the answer is too large: replies: more than {MAX_PACKETS} packets"
    assert room.answers == {1: Answer(error=error.encode())}


def test_a_question_whose_memory_was_lost_on_the_way_is_told_as_such_and_the_next_is_fine() -> None:
    before = descriptors()
    room = Room()
    for number in (1, 2, 3):
        room.put_scan(number, b"%d" % number * MAX_INLINE + b"x")
    lost = next(what for what in room.ours.sent if isinstance(what, int))
    room.ours.sent.remove(lost)
    os.close(lost)
    room.pump()
    assert room.answers.pop(1) == Answer(short=b"it cannot take a question: Too many open files")
    assert room.answers == {n: accepted(b"%d" % n * MAX_INLINE + b"x") for n in (2, 3)}
    room.answers.clear()
    room.scan(b"")
    assert descriptors() == before


def test_a_question_that_cannot_be_mapped_is_told_as_such_and_the_next_is_fine(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = descriptors()
    room = Room()

    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        told = room.ask(Stage.EOM, bytes(MAX_INLINE + 1), bytes(MAX_INLINE + 1))
    assert told == Answer(short=b"it cannot take a question: Cannot allocate memory")
    assert capfd.readouterr().err == ""
    assert room.scan(b"x" * 300_000).error == b""
    room.scan(b"")
    assert descriptors() == before


def test_an_answer_whose_memory_the_system_does_not_pass_on_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = Room()
    write = room.theirs.writeSomeData

    def send_descriptor(fd: int) -> None:
        monkeypatch.setattr(room.theirs, "writeSomeData", refuse)

    def refuse(data: bytes) -> int:
        monkeypatch.setattr(room.theirs, "writeSomeData", write)
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    monkeypatch.setattr(room.theirs, "sendFileDescriptor", send_descriptor)
    room.put_scan(1, b"call 1")
    room.pump()
    room.master._unanswered[b"q9"] = 9
    room.child._answer(Answer(replies.ReplaceBody(bytes(60_000)).encode()), b"q9", ())
    room.pump()
    why = b"it cannot pass its answer on: Too many references: cannot splice"
    assert room.answers[9] == Answer(short=why)
    assert room.child._replies == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {b"head": b"short"},
        {b"head": b"E" + bytes(18), b"message": b"?"},
        {b"head": b"E\0\1" + bytes(16)},  # there is no second milter
    ],
)
def test_a_question_that_cannot_be_read_is_an_error_and_the_next_is_fine(
    values: dict[bytes, bytes],
) -> None:
    room = Room()
    room.master._unanswered[b"q7"] = 7
    room.ours.write(
        amp.AmpBox({amp.COMMAND: Ask.commandName, amp.ASK: b"q7", **values}).serialize()
    )
    room.put_scan(8, b"fine")
    room.together()
    assert room.answers == {7: Answer(error=room.answers[7].error), 8: accepted(b"fine")}
    assert room.answers[7].error


# Questions that are withdrawn


def test_a_withdrawn_question_that_has_not_begun_is_not_begun() -> None:
    room = Room()
    for number in (1, 2, 3):
        room.put_scan(number, b"call kept.append(%d)" % number)
    room.master.withdraw(2)
    room.together()
    assert room.answers[2] == WITHDRAWN
    assert list(room.answers) == [2, 1, 3]
    assert sys.modules["child_milter"].kept == [1, 3]


def test_the_descriptor_of_a_withdrawn_question_is_closed() -> None:
    before = descriptors()
    room = Room()
    author = sys.modules["child_milter"]
    author.waiting.append(Deferred())

    async def main() -> None:
        room.put(1, Stage.MAIL, commands.Mail("wait").encode())
        room.put(2, Stage.EOM, bytes(MAX_INLINE + 1))
        room.master.withdraw(2)
        room.pump()
        author.waiting[0].callback(None)
        while 1 not in room.answers:
            await asyncio.sleep(0)
            room.pump()

    asyncio.run(main())
    assert room.answers[2] == WITHDRAWN
    assert descriptors() == before


def test_a_question_that_is_answered_or_was_never_asked_cannot_be_withdrawn() -> None:
    room = Room()
    room.put_scan(1, b"fine")
    room.pump()
    for number in (1, 99):
        room.master.withdraw(number)
    room.pump()
    assert room.answers == {1: accepted(b"fine")}


class Socket:
    """A child's transport over one end of a real socket pair."""

    connected = True
    disconnecting = False
    dataBuffer = b""
    _tempDataBuffer: tuple[()] = ()

    def __init__(self, sock: socket.socket, child: Child) -> None:
        self.sock = sock
        self.child = child
        self.fileno = sock.fileno
        self.writeSomeData = sock.send

    def doRead(self) -> None:
        self.child.dataReceived(self.sock.recv(65_536))

    def getPeer(self) -> str:
        return "peer"

    getHost = getPeer


def test_all_that_has_arrived_is_read_before_a_question_begins_that_has_waited() -> None:
    room, (ours, theirs) = Room(), socket.socketpair()
    author: Any = sys.modules["child_milter"]

    def send() -> None:
        room.clock.advance(0)
        for part in room.ours.sent:
            assert isinstance(part, bytes)
            ours.sendall(part)
        room.ours.sent.clear()

    def say_more() -> None:
        room.master.withdraw(2)
        room.put_scan(4, b"call kept.append(4)")
        send()

    author.say_more = say_more
    with ours, theirs:
        child = Child(["child_milter:milter"])
        room.master._introductions.clear()
        wire = Socket(theirs, child)
        child.makeConnection(wire)
        room.put_scan(1, b"call kept.append(say_more())")  # while it is being answered
        for number in (2, 3):
            room.put_scan(number, b"call kept.append(%d)" % number)
        send()
        wire.doRead()
        room.master.dataReceived(ours.recv(65_536))
    assert author.kept == [None, 3, 4]
    assert list(room.answers) == [1, 2, 3, 4]
    assert [number for number, answer in room.answers.items() if answer == WITHDRAWN] == [2]


# Coroutines


@pytest.mark.parametrize(
    ("sender", "answer"),
    [
        ("later", Answer(replies.ReplyCode("451 4.7.1 later").encode())),
        (
            "exit",
            Answer(
                error=b"sharded_milter.errors.CallbackFailed: the callback raised SystemExit(3)"
            ),
        ),
    ],
)
def test_a_coroutine_is_answered_when_it_ends(sender: str, answer: Answer) -> None:
    async def main() -> dict[int, Answer]:
        room = Room()
        room.put(1, Stage.MAIL, commands.Mail(sender).encode())
        room.pump()
        assert room.answers == {}
        while not room.answers:
            await asyncio.sleep(0)
            room.pump()
        return room.answers

    assert asyncio.run(main()) == {1: answer}


def test_a_coroutine_whose_answer_cannot_be_sent_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(data: bytes) -> int:
        raise OSError

    async def main() -> None:
        room = Room()
        monkeypatch.setattr(room.theirs, "writeSomeData", refuse)
        room.put(1, Stage.MAIL, commands.Mail("later").encode())
        room.pump()
        while not room.theirs.lost:
            await asyncio.sleep(0)

    asyncio.run(main())


def test_coroutines_are_asked_one_after_the_other_and_may_be_withdrawn_until_then() -> None:
    room = Room()
    author = sys.modules["child_milter"]
    author.waiting.append(Deferred())

    async def main() -> None:
        for number, sender in enumerate(("wait 1", "2", "3", "4")):
            room.put(number, Stage.MAIL, commands.Mail(sender).encode())
        room.clock.advance(0)
        room.pump()
        await asyncio.sleep(0)
        assert author.began == ["wait 1"]
        room.master.withdraw(0)  # it has begun
        room.master.withdraw(2)
        room.pump()
        assert room.answers == {2: WITHDRAWN}
        author.waiting[0].callback(None)
        while len(room.answers) < 4:
            room.pump()
            await asyncio.sleep(0)

    asyncio.run(main())
    assert author.began == ["wait 1", "2", "4"]
    texts = {n: str(replies.parse_reply(room.answers[n].replies)) for n in (0, 1, 3)}
    assert {n: text.rstrip("')")[-1] for n, text in texts.items()} == {0: "1", 1: "2", 3: "4"}


# Turns


def test_a_master_that_always_has_one_more_question_leaves_the_milters_timers_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reactor = MemoryReactorClock()
    monkeypatch.setattr("twisted.internet.reactor", reactor)
    room = Room()
    count = 2 * MAX_PER_ITERATION + 1
    for number in range(count):
        room.put_scan(number, b"%d" % number)
    room.together()
    assert len(room.answers) == MAX_PER_ITERATION
    room.put_scan(count, b"one more")
    room.clock.advance(0)
    room.pump()
    assert len(room.answers) == MAX_PER_ITERATION
    for _ in range(2):
        reactor.advance(0)
    room.pump()
    assert list(room.answers) == [*range(count + 1)]
    assert reactor.getDelayedCalls() == []


def test_when_the_master_is_gone_nothing_more_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    reactor = MemoryReactorClock()
    monkeypatch.setattr("twisted.internet.reactor", reactor)
    room = Room()
    for number in range(MAX_PER_ITERATION + 1):
        room.put_scan(number, b"call kept.append(1)")
    room.together()
    room.child.stop()
    room.child.connectionLost(Failure(ConnectionDone()))
    reactor.advance(0)
    assert len(sys.modules["child_milter"].kept) == MAX_PER_ITERATION
    assert (reactor.hasStopped, room.theirs.lost) == (True, True)


# The code


def test_the_masters_are_told_whether_workers_run_the_same_code(folder: Path) -> None:
    (folder / "beside.py").write_text("TEXT = 'one'")
    (folder / "mine.py").write_text(f"import beside\n{MILTER}")

    def code() -> bytes:
        for name in ("mine", "beside"):
            sys.modules.pop(name, None)
        return Room("mine:milter").owner.code

    first = code()
    assert (len(first), code()) == (32, first)
    (folder / "beside.py").write_text("TEXT = 'two'")
    second = code()
    (folder / "mine.py").write_text(f"import beside\n{MILTER}#")
    third = code()
    assert len({first, second, third}) == 3


# Memory


class Full(Link):
    """A socket that is full when something is written, and has room when that is waited for."""

    waited = 0

    def fileno(self) -> int:
        return WRITABLE

    def sendFileDescriptor(self, fd: int) -> None:
        """It waits too."""

    def writeSomeData(self, data: bytes) -> int:
        return 0

    def write(self, data: bytes) -> None:
        self.dataBuffer += data

    def doWrite(self) -> None:
        self.waited += 1
        self.dataBuffer = b""


def test_the_memory_of_an_answer_is_kept_until_the_socket_has_it() -> None:
    room, link, large = Room(), Full(), bytes(MAX_INLINE)
    before = descriptors()
    room.child.transport = link
    room.put_scan(1, large)
    room.pump()
    assert (descriptors(), link.waited) == (before + 1, 0)
    room.put_scan(2, large)
    room.clock.advance(0)
    room.pump()  # what waits leaves before the next descriptor
    assert (descriptors(), link.waited) == (before + 2, 1)
    room.child.transport = room.theirs
    room.put_scan(3, b"")
    room.clock.advance(0)
    room.pump()
    room.put_scan(4, large)
    room.clock.advance(0)
    room.pump()
    assert descriptors() == before
