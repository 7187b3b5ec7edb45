"""The pool: which worker processes there are, and what replaces one that ends.

Every slot has at most one shard that serves and one successor that starts. Whatever the reason
for a new process (the first start, a death, recycling, a reload), it is started as the slot's
successor; once READY it takes the slot over and the old one drains. So start, respawn, recycle
and reload are one act, and a worker that cannot start never costs one that serves.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.dispatch.dispatcher import Dispatch
from sharded_milter.errors import ConfigError, MilterError, SystemRefused
from sharded_milter.limits import Limits
from sharded_milter.pool.shard import Events, Shard, State
from sharded_milter.protocol.negotiation import Manifest

# A worker that has served this long was healthy: its end is no sign of a crash loop.
HEALTHY_AFTER = 10.0

# How often ages are looked at, and how often memory: reading it costs a system call a worker.
TICK = 1.0
MEMORY_EVERY = 10

# Recycling all workers at once would leave none warm: the count of messages is spread by this.
JITTER = 0.1

StartShard = Callable[[int, Events], Shard]


@dataclass(eq=False)
class _Slot:
    """A place in the pool."""

    number: int
    current: Shard | None = None  # it serves
    successor: Shard | None = None  # it starts, or is READY and waits for the rest of a reload
    delay: float = 0.0  # before its latest start; 0 after a healthy run
    pending: Any = None  # the delayed call that starts the next successor
    served_since: float = 0.0
    messages: int = 0  # after which the present worker is replaced


class Pool:
    """Keeps `size` shards at work; `start_shard` starts the process for a slot."""

    log = Logger()

    def __init__(
        self, start_shard: StartShard, size: int, limits: Limits, dispatch: Dispatch, reactor: Any
    ) -> None:
        self.manifests: tuple[Manifest, ...] = ()
        self._start_shard = start_shard
        self._limits = limits
        self._dispatch = dispatch
        self._reactor = reactor
        self._slots = [_Slot(number) for number in range(1, size + 1)]
        self._leaving: set[Shard] = set()
        self._started: Deferred[tuple[Manifest, ...]] = Deferred()
        self._stopped: Deferred[None] | None = None
        self._reloading = False
        self._reload_again = False
        self._ticks = 0
        self._tick_call: Any = None

    @property
    def shards(self) -> list[Shard]:
        """Every worker process there is, whatever it does."""
        held = [shard for slot in self._slots for shard in (slot.current, slot.successor) if shard]
        return [*held, *self._leaving]

    @property
    def socket(self) -> str:
        """Where the workers' script wants to listen; empty if there is none."""
        return next((slot.current.socket for slot in self._slots if slot.current), "")

    # What the operator wants

    def start(self) -> Deferred[tuple[Manifest, ...]]:
        """Fires with the milters' manifests when every worker is READY.

        Fails with MilterLoadError, ConfigError (too slow) or SystemRefused (cannot spawn).
        """
        try:
            for slot in self._slots:
                self._spawn(slot)
        except OSError as error:
            self._start_failed(SystemRefused(f"cannot start a worker: {error.strerror}"))
        self._tick_call = self._reactor.callLater(TICK, self._tick)
        if not self._slots:  # all milters are in the master
            self._started.callback(())
        return self._started

    def reload(self) -> None:
        """A new generation: every slot gets a successor, and they take over when all are READY.

        If one of them cannot start, all of them are given up and the old ones go on. A reload
        that is asked for during another, or during the start, is done after it, once.
        """
        if self._stopped is not None:
            return
        if not self._slots:
            self.log.warn("no milter runs in a worker; those in the master stay as they are")
            return
        if self._reloading or not self._started.called:
            self._reload_again = True
            return
        self._reloading = True
        self.log.info("reloading the milter in {n} new workers", n=len(self._slots))
        for slot in self._slots:
            self._cancel_pending(slot)
            if slot.successor is not None:  # it may have read the old code
                self._give_up(slot, "a reload has begun")
        try:
            for slot in self._slots:
                self._spawn(slot)
        except OSError as error:
            self._reload_failed(f"cannot start a worker: {error.strerror}")

    def resize(self, change: int) -> None:
        """One worker more, or one less; at least one stays."""
        if self._stopped is not None or self._reloading:
            self.log.warn("the pool is not resized during a reload or at the end")
            return
        if not self._slots:
            self.log.warn("no milter runs in a worker")
            return
        if change > 0:
            self._slots.append(_Slot(len(self._slots) + 1))
            self._spawn_soon(self._slots[-1], 0.0)
        elif len(self._slots) > 1:
            slot = self._slots.pop()
            self._cancel_pending(slot)
            self._give_up(slot, "the pool shrinks")
            self._retire(slot)
        self.log.info("the pool has {n} workers now", n=len(self._slots))

    def dump_stacks(self) -> None:
        """All workers write their stacks into the log."""
        for shard in self.shards:
            shard.dump_stacks()

    def stop(self) -> Deferred[None]:
        """Fires when all workers have ended; what they still do is lost."""
        if self._stopped is None:
            self._stopped = Deferred()
            for slot in self._slots:
                self._cancel_pending(slot)
            if self._tick_call is not None and self._tick_call.active():
                self._tick_call.cancel()
            for shard in self.shards:
                self._dispatch.lost(shard)
                if shard.state is State.IDLE:
                    shard.drain()
                else:
                    shard.kill("the service stops")
            self._check_stopped()
        return self._stopped

    def _check_stopped(self) -> None:
        if self._stopped is not None and not self.shards and not self._stopped.called:
            self._stopped.callback(None)

    def _start_failed(self, error: MilterError) -> None:
        if not self._started.called:
            self._started.errback(Failure(error))

    # Successors

    def _spawn(self, slot: _Slot) -> None:
        """Starts the slot's successor; raises OSError when the system refuses."""
        shard = self._start_shard(slot.number, self)
        slot.successor = shard
        timeout = self._limits.worker_start_timeout
        self._reactor.callLater(timeout, self._check_ready, shard, timeout)

    def _check_ready(self, shard: Shard, timeout: float) -> None:
        if shard.state is State.STARTING:
            shard.kill(f"it was not ready within {timeout:g} s")

    def _spawn_soon(self, slot: _Slot, delay: float) -> None:
        self._cancel_pending(slot)
        slot.pending = self._reactor.callLater(delay, self._spawn_again, slot)

    def _spawn_again(self, slot: _Slot) -> None:
        slot.pending = None
        if self._reloading:
            return  # it has started a successor, or has ended in _reload_failed
        try:
            self._spawn(slot)
        except OSError as error:
            self.log.error("cannot start shard {n}: {why}", n=slot.number, why=error.strerror)
            self._back_off(slot)

    def _back_off(self, slot: _Slot) -> None:
        delay = max(self._limits.respawn_first, 2 * slot.delay)
        slot.delay = min(delay, self._limits.respawn_longest)
        self._spawn_soon(slot, slot.delay)

    def _cancel_pending(self, slot: _Slot) -> None:
        pending, slot.pending = slot.pending, None
        if pending is not None:
            pending.cancel()

    def _give_up(self, slot: _Slot, reason: str) -> None:
        """The slot's successor is not wanted any more."""
        shard, slot.successor = slot.successor, None
        if shard is not None:
            self._leaving.add(shard)
            shard.kill(reason)

    def _promote(self, slot: _Slot) -> None:
        """The successor takes the slot over."""
        shard = slot.successor
        assert shard is not None  # it has just said READY
        slot.successor = None
        self._retire(slot)
        slot.current = shard
        slot.served_since = self._reactor.seconds()
        most = self._limits.max_messages
        slot.messages = most + random.randint(0, int(most * JITTER)) if most else 0
        self._dispatch.schedule.idle(shard)
        self._dispatch.assign()

    def _retire(self, slot: _Slot) -> None:
        """The slot's worker gets no more jobs, and ends when it has answered the present one."""
        shard, slot.current = slot.current, None
        if shard is not None:
            self._dispatch.schedule.retire(shard)
            self._leaving.add(shard)
            shard.drain(self._limits.graceful_timeout)

    # What shards tell

    def shard_ready(self, shard: Shard) -> None:
        """The milter is imported."""
        slot = self._slot_of(shard)
        if slot is None or slot.successor is not shard:
            return
        self.log.info("shard {n} is ready, pid {pid}", n=shard.slot, pid=shard.pid)
        if self._reloading:
            if all(s.successor and s.successor.manifests for s in self._slots):
                self._reload_done()
            return
        if not self.manifests:
            self.manifests = shard.manifests
        elif self.manifests != shard.manifests:
            self.log.warn("the milter's file has changed: all workers must be replaced")
            self.reload()
            if self._reloading:
                return
        self._promote(slot)
        if not self._started.called and all(slot.current for slot in self._slots):
            self._started.callback(self.manifests)
            self._reload_next()

    def _reload_done(self) -> None:
        self._reloading = False
        first = self._slots[0].successor
        assert first is not None  # all are READY
        self.manifests = first.manifests
        if any(s.successor and s.successor.manifests != self.manifests for s in self._slots):
            self._reload_again = True  # the file has changed meanwhile
        for slot in self._slots:
            self._promote(slot)
        self.log.info("reloaded: {n} new workers serve", n=len(self._slots))
        self._reload_next()

    def _reload_failed(self, reason: str) -> None:
        self._reloading = False
        self._dispatch.counters["reloads_failed"] += 1
        self.log.error("not reloaded, the old workers go on: {why}", why=reason)
        for slot in self._slots:
            self._give_up(slot, "the reload has failed")
            if slot.current is None:
                self._back_off(slot)
        self._reload_next()

    def _reload_next(self) -> None:
        if self._reload_again:
            self._reload_again = False
            self.reload()

    def shard_answered(self, shard: Shard) -> None:
        """The shard has answered, and may have served long enough."""
        slot = self._slot_of(shard)
        if slot is not None and slot.messages and shard.answered >= slot.messages:
            self._recycle(slot, f"it has answered {shard.answered} jobs")

    def shard_idle(self, shard: Shard) -> None:
        """The shard has answered all that it was asked."""
        self._dispatch.schedule.idle(shard)
        self._dispatch.assign()

    def shard_deaf(self, shard: Shard) -> None:
        """The shard can be told nothing more; its exit should follow."""
        self._dispatch.schedule.deaf(shard)

    def shard_gone(self, shard: Shard) -> None:
        """The process is reaped: if it served, or should have, another is started."""
        self._leaving.discard(shard)
        slot = self._slot_of(shard)
        self._dispatch.lost(shard)
        if self._stopped is not None:
            self._forget(slot, shard)
            self._check_stopped()
        elif slot is not None and slot.current is shard:
            self._died(slot, shard)
        elif slot is not None and slot.successor is shard:
            self._not_started(slot, shard)

    def _forget(self, slot: _Slot | None, shard: Shard) -> None:
        if slot is not None and slot.current is shard:
            slot.current = None
        if slot is not None and slot.successor is shard:
            slot.successor = None

    def _died(self, slot: _Slot, shard: Shard) -> None:
        self._dispatch.counters["worker_restarts"] += 1
        slot.current = None
        self.log.error("shard {n} is gone: {why}", n=slot.number, why=shard.exit_reason)
        if self._reactor.seconds() - slot.served_since >= HEALTHY_AFTER:
            slot.delay = 0.0
        if slot.successor is None and slot.pending is None and not self._reloading:
            self._back_off(slot)

    def _not_started(self, slot: _Slot, shard: Shard) -> None:
        slot.successor = None
        error = shard.load_error or ConfigError(f"its worker ended: {shard.exit_reason}")
        if not self._started.called:
            self._start_failed(error)
            return
        details = getattr(error, "details", "")
        reason = f"{error}\n{details}".rstrip()
        if self._reloading:
            self._reload_failed(reason)
            return
        self.log.error("shard {n} has not started: {why}", n=slot.number, why=reason)
        self._back_off(slot)

    def _slot_of(self, shard: Shard) -> _Slot | None:
        """The slot that the shard is part of; None when it is leaving."""
        for slot in self._slots[shard.slot - 1 : shard.slot]:  # numbers are from 1, without gaps
            if shard in (slot.current, slot.successor):
                return slot
        return None

    # Recycling

    def _recycle(self, slot: _Slot, reason: str) -> None:
        if slot.successor is None and slot.pending is None and not self._reloading:
            self._dispatch.counters["recycled"] += 1
            self.log.info("shard {n} is replaced: {why}", n=slot.number, why=reason)
            self._spawn_soon(slot, 0.0)

    def _tick(self) -> None:
        self._ticks += 1
        self._tick_call = self._reactor.callLater(TICK, self._tick)
        lifetime, most = self._limits.worker_lifetime, self._limits.worker_max_rss
        now = self._reactor.seconds()
        for slot in self._slots:
            if slot.current is None:
                continue
            if lifetime and now - slot.served_since >= lifetime:
                self._recycle(slot, f"it has served for {lifetime:g} s")
            elif most and self._ticks % MEMORY_EVERY == 0 and slot.current.rss() > most:
                self._recycle(slot, f"it uses more than {most} bytes of memory")
