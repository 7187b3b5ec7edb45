"""Capacity: the shards that can take a job now, and the choice of the best one for it. Pure.

The caller reports what each shard has in flight, and asks for a shard. Heavy jobs leave `reserve`
shards to light ones.
"""

from __future__ import annotations

from hashlib import blake2b
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

# Keys whose preferred shard is cached.
MAX_KEYS = 4096


class ShardLoad(Protocol):
    """The load of a shard. The keys belong to its slot, so that a successor inherits them."""

    slot: int
    fresh: bool
    attempts: Any
    affinities: Any


S = TypeVar("S", bound=ShardLoad)


class Capacity(Generic[S]):
    """The shards, by what they can take."""

    def __init__(self, reserve: int = 0) -> None:
        self._reserve = reserve
        self._numbers = count(1)
        self._serving: dict[S, int] = {}  # shards that take any job, with their order of arrival
        self._idle: dict[S, None] = {}  # those with nothing in flight, the latest last
        self._with_room: dict[S, None] = {}  # those that take another job behind the first
        self._idle_for_objects: dict[S, None] = {}  # idle ones that take only jobs of their objects
        self._heavy: set[S] = set()  # those with a heavy job
        self._preferred: dict[bytes, S] = {}  # the shard of a key

    # Reports about shards

    def set_idle(self, shard: S) -> None:
        """Record that the shard, new or known, has nothing in flight and takes any job."""
        self._heavy.discard(shard)
        self._with_room.pop(shard, None)
        if shard not in self._serving:
            self._serving[shard] = next(self._numbers)
            self._preferred.clear()
        self._idle[shard] = None

    def set_idle_for_objects(self, shard: S) -> None:
        """Record that the shard has nothing in flight and takes only jobs of its objects."""
        self._heavy.discard(shard)
        self._with_room.pop(shard, None)
        self._idle.pop(shard, None)
        self._stop_serving(shard)
        self._idle_for_objects[shard] = None

    def set_busy(self, shard: S, *, has_room: bool) -> None:
        """Record that the shard has jobs in flight, and whether it takes one more behind them."""
        self._idle.pop(shard, None)
        self._idle_for_objects.pop(shard, None)
        if has_room and shard in self._serving:
            self._with_room[shard] = None
        else:
            self._with_room.pop(shard, None)

    def set_heavy(self, shard: S) -> None:
        """Record that the shard has been given a heavy job."""
        self._heavy.add(shard)

    def set_retired(self, shard: S) -> None:
        """Record that the shard, which has jobs in flight, takes only jobs of its objects."""
        self._idle.pop(shard, None)
        self._with_room.pop(shard, None)
        self._stop_serving(shard)

    def set_unavailable(self, shard: S) -> None:
        """Record that the shard takes nothing more; its objects' jobs wait until it is gone."""
        self.set_retired(shard)
        self._idle_for_objects.pop(shard, None)

    def remove(self, shard: S) -> None:
        """Forget a shard that is gone."""
        self.set_unavailable(shard)
        self._heavy.discard(shard)

    def _stop_serving(self, shard: S) -> None:
        if self._serving.pop(shard, None) is not None:
            self._preferred.clear()

    # Choice of a shard

    @property
    def idle_count(self) -> int:
        """The number of shards with nothing in flight that take any job."""
        return len(self._idle)

    @property
    def fresh(self) -> S | None:
        """An idle shard that has had no job yet; None if there is none."""
        return next((shard for shard in self._idle if shard.fresh), None)

    def with_fewest_objects(self) -> S | None:
        """Return the shard that has the objects of the fewest connections; None without shards.

        A new object stays for the whole connection, so the number of objects that share the shard
        matters more than which shard is idle at this moment.
        """
        return min(self._serving, key=self._load, default=None)

    def _load(self, shard: S) -> tuple[int, int]:
        return len(shard.affinities), self._serving[shard]

    def takes_object(self, shard: S, *, heavy: bool) -> bool:
        """Return whether the shard takes another job of its objects now."""
        # A shard that has heavy jobs already takes no reserved shard from light ones.
        if not heavy and shard in self._serving and shard not in self._heavy:
            return False
        return shard in self._idle or shard in self._with_room or shard in self._idle_for_objects

    @property
    def allows_heavy(self) -> bool:
        """Whether a shard without a heavy job may be given one."""
        if not self._reserve:
            return True
        heavy = sum(shard in self._serving for shard in self._heavy)
        return heavy < max(1, len(self._serving) - self._reserve)

    def shard_for(self, job: Any, *, heavy: bool, behind: bool) -> S | None:
        """Return the best shard for a job without an object; None if none can take it now.

        `heavy` allows shards that have no heavy job yet, `behind` allows shards that have jobs in
        flight.
        """
        if not heavy:
            room = [shard for shard in self._with_room if shard in self._heavy] if behind else ()
            return min(room, key=_in_flight, default=None)
        if job.key and not job.light and self._serving:
            preferred = self._preferred_for(job.key)
            if preferred in self._idle or (behind and preferred in self._with_room):
                return preferred
        if self._idle:
            return next(reversed(self._idle))
        return min(self._with_room, key=_in_flight, default=None) if behind else None

    def _preferred_for(self, key: bytes) -> S:
        """Return the key's shard by rendezvous hashing: a lost slot moves only its own keys."""
        preferred = self._preferred.get(key)
        if preferred is None:
            preferred = max(self._serving, key=lambda shard: _weight(shard.slot, key))
            if len(self._preferred) >= MAX_KEYS:
                self._preferred.clear()
            self._preferred[key] = preferred
        return preferred


def _in_flight(shard: ShardLoad) -> int:
    return len(shard.attempts)


def _weight(slot: int, key: bytes) -> bytes:
    return blake2b(key, digest_size=8, salt=slot.to_bytes(8, "big")).digest()
