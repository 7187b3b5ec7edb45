"""How long does one mail take that is alone, and how long with pymilter?

    python -m bench.latency [--seconds 2] [--rounds 5] [--json FILE]

One connection on a UNIX socket, a cheap scan, all in turn: ours, ours in the master, and what bare
Twisted and AMP take, which is the least that a master with workers can.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from bench.client import Load, drive
from bench.report import Report, Target, arguments, figures, p50_ms
from bench.rounds import alternating
from bench.subjects import BOUNDS, OURS, PYMILTER, Job, Subject, all_serving, installed

# A job crosses to a worker and back: two more wake-ups of a process than pymilter has. In ms.
MORE_AT_MOST = 0.06


def ask(report: Report, peers: Sequence[Subject], seconds: float, rounds: int) -> None:
    """Measures ours and these, one message at a time."""
    subjects = [OURS, *installed(peers, report.say)]
    with all_serving(subjects, Job()) as servers:
        for server in servers.values():
            drive(server, Load(1, seconds=seconds / 2))  # warm
        runs = alternating(servers, rounds, partial(drive, wanted=Load(1, seconds=seconds)))
    rows = [{"milter": name, **figures(several)} for name, several in runs.items()]
    report.table("one connection", rows)
    if PYMILTER.name in runs:
        more = p50_ms(runs[OURS.name]) - p50_ms(runs[PYMILTER.name])
        report.target(Target.of("p50 alone, above pymilter's", more, MORE_AT_MOST, "ms"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = Report(__doc__)
    ask(report, [*BOUNDS, PYMILTER], options.seconds, options.rounds)
    report.save(options)


if __name__ == "__main__":
    main()
