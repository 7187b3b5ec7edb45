"""How fast does a large mail pass, and what does it cost the master in memory?

    python -m bench.large_message [--megabytes 25] [--connections 1 2] [--seconds 3] [--rounds 5]
                                  [--json FILE]

The milters only count the bytes of the body, ours and pymilter's: the bytes' way is all that is
measured. `copies.py` says what is done to them on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

from bench import peak
from bench.client import Load, drive
from bench.report import Report, Target, arguments, rates
from bench.rounds import alternating
from bench.subjects import OURS_COUNTING, PYMILTER_COUNTING, Job, all_serving, installed

# The content crosses to another process, which pymilter's does not. By connections.
SPEED_AT_LEAST = {1: 0.33, 2: 0.25}

# Of the messages under way: content is kept outside of the master's memory.
PEAK_AT_MOST = 1.2

_MB = 1_000_000
_MS = 1000


def ask(
    report: Report, megabytes: float, loads: Sequence[int], seconds: float, rounds: int
) -> None:
    """Measures ours and pymilter under each number of connections."""
    size = int(megabytes * _MB)
    subjects = [OURS_COUNTING, *installed([PYMILTER_COUNTING], report.say)]
    with all_serving(subjects, Job()) as servers:
        idle = {}
        for name, server in servers.items():
            drive(server, Load(1, messages=50))  # warm, with small ones
            peak.reset(server.pid)
            idle[name] = server.rss()
        for connections in loads:
            measure = partial(drive, wanted=Load(connections, seconds=seconds, body=size))
            runs = alternating(servers, rounds, measure)
            peaks = {n: (peak.of(server.pid) - idle[n]) / _MB for n, server in servers.items()}
            rows = [
                {
                    "milter": name,
                    "MB/s": rates(several).middle * megabytes,
                    "p50 ms": _MS * median(each.p50 for each in several),
                    "master ms/MB": _MS * median(each.master_cpu for each in several) / megabytes,
                    "workers ms/MB": _MS * median(each.workers_cpu for each in several) / megabytes,
                    "master's peak MB": peaks[name],
                }
                for name, several in runs.items()
            ]
            where = f"messages of {megabytes:g} MB, {connections} connections"
            report.table(where, rows)
            ours, *peer = runs.values()
            if peer and connections in SPEED_AT_LEAST:
                what = f"rate, ours / pymilter, {where}"
                goal = SPEED_AT_LEAST[connections]
                report.target(Target.of(what, rates(ours) / rates(peer[0]), goal, at_least=True))
    most = PEAK_AT_MOST * megabytes * max(loads)
    what = f"peak of the master above idle, {megabytes:g} MB, {max(loads)} connections"
    report.target(Target(what, peaks[OURS_COUNTING.name], most, "MB"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--megabytes", type=float, default=25.0)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = Report(__doc__)
    ask(report, options.megabytes, options.connections, options.seconds, options.rounds)
    report.save(options)


if __name__ == "__main__":
    main()
