"""The most memory that a process had."""

from __future__ import annotations

from pathlib import Path

# Written to clear_refs, it sets the peak of a process back to what it has now (proc(5)).
_RESET_PEAK = "5"

_KB = 1024


def reset(pid: int) -> None:
    """Lets `of` begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)


def of(pid: int) -> int:
    """The most bytes of memory that the process had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * _KB
