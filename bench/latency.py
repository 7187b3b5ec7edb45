"""How long does one mail take that is alone, and how long with pymilter?

    python -m bench.latency [--seconds 3] [--rounds 3] [--json FILE]

One connection on a UNIX socket, a cheap scan, all in turn: ours, ours in the master, and what bare
Twisted and AMP take, which is the least that a master with workers can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.report import Report, Target, arguments, figures, pooled
from bench.subjects import BOUNDS, OURS, PYMILTER, Job, Subject, in_turn, installed
from sharded_milter.testing import load

# A job crosses to a worker and back: two more wake-ups of a process than pymilter has. In ms.
MORE_AT_MOST = 0.15


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    report = Report(__doc__)

    def measure(subject: Subject) -> load.Result:
        with subject.serving(Job()) as server:
            load.run_for(server.path, 1, options.seconds / 3)  # warm
            return load.run_for(server.path, 1, options.seconds)

    subjects = installed([*BOUNDS, PYMILTER], report.say)
    results = in_turn(subjects, options.rounds, measure)
    medians = report_medians(report, "one connection", results)
    if PYMILTER.name in medians:
        more = medians[OURS.name] - medians[PYMILTER.name]
        report.target(Target("p50 above pymilter's", more, MORE_AT_MOST, "ms"))
    report.save(options.json)


def report_medians(
    report: Report, title: str, results: Mapping[str, Sequence[load.Result]]
) -> dict[str, float]:
    """A table, and the median latencies in ms by the milter's name."""
    whole = {name: pooled(several) for name, several in results.items()}
    report.table(title, [{"milter": name, **figures(result)} for name, result in whole.items()])
    return {name: 1000 * result.percentile(0.5) for name, result in whole.items()}


if __name__ == "__main__":
    main()
