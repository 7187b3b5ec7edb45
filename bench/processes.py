"""What a server's processes have used: its own and those below it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

# Written to clear_refs, it sets the peak of a process back to what it has now (proc(5)).
_RESET_PEAK = "5"

_KB = 1024


@dataclass(frozen=True)
class Cpu:
    """Seconds of CPU: of the process that the MTA talks to, and of all below it."""

    master: float
    workers: float

    def __sub__(self, before: Cpu) -> Cpu:
        return Cpu(self.master - before.master, self.workers - before.workers)


def cpu(pid: int) -> Cpu:
    """What a process and its descendants have used so far."""
    master = psutil.Process(pid)
    workers = master.children(recursive=True)
    return Cpu(_seconds(master), sum(_seconds(worker) for worker in workers))


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def reset_peak(pid: int) -> None:
    """Lets `peak` begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)


def peak(pid: int) -> int:
    """The most bytes of memory that the process had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * _KB
