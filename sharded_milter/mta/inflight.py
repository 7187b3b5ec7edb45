"""The number of bytes in flight, over all connections. Pure.

Each piece of data has a claim. All that refer to the data refer to its claim too: the transcript,
the job made from it, the attempt that runs it. The bytes count until the last of them drops the
claim.
"""

from __future__ import annotations

# Bytes up to which an answer is given even if there is no room for it, because it is soon read.
SMALL_ANSWER = 16_384


class Inflight:
    """Counts the bytes that are held for MTAs, up to a limit."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def has_room(self, size: int) -> bool:
        """Return True if `size` more bytes fit into the limit."""
        return self.used + size <= self.limit

    def claim(self, size: int) -> Claim | None:
        """Return a claim of `size` bytes; None if there is no room for them."""
        claim = Claim(self)
        return claim if claim.grow(size) else None


class Claim:
    """Held bytes; they count as long as the claim is referred to."""

    __slots__ = ("_inflight", "size")

    def __init__(self, inflight: Inflight, size: int = 0) -> None:
        """Count `size` bytes, which are held already, even above the limit."""
        self._inflight = inflight
        self.size = size
        inflight.used += size

    def grow(self, size: int) -> bool:
        """Count `size` more bytes and return True; return False if there is no room."""
        inflight = self._inflight
        if inflight.used + size > inflight.limit:
            return False
        inflight.used += size
        self.size += size
        return True

    def set(self, size: int) -> None:
        """Count `size` bytes from now on, even above the limit."""
        self._inflight.used += size - self.size
        self.size = size

    def __del__(self) -> None:
        self._inflight.used -= self.size
