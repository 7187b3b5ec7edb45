"""A slot: a place in a generation, which one shard serves and its successor takes over."""

from __future__ import annotations

import random
from collections.abc import Callable

from sharded_milter.alarms import DelayedCall, ReactorTime
from sharded_milter.dispatch.job import Blame, Loss
from sharded_milter.limits import Limits
from sharded_milter.pool.shard import Shard

# A worker that has served this long, seconds, or has answered any job, is not in a crash loop: it
# is replaced at once when it dies. Otherwise one killing message a second would leave no workers.
HEALTHY_AFTER = 10.0

# The longest delay, seconds, before a worker is replaced that died of its first job: a message that
# kills is retried in a fresh worker, so it kills that one with its first job too.
MAX_DELAY_AT_WORK = 1.0

# --max-messages varies by this share at random, so that workers are not recycled all at once.
JITTER = 0.1


class Slot:
    """The shard that serves a slot, its successor, and the time when that is started."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.current: Shard | None = None  # serves
        self.successor: Shard | None = None  # starts, or is READY and waits for the others
        self.served_since = 0.0
        self.pending: DelayedCall | None = None  # starts the next successor
        self.delay = 0.0  # before its latest start, seconds

    def start_after(
        self, delay: float, reactor: ReactorTime, start: Callable[[Slot], None]
    ) -> None:
        """Call `start` with the slot after `delay` seconds."""
        self.cancel_pending()
        self.pending = reactor.callLater(delay, start, self)

    def cancel_pending(self) -> None:
        """Cancel the scheduled start of a successor."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.cancel()

    def kill_successor(self, reason: str) -> None:
        """Kill the successor, or cancel its start."""
        self.cancel_pending()
        shard, self.successor = self.successor, None
        if shard is not None:
            shard.kill(Loss(reason, Blame.PLACE))

    def promote(self, now: float, limits: Limits) -> Shard:
        """Drain the current shard, and make the successor current; return it. It must be ready."""
        shard = self.successor
        assert shard is not None  # it is ready
        self.successor = None
        self.drain(limits)
        self.current, self.served_since = shard, now
        most = limits.max_messages
        shard.recycle_after = most + random.randint(0, int(most * JITTER)) if most else 0
        return shard

    def drain(self, limits: Limits) -> None:
        """Drain the current shard."""
        shard, self.current = self.current, None
        if shard is not None:
            shard.drain(limits.graceful_timeout)

    def recycle_reason(self, now: float, limits: Limits, *, look_at_memory: bool) -> str:
        """Return why the current shard is due for recycling; empty if it is not."""
        lifetime, most = limits.worker_lifetime, limits.worker_max_rss
        if self.current is None:
            return ""
        if lifetime and now - self.served_since >= lifetime:
            return f"it has served for {lifetime:g} s"
        if most and look_at_memory and self.current.place.memory() > most:
            return f"it uses more than {most} bytes of memory"
        return ""

    def delay_after_death(self, shard: Shard, now: float, limits: Limits) -> float:
        """Return the seconds until the successor of a dead shard is started."""
        if shard.answers or now - self.served_since >= HEALTHY_AFTER:
            self.delay = 0.0
            return 0.0
        return self.back_off(limits, MAX_DELAY_AT_WORK if shard.died_at_work else None)

    def back_off(self, limits: Limits, longest: float | None = None) -> float:
        """Return the seconds until the next start: twice the last delay, within the limits."""
        most = limits.respawn_longest if longest is None else min(longest, limits.respawn_longest)
        self.delay = min(max(limits.respawn_first, 2 * self.delay), most)
        return self.delay
