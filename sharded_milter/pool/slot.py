"""A slot: a place in a generation, which one shard serves and its successor takes over."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from sharded_milter.dispatch.job import Blame, Loss
from sharded_milter.limits import Limits
from sharded_milter.pool.shard import Shard

# A worker that has served this long, seconds, or has given any answer is in no crash loop: it is
# replaced at once when it dies. Else a message a second that kills would leave no worker to others.
HEALTHY_AFTER = 10.0

# The longest delay, seconds, before one is replaced that died of the first job that it was given:
# a message that kills takes a fresh worker too, for its second try.
LONGEST_AT_WORK = 1.0

# Recycling all workers at once would leave none warm: the count of answers is spread by this.
JITTER = 0.1


class Slot:
    """Who serves a slot, who is to succeed it, and when."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.current: Shard | None = None  # it serves
        self.successor: Shard | None = None  # it starts, or is READY and waits for the others
        self.served_since = 0.0
        self.pending: Any = None  # the delayed call that starts the next successor
        self.delay = 0.0  # before its latest start, seconds

    def start_after(self, delay: float, reactor: Any, start: Callable[[Slot], None]) -> None:
        """Has `start` called for the slot after that delay, seconds."""
        self.forget_pending()
        self.pending = reactor.callLater(delay, start, self)

    def forget_pending(self) -> None:
        """No successor is to be started any more."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.cancel()

    def kill_successor(self, reason: str) -> None:
        """There is to be no successor."""
        self.forget_pending()
        shard, self.successor = self.successor, None
        if shard is not None:
            shard.kill(Loss(reason, Blame.PLACE))

    def promote(self, now: float, limits: Limits) -> Shard:
        """The successor, which is ready, takes the slot over; the present shard drains."""
        shard = self.successor
        assert shard is not None  # it is ready
        self.successor = None
        self.drain(limits)
        self.current, self.served_since = shard, now
        most = limits.max_messages
        shard.worn_after = most + random.randint(0, int(most * JITTER)) if most else 0
        return shard

    def drain(self, limits: Limits) -> None:
        """The present shard gets no more jobs, and ends when it can."""
        shard, self.current = self.current, None
        if shard is not None:
            shard.drain(limits.graceful_timeout)

    def worn_out(self, now: float, limits: Limits, *, look_at_memory: bool) -> str:
        """Why the present shard is to be replaced though it is well; empty if it is not."""
        lifetime, most = limits.worker_lifetime, limits.worker_max_rss
        if self.current is None:
            return ""
        if lifetime and now - self.served_since >= lifetime:
            return f"it has served for {lifetime:g} s"
        if most and look_at_memory and self.current.place.memory() > most:
            return f"it uses more than {most} bytes of memory"
        return ""

    def delay_after_death(self, shard: Shard, now: float, limits: Limits) -> float:
        """Seconds until the successor of a shard that has died is started."""
        if shard.answers or now - self.served_since >= HEALTHY_AFTER:
            self.delay = 0.0
            return 0.0
        return self.back_off(limits, LONGEST_AT_WORK if shard.died_at_work else None)

    def back_off(self, limits: Limits, longest: float | None = None) -> float:
        """Seconds until the next try: twice as many as before it, within the limits."""
        most = limits.respawn_longest if longest is None else min(longest, limits.respawn_longest)
        self.delay = min(max(limits.respawn_first, 2 * self.delay), most)
        return self.delay
