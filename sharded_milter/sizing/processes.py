"""What a server's processes have used: its own and those below it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Cpu:
    """Seconds of CPU: of the process that the MTA talks to, and of all below it."""

    master: float
    workers: float

    def __sub__(self, before: Cpu) -> Cpu:
        return Cpu(self.master - before.master, self.workers - before.workers)


@dataclass(frozen=True)
class ResidentMemory:
    """Bytes that are resident: of the master, and of an average worker."""

    master: int
    worker: int


def cpu(pid: int) -> Cpu:
    """What a process and its descendants have used so far, those that have ended included."""
    master = psutil.Process(pid)
    own = master.cpu_times()
    workers = own.children_user + own.children_system
    for process in master.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # its parent counts it from now on
            times = process.cpu_times()
            workers += times.user + times.system + times.children_user + times.children_system
    return Cpu(own.user + own.system, workers)


def memory(pid: int) -> ResidentMemory:
    """What a master and its children have now."""
    master = psutil.Process(pid)
    workers = []
    for process in master.children():
        with suppress(psutil.NoSuchProcess):
            workers.append(process.memory_info().rss)
    return ResidentMemory(master.memory_info().rss, sum(workers) // max(1, len(workers)))


def machine_cpu() -> float:
    """Seconds of CPU that everything on the machine has used so far, other virtual machines'
    share included; 0 where this process may not use all CPUs, so that it says nothing about them.
    """
    if len(os.sched_getaffinity(0)) != os.cpu_count():
        return 0.0
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


class Meter:
    """What a server and the machine have used within a block, and how long that took.

    Looking at all processes takes some milliseconds, so the time is that between the two looks.
    """

    def __init__(self, pid: int) -> None:
        self.seconds = 0.0
        self.cpu = Cpu(0.0, 0.0)
        self.machine = 0.0
        self._pid = pid

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measures the block, if it is left without an exception."""
        clock, machine, used = time.perf_counter(), machine_cpu(), cpu(self._pid)
        yield
        self.seconds = time.perf_counter() - clock
        self.machine = machine_cpu() - machine
        self.cpu = cpu(self._pid) - used

    def others(self, client: float, cores: int) -> float:
        """Seconds of CPU of everything else; of no more than is left of the cores.

        The clocks of processes tick every 10 ms, so that the sum of many is not exact. 0 where
        the machine has cores that this process may not use: what they do says nothing about ours.
        """
        if cores != os.cpu_count():
            return 0.0
        ours = self.cpu.master + self.cpu.workers + client
        return max(0.0, min(self.machine, cores * self.seconds) - ours)
