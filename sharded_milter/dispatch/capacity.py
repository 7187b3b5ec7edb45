"""Capacity: which shards can take a job now, and which of them is the best for it. Pure.

The owner says what each shard has in hand, and asks for a shard. `reserve` shards are left to
light jobs: heavy ones do not begin there.
"""

from __future__ import annotations

from hashlib import blake2b
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

# Keys whose shard is remembered, so that it need not be worked out for each job.
MAX_KEYS = 4096


class Server(Protocol):
    """What must be known of a shard: a successor in the same slot inherits its keys."""

    slot: int
    fresh: bool
    attempts: Any
    affinities: Any


S = TypeVar("S", bound=Server)


class Capacity(Generic[S]):
    """The shards there are, by what they can take."""

    def __init__(self, reserve: int = 0) -> None:
        self._reserve = reserve
        self._numbers = count(1)
        self._serving: dict[S, int] = {}  # shards that take any job, by the order of arrival
        self._idle: dict[S, None] = {}  # those that have nothing to do, the latest one last
        self._room: dict[S, None] = {}  # those that take another behind what they do
        self._resting: dict[S, None] = {}  # idle ones that take their objects' jobs only
        self._heavy: set[S] = set()  # those that do a heavy job
        self._preferred: dict[bytes, S] = {}  # the shard of a key

    # What shards have in hand

    def idle(self, shard: S) -> None:
        """The shard, new or known, has nothing in hand and takes any job."""
        self._heavy.discard(shard)
        self._room.pop(shard, None)
        if shard not in self._serving:
            self._serving[shard] = next(self._numbers)
            self._preferred.clear()
        self._idle[shard] = None

    def resting(self, shard: S) -> None:
        """The shard has nothing in hand and takes its objects' jobs only."""
        self._heavy.discard(shard)
        self._room.pop(shard, None)
        self._idle.pop(shard, None)
        self._leave(shard)
        self._resting[shard] = None

    def busy(self, shard: S, *, has_room: bool) -> None:
        """The shard has something in hand, and takes another job behind it or not."""
        self._idle.pop(shard, None)
        self._resting.pop(shard, None)
        if has_room and shard in self._serving:
            self._room[shard] = None
        else:
            self._room.pop(shard, None)

    def does_heavy(self, shard: S) -> None:
        """The shard has been given a heavy job."""
        self._heavy.add(shard)

    def retired(self, shard: S) -> None:
        """The shard, which has something in hand, takes its objects' jobs only from now on."""
        self._idle.pop(shard, None)
        self._room.pop(shard, None)
        self._leave(shard)

    def unavailable(self, shard: S) -> None:
        """The shard can be told nothing more; its objects' jobs wait until it is gone."""
        self.retired(shard)
        self._resting.pop(shard, None)

    def gone(self, shard: S) -> None:
        """The shard is no more."""
        self.unavailable(shard)
        self._heavy.discard(shard)

    def _leave(self, shard: S) -> None:
        if self._serving.pop(shard, None) is not None:
            self._preferred.clear()

    # Which shard

    @property
    def idle_count(self) -> int:
        """How many shards have nothing to do."""
        return len(self._idle)

    @property
    def fresh(self) -> S | None:
        """An idle shard that has never been given anything."""
        return next((shard for shard in self._idle if shard.fresh), None)

    def fewest_objects(self) -> S | None:
        """The shard that has the objects of the fewest connections; None when there is none.

        A new object is better placed by how many others share its shard for as long as the
        connection lasts than by which is idle at this moment.
        """
        return min(self._serving, key=self._load, default=None)

    def _load(self, shard: S) -> tuple[int, int]:
        return len(shard.affinities), self._serving[shard]

    def takes_object(self, shard: S, *, heavy: bool) -> bool:
        """Whether the shard takes another job of its objects now."""
        # No other shard is kept from light jobs by one that does heavy ones already.
        allowed = heavy or shard not in self._serving or shard in self._heavy
        return allowed and (shard in self._idle or shard in self._room or shard in self._resting)

    @property
    def allows_heavy(self) -> bool:
        """Whether a shard that does no heavy job yet may begin one."""
        if not self._reserve:
            return True
        heavy = sum(shard in self._serving for shard in self._heavy)
        return heavy < max(1, len(self._serving) - self._reserve)

    def shard_for(self, job: Any, *, heavy: bool, behind: bool) -> S | None:
        """The best shard for a job that any can do.

        `heavy` says that it may be one that does no heavy job yet, `behind` that it may be one
        that has something in hand.
        """
        if not heavy:
            room = [shard for shard in self._room if shard in self._heavy] if behind else ()
            return min(room, key=_in_hand, default=None)
        if job.key and not job.light and self._serving:
            preferred = self._preferred_for(job.key)
            if preferred in self._idle or (behind and preferred in self._room):
                return preferred
        if self._idle:
            return next(reversed(self._idle))
        return min(self._room, key=_in_hand, default=None) if behind else None

    def _preferred_for(self, key: bytes) -> S:
        """Rendezvous hashing: each key ranks all slots; one that goes moves its own keys only."""
        preferred = self._preferred.get(key)
        if preferred is None:
            preferred = max(self._serving, key=lambda shard: _weight(shard.slot, key))
            if len(self._preferred) >= MAX_KEYS:
                self._preferred.clear()
            self._preferred[key] = preferred
        return preferred


def _in_hand(shard: Server) -> int:
    return len(shard.attempts)


def _weight(slot: int, key: bytes) -> bytes:
    return blake2b(key, digest_size=8, salt=slot.to_bytes(8, "big")).digest()
