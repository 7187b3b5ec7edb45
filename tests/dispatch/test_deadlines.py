"""What the MTA hears in time, and whose process is killed for it."""

from __future__ import annotations

from typing import Any

import pytest
from armed import armed
from one_dispatcher import Workers
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.dispatch.timeouts import SOFT_LIMIT, TAKEOVER_AFTER
from sharded_milter.errors import DeadlineExceeded, Overloaded, Poisoned
from sharded_milter.protocol.commands import Eom, Mail
from sharded_milter.protocol.stages import Stage

DEADLINES: dict[str, Any] = {"command_deadline": 20.0, "eom_deadline": 200.0, "queue_wait": 50.0}
OTHER = Mail("<other@example.org>").encode() + Eom().encode()


@pytest.mark.parametrize(("stage", "limit"), [(Stage.RCPT, 20.0), (Stage.EOM, 200.0)])
def test_at_the_deadline_the_answer_comes_at_once_and_the_worker_is_killed(
    stage: Stage, limit: float
) -> None:
    workers = Workers(**DEADLINES)
    result = workers.submit(stage)
    workers.wait(limit - 0.5)
    assert result.values == []
    assert workers.shards[0].told == ["dump stacks"]
    workers.wait(0.5)
    why = f"qid=1 was not answered within {limit:g} s"
    assert workers.shards[0].told == ["dump stacks", f"kill: {why}"]
    assert isinstance(result.only, DeadlineExceeded)
    assert str(result.only) == why
    assert workers.counters["deadlines"] == 1


def test_an_answer_that_arrived_while_the_master_slept_counts_at_the_deadline() -> None:
    workers = Workers(**DEADLINES)
    result = workers.submit()
    [shard] = workers.shards
    workers.wait(180.0)
    shard.arrived.append(shard.answer)
    workers.wait(20.0)
    assert result.only == b"replies"
    assert shard.told == ["dump stacks"]
    assert workers.counters["deadlines"] == 0


def test_so_it_does_for_one_whose_answer_is_not_awaited() -> None:
    workers = Workers(**DEADLINES)
    cancelled = workers.submit()
    workers.dispatcher.cancel(cancelled.job)
    [shard] = workers.shards
    shard.arrived.append(shard.answer)
    workers.wait(200.0)
    assert shard.told == []
    assert (workers.counters["deadlines"], cancelled.values) == (0, [])


def test_a_worker_that_dies_of_the_kill_counts_no_second_deadline() -> None:
    workers = Workers(2, **DEADLINES)
    result = workers.submit()
    shard = workers.busy[0]
    workers.wait(201.0)  # the exit takes a while
    assert len(shard.told) == 2
    shard.exit()
    workers.wait(400.0)
    assert isinstance(result.only, DeadlineExceeded)
    assert workers.counters["deadlines"] == 1
    assert workers.busy == []
    assert armed(workers.clock) == []


def test_the_deadline_counts_from_when_the_job_was_submitted() -> None:
    workers = Workers(2, **DEADLINES)
    result = workers.submit(Stage.RCPT)
    workers.wait(8.0)
    workers.busy[0].exit()
    (second,) = workers.busy
    workers.wait(12.0)
    assert isinstance(result.only, DeadlineExceeded)
    assert [told.partition(":")[0] for told in second.told] == ["dump stacks", "kill"]


def test_a_scan_that_has_run_for_a_small_part_of_the_deadline_goes_on() -> None:
    workers = Workers(2, **DEADLINES)
    result = workers.submit(Stage.RCPT)
    workers.wait(15.0)
    workers.busy[0].exit()
    (second,) = workers.busy
    workers.wait(5.0)
    assert isinstance(result.only, DeadlineExceeded)
    assert second.told == ["dump stacks"]
    workers.wait(14.5)  # it has the rest of a deadline of its own
    assert second.told == ["dump stacks"]
    workers.wait(0.5)
    assert second.told[1:] == ["kill: qid=1 was not answered within 20 s"]
    assert workers.counters["deadlines"] == 2


def test_a_scan_that_ends_in_the_rest_of_its_own_time_is_not_killed() -> None:
    workers = Workers(2, **DEADLINES)
    result = workers.submit(Stage.RCPT)
    workers.wait(15.0)
    workers.busy[0].exit()
    (second,) = workers.busy
    workers.wait(10.0)
    second.answer(b"too late")
    workers.wait(20.0)
    assert isinstance(result.only, DeadlineExceeded)
    assert not any(told.startswith("kill") for told in second.told)
    assert workers.counters["attempts_superseded"] == 1


def test_the_soft_limit_says_where_it_hangs_and_no_more() -> None:
    workers = Workers(**DEADLINES)
    result = workers.submit()
    with capturedLogs() as events:
        workers.wait(SOFT_LIMIT * 200.0)
    (event,) = [event for event in events if event["log_level"] == LogLevel.warn]
    assert (event["about"], event["n"]) == ("qid=1", 160.0)
    workers.shards[0].answer(b"replies")
    workers.wait(200.0)
    assert result.only == b"replies"
    assert workers.shards[0].told == ["dump stacks"]


def test_a_job_that_waits_behind_another_at_the_soft_limit_dumps_nothing() -> None:
    deadline = 0.9 * TAKEOVER_AFTER
    workers = Workers(command_deadline=deadline)
    workers.warm()
    workers.submit()
    workers.submit(Stage.RCPT)
    workers.clock.advance(0.85 * deadline)
    assert workers.shards[0].told == []


def test_a_job_that_meets_its_deadline_behind_another_is_withdrawn_and_answered_busy() -> None:
    deadline = 0.9 * TAKEOVER_AFTER
    workers = Workers(command_deadline=deadline)
    workers.warm()
    first, second = workers.submit(), workers.submit(Stage.RCPT)
    (shard,) = workers.shards
    assert len(shard.open) == 2
    workers.clock.advance(0.8 * deadline)
    workers.clock.advance(0.21 * deadline)
    assert isinstance(second.only, Overloaded)
    assert len(shard.withdrawals) == 1
    assert not any(told.startswith("kill") for told in shard.told)
    shard.answer(b"first")
    assert shard.confirm() == ""
    assert first.only == b"first"
    assert workers.counters["attempts_withdrawn"] == 1
    workers.submit()
    assert len(shard.open) == 1


@pytest.mark.parametrize("stage", [Stage.RCPT, Stage.EOM])
def test_a_cancelled_job_still_has_its_own_deadline(stage: Stage) -> None:
    workers = Workers(**DEADLINES)
    cancelled = workers.submit(stage)
    workers.wait(5.0)
    workers.dispatcher.cancel(cancelled.job)
    deadline = workers.limits.deadline(stage)
    workers.wait(deadline - 5.5)
    assert workers.shards[0].told == []
    workers.wait(0.5)
    assert len(workers.shards[0].told) == 1
    workers.shards[0].exit()
    assert cancelled.values == []


def test_a_message_that_hangs_twice_is_poison() -> None:
    workers = Workers(2, **DEADLINES)
    first, second = workers.submit(), workers.submit()
    workers.wait(200.0)
    assert sorted(type(each.only).__name__ for each in (first, second)) == [
        "DeadlineExceeded", "Poisoned",
    ]  # fmt: skip
    assert isinstance(workers.submit().only, Poisoned)


def test_a_message_that_has_waited_for_most_of_its_time_is_not_to_blame() -> None:
    workers = Workers(2, command_deadline=20.0, eom_deadline=200.0, queue_wait=190.0)
    for _ in workers.shards:
        workers.submit(message=OTHER)
    late = [workers.submit(), workers.submit()]
    workers.wait(150.0)
    for shard in workers.shards:
        shard.answer()
    workers.wait(50.0)
    assert [type(result.only) for result in late] == [DeadlineExceeded, DeadlineExceeded]
    assert not any(told.startswith("kill") for shard in workers.shards for told in shard.told)


# In the queue


def test_who_waits_too_long_is_told_that_we_are_busy() -> None:
    workers = Workers(**DEADLINES)
    workers.submit()
    workers.wait(1.0)
    waiting = workers.submit()
    workers.wait(49.5)
    assert waiting.values == []
    workers.wait(0.5)
    assert isinstance(waiting.only, Overloaded)
    assert str(waiting.only) == "no worker was free within 50 s"
    workers.shards[0].answer()
    assert workers.busy == []
    assert workers.counters["overload_queue_wait"] == 1


def test_each_of_those_who_wait_has_its_own_time() -> None:
    workers = Workers(**DEADLINES)
    workers.submit()
    waiting = []
    for _ in range(4):
        waiting.append(workers.submit())
        workers.wait(10.0)
    for count in range(1, 5):
        workers.wait(10.0)
        assert [len(result.values) for result in waiting] == [1] * count + [0] * (4 - count)


def test_a_job_that_waits_until_its_deadline_is_told_that_we_are_busy() -> None:
    workers = Workers(**DEADLINES)
    workers.submit()
    waiting = workers.submit(Stage.RCPT)
    workers.wait(20.0)
    assert isinstance(waiting.only, Overloaded)
    assert workers.shards[0].told == []
    workers.shards[0].answer()
    assert workers.busy == []


def test_a_job_whose_place_is_lost_is_still_bound_by_the_deadline() -> None:
    workers = Workers(**DEADLINES)
    result = workers.submit(Stage.RCPT)
    workers.wait(10.0)
    workers.shards[0].exit()
    workers.wait(10.0)
    assert isinstance(result.only, Overloaded)
