"""The pool: the generations of shards, of which one serves, and one may load to succeed it.

Start and reload are one act: a generation loads, and once all of its shards are READY it takes over
and the one before drains. So a load that fails costs no shard that serves. Resizing changes the
generations that there are. The pool hears what happens to shards; no answer passes through it. Once
a second it replaces shards that are worn, and one where a job waits for a fresh shard, and has all
look after their processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.errors import MilterError
from sharded_milter.limits import Limits
from sharded_milter.pool.generation import Event, Generation, described
from sharded_milter.pool.shard import Ending, Shard
from sharded_milter.protocol.negotiation import Manifest

# How often ages are looked at, and how often memory: reading it costs a system call a worker.
TICK = 1.0
MEMORY_EVERY = 10


class Work(Protocol):
    """Who gives jobs to shards, and takes their answers: the dispatcher."""

    counters: Any

    def serve(self, shard: Shard) -> None: ...

    @property
    def waits_for_fresh(self) -> bool: ...


class Pool:
    """Keeps `size` shards at work; `make_shard` makes the one for a slot, which then starts."""

    log = Logger()

    def __init__(
        self,
        make_shard: Callable[[int, Pool], Shard],
        size: int,
        limits: Limits,
        work: Work,
        reactor: Any,
    ) -> None:
        self._make_shard = make_shard
        self._size = size
        self._limits = limits
        self._work = work
        self._reactor = reactor
        self._serving: Generation | None = None
        self._loading: Generation | None = None
        self._draining: set[Generation] = set()  # those that have shards yet
        self._reload_again = False
        self._started: Deferred[tuple[Manifest, ...]] = Deferred()
        self._stopped: Deferred[None] | None = None
        self._ticks = 0
        self._sandbox = ("", False)  # what was said of it last
        self._tick_call: Any = None

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Those of the milters that are served now."""
        return self._serving.manifests if self._serving is not None else ()

    @property
    def shards(self) -> list[Shard]:
        """Every shard that is not gone, whatever it does."""
        return [shard for generation in self._generations for shard in generation.shards]

    @property
    def socket(self) -> str:
        """Where the workers' script wants to listen; empty if there is none."""
        return next((shard.socket for shard in self.shards if shard.socket), "")

    @property
    def _generations(self) -> list[Generation]:
        return [each for each in (self._serving, self._loading, *self._draining) if each]

    # What the operator wants

    def start(self) -> Deferred[tuple[Manifest, ...]]:
        """Fires with the milters' manifests when every worker is READY.

        Fails with MilterLoadError, ConfigError (too slow) or SystemRefused (cannot spawn), and with
        CancelledError when `stop` comes first.
        """
        self._tick_call = self._reactor.callLater(TICK, self._tick)
        if self._size:
            self._load()
        else:  # all milters are in the master
            self._started.callback(())
        return self._started

    def reload(self) -> None:
        """A new generation loads, and takes over when all of it is READY.

        If one of its shards cannot start, it is given up and the old one goes on. A reload that is
        asked for during another, or during the start, is done after it, once.
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
        """One worker more (1), or one less (-1); at least one stays."""
        if self._stopped is not None:
            self.log.warn("the pool is not resized at the end")
        elif not self._size:
            self.log.warn("no milter runs in a worker")
        elif self._size + change >= 1:
            self._size += change
            for generation in filter(None, (self._serving, self._loading)):
                generation.happens(Event.RESIZED, change)
            self.log.info("the pool has {n} workers now", n=self._size)

    def dump_stacks(self) -> None:
        """All workers write their stacks into the log."""
        for shard in self.shards:
            shard.dump_stacks()

    def stop(self) -> Deferred[None]:
        """Fires when all workers have ended; what they still do is lost."""
        if self._stopped is None:
            self._stopped = Deferred()
            if self._tick_call is not None and self._tick_call.active():
                self._tick_call.cancel()
            for generation in self._generations:
                generation.happens(Event.STOPPED)
            if not self._started.called and self._generations:
                self._started.errback(Failure(CancelledError("the pool was stopped meanwhile")))
            self._check_stopped()
        return self._stopped

    def _check_stopped(self) -> None:
        if self._stopped is not None and not self.shards and not self._stopped.called:
            self._stopped.callback(None)

    # What generations tell

    def new_shard(self, slot: int) -> Shard:
        """A shard for a slot, which is not started yet."""
        return self._make_shard(slot, self)

    def serve(self, shard: Shard) -> None:
        """The shard takes jobs from now on."""
        self._work.serve(shard)

    def took_over(self, generation: Generation) -> None:
        """All of its shards serve; the generation before drains."""
        before, self._serving, self._loading = self._serving, generation, None
        if before is not None:
            self._keep_until_gone(before)
            before.happens(Event.SUCCEEDED)
            self.log.info("reloaded: {n} new workers serve", n=len(generation.slots))
        if not self._started.called:
            self._started.callback(generation.manifests)
        self._reload_next()

    def failed(self, generation: Generation, error: MilterError) -> None:
        """It could not be loaded."""
        self._loading = None
        self._keep_until_gone(generation)
        if not self._started.called:
            self._started.errback(Failure(error))
            return
        self._work.counters["reloads_failed"] += 1
        why = described(error)
        self.log.error("not reloaded, the old workers go on: {why}", why=why, has_details=True)
        self._reload_next()

    def _keep_until_gone(self, generation: Generation) -> None:
        if generation.shards:
            self._draining.add(generation)

    def _reload_next(self) -> None:
        if self._reload_again:
            self._reload_again = False
            self.reload()

    def count(self, name: str) -> None:
        """Something that is counted has happened."""
        self._work.counters[name] += 1

    # What shards tell

    def shard_ready(self, shard: Shard) -> None:
        """The milters are loaded."""
        self.log.info("shard {n} is ready, pid {pid}", n=shard.slot, pid=shard.place.pid)
        self._say_sandbox(*shard.sandbox)
        generation = self._generation_of(shard)
        if generation is not None:
            generation.happens(Event.READY, shard)

    def _say_sandbox(self, text: str, incomplete: bool) -> None:
        """Says once, not for each worker, what became of the sandbox."""
        if text and (text, incomplete) != self._sandbox:
            self._sandbox = (text, incomplete)
            (self.log.warn if incomplete else self.log.info)("{text}", text=text)

    def shard_worn(self, shard: Shard, why: str) -> None:
        """The shard has given as many answers as it should, or as it can."""
        generation = self._generation_of(shard)
        if generation is not None:
            generation.worn(shard, why)

    def shard_gone(self, shard: Shard, ending: Ending) -> None:
        """The process is reaped: if it served, or should have, another is started."""
        generation = self._generation_of(shard)
        if generation is not None:
            generation.gone(shard, ending)
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
            shard.look()
        generation = self._serving
        if generation is None:
            return
        now, look_at_memory = self._reactor.seconds(), not self._ticks % MEMORY_EVERY
        for slot in generation.slots:
            reason = slot.worn_out(now, self._limits, look_at_memory=look_at_memory)
            if reason:
                generation.recycle(slot, reason)
        if self._work.waits_for_fresh and not generation.starts_some:
            oldest = min(generation.slots, key=lambda slot: slot.served_since)
            generation.recycle(oldest, "a message that has killed needs a fresh worker")
