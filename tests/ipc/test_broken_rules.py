"""Whatever a worker sends that no worker sends is a broken rule: said once, and its end."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from one_channel import LARGE, Room, descriptors
from twisted.protocols import amp
from twisted.python.failure import Failure

from sharded_milter.errors import BrokenRule
from sharded_milter.ipc.arrivals import MAX_UNCLAIMED
from sharded_milter.ipc.boxes import MAX_VALUES
from sharded_milter.ipc.channel import MAX_READ_AT_ONCE, MAX_UNSENT
from sharded_milter.ipc.memory import SEALS, Memory, packed
from sharded_milter.ipc.messages import (
    MAX_ANSWER,
    MAX_LINE,
    MAX_NOTES,
    MAX_PACKETS,
    Answer,
    LoadFailed,
    Ready,
    Sandboxed,
)
from sharded_milter.protocol.wire import frame

MILTER = dict.fromkeys(("name", "negotiation", "light", "shard_by", "affinity"), b"x")


def data(box: dict[bytes, bytes]) -> bytes:
    """A box as it is sent, of whatever it consists."""
    pairs = [len(part).to_bytes(2, "big") + part for item in box.items() for part in item]
    return b"".join(pairs) + bytes(2)


def answered(**values: bytes) -> bytes:
    """A box that answers question 1."""
    return data({amp.ANSWER: b"q1", **{key.encode(): value for key, value in values.items()}})


def broken(*sent: bytes | int) -> str:
    """The rule that a worker has broken which was asked question 1, and has sent that."""
    before = descriptors() - sum(isinstance(what, int) for what in sent)
    room = Room()
    room.ask(1)
    room.theirs.sent += sent
    room.pump()
    room.work()
    assert room.ours.paused
    assert descriptors() == before
    return room.rule


# Boxes


@pytest.mark.parametrize(
    ("sent", "rule"),
    [
        (b"GET / HTTP/1.1\r\n", "a box with a key of 18245 bytes (the limit is 255)"),
        (b"\1\0" + b"k" * 256, "a box with a key of 256 bytes (the limit is 255)"),
        (data({b"%d" % n: b"x" for n in range(MAX_VALUES + 1)}), "a box of more than 8 values"),
        (data({b"%d" % n: b"x" * 65_535 for n in range(9)})[:-2], "a box of more than 8 values"),
        (data({b"k": b"1"})[:-2] + data({b"k": b"2"}), "a box with two values for b'k'"),
    ],
)
def test_what_is_no_box_of_ours_is_a_broken_rule(sent: bytes, rule: str) -> None:
    assert broken(sent) == f"it has sent {rule}"


def test_a_box_without_an_end_costs_no_more_than_the_longest_and_is_looked_at_once() -> None:
    room = Room()
    piece = b"\0\1" + b"k" + b"\xff\xff"
    for _ in range(200):  # the first value does not end
        room.master.dataReceived(piece)
        piece = b"x" * 300
    assert room.owner.heard == []
    assert len(room.master._unread) == 5 + 199 * 300
    for n in range(MAX_VALUES + 1):
        room.master.dataReceived(b"x" * (65_535 - 199 * 300 if not n else 65_535))
        assert len(room.master._unread) <= 65_540
        if not room.owner.heard:
            room.master.dataReceived(b"\0\1%d\xff\xff" % n)
    assert room.rule == "it has sent a box of more than 8 values"
    assert room.master._unread == b""


@pytest.mark.parametrize(
    "box",
    [
        {},
        {b"what": b"ever"},
        {amp.ERROR: b"1", amp.ERROR_CODE: b"X", amp.ERROR_DESCRIPTION: b"y"},
        {amp.ERROR: b"q1", amp.ERROR_CODE: b"X", amp.ERROR_DESCRIPTION: b"y"},
        {amp.COMMAND: b"Unheard", amp.ASK: b"1"},
        {amp.COMMAND: b"StartTLS", amp.ASK: b"1"},
        {amp.COMMAND: b"Ask", amp.ASK: b"1"},
        {amp.COMMAND: b"Shutdown", amp.ASK: b"1"},
        {amp.COMMAND: b"n" * 200, amp.ASK: b"y" * 60_000},
        {b"x" * 200: b"y" * 60_000},
    ],
)
def test_what_no_worker_says_is_a_broken_rule_and_not_answered(box: dict[bytes, bytes]) -> None:
    room = Room()
    room.theirs.write(data(box))
    room.pump()
    assert room.rule.startswith("it has sent an unknown command: {")
    assert len(room.rule) < 300
    assert room.ours.sent == []


# What a worker says first


@pytest.mark.parametrize("before_ready", [True, False])
def test_a_worker_speaks_of_its_sandbox_once_before_it_is_ready(before_ready: bool) -> None:
    room = Room()
    first = (Sandboxed, {"text": b"in", "incomplete": b""})
    failed = (LoadFailed, {"reason": b"why", "details": b""})
    for command, arguments in (first, first) if before_ready else (first, failed, first):
        room.worker.callRemote(command, **arguments)  # type: ignore[no-untyped-call]
    room.pump()
    assert room.owner.heard[0] == ("sandboxed", b"in", b"")
    assert room.owner.heard[-1] == ("broke rule", "it has sent its introduction twice")


def test_a_worker_introduces_itself_once() -> None:
    room = Room()
    for _ in range(2):
        room.worker.callRemote(LoadFailed, reason=b"why", details=b"")  # type: ignore[no-untyped-call]
    room.pump()
    assert room.owner.heard == [
        ("load failed", b"why", b""),
        ("broke rule", "it has sent its introduction twice"),
    ]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {b"milters": b"x"},
        {b"milters": b"\0\1x\0\0\0\0", b"code": b"", b"socket": b""},
        {b"milters": b"\xff" * 60_000, b"code": b"", b"socket": b""},
        {b"milters": b"", b"code": b""},
    ],
)
def test_who_is_ready_with_milters_that_cannot_be_read_has_broken_a_rule(
    values: dict[bytes, bytes],
) -> None:
    rule = broken(data({amp.COMMAND: Ready.commandName, amp.ASK: b"1", **values}))
    assert rule.startswith("its Ready cannot be read: ")
    assert len(rule) < 300


def test_what_the_owner_can_make_nothing_of_is_a_broken_rule() -> None:
    room = Room()

    def refuse(**_: Any) -> None:
        raise BrokenRule("its milters cannot be")

    room.owner.ready = refuse  # type: ignore[method-assign, assignment]
    room.worker.callRemote(Ready, milters=[MILTER], code=b"", socket=b"")  # type: ignore[no-untyped-call]
    room.pump()
    assert room.rule == "its milters cannot be"


# Answers


@pytest.mark.parametrize("tag", [b"q", b"q2", b"q01", b"q 1", b"q1_", b"1", b"", b"q" * 300])
def test_only_what_was_asked_is_answered(tag: bytes) -> None:
    rule = broken(data({amp.ANSWER: tag, b"replies": b"="}))
    assert rule == f"it has answered {tag[:40]!r}, a question that it was not asked"


def test_a_question_is_answered_once() -> None:
    room = Room()
    room.ask(1)
    room.say((1, Answer(b"one")), (1, Answer(b"two")), unasked=True)
    room.pump()
    assert room.owner.heard == [
        ("answered", 1, Answer(b"one")),
        ("broke rule", "it has answered b'q1', a question that it was not asked"),
    ]


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({}, "replies: it is missing"),
        ({"error": b"x"}, "replies: it is missing"),
        ({"replies": b""}, "replies: neither bytes nor memory: b''"),
        ({"replies": b"?"}, "replies: neither bytes nor memory: b'?'"),
        ({"replies": b"@0"}, "replies: neither bytes nor memory: b'@0'"),
        ({"replies": b"@1 -1"}, "replies: neither bytes nor memory: b'@1 -1'"),
        ({"replies": b"@1 1 "}, "replies: neither bytes nor memory: b'@1 1 '"),
        ({"replies": b"@1 1"}, "replies: it has not sent the memory"),
        (
            {"replies": b"@1 %d" % (MAX_ANSWER + 1)},
            f"replies: a value of {MAX_ANSWER + 1} bytes (the limit is {MAX_ANSWER})",
        ),
        (
            {"replies": b"@1 " + b"9" * 20},
            f"replies: a value of {'9' * 20} bytes (the limit is {MAX_ANSWER})",
        ),
        (
            {"replies": b"@1 " + b"9" * 21},
            f"replies: neither bytes nor memory: {b'@1 ' + b'9' * 21!r}",
        ),
        (
            {"replies": b"=", "notes": b"@1 %d" % (MAX_NOTES + 1)},
            f"notes: a value of {MAX_NOTES + 1} bytes (the limit is {MAX_NOTES})",
        ),
        (
            {"replies": b"=", "records": b"@1 %d" % (MAX_NOTES + 1)},
            f"records: a value of {MAX_NOTES + 1} bytes (the limit is {MAX_NOTES})",
        ),
        (
            {"replies": b"=", "reason": b"x" * (MAX_LINE + 1)},
            f"reason: a value of {MAX_LINE + 1} bytes (the limit is {MAX_LINE})",
        ),
        (
            {"replies": b"=", "error": b"x" * 65_535},
            f"error: a value of 65535 bytes (the limit is {MAX_LINE})",
        ),
        (
            {"replies": b"=", "short": b"x" * 65_535},
            f"short: a value of 65535 bytes (the limit is {MAX_LINE})",
        ),
        ({"replies": b"=", "withdrawn": b"11"}, "withdrawn: a value of 2 bytes (the limit is 1)"),
    ],
)
def test_an_answer_that_cannot_be_read_is_a_broken_rule(
    values: dict[str, bytes], rule: str
) -> None:
    assert broken(answered(**values)) == f"its answer cannot be read: {rule}"


# Memory


def memory_of(content: bytes, seals: int = SEALS) -> int:
    """A descriptor of memory with that in it, and so sealed."""
    fd = os.memfd_create("worker", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def said(fd: int, size: int) -> bytes:
    """The answer whose replies are that memory."""
    return answered(replies=b"@%d %d" % (os.fstat(fd).st_ino, size))


def pipe(folder: Path) -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def fifo(folder: Path) -> int:
    os.mkfifo(folder / "fifo")
    return os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)


def file(folder: Path) -> int:
    (folder / "file").write_bytes(b"x" * 99)
    return os.open(folder / "file", os.O_RDONLY)


def one_seal_is_missing(seal: int) -> Callable[[Path], int]:
    def made(folder: Path) -> int:
        return memory_of(b"x" * 99, SEALS & ~seal)

    return made


NO_MEMORY: dict[str, Callable[[Path], int]] = {
    "pipe": pipe,
    "fifo": fifo,
    "file": file,
    "directory": lambda folder: os.open(folder, os.O_RDONLY),
    "path": lambda folder: os.open(folder, os.O_PATH),
    "zero": lambda folder: os.open("/dev/zero", os.O_RDONLY),
    "socket": lambda folder: socket.socket().detach(),
    "not sealed": lambda folder: memory_of(b"x" * 99, 0),
    "memory that cannot be sealed": lambda folder: os.memfd_create("worker"),
    "may be written": one_seal_is_missing(fcntl.F_SEAL_WRITE),
    "may shrink": one_seal_is_missing(fcntl.F_SEAL_SHRINK),
    "may grow": one_seal_is_missing(fcntl.F_SEAL_GROW),
    "may be sealed": one_seal_is_missing(fcntl.F_SEAL_SEAL),
}


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_a_descriptor_that_is_not_of_sealed_memory_is_a_broken_rule(
    kind: str, tmp_path: Path
) -> None:
    fd = NO_MEMORY[kind](tmp_path)
    rule = broken(fd, said(fd, 99))
    assert rule == "it has sent a descriptor that is not sealed memory"


@pytest.mark.parametrize("size", [0, 1, 98, 100, 4_000_000])
def test_memory_of_another_size_than_it_says_is_a_broken_rule(size: int) -> None:
    fd = memory_of(b"x" * 99)
    rule = f"replies: it has sent memory of 99 bytes and says that it has {size}"
    assert broken(fd, said(fd, size)) == f"its answer cannot be read: {rule}"


def test_memory_is_what_the_box_says_in_whatever_order_it_comes() -> None:
    before = descriptors()
    room = Room()
    memory = [memory_of(letter * 9) for letter in (b"a", b"b", b"c")]
    room.ask(1)
    room.ask(2)
    boxes = [said(fd, 9).replace(b"q1", b"q%d" % n) for n, fd in zip((2, 1), memory, strict=False)]
    room.theirs.sent += [*reversed(memory), *boxes]
    room.pump()
    assert room.owner.heard == [
        ("answered", 2, Answer(b"a" * 9)),
        ("answered", 1, Answer(b"b" * 9)),
    ]
    room.lose()
    assert descriptors() == before


def test_memory_is_used_once() -> None:
    fd = memory_of(b"x" * 9)
    room = Room()
    room.ask(1)
    room.ask(2)
    room.theirs.sent += [fd, said(fd, 9), said(fd, 9).replace(b"q1", b"q2")]
    room.pump()
    assert room.owner.heard == [
        ("answered", 1, Answer(b"x" * 9)),
        ("broke rule", "its answer cannot be read: replies: it has not sent the memory"),
    ]


@pytest.mark.parametrize("over", [0, 1, 200])
def test_no_more_descriptors_wait_than_a_worker_needs(over: int) -> None:
    before = descriptors()
    room = Room()
    for _ in range(MAX_UNCLAIMED + over):
        room.master.fileDescriptorReceived(memory_of(b"x"))
    if over:
        assert room.rule.startswith("it has sent 33 descriptors that no message claims (the limit ")
        assert descriptors() == before
    else:
        assert room.owner.heard == []
        room.lose()
        assert descriptors() == before


def test_an_answer_whose_memory_the_kernel_has_dropped_is_lost_and_no_rule_is_broken() -> None:
    before = descriptors()
    room = Room()
    room.ours.descriptors_lost = 1
    notes = packed(bytes(LARGE))
    room.say((1, Answer(b"x", b"", b"", b"", notes)), (2, Answer(b"fine")))  # type: ignore[arg-type]
    [dropped] = [what for what in room.theirs.sent if isinstance(what, int)]
    os.close(dropped)
    room.theirs.sent.remove(dropped)
    room.pump()
    why = b"the master cannot take the answer: Too many open files"
    assert room.owner.heard == [
        ("answered", 1, Answer(lost=why)),
        ("answered", 2, Answer(b"fine")),
    ]
    room.say((3, Answer(b"x", b"", b"", b"", notes)))  # type: ignore[arg-type]
    del notes
    os.close(next(what for what in room.theirs.sent if isinstance(what, int)))
    room.theirs.sent = [what for what in room.theirs.sent if isinstance(what, bytes)]
    room.pump()
    assert room.owner.heard[-1][0] == "broke rule"  # nothing was dropped this time
    assert descriptors() == before


def test_of_an_answer_that_is_lost_no_other_memory_stays() -> None:
    before = descriptors()
    room = Room()
    room.ours.descriptors_lost = 1
    parts = [packed(bytes(LARGE)) for _ in range(3)]
    room.say((1, Answer(parts[0], b"", b"", b"", *parts[1:])))  # type: ignore[arg-type]
    dropped = next(what for what in room.theirs.sent if isinstance(what, int))
    os.close(dropped)
    room.theirs.sent.remove(dropped)
    parts.clear()
    room.pump()
    assert [kind for kind, *_ in room.owner.heard] == ["answered"]
    assert descriptors() == before


# Large answers


def large(content: bytes) -> Memory:
    memory = Memory()
    memory.append(content)
    memory.seal()
    return memory


@pytest.mark.parametrize("packets", [MAX_PACKETS + 1, 200_000, 1_000_000])
def test_more_packets_than_an_answer_may_have_are_a_broken_rule_and_not_counted_further(
    packets: int,
) -> None:
    room = Room()
    room.say((1, Answer(large(frame(b"b") * packets))))  # type: ignore[arg-type]
    room.pump()
    assert room.owner.heard == []
    room.work()
    assert room.rule == f"its answer cannot be read: replies: more than {MAX_PACKETS} packets"


def test_what_is_not_counted_has_no_more_packets_than_an_answer_may_have() -> None:
    room = Room()
    room.say((1, Answer(large(frame(b"b") * MAX_PACKETS))))  # type: ignore[arg-type]
    room.pump()
    assert [kind for kind, *_ in room.owner.heard] == ["answered"]
    assert MAX_READ_AT_ONCE // len(frame(b"b")) <= MAX_PACKETS


def test_what_is_not_listened_to_any_more_is_not_read_on() -> None:
    before = descriptors()
    room = Room()
    room.say((1, Answer(large(bytes(MAX_READ_AT_ONCE + 1)))))  # type: ignore[arg-type]
    room.pump()
    room.master.stop_reading()
    room.work()
    assert room.owner.heard == []
    assert descriptors() == before


# What a worker does not read


def test_a_worker_that_does_not_read_is_given_up_at_the_limit_and_in_a_later_turn() -> None:
    room = Room()
    room.ours.dataBuffer = bytes(MAX_UNSENT)
    room.ask(1)
    room.clock.advance(0)
    assert room.owner.heard == []
    room.ours._tempDataLen = 1
    room.master.withdraw(1)
    room.ask(2)
    assert room.owner.heard == []  # whoever asks does not find it dead
    room.clock.advance(0)
    assert room.rule == f"it has left {MAX_UNSENT + 1} bytes unread (the limit is {MAX_UNSENT})"


# Then


def test_who_is_not_listened_to_any_more_is_not_heard() -> None:
    before = descriptors()
    room = Room()
    room.owner.then = lambda number: room.master.stop_reading()
    room.say((1, Answer(b"one")), (2, Answer(b"two")))
    room.worker.callRemote(LoadFailed, reason=b"why", details=b"")  # type: ignore[no-untyped-call]
    room.pump()
    room.master.fileDescriptorReceived(memory_of(b"x"))
    room.master.dataReceived(b"GET / HTTP/1.1\r\n")
    room.master.broke_rule("it is said once")
    room.master.catch_up()
    assert room.owner.heard == [("answered", 1, Answer(b"one"))]
    assert room.ours.paused
    assert descriptors() == before


def test_what_amp_itself_cannot_handle_is_a_broken_rule() -> None:
    room = Room()
    room.master.unhandledError(Failure(ValueError("why")))
    assert room.rule == "it has caused an AMP error: why"
