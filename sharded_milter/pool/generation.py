"""A generation: the shards that serve one load of the milters' code and configuration.

    loading ──▶ serving ──▶ draining
       └───────────┴────────────┴──▶ ended

The law: one constant table, TRANSITIONS, has a cell for each event in each state. The state is
assigned in `handle_event` and nowhere else; so the table and its actions stay in this one file.

Each slot has at most one shard that serves and one that starts. Every new process (after a death,
for recycling, for more workers) is started as the slot's successor; once READY it takes the slot
over and the old one drains. A generation never mixes code: a successor that has loaded other code
than the generation does not serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, Protocol

from twisted.logger import Logger

from sharded_milter.alarms import ReactorTime
from sharded_milter.dispatch.job import Blame, Loss
from sharded_milter.errors import ConfigError, MilterError, SystemRefused
from sharded_milter.limits import Limits
from sharded_milter.pool.shard import Ending, Shard
from sharded_milter.pool.slot import Slot
from sharded_milter.pool.table import Cell, row
from sharded_milter.protocol.negotiation import Manifest

# How often a loading generation restarts the shards that have loaded other code than the latest.
# Without a limit it would never end if the files differ from worker to worker.
MAX_RESTARTS = 5


class GenerationState(Enum):
    """The state of a generation."""

    LOADING = auto()
    SERVING = auto()
    DRAINING = auto()
    ENDED = auto()


class GenerationEvent(Enum):
    """What can happen to a generation."""

    READY = auto()  # a shard has loaded the milters
    NOT_STARTED = auto()  # a shard has ended before that
    DIED = auto()  # a shard that was ready has died
    RESIZED = auto()  # the number of shards changes
    COMPLETE = auto()  # every slot has a shard that is ready
    SUCCEEDED = auto()  # another generation serves from now on
    STOPPED = auto()  # the service stops


TRANSITIONS: Mapping[GenerationState, Mapping[GenerationEvent, Cell[GenerationState]]] = {
    GenerationState.LOADING: row(
        GenerationEvent,
        GenerationState.LOADING,
        READY=Cell(GenerationState.LOADING, "_check_loaded"),
        NOT_STARTED=Cell(GenerationState.ENDED, "_fail"),
        DIED=Cell(GenerationState.ENDED, "_fail"),
        RESIZED=Cell(GenerationState.LOADING, "_resize_loading"),
        COMPLETE=Cell(GenerationState.SERVING, "_take_over"),
        STOPPED=Cell(GenerationState.ENDED, "_end_all"),
    ),
    GenerationState.SERVING: row(
        GenerationEvent,
        GenerationState.SERVING,
        READY=Cell(GenerationState.SERVING, "_admit"),
        NOT_STARTED=Cell(GenerationState.SERVING, "_start_later"),
        DIED=Cell(GenerationState.SERVING, "_replace"),
        RESIZED=Cell(GenerationState.SERVING, "_resize_serving"),
        SUCCEEDED=Cell(GenerationState.DRAINING, "_retire_all"),
        STOPPED=Cell(GenerationState.ENDED, "_end_all"),
    ),
    GenerationState.DRAINING: row(
        GenerationEvent,
        GenerationState.DRAINING,
        READY=Cell(GenerationState.DRAINING, "_kill_late"),
        STOPPED=Cell(GenerationState.ENDED, "_end_all"),
    ),
    GenerationState.ENDED: row(
        GenerationEvent, GenerationState.ENDED, READY=Cell(GenerationState.ENDED, "_kill_late")
    ),
}


class GenerationOwner(Protocol):
    """The pool, as a generation needs it."""

    def new_shard(self, slot: int) -> Shard: ...
    def serve(self, shard: Shard) -> None: ...
    def took_over(self, generation: Generation) -> None: ...
    def failed(self, generation: Generation, error: MilterError) -> None: ...
    def reload(self) -> None: ...
    def count(self, name: str) -> None: ...


class Generation:
    """The shards of one load of code; `shards` has all of them that are not gone."""

    log = Logger()

    def __init__(
        self, size: int, limits: Limits, owner: GenerationOwner, reactor: ReactorTime
    ) -> None:
        self.state = GenerationState.LOADING
        self.slots = [Slot(number) for number in range(1, size + 1)]
        self.shards: set[Shard] = set()
        self.code: tuple[bytes, tuple[Manifest, ...]] | None = None  # digest and manifests
        self._limits = limits
        self._owner = owner
        self._reactor = reactor
        self._restarts = 0

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """The manifests of its milters; empty before the first shard is ready."""
        return self.code[1] if self.code is not None else ()

    @property
    def is_starting_shards(self) -> bool:
        """Whether a shard is being started, or is scheduled to be."""
        return any(slot.successor or slot.pending for slot in self.slots)

    def handle_event(self, event: GenerationEvent, *details: Any) -> None:
        """Change the state as TRANSITIONS says, and call the action."""
        cell = TRANSITIONS[self.state][event]
        self.state = cell.after
        if cell.act:
            getattr(self, cell.act)(*details)

    def load(self) -> None:
        """Start a shard for each slot."""
        for slot in self.slots:
            if self.state is GenerationState.LOADING:  # one may have failed
                self._start(slot)

    def shard_gone(self, shard: Shard, ending: Ending) -> None:
        """Remove a shard that is gone, and replace it if it served."""
        self.shards.discard(shard)
        slot = self._slot_of(shard)
        if slot is None:
            return
        if slot.current is shard:
            slot.current = None
            self.handle_event(GenerationEvent.DIED, slot, shard)
        else:
            slot.successor = None
            self.handle_event(GenerationEvent.NOT_STARTED, slot, shard)  # it has never served

    def recycle_shard(self, shard: Shard, why: str) -> None:
        """Recycle the shard's slot, unless another shard serves it already."""
        slot = self._slot_of(shard)
        if slot is not None and slot.current is shard:
            self.recycle(slot, why)

    def recycle(self, slot: Slot, reason: str) -> None:
        """Start a shard that replaces the slot's current one."""
        if (
            self.state is GenerationState.SERVING
            and slot.successor is None
            and slot.pending is None
        ):
            self._owner.count("recycled")
            self.log.info("shard {n} is replaced: {why}", n=slot.number, why=reason)
            self._start_after(slot, 0.0)

    def _slot_of(self, shard: Shard) -> Slot | None:
        """Return the slot that the shard serves or starts for; None when it drains."""
        for slot in self.slots[shard.slot - 1 : shard.slot]:  # numbers are from 1, without gaps
            if shard in (slot.current, slot.successor):
                return slot
        return None

    # Successors

    def _start(self, slot: Slot) -> None:
        slot.pending = None
        shard = self._owner.new_shard(slot.number)
        try:
            shard.start(self._limits.worker_start_timeout)
        except OSError as error:
            shard.load_error = SystemRefused(f"cannot start a worker: {error.strerror}")
            self.handle_event(GenerationEvent.NOT_STARTED, slot, shard)
            return
        slot.successor = shard
        self.shards.add(shard)

    def _start_after(self, slot: Slot, delay: float) -> None:
        slot.start_after(delay, self._reactor, self._start)

    def _promote(self, slot: Slot) -> None:
        self._owner.serve(slot.promote(self._reactor.seconds(), self._limits))

    # Loading

    def _check_loaded(self, shard: Shard) -> None:
        """Record the code of a shard that is ready: it is the latest."""
        self.code = shard.code, shard.manifests
        self._check_complete()

    def _check_complete(self) -> None:
        """Serve if all shards are ready with the same code; restart those with older code."""
        ready = [(slot, slot.successor) for slot in self.slots if slot.successor]
        if len(ready) < len(self.slots) or not all(shard.can_serve for _, shard in ready):
            return
        others = [pair for pair in ready if self.code != (pair[1].code, pair[1].manifests)]
        if not others:
            self.handle_event(GenerationEvent.COMPLETE)
        elif self._restarts == MAX_RESTARTS:
            slot, shard = others[0]
            shard.load_error = ConfigError("the milter's files differ from worker to worker")
            self.handle_event(GenerationEvent.NOT_STARTED, slot, shard)
        else:
            self._restarts += 1
            self.log.warn("the milter's files have changed while it was loaded; loading it again")
            self._load_anew([slot for slot, _ in others])

    def _load_anew(self, slots: list[Slot]) -> None:
        for slot in slots:
            slot.kill_successor("the milter's files have changed")
        for slot in slots:
            if self.state is GenerationState.LOADING:  # one may have failed
                self._start(slot)

    def _take_over(self) -> None:
        for slot in self.slots:
            self._promote(slot)
        self._owner.took_over(self)

    def _fail(self, slot: Slot, shard: Shard) -> None:
        self._kill_all()
        self._owner.failed(self, _why_not_started(shard))

    def _kill_all(self) -> None:
        for slot in self.slots:
            slot.kill_successor("another shard of its generation has failed to load")

    def _resize_loading(self, change: int) -> None:
        if change > 0:
            self.slots.append(Slot(len(self.slots) + 1))
            self._start(self.slots[-1])
        else:
            self.slots.pop().kill_successor("the pool shrinks")
            self._check_complete()

    # Serving

    def _admit(self, shard: Shard) -> None:
        """Let a successor that is ready serve, unless it has loaded other code."""
        slot = self._slot_of(shard)
        if slot is None or slot.successor is not shard:
            self._kill_late(shard)
        elif not shard.can_serve:
            return  # its exit follows
        elif self.code == (shard.code, shard.manifests):
            self._promote(slot)
        else:
            slot.kill_successor("it has loaded other code than the workers that serve")
            self.log.warn("the milter's files have changed: all workers are replaced")
            if slot.current is None:
                self._start_after(slot, self._limits.respawn_longest)
            self._owner.reload()

    def _start_later(self, slot: Slot, shard: Shard) -> None:
        reason = description(_why_not_started(shard))
        self.log.error(
            "shard {n} has not started: {why}", n=slot.number, why=reason, has_details=True
        )
        self._start_after(slot, slot.back_off(self._limits))

    def _replace(self, slot: Slot, shard: Shard) -> None:
        assert shard.loss is not None  # it is gone
        self._owner.count("worker_restarts")
        self.log.error("shard {n} is gone: {why}", n=slot.number, why=shard.loss.reason)
        if slot.successor is None and slot.pending is None:
            now = self._reactor.seconds()
            self._start_after(slot, slot.delay_after_death(shard, now, self._limits))

    def _resize_serving(self, change: int) -> None:
        if change > 0:
            self.slots.append(Slot(len(self.slots) + 1))
            self._start_after(self.slots[-1], 0.0)
            return
        slot = self.slots.pop()
        slot.kill_successor("the pool shrinks")
        slot.drain(self._limits)

    # The end

    def _retire_all(self) -> None:
        for slot in self.slots:
            slot.kill_successor("another generation serves")
            slot.drain(self._limits)

    def _kill_late(self, shard: Shard) -> None:
        shard.kill(Loss("it was ready too late", Blame.PLACE))

    def _end_all(self) -> None:
        for slot in self.slots:
            slot.cancel_pending()
        for shard in list(self.shards):
            shard.stop()


def _why_not_started(shard: Shard) -> MilterError:
    reason = shard.loss.reason if shard.loss is not None else "it was not started"
    return shard.load_error or ConfigError(f"its worker ended: {reason}")


def description(error: MilterError) -> str:
    """Return an error's text with the author's traceback, if it has one."""
    return f"{error}\n{getattr(error, 'details', '')}".rstrip()
