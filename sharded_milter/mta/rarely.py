"""Log lines that a peer can cause as often as it likes: each is written now and then. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

# Seconds between two lines about the same.
INTERVAL = 60.0

# Different things that have a line of their own in this time; all others share one. A peer may have
# as many addresses as it likes.
MOST = 64

_OTHERS = object()


class Rarely:
    """Writes the first line about each thing, and then one in INTERVAL at most.

    `write` is a method of a Logger, `clock` returns seconds.
    """

    def __init__(self, write: Callable[..., Any], clock: Callable[[], float]) -> None:
        self._write = write
        self._clock = clock
        self._said: dict[Hashable, float] = {}
        self._left_out: dict[Hashable, int] = {}

    def say(self, about: Hashable, line: str) -> None:
        """Writes the line, or counts it; the next one says how many were left out."""
        now = self._clock()
        if about not in self._said and len(self._said) >= MOST:
            self._forget(now)
            about = about if len(self._said) < MOST else _OTHERS
        if now - self._said.get(about, now - INTERVAL) < INTERVAL:
            self._left_out[about] = self._left_out.get(about, 0) + 1
            return
        self._said[about] = now
        left_out = self._left_out.pop(about, 0)
        if left_out:
            line += f" ({left_out} more such lines were left out)"
        self._write("{line}", line=line)

    def _forget(self, now: float) -> None:
        """What was said long ago."""
        for about, when in list(self._said.items()):
            if now - when >= INTERVAL:
                del self._said[about]
                self._left_out.pop(about, None)
