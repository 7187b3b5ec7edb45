"""What one message may cost: every limit of the scanner with its reason, and what is left of it.

The law: work is bounded by these numbers and by the size of the message, whatever its content
says about itself. Sizes, counts and offsets in files are claims; only what was produced counts.
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
# What one archive may produce for each of its bytes. Text and tables reach 50; Apache POI stops
# at 100, amavis at 500; DEFLATE ends at 1032.
MAX_RATIO = 200
# Below this a high ratio harms nobody (an empty sheet, a small bitmap); POI's grace is 100 KB.
RATIO_GRACE = MIB
# MIME entities of one message: a digest or a bounce has dozens. Postfix sets no such limit.
MAX_MIME_PARTS = 1_000
# MIME entities inside entities. Postfix's mime_nesting_limit is 100.
MAX_MIME_DEPTH = 100
# The whole message; ClamAV's MaxScanTime is 120. The master warns at 192 s and kills at 240 s
# (--eom-deadline), Postfix waits for 300 s.
MESSAGE_SECONDS = 60
# One part under one set of rules: YARA-X reads 50 MB and more a second, so only a runaway rule
# needs that long.
PART_SECONDS = 20
# A header field that MIME is read from. The stdlib splits parameters in quadratic time (4 KiB:
# 25 ms, 64 KiB: 6 s); a file name of 255 CJK characters in RFC 2231 is 2.3 KB.
MAX_FIELD = 4 * KIB
# Fields that MIME is read from, for each entity: honest ones have five at most.
MAX_FIELDS = 32
# A file name as rules see it. Only its end matters, and file systems stop at 255.
MAX_NAME = KIB


class LimitReached(Exception):
    """An archive or the MIME tree would cost more than its limit; the rest of it stays closed."""


class OutOfTime(Exception):
    """The message has used up its seconds; nothing more of it is looked at."""


@dataclass(frozen=True, slots=True)
class ScanLimits:
    """The numbers above as one value, so that a test can make each of them small."""

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
    """What one message may still spend of its limits."""

    def __init__(self, limits: ScanLimits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._clock = clock
        self._deadline = clock() + limits.message_seconds
        self._opened = 0
        self._members = 0

    def check_time(self) -> None:
        """Raise `OutOfTime` once the message's seconds are over."""
        if self._clock() >= self._deadline:
            raise OutOfTime(f"message took {self.limits.message_seconds} s; its scan ends here")

    def part_seconds(self) -> int:
        """Whole seconds, at least 1, that the rules may spend on the next part."""
        return max(1, min(self.limits.part_seconds, int(self._deadline - self._clock())))

    def spend_member(self) -> None:
        """Count one archive member."""
        self.check_time()
        self._members += 1
        if self._members > self.limits.members:
            raise LimitReached(f"more than {self.limits.members} archive members")

    def spend_bytes(self, size: int) -> None:
        """Count bytes that were decoded or unpacked and are kept for a while."""
        self.check_time()
        self._opened += size
        if self._opened > self.limits.opened:
            raise LimitReached(f"more than {self.limits.opened} bytes opened")
