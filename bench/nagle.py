"""Does an MTA that writes packet by packet over TCP wait for acknowledgements?

    python -m bench.nagle [--messages 40] [--rounds 3] [--json FILE]

Sendmail does so with Nagle's algorithm on: a packet then leaves only when the one before is
acknowledged, which a receiver may put off for 40 ms. Beside ours stands libmilter.
"""

from __future__ import annotations

from bench.client import Load, Run, drive
from bench.report import Report, Target, arguments, figures, p50_ms
from bench.rounds import alternating
from bench.server import Server
from bench.subjects import LIBMILTER, OURS, Job, all_serving, installed

# One delayed acknowledgement is 40 ms; libmilter waits for two.
AT_MOST_MS = 5.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--messages", type=int, default=40, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    report = Report(__doc__)

    def measure(server: Server) -> Run:
        return drive(server, Load(1, messages=options.messages, separate=True))

    subjects = [OURS, *installed([LIBMILTER], report.say)]
    with all_serving(subjects, Job(), tcp=True) as servers:
        for server in servers.values():
            drive(server, Load(1, messages=10))  # warm
        runs = alternating(servers, options.rounds, measure)
    rows = [{"milter": name, **figures(several)} for name, several in runs.items()]
    report.table("one connection over TCP, one write a packet", rows)
    report.target(Target.of("p50", p50_ms(runs[OURS.name]), AT_MOST_MS, "ms"))
    report.save(options)


if __name__ == "__main__":
    main()
