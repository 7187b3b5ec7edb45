"""A job is answered exactly once, whatever becomes of the worker that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from armed import armed
from one_pool import MESSAGE, Workers
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.dispatch.dispatcher import JOIN_AFTER, SOFT_LIMIT
from sharded_milter.dispatch.poison import REMEMBERED_FOR, Keep
from sharded_milter.errors import (
    CallbackFailed,
    DeadlineExceeded,
    Overloaded,
    Poisoned,
    Superseded,
    WorkerLost,
)
from sharded_milter.ipc.messages import blob
from sharded_milter.protocol.commands import Body, Eom, Header, Macro, Mail, Rcpt
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Stage

DEADLINES: dict[str, Any] = {"command_deadline": 20.0, "eom_deadline": 200.0, "queue_wait": 50.0}


def message(*packets: Packet) -> bytes:
    return b"".join(packet.encode() for packet in packets)


# Answers


def test_a_job_is_asked_and_answered() -> None:
    workers = Workers()
    result = workers.submit()
    (shard,) = workers.shards
    assert shard.asked == [(Stage.EOM, b"connection", MESSAGE)]
    assert shard.label() == "qid=1"
    assert result.values == []
    workers.wait(3.0)
    shard.answer(b"replies")
    assert result.only == b"replies"
    assert (result.job.submitted, result.job.started, result.job.slot) == (0.0, 0.0, 1)


def test_a_job_waits_for_a_shard() -> None:
    workers = Workers()
    first, second = workers.submit(), workers.submit()
    workers.wait(3.0)
    workers.shards[0].answer(b"one")
    assert (first.only, second.values) == (b"one", [])
    workers.shards[0].answer(b"two")
    assert second.only == b"two"
    assert (second.job.submitted, second.job.started) == (0.0, 3.0)


def test_jobs_run_on_all_shards_at_once() -> None:
    workers = Workers(3)
    results = [workers.submit() for _ in range(3)]
    for shard in reversed(workers.shards):
        shard.answer(b"%d" % shard.slot)
    assert [result.only for result in results] == [b"1", b"2", b"3"]


def test_what_a_callback_raises_is_not_tried_again() -> None:
    workers = Workers(2)
    result = workers.submit()
    workers.shards[0].answer(CallbackFailed("ValueError: bad"))
    assert isinstance(result.only, CallbackFailed)
    assert workers.shards[1].asked == []


def test_an_unforeseen_failure_is_logged_and_not_tried_again() -> None:
    workers = Workers(2)
    result = workers.submit()
    with capturedLogs() as events:
        workers.shards[0].answer(ZeroDivisionError("ours"))
    assert isinstance(result.only, ZeroDivisionError)
    assert workers.shards[1].asked == []
    assert [event["log_format"] for event in events] == ["a job failed in an unforeseen way"]


# Lost workers


def test_a_job_whose_worker_died_goes_to_another() -> None:
    workers = Workers(2)
    result = workers.submit()
    workers.shards[0].exit()
    assert workers.shards[1].asked == workers.shards[0].asked
    workers.shards[1].answer(b"replies")
    assert result.only == b"replies"
    assert result.job.slot == 2
    assert workers.dispatch.counters["retries"] == 1


def test_a_lost_job_waits_for_the_next_worker_where_there_is_nobody_else() -> None:
    workers = Workers()
    result = workers.submit()
    workers.shards[0].exit()
    assert result.values == []
    workers.hire().answer(b"replies")
    assert result.only == b"replies"


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_command_is_tried_again_as_often_as_the_operator_says(retries: int) -> None:
    workers = Workers(5, retries=retries)
    result = workers.submit(Stage.RCPT)
    for shard in workers.shards[: retries + 1]:
        assert result.values == []
        shard.exit("killed by SIGABRT")
    assert isinstance(result.only, WorkerLost)
    assert str(result.only) == "killed by SIGABRT"
    assert sum(len(shard.asked) for shard in workers.shards) == retries + 1


def test_a_shard_that_can_be_told_nothing_gets_no_job() -> None:
    workers = Workers(2)
    workers.shard_deaf(workers.shards[0])
    workers.submit()
    assert [len(shard.asked) for shard in workers.shards] == [0, 1]


# Poison


@pytest.mark.parametrize("retries", [1, 3])
def test_a_message_that_nobody_survives_is_poison(retries: int) -> None:
    workers = Workers(retries + 2, retries=retries)
    result = workers.submit()
    for shard in workers.shards[: retries + 1]:
        assert result.values == []
        shard.exit("killed by SIGABRT")
    assert isinstance(result.only, Poisoned)
    assert "killed by SIGABRT" in str(result.only)
    assert workers.shards[-1].asked == []


def test_without_retries_the_second_death_makes_it_poison() -> None:
    workers = Workers(3, retries=0)
    results = [workers.submit(), workers.submit()]
    for shard in workers.shards[:2]:
        shard.exit()
    assert [type(result.only) for result in results] == [WorkerLost, Poisoned]


def test_a_message_that_another_worker_survives_is_no_poison() -> None:
    workers = Workers(1)
    for _ in range(5):
        result = workers.submit()
        workers.shards[-1].exit()
        workers.hire().answer(b"replies")
        assert result.only == b"replies"


def poisoned(workers: Workers, content: Any = MESSAGE) -> None:
    """The message has killed two workers."""
    workers.submit(message=content)
    for shard in workers.shards[:2]:
        shard.exit()


def test_poison_is_not_scanned_again_for_an_hour() -> None:
    workers = Workers(3)
    poisoned(workers)
    assert isinstance(workers.submit().only, Poisoned)
    assert workers.shards[2].asked == []
    workers.clock.advance(REMEMBERED_FOR)
    assert workers.submit().values == []
    assert len(workers.shards[2].asked) == 1


def test_poison_is_known_by_envelope_and_content_and_not_by_its_queue_id() -> None:
    workers = Workers(3)
    content = [Mail("<a@x>"), Rcpt("<b@x>"), Header("Subject", " hi"), Body(b"text")]
    poisoned(workers, message(Macro("M", (("i", "1"),)), *content))
    again = message(Macro("M", (("i", "2"),)), *content)
    assert isinstance(workers.submit(message=again).only, Poisoned)
    other = message(Macro("M", (("i", "1"),)), *content, Eom(b"!"))
    assert workers.submit(message=other).values == []


def test_poison_is_known_in_memory_too() -> None:
    workers = Workers(3)
    poisoned(workers, blob(message(Body(b"x" * 60_000))))
    assert isinstance(workers.submit(message=blob(message(Body(b"x" * 60_000)))).only, Poisoned)


def test_commands_are_never_poison() -> None:
    workers = Workers(5)
    for _ in range(2):
        workers.submit(Stage.RCPT)
        workers.hire()
        next(shard for shard in workers.shards if shard.jobs).exit()
        next(shard for shard in workers.shards if shard.jobs).exit()
    assert workers.submit(Stage.RCPT).values == []


def test_a_message_that_hangs_twice_is_poison() -> None:
    workers = Workers(2, **DEADLINES)
    first, second = workers.submit(name="qid=1"), workers.submit(name="qid=2")
    workers.wait(200.0)
    assert isinstance(first.only, DeadlineExceeded)
    assert isinstance(second.only, Poisoned)


def test_a_message_that_has_waited_for_most_of_its_time_is_not_to_blame() -> None:
    workers = Workers(2, command_deadline=20.0, eom_deadline=200.0, queue_wait=190.0)
    other = message(Mail("<other@example.org>"), Eom())
    for _ in workers.shards:
        workers.submit(message=other)
    late = [workers.submit(), workers.submit()]
    workers.wait(150.0)
    for shard in workers.shards:
        shard.answer()
    workers.wait(50.0)
    assert [type(result.only) for result in late] == [DeadlineExceeded, DeadlineExceeded]


def test_a_copy_of_poison_is_kept(tmp_path: Path) -> None:
    workers = Workers(2, Keep(tmp_path, 1000))
    with capturedLogs() as events:
        poisoned(workers, message(Mail("<a@x>"), Header("Subject", " hi"), Body(b"text")))
    (copy,) = tmp_path.iterdir()
    assert copy.read_bytes() == b"X-Envelope-Sender: <a@x>\r\nSubject: hi\r\n\r\ntext"
    assert copy.stat().st_mode & 0o777 == 0o600
    texts = [event["log_format"].format(**event) for event in events]
    assert f"copy kept: {copy}" in texts


def test_a_copy_above_the_quota_is_not_kept(tmp_path: Path) -> None:
    workers = Workers(2, Keep(tmp_path, 10))
    with capturedLogs() as events:
        poisoned(workers, message(Body(b"text" * 10)))
    assert list(tmp_path.iterdir()) == []
    texts = [event["log_format"].format(**event) for event in events]
    assert "copy kept: no, the quota is used up" in texts


def test_a_copy_that_cannot_be_kept_is_an_error_line_only(tmp_path: Path) -> None:
    workers = Workers(2, Keep(tmp_path / "none", 1000))
    with capturedLogs() as events:
        poisoned(workers)
    errors = [event["log_format"] for event in events if event["log_level"] == LogLevel.error]
    assert errors == ["{about} is poison: its scan has killed workers", "cannot keep a copy: {why}"]


# Deadlines


@pytest.mark.parametrize(("stage", "limit"), [(Stage.RCPT, 20.0), (Stage.EOM, 200.0)])
def test_at_the_deadline_the_worker_is_killed_and_the_answer_comes_at_once(
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


def test_a_job_whose_worker_was_killed_is_not_tried_again() -> None:
    workers = Workers(2, **DEADLINES)
    result = workers.submit()
    workers.wait(200.0)
    workers.shards[0].exit()
    assert isinstance(result.only, DeadlineExceeded)
    assert workers.shards[1].asked == []


def test_the_deadline_counts_from_the_first_try() -> None:
    workers = Workers(2, **DEADLINES)
    result = workers.submit(Stage.RCPT)
    workers.wait(15.0)
    workers.shards[0].exit()
    workers.wait(5.0)
    assert isinstance(result.only, DeadlineExceeded)
    assert [told.partition(":")[0] for told in workers.shards[1].told] == ["dump stacks", "kill"]


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


def test_an_answer_in_time_leaves_no_timer_behind() -> None:
    workers = Workers()
    workers.submit(Stage.RCPT)
    workers.shards[0].answer()
    assert armed(workers.clock) == []


# The queue


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
    assert len(workers.shards[0].asked) == 1


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


def test_a_command_waits_no_longer_than_its_deadline() -> None:
    workers = Workers(**DEADLINES)
    workers.submit()
    waiting = workers.submit(Stage.RCPT)
    workers.wait(20.0)
    assert isinstance(waiting.only, Overloaded)
    assert workers.shards[0].told == []


def test_a_full_queue_refuses_at_once() -> None:
    workers = Workers(max_queue=2)
    results = [workers.submit() for _ in range(4)]
    assert [result.values for result in results[:3]] == [[], [], []]
    assert isinstance(results[3].only, Overloaded)


def test_light_jobs_overtake_heavy_ones() -> None:
    workers = Workers()
    workers.submit()
    workers.submit(Stage.EOM, "heavy")
    workers.submit(Stage.RCPT, "light", light=True)
    workers.shards[0].answer()
    assert workers.shards[0].label() == "light"


# Cancelled jobs


def test_a_cancelled_job_that_waits_is_never_done() -> None:
    workers = Workers()
    workers.submit()
    waiting = workers.submit()
    workers.dispatch.cancel(waiting.job)
    workers.shards[0].answer()
    assert len(workers.shards[0].asked) == 1
    assert waiting.values == []


def test_the_shard_of_a_cancelled_job_is_free_when_it_has_answered_and_not_before() -> None:
    workers = Workers()
    cancelled = workers.submit()
    workers.dispatch.cancel(cancelled.job)
    following = workers.submit()
    assert len(workers.shards[0].asked) == 1
    workers.shards[0].answer(b"late")
    workers.shards[0].answer(b"replies")
    assert following.only == b"replies"


def test_a_cancelled_job_still_has_a_deadline() -> None:
    workers = Workers(**DEADLINES)
    cancelled = workers.submit()
    workers.dispatch.cancel(cancelled.job)
    workers.wait(200.0)
    assert [told.partition(":")[0] for told in workers.shards[0].told] == ["dump stacks", "kill"]
    workers.shards[0].exit()


@pytest.mark.parametrize("failure", [WorkerLost("died"), CallbackFailed("bad")], ids=repr)
def test_a_cancelled_job_that_fails_is_not_tried_again(failure: Exception) -> None:
    workers = Workers(2)
    cancelled = workers.submit()
    workers.dispatch.cancel(cancelled.job)
    workers.shards[0].answer(failure)
    assert workers.shards[1].asked == []


def test_cancelling_what_is_answered_is_nothing() -> None:
    workers = Workers()
    result = workers.submit()
    workers.shards[0].answer(b"replies")
    workers.dispatch.cancel(result.job)
    assert result.only == b"replies"


# Reloaded milters


def test_a_job_of_another_milter_than_the_shards_is_not_asked() -> None:
    workers = Workers()
    old = workers.submit(manifest=Manifest("old"))
    assert isinstance(old.only, Superseded)
    workers.submit().job.result.addBoth(lambda _: None)
    assert len(workers.shards[0].asked) == 1


# Repeats


def test_a_repeat_waits_for_the_scan_that_runs() -> None:
    workers = Workers(2, join_retries=True)
    first = workers.submit(client=b"c")
    workers.wait(JOIN_AFTER)
    second = workers.submit(client=b"c")
    assert workers.shards[1].asked == []
    workers.shards[0].answer(b"replies")
    assert (first.only, second.only) == (b"replies", b"replies")
    assert (second.job.slot, second.job.started) == (1, 0.0)


def test_a_repeat_fails_with_the_scan_that_it_waits_for() -> None:
    workers = Workers(2, join_retries=True)
    workers.submit(client=b"c")
    workers.wait(JOIN_AFTER)
    second = workers.submit(client=b"c")
    workers.shards[0].answer(CallbackFailed("bad"))
    assert isinstance(second.only, CallbackFailed)


def test_a_repeat_keeps_a_scan_alive_that_was_given_up() -> None:
    workers = Workers(2, join_retries=True)
    first = workers.submit(client=b"c")
    workers.wait(JOIN_AFTER)
    workers.dispatch.cancel(first.job)
    second = workers.submit(client=b"c")
    workers.shards[0].exit()
    assert len(workers.shards[1].asked) == 1
    workers.shards[1].answer(b"replies")
    assert second.only == b"replies"


@pytest.mark.parametrize(
    ("wait", "options"),
    [
        (JOIN_AFTER - 1, {}),
        (JOIN_AFTER, {"client": b"other"}),
        (JOIN_AFTER, {"message": message(Body(b"other\r\n"))}),
        (JOIN_AFTER, {"message": message(Body(b"x" * 1000))}),
        (JOIN_AFTER, {"stage": Stage.RCPT}),
    ],
    ids=repr,
)
def test_nothing_else_is_a_repeat(wait: float, options: dict[str, Any]) -> None:
    workers = Workers(2, join_retries=True)
    workers.submit(client=b"c")
    workers.wait(wait)
    workers.submit(**{"client": b"c", **options})
    assert len(workers.shards[1].asked) == 1


def test_repeats_are_scanned_where_the_operator_has_not_asked_for_more() -> None:
    workers = Workers(2)
    workers.submit(client=b"c")
    workers.wait(JOIN_AFTER)
    workers.submit(client=b"c")
    assert len(workers.shards[1].asked) == 1
