"""Do many workers that only wait, for a database or another server, all get work?

    python -m bench.sleepers [--workers 64] [--ms 20] [--seconds 4] [--json FILE]

Twice as many connections as workers; the limit is workers / that time.
"""

from __future__ import annotations

from bench.client import Load, drive
from bench.report import Report, Target, arguments, costs, figures
from bench.server import serving

MILTER = """
import time
from sharded_milter import Accept, AddHeader, Message, Milter, Verdict

milter = Milter("sleepers")

@milter.eom
def scan(message: Message) -> Verdict:
    time.sleep({ms} / 1000)
    return Accept(AddHeader("X-Bench", "1"))
"""

# The master has 0.3 ms for each message then, and the workers' own start of a job is in theirs.
AT_LEAST = 0.9


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--ms", type=float, default=20.0, help="what a scan waits")
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    report = Report(__doc__)
    arguments_ = ["--workers", str(options.workers), "--log-level", "warn"]
    connections = 2 * options.workers
    with serving(MILTER.format(ms=options.ms), *arguments_) as server:
        server.settle()
        drive(server, Load(connections, seconds=1.0))  # warm
        result = drive(server, Load(connections, seconds=options.seconds))
    limit = options.workers / (options.ms / 1000)
    title = f"{options.workers} workers that sleep {options.ms:g} ms, {connections} connections"
    report.table(title, [{"limit/s": limit, **figures([result]), **costs([result])}])
    report.target(Target("share of the limit", result.rate / limit, AT_LEAST, at_least=True))
    report.save(options)


if __name__ == "__main__":
    main()
