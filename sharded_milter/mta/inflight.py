"""How many bytes are in hand, over all connections. Pure.

Each piece that is held has a claim, which its holders keep beside it: the transcript, the job made
of it, the shard that is at work on it. The piece counts for as long as one of them has the claim.
"""

from __future__ import annotations

# Bytes of an answer that is given even where there is no room for it; it is soon read.
SMALL_ANSWER = 16_384


class Inflight:
    """Counts what is held for MTAs, in bytes, up to a limit."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more may be held."""
        return self.used + size <= self.limit

    def claim(self, size: int) -> Claim | None:
        """A claim of so many bytes; None where there is no room for them."""
        claim = Claim(self)
        return claim if claim.grow(size) else None


class Claim:
    """Bytes that are held; they count until the last who has the claim lets it go."""

    __slots__ = ("_inflight", "size")

    def __init__(self, inflight: Inflight, size: int = 0) -> None:
        """Counts `size` bytes, whatever room there is: they are held already."""
        self._inflight = inflight
        self.size = size
        inflight.used += size

    def grow(self, size: int) -> bool:
        """Counts so many bytes more, if there is room for them."""
        inflight = self._inflight
        if inflight.used + size > inflight.limit:
            return False
        inflight.used += size
        self.size += size
        return True

    def set(self, size: int) -> None:
        """Counts `size` bytes from now on, whatever room there is."""
        self._inflight.used += size - self.size
        self.size = size

    def __del__(self) -> None:
        self._inflight.used -= self.size
