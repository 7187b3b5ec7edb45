"""Recommend a number of workers from the rates that were measured. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# A worker that adds less than this share to the best rate is not worth its memory. Two runs with
# the same number of workers differ by about as much.
TOLERANCE = 0.05


def recommended(rates: Mapping[int, float]) -> int:
    """Return the smallest number of workers whose rate is within TOLERANCE of the best."""
    best = max(rates.values())
    return min(workers for workers, rate in rates.items() if rate >= (1 - TOLERANCE) * best)


def rising(rates: Mapping[int, float]) -> bool:
    """Return True if the largest of several numbers is recommended: more may be better still."""
    return len(rates) > 1 and recommended(rates) == max(rates)


def sweep(cpus: int) -> list[int]:
    """Return the numbers of workers to try: two for each doubling, up to twice the CPUs."""
    most = 2 * cpus
    steps = {2**power * by for power in range(most.bit_length()) for by in (1, 3)}
    return sorted({n for n in steps if n <= most} | {cpus, most})


@dataclass(frozen=True)
class MasterLimit:
    """The highest rate of one master, and the CPU that its workers need at that rate."""

    rate: float  # messages a second
    cores: float  # of the workers

    @classmethod
    def of(cls, master_cpu: float, workers_cpu: float) -> MasterLimit | None:
        """Compute it from CPU seconds per message; None if those of the master are 0."""
        if master_cpu <= 0:
            return None
        return cls(1 / master_cpu, workers_cpu / master_cpu)
