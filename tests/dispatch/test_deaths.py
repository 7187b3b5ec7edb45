"""What becomes of the jobs of a process that dies: who is to blame, and what is tried again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from one_dispatcher import FakeShard, Workers
from one_pool import MESSAGE
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.dispatch import job as job_module
from sharded_milter.dispatch.job import Blame
from sharded_milter.dispatch.keep_dir import KeepDir
from sharded_milter.dispatch.poison import REMEMBERED_FOR, SIZE_TOLERANCE
from sharded_milter.dispatch.retries import MAX_SAVING
from sharded_milter.dispatch.timeouts import TAKEOVER_AFTER
from sharded_milter.errors import Overloaded, Poisoned, WorkerLost
from sharded_milter.ipc.memory import Memory, packed
from sharded_milter.protocol.commands import Body, Eom, Header, Macro, Mail, Rcpt
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Stage


def message(*packets: Packet) -> bytes:
    return b"".join(packet.encode() for packet in packets)


def kill_all(workers: Workers, times: int) -> None:
    """The worker that scans dies, and is replaced, so often."""
    for _ in range(times):
        workers.busy[0].exit()
        workers.hire()


# The message is to blame


def test_a_job_whose_worker_died_goes_to_another() -> None:
    workers = Workers(2)
    result = workers.submit()
    first = workers.busy[0]
    first.exit()
    (second,) = workers.busy
    assert second.asked[0].message == first.asked[0].message
    second.answer(b"replies")
    assert (result.only, result.job.slot) == (b"replies", second.slot)
    assert workers.counters["retries"] == 1


def test_it_waits_for_the_next_worker_where_there_is_no_other() -> None:
    workers = Workers()
    result = workers.submit()
    workers.shards[0].exit()
    assert result.values == []
    workers.hire().answer(b"replies")
    assert result.only == b"replies"


def test_it_keeps_its_age_in_the_queue() -> None:
    workers = Workers(max_queue=1)
    first = workers.submit(Stage.RCPT, born=1.0)
    workers.submit(Stage.RCPT, born=2.0)
    workers.shards[0].exit()  # the queue is full, and takes it all the same
    assert workers.hire().jobs == [first.job]


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_command_is_tried_again_as_often_as_the_operator_says(retries: int) -> None:
    workers = Workers(5, retries=retries)
    result = workers.submit(Stage.RCPT)
    for _ in range(retries + 1):
        assert result.values == []
        workers.busy[0].exit("killed by SIGABRT")
    assert isinstance(result.only, WorkerLost)
    assert str(result.only) == "killed by SIGABRT"
    assert workers.busy == []


def test_only_the_attempt_that_has_begun_is_blamed() -> None:
    workers = Workers(1, retries=0)
    workers.warm()
    first, second = workers.submit(Stage.RCPT), workers.submit(Stage.RCPT)
    assert len(workers.shards[0].open) == 2
    workers.shards[0].exit()
    assert isinstance(first.only, WorkerLost)
    workers.hire().answer(b"verdict")
    assert (second.only, second.job.blamed) == (b"verdict", 0)
    assert workers.counters["workers_lost"] == 1


def test_one_that_was_withdrawn_is_blamed_for_the_death_that_it_has_caused() -> None:
    workers = Workers(2)
    workers.warm()
    one, two, third = workers.submit(), workers.submit(), workers.submit()
    slow, quick = sorted(workers.shards, key=lambda shard: -len(shard.open))
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER)
    slow.answer()  # and begins the withdrawn one before it hears of that
    slow.exit()
    assert third.job.blamed == 1
    assert len(one.values) == len(two.values) == 1
    assert third.values == []  # another attempt of it lives
    quick.exit()
    assert isinstance(third.only, Poisoned)


def test_one_that_was_withdrawn_and_has_not_begun_is_not_blamed() -> None:
    workers = Workers(2)
    workers.warm()
    workers.submit()
    workers.submit()
    third = workers.submit()
    slow, quick = sorted(workers.shards, key=lambda shard: -len(shard.open))
    quick.answer()
    workers.clock.advance(TAKEOVER_AFTER)
    slow.exit()
    assert third.job.blamed == 0
    quick.answer(b"verdict")
    assert third.only == b"verdict"


def test_what_was_offered_to_other_shards_waits_in_the_queue_after_a_death() -> None:
    workers = Workers()
    workers.warm()
    workers.submit(Stage.RCPT)
    second = workers.submit(Stage.RCPT)
    workers.clock.advance(TAKEOVER_AFTER)
    workers.shards[0].exit()
    assert workers.dispatcher.queued == 2
    shard = workers.hire()
    shard.answer()
    shard.answer()
    assert second.only == b"replies"


# The place is to blame


def test_a_job_whose_place_was_lost_is_not_blamed_and_is_queued_again() -> None:
    workers = Workers(1, retries=0)
    result = workers.submit()
    for _ in range(5):
        workers.busy[0].exit("its host is lost", Blame.PLACE)
        workers.hire()
    workers.busy[0].answer(b"verdict")
    assert (result.only, result.job.blamed, result.job.solo) == (b"verdict", 0, False)
    assert workers.counters["workers_lost"] == workers.counters["retries"] == 0
    assert workers.counters["attempts_lost"] == 5


def test_queue_wait_bounds_it_all_the_same() -> None:
    workers = Workers(queue_wait=5.0)
    result = workers.submit()
    workers.shards[0].exit("its host is lost", Blame.PLACE)
    workers.wait(5.0)
    assert isinstance(result.only, Overloaded)


def test_the_death_of_a_shard_that_never_served_costs_nothing() -> None:
    workers = Workers(0)
    stranger = Workers().shards[0]
    stranger._dispatcher = workers.dispatcher
    stranger.exit()
    assert workers.counters["attempts_lost"] == 0


# Poison


def test_the_attempt_that_could_make_it_poison_runs_alone_in_a_fresh_process() -> None:
    workers = Workers(2)
    workers.warm(0.0)
    result = workers.submit()
    workers.busy[0].exit()
    assert workers.busy == []  # the other one is not fresh
    assert workers.dispatcher.waits_for_fresh
    workers.submit()
    fresh = workers.hire()
    assert fresh.jobs == [result.job]
    workers.submit()
    assert len(fresh.open) == 1
    assert not workers.dispatcher.waits_for_fresh


@pytest.mark.parametrize("retries", [1, 3])
def test_a_message_that_no_worker_survives_is_poison(retries: int) -> None:
    workers = Workers(1, retries=retries)
    result = workers.submit()
    for _ in range(retries + 1):
        assert result.values == []
        workers.busy[0].exit("killed by SIGABRT")
        workers.hire()
    assert isinstance(result.only, Poisoned)
    assert "killed by SIGABRT" in str(result.only)
    assert workers.counters["poison"] == 1
    assert workers.busy == []


def test_without_retries_the_second_death_makes_it_poison() -> None:
    workers = Workers(2, retries=0)
    first = workers.submit()
    workers.busy[0].exit()
    second = workers.submit()
    assert second.job.solo
    workers.busy[0].exit()
    assert [type(result.only) for result in (first, second)] == [WorkerLost, Poisoned]


def test_a_message_that_another_worker_survives_is_no_poison() -> None:
    workers = Workers()
    for _ in range(5):
        result = workers.submit()
        workers.busy[0].exit()
        workers.hire().answer(b"replies")
        assert result.only == b"replies"


def poisoned(workers: Workers, content: bytes | Memory = MESSAGE) -> None:
    """The message has killed two workers."""
    workers.submit(message=content)
    kill_all(workers, 2)


def test_poison_is_not_scanned_again_for_an_hour() -> None:
    workers = Workers()
    poisoned(workers)
    assert isinstance(workers.submit().only, Poisoned)
    assert workers.busy == []
    workers.clock.advance(REMEMBERED_FOR)
    assert workers.submit().values == []
    assert len(workers.busy) == 1


def test_poison_is_known_by_envelope_and_content_and_not_by_its_queue_id() -> None:
    workers = Workers()
    content = [Mail("<a@x>"), Rcpt("<b@x>"), Header("Subject", " hi"), Body(b"text")]
    poisoned(workers, message(Macro("M", (("i", "1"),)), *content))
    again = message(Macro("M", (("i", "2"),)), *content)
    assert isinstance(workers.submit(message=again).only, Poisoned)
    other = message(Macro("M", (("i", "1"),)), *content, Eom(b"!"))
    assert workers.submit(message=other).values == []


def test_poison_is_known_in_memory_too() -> None:
    workers = Workers()
    poisoned(workers, packed(message(Body(b"x" * 60_000))))
    again = packed(message(Body(b"x" * 60_000)))
    assert isinstance(again, Memory)
    assert isinstance(workers.submit(message=again).only, Poisoned)


def test_commands_are_never_poison() -> None:
    workers = Workers()
    for _ in range(2):
        workers.submit(Stage.RCPT)
        kill_all(workers, 2)
    assert workers.submit(Stage.RCPT).values == []


@pytest.mark.parametrize("size", [0, 4 * SIZE_TOLERANCE, 100 * SIZE_TOLERANCE])
def test_no_digest_is_made_of_messages_of_another_size_than_remembered_ones(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(2)
    other = message(Body(b"x" * size))

    def refuse(_: memoryview) -> bytes:
        raise AssertionError("a message was hashed")

    with monkeypatch.context() as patch:
        patch.setattr(job_module, "digest", refuse)  # where none is remembered
        workers.submit().job.answer = None
        workers.busy[0].answer()
    poisoned(workers, message(Body(b"x" * 50 * SIZE_TOLERANCE)))
    monkeypatch.setattr(job_module, "digest", refuse)
    assert workers.submit(message=other).values == []


# Copies


def test_a_copy_of_poison_is_kept(tmp_path: Path) -> None:
    workers = Workers(1, KeepDir(tmp_path, 1000))
    with capturedLogs() as events:
        poisoned(workers, message(Mail("<a@x>"), Header("Subject", " hi"), Body(b"text")))
    (copy,) = tmp_path.iterdir()
    assert copy.read_bytes() == b"X-Envelope-Sender: <a@x>\r\nSubject: hi\r\n\r\ntext"
    assert f"copy kept: {copy}" in [event["log_format"].format(**event) for event in events]


@pytest.mark.parametrize(
    ("keep", "format_", "level"),
    [
        (lambda folder: KeepDir(folder, 10), "copy kept: {path}", LogLevel.info),
        (
            lambda folder: KeepDir(folder / "none", 1000),
            "cannot keep a copy: {why}",
            LogLevel.error,
        ),
    ],
)
def test_a_copy_that_cannot_be_kept_is_a_line_in_the_log(
    tmp_path: Path, keep: Callable[[Path], KeepDir], format_: str, level: Any
) -> None:
    workers = Workers(1, keep(tmp_path))
    with capturedLogs() as events:
        poisoned(workers, message(Body(b"text" * 10)))
    assert list(tmp_path.iterdir()) == []
    assert (format_, level) in [(event["log_format"], event["log_level"]) for event in events]


def test_a_slow_disk_holds_nothing_up_and_few_messages_in_memory(tmp_path: Path) -> None:
    later: list[Callable[[], None]] = []
    workers = Workers(1, KeepDir(tmp_path, 10_000, later.append))
    with capturedLogs() as events:
        for number in range(MAX_SAVING + 1):
            poisoned(workers, message(Body(b"%d" % number)))
        assert list(tmp_path.iterdir()) == []
        for write in later:
            write()
        poisoned(workers, message(Body(b"again")))
    assert len(later) == MAX_SAVING + 1
    assert len(list(tmp_path.iterdir())) == MAX_SAVING
    said = [event["log_format"].format(**event) for event in events]
    assert said.count(f"cannot keep a copy: {MAX_SAVING} are being written") == 1


def test_where_no_thread_can_keep_a_copy_the_message_is_poison_all_the_same(tmp_path: Path) -> None:
    def refuse(write: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    workers = Workers(1, KeepDir(tmp_path, 10_000, refuse))
    with capturedLogs() as events:
        for number in range(MAX_SAVING + 1):
            poisoned(workers, message(Body(b"%d" % number)))
    said = [event["log_format"].format(**event) for event in events]
    assert said.count("cannot keep a copy: can't start new thread") == MAX_SAVING + 1


def test_a_shard_is_named_in_the_log_when_it_dies() -> None:
    workers = Workers(2)
    workers.submit(queue_id="4F1")
    shard: FakeShard = workers.busy[0]
    with capturedLogs() as events:
        shard.exit()
    assert [event["log_format"].format(**event) for event in events] == [
        f"shard {shard.slot} died while scanning qid=4F1; retrying"
    ]
