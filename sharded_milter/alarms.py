"""Alarms: what happens some time after something was said, unless it is unsaid before.

Deadlines are set for every job and nearly none of them comes. All that wait for the same time wait
in order, so one call of the reactor's is enough for them, and setting one costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Alarm(Generic[T]):
    """Calls `ring` with each item that was set `delay` seconds ago and not stopped since."""

    def __init__(self, reactor: Any, delay: float, ring: Callable[[T], object]) -> None:
        self._delay = delay
        self._reactor = reactor
        self._ring = ring
        self._due: dict[T, float] = {}  # in the order in which they ring
        self._call: Any = None  # stays when nothing is set any more, and then does nothing

    def __contains__(self, item: T) -> bool:
        """Whether it is to ring for the item."""
        return item in self._due

    def set(self, item: T) -> None:
        """It rings for the item, once; if it is set already, later than it would have."""
        self._due.pop(item, None)
        self._due[item] = self._reactor.seconds() + self._delay
        if self._call is None:
            self._call = self._reactor.callLater(self._delay, self._check)

    def stop(self, item: T) -> None:
        """It does not ring for the item."""
        self._due.pop(item, None)

    def _check(self) -> None:
        now = self._reactor.seconds()
        try:
            for item, due in list(takewhile(lambda pair: pair[1] <= now, self._due.items())):
                # One that rang before may have stopped it, or set it anew.
                if self._due.get(item) == due:
                    del self._due[item]
                    self._ring(item)
        finally:
            # Only now: what is set meanwhile must not delay those that are due before it.
            self._call = None
            first = next(iter(self._due.values()), None)
            if first is not None:
                self._call = self._reactor.callLater(max(0.0, first - now), self._check)
