"""The pool: the generations of shards, of which one serves, and one may load to succeed it.

Start and reload are the same: a generation loads, and once all of its shards are READY it takes
over and the previous one drains. So a failed load costs no serving shard. Resizing changes the
present generations. No answer passes through the pool. Once a second it checks the heartbeat of all
shards, recycles shards that are due, and one if a job waits for a fresh shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.alarms import DelayedCall, ReactorTime
from sharded_milter.errors import MilterError
from sharded_milter.limits import Limits
from sharded_milter.pool.generation import Generation, GenerationEvent, description
from sharded_milter.pool.shard import Ending, Shard
from sharded_milter.protocol.negotiation import Manifest

# Seconds between checks of heartbeats and ages, and ticks between checks of memory, which cost a
# system call a worker.
TICK = 1.0
MEMORY_EVERY = 10


class PoolDispatcher(Protocol):
    """The dispatcher, as the pool needs it."""

    counters: Counter[str]

    def serve(self, shard: Shard) -> None: ...

    @property
    def waits_for_fresh(self) -> bool: ...


class Pool:
    """Keeps `size` shards running; `make_shard` returns a new shard for a slot, not started."""

    log = Logger()

    def __init__(
        self,
        make_shard: Callable[[int, Pool], Shard],
        size: int,
        limits: Limits,
        dispatcher: PoolDispatcher,
        reactor: ReactorTime,
    ) -> None:
        self._make_shard = make_shard
        self._size = size
        self._limits = limits
        self._dispatcher = dispatcher
        self._reactor = reactor
        self._serving: Generation | None = None
        self._loading: Generation | None = None
        self._draining: set[Generation] = set()  # that still have shards
        self._reload_again = False
        self._started: Deferred[tuple[Manifest, ...]] = Deferred()
        self._stopped: Deferred[None] | None = None
        self._ticks = 0
        self._sandbox = ("", False)  # the last report in the log
        self._tick_call: DelayedCall | None = None

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """The manifests of the milters that serve now."""
        return self._serving.manifests if self._serving is not None else ()

    @property
    def shards(self) -> list[Shard]:
        """Every shard that is not gone, in any state."""
        return [shard for generation in self._generations for shard in generation.shards]

    @property
    def socket(self) -> str:
        """The address that the workers' script asks to listen on; empty if there is none."""
        return next((shard.socket for shard in self.shards if shard.socket), "")

    @property
    def _generations(self) -> list[Generation]:
        return [each for each in (self._serving, self._loading, *self._draining) if each]

    # Called for the operator

    def start(self) -> Deferred[tuple[Manifest, ...]]:
        """Return a Deferred that fires with the milters' manifests when every worker is READY.

        It fails with MilterLoadError, ConfigError (too slow) or SystemRefused (cannot spawn), and
        with CancelledError if `stop` is called before.
        """
        self._tick_call = self._reactor.callLater(TICK, self._tick)
        if self._size:
            self._load()
        else:  # all milters are in the master
            self._started.callback(())
        return self._started

    def reload(self) -> None:
        """Load a new generation, which takes over when all its shards are READY.

        If one of them cannot start, the old generation continues. Reloads that are requested during
        another one, or during the start, are done once, after it.
        """
        if self._stopped is not None:
            return
        if not self._size:
            self.log.warn("no milter runs in a worker; those in the master stay as they are")
        elif self._loading is not None:
            self._reload_again = True
        else:
            self.log.info("reloading the milter in {n} new workers", n=self._size)
            self._load()

    def _load(self) -> None:
        self._loading = Generation(self._size, self._limits, self, self._reactor)
        self._loading.load()

    def resize(self, change: int) -> None:
        """Add a worker (1) or remove one (-1); at least one stays."""
        if self._stopped is not None:
            self.log.warn("the pool is not resized: the service is stopping")
        elif not self._size:
            self.log.warn("the pool is not resized: no milter runs in a worker")
        elif self._size + change >= 1:
            self._size += change
            for generation in filter(None, (self._serving, self._loading)):
                generation.handle_event(GenerationEvent.RESIZED, change)
            self.log.info("the pool has {n} workers now", n=self._size)

    def dump_stacks(self) -> None:
        """Make all workers log the Python stacks of their threads."""
        for shard in self.shards:
            shard.dump_stacks()

    def stop(self) -> Deferred[None]:
        """Stop all workers at once; return a Deferred that fires when they have exited."""
        if self._stopped is None:
            self._stopped = Deferred()
            if self._tick_call is not None and self._tick_call.active():
                self._tick_call.cancel()
            for generation in self._generations:
                generation.handle_event(GenerationEvent.STOPPED)
            if not self._started.called and self._generations:
                self._started.errback(Failure(CancelledError("the pool was stopped meanwhile")))
            self._check_stopped()
        return self._stopped

    def _check_stopped(self) -> None:
        if self._stopped is not None and not self.shards and not self._stopped.called:
            self._stopped.callback(None)

    # Called by generations

    def new_shard(self, slot: int) -> Shard:
        """Return a new shard for a slot, not started."""
        return self._make_shard(slot, self)

    def serve(self, shard: Shard) -> None:
        """Give jobs to the shard from now on."""
        self._dispatcher.serve(shard)

    def took_over(self, generation: Generation) -> None:
        """Drain the previous generation: all shards of this one serve."""
        before, self._serving, self._loading = self._serving, generation, None
        if before is not None:
            self._keep_until_gone(before)
            before.handle_event(GenerationEvent.SUCCEEDED)
            self.log.info("reloaded: {n} new workers serve", n=len(generation.slots))
        if not self._started.called:
            self._started.callback(generation.manifests)
        self._reload_next()

    def failed(self, generation: Generation, error: MilterError) -> None:
        """Give up a generation that could not be loaded."""
        self._loading = None
        self._keep_until_gone(generation)
        if not self._started.called:
            self._started.errback(Failure(error))
            return
        self._dispatcher.counters["reloads_failed"] += 1
        why = description(error)
        self.log.error("reload failed, the old workers continue: {why}", why=why, has_details=True)
        self._reload_next()

    def _keep_until_gone(self, generation: Generation) -> None:
        if generation.shards:
            self._draining.add(generation)

    def _reload_next(self) -> None:
        if self._reload_again:
            self._reload_again = False
            self.reload()

    def count(self, name: str) -> None:
        """Count one event in the dispatcher's counters."""
        self._dispatcher.counters[name] += 1

    # Called by shards

    def shard_ready(self, shard: Shard) -> None:
        """Log that the shard is ready, and tell its generation."""
        self.log.info("shard {n} is ready, pid {pid}", n=shard.slot, pid=shard.place.pid)
        self._log_sandbox(*shard.sandbox)
        generation = self._generation_of(shard)
        if generation is not None:
            generation.handle_event(GenerationEvent.READY, shard)

    def _log_sandbox(self, text: str, incomplete: bool) -> None:
        """Log the sandbox report, once for all workers that report the same."""
        if text and (text, incomplete) != self._sandbox:
            self._sandbox = (text, incomplete)
            (self.log.warn if incomplete else self.log.info)("{text}", text=text)

    def recycle_shard(self, shard: Shard, why: str) -> None:
        """Recycle a shard that has answered enough jobs, or lacks memory or descriptors."""
        generation = self._generation_of(shard)
        if generation is not None:
            generation.recycle_shard(shard, why)

    def shard_gone(self, shard: Shard, ending: Ending) -> None:
        """Remove a shard that has exited; its generation replaces it."""
        generation = self._generation_of(shard)
        if generation is not None:
            generation.shard_gone(shard, ending)
            if not generation.shards:
                self._draining.discard(generation)
        self._check_stopped()

    def _generation_of(self, shard: Shard) -> Generation | None:
        return next((each for each in self._generations if shard in each.shards), None)

    # Recycling

    def _tick(self) -> None:
        self._ticks += 1
        self._tick_call = self._reactor.callLater(TICK, self._tick)
        for shard in self.shards:
            shard.check_heartbeat()
        generation = self._serving
        if generation is None:
            return
        now, look_at_memory = self._reactor.seconds(), not self._ticks % MEMORY_EVERY
        for slot in generation.slots:
            reason = slot.recycle_reason(now, self._limits, look_at_memory=look_at_memory)
            if reason:
                generation.recycle(slot, reason)
        if self._dispatcher.waits_for_fresh and not generation.is_starting_shards:
            oldest = min(generation.slots, key=lambda slot: slot.served_since)
            generation.recycle(oldest, "a message that has killed needs a fresh worker")
