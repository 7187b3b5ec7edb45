"""The interfaces between a shard and its place.

A place is where the process of a shard runs. `spawned` has the only one so far: a process that was
started for the shard. The state machine in `shard` is the same for all places.
"""

from __future__ import annotations

from typing import Any, Protocol


class PlaceOwner(Protocol):
    """The shard, as its place needs it."""

    def output(self, line: bytes) -> None: ...
    def output_dropped(self, lines: int, size: int) -> None: ...
    def exited(self, reason: str) -> None: ...


class Place(Protocol):
    """The process of a shard."""

    pid: int

    def start(self, owner: PlaceOwner, channel: Any) -> None:
        """Start the process and connect `channel` to it; raise OSError when that is refused."""

    def read_output(self) -> None:
        """Read the output that it has written until now."""

    def kill(self) -> None:
        """Kill it and its descendants at once; `exited` follows."""

    def dump_stacks(self) -> None:
        """Make it log the Python stacks of all its threads, once it is ready."""

    def is_stopped(self) -> bool:
        """Return whether a signal has stopped it; a debugger does not count."""

    def is_traced(self) -> bool:
        """Return whether a debugger is attached to it."""

    def memory(self) -> int:
        """Return its resident memory, bytes."""

    def kill_descendants(self) -> None:
        """Kill what it has left running; it has exited."""
