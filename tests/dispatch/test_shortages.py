"""Answers that say nothing of a message: its worker, or the master, was short of something."""

from __future__ import annotations

from objects import HEAD, REST, began, mine
from one_dispatcher import Workers

from sharded_milter.dispatch.affinity import SessionUpdate
from sharded_milter.errors import Overloaded
from sharded_milter.ipc.memory import MAX_INLINE, Memory, view_of
from sharded_milter.ipc.messages import Answer

SHORT = Answer(short=b"it cannot take a question: Too many open files")
LOST = Answer(lost=b"the master cannot take the answer: Too many open files")


def test_what_a_worker_cannot_take_is_told_to_come_again_and_blamed_for_nothing() -> None:
    workers = Workers(2)
    result = workers.submit()
    [shard] = workers.busy
    assert shard.say(shard.open[0], SHORT) == ""
    assert isinstance(result.only, Overloaded)
    assert str(result.only) == SHORT.short.decode()
    assert result.job.blamed == 0
    assert workers.busy == []


def test_an_answer_that_the_master_has_lost_is_asked_for_once_more() -> None:
    workers = Workers(1)
    result = workers.submit()
    [shard] = workers.shards
    assert shard.say(shard.open[0], LOST) == ""
    assert (result.values, shard.jobs) == ([], [result.job])
    shard.answer()
    assert result.only == b"replies"
    again = workers.submit()
    for _ in range(2):
        shard.say(shard.open[0], LOST)
    assert isinstance(again.only, Overloaded)
    assert again.job.blamed == 0
    counters = workers.dispatcher.counters
    assert (counters["attempts"], counters["attempts_answered"], counters["attempts_short"]) == (
        4,
        1,
        3,
    )


def test_what_is_lost_of_an_object_is_its_object() -> None:
    for nothing in (SHORT, LOST):
        workers = Workers(1)
        affinity = mine()
        home = began(workers, affinity)
        result = workers.ask(affinity)
        home.say(home.open[0], nothing)
        assert isinstance(result.only, Overloaded)
        assert (affinity.holder, affinity.exists) == (None, False)


def test_a_message_that_still_grows_is_told_as_a_copy_of_what_is_new() -> None:
    affinity = mine()
    affinity.assign("shard", 3)
    memory = Memory()
    memory.append(HEAD)
    affinity.next_update(b"connection", memory)
    memory.append(REST)
    assert affinity.next_update(b"connection", memory) == SessionUpdate(3, 0, b"", REST)
    memory.append(bytes(MAX_INLINE + 1))
    news = affinity.next_update(b"connection", memory)
    assert isinstance(news.message, Memory)
    assert news.message.is_sealed
    assert (news.start, bytes(view_of(news.message))) == (0, bytes(MAX_INLINE + 1))
    memory.seal()
    whole = affinity.next_update(b"connection", memory)
    assert (whole.start, whole.message) == (len(memory), memory)
