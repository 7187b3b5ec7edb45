"""What does the sandbox cost a worker's start, and a message?

    python -m bench.sandbox [--rounds 5] [--seconds 3] [--starts 15] [--json FILE]

A start is that of a process with the content scanner, up to where it tells the master that it is
ready. Messages go in turn to a server with sandboxed workers and to one without.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from statistics import median

from bench.client import Load, Run, drive
from bench.report import Report, Target, arguments, costs, figures, rates
from bench.rounds import alternating
from bench.server import ADDS_A_HEADER, Server, serving

MODES = ("off", "on")

# Of the half second that a start takes.
START_AT_MOST_MS = 20.0

# A message's system calls are few, and the kernel remembers which ones are always allowed.
RATE_AT_LEAST = 0.95

CONNECTIONS = 8

_ENTER = """
import gc, sys, time
from sharded_milter.dialects.loader import load
SPEC = "sharded_milter.scanner.milter:milter"
dialect = load(SPEC)
import twisted.internet.reactor, sharded_milter.workers.child
gc.freeze()  # as a worker does
begin = time.perf_counter()
from sharded_milter.workers.sandbox import Sandbox
report = Sandbox(mode=sys.argv[1]).enter([dialect], [SPEC])
print(time.perf_counter() - begin)
"""


def start(mode: str) -> float:
    """Seconds that a process takes to enter its sandbox."""
    run = subprocess.run(
        [sys.executable, "-c", _ENTER, mode], check=True, capture_output=True, text=True
    )
    return float(run.stdout)


def measure(report: Report, servers: Mapping[str, Server], size: int, options: Namespace) -> None:
    """The rates of both servers under messages of that size."""
    for server in servers.values():
        drive(server, Load(CONNECTIONS, seconds=1.0, body=size))  # warm

    def load(server: Server) -> Run:
        return drive(server, Load(CONNECTIONS, seconds=options.seconds, body=size))

    runs = alternating(servers, options.rounds, load)
    ratio = rates(runs["on"]) / rates(runs["off"])
    rows = [{"sandbox": mode, **figures(runs[mode]), **costs(runs[mode])} for mode in MODES]
    report.table(f"messages of {size:,} bytes", rows)
    what = f"share of the rate without a sandbox, messages of {size:,} bytes"
    report.target(Target.of(what, ratio, RATE_AT_LEAST, at_least=True))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--starts", type=int, default=15)
    options = parser.parse_args()
    report = Report(__doc__)
    starts = {mode: median(start(mode) for _ in range(options.starts)) for mode in MODES}
    entering = 1000 * (starts["on"] - starts["off"])
    report.table("start", [{"sandbox": mode, "ms": 1000 * starts[mode]} for mode in MODES])
    milter = ADDS_A_HEADER.format(ms=0)
    common = ("--workers", "2", "--log-level", "warn")
    with (
        serving(milter, *common, "--sandbox", "off") as without,
        serving(milter, *common, "--sandbox", "on") as sandboxed,
    ):
        servers = dict(zip(MODES, (without, sandboxed), strict=True))
        report.target(Target("entering the sandbox", entering, START_AT_MOST_MS, "ms"))
        for size in (10_000, 1_000_000):
            measure(report, servers, size, options)
    report.save(options)


if __name__ == "__main__":
    main()
