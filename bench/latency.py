"""How long does one mail take that is alone, and how long with pymilter?

    python -m bench.latency [--seconds 3] [--rounds 3] [--json FILE]

One connection on a UNIX socket, a cheap scan, both milters in turn.
"""

from __future__ import annotations

from bench import load
from bench.report import Report, Target, arguments
from bench.subjects import OURS, PYMILTER, Job

# A job crosses to a worker and back: two more wake-ups of a process than pymilter has, and no
# user may feel them.
AT_MOST = 2.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    report = Report(__doc__)
    subjects = [subject for subject in (OURS, PYMILTER) if subject.available()]
    results: dict[str, list[load.Result]] = {subject.name: [] for subject in subjects}
    for _ in range(options.rounds):
        for subject in subjects:
            with subject.serving(Job()) as server:
                load.run_for(server.path, 1, options.seconds / 3)  # warm
                results[subject.name].append(load.run_for(server.path, 1, options.seconds))
    pooled = {name: load.pooled(several) for name, several in results.items()}
    report.table("one connection", [{"milter": name, **r.row()} for name, r in pooled.items()])
    if PYMILTER.name in pooled:
        ratio = pooled[OURS.name].percentile(0.5) / pooled[PYMILTER.name].percentile(0.5)
        report.target(Target("p50, ours / pymilter's", ratio, AT_MOST))
    else:
        report.say(f"skipped: {PYMILTER.name} ({PYMILTER.install})")
    report.save(options.json)


if __name__ == "__main__":
    main()
