"""How much of the machine is left for scans that take CPU time?

    python -m bench.cpu_scans [--ms 1 10] [--connections 8 32] [--seconds 4] [--json FILE]

The limit is cores / CPU time of a scan: nothing left for the client, the master and the protocol.
"""

from __future__ import annotations

from bench.report import Report, Row, Target, arguments, figures
from bench.server import ADDS_A_HEADER, Server, cores, serving
from sharded_milter.sizing import processes
from sharded_milter.testing import load

# A millisecond is little more than what the client, the master and the worker need besides; with
# ten they should hardly show.
AT_LEAST = {1.0: 0.8, 10.0: 0.96}

_MICRO = 1e6


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ms", type=float, nargs="+", default=list(AT_LEAST))
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    options = parser.parse_args()
    report = Report(__doc__)
    rows: list[Row] = []
    for ms in options.ms:
        source = ADDS_A_HEADER.format(ms=ms)
        with serving(source, "--workers", str(options.workers), "--log-level", "warn") as server:
            server.settle()
            rows += [measure(server, ms, n, options.seconds) for n in options.connections]
    report.table(f"{options.workers} workers on {cores()} cores", rows)
    for ms in options.ms:
        if ms in AT_LEAST:
            best = max(row["of limit"] for row in rows if row["scan ms"] == ms)
            what = f"share of the limit with scans of {ms:g} ms"
            report.target(Target(what, best, AT_LEAST[ms], at_least=True))
    report.save(options.json)


def measure(server: Server, ms: float, connections: int, seconds: float) -> Row:
    """One load; the client's CPU time and the master's are what the scans did not get."""
    load.run_for(server.path, connections, 1.0)  # warm
    before = processes.cpu(server.pid)
    result = load.run_for(server.path, connections, seconds)
    used = processes.cpu(server.pid) - before
    return {
        "scan ms": ms,
        "connections": connections,
        "of limit": result.rate * ms / 1000 / cores(),
        **figures(result),
        "master µs": _MICRO * used.master / result.messages,
        "workers µs": _MICRO * used.workers / result.messages,
    }


if __name__ == "__main__":
    main()
