"""What `simulate` runs on: questions, simulated time, and the master's processor."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sharded_milter.dispatch.queue import LIGHT_HEAD_START
from sharded_milter.protocol.stages import Stage

# Seconds of the master's processor for each message that it takes, a question or an answer, and
# what follows from it. It takes one after the other.
MASTER_CPU = 60e-6

# Seconds on the way from one process to another, awaking included.
HOP = 100e-6


@dataclass(eq=False, slots=True)
class Question:
    """A job as the load has it, and what became of it; times are seconds."""

    serial: int
    conversation: int
    message: int  # what all jobs of a message have in common
    stage: Stage
    scan: float
    light: bool = False
    key: bytes = b""
    deaths: int = 0  # so many scans of it end with the worker's death
    born: float = 0.0
    asked: float = 0.0
    finished: float = 0.0
    answers: int = 0  # that came, be it a failure
    failed: bool = False

    @property
    def age(self) -> float:
        """What orders the queue."""
        return self.born - LIGHT_HEAD_START if self.light else self.born

    @property
    def wait(self) -> float:
        """All time until its answer but for the scan itself."""
        return self.finished - self.asked - self.scan


class System(Protocol):
    """What a load asks: the real master, or the ideal queue."""

    clock: Clock

    def ask(self, question: Question, done: Callable[[Question], object]) -> None:
        """Answers it once, by `done`."""

    def end(self, conversation: int) -> None:
        """The connection is over."""


class Call:
    """What is due; as much of a delayed call as the package uses."""

    __slots__ = ("_arguments", "_function")

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._function: Callable[..., object] | None = function
        self._arguments = arguments

    def active(self) -> bool:
        """Whether it is still to come."""
        return self._function is not None

    def cancel(self) -> None:
        """It is not to come."""
        self._function = None

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function(*self._arguments)


class Clock:
    """Simulated time: as much of a reactor as the package uses."""

    def __init__(self) -> None:
        self._now = 0.0
        self._due: list[tuple[float, int, Call]] = []
        self._numbers = itertools.count()

    def seconds(self) -> float:
        """The time now."""
        return self._now

    def callLater(self, delay: float, function: Callable[..., object], *arguments: Any) -> Call:
        """Calls the function after so many seconds; at the same time in the order of the calls."""
        call = Call(function, arguments)
        heapq.heappush(self._due, (self._now + delay, next(self._numbers), call))
        return call

    def run(self, until: Callable[[], bool]) -> None:
        """Lets time pass."""
        while not until():
            self._now, _, call = heapq.heappop(self._due)
            call()


class Processor:
    """The master's: one message after the other, whoever has sent it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: deque[tuple[object, Callable[..., object], tuple[Any, ...]]] = deque()
        self._current: tuple[object, Callable[..., object], tuple[Any, ...]] | None = None
        self._busy = False
        self._debt = 0.0  # seconds that it has used in advance

    def take(self, sender: object, function: Callable[..., object], *arguments: Any) -> None:
        """A message has arrived, which leads to that call."""
        self._waiting.append((sender, function, arguments))
        if not self._busy:
            self._busy = True
            self._next()

    def _next(self) -> None:
        self._current = self._waiting.popleft()
        self._clock.callLater(MASTER_CPU + self._debt, self._done)
        self._debt = 0.0

    def _done(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            current[1](*current[2])
        if self._waiting:
            self._next()
        else:
            self._busy = False

    def catch_up(self, sender: object) -> None:
        """Takes all that has arrived from that sender now, before its turn."""
        found = [entry for entry in self._waiting if entry[0] is sender]
        for entry in found:
            self._waiting.remove(entry)
            self._debt += MASTER_CPU
        if self._current is not None and self._current[0] is sender:
            found.insert(0, self._current)
            self._current = None
        for _, function, arguments in found:
            function(*arguments)
