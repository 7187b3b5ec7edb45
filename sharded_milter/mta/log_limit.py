"""A limit for log lines that a peer can cause as often as it likes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

# Seconds between two lines about the same topic.
INTERVAL = 60.0

# Topics that have lines of their own within INTERVAL; all others share one topic. A peer may have
# any number of addresses.
MAX_TOPICS = 64

_OTHERS = object()


class LimitedLog:
    """Logs the first line about each topic, and after that at most one in INTERVAL.

    `log` is a method of a Logger; `clock` returns seconds.
    """

    def __init__(self, log: Callable[..., Any], clock: Callable[[], float]) -> None:
        self._log = log
        self._clock = clock
        self._written: dict[Hashable, float] = {}  # the time of the last line about each topic
        self._left_out: dict[Hashable, int] = {}

    def write(self, topic: Hashable, line: str) -> None:
        """Log the line, or count it; the next line has the number of those left out."""
        now = self._clock()
        if topic not in self._written and len(self._written) >= MAX_TOPICS:
            self._forget_old(now)
            topic = topic if len(self._written) < MAX_TOPICS else _OTHERS
        if now - self._written.get(topic, now - INTERVAL) < INTERVAL:
            self._left_out[topic] = self._left_out.get(topic, 0) + 1
            return
        self._written[topic] = now
        left_out = self._left_out.pop(topic, 0)
        if left_out:
            line += f" ({left_out} more such lines were left out)"
        self._log("{line}", line=line)

    def _forget_old(self, now: float) -> None:
        """Forget topics whose last line is older than INTERVAL."""
        for topic, when in list(self._written.items()):
            if now - when >= INTERVAL:
                del self._written[topic]
                self._left_out.pop(topic, None)
