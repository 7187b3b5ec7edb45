"""Log lines on standard error: for a terminal with time and level, for journald with its prefix."""

from __future__ import annotations

import atexit
import io
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from twisted.logger import (
    FilteringLogObserver,
    ILogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    PredicateResult,
    formatEvent,
    formatTime,
    globalLogBeginner,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from sharded_milter.ops.log_writer import LogWriter
from sharded_milter.protocol.text import printable

NAMESPACE = "sharded_milter"
LEVELS = ("debug", "info", "warn", "error")

# Stands for the lines about messages, which have no event of their own.
_MESSAGE: LogEvent = {"log_namespace": NAMESPACE, "log_level": LogLevel.info}

# Characters of a line: a worker's are shorter (pool/output), and an MTA's values could be 64 KB.
MAX_LINE = 16_384


# sd-daemon(3): the severities of syslog, which journald reads from "<N>" at the line's start.
_SYSLOG = {
    LogLevel.debug: 7,
    LogLevel.info: 6,
    LogLevel.warn: 4,
    LogLevel.error: 3,
    LogLevel.critical: 2,
}


class TextSink(Protocol):
    """Where lines go."""

    def write(self, text: str, /) -> object: ...


@implementer(ILogObserver)
class LineObserver:
    """TextSink each event as one line; a traceback follows as several.

    Whatever a message, a worker or an MTA says stays within its line (`printable`). Only the text
    of an event that `has_details` may be several, which are indented: none looks like an event.
    """

    def __init__(self, stream: TextSink, *, journald: bool) -> None:
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
        message = formatEvent(event).rstrip("\n")
        lines = []
        if "has_details" in event:
            message, *details = message.split("\n")
            lines = [f"    {printable(line)}" for line in details]
        elif "log_failure" in event:
            lines = _traceback(event["log_failure"])
        if message:
            lines = [printable(message), *lines]
        if lines:
            self._stream.write(
                self.text(event.get("log_level", LogLevel.info), event.get("log_time", 0.0), lines)
            )

    def message(self, line: str) -> None:
        """Write an info line of one message, past Twisted's logger: there are most of these."""
        self._stream.write(self.text(LogLevel.info, time.time(), [printable(line)]))

    def text(self, level: Any, when: float, lines: list[str]) -> str:
        """The lines of one event as they are written."""
        lines = [line if len(line) <= MAX_LINE else _cut(line) for line in lines]
        if self._journald:  # each line is an entry of its own
            prefix = f"<{_SYSLOG[level]}>"
            return "".join(f"{prefix}{line}\n" for line in lines)
        return f"{self._stamp(when)} {level.name:<5} " + "\n".join(lines) + "\n"


def _cut(line: str) -> str:
    return f"{line[:MAX_LINE]}... and {len(line) - MAX_LINE} characters more"


def _traceback(failure: Failure) -> list[str]:
    """The lines of a traceback; the exception's own words are one of them."""
    text = failure.getTraceback().rstrip("\n")
    words = failure.getErrorMessage().rstrip("\n")
    if words and text.endswith(words):
        text = text.removesuffix(words) + printable(words)
    return [printable(line) for line in text.split("\n")]


class LineSink:
    """Takes whole lines, which are escaped already."""

    def __init__(self, writer: LogWriter, encoding: str) -> None:
        self.writer = writer
        self.encoding = encoding

    def write(self, text: str, /) -> None:
        self.writer.write(text.encode(self.encoding, "backslashreplace"))


class LogStream(io.TextIOBase):
    """Standard error once the log has begun: it takes text, whatever that is, as lines."""

    def __init__(self, lines: LineSink, descriptor: int) -> None:
        self.message_log: Callable[[str], None] | None = None  # where the level has such lines
        self._lines = lines
        self._descriptor = descriptor
        self._rest = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # an attribute that typeshed lets be set
        return self._lines.encoding

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, text: str, /) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > MAX_LINE:
            lines, self._rest = [*lines, self._rest], ""
        if lines:
            self._lines.write("".join(f"{printable(line)}\n" for line in lines))
        return len(text)

    def end(self) -> None:
        """TextSink what lacks its line's end, and gives what still waits a moment."""
        if self._rest:
            self.write("\n")
        self._lines.writer.close()


def begin(level: str, environ: Mapping[str, str] = os.environ) -> None:
    """Sends what we log from `level` on, and others' warnings, to standard error from now on.

    That waits for no reader from then on, whoever writes to it: what it does not take is dropped
    and counted. At the exit of the process what still waits gets END_GRACE.
    """
    predicate = LogLevelFilterPredicate(defaultLogLevel=LogLevel.warn)
    predicate.setLogLevelForNamespace(NAMESPACE, LogLevel.levelWithName(level))
    # Without a standard error its number may be a connection's by now.
    there = sys.stderr is not None
    descriptor = sys.stderr.fileno() if there else os.open(os.devnull, os.O_WRONLY)
    encoding = sys.stderr.encoding if there else "utf-8"

    def notice(dropped: int) -> bytes:
        said = f"{dropped} log lines were dropped: standard error did not take them"
        return observer.text(LogLevel.warn, time.time(), [said]).encode(encoding)

    lines = LineSink(LogWriter(descriptor, notice), encoding)
    stream = LogStream(lines, descriptor)
    atexit.register(finish)
    sys.stderr = stream
    observer = LineObserver(lines, journald="JOURNAL_STREAM" in environ)
    if predicate(_MESSAGE) is not PredicateResult.no:
        stream.message_log = observer.message
    globalLogBeginner.beginLoggingTo(
        [FilteringLogObserver(observer, [predicate])], redirectStandardIO=False
    )


def message_log() -> Callable[[str], None] | None:
    """Return what writes the line about a message; None where the log has no such lines."""
    return sys.stderr.message_log if isinstance(sys.stderr, LogStream) else None


def finish() -> None:
    """Gives the lines that still wait END_GRACE; for a process that ends now."""
    if isinstance(sys.stderr, LogStream):
        sys.stderr.end()
