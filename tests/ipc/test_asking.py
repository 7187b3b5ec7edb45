"""Questions to a worker: one box each, by AMP's own rules, and every one of them ends."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import pytest
from amp_link import Link, deliver
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.protocols import amp
from twisted.python.failure import Failure

from sharded_milter.errors import WorkerLost
from sharded_milter.ipc.channel import Asking
from sharded_milter.ipc.messages import MAX_INLINE, Ask, Question, answer_box, blob


class Worker(amp.AMP):
    """Reads boxes as AMP does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: list[dict[str, Any]] = []
        self.answers: list[Deferred[dict[str, Any]]] = []

    @Ask.responder
    def ask(self, **values: Any) -> Deferred[dict[str, Any]]:
        self.asked.append({name: bytes(value) for name, value in values.items() if value})
        self.answers.append(Deferred())
        return self.answers[-1]


class Room:
    """Both ends of a connection in memory."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.master, self.worker = Asking(self.clock), Worker()
        self.ours, self.theirs = Link(), Link()
        self.master.makeConnection(self.ours)  # type: ignore[no-untyped-call]
        self.worker.makeConnection(self.theirs)  # type: ignore[no-untyped-call]

    def ask(self, name: bytes) -> list[Any]:
        ended: list[Any] = []
        asked = self.master.ask(Question(b"E", b"connection", name))
        asked.addCallbacks(ended.append, lambda failure: ended.append(failure.value))
        return ended

    def pump(self) -> None:
        deliver((self.ours, self.worker), (self.theirs, self.master))


def test_an_idle_worker_is_asked_at_once_and_a_busy_one_once_a_turn() -> None:
    room = Room()
    for name in (b"1", b"2", b"3"):
        room.ask(name)
    assert len(room.ours.sent) == 1
    room.clock.advance(0)
    assert len(room.ours.sent) == 2
    room.pump()
    assert [asked["message"] for asked in room.worker.asked] == [b"1", b"2", b"3"]


def test_a_question_with_a_descriptor_leaves_at_once_with_what_was_held() -> None:
    room = Room()
    room.ask(b"1")
    room.ask(b"2")
    room.master.ask(Question(b"E", b"", blob(bytes(MAX_INLINE + 1))))
    assert [type(what) for what in room.ours.sent] == [bytes, int, bytes]
    room.pump()
    assert [len(asked["message"]) for asked in room.worker.asked] == [1, 1, MAX_INLINE + 1]
    room.clock.advance(0)  # nothing is left to be sent
    assert room.ours.sent == []


# A descriptor that the reactor would send when the socket is writable, with or without its box.
DESCRIPTOR_TO_A_BUSY_WORKER = """
import socket
from twisted.internet import protocol, reactor
from sharded_milter.ipc.messages import Question, blob
from sharded_milter.ipc.channel import Asking

class Master(Asking):
    def connectionLost(self, reason):
        print("lost:", reason.value)

ours, theirs = socket.socketpair()
ours.setblocking(False)
master = Master(reactor)
factory = protocol.Factory()
factory.buildProtocol = lambda address: master
reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, factory)

def ask():
    master.ask(Question(b"E", b"", b"small"))
    master.ask(Question(b"E", b"", blob(bytes(60000))))
    reactor.callLater(0, reactor.callLater, 0, finish)

def finish():
    received = theirs.recv(65536) + theirs.recv(65536)  # a descriptor ends a read
    print(received.count(b"message"), master.transport.connected)
    reactor.crash()

reactor.callLater(0, ask)
reactor.run()
"""


def test_a_real_socket_takes_a_descriptor_for_a_busy_worker() -> None:
    command = [sys.executable, "-c", DESCRIPTOR_TO_A_BUSY_WORKER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("2 1\n", "")


class Remains:
    """The socket of a dead worker; a read takes one answer of those that are left."""

    connected = True
    disconnecting = False

    def __init__(self, master: Asking, answers: list[bytes]) -> None:
        self.master = master
        self.answers = answers
        self.ours, theirs = socket.socketpair()
        theirs.close()  # readable for ever

    def fileno(self) -> int:
        return self.ours.fileno()

    def doRead(self) -> object:
        if not self.answers:
            return "the connection is done"
        self.master.dataReceived(self.answers.pop(0))
        return None

    def write(self, data: bytes) -> None: ...

    def getPeer(self) -> str:
        return "peer"

    getHost = getPeer


def test_what_a_worker_had_answered_before_it_died_counts() -> None:
    master = Asking(Clock())
    answers = [answer_box(b"yes", b"", master), answer_box(b"no", b"", master)]
    for number, box in enumerate(answers):
        box[amp.ANSWER] = b"q%d" % number
    remains = Remains(master, [box.serialize() for box in answers])
    with remains.ours:
        master.makeConnection(remains)  # type: ignore[no-untyped-call]
        ended: list[Any] = []
        for name in (b"1", b"2", b"3"):
            asked = master.ask(Question(b"E", b"", name))
            asked.addCallbacks(ended.append, lambda failure: ended.append(str(failure.value)))
        master.catch_up()
        master.hopeless(Failure(WorkerLost("gone")))
    assert ended == [(b"yes", b""), (b"no", b""), "gone"]


def test_answers_find_their_questions_in_any_order() -> None:
    room = Room()
    ended = [room.ask(b"1"), room.ask(b"2")]
    room.clock.advance(0)
    room.pump()
    room.worker.answers[1].callback({"replies": b"two"})
    room.worker.answers[0].callback({"replies": b"", "error": b"ValueError"})
    room.pump()
    assert ended == [[(b"", b"ValueError")], [(b"two", b"")]]


def test_other_commands_keep_their_own_answers() -> None:
    class Ping(amp.Command):
        pass

    room = Room()
    pinged: list[Any] = []
    room.worker.locateResponder = lambda name: (  # type: ignore[method-assign]
        (lambda box: amp.AmpBox()) if name == b"Ping" else Worker.locateResponder(room.worker, name)  # type: ignore[no-untyped-call]
    )
    ended = room.ask(b"1")
    room.master.callRemote(Ping).addCallback(pinged.append)  # type: ignore[no-untyped-call]
    deliver((room.ours, room.worker), (room.theirs, room.master))
    assert pinged == [{}]
    assert ended == []


def test_an_error_of_amp_itself_ends_the_question() -> None:
    room = Room()
    ended = room.ask(b"1")
    room.pump()
    room.worker.answers[0].errback(amp.RemoteAmpError(b"CODE", "why"))
    room.pump()
    (error,) = ended
    assert isinstance(error, amp.RemoteAmpError)
    assert "why" in str(error)


def test_an_answer_that_cannot_be_read_ends_the_question() -> None:
    room = Room()
    ended = room.ask(b"1")
    box = amp.AmpBox({amp.ANSWER: b"q0"})
    room.master.ampBoxReceived(box)
    assert isinstance(ended[0], KeyError)


def test_a_question_that_does_not_fit_into_a_box_fails_alone() -> None:
    room = Room()
    ended: list[Any] = []
    room.master.ask(Question(b"E", b"", bytes(70_000))).addErrback(ended.append)
    assert ended[0].check(OverflowError)
    assert room.ours.sent == []


def test_when_nobody_is_there_any_more_every_question_fails() -> None:
    room = Room()
    ended = [room.ask(b"1"), room.ask(b"2")]
    room.master.hopeless(Failure(WorkerLost("gone")))
    ended.append(room.ask(b"3"))
    assert [str(error) for (error,) in ended] == ["gone"] * 3


@pytest.mark.parametrize("size", [0, 1, MAX_INLINE, MAX_INLINE + 1])
@given(
    letter=st.sampled_from([b"E", b"Q"]),
    numbers=st.tuples(*[st.integers(0, 2**16 - 1)] * 3),
    command=st.binary(max_size=9),
)
def test_a_question_arrives_as_it_was_asked(
    size: int, letter: bytes, numbers: tuple[int, int, int], command: bytes
) -> None:
    room = Room()
    message = blob(bytes(size))
    question = Question(letter, b"connection", message, *numbers, blob(command))
    room.master.ask(question)
    deliver((room.ours, room.worker))
    (asked,) = room.worker.asked
    assert asked.pop("head")[:1] == letter
    expected = {"connection": b"connection", "message": bytes(size), "unknown": command}
    assert asked == {name: value for name, value in expected.items() if value}


def test_what_is_held_for_a_worker_that_is_gone_is_not_sent() -> None:
    room = Room()
    ended = [room.ask(b"1"), room.ask(b"2")]
    room.master.hopeless(Failure(WorkerLost("gone")))
    room.master.connectionLost(Failure(WorkerLost("gone")))  # type: ignore[no-untyped-call]
    room.clock.advance(0)
    assert len(room.ours.sent) == 1
    assert [str(error) for (error,) in ended] == ["gone"] * 2
