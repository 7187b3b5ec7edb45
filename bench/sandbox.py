"""What does the sandbox cost a worker's start, and a message?

    python -m bench.sandbox [--rounds 5] [--seconds 3] [--starts 15] [--json FILE]

A start is that of a process with the content scanner, up to where it tells the master that it is
ready. Messages go in turn to a server with sandboxed workers and to one without.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

from bench.report import Report, Row, Target, arguments, figures, pooled
from bench.server import ADDS_A_HEADER, Server, serving
from sharded_milter.testing import load
from sharded_milter.testing.dialogue import transaction
from sharded_milter.testing.generated import generated

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


def measure(servers: dict[str, Server], rounds: int, seconds: float, size: int) -> list[Row]:
    """The rates of both servers, a round of one and then of the other."""
    content = [transaction(generated(number, body=size)) for number in range(CONNECTIONS)]
    results: dict[str, list[load.Result]] = {mode: [] for mode in MODES}
    for server in servers.values():
        load.run_for(server.path, CONNECTIONS, 1.0, content)  # warm
    for number in range(rounds):
        for mode in MODES if number % 2 else reversed(MODES):
            path = servers[mode].path
            results[mode].append(load.run_for(path, CONNECTIONS, seconds, content))
    rates = {mode: median(result.rate for result in found) for mode, found in results.items()}
    return [
        {
            "sandbox": mode,
            "bytes": size,
            "of off": rates[mode] / rates["off"],
            **figures(pooled(results[mode])),
        }
        for mode in MODES
    ]


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
        rows = [
            row
            for size in (10_000, 1_000_000)
            for row in measure(servers, options.rounds, options.seconds, size)
        ]
    report.table("messages", rows)
    report.target(Target("entering the sandbox", entering, START_AT_MOST_MS, "ms"))
    for row in rows:
        if row["sandbox"] == "on":
            what = f"share of the rate without a sandbox, messages of {row['bytes']} bytes"
            report.target(Target(what, float(row["of off"]), RATE_AT_LEAST, at_least=True))
    report.save(options.json)


if __name__ == "__main__":
    main()
