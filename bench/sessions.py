"""What does a message cost that comes on a connection of its own, as most do?

    python -m bench.sessions [--connections 8] [--seconds 2] [--rounds 5] [--json FILE]

A cheap scan on a UNIX socket; each connection is negotiated, brings one message and is closed.
The client in C is needed, and so gcc.
"""

from __future__ import annotations

from functools import partial

from bench.client import Load, compiled, drive
from bench.report import Report, Target, arguments, costs, figures, master_us, rates
from bench.rounds import alternating
from bench.subjects import OURS, PYMILTER, Job, all_serving, installed

MASTER_US_AT_MOST = 180.0


def ask(report: Report, connections: int, seconds: float, rounds: int) -> None:
    """Measures ours and pymilter."""
    if compiled() is None:
        report.say("skipped: one connection a message (gcc)")
        return
    subjects = [OURS, *installed([PYMILTER], report.say)]
    with all_serving(subjects, Job()) as servers:
        for server in servers.values():
            drive(server, Load(connections, seconds=seconds / 2, each=1))  # warm
        measure = partial(drive, wanted=Load(connections, seconds=seconds, each=1))
        runs = alternating(servers, rounds, measure)
    rows = [
        {
            "milter": name,
            "ours/it": (rates(runs[OURS.name]) / rates(several)).middle,
            **figures(several),
            **costs(several),
        }
        for name, several in runs.items()
    ]
    report.table(f"{connections} connections at a time, of one message each", rows)
    what = "master's CPU of a message with a connection of its own"
    report.target(Target.of(what, master_us(runs[OURS.name]), MASTER_US_AT_MOST, "µs"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = Report(__doc__)
    ask(report, options.connections, options.seconds, options.rounds)
    report.save(options)


if __name__ == "__main__":
    main()
