"""The worker's end of AMP: whatever a milter does, an answer goes back and the worker lives."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from amp_link import Link, deliver
from ampoule.commands import Echo
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.protocols import amp

from sharded_milter.ipc.channel import Asking
from sharded_milter.ipc.messages import MAX_INLINE, LoadFailed, Memory, Question, Ready, blob
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Protocol, Stage
from sharded_milter.workers.child import Child

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


class Master(Asking):
    """Keeps what it is told."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.told: list[tuple[Any, ...]] = []

    @Ready.responder
    def ready(self, milters: list[dict[str, bytes]], socket: bytes) -> Any:
        self.told.append(("ready", *milters))
        self.socket = socket
        return {}

    @LoadFailed.responder
    def load_failed(self, reason: bytes, details: bytes) -> Any:
        self.told.append(("load failed", reason, details))
        return {}


class Room:
    """A child and its master, connected in memory."""

    def __init__(self, spec: str = "child_milter:milter") -> None:
        self.clock = Clock()
        self.master, self.child = Master(self.clock), Child([spec])
        self.ours, self.theirs = Link(), Link()
        self.master.makeConnection(self.ours)  # type: ignore[no-untyped-call]
        self.child.makeConnection(self.theirs)
        self.pump()

    def pump(self) -> None:
        deliver((self.ours, self.child), (self.theirs, self.master))

    def ask(self, stage: Stage, message: bytes, connection: bytes = b"") -> list[Any]:
        """What comes back: the replies as bytes and the error, or a failure."""
        ended: list[Any] = []
        asked = self.master.ask(Question(stage.value, blob(connection), blob(message)))
        asked.addCallbacks(ended.append, ended.append)
        self.pump()
        return ended

    def scan(self, body: bytes) -> tuple[bytes, bytes]:
        ((answer, error),) = self.ask(Stage.EOM, commands.Eom(body).encode())
        return answer, error

    def call(self, expression: str) -> tuple[bytes, bytes]:
        """The end of message callback returns, or raises, what the expression does."""
        return self.scan(b"call " + expression.encode())


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# The start


def test_a_milter_that_is_loaded_is_told_with_its_manifest() -> None:
    ((_, milter),) = Room().master.told
    negotiation = milter.pop("negotiation")
    assert milter == {
        "name": b"child", "light": b"H", "shard_by": b"client", "pinning": b"none",
    }  # fmt: skip
    manifest = Manifest.from_packet("child", negotiation, frozenset(), "client")
    assert manifest.macros == ((Stage.EOM, ("i",)),)
    assert manifest.answers(Stage.MAIL)
    assert not manifest.answers(Stage.RCPT)
    assert manifest.protocol & Protocol.HDR_LEADSPC


def test_a_milter_that_fails_is_told_with_its_traceback(folder: Path) -> None:
    (folder / "child_milter.py").write_text("1/0")
    ((kind, reason, details),) = Room().master.told
    assert kind == "load failed"
    assert b"ZeroDivisionError" in reason
    assert b'child_milter.py", line 1' in details


@pytest.mark.parametrize("spec", ["none:milter", "child_milter:none", "nonsense", "./none.py:x"])
def test_a_milter_that_is_not_there_is_told(spec: str) -> None:
    ((kind, reason, details),) = Room(spec).master.told
    assert (kind, details) == ("load failed", b"")
    assert spec.rpartition(":")[2].encode() in reason or b"./none.py" in reason


def test_a_milter_that_needs_too_much_memory_is_told(folder: Path) -> None:
    (folder / "child_milter.py").write_text("raise MemoryError")
    ((kind, reason, _),) = Room().master.told
    assert (kind, b"MemoryError" in reason) == ("load failed", True)


@pytest.mark.parametrize("text", ["x" * 200_000, "\\ud800", "caf\\udce9", "\\n" * 100_000 + "end"])
def test_whatever_a_failing_milter_says_can_be_told(folder: Path, text: str) -> None:
    (folder / "child_milter.py").write_text(f"raise ValueError('{text}')")
    ((kind, reason, _),) = Room().master.told
    assert (kind, b"ValueError" in reason) == ("load failed", True)


# Answers


def test_a_job_is_answered_with_reply_packets() -> None:
    room = Room()
    answer = replies.ReplyCode("550 5.7.1 no").encode()
    assert room.ask(Stage.HELO, b"", commands.Helo("me").encode()) == [(answer, b"")]


@pytest.mark.parametrize("size", [0, 1000, MAX_INLINE, MAX_INLINE + 1, 300_000])
def test_messages_and_answers_have_any_size(size: int) -> None:
    body = b"x" * size
    answer, error = Room().scan(body)
    parts = [replies.ReplaceBody(body[n : n + 65_535]) for n in range(0, size or 1, 65_535)]
    assert answer == b"".join(p.encode() for p in [*parts, replies.Accept()])
    assert error == b""


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
    assert room.call("kept.append(message)" + " " * 60_000)[1] == b""
    assert room.scan(b"x")[1] == b""


def test_questions_that_arrive_together_are_answered_in_order() -> None:
    room = Room()
    bodies = [b"one", b"two", b"three"]
    answered: list[tuple[bytes, bytes]] = []
    for body in bodies:
        asked = room.master.ask(Question(b"E", b"", commands.Eom(body).encode()))
        asked.addCallback(answered.append)
    room.clock.advance(0)
    room.ours.sent = [b"".join(part for part in room.ours.sent if isinstance(part, bytes))]
    room.pump()
    assert answered == [
        (replies.ReplaceBody(body).encode() + replies.Accept().encode(), b"") for body in bodies
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
        ("Reject('x', 250)", b"sharded_milter.errors.InvalidValue: reply code 250 is not within"),
        ("(", b"File \"<string>\", line 1 ( ^ SyntaxError: '(' was never closed"),
    ],
)  # fmt: skip
def test_what_a_callback_raises_is_one_line_and_the_next_job_is_fine(
    expression: str, error: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    room = Room()
    answer, told = room.call(expression)
    assert (answer, told[: len(error)]) == (b"", error)
    assert b"\n" not in told
    assert "Traceback (most recent call last)" in capfd.readouterr().err
    assert room.scan(b"fine") == (
        replies.ReplaceBody(b"fine").encode() + replies.Accept().encode(),
        b"",
    )


def test_a_long_error_is_cut() -> None:
    assert len(Room().call("fail(ValueError('x' * 10**6))")[1]) == 60_000


def test_an_exception_that_cannot_be_printed_is_told_all_the_same() -> None:
    room = Room()
    _, error = room.call("fail(type('Odd', (Exception,), {'__str__': lambda s: 1/0})())")
    assert b"Odd" in error


def test_a_malformed_transcript_is_an_error_and_not_the_end() -> None:
    ((answer, error),) = Room().ask(Stage.EOM, b"\0\0\0\1")
    assert answer == b""
    assert error.startswith(b"sharded_milter.errors.RemoteProtocolError")


def test_an_answer_for_which_there_is_no_memory_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = Room()

    def refuse(memory: Memory) -> None:
        raise OSError(24, "Too many open files")

    message = commands.Eom(b"call Accept(ReplaceBody(b'x' * 100_000))").encode()
    monkeypatch.setattr(Memory, "__init__", refuse)
    ((answer, error),) = room.ask(Stage.EOM, message)
    assert (answer, error) == (b"", b"OSError: [Errno 24] Too many open files")


# Coroutines


@pytest.mark.parametrize(
    ("sender", "answer", "error"),
    [
        ("later", replies.ReplyCode("451 4.7.1 later").encode(), b""),
        ("exit", b"", b"sharded_milter.errors.CallbackFailed: the callback raised SystemExit(3)"),
    ],
)
def test_a_coroutine_is_answered_when_it_ends(sender: str, answer: bytes, error: bytes) -> None:
    async def main() -> list[Any]:
        room = Room()
        ended = room.ask(Stage.MAIL, commands.Mail(sender).encode())
        assert ended == []
        while not ended:
            await asyncio.sleep(0)
            room.pump()
        return ended

    assert asyncio.run(main()) == [(answer, error)]


def test_a_coroutine_whose_answer_cannot_be_sent_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(box: amp.AmpBox) -> None:
        raise OSError

    async def main() -> None:
        room = Room()
        monkeypatch.setattr(room.child, "sendBox", refuse)
        room.ask(Stage.MAIL, commands.Mail("later").encode())
        while not room.theirs.lost:
            await asyncio.sleep(0)

    asyncio.run(main())


def test_coroutines_are_asked_one_after_the_other() -> None:
    room = Room()
    author = sys.modules["child_milter"]
    author.waiting.append(Deferred())
    ended: list[Any] = []

    async def main() -> None:
        for sender in ("wait 1", "2", "3"):
            asked = room.master.ask(Question(b"M", b"", commands.Mail(sender).encode()))
            asked.addCallback(ended.append)
        room.clock.advance(0)
        room.pump()
        await asyncio.sleep(0)
        assert author.began == ["wait 1"]
        author.waiting[0].callback(None)
        while len(ended) < 3:
            room.pump()
            await asyncio.sleep(0)

    asyncio.run(main())
    assert author.began == ["wait 1", "2", "3"]
    texts = [str(replies.parse_reply(answer)) for answer, _ in ended]
    assert [text.rstrip("')")[-1] for text in texts] == ["1", "2", "3"]


def test_the_memory_of_an_answer_is_kept_until_the_socket_has_it() -> None:
    room = Room()
    large = bytes(MAX_INLINE)
    room.theirs.dataBuffer = b"the socket is full"
    room.scan(large)
    room.scan(large)
    assert len(room.child._replies) == 2
    room.theirs.dataBuffer = b""
    room.scan(b"small")
    assert room.child._replies == []
