"""The heartbeat of one worker: whether it still runs, and listens while it has nothing to do. Pure.

It is looked at once a second. Looks are counted, not seconds: a master that has slept looks once
when it wakes, and reads what its workers have said meanwhile before that. A busy worker is asked
nothing: how long it may take is for deadlines to say.
"""

from __future__ import annotations

from enum import Enum, auto

# Looks at an idle worker that says nothing until it is pinged, and from then on without an answer:
# seconds in which a milter's own timers and threads may keep the loop of the worker busy.
SILENT = 5
DEAF = 5

# Looks that find a process stopped: whoever stops one for a moment has continued it by then.
STOPPED = 2


class Pulse(Enum):
    """What a look finds."""

    FINE = auto()
    SILENT = auto()  # it is to be pinged
    STOPPED = auto()  # it was stopped by a signal
    DEAF = auto()  # it has not answered the ping


class Heartbeat:
    """Counts looks at a worker."""

    __slots__ = ("_looks", "_stopped", "is_asked", "is_quiet")

    def __init__(self) -> None:
        self.is_asked = False  # a ping is not answered yet; there is one at most
        self.is_quiet = False  # it has said nothing since the last look, and is not asked
        self._looks = 0  # since it was asked, or has said something
        self._stopped = 0

    def heard(self) -> None:
        """It has answered a question."""
        self._looks, self.is_quiet = 0, False

    def asked(self) -> None:
        """It is pinged."""
        self.is_asked = True
        self.heard()

    def answered(self) -> None:
        """It has answered the ping."""
        self.is_asked = False
        self.heard()

    def look(self, *, idle: bool, stopped: bool) -> Pulse:
        """What is to be done about it now."""
        self._stopped = self._stopped + 1 if stopped else 0
        if self._stopped >= STOPPED:
            return Pulse.STOPPED
        self._looks += 1
        self.is_quiet = not self.is_asked
        if self.is_asked:
            return Pulse.DEAF if self._looks > DEAF else Pulse.FINE
        return Pulse.SILENT if idle and self._looks >= SILENT else Pulse.FINE
