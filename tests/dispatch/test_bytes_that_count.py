"""A job's bytes count while it waits, and as long as a shard has them; nothing else keeps them."""

from __future__ import annotations

import weakref

from one_dispatcher import Workers

from sharded_milter.dispatch.retries import JOIN_AFTER


class Held:
    """What counts bytes, as far as dispatch knows."""


def test_a_job_that_waits_lets_go_when_it_is_cancelled() -> None:
    workers = Workers()
    workers.submit()
    job, held = workers.submit().job, Held()
    counted = weakref.ref(held)
    job.held = held
    del held
    assert counted() is not None
    workers.dispatcher.cancel(job)
    assert counted() is None
    assert job.message == b""


def test_the_shard_of_a_cancelled_job_holds_its_bytes_until_it_has_answered() -> None:
    workers = Workers()
    job, held = workers.submit().job, Held()
    counted = weakref.ref(held)
    job.attempts[0].held = held
    del held
    workers.dispatcher.cancel(job)
    assert counted() is not None
    workers.shards[0].answer()
    assert counted() is None


def test_or_until_it_is_gone() -> None:
    workers = Workers()
    job, held = workers.submit().job, Held()
    counted = weakref.ref(held)
    job.attempts[0].held = held
    del held
    workers.dispatcher.cancel(job)
    workers.shards[0].exit("lost")
    assert counted() is None


def test_an_attempt_holds_what_its_job_does() -> None:
    workers = Workers(0)
    job = workers.submit().job
    job.held = Held()
    workers.hire()
    assert job.attempts[0].held is job.held


def test_repeats_that_come_and_go_leave_nothing_with_the_one_that_they_waited_for() -> None:
    workers = Workers(join_retries=True)
    first = workers.submit(client=b"c").job
    workers.wait(JOIN_AFTER)
    for _ in range(5):
        repeat = workers.submit(client=b"c").job
        assert first.followers == [repeat]
        workers.dispatcher.cancel(repeat)
        assert first.followers == []
        assert repeat.leader is None
