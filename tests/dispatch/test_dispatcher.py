"""A job is answered exactly once, or it is cancelled."""

from __future__ import annotations

import pytest
from armed import armed
from one_dispatcher import Workers
from one_pool import MANIFEST, MESSAGE, noted
from twisted.internet.defer import Deferred, fail, succeed

from sharded_milter.dispatch.job import Job, result_of
from sharded_milter.errors import CallbackFailed, Overloaded, Superseded
from sharded_milter.ipc.messages import WITHDRAWN, Answer
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

# Answers


def test_a_job_is_asked_and_answered() -> None:
    workers = Workers()
    result = workers.submit(queue_id="4F1")
    (shard,) = workers.shards
    assert (shard.jobs, shard.current_queue_id) == ([result.job], "4F1")
    assert (shard.asked[0].connection, shard.asked[0].message) == (b"connection", MESSAGE)
    assert result.values == []
    workers.wait(3.0)
    assert shard.answer(b"replies") == ""
    assert result.only == b"replies"
    assert (result.job.submitted, result.job.started, result.job.slot) == (0.0, 0.0, 1)


def test_a_job_waits_for_a_shard() -> None:
    workers = Workers()
    first, second = workers.submit(), workers.submit()
    assert workers.dispatcher.queued == 1
    workers.wait(3.0)
    workers.shards[0].answer(b"one")
    assert (first.only, second.values) == (b"one", [])
    workers.shards[0].answer(b"two")
    assert second.only == b"two"
    assert (second.job.submitted, second.job.started) == (0.0, 3.0)


def test_jobs_run_on_all_shards_at_once() -> None:
    workers = Workers(3)
    results = [workers.submit() for _ in range(3)]
    for shard in workers.shards:
        shard.answer(b"%d" % shard.slot)
    assert sorted(result.only for result in results) == [b"1", b"2", b"3"]


def test_what_a_callback_raises_is_not_tried_again() -> None:
    workers = Workers(2)
    result = workers.submit()
    workers.busy[0].answer(error=b"ValueError: bad")
    assert isinstance(result.only, CallbackFailed)
    assert str(result.only) == "ValueError: bad"
    assert workers.busy == []


def test_a_job_that_is_done_lets_go_of_its_bytes() -> None:
    workers = Workers()
    result = workers.submit(command=b"command")
    workers.shards[0].answer()
    job = result.job
    assert (job.connection, job.message, job.command, job.answer) == (b"", b"", b"", None)


def test_an_answer_in_time_leaves_no_timer_behind() -> None:
    workers = Workers()
    workers.submit(Stage.RCPT)
    workers.submit(Stage.RCPT)
    workers.shards[0].answer()
    workers.shards[0].answer()
    assert armed(workers.clock) == []


def test_who_submits_from_within_an_answer_is_served_in_its_turn() -> None:
    workers = Workers()
    first, waiting = workers.submit(), workers.submit()
    assert first.job.answer is not None
    later = []
    first.job.answer.addCallback(lambda _: later.append(workers.submit()))
    workers.shards[0].answer()
    assert workers.shards[0].jobs == [waiting.job]
    workers.shards[0].answer()
    assert workers.shards[0].jobs == [later[0].job]


def test_counts_of_attempts_add_up() -> None:
    workers = Workers(2)
    workers.submit()
    superseded = workers.submit()
    workers.submit()
    workers.dispatcher.cancel(superseded.job)
    workers.busy[0].exit()
    while workers.busy:
        workers.busy[0].answer()
    count = workers.counters
    ends = ("answered", "lost", "superseded", "withdrawn")
    assert count["attempts"] == sum(count[f"attempts_{end}"] for end in ends) == 3


# What no worker says


def test_an_answer_to_what_was_not_asked_breaks_a_rule() -> None:
    workers = Workers()
    assert (
        workers.shards[0].say(7, Answer(b"replies"))
        == "it has answered a question that it was not asked"
    )
    result = workers.submit()
    workers.shards[0].answer()
    number = workers.shards[0].asked[0].number
    assert (
        workers.shards[0].say(number, Answer(b"x"))
        == "it has answered a question that it was not asked"
    )
    assert result.only == b"replies"


def test_an_answer_of_a_shard_that_does_not_serve_breaks_a_rule() -> None:
    workers = Workers(0)
    stranger = Workers(1).shards[0]
    why = workers.dispatcher.answered(stranger, 1, Answer(b"replies"))
    assert why == "it has answered a question that it was not asked"


def test_to_confirm_what_was_not_withdrawn_breaks_a_rule() -> None:
    workers = Workers()
    result = workers.submit()
    number = workers.shards[0].asked[0].number
    assert (
        workers.shards[0].say(number, WITHDRAWN)
        == "it has withdrawn a question without being asked to"
    )
    assert result.values == []


def test_an_answer_out_of_turn_breaks_a_rule() -> None:
    workers = Workers()
    workers.warm()
    results = [workers.submit(), workers.submit()]
    (shard,) = workers.shards
    assert shard.say(shard.open[1], Answer(b"replies")) == "it has answered questions out of order"
    assert [result.values for result in results] == [[], []]


# The queue


def test_a_full_queue_refuses_at_once() -> None:
    workers = Workers(max_queue=2)
    results = [workers.submit() for _ in range(4)]
    assert [result.values for result in results[:3]] == [[], [], []]
    assert isinstance(results[3].only, Overloaded)
    assert workers.counters["overload_queue_full"] == 1
    assert results[3].job.message == b""


def test_light_jobs_overtake_heavy_ones_of_their_age() -> None:
    workers = Workers()
    workers.submit()
    workers.submit()
    light = workers.submit(Stage.RCPT, light=True)
    workers.shards[0].answer()
    assert workers.shards[0].jobs == [light.job]


def test_a_shard_that_can_be_told_nothing_gets_no_job() -> None:
    workers = Workers(2)
    workers.dispatcher.unavailable(workers.shards[1])
    workers.dispatcher.unavailable(Workers().shards[0])  # a stranger
    workers.submit()
    assert workers.busy == [workers.shards[0]]


def test_a_system_without_memory_refuses_the_job_and_the_shard_stays_free() -> None:
    workers = Workers()
    workers.shards[0].refuse = OSError(24, "Too many open files")
    result = workers.submit()
    assert isinstance(result.only, Overloaded)
    assert str(result.only) == "no memory for a job: Too many open files"
    workers.shards[0].refuse = None
    assert workers.submit().values == []
    assert len(workers.busy) == 1


def test_a_job_that_waits_is_refused_where_there_is_no_memory_then() -> None:
    workers = Workers()
    workers.submit()
    waiting, after = workers.submit(), workers.submit()
    workers.shards[0].refuse = OSError(24, "none")
    after.values.clear()
    workers.shards[0].answer()
    assert isinstance(waiting.only, Overloaded)
    assert isinstance(after.only, Overloaded)


def test_a_job_of_another_milter_than_the_shards_is_not_asked() -> None:
    workers = Workers()
    old = workers.submit(manifest=Manifest("old"))
    assert isinstance(old.only, Superseded)
    workers.submit(manifest=MANIFEST)
    assert len(workers.shards[0].asked) == 1
    assert workers.counters["refused_reloaded"] == 1


def test_a_job_that_fails_while_it_is_submitted_is_told_at_once() -> None:
    """It is given from the queue, not placed: another waits for a shard that runs alone."""
    workers = Workers(0)
    workers.submit(solo=True)
    workers.hire().answer()
    workers.submit(solo=True)  # waits for a fresh shard
    old = workers.submit(manifest=Manifest("old"))
    assert isinstance(old.only, Superseded)


# Cancelled jobs


def test_a_cancelled_job_that_waits_is_never_done() -> None:
    workers = Workers()
    workers.submit()
    waiting = workers.submit()
    workers.dispatcher.cancel(waiting.job)
    workers.shards[0].answer()
    assert workers.busy == []
    assert waiting.values == []


def test_the_shard_of_a_cancelled_job_is_free_when_it_has_answered_and_not_before() -> None:
    workers = Workers()
    cancelled = workers.submit()
    workers.dispatcher.cancel(cancelled.job)
    following = workers.submit()
    assert workers.shards[0].jobs == [cancelled.job]
    workers.shards[0].answer(b"late")
    workers.shards[0].answer(b"replies")
    assert following.only == b"replies"
    assert cancelled.values == []


@pytest.mark.parametrize("error", [b"", b"bad"])
def test_a_cancelled_job_is_not_tried_again(error: bytes) -> None:
    workers = Workers(2)
    cancelled = workers.submit()
    workers.dispatcher.cancel(cancelled.job)
    if error:
        workers.busy[0].answer(error=error)
    else:
        workers.busy[0].exit()
    assert workers.busy == []
    assert cancelled.values == []


def test_cancelling_what_is_answered_is_nothing() -> None:
    workers = Workers()
    result = workers.submit()
    workers.shards[0].answer(b"replies")
    workers.dispatcher.cancel(result.job)
    assert result.only == b"replies"


def test_a_job_may_be_asked_of_another_milter_too() -> None:
    job = Job(Stage.EOM, b"c", b"m", b"u", "1", 5.0, b"client", refused=True, milter=2, key=b"k")
    assert job.letter == b"E"
    copy = job.copy()
    assert (copy.stage, copy.connection, copy.message, copy.command) == (
        Stage.EOM,
        b"c",
        b"m",
        b"u",
    )
    assert (copy.queue_id, copy.born, copy.client, copy.refused) == ("1", 5.0, b"client", True)
    assert (copy.milter, copy.key, copy.answer) == (0, b"", None)


def test_sessions_have_ended_where_there_are_none() -> None:
    ended: list[None] = []
    noted(Workers().dispatcher.when_sessions_ended(), ended)
    assert ended == [None]


def test_an_answer_that_is_there_already_is_returned_or_raised() -> None:
    waiting: Deferred[bytes] = Deferred()
    assert result_of(waiting) is waiting
    assert result_of(succeed(b"verdict")) == b"verdict"
    failed: Deferred[bytes] = fail(Overloaded("full"))
    with pytest.raises(Overloaded, match="full"):
        result_of(failed)
