"""How many workers to run, from the rates of a sweep. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# A worker that adds less than this to the best rate is not worth its memory, and two runs of the
# same differ by about as much.
TOLERANCE = 0.05


def recommended(rates: Mapping[int, float]) -> int:
    """The smallest number of workers whose rate is within TOLERANCE of the best."""
    best = max(rates.values())
    return min(workers for workers, rate in rates.items() if rate >= (1 - TOLERANCE) * best)


def rising(rates: Mapping[int, float]) -> bool:
    """Whether the best of several numbers is the largest, so that a larger one may be better."""
    return len(rates) > 1 and recommended(rates) == max(rates)


def sweep(cpus: int) -> list[int]:
    """The numbers of workers worth trying: two to each doubling, up to twice the CPUs."""
    most = 2 * cpus
    steps = {2**power * by for power in range(most.bit_length()) for by in (1, 3)}
    return sorted({n for n in steps if n <= most} | {cpus, most})


@dataclass(frozen=True)
class MasterLimit:
    """The rate that one master carries, and what its workers compute then."""

    rate: float  # messages a second
    cores: float  # of the workers

    @classmethod
    def of(cls, master_cpu: float, workers_cpu: float) -> MasterLimit | None:
        """From seconds of CPU for a message; None where the master's were too few to count."""
        if master_cpu <= 0:
            return None
        return cls(1 / master_cpu, workers_cpu / master_cpu)
