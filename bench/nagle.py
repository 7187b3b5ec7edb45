"""Does an MTA that writes packet by packet over TCP wait for acknowledgements?

    python -m bench.nagle [--messages 40] [--rounds 3] [--json FILE]

Sendmail does so with Nagle's algorithm on: a packet then leaves only when the one before is
acknowledged, which a receiver may put off for 40 ms. Beside ours stands libmilter.
"""

from __future__ import annotations

from bench import load
from bench.report import Report, Target, arguments
from bench.subjects import LIBMILTER, OURS, Job

# Not slower than the library that Sendmail's authors wrote for it.
AT_MOST = 1.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--messages", type=int, default=40, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    report = Report(__doc__)
    subjects = [subject for subject in (OURS, LIBMILTER) if subject.available()]
    results: dict[str, list[load.Result]] = {subject.name: [] for subject in subjects}
    for _ in range(options.rounds):
        for subject in subjects:
            with subject.serving(Job(), tcp=True) as server:
                load.run(server.path, 1, 10)  # warm
                result = load.run(server.path, 1, options.messages, glued=False)
                results[subject.name].append(result)
    pooled = {name: load.pooled(several) for name, several in results.items()}
    rows = [{"milter": name, **result.row()} for name, result in pooled.items()]
    report.table("one connection over TCP, one write a packet", rows)
    if LIBMILTER.name in pooled:
        ratio = pooled[OURS.name].percentile(0.5) / pooled[LIBMILTER.name].percentile(0.5)
        report.target(Target("p50, ours / libmilter's", ratio, AT_MOST))
    else:
        report.say(f"skipped: {LIBMILTER.name} ({LIBMILTER.install})")
    report.save(options.json)


if __name__ == "__main__":
    main()
