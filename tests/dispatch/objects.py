"""Jobs for objects."""

from __future__ import annotations

from one_dispatcher import FakeShard, Workers
from one_pool import MESSAGE, Result

from sharded_milter.dispatch.affinity import Affinity
from sharded_milter.protocol.stages import Stage

HEAD, REST = MESSAGE[:5], MESSAGE[5:]


def mine(*, replayable: bool = False) -> Affinity:
    return Affinity(replayable=replayable)


def home_of(affinity: Affinity) -> FakeShard:
    shard: FakeShard = affinity.holder.shard
    return shard


def began(workers: Workers, affinity: Affinity, message: bytes = HEAD) -> FakeShard:
    """The object has been told of a message, and has answered."""
    workers.ask(affinity, Stage.MAIL, message=message)
    home_of(affinity).answer()
    return home_of(affinity)


def shared(workers: Workers, *affinities: Affinity) -> FakeShard:
    """All have their object on the same shard, which is busy with another one's job."""
    home = began(workers, affinities[0])
    for affinity in (*affinities[1:], mine()):
        affinity.settle(affinities[0].holder, 99)
        affinities[0].holder.affinities.add(affinity)
    workers.ask(affinity)
    assert len(home.open) == 1
    return home


def ending(workers: Workers, affinity: Affinity) -> Result:
    return workers.ask(affinity, None, message=b"")
