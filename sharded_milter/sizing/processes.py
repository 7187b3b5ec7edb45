"""CPU time and memory of the daemon's processes: the master and its descendants."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Cpu:
    """CPU time in seconds: of the master, and of all its descendants."""

    master: float
    workers: float

    def __sub__(self, before: Cpu) -> Cpu:
        return Cpu(self.master - before.master, self.workers - before.workers)


@dataclass(frozen=True)
class ResidentMemory:
    """Resident memory in bytes: of the master, and of an average worker."""

    master: int
    worker: int


def cpu(pid: int) -> Cpu:
    """Return the CPU time of a process and its descendants so far, including those that ended."""
    master = psutil.Process(pid)
    own = master.cpu_times()
    workers = own.children_user + own.children_system
    for process in master.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended, and its parent's times include it
            times = process.cpu_times()
            workers += times.user + times.system + times.children_user + times.children_system
    return Cpu(own.user + own.system, workers)


def memory(pid: int) -> ResidentMemory:
    """Return the resident memory of a master and of its children."""
    master = psutil.Process(pid)
    workers = []
    for process in master.children():
        with suppress(psutil.NoSuchProcess):
            workers.append(process.memory_info().rss)
    return ResidentMemory(master.memory_info().rss, sum(workers) // max(1, len(workers)))


def machine_cpu() -> float:
    """Return the CPU time, in seconds, of all processes of the machine so far.

    Time that the hypervisor gave to other virtual machines is included. The result is 0 if this
    process may not use all CPUs: the figure would then say nothing about those it may use.
    """
    if len(os.sched_getaffinity(0)) != os.cpu_count():
        return 0.0
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


class Meter:
    """Measures the CPU time of a daemon and of the machine during a block of code.

    Reading the times of all processes takes some milliseconds, so `seconds` is the time between
    the two readings.
    """

    def __init__(self, pid: int) -> None:
        self.seconds = 0.0
        self.cpu = Cpu(0.0, 0.0)
        self.machine = 0.0
        self._pid = pid

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the block; nothing is measured if it raises."""
        clock, machine, used = time.perf_counter(), machine_cpu(), cpu(self._pid)
        yield
        self.seconds = time.perf_counter() - clock
        self.machine = machine_cpu() - machine
        self.cpu = cpu(self._pid) - used

    def others(self, client: float, cores: int) -> float:
        """Return the CPU time of all other processes, at most what is left of the cores.

        CPU clocks tick every 10 ms, so a sum over many processes is not exact. The result is 0 if
        the machine has cores that this process may not use.
        """
        if cores != os.cpu_count():
            return 0.0
        ours = self.cpu.master + self.cpu.workers + client
        return max(0.0, min(self.machine, cores * self.seconds) - ours)
