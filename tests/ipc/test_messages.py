"""The one codec: what it writes plain AMP reads, what plain AMP writes it reads."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from amp_link import Link, deliver
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.protocols import amp

from sharded_milter.errors import BrokenRule
from sharded_milter.ipc.boxes import Boxes
from sharded_milter.ipc.memory import MAX_INLINE, Memory, Received, packed
from sharded_milter.ipc.messages import (
    ANSWER,
    MAX_ANSWER,
    MAX_LINE,
    MAX_PACKETS,
    WITHDRAWN,
    Answer,
    Ask,
    Question,
    QuestionHead,
    answer_box,
    check_answer,
    drop_question,
    question_box,
    read_question,
)
from sharded_milter.protocol.wire import frame

SMALL = st.binary(max_size=99)
#: What only looks like a mark, and what is just inline and just in memory.
PARTS = SMALL | st.sampled_from([b"=", b"@0 1", b"x" * MAX_INLINE, b"y" * (MAX_INLINE + 1)])
HEADS = st.builds(
    QuestionHead,
    st.sampled_from([b"E", b"Q", b"\0", b"\xff"]),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
)
QUESTIONS = st.builds(Question, HEADS, PARTS, PARTS, PARTS)
FLAGS = st.sampled_from([b"", b"1"])
ANSWERS = st.builds(Answer, PARTS, SMALL, FLAGS, SMALL, PARTS, PARTS, SMALL, st.just(b""))


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class End(Boxes, amp.AMP):
    """One end of a channel, where memory is mapped."""

    def claim(self, inode: int, size: int) -> memoryview:
        fd = self._arrived.claim(inode)
        assert fd is not None
        return Received(fd, size).mapped()


class Plain(End):
    """Speaks AMP as Twisted does, and answers every question with the same."""

    def __init__(self, answer: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.answer = dict(answer or {})
        self.asked: list[dict[str, Any]] = []

    @Ask.responder
    def ask(self, **values: Any) -> dict[str, Any]:
        self.asked.append(values)
        return self.answer


class Ours(End):
    """Hands the boxes that arrive to the codec."""

    def __init__(self, take: Callable[[amp.AmpBox, Any], None]) -> None:
        super().__init__()
        self.take = take

    def ampBoxReceived(self, box: amp.AmpBox) -> None:
        self.take(box, self)


def connected(*ends: amp.AMP) -> list[tuple[Link, Any]]:
    """Two ends of a connection in memory: pairs of a link and who receives what is sent there."""
    links = [Link(), Link()]
    for end, link in zip(ends, links, strict=True):
        end.makeConnection(link)
    return list(zip(links, reversed(ends), strict=True))


def packed_all(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values with what is large in memory."""
    return tuple(packed(value) if isinstance(value, bytes) else value for value in values)


def plainly(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not empty, as bytes; the head as it is."""
    return {
        name: value if name == "head" else bytes(value) for name, value in values.items() if value
    }


@given(QUESTIONS)
def test_a_question_that_we_write_is_read_by_plain_amp(question: Question) -> None:
    worker = Plain()
    master = Ours(lambda box, channel: None)
    ways = connected(master, worker)
    head, connection, message, command = packed_all(question)  # memory lives until it is sent
    ways[0][0].write(question_box(b"q1f", head, connection, message, command, master))
    deliver(*ways)
    assert [plainly(asked) for asked in worker.asked] == [plainly(question._asdict())]


def asked_plainly(question: Question) -> list[Question]:
    """What we read where plain AMP has asked."""
    asked: list[Question] = []
    master = Plain()
    worker = Ours(lambda box, channel: asked.append(read_question(box, channel)))
    ways = connected(master, worker)
    values = dict(zip(Question._fields, packed_all(question), strict=True))
    master.callRemote(Ask, **values)  # type: ignore[no-untyped-call]
    deliver(*ways)
    return asked


@given(QUESTIONS)
def test_a_question_that_plain_amp_writes_is_read_by_us(question: Question) -> None:
    assert asked_plainly(question) == [question]


@given(ANSWERS)
def test_an_answer_that_we_write_is_read_by_plain_amp(answer: Answer) -> None:
    answered: list[dict[str, Any]] = []
    values = packed_all(answer)
    master = Plain()

    def take(box: amp.AmpBox, channel: Any) -> None:
        ways[1][0].write(answer_box(box[amp.ASK], values, channel))

    worker = Ours(take)
    ways = connected(master, worker)
    done: Deferred[Any] = master.callRemote(Ask, head=QuestionHead(b"E"))  # type: ignore[no-untyped-call]
    done.addCallback(answered.append)
    deliver(*ways)
    assert [plainly(values) for values in answered] == [plainly(answer._asdict())]


@given(ANSWERS)
def test_an_answer_that_plain_amp_writes_is_read_by_us(answer: Answer) -> None:
    answered: list[Answer] = []
    worker = Plain(dict(zip(Answer._fields, packed_all(answer), strict=True)))
    master = Ours(lambda box, channel: answered.append(Answer(*ANSWER.read(box, channel))))
    ways = connected(master, worker)
    ways[0][0].write(question_box(b"q0", QuestionHead(b"E"), b"", b"", b"", master))
    deliver(*ways)
    assert answered == [answer]


def test_nothing_is_left_of_memory_that_was_sent() -> None:
    before = descriptors()
    asked_plainly(Question(QuestionHead(b"E"), *(b"x" * (MAX_INLINE + 1) for _ in range(3))))
    assert descriptors() == before


class Wire:
    """What the codec needs of a channel: a descriptor that is sent arrives as another number."""

    def __init__(self) -> None:
        self.arrived: dict[int, int] = {}  # by inode

    def _sendFileDescriptor(self, fd: int) -> int:
        self.arrived[os.fstat(fd).st_ino] = os.dup(fd)
        return 0

    def claim(self, inode: int, size: int) -> memoryview:
        if inode not in self.arrived:
            raise OSError("lost")
        return Received(self.arrived.pop(inode), size).mapped()


def box_of(data: bytes) -> amp.AmpBox:
    (box,) = amp.parseString(data)
    return box  # type: ignore[no-any-return]


def large_question(wire: Wire) -> amp.AmpBox:
    one, two, three = (packed(letter * (MAX_INLINE + 1)) for letter in (b"a", b"b", b"c"))
    return box_of(question_box(b"q0", QuestionHead(b"E"), one, two, three, wire))


def test_an_empty_value_is_not_in_the_box() -> None:
    wire = Wire()
    question = box_of(question_box(b"q0", QuestionHead(b"E"), b"", Memory(), b"", wire))
    assert set(question) == {amp.COMMAND, amp.ASK, b"head"}
    assert read_question(question, wire) == Question(QuestionHead(b"E"), b"", b"", b"")
    assert box_of(answer_box(b"q0", Answer(), wire)) == {amp.ANSWER: b"q0", b"replies": b"="}
    assert Answer(*ANSWER.read({amp.ANSWER: b"q0", b"replies": b"="}, wire)) == Answer()


def test_a_withdrawn_question_is_answered_in_one_word() -> None:
    said = {amp.ANSWER: b"q0", b"replies": b"=", b"withdrawn": b"1"}
    assert box_of(answer_box(b"q0", WITHDRAWN, Wire())) == said


def test_the_longest_value_that_a_box_holds_is_written_and_no_longer_one() -> None:
    wire, longest = Wire(), bytes(amp.MAX_VALUE_LENGTH - 1)  # behind its mark
    box = box_of(answer_box(b"q0", Answer(longest, b"e" * MAX_LINE), wire))
    assert ANSWER.read(box, wire)[:2] == [longest, b"e" * MAX_LINE]
    with pytest.raises(amp.TooLong) as caught:
        answer_box(b"q0", Answer(longest + b"x"), wire)
    assert (caught.value.keyName, caught.value.isLocal) == (b"replies", True)
    with pytest.raises(amp.TooLong):
        question_box(b"q0", QuestionHead(b"E"), b"", longest + b"x", b"", wire)


@pytest.mark.parametrize("value", [b"@", b"@0", b"@x y", b"?", b"", b"@0 1 2", b"@1 -1"])
def test_a_part_that_was_not_written_by_us_is_refused(value: bytes) -> None:
    before = descriptors()
    wire = Wire()
    box = large_question(wire)
    box[b"connection"] = value
    with pytest.raises(BrokenRule, match="connection: neither bytes nor memory"):
        read_question(box, wire)
    for fd in wire.arrived.values():  # the channel closes them
        os.close(fd)
    assert descriptors() == before


@pytest.mark.parametrize("head", [b"", b"E", b"x" * 20])
def test_a_head_of_another_length_is_refused(head: bytes) -> None:
    wire = Wire()
    box = large_question(wire)
    box[b"head"] = head
    with pytest.raises(BrokenRule, match=f"head: a head of {len(head)} bytes instead of 19"):
        read_question(box, wire)
    for fd in wire.arrived.values():
        os.close(fd)


def test_where_one_part_cannot_be_mapped_no_descriptor_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = descriptors()
    wire = Wire()
    box = large_question(wire)
    map_one, count = mmap.mmap, iter(range(9))

    def refuse_the_second(*arguments: Any, **keywords: Any) -> mmap.mmap:
        if next(count) == 1:
            raise OSError("no memory")
        return map_one(*arguments, **keywords)

    monkeypatch.setattr(mmap, "mmap", refuse_the_second)
    with pytest.raises(OSError, match="no memory"):
        read_question(box, wire)
    assert (wire.arrived, descriptors()) == ({}, before)


def test_a_question_that_nobody_reads_leaves_no_descriptor_open() -> None:
    before = descriptors()
    wire = Wire()
    drop_question(large_question(wire), wire)
    drop_question(box_of(question_box(b"q0", QuestionHead(b"E"), b"", b"x", b"", wire)), wire)
    assert (wire.arrived, descriptors()) == ({}, before)


def test_an_answer_has_no_more_packets_than_it_may() -> None:
    check_answer(frame(b"b") * MAX_PACKETS)
    with pytest.raises(BrokenRule, match=f"replies: more than {MAX_PACKETS} packets"):
        check_answer(frame(b"b") * (MAX_PACKETS + 1))


def test_an_answer_is_no_longer_than_it_may_be() -> None:
    with pytest.raises(BrokenRule, match=r"a value of 134217729 bytes \(the limit is 134217728\)"):
        check_answer(bytes(MAX_ANSWER + 1))
