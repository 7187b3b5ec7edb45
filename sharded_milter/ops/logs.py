"""Log lines on standard error: for a terminal with time and level, for journald with its prefix."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TextIO

from twisted.logger import (
    FilteringLogObserver,
    ILogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    formatEvent,
    formatEventAsClassicLogText,
    formatTime,
    globalLogBeginner,
)
from zope.interface import implementer

OURS = "sharded_milter"
LEVELS = ("debug", "info", "warn", "error")


def takes(level: str, what: str) -> bool:
    """Whether a log of a level has lines of another."""
    return LEVELS.index(level) <= LEVELS.index(what)


# sd-daemon(3): the severities of syslog, which journald reads from "<N>" at the line's start.
_SYSLOG = {
    LogLevel.debug: 7,
    LogLevel.info: 6,
    LogLevel.warn: 4,
    LogLevel.error: 3,
    LogLevel.critical: 2,
}


@implementer(ILogObserver)
class LineObserver:
    """Writes each event as one line or, with a traceback, as several."""

    def __init__(self, stream: TextIO, *, journald: bool) -> None:
        self._stream = stream
        self._journald = journald
        self._second = -1
        self._text = ""

    def _stamp(self, when: float) -> str:
        """The time to the second, which is the same for many lines."""
        second = int(when)
        if second != self._second:
            self._second, self._text = second, formatTime(second)
        return self._text

    def __call__(self, event: LogEvent) -> None:
        message = _with_traceback(event) if "log_failure" in event else formatEvent(event)
        message = message.rstrip("\n")
        if not message:
            return
        level = event.get("log_level", LogLevel.info)
        if self._journald:
            prefix = f"<{_SYSLOG[level]}>"
            message = message.replace("\n", "\n" + prefix)  # each line is an entry of its own
        else:
            prefix = f"{self._stamp(event['log_time'])} {level.name:<5} "
        self._stream.write(prefix + message + "\n")
        self._stream.flush()


def _with_traceback(event: LogEvent) -> str:
    # The classic text is "time [system] message" with tabs before continuation lines.
    text = formatEventAsClassicLogText(event, formatTime=lambda _: "") or ""
    return text.partition("] ")[2].replace("\n\t", "\n")


def begin(level: str, environ: Mapping[str, str] = os.environ) -> None:
    """Sends what we log from `level` on, and others' warnings, to standard error from now on."""
    predicate = LogLevelFilterPredicate(defaultLogLevel=LogLevel.warn)
    predicate.setLogLevelForNamespace(OURS, LogLevel.levelWithName(level))
    observer = LineObserver(sys.stderr, journald="JOURNAL_STREAM" in environ)
    globalLogBeginner.beginLoggingTo(
        [FilteringLogObserver(observer, [predicate])], redirectStandardIO=False
    )
