"""A worker's standard output and error: lines for the log, within limits.

A worker that has read hostile mail may write without end. Output beyond the limits of a second is
dropped, and one line says how much when the second is over. It is read all the same, because a
milter that prints must not be blocked; only one that writes more than MAX_READ is.
"""

from __future__ import annotations

from collections.abc import Callable

from sharded_milter.alarms import DelayedCall, ReactorTime
from sharded_milter.pool.places import PlaceOwner

# Bytes of a line that are logged: a long line of a traceback has some hundreds.
MAX_LOG_LINE = 8192

# Lines and bytes of one worker that are logged in a second. The stacks of a worker with dozens of
# threads are some hundred lines. Each line costs the master about 70 us, so a worker that writes
# without end uses less than a tenth of a core.
MAX_LINES = 1000
MAX_BYTES = 256 * 1024

# Bytes that are read in a second, logged or not: some hundred reads, a hundredth of a core.
MAX_READ = 4 * 1024 * 1024

SECOND = 1.0


class Output:
    """Splits the output of one worker into lines for its owner.

    `hold` is called with True when nothing more should be read in this second, and with False
    when the second is over.
    """

    def __init__(
        self, owner: PlaceOwner, hold: Callable[[bool], None], reactor: ReactorTime
    ) -> None:
        self.held = False
        self._owner = owner
        self._hold = hold
        self._reactor = reactor
        self._began: dict[int, bytes] = {}  # incomplete lines, by stream
        self._cut: set[int] = set()  # streams that are inside a line which was too long
        self._over_call: DelayedCall | None = (
            None  # while there is something to say at the second's end
        )
        self._new_second(reactor.seconds())

    def feed(self, stream: int, data: bytes) -> None:
        """Take data that was written to a stream."""
        now = self._reactor.seconds()
        if self._over_call is None and now - self._second >= SECOND:
            self._new_second(now)
        self._read += len(data)
        if stream in self._cut:
            skipped, end, data = data.partition(b"\n")
            self._dropped_bytes += len(skipped)
            if end:
                self._cut.discard(stream)
        self._take_lines(stream, self._began.pop(stream, b"") + data)
        if self._read > MAX_READ and not self.held:
            self.held = True
            self._hold(True)
        if (self.held or self._dropped_bytes) and self._over_call is None:
            rest = max(0.0, self._second + SECOND - now)
            self._over_call = self._reactor.callLater(rest, self._over)

    def end(self) -> None:
        """Log the incomplete lines: the worker has exited."""
        for line in self._began.values():
            self._take(line)
        self._began.clear()
        if self._over_call is not None:
            self._over_call.cancel()
            self._over()

    def _take_lines(self, stream: int, data: bytes) -> None:
        *lines, rest = data.split(b"\n", self._lines)  # no more than may be logged
        for line in lines:
            self._take(line)
        unseen, end, rest = rest.rpartition(b"\n")
        if end:
            self._drop(unseen.count(b"\n") + 1, len(unseen) + 1)
        if len(rest) > MAX_LOG_LINE:
            self._take(rest)
            self._cut.add(stream)
        elif rest:
            self._began[stream] = rest

    def _take(self, line: bytes) -> None:
        shown = line[:MAX_LOG_LINE]
        if not self._lines or len(shown) > self._bytes:
            self._drop(1, len(line) + 1)
            return
        self._lines -= 1
        self._bytes -= len(shown) + 1
        self._dropped_bytes += len(line) - len(shown)
        self._owner.output(shown)

    def _drop(self, lines: int, size: int) -> None:
        self._dropped_lines += lines
        self._dropped_bytes += size

    def _over(self) -> None:
        """Report what was dropped in the second that is over, and begin a new one."""
        self._over_call = None
        if self._dropped_bytes:
            self._owner.output_dropped(self._dropped_lines, self._dropped_bytes)
        self._new_second(self._reactor.seconds())
        if self.held:
            self.held = False
            self._hold(False)

    def _new_second(self, now: float) -> None:
        self._second = now
        self._lines, self._bytes, self._read = MAX_LINES, MAX_BYTES, 0
        self._dropped_lines = self._dropped_bytes = 0
