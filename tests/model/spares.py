"""What the pool owes: that a start ends, and that whatever ends is replaced in its turn."""

from __future__ import annotations

from typing import Any

from sharded_milter.pool.shard import Shard

from .book import Book
from .records import EPSILON, Process, check

# The rules for who is replaced when, seconds.
FIRST, LONGEST, MAX_DELAY_AT_WORK = 0.1, 30.0, 1.0
HEALTHY_AFTER = 10.0

# Whose turn it is, is replaced within this.
WITHIN = 1.0


class Spares:
    """When the successor of each slot of the generation that serves is due.

    Which generation serves and which loads is asked of the pool; nothing else is.
    """

    def __init__(self, book: Book, size: int) -> None:
        self.size = size
        self.stopping = False
        self.recycled_at = -1.0  # when another was started for one that serves
        self._book = book
        self._generation: Any = None
        self._due: dict[int, float] = {}  # by slot
        self._delay: dict[int, float] = {}
        self._unsure: set[int] = set()  # slots about which too little is known
        self._seen: set[Shard] = set()

    def _members(self, pool: Any, slot: int) -> list[Process]:
        """Those in the slot that serve or are to serve."""
        serving = pool._serving
        return [
            process
            for process in self._book.processes.values()
            if process.shard.slot == slot
            and process.shard in serving.shards
            and not process.retired
            and (process.serves or not self._is_superfluous(process))
        ]

    def _notice(self, pool: Any) -> None:
        if pool._serving is not self._generation:
            self._generation = pool._serving
            self._due.clear()
            self._delay.clear()
            self._unsure.clear()

    # Events

    def ready(self, pool: Any, process: Process) -> None:
        """A process is ready; if it does not serve now, it has other code."""
        self._notice(pool)
        slot = process.shard.slot
        serving = pool._serving
        if serving is None or process.shard not in serving.shards or process.serves:
            return
        if not self._members(pool, slot):
            self._due[slot] = self._book.now + LONGEST

    def gone(self, pool: Any, generation: Any, shard: Shard) -> None:
        """A process is reaped."""
        self._notice(pool)
        process = self._book.ever.pop(shard, None)
        if process is None or generation is None or generation is not self._generation:
            return
        slot, now = shard.slot, self._book.now
        if process.retired or slot > self.size:
            return
        if not process.serves:
            if not self._is_superfluous(process):
                self._back_off(slot, LONGEST)
            return
        if self._due.get(slot, 0.0) > now or self._members(pool, slot):
            return  # its successor starts, or is due already
        if process.answers or now - process.served_since >= HEALTHY_AFTER:
            self._delay[slot], self._due[slot] = 0.0, now
        else:
            self._back_off(slot, MAX_DELAY_AT_WORK if process.died_at_work else LONGEST)

    def _is_superfluous(self, process: Process) -> bool:
        """Whether the pool itself has ended it: the slot was given up, or it had other code."""
        loss = process.shard.loss
        return loss is not None and ("shrinks" in loss.reason or "other code" in loss.reason)

    def _back_off(self, slot: int, longest: float) -> None:
        delay = min(max(FIRST, 2 * self._delay.get(slot, 0.0)), longest, LONGEST)
        self._delay[slot] = delay
        self._due[slot] = self._book.now + delay

    def refused(self, pool: Any, shard: Shard) -> None:
        """The system has refused to start a process."""
        self._notice(pool)
        if pool._loading is None:
            self._back_off(shard.slot, LONGEST)
        else:  # of which generation it was is not known
            self._unsure.add(shard.slot)

    def resized(self, pool: Any, change: int) -> None:
        """The operator wants another number of shards."""
        self.size += change
        self._due.pop(self.size + 1, None)
        self._delay.pop(self.size + 1, None)
        if change > 0:
            self._delay.pop(self.size, None)
            self._due[self.size] = self._book.now

    # Laws

    def check(self, pool: Any, outcome: list[Any], stopped: list[Any]) -> None:
        """Starts end, stops end, and whoever is due has come."""
        processes = self._book.processes
        if self.stopping:
            check(bool(stopped) or processes, "6 a stop ends")
            return
        for generation in filter(None, (pool._loading,)):
            starting = [
                process
                for process in processes.values()
                if process.shard in generation.shards
                and (not process.worker.introduced or process.is_unavailable)
            ]
            check(starting, "6 a load ends when all are ready, or one is not")
        if not outcome:
            check(processes, "6 a start ends with a reason")
        self._notice(pool)
        if self._generation is not None:
            for slot in range(1, self.size + 1):
                if slot not in self._unsure:
                    self._check_slot(pool, slot)

    def _check_slot(self, pool: Any, slot: int) -> None:
        now = self._book.now
        members = self._members(pool, slot)
        due = self._due.get(slot)
        for process in members:
            if process.shard not in self._seen:
                self._seen.add(process.shard)
                early = due is not None and process.started < due - EPSILON
                asked_for = process.started == self.recycled_at
                check(asked_for or not early, "5 it is replaced in its turn", process, due)
        if members:
            if due is not None and due <= now:
                del self._due[slot]
        elif due is not None:
            check(now <= due + WITHIN, "5 it is replaced within a second of its turn", slot, due)
