"""With --join-retries, a client's repeat of a message waits for the answer to the first one."""

from __future__ import annotations

from typing import Any

import pytest
from armed import armed
from one_dispatcher import Workers
from one_pool import Result

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.retries import JOIN_AFTER
from sharded_milter.errors import CallbackFailed, DeadlineExceeded, Overloaded
from sharded_milter.protocol.commands import Body, Eom
from sharded_milter.protocol.stages import Stage

OTHER = Body(b"other\r\n").encode() + Eom().encode()


def joined(workers: Workers, count: int = 1, **options: Any) -> list[Result]:
    """A message, and repeats of it that wait for its answer."""
    results = [workers.submit(client=b"c", **options)]
    for _ in range(count):
        workers.wait(JOIN_AFTER)
        results.append(workers.submit(client=b"c"))
    return results


def test_a_repeat_waits_for_the_scan_that_runs() -> None:
    workers = Workers(2, join_retries=True)
    first, second = joined(workers)
    (shard,) = workers.busy
    shard.answer(b"replies")
    assert (first.only, second.only) == (b"replies", b"replies")
    assert (second.job.slot, second.job.started) == (shard.slot, 0.0)
    assert second.job.message == b""
    assert workers.counters["joined"] == 1
    assert armed(workers.clock) == []


def test_a_repeat_waits_in_the_queue_with_the_first() -> None:
    workers = Workers(join_retries=True)
    workers.submit(Stage.RCPT)
    first, second = joined(workers)
    assert workers.dispatcher.queued == 1
    workers.shards[0].answer()
    workers.shards[0].answer(b"verdict")
    assert (first.only, second.only) == (b"verdict", b"verdict")
    assert workers.busy == []


def test_a_repeat_fails_with_the_scan_that_it_waits_for() -> None:
    workers = Workers(2, join_retries=True)
    _, second = joined(workers)
    workers.busy[0].answer(error=b"bad")
    assert isinstance(second.only, CallbackFailed)


def test_a_repeat_takes_the_place_of_a_message_that_is_cancelled_while_it_is_scanned() -> None:
    workers = Workers(2, join_retries=True)
    first, second = joined(workers)
    workers.dispatcher.cancel(first.job)
    assert len(workers.busy) == 1
    workers.busy[0].exit("lost")
    workers.hire()
    (shard,) = workers.busy
    assert shard.jobs == [second.job]
    shard.answer(b"verdict")
    assert (first.values, second.only) == ([], b"verdict")
    assert second.job.blamed == 1


def test_a_repeat_takes_the_place_of_a_message_that_is_cancelled_in_the_queue() -> None:
    workers = Workers(join_retries=True)
    workers.submit(Stage.RCPT)
    first, second = joined(workers)
    younger = workers.submit(born=5.0, message=OTHER)
    workers.dispatcher.cancel(first.job)
    assert workers.dispatcher.queued == 2
    workers.shards[0].answer()
    assert workers.shards[0].jobs == [second.job]
    workers.shards[0].answer(b"verdict")
    assert (first.values, second.only, younger.values) == ([], b"verdict", [])
    workers.clock.advance(workers.limits.queue_wait)
    assert workers.counters["overload_queue_wait"] == 0


def test_a_repeat_takes_the_place_of_a_message_that_waits_behind_another() -> None:
    workers = Workers(2, join_retries=True)
    workers.warm()
    workers.submit(message=OTHER)
    workers.submit(message=OTHER)
    first, second = joined(workers)
    slow, quick = sorted(workers.shards, key=lambda shard: -len(shard.open))
    assert slow.jobs[1] is first.job
    workers.dispatcher.cancel(first.job)
    assert slow.withdrawals == []
    quick.answer()
    assert quick.jobs == [second.job]
    assert len(slow.withdrawals) == 1


def test_other_repeats_wait_for_the_one_that_took_the_place() -> None:
    workers = Workers(join_retries=True)
    first, second, third = joined(workers, 2)
    workers.dispatcher.cancel(first.job)
    workers.wait(JOIN_AFTER)
    fourth = workers.submit(client=b"c")
    workers.shards[0].answer(b"verdict")
    assert [each.values for each in (first, second, third, fourth)] == [[], *[[b"verdict"]] * 3]


def test_a_repeat_that_was_cancelled_takes_no_place() -> None:
    workers = Workers(join_retries=True)
    workers.submit(message=OTHER)
    first, second, third = joined(workers, 2)
    workers.dispatcher.cancel(second.job)
    workers.dispatcher.cancel(first.job)
    workers.shards[0].answer()
    assert workers.shards[0].jobs == [third.job]
    workers.shards[0].answer(b"verdict")
    assert (first.values, second.values, third.only) == ([], [], b"verdict")


def test_where_all_repeats_were_cancelled_the_message_is_gone() -> None:
    workers = Workers(join_retries=True)
    workers.submit(Stage.RCPT)
    first, second = joined(workers)
    workers.dispatcher.cancel(second.job)
    workers.dispatcher.cancel(first.job)
    assert workers.dispatcher.queued == 0
    workers.shards[0].answer()
    assert workers.busy == []


def test_a_cancelled_repeat_is_not_told() -> None:
    workers = Workers(join_retries=True)
    first, second = joined(workers)
    workers.dispatcher.cancel(second.job)
    workers.shards[0].answer(b"verdict")
    assert (first.only, second.values) == (b"verdict", [])


def test_a_repeat_hears_of_the_deadline_of_a_scan_that_hangs() -> None:
    workers = Workers(join_retries=True, eom_deadline=100.0)
    results = joined(workers)
    workers.wait(90.0)
    assert all(isinstance(result.only, DeadlineExceeded) for result in results)
    assert len(workers.shards[0].told) == 2


def test_a_repeat_goes_on_where_the_first_has_waited_for_too_long() -> None:
    workers = Workers(join_retries=True, eom_deadline=100.0)
    workers.submit(Stage.EOM, message=OTHER)
    first, second = joined(workers)
    workers.wait(70.0)
    workers.shards[0].answer()
    workers.wait(20.0)  # the first has waited for most of its time
    assert isinstance(first.only, DeadlineExceeded)
    assert second.values == []
    workers.shards[0].answer(b"verdict")
    assert second.only == b"verdict"


def test_a_repeat_has_its_own_deadline_too() -> None:
    workers = Workers(join_retries=True, eom_deadline=100.0, queue_wait=200.0)
    workers.submit(Stage.RCPT)
    first, second = joined(workers)
    workers.wait(90.0)
    assert isinstance(first.only, Overloaded)
    assert second.values == []
    workers.wait(10.0)
    assert isinstance(second.only, Overloaded)
    assert workers.dispatcher.queued == 0


@pytest.mark.parametrize(
    ("wait", "options"),
    [
        (JOIN_AFTER - 1, {}),
        (JOIN_AFTER, {"client": b"other"}),
        (JOIN_AFTER, {"message": OTHER}),
        (JOIN_AFTER, {"message": Body(b"x" * 1000).encode()}),
        (JOIN_AFTER, {"message": Body(b"tex2\r\n").encode() + Eom().encode()}),
        (JOIN_AFTER, {"stage": Stage.RCPT}),
        (JOIN_AFTER, {"milter": 1}),
        (JOIN_AFTER, {"affinity": ObjectAffinity(replayable=True)}),
    ],
    ids=["too early", "client", "text", "size", "words", "stage", "milter", "object"],
)
def test_nothing_else_is_a_repeat(wait: float, options: dict[str, Any]) -> None:
    workers = Workers(2, join_retries=True)
    workers.submit(client=b"c")
    workers.wait(wait)
    workers.submit(**{"client": b"c", **options})
    assert len(workers.busy) == 2


def test_a_message_that_is_done_is_not_waited_for() -> None:
    workers = Workers(join_retries=True)
    workers.submit(client=b"c")
    workers.wait(JOIN_AFTER)
    workers.shards[0].answer()
    workers.submit(client=b"c")
    assert len(workers.busy) == 1


def test_repeats_are_scanned_where_the_operator_has_not_asked_for_more() -> None:
    workers = Workers(2)
    joined(workers)
    assert len(workers.busy) == 2
