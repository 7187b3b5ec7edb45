"""What does a mail with many recipients cost when each of them is asked about?

    python -m bench.recipients [--counts 250 500 1000] [--repeat 5] [--json FILE]

A light callback at RCPT, one connection on a UNIX socket; only the envelope is sent.
"""

from __future__ import annotations

from bench.report import Report, Row, Target, arguments
from bench.server import serving
from sharded_milter.protocol.packets import Packet
from sharded_milter.testing import load
from sharded_milter.testing.dialogue import Mail, envelope

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


def to(recipients: int) -> list[Packet]:
    """An envelope with so many."""
    return envelope(Mail(b"", recipients=[f"b{n}@example.com" for n in range(recipients)]))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    report = Report(__doc__)
    rows: list[Row] = []
    with serving(MILTER, "--workers", "2", "--log-level", "warn") as server:
        load.run(server.path, 1, 20, content=[to(50)])  # warm
        for count in options.counts:
            result = load.run(server.path, 1, options.repeat, content=[to(count)])
            ms = 1000 * result.percentile(0.5)
            rows.append({"recipients": count, "ms": ms, "ms each": ms / count})
    report.table("all recipients of one envelope", rows)
    growth = rows[-1]["ms each"] / rows[0]["ms each"]
    what = f"time for each of {options.counts[-1]} / of {options.counts[0]}"
    report.target(Target(what, growth, GROWTH_AT_MOST))
    report.save(options.json)


if __name__ == "__main__":
    main()
