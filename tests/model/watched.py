"""The real shard, dispatcher and pool, whose dealings with each other are written down."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from sharded_milter.dispatch.dispatcher import Dispatcher
from sharded_milter.dispatch.job import Job, Loss
from sharded_milter.ipc.messages import Answer
from sharded_milter.pool.pool import Pool
from sharded_milter.pool.shard import Ending, Shard

from .book import Book
from .laws import check_given
from .records import check
from .worker import Worker

if TYPE_CHECKING:
    from .world import World


class WatchedShard(Shard):
    """A shard whose dealings with the dispatcher are written down."""

    def __init__(self, slot: int, world: World, events: Any) -> None:
        super().__init__(slot, Worker(world.book), world.dispatcher, events, world.book.clock)
        self._world = world

    def give(self, number: int, job: Job) -> None:
        book = self._world.book
        process, asked = book.processes[self], book.known[job]
        check_given(book, process, asked)
        if "memory" in book.short_of:
            asked.refused = True
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        super().give(number, job)
        book.give(self, number, job)

    def withdraw(self, number: int) -> None:
        self._world.book.withdraw(self, number)
        super().withdraw(number)


class WatchedDispatcher(Dispatcher):
    """A dispatcher whose dealings with shards are written down."""

    book: Book

    def serve(self, shard: Any) -> None:
        self.book.serve(shard)
        super().serve(shard)

    def retire(self, shard: Any) -> None:
        self.book.retire(shard)
        super().retire(shard)

    def answered(self, shard: Any, number: int, answer: Answer) -> str:
        worker = self.book.processes[shard].worker
        check(not worker.noticed, "8 nothing is taken from who has broken a rule", shard)
        self.book.answered(shard, number, answer)
        broken = super().answered(shard, number, answer)
        worker.noticed = worker.noticed or bool(broken)
        return broken

    def lost(self, shard: Any, loss: Loss) -> bool:
        if shard in self.book.processes:  # it was started
            self.book.lost(shard, loss)
        return super().lost(shard, loss)


class WatchedPool(Pool):
    """A pool whose shards are seen to become ready and to end."""

    world: World

    def shard_ready(self, shard: Shard) -> None:
        self.world.book.processes[shard].worker.introduced = True
        super().shard_ready(shard)
        self.world.spares.ready(self, self.world.book.processes[shard])

    def count(self, name: str) -> None:
        super().count(name)
        if name == "recycled":
            self.world.spares.recycled_at = self.world.book.now

    def shard_gone(self, shard: Shard, ending: Ending) -> None:
        generation = self._generation_of(shard)
        super().shard_gone(shard, ending)
        self.world.spares.gone(self, generation, shard)
