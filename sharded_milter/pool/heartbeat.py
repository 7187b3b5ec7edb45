"""The heartbeat of one worker: an idle worker must answer pings, and none may be stopped. Pure.

The pool checks it once a second. Checks are counted, not seconds: a master that has slept checks
once when it wakes, after it has read what its workers have sent. A busy worker is not pinged,
because deadlines limit its time.
"""

from __future__ import annotations

from enum import Enum, auto

# Checks, one a second, of a silent idle worker before it is pinged, and checks without an answer to
# the ping: the time that a milter's timers and threads may block the worker's reactor.
PING_AFTER = 5
PING_TIMEOUT = 5

# Checks that find a process stopped before it is killed: one that was stopped for a moment only has
# been continued by then.
STOPPED_TIMEOUT = 2


class Pulse(Enum):
    """The result of a check."""

    FINE = auto()
    PING_DUE = auto()
    STOPPED = auto()  # it was stopped by a signal
    UNRESPONSIVE = auto()  # it has not answered the ping


class Heartbeat:
    """Counts the checks of a worker since it last sent something."""

    __slots__ = ("_checks", "_stopped", "awaits_pong", "is_quiet")

    def __init__(self) -> None:
        self.awaits_pong = False  # a ping is not answered yet; there is one at most
        self.is_quiet = False  # nothing received since the last check, and no ping is open
        self._checks = 0  # since it was pinged, or has sent something
        self._stopped = 0

    def reset(self) -> None:
        """Count from zero: the worker has answered a question."""
        self._checks, self.is_quiet = 0, False

    def ping_sent(self) -> None:
        """Record that a ping was sent."""
        self.awaits_pong = True
        self.reset()

    def pong_received(self) -> None:
        """Record that the ping was answered."""
        self.awaits_pong = False
        self.reset()

    def check(self, *, idle: bool, stopped: bool) -> Pulse:
        """Count one check and return its result."""
        self._stopped = self._stopped + 1 if stopped else 0
        if self._stopped >= STOPPED_TIMEOUT:
            return Pulse.STOPPED
        self._checks += 1
        self.is_quiet = not self.awaits_pong
        if self.awaits_pong:
            return Pulse.UNRESPONSIVE if self._checks > PING_TIMEOUT else Pulse.FINE
        return Pulse.PING_DUE if idle and self._checks >= PING_AFTER else Pulse.FINE
