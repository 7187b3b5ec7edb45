"""What does a mail with many recipients cost when each of them is asked about?

    python -m bench.recipients [--counts 250 500 1000] [--messages 5] [--rounds 5] [--json FILE]

A light callback at RCPT, one connection on a UNIX socket; the milter wants neither header nor body.
"""

from __future__ import annotations

from bench.client import Load, Run, drive
from bench.report import Report, Target, arguments, p50_ms
from bench.rounds import Rounds, alternating
from bench.server import serving

MILTER = """
from sharded_milter import Address, Envelope, Milter, Reject

milter = Milter("recipients")

@milter.rcpt(light=True)
def known(recipient: Address, envelope: Envelope) -> Reject | None:
    return Reject("no such user") if recipient.local == "ghost" else None
"""

# The last recipient may cost as much as the first; an eighth more is the allocator's and the
# caches'.
GROWTH_AT_MOST = 1.125


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--messages", type=int, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = Report(__doc__)

    def measure(recipients: int) -> Run:
        return drive(server, Load(1, messages=options.messages, recipients=recipients))

    with serving(MILTER, "--workers", "2", "--log-level", "warn") as server:
        drive(server, Load(1, messages=20, recipients=50))  # warm
        runs = alternating({str(count): count for count in options.counts}, options.rounds, measure)
    times = {name: p50_ms(several) for name, several in runs.items()}
    each = {name: Rounds([ms / int(name) for ms in times[name].values]) for name in times}
    rows = [
        {"recipients": name, "ms": times[name].middle, "ms each": each[name].middle}
        for name in times
    ]
    report.table("all recipients of one envelope", rows)
    few, *_, many = each
    what = f"time for each of {many} / of {few}"
    report.target(Target.of(what, each[many] / each[few], GROWTH_AT_MOST))
    report.save(options)


if __name__ == "__main__":
    main()
