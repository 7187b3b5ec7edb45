"""The ideal queue, beside which `simulate` puts the real dispatch."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.simulated_time import HOP, Clock, Processor, Question


class Ideal:
    """One queue by age, from which each worker takes its next job without a gap.

    Nobody knows how long a scan will take. Each job passes the master and the way to and from the
    workers, which costs it time, but costs no worker any. With objects each worker has a queue of
    its own, and a connection belongs to the worker that has the fewest.
    """

    def __init__(self, shards: int, *, objects: bool = False) -> None:
        self.clock = Clock()
        self._processor = Processor(self.clock)
        self._queues = [_Waiting(1) for _ in range(shards)] if objects else [_Waiting(shards)]
        self._holders: dict[int, _Waiting] = {}  # of connections

    def ask(self, question: Question, done: Callable[[Question], object]) -> None:
        """Answers it once, by `done`."""
        queue = self._holders.get(question.conversation)
        if queue is None:
            queue = min(self._queues, key=lambda each: each.connections)
            queue.connections += 1
            self._holders[question.conversation] = queue
        self._processor.take(None, self.clock.callLater, HOP, self._arrive, queue, question, done)

    def end(self, conversation: int) -> None:
        """The connection is over."""
        self._holders.pop(conversation).connections -= 1

    def _arrive(
        self, queue: _Waiting, question: Question, done: Callable[[Question], object]
    ) -> None:
        heapq.heappush(queue.jobs, (question.age, question.serial, question, done))
        if queue.idle:
            queue.idle -= 1
            self._next(queue)

    def _next(self, queue: _Waiting) -> None:
        _, _, question, done = heapq.heappop(queue.jobs)
        self.clock.callLater(question.scan, self._scanned, queue, question, done)

    def _scanned(
        self, queue: _Waiting, question: Question, done: Callable[[Question], object]
    ) -> None:
        self.clock.callLater(HOP, self._processor.take, None, done, question)
        if queue.jobs:
            self._next(queue)
        else:
            queue.idle += 1


@dataclass(eq=False)
class _Waiting:
    """A queue of the ideal kind: jobs by age, and how many workers are idle."""

    idle: int
    jobs: list[tuple[float, int, Question, Callable[[Question], object]]] = field(
        default_factory=list
    )
    connections: int = 0
