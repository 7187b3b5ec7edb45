"""The master's end: questions leave in time, and whatever a worker says its shard hears of it."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from amp_link import Link, deliver
from ampoule.commands import Echo, Shutdown
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.protocols import amp
from twisted.python.failure import Failure

from sharded_milter.ipc.channel import MAX_CATCH_UP, MasterChannel
from sharded_milter.ipc.memory import MAX_INLINE, Memory, packed
from sharded_milter.ipc.messages import (
    WITHDRAWN,
    Answer,
    Ask,
    LoadFailed,
    QuestionHead,
    Ready,
    Withdraw,
    answer_box,
)

HEAD = QuestionHead(b"E")
LARGE = MAX_INLINE + 1


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class Owner:
    """Keeps what it hears. What it does about an answer is the test's."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.then: Any = lambda number: None

    def ready(self, milters: list[dict[str, bytes]], code: bytes, socket: bytes) -> None:
        self.heard.append(("ready", milters, code, socket))

    def load_failed(self, reason: bytes, details: bytes) -> None:
        self.heard.append(("load failed", reason, details))

    def sandboxed(self, text: bytes, incomplete: bool) -> None:
        self.heard.append(("sandboxed", text, incomplete))

    def answered(self, number: int, answer: Answer) -> None:
        self.heard.append(("answered", number, answer))
        self.then(number)

    def broke_rule(self, why: str) -> None:
        self.heard.append(("broke rule", why))

    def channel_closed(self) -> None:
        self.heard.append(("closed",))


class Worker(amp.AMP):
    """Speaks plain AMP."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: list[Any] = []
        self.answers: list[Deferred[dict[str, Any]]] = []
        self.withdrawn: list[bytes] = []

    @Ask.responder
    def ask(self, head: Any, message: Any = b"", **_: Any) -> Deferred[dict[str, Any]]:
        self.asked.append(bytes(message))
        self.answers.append(Deferred())
        return self.answers[-1]

    @Withdraw.responder
    def withdraw(self, tag: bytes) -> dict[str, Any]:
        self.withdrawn.append(tag)
        return {}

    @Shutdown.responder  # type: ignore[untyped-decorator]
    def shut_down(self) -> dict[str, Any]:
        self.asked.append("shut down")
        return {}


class Room:
    """Both ends of a connection in memory."""

    def __init__(self) -> None:
        self.clock, self.owner = Clock(), Owner()
        self.master, self.worker = MasterChannel(self.owner, self.clock), Worker()
        self.ours, self.theirs = Link(), Link()
        self.master.makeConnection(self.ours)  # type: ignore[no-untyped-call]
        self.worker.makeConnection(self.theirs)  # type: ignore[no-untyped-call]

    def ask(self, number: int, message: bytes | Memory | None = None) -> None:
        text = b"%d" % number if message is None else message
        self.master.ask(number, HEAD, b"connection", text)

    def pump(self) -> None:
        deliver((self.ours, self.worker), (self.theirs, self.master))

    def say(self, *answers: tuple[int, tuple[Any, ...]]) -> None:
        """The worker answers by our own codec, all at once."""
        boxes = [answer_box(b"q%x" % number, answer, self.worker) for number, answer in answers]
        self.theirs.write(b"".join(boxes))

    @property
    def rule(self) -> str:
        """The rule that the worker has broken, which is all that the owner has heard."""
        [(kind, why)] = self.owner.heard
        assert kind == "broke rule"
        return str(why)

    def lose(self) -> None:
        self.master.connectionLost(Failure(ConnectionLost()))


# Questions


def test_an_idle_worker_is_asked_at_once_and_a_busy_one_once_a_turn() -> None:
    room = Room()
    for number in (1, 2, 3):
        room.ask(number)
    assert len(room.ours.sent) == 1
    room.clock.advance(0)
    assert len(room.ours.sent) == 2
    room.pump()
    assert room.worker.asked == [b"1", b"2", b"3"]


def test_a_worker_that_has_answered_everything_is_idle_again() -> None:
    room = Room()
    for number in (1, 2):
        room.ask(number)
        room.say((number, Answer(b"yes")))
        room.pump()
    assert room.worker.asked == [b"1", b"2"]
    assert room.clock.getDelayedCalls() == []


def test_a_question_with_a_descriptor_leaves_at_once_with_what_was_held() -> None:
    room = Room()
    room.ask(1)
    room.ask(2)
    room.ask(3, packed(bytes(LARGE)))
    assert [type(what) for what in room.ours.sent] == [bytes, int, bytes]
    room.pump()
    assert room.worker.asked == [b"1", b"2", bytes(LARGE)]
    room.clock.advance(0)  # nothing is left to be sent
    assert room.ours.sent == []


def test_a_question_that_does_not_fit_into_a_box_fails_alone() -> None:
    room = Room()
    with pytest.raises(amp.TooLong):
        room.ask(1, bytes(70_000))
    assert room.ours.sent == []
    room.ask(2)
    room.pump()
    assert room.worker.asked == [b"2"]


def test_a_question_is_withdrawn_by_its_number_and_never_before_it_is_asked() -> None:
    room = Room()
    for number in (1, 31):
        room.ask(number)
    room.master.withdraw(31)
    room.pump()
    assert (room.worker.asked, room.worker.withdrawn) == ([b"1", b"31"], [b"q1f"])
    assert room.owner.heard == []
    room.say((31, WITHDRAWN))
    room.pump()
    assert room.owner.heard == [("answered", 31, WITHDRAWN)]


def test_a_descriptor_is_kept_until_the_socket_has_taken_it() -> None:
    before = descriptors()
    room = Room()
    room.ours.dataBuffer = b"the socket is full"
    room.ask(1, packed(bytes(LARGE)))
    room.ask(2, packed(bytes(LARGE)))
    deliver((room.ours, room.worker))
    assert descriptors() == before + 2
    room.say((1, Answer()))
    room.pump()
    assert descriptors() == before + 2
    room.ours.dataBuffer = b""
    room.say((2, Answer()))
    room.pump()
    assert descriptors() == before


def test_a_descriptor_that_the_socket_has_taken_is_closed_at_once() -> None:
    before = descriptors()
    room = Room()
    room.ask(1, packed(bytes(LARGE)))
    deliver((room.ours, room.worker))
    assert descriptors() == before


# A descriptor that the reactor would send when the socket is writable, with or without its box.
DESCRIPTOR_TO_A_BUSY_WORKER = """
import socket
from twisted.internet import protocol, reactor
from sharded_milter.ipc.channel import MasterChannel
from sharded_milter.ipc.memory import packed
from sharded_milter.ipc.messages import QuestionHead

class Owner:
    def channel_closed(self):
        print("closed")

ours, theirs = socket.socketpair()
ours.setblocking(False)
master = MasterChannel(Owner(), reactor)
factory = protocol.Factory()
factory.buildProtocol = lambda address: master
reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, factory)

def ask():
    master.ask(1, QuestionHead(b"E"), b"", b"small")
    master.ask(2, QuestionHead(b"E"), b"", packed(bytes(60000)))
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


# Answers


def test_answers_bear_the_numbers_of_their_questions_in_any_order() -> None:
    room = Room()
    for number in (16, 17):
        room.ask(number)
    room.clock.advance(0)
    room.pump()
    room.worker.answers[1].callback({"replies": b"two"})
    room.worker.answers[0].callback({"replies": b"", "error": b"ValueError"})
    room.pump()
    assert room.owner.heard == [
        ("answered", 17, Answer(b"two")),
        ("answered", 16, Answer(error=b"ValueError")),
    ]


def test_every_field_of_an_answer_arrives_as_bytes_and_no_descriptor_stays() -> None:
    before = descriptors()
    room = Room()
    large = [letter * LARGE for letter in (b"a", b"b", b"c")]
    replies, notes, records = map(packed, large)
    room.say((1, Answer(replies, b"error", b"1", b"reason", notes, records)))  # type: ignore[arg-type]
    room.pump()
    expected = Answer(large[0], b"error", b"1", b"reason", *large[1:])
    assert room.owner.heard == [("answered", 1, expected)]
    assert all(isinstance(field, bytes) for field in room.owner.heard[0][2])
    del replies, notes, records
    assert descriptors() == before


def test_a_worker_that_is_ready_says_what_it_serves() -> None:
    room = Room()
    milter = dict.fromkeys(("name", "negotiation", "light", "shard_by", "pinning"), b"x")
    said: list[Any] = []
    told: Deferred[Any] = room.worker.callRemote(  # type: ignore[no-untyped-call]
        Ready, milters=[milter], code=b"digest", socket=b"inet:1"
    )
    told.addCallback(said.append)
    room.pump()
    assert room.owner.heard == [("ready", [milter], b"digest", b"inet:1")]
    assert said == [{}]


def test_a_worker_that_cannot_load_says_why() -> None:
    room = Room()
    room.worker.callRemote(LoadFailed, reason=b"why", details=b"where")  # type: ignore[no-untyped-call]
    room.pump()
    assert room.owner.heard == [("load failed", b"why", b"where")]


def test_other_commands_keep_their_own_answers() -> None:
    room = Room()
    room.worker.locateResponder = lambda name: (  # type: ignore[method-assign]
        lambda box: amp.AmpBox(response=box[b"data"])
    )
    echoed: list[Any] = []
    room.master.callRemote(Echo, data=b"x").addCallback(echoed.append)  # type: ignore[no-untyped-call]
    room.pump()
    assert echoed == [{"response": b"x"}]
    assert room.owner.heard == []


# Broken rules


@pytest.mark.parametrize(
    "box",
    [
        {amp.ANSWER: b"q"},
        {amp.ANSWER: b"qx"},
        {amp.ANSWER: b"q0", b"replies": b""},
        {amp.ANSWER: b"q0", b"replies": b"?"},
        {amp.ANSWER: b"q0", b"replies": b"@0 1"},
        {amp.ANSWER: b"q0", b"notes": b"@x"},
        {amp.ANSWER: b"q0", b"records": b"@0"},
    ],
)
def test_an_answer_that_cannot_be_read_is_a_broken_rule(box: dict[bytes, bytes]) -> None:
    room = Room()
    room.ask(0)
    room.theirs.write(amp.AmpBox(box).serialize())
    room.pump()
    assert room.rule.startswith("its answer cannot be read: ")


def test_an_answer_whose_memory_is_smaller_than_it_says_is_a_broken_rule() -> None:
    before = descriptors()
    room = Room()
    memory = Memory()
    memory.append(b"x")
    memory.size = 4_000_000
    room.say((0, (memory, b"", b"", b"", b"", b"")))
    room.pump()
    assert "length is greater than file size" in room.rule
    del memory
    assert descriptors() == before


def test_an_error_of_amp_itself_is_a_broken_rule() -> None:
    room = Room()
    room.ask(0)
    room.pump()
    room.worker.answers[0].errback(amp.RemoteAmpError(b"CODE", "why"))
    room.pump()
    assert room.rule == "it has said something odd: KeyError(b'q0')"


@pytest.mark.parametrize(
    "box",
    [
        {},
        {b"what": b"ever"},
        {amp.ANSWER: b"1"},
        {amp.ERROR: b"1", amp.ERROR_CODE: b"X", amp.ERROR_DESCRIPTION: b"y"},
        {amp.COMMAND: b"Unheard"},
        {amp.COMMAND: Ready.commandName},
    ],
)
def test_what_amp_can_make_nothing_of_is_a_broken_rule(box: dict[bytes, bytes]) -> None:
    room = Room()
    data = b"".join(len(part).to_bytes(2, "big") + part for item in box.items() for part in item)
    room.theirs.write(data + bytes(2))
    room.pump()
    assert room.rule.startswith("it has said something odd: ")


def test_who_is_not_listened_to_any_more_is_not_heard() -> None:
    room = Room()
    room.owner.then = lambda number: room.master.stop_listening()
    room.say((1, Answer(b"one")), (2, Answer(b"two")))
    room.worker.callRemote(LoadFailed, reason=b"why", details=b"")  # type: ignore[no-untyped-call]
    room.pump()
    assert room.owner.heard == [("answered", 1, Answer(b"one"))]


def test_descriptors_that_nobody_took_are_closed_with_the_channel() -> None:
    before = descriptors()
    room = Room()
    room.master.stop_listening()
    memory = packed(bytes(LARGE))
    room.say((1, (memory, b"", b"", b"", memory, b"")))
    del memory
    room.pump()
    assert descriptors() == before + 2
    room.lose()
    assert descriptors() == before


# Reading at once


def test_who_hears_an_answer_may_read_on_and_hears_the_next_behind_it() -> None:
    room = Room()
    for number in (1, 2, 3):
        room.say((number, Answer()))
    first, *rest = [box for box in room.theirs.sent if isinstance(box, bytes)]

    def read_on(number: int) -> None:
        while rest:
            room.master.dataReceived(rest.pop(0))
        room.owner.heard.append(("done with", number))

    room.owner.then = read_on
    room.master.dataReceived(first)
    numbers = [(kind, number) for kind, number, *_ in room.owner.heard]
    assert numbers == [(kind, number) for number in (1, 2, 3) for kind in ("answered", "done with")]


class Remains:
    """The socket of a dead worker; a read takes one answer of those that are left."""

    connected = True
    disconnecting = False

    def __init__(self, master: MasterChannel, answers: list[bytes]) -> None:
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


def remains(count: int) -> tuple[Owner, MasterChannel, Remains]:
    """What a worker leaves behind that has answered so many questions."""
    owner = Owner()
    master = MasterChannel(owner, Clock())
    boxes = [answer_box(b"q%x" % number, Answer(), master) for number in range(count)]
    left = Remains(master, boxes)
    master.makeConnection(left)  # type: ignore[no-untyped-call]
    return owner, master, left


def test_what_a_worker_had_answered_before_it_died_counts() -> None:
    owner, master, left = remains(2)
    with left.ours:
        master.catch_up()
        master.catch_up()
    assert owner.heard == [("answered", number, Answer()) for number in (0, 1)]


def test_who_answers_without_an_end_does_not_hold_the_master_up() -> None:
    owner, master, left = remains(MAX_CATCH_UP + 1)
    with left.ours:
        master.catch_up()
        assert len(owner.heard) == MAX_CATCH_UP


def test_where_nothing_is_connected_there_is_nothing_to_catch_up_with() -> None:
    owner = Owner()
    master = MasterChannel(owner, Clock())
    master.catch_up()
    master.abort()
    room = Room()
    room.lose()
    room.master.catch_up()
    room.master.abort()
    assert owner.heard == []


# The end


def test_a_worker_that_is_told_to_exit_says_yes_and_then_sees_the_end() -> None:
    room = Room()
    room.master.shut_down()
    deliver((room.ours, room.worker))
    assert (room.worker.asked, room.ours.lost) == (["shut down"], False)
    room.pump()
    assert room.ours.lost


def test_a_worker_that_is_gone_cannot_be_told_anything_and_that_is_no_error() -> None:
    room = Room()
    room.master.shut_down()
    room.ours.sent.clear()
    room.lose()
    room.master.shut_down()
    room.master.withdraw(1)
    assert (room.ours.sent, room.owner.heard) == ([], [("closed",)])


def test_what_is_held_for_a_worker_that_is_gone_is_not_sent() -> None:
    before = descriptors()
    room = Room()
    room.ask(1)
    room.ask(2)
    room.ours.dataBuffer = b"the socket is full"
    room.ask(3, packed(bytes(LARGE)))
    room.ask(4)
    for what in room.ours.sent:
        if isinstance(what, int):
            os.close(what)
    room.ours.sent.clear()
    room.lose()
    room.clock.advance(0)
    assert (room.ours.sent, room.owner.heard) == ([], [("closed",)])
    assert descriptors() == before


def test_the_socket_can_be_closed_at_once() -> None:
    room = Room()
    room.master.abort()
    assert room.ours.lost
