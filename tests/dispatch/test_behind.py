"""Jobs that are stuck behind another in a shard, as the queue sees them."""

from __future__ import annotations

from queueing import Job, Shard

from sharded_milter.dispatch.queue import Queue


def test_no_younger_job_goes_behind_another_while_one_is_stuck_there() -> None:
    queue: Queue[Job, Shard] = Queue(10)
    shard = Shard(1)
    queue.capacity.set_idle(shard)
    queue.capacity.set_busy(shard, has_room=True)
    stuck, older, younger = Job(born=2.0), Job(born=1.0), Job(born=3.0)
    queue.offer(stuck)
    queue.add(younger)
    assert queue.next_pair() is None
    assert queue.immediate_shard(Job(born=4.0)) is None
    queue.add(older)
    assert queue.next_pair() == (older, shard)
    queue.capacity.set_idle(shard)
    assert queue.next_pair() == (stuck, shard)
    queue.capacity.set_busy(shard, has_room=True)
    assert queue.next_pair() == (younger, shard)
