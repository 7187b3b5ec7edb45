"""Alarms: many timeouts with one shared delay.

Jobs have deadlines that are nearly always stopped in time. Items with the same delay expire in the
order in which they were set, so one delayed call of the reactor serves all of them, and setting an
alarm is cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class DelayedCall(Protocol):
    """Twisted's IDelayedCall."""

    def active(self) -> bool: ...
    def cancel(self) -> None: ...
    def reset(self, secondsFromNow: float, /) -> None: ...


class ReactorTime(Protocol):
    """Twisted's IReactorTime, as far as it is used here."""

    def seconds(self) -> float: ...
    def callLater(
        self, delay: float, callable: Callable[..., object], /, *args: Any
    ) -> DelayedCall: ...


class Alarm(Generic[T]):
    """Calls `ring(item)` `delay` seconds after `set(item)`, unless the item is stopped before."""

    def __init__(self, reactor: ReactorTime, delay: float, ring: Callable[[T], object]) -> None:
        self._delay = delay
        self._reactor = reactor
        self._ring = ring
        self._due: dict[T, float] = {}  # in the order in which they are due
        self._call: DelayedCall | None = None  # not cancelled when the last item is stopped

    def __contains__(self, item: T) -> bool:
        """Return True if the item is set."""
        return item in self._due

    def set(self, item: T) -> None:
        """Set the item to ring once, after the delay; if it is set already, restart its delay."""
        self._due.pop(item, None)
        self._due[item] = self._reactor.seconds() + self._delay
        if self._call is None:
            self._call = self._reactor.callLater(self._delay, self._check)

    def stop(self, item: T) -> None:
        """Remove the item if it is set."""
        self._due.pop(item, None)

    def _check(self) -> None:
        now = self._reactor.seconds()
        try:
            for item, due in list(takewhile(lambda pair: pair[1] <= now, self._due.items())):
                # An item that rang before may have stopped this one, or set it anew.
                if self._due.get(item) == due:
                    del self._due[item]
                    self._ring(item)
        finally:
            # Only now: an item that is set by `ring` must not delay those that are due before it.
            self._call = None
            first = next(iter(self._due.values()), None)
            if first is not None:
                self._call = self._reactor.callLater(max(0.0, first - now), self._check)
