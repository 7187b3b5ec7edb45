"""The limits of the scanner for one message, each with its reason, and the budget that is left.

The work for a message is limited by these numbers and by its size, never by what its content says.
Sizes, counts and offsets in files are not trusted; only bytes that were produced are counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB

# Opened data of one message, over all its archives. ClamAV's MaxScanSize is 400 MB; a mail of
# 25 MB that unpacks tenfold still fits, and a worker that holds all of it at once survives.
MAX_OPENED = 256 * MIB
# Members of all archives of one message. ClamAV's MaxFiles is 10000.
MAX_MEMBERS = 10_000
# Archives inside archives. A .docx in a .tar.gz in a .zip is 4; amavis stops at 14, ClamAV at 17.
MAX_ARCHIVE_DEPTH = 8
# Bytes that one archive may produce for each of its bytes. Text and tables reach 50; Apache POI
# stops at 100, amavis at 500; the maximum of DEFLATE is 1032.
MAX_RATIO = 200
# Bytes of output below which the ratio is not checked (an empty sheet, a small bitmap). POI's
# value is 100 KB.
RATIO_GRACE = MIB
# MIME entities of one message: a digest or a bounce has dozens. Postfix sets no such limit.
MAX_MIME_PARTS = 1_000
# MIME entities inside entities. Postfix's mime_nesting_limit is 100.
MAX_MIME_DEPTH = 100
# Seconds for the whole message; ClamAV's MaxScanTime is 120. The master logs the stacks at 192 s
# and kills at 240 s (--eom-deadline), Postfix waits for 300 s.
MESSAGE_SECONDS = 60
# Seconds for one part and one set of rules. YARA-X reads at least 50 MB per second, so only a bad
# rule needs longer.
PART_SECONDS = 20
# Bytes of a header field that MIME uses. The standard library splits parameters in quadratic time
# (4 KiB: 25 ms, 64 KiB: 6 s); a file name of 255 CJK characters in RFC 2231 is 2.3 KB.
MAX_FIELD = 4 * KIB
# Header fields that MIME uses, for each entity; usual entities have at most five.
MAX_FIELDS = 32
# Characters of a file name that rules get: its last ones. File systems allow 255.
MAX_NAME = KIB


class LimitReached(Exception):
    """An archive or the MIME tree has reached a limit; the rest of it is not opened."""


class OutOfTime(Exception):
    """The message has used all its seconds; the rest of it is not scanned."""


@dataclass(frozen=True, slots=True)
class ScanLimits:
    """The limits as one value, so that tests can make each of them small."""

    opened: int = MAX_OPENED
    members: int = MAX_MEMBERS
    archive_depth: int = MAX_ARCHIVE_DEPTH
    ratio: int = MAX_RATIO
    ratio_grace: int = RATIO_GRACE
    mime_parts: int = MAX_MIME_PARTS
    mime_depth: int = MAX_MIME_DEPTH
    message_seconds: float = MESSAGE_SECONDS
    part_seconds: int = PART_SECONDS


DEFAULTS = ScanLimits()


class Budget:
    """The rest of the limits that one message may still use."""

    def __init__(self, limits: ScanLimits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._clock = clock
        self._deadline = clock() + limits.message_seconds
        self._opened = 0
        self._members = 0

    def check_time(self) -> None:
        """Raise OutOfTime if the message has used all its seconds."""
        if self._clock() >= self._deadline:
            raise OutOfTime(f"the scan of the message exceeds {self.limits.message_seconds} s")

    def part_seconds(self) -> int:
        """Return the seconds, whole and at least 1, that rules may use for the next part."""
        return max(1, min(self.limits.part_seconds, int(self._deadline - self._clock())))

    def spend_member(self) -> None:
        """Count one archive member; raise LimitReached or OutOfTime."""
        self.check_time()
        self._members += 1
        if self._members > self.limits.members:
            raise LimitReached(f"there are more than {self.limits.members} archive members")

    def spend_bytes(self, size: int) -> None:
        """Count bytes that were decoded or unpacked; raise LimitReached or OutOfTime."""
        self.check_time()
        self._opened += size
        if self._opened > self.limits.opened:
            raise LimitReached(f"more than {self.limits.opened} bytes were unpacked")
