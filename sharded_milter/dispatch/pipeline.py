"""Turns: the jobs that one shard has been given and has not answered yet, in order. Pure.

A shard with short scans spends much of its time waiting for the master to hear of one and to send
the next. So it is given more while it does one, if nobody is idle: a second where a scan takes
some milliseconds, several where it takes a fraction of one, which then leave in one write. Where
one takes unexpectedly long, those behind it are given to somebody else.
"""

from __future__ import annotations

from collections import deque
from typing import Any

# Scans that take less than this on average are worth it, seconds: the gap between two jobs is a
# fraction of a millisecond.
SHORT = 0.015

# Scans that are shorter still: as many are given as take so long, seconds, together. A write costs
# both sides as much as the shortest scan; that of several jobs costs no more than that of one.
AHEAD = 0.004

# But not more than these: they are promised to one shard while another may become idle.
MAX_AHEAD = 7

# How much the latest scan counts in the average, and how many scans make one.
WEIGHT = 0.1
ENOUGH = 20

# A job that has waited for those before it for so long, seconds, is given to somebody else.
PATIENCE = 0.05


class Turn:
    """A job with one shard. `void` says that its answer does not matter any more."""

    __slots__ = ("job", "shard", "turns", "void")

    def __init__(self, job: Any, shard: Any, turns: Turns) -> None:
        self.job = job
        self.shard = shard
        self.turns = turns
        self.void = False


class Turns:
    """What one shard does and does next, and how long it takes; `now` is a clock's, in seconds."""

    __slots__ = ("_answered", "_average", "_since", "over", "turns")

    def __init__(self) -> None:
        self.turns: deque[Turn] = deque()
        self.over = False  # the worker is dead: who was not first is not to blame
        self._answered = 0
        self._average = 0.0
        self._since = 0.0  # when the first of them began

    def add(self, turn: Turn, now: float) -> None:
        """The shard has been given a job more."""
        if not self.turns:
            self._since = now
        self.turns.append(turn)

    def end(self, turn: Turn, now: float) -> None:
        """The shard has answered it, as it does in order."""
        self.turns.remove(turn)
        took = now - self._since
        self._since = now
        self._answered += 1
        weight = max(WEIGHT, 1 / self._answered)
        self._average += weight * (took - self._average)

    @property
    def take_one_more(self) -> bool:
        """Whether the shard may be given another job."""
        if not self.turns or self.over or self._answered < ENOUGH or self._average >= SHORT:
            return False
        ahead = AHEAD // self._average if self._average else MAX_AHEAD
        return len(self.turns) <= max(1, min(MAX_AHEAD, ahead))

    def is_first(self, turn: Turn) -> bool:
        """Whether the shard does this one now."""
        return bool(self.turns) and self.turns[0] is turn
