"""Jobs for objects."""

from __future__ import annotations

from one_dispatcher import FakeShard, Workers
from one_pool import MESSAGE, Result

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.protocol.stages import Stage

HEAD, REST = MESSAGE[:5], MESSAGE[5:]


def mine(*, replayable: bool = False) -> ObjectAffinity:
    return ObjectAffinity(replayable=replayable)


def home_of(affinity: ObjectAffinity) -> FakeShard:
    shard: FakeShard = affinity.holder.shard
    return shard


def began(workers: Workers, affinity: ObjectAffinity, message: bytes = HEAD) -> FakeShard:
    """The object has been told of a message, and has answered."""
    workers.ask(affinity, Stage.MAIL, message=message)
    home_of(affinity).answer()
    return home_of(affinity)


def shared(workers: Workers, *affinities: ObjectAffinity) -> FakeShard:
    """All have their object on the same shard, which is busy with another one's job."""
    home = began(workers, affinities[0])
    for affinity in (*affinities[1:], mine()):
        affinity.assign(affinities[0].holder, 99)
        affinities[0].holder.affinities.add(affinity)
    workers.ask(affinity)
    assert len(home.open) == 1
    return home


def ending(workers: Workers, affinity: ObjectAffinity) -> Result:
    return workers.ask(affinity, None, message=b"")
