"""Log lines on standard error: with time and level, or for journald with its severity prefix."""

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

# An event like those of the lines about messages, which are written without an event.
_MESSAGE: LogEvent = {"log_namespace": NAMESPACE, "log_level": LogLevel.info}

# Characters of a line. Values from an MTA can have 64 KB; worker lines are shorter (pool/output).
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
    """An object that takes text, one or more whole lines at a time."""

    def write(self, text: str, /) -> object: ...


@implementer(ILogObserver)
class LineObserver:
    """Writes each event as one line, with a traceback in further lines.

    Text from a message, a worker or an MTA cannot begin a line of its own: `printable` escapes line
    breaks. Only an event with `has_details` may have more lines; these are indented, so that none
    looks like an event.
    """

    def __init__(self, stream: TextSink, *, journald: bool) -> None:
        self._stream = stream
        self._journald = journald
        self._second = -1
        self._text = ""

    def _stamp(self, when: float) -> str:
        """Return the time, to the second, as text; it is kept for the next lines."""
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
        """Write the info line about a message, without Twisted's logger: most lines are these."""
        self._stream.write(self.text(LogLevel.info, time.time(), [printable(line)]))

    def text(self, level: Any, when: float, lines: list[str]) -> str:
        """Return the lines of one event with their prefixes."""
        lines = [line if len(line) <= MAX_LINE else _cut(line) for line in lines]
        if self._journald:  # each line is an entry of its own
            prefix = f"<{_SYSLOG[level]}>"
            return "".join(f"{prefix}{line}\n" for line in lines)
        return f"{self._stamp(when)} {level.name:<5} " + "\n".join(lines) + "\n"


def _cut(line: str) -> str:
    return f"{line[:MAX_LINE]}... ({len(line) - MAX_LINE} more characters)"


def _traceback(failure: Failure) -> list[str]:
    """Return the lines of a traceback; the exception's message is one line."""
    text = failure.getTraceback().rstrip("\n")
    words = failure.getErrorMessage().rstrip("\n")
    if words and text.endswith(words):
        text = text.removesuffix(words) + printable(words)
    return [printable(line) for line in text.split("\n")]


class LineSink:
    """Takes whole lines that are already escaped."""

    def __init__(self, writer: LogWriter, encoding: str) -> None:
        self.writer = writer
        self.encoding = encoding

    def write(self, text: str, /) -> None:
        self.writer.write(text.encode(self.encoding, "backslashreplace"))


class LogStream(io.TextIOBase):
    """Replaces `sys.stderr`: text that is written to it is escaped and logged line by line."""

    def __init__(self, lines: LineSink, descriptor: int) -> None:
        self.message_log: Callable[[str], None] | None = None  # None if the level has no such lines
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
        """Write an incomplete last line, and wait up to END_GRACE for the buffer to be written."""
        if self._rest:
            self.write("\n")
        self._lines.writer.close()


def begin(level: str, environ: Mapping[str, str] = os.environ) -> None:
    """Begin to log: our events from `level` on, and warnings of other packages, to standard error.

    From then on no write to `sys.stderr` blocks: lines that its reader does not take are dropped
    and counted. When the process ends, buffered lines have END_GRACE seconds to be written.
    """
    predicate = LogLevelFilterPredicate(defaultLogLevel=LogLevel.warn)
    predicate.setLogLevelForNamespace(NAMESPACE, LogLevel.levelWithName(level))
    # If standard error was closed, its descriptor number may be that of a connection by now.
    there = sys.stderr is not None
    descriptor = sys.stderr.fileno() if there else os.open(os.devnull, os.O_WRONLY)
    encoding = sys.stderr.encoding if there else "utf-8"

    def notice(dropped: int) -> bytes:
        line = f"{dropped} log lines were dropped: standard error did not take them"
        return observer.text(LogLevel.warn, time.time(), [line]).encode(encoding)

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
    """Return the function that writes the line about a message; None if it is not logged."""
    return sys.stderr.message_log if isinstance(sys.stderr, LogStream) else None


def finish() -> None:
    """Write the buffered lines before the process ends, in at most END_GRACE seconds."""
    if isinstance(sys.stderr, LogStream):
        sys.stderr.end()
