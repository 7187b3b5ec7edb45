"""How many bytes of messages are in hand, over all connections. Pure."""

from __future__ import annotations


class Inflight:
    """Counts the bytes of messages that are not answered yet, up to a limit.

    Whoever holds them no longer takes them off `used`.
    """

    __slots__ = ("_limit", "used")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more may be held."""
        return self.used + size <= self._limit

    def take(self, size: int) -> bool:
        """Counts so many bytes more, if there is room for them."""
        if self.used + size > self._limit:
            return False
        self.used += size
        return True
