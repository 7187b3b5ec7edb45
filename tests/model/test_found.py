"""What the machine has found, each as the shortest run that shows it."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock

from sharded_milter.alarms import Alarm
from sharded_milter.errors import DeadlineExceeded, Overloaded, WorkerLost
from sharded_milter.limits import Limits
from sharded_milter.protocol.stages import Stage

from .records import Asked, Process
from .world import MANIFEST, OTHER_STAGES, World


def world(size: int, *, warm: bool = False, **limits: Any) -> World:
    """One whose shards serve; warm ones are given more than one job."""
    found = World(size, Limits(**limits))
    found.start()
    found.settle()
    load(found)
    conversation = found.converse(pinned=False, replayable=False)
    for _ in range(20 if warm else 0):
        for _ in range(size):
            found.submit(conversation, Stage.RCPT)
        found.advance(0.001)
        answer_all(found)
    return found


def load(found: World) -> list[Process]:
    """All that start become ready; returns those that serve."""
    for process in found.processes():
        if not process.worker.ready:
            process.worker.load((MANIFEST,), b"code")
    found.settle()
    found.check()
    return [process for process in found.processes() if process.takes_any]


def answer_all(found: World) -> None:
    """All workers answer until nothing is left."""
    found.settle()
    while busy := [each for each in found.processes() if each.worker.current]:
        for process in busy:
            process.worker.answer()
        found.settle()


def ask(found: World, stage: Stage = Stage.EOM, **options: Any) -> Asked:
    """A new connection asks."""
    asked = found.submit(found.converse(pinned=False, replayable=False), stage, **options)
    found.settle()
    return asked


def test_an_alarm_that_is_set_while_it_rings_delays_no_other() -> None:
    clock, rang = Clock(), []

    def ring(item: str) -> None:
        rang.append((item, clock.seconds()))
        if item == "first":
            alarm.set("third")

    alarm = Alarm(clock, 10.0, ring)
    alarm.set("first")
    clock.advance(1.0)
    alarm.set("second")
    for _ in range(30):
        clock.advance(1.0)
    assert rang == [("first", 10.0), ("second", 11.0), ("third", 20.0)]


def test_a_shard_that_ends_while_others_load_never_serves() -> None:
    found = World(2, Limits())
    found.start()
    found.settle()
    first, second = found.processes()
    first.worker.load((MANIFEST,), b"code")
    found.settle()
    first.worker.wire.close()
    found.settle()
    second.worker.load((MANIFEST,), b"code")
    found.settle()
    assert not first.serves
    found.advance(1.0)
    assert "its socket was closed" in str(found.outcome[0])


def test_a_shard_that_dies_before_the_master_reads_that_it_is_ready_never_serves() -> None:
    found = world(1)
    (old,) = found.processes()
    old.worker.die("exited with code 3")
    found.settle()
    found.advance(0.2)
    asked = ask(found)
    (new,) = found.processes()
    found.reads = False
    new.worker.load((MANIFEST,), b"code")
    new.worker.die("exited with code 3")
    found.settle()
    assert not new.serves
    assert asked.blamed == 0
    found.check()


def test_the_death_at_a_deadline_is_that_of_who_was_late() -> None:
    found = world(1, warm=True, command_deadline=2.0)
    late = ask(found, Stage.RCPT)
    found.advance(1.9)
    behind = ask(found)
    (process,) = found.processes()
    found.reads = False
    process.worker.hangs_in_kernel = True
    found.advance(0.1)
    assert isinstance(late.outcomes[0], DeadlineExceeded)
    process.worker.answer()
    process.worker.die("killed by SIGKILL")
    found.settle()
    assert behind.blamed == behind.job.blamed == 0
    assert not behind.over


def test_a_shard_that_is_lost_leaves_room_for_a_heavy_job() -> None:
    found = world(2, reserve=1)
    ask(found)
    second = ask(found)
    assert second.waits
    found.reaps = False
    next(each for each in found.processes() if each.hand).worker.wire.close()
    found.settle()
    assert second.tries
    found.check()


def test_a_repeat_that_was_cancelled_is_no_heir() -> None:
    found = world(1, join_retries=True)
    ask(found)
    first = ask(found, content=1)
    found.advance(11.0)
    repeats = [ask(found, content=1), ask(found, content=1)]
    found.cancel(repeats[0])
    found.cancel(first)
    answer_all(found)
    assert repeats[1].outcomes == [repeats[1].expected]
    assert found.dispatcher.counters["attempts"] == 2


def test_an_heir_is_taken_over_as_the_first_would_have_been() -> None:
    found = world(1, warm=True, join_retries=True)
    slow = ask(found)
    first = ask(found, content=1)
    assert first.tries
    found.advance(11.0)
    repeat = ask(found, content=1)
    found.cancel(first)
    found.resize(1)
    found.advance(0.0)
    load(found)
    assert len(repeat.tries) == 2
    assert not slow.over


def test_a_message_that_has_killed_too_often_is_not_tried_because_it_was_withdrawn() -> None:
    found, stuck, taker = taken_over(retries=0)
    taker.worker.die("killed by SIGSEGV")
    found.settle()
    found.check()
    assert isinstance(stuck.outcomes[0], WorkerLost)


def test_a_job_whose_second_shard_is_lost_does_not_wait_behind_the_first() -> None:
    found, stuck, taker = taken_over()
    found.kill_by_operator(taker)
    found.settle()
    found.advance(0.2)
    _, new = sorted(load(found), key=lambda each: each.number)
    assert new.worker.current is not None
    assert new.worker.current.asked is stuck


def taken_over(**limits: Any) -> tuple[World, Asked, Process]:
    """A job that has waited behind a slow one, and the shard that has taken it over."""
    found = world(1, warm=True, **limits)
    ask(found)
    stuck = ask(found)
    found.resize(1)
    found.advance(0.1)
    taker = load(found)[-1]
    assert [one.asked for one in taker.hand] == [stuck]
    return found, stuck, taker


def test_a_job_is_not_taken_over_by_shards_that_serve_other_stages() -> None:
    found = world(1, warm=True)
    ask(found)
    behind = ask(found, manifest=MANIFEST)
    found.pool.reload()
    found.settle()
    found.processes()[-1].worker.load((OTHER_STAGES,), b"other")
    found.advance(0.1)
    answer_all(found)
    assert isinstance(behind.outcomes[0], bytes)


def test_a_job_does_not_wait_for_an_object_that_is_given_up() -> None:
    found = world(1, graceful_timeout=1.0)
    conversation = found.converse(pinned=True, replayable=True)
    found.submit(conversation, Stage.RCPT)
    answer_all(found)
    (old,) = found.processes()
    other = found.converse(pinned=True, replayable=True)
    found.submit(other, Stage.RCPT)
    found.settle()
    waits = found.submit(conversation, Stage.RCPT)
    found.pool.reload()
    found.settle()
    load(found)
    found.advance(1.0)
    assert old.hand
    assert waits.tries
    assert waits.tries[0].process is not old


def test_a_cancelled_job_is_not_given_to_another_shard() -> None:
    found = world(2, warm=True)
    jobs = [ask(found) for _ in range(4)]
    found.advance(0.01)
    behind = next(each for each in jobs if each.tries and not each.tries[0].is_first)
    process = behind.tries[0].process
    found.reaps = False
    process.worker.wire.close()
    found.settle()
    found.cancel(behind)
    for other in found.processes():
        if other is not process:
            while other.worker.current:
                other.worker.answer()
                found.settle()
    found.advance(0.06)
    assert found.dispatcher.counters["attempts"] == found.book.counts["given"]


def test_a_refused_job_lets_go_of_its_bytes() -> None:
    found = world(1)
    conversation = found.converse(pinned=True, replayable=False)
    found.submit(conversation, Stage.RCPT)
    answer_all(found)
    found.processes()[0].worker.die("killed by SIGSEGV")
    found.settle()
    asked = found.submit(conversation, Stage.RCPT)
    assert isinstance(asked.outcomes[0], WorkerLost)
    assert not isinstance(asked.outcomes[0], Overloaded)
    assert not asked.job.message


def test_an_idle_shard_that_drains_for_its_objects_gets_no_new_job() -> None:
    found = world(2)
    pinned = [found.converse(pinned=True, replayable=False) for _ in range(2)]
    for conversation in pinned:
        found.submit(conversation, Stage.RCPT)
    answer_all(found)
    found.resize(-1)
    jobs = [ask(found, Stage.RCPT) for _ in range(2)]
    assert [bool(job.tries) for job in jobs] == [True, False]
    found.check()
