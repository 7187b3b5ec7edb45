"""The master's end: questions leave in time, and whatever a worker says its shard hears of it."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from amp_link import deliver
from ampoule.commands import Echo
from one_channel import LARGE, Owner, Room, descriptors
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.protocols import amp

from sharded_milter.ipc.channel import MAX_CATCH_UP, MAX_READ_AT_ONCE, MasterChannel
from sharded_milter.ipc.memory import CHUNK, Memory, packed
from sharded_milter.ipc.messages import MAX_ANSWER, WITHDRAWN, Answer, LoadFailed, Ready, answer_box
from sharded_milter.protocol.wire import frame

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
    assert [type(what) for what in room.ours.sent] == [bytes, bytes, int, bytes]
    room.pump()
    assert room.worker.asked == [b"1", b"2", bytes(LARGE)]
    room.clock.advance(0)  # nothing is left to be sent
    assert room.ours.sent == []


def test_a_question_whose_memory_the_system_does_not_pass_on_has_not_been_asked() -> None:
    room = Room()
    room.ask(1)
    room.ask(2)
    memory = packed(bytes(LARGE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            room.ours,
            "sendFileDescriptor",
            lambda fd: patch.setattr(room.ours, "writeSomeData", refuse),
        )
        with pytest.raises(OSError, match="Too many references"):
            room.ask(3, memory)
    room.ask(4, memory)
    room.pump()
    assert room.worker.asked == [b"1", b"2", bytes(LARGE)]
    assert list(room.master._unanswered.values()) == [1, 2, 4]


def refuse(data: bytes) -> int:
    raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))


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
    room.say((1, Answer(replies, b"error", b"1", b"reason", notes, records, b"short")))  # type: ignore[arg-type]
    room.pump()
    expected = Answer(large[0], b"error", b"1", b"reason", large[1], large[2], b"short")
    assert room.owner.heard == [("answered", 1, expected)]
    assert all(isinstance(field, bytes) for field in room.owner.heard[0][2])
    del replies, notes, records
    assert descriptors() == before


def test_a_worker_that_is_ready_says_what_it_serves() -> None:
    room = Room()
    milter = dict.fromkeys(("name", "negotiation", "light", "shard_by", "affinity"), b"x")
    room.worker.callRemote(Ready, milters=[milter], code=b"digest", socket=b"inet:1")  # type: ignore[no-untyped-call]
    room.pump()
    assert room.owner.heard == [("ready", [milter], b"digest", b"inet:1")]
    assert room.ours.sent == []  # which a worker might not read


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


# Large answers


def in_memory(content: bytes) -> Any:
    memory = Memory()
    memory.append(content)
    memory.seal()
    return memory


def test_a_large_answer_is_read_in_later_turns_and_what_is_behind_it_waits() -> None:
    before = descriptors()
    room = Room()
    body = frame(b"b", os.urandom(60_000)) * 100  # of more than one piece
    assert len(body) > CHUNK
    room.say((1, Answer(in_memory(body), reason=b"why")), (2, Answer(b"two")))
    room.pump()
    assert (room.owner.heard, room.ours.paused) == ([], True)
    room.master.catch_up()
    assert room.owner.heard == []
    room.work()
    assert room.owner.heard == [
        ("answered", 1, Answer(body, reason=b"why")),
        ("answered", 2, Answer(b"two")),
    ]
    assert not room.ours.paused
    assert descriptors() == before


@pytest.mark.parametrize("content", [bytes(MAX_READ_AT_ONCE + 1), b"\xff" * (MAX_READ_AT_ONCE + 1)])
def test_what_is_no_packet_is_for_the_session_to_find(content: bytes) -> None:
    room = Room()
    room.say((1, Answer(in_memory(content))))
    room.pump()
    room.work()
    assert room.owner.heard == [("answered", 1, Answer(content))]


@pytest.mark.parametrize("size", [MAX_READ_AT_ONCE, LARGE])
def test_an_answer_that_is_not_so_large_is_there_at_once(size: int) -> None:
    room = Room()
    room.say((1, Answer(in_memory(bytes(size)))))
    room.pump()
    assert room.owner.heard == [("answered", 1, Answer(bytes(size)))]


def test_a_large_answer_that_came_before_the_socket_was_lost_counts() -> None:
    room = Room()
    room.say((1, Answer(in_memory(bytes(MAX_READ_AT_ONCE + 1)))), (2, Answer()))
    room.pump()
    room.lose()
    room.work()
    assert [what[:2] for what in room.owner.heard] == [
        ("closed",),
        ("answered", 1),
        ("answered", 2),
    ]


def test_a_large_answer_that_is_not_read_whole_is_given_up_with_its_worker() -> None:
    before = descriptors()
    room = Room()
    room.say((1, Answer(in_memory(bytes(MAX_READ_AT_ONCE + 1)))))
    room.pump()
    room.master.abort()
    room.work()
    assert room.owner.heard == []
    assert descriptors() == before


def test_all_large_answers_that_a_worker_has_left_are_read_at_its_end() -> None:
    before = descriptors()
    room = Room()
    room.say((1, Answer(in_memory(bytes(3 * CHUNK)))), (2, Answer()))
    room.say((3, Answer(in_memory(bytes(MAX_READ_AT_ONCE + 1)))), (4, Answer()))
    room.pump()
    assert room.owner.heard == []
    room.master.finish()
    assert [number for _, number, _ in room.owner.heard] == [1, 2, 3, 4]
    room.work()
    assert len(room.owner.heard) == 4
    assert descriptors() == before


def test_who_leaves_more_to_be_read_than_the_largest_answer_is_not_read_on() -> None:
    before = descriptors()
    room = Room()
    room.say(*((n, Answer(in_memory(bytes(MAX_ANSWER)))) for n in range(3)))
    room.pump()
    room.master.finish()
    assert [number for _, number, _ in room.owner.heard] == [0]
    room.master.abort()
    room.work()
    assert len(room.owner.heard) == 1
    assert descriptors() == before


def test_memory_that_came_before_the_socket_was_lost_is_still_claimed() -> None:
    before = descriptors()
    room = Room()
    room.say(
        (1, Answer(in_memory(bytes(MAX_READ_AT_ONCE + 1)))), (2, Answer(in_memory(bytes(LARGE))))
    )
    room.pump()
    room.lose()
    room.work()
    assert [what[:2] for what in room.owner.heard] == [
        ("closed",),
        ("answered", 1),
        ("answered", 2),
    ]
    room.master.abort()  # its exit follows
    assert descriptors() == before


@pytest.mark.parametrize("size", [LARGE, MAX_READ_AT_ONCE + 1])
@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(12, "Cannot allocate memory"), b"Cannot allocate memory"),
        (MemoryError(), b"there is no memory left"),
    ],
)
def test_where_the_memory_of_an_answer_cannot_be_read_the_answer_is_lost(
    size: int, error: Exception, why: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise error

    before = descriptors()
    room = Room()
    room.say((1, Answer(in_memory(bytes(size)))), (2, Answer()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", refuse)
        room.pump()
        room.work()
    lost = Answer(lost=b"the master cannot take the answer: " + why)
    assert room.owner.heard == [("answered", 1, lost), ("answered", 2, Answer())]
    error.__traceback__ = None
    assert descriptors() == before


def test_a_defect_of_ours_at_a_large_answer_is_logged_and_ends_the_connection() -> None:
    room = Room()
    room.owner.then = lambda number: 1 // 0
    room.say((1, Answer(in_memory(bytes(MAX_READ_AT_ONCE + 1)))))
    room.pump()
    with capturedLogs() as events:
        room.work()
    [event] = events
    assert event["log_failure"].check(ZeroDivisionError)
    assert room.ours.lost


# Memory that still grows


def test_of_memory_that_still_grows_a_worker_gets_a_sealed_copy() -> None:
    room = Room()
    memory = Memory()
    memory.append(b"x" * LARGE)
    room.ask(1, memory)
    [sent] = [what for what in room.ours.sent if isinstance(what, int)]
    assert os.fstat(sent).st_ino != memory.inode
    for change in (lambda: os.pwrite(sent, b"y", 0), lambda: os.ftruncate(sent, 0)):
        with pytest.raises(PermissionError):
            change()
    memory.append(b"more")
    room.pump()
    assert room.worker.asked == [b"x" * LARGE]
    assert bytes(memory.view()) == b"x" * LARGE + b"more"


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
    master._unanswered = {b"q%x" % number: number for number in range(count)}
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
