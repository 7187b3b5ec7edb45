"""How much of the machine is left for scans that take CPU time?

    python -m bench.cpu_scans [--ms 1 10] [--connections 8 32] [--seconds 3] [--rounds 5]
                              [--json FILE]

The limit is cores / CPU time of a scan: nothing left for the client, the master and the protocol.
Before each measurement such scans run alone, a process for each core: what these miss of the limit
was taken by others on the machine, not by us.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from statistics import median

from bench.client import Load, Run, drive
from bench.report import Report, Target, arguments, costs, figures
from bench.rounds import Rounds, alternating
from bench.server import ADDS_A_HEADER, cores, serving

# A millisecond is little more than what the client, the master and the worker need besides; with
# ten they should hardly show.
AT_LEAST = {1.0: 0.85, 10.0: 0.96}

# As many scans as fit in so many seconds; prints how many of them in a second.
_SCANS_ALONE = """
import sys, time
burn, seconds = float(sys.argv[1]) / 1000, float(sys.argv[2])
scans, began = 0, time.perf_counter()
while (passed := time.perf_counter() - began) < seconds:
    until = time.thread_time() + burn
    while time.thread_time() < until:
        sum(range(1000))
    scans += 1
print(scans / passed)
"""


def alone(ms: float, seconds: float) -> float:
    """Scans a second of one process for each core, with nothing beside them."""
    command = [sys.executable, "-c", _SCANS_ALONE, str(ms), str(seconds)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(cores())]
    return sum(float(process.communicate()[0]) for process in processes)


def ask(
    report: Report, ms: float, loads: Sequence[int], workers: int, seconds: float, rounds: int
) -> None:
    """Measures scans of that CPU time under each number of connections."""
    limit = cores() * 1000 / ms
    unhindered: list[float] = []

    def measure(connections: int) -> Run:
        unhindered.append(alone(ms, seconds / 3) / limit)
        return drive(server, Load(connections, seconds=seconds))

    options = ("--workers", str(workers), "--log-level", "warn")
    with serving(ADDS_A_HEADER.format(ms=ms), *options) as server:
        server.settle()
        drive(server, Load(max(loads), seconds=1.0))  # warm
        runs = alternating({str(load): load for load in loads}, rounds, measure)
    shares = {
        name: Rounds([each.rate / limit for each in several]) for name, several in runs.items()
    }
    rows = [
        {
            "connections": name,
            "of limit": shares[name].middle,
            "scans alone": median(unhindered),
            **figures(several),
            **costs(several),
        }
        for name, several in runs.items()
    ]
    report.table(f"scans of {ms:g} ms, {workers} workers on {cores()} cores", rows)
    if ms in AT_LEAST:
        best = max(shares.values(), key=lambda share: share.middle)
        what = f"share of the limit with scans of {ms:g} ms"
        report.target(Target.of(what, best, AT_LEAST[ms], at_least=True))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ms", type=float, nargs="+", default=list(AT_LEAST))
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = Report(__doc__)
    for ms in options.ms:
        loads, seconds = options.connections, options.seconds
        ask(report, ms, loads, options.workers, seconds, options.rounds)
    report.save(options)


if __name__ == "__main__":
    main()
