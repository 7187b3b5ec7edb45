"""Where a shard lives: what a shard needs of its place, and the place of its shard.

`spawned` is the first place there is: a process that was started for the shard. A shard's machine
(`shard`) is the same in all places.
"""

from __future__ import annotations

from typing import Any, Protocol


class Owner(Protocol):
    """Who hears of a process: its shard."""

    def output(self, line: bytes) -> None: ...
    def output_dropped(self, lines: int, size: int) -> None: ...
    def exited(self, reason: str) -> None: ...


class Place(Protocol):
    """A process, wherever it is."""

    pid: int

    def start(self, owner: Owner, channel: Any) -> None:
        """Starts it, with the other end of the channel; raises OSError when it is refused."""

    def read_output(self) -> None:
        """Takes what it has written until now."""

    def kill(self) -> None:
        """Ends it and its descendants at once; its exit follows."""

    def stacks(self) -> None:
        """Has it write the Python stacks of all its threads, once it is ready."""

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it; a debugger does not count."""

    def is_traced(self) -> bool:
        """Whether a debugger holds it."""

    def memory(self) -> int:
        """The bytes of memory that it uses."""

    def end_family(self) -> None:
        """It has exited: ends what it has left running."""
