"""Does an MTA that writes packet by packet over TCP wait for acknowledgements?

    python -m bench.nagle [--messages 40] [--rounds 3] [--json FILE]

Sendmail does so with Nagle's algorithm on: a packet then leaves only when the one before is
acknowledged, which a receiver may put off for 40 ms. Beside ours stands libmilter.
"""

from __future__ import annotations

from bench.latency import report_medians
from bench.report import Report, Target, arguments
from bench.subjects import LIBMILTER, Job, Subject, in_turn, installed
from sharded_milter.testing import load

# One delayed acknowledgement is 40 ms; libmilter waits for two.
AT_MOST_MS = 5.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--messages", type=int, default=40, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    report = Report(__doc__)

    def measure(subject: Subject) -> load.Result:
        with subject.serving(Job(), tcp=True) as server:
            load.run(server.path, 1, 10)  # warm
            return load.run(server.path, 1, options.messages, glued=False)

    subjects = installed([LIBMILTER], report.say)
    results = in_turn(subjects, options.rounds, measure)
    medians = report_medians(report, "one connection over TCP, one write a packet", results)
    report.target(Target("p50", next(iter(medians.values())), AT_MOST_MS, "ms"))
    report.save(options.json)


if __name__ == "__main__":
    main()
