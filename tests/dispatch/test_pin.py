"""Pinned jobs: an object's shard, its loss, and what another object is told."""

from __future__ import annotations

from typing import Any

import pytest
from one_pool import MESSAGE, FakeShard, Result, Workers, noted

from sharded_milter.dispatch.affinity import Pin
from sharded_milter.dispatch.job import Job
from sharded_milter.errors import DeadlineExceeded, Overloaded, WorkerLost
from sharded_milter.ipc.messages import Memory, Question
from sharded_milter.pool.shard import State
from sharded_milter.protocol.commands import Abort, Helo
from sharded_milter.protocol.stages import Stage

HEAD, REST = MESSAGE[:5], MESSAGE[5:]


class Objects(Workers):
    """Workers that have objects; what each is asked is kept whole."""

    def ask(self, pin: Pin, stage: Stage | None = Stage.EOM, message: bytes = MESSAGE,
            **options: Any) -> Result:  # fmt: skip
        job = Job(stage, False, b"connection", message, lambda: "qid=1", pin=pin, **options)
        result = Result(job)
        noted(self.dispatch.submit(job), result.values)
        return result

    def busy(self) -> list[FakeShard]:
        return [shard for shard in self.shards if shard.jobs]


def pin(*, replayable: bool = False) -> Pin:
    return Pin(replayable=replayable)


def asked(shard: FakeShard) -> list[tuple[Any, ...]]:
    return [(stage, connection, message) for stage, connection, message in shard.asked]


def test_an_object_stays_on_its_shard_while_others_idle() -> None:
    workers = Objects(2)
    mine = pin()
    workers.ask(mine, Stage.CONNECT, b"")
    home = mine.place
    for _ in range(3):
        home.answer()
        assert workers.ask(mine).job.shard is home
    waiting = workers.ask(mine)  # the other shard idles
    assert (waiting.job.shard, waiting.values) == (None, [])
    home.answer()
    assert waiting.job.shard is home


def test_new_objects_go_where_the_fewest_are() -> None:
    workers = Objects(3)
    pins = [pin() for _ in range(9)]
    for each in pins:
        workers.ask(each, Stage.CONNECT, b"")
    assert [shard.sessions for shard in workers.shards] == [3, 3, 3]
    for shard in workers.shards:
        while shard.jobs:
            shard.answer()
    for each in pins[:2]:
        workers.dispatch.release(each)
    assert sorted(shard.sessions for shard in workers.shards) == [2, 2, 3]


def test_only_what_is_new_is_sent() -> None:
    workers = Objects()
    mine = pin()
    (shard,) = workers.shards
    workers.ask(mine, Stage.MAIL, HEAD)
    shard.answer()
    mine.learn(b"H", Helo("x").encode())
    workers.ask(mine, Stage.EOM, HEAD + REST)
    shard.answer()
    mine.message_over()
    workers.ask(mine, Stage.MAIL, HEAD)
    assert asked(shard) == [
        (Stage.MAIL, b"connection", HEAD),
        (Stage.EOM, Helo("x").encode(), REST),
        (Stage.MAIL, Abort().encode(), HEAD),
    ]


def test_an_object_that_can_be_rebuilt_goes_on_elsewhere_with_all_there_is() -> None:
    workers = Objects(2)
    mine = pin(replayable=True)
    workers.ask(mine, Stage.MAIL, HEAD)
    first = mine.place
    first.answer()
    result = workers.ask(mine, Stage.EOM, HEAD + REST)
    first.exit()
    (second,) = workers.busy()
    assert second is not first
    assert asked(second) == [(Stage.EOM, b"connection", HEAD + REST)]
    assert result.values == []
    second.answer(b"verdict")
    assert result.only == b"verdict"
    assert (first.sessions, second.sessions) == (1, 1)


def test_an_object_that_cannot_costs_the_message_in_hand_and_no_other() -> None:
    workers = Objects(2)
    mine = pin()
    workers.ask(mine, Stage.MAIL, HEAD)
    mine.place.answer()
    result = workers.ask(mine, Stage.EOM, HEAD + REST)
    mine.place.exit()
    assert isinstance(result.only, WorkerLost)
    assert workers.busy() == []
    mine.message_over()
    after = workers.ask(mine, Stage.MAIL, HEAD)
    (second,) = workers.busy()
    assert asked(second) == [(Stage.MAIL, b"connection", HEAD)]
    second.answer(b"verdict")
    assert after.only == b"verdict"


def test_a_message_whose_object_died_between_two_commands_is_lost_to_its_end() -> None:
    workers = Objects(2)
    mine = pin()
    workers.ask(mine, Stage.MAIL, HEAD)
    home = mine.place
    home.answer()
    home.exit()
    for stage in (Stage.RCPT, Stage.DATA, Stage.EOM):
        assert isinstance(workers.ask(mine, stage, HEAD + REST).only, WorkerLost)
    mine.message_over()
    assert workers.ask(mine, Stage.MAIL, HEAD).values == []


@pytest.mark.parametrize("stage", [Stage.CONNECT, Stage.HELO])
def test_before_a_message_every_object_can_be_built_anew(stage: Stage) -> None:
    workers = Objects(2)
    mine = pin()
    result = workers.ask(mine, stage, b"")
    mine.place.exit()
    (second,) = workers.busy()
    second.answer(b"verdict")
    assert result.only == b"verdict"


@pytest.mark.parametrize("replayable", [True, False])
def test_a_question_that_waited_for_a_shard_that_died_is_not_forgotten(replayable: bool) -> None:
    workers = Objects(2)
    mine, other = pin(replayable=replayable), pin()
    workers.ask(mine, Stage.MAIL, HEAD)
    home = mine.place
    home.answer()
    other.settle(home, 99)  # another object of the same shard is busy
    workers.ask(other, Stage.EOM)
    result = workers.ask(mine, Stage.EOM, HEAD + REST)
    assert result.job.shard is None
    home.exit()
    if not replayable:
        assert isinstance(result.only, WorkerLost)
        return
    (second,) = workers.busy()
    second.answer(b"verdict")
    assert result.only == b"verdict"


def test_where_there_is_no_shard_the_first_to_come_gets_the_object() -> None:
    workers = Objects(0)
    mine = pin()
    result = workers.ask(mine, Stage.CONNECT, b"")
    assert (mine.place, result.values) == (None, [])
    shard = workers.hire()
    assert (mine.place, shard.sessions) == (shard, 1)


def test_a_retired_shard_answers_for_its_objects_only() -> None:
    workers = Objects(2)
    mine = pin()
    workers.ask(mine, Stage.CONNECT, b"")
    home = mine.place
    home.answer()
    workers.dispatch.schedule.retire(home)
    for _ in range(4):
        workers.submit()
    assert len(home.asked) == 1
    workers.ask(mine)
    assert len(home.asked) == 2
    home.answer()
    assert len(home.asked) == 2
    assert home.state is State.IDLE


def test_a_farewell_ends_the_object_and_fails_where_that_is_gone() -> None:
    workers = Objects(2)
    mine = pin(replayable=True)
    workers.ask(mine, Stage.CONNECT, b"")
    home = mine.place
    home.answer()
    done = workers.ask(mine, None, b"")
    assert home.told == []
    home.exit()
    assert isinstance(done.only, WorkerLost)
    workers.dispatch.release(mine)
    assert workers.dispatch.counters["workers_lost"] == 1


def test_a_deadline_costs_the_object_its_shard() -> None:
    workers = Objects(2, command_deadline=20.0)
    mine = pin()
    result = workers.ask(mine, Stage.RCPT, HEAD)
    home = mine.place
    workers.wait(20.0)
    assert isinstance(result.only, DeadlineExceeded)
    assert home.state is State.KILLED
    next_one = workers.ask(mine, Stage.DATA, HEAD + REST)
    assert next_one.values == []  # until the exit is known
    home.exit()
    assert isinstance(next_one.only, WorkerLost)


def test_an_object_whose_shard_is_busy_for_too_long_is_not_waited_for() -> None:
    workers = Objects(2, queue_wait=5.0)
    mine, other = pin(), pin()
    workers.ask(mine, Stage.CONNECT, b"")
    home = mine.place
    home.answer()
    other.settle(home, 99)
    workers.ask(other)
    result = workers.ask(mine)
    workers.wait(6.0)
    assert isinstance(result.only, Overloaded)


def test_objects_do_not_wait_for_the_scan_of_a_repeat() -> None:
    workers = Objects(2, join_retries=True)
    workers.ask(pin(), client=b"c")
    workers.wait(30.0)
    workers.ask(pin(), client=b"c")
    assert len(workers.busy()) == 2


def test_what_a_command_of_no_message_asks_comes_behind_what_is_new() -> None:
    mine = pin()
    mine.settle("shard", 3)
    question = mine.question(b"U", b"connection", HEAD, 2, b"unknown")
    assert question == Question(b"U", b"connection", HEAD, 2, 3, 0, b"unknown")
    again = mine.question(b"U", b"connection", HEAD, 2, b"unknown")
    assert again == Question(b"U", b"", b"", 2, 3, 0, b"unknown")


def test_farewells_are_over_when_the_last_is_answered_or_lost() -> None:
    workers = Objects(2)
    pins = [pin(), pin()]
    for each in pins:
        workers.ask(each, Stage.CONNECT, b"")
        each.place.answer()
        workers.ask(each, None, b"")
    over = workers.dispatch.farewells()
    pins[0].place.answer()
    assert not over.called
    pins[1].place.exit()
    assert over.called
    assert workers.dispatch.farewells().called


def test_a_repeat_does_not_wait_for_the_scan_of_another_milter() -> None:
    workers = Objects(2, join_retries=True)
    workers.submit(client=b"c", milter=0)
    workers.wait(30.0)
    workers.submit(client=b"c", milter=1)
    assert len(workers.busy()) == 2


def test_a_question_whose_chain_has_been_answered_is_not_asked_again() -> None:
    """The first of two that waited for the dead shard fails and so ends the question for both."""
    workers = Objects(2)
    first, second = pin(), pin()
    workers.ask(first, Stage.MAIL, HEAD)
    home = first.place
    home.answer()
    second.settle(home, 98)
    blocker = pin()
    blocker.settle(home, 99)
    workers.ask(blocker)
    lost = workers.ask(first, Stage.EOM, HEAD + REST)
    other = workers.ask(second, Stage.EOM, HEAD + REST)
    lost.job.result.addErrback(lambda _: workers.dispatch.cancel(other.job))
    home.exit()
    assert [shard for shard in workers.busy() if shard is not home] == []


def test_an_object_that_waited_when_its_idle_shard_died_is_lost_with_it() -> None:
    workers = Objects(2, reserve=1)
    mine = pin()
    workers.ask(mine, Stage.MAIL, HEAD)
    home = mine.place
    home.answer()
    workers.submit()  # the other one scans, and this one is reserved for light jobs
    result = workers.ask(mine, Stage.EOM, HEAD + REST)
    assert (result.job.shard, result.values) == (None, [])
    home.exit()
    assert isinstance(result.only, WorkerLost)


def test_a_farewell_waits_as_long_as_it_takes_and_is_never_too_much() -> None:
    workers = Objects(1, max_queue=0, queue_wait=5.0, command_deadline=20.0, eom_deadline=200.0)
    mine = pin()
    workers.ask(mine, Stage.CONNECT, b"")
    (home,) = workers.shards
    home.answer()
    workers.ask(mine)
    done = workers.ask(mine, None, b"")
    workers.wait(100.0)
    home.answer()
    assert home.asked[-1][0] is None
    assert done.values == []
    home.answer(b"")
    assert done.only == b""
    assert workers.dispatch.counters["deadlines"] == 0


def test_a_farewell_that_hangs_has_a_deadline_too() -> None:
    workers = Objects(1, command_deadline=20.0)
    mine = pin()
    workers.ask(mine, Stage.CONNECT, b"")
    (home,) = workers.shards
    home.answer()
    done = workers.ask(mine, None, b"")
    workers.wait(20.0)
    assert isinstance(done.only, DeadlineExceeded)
    assert home.state is State.KILLED


def test_news_that_there_is_no_memory_for_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Objects(1)
    mine = pin()
    workers.ask(mine, Stage.CONNECT, b"")
    (home,) = workers.shards
    home.answer()
    mine.learn(b"H", Helo("x" * 60_000).encode())
    monkeypatch.setattr("os.memfd_create", _refuse)
    result = workers.ask(mine, Stage.HELO, b"")
    assert isinstance(result.only, Overloaded)
    monkeypatch.undo()
    workers.ask(mine, Stage.HELO, b"")
    assert isinstance(home.asked[-1][1], Memory)
    home.answer()


def _refuse(*_: object) -> int:
    raise OSError(24, "Too many open files")
