"""What does a message wait for when several milters scan it on one connection?

    python -m bench.chain [--milters 3] [--ms 200] [--rounds 5] [--json FILE]

Each burns that much CPU time. They run side by side, so the least that is possible is that of the
slowest worker where there are cores for all, and all the work spread over the cores where not.
"""

from __future__ import annotations

from bench.client import Load, drive
from bench.report import Report, Row, Target, arguments
from bench.server import cores, serving

# A message's own way through the master and the workers takes a few ms beside these scans.
AT_MOST = 1.1

MILTERS = """
import time
from sharded_milter import Accept, AddHeader, Message, Milter, Verdict


def burning(name):
    milter = Milter(name)

    @milter.eom
    def scan(message: Message) -> Verdict:
        until = time.thread_time() + {ms} / 1000
        while time.thread_time() < until:
            sum(range(1000))
        return Accept(AddHeader("X-Bench", name))

    return milter


m1, m2, m3, m4, m5, m6, m7, milter = map(burning, "1 2 3 4 5 6 7 8".split())
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--milters", type=int, default=3, choices=range(1, 9))
    parser.add_argument("--ms", type=float, default=200.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = Report(__doc__)
    counts = sorted({1, cores(), options.milters})
    rows = [measure(options.milters, options.ms, n, options.rounds) for n in counts]
    report.table(f"{options.milters} milters of {options.ms:g} ms, {cores()} cores", rows)
    for row in rows[1:]:
        what = f"latency with {row['workers']} workers, of the least that is possible"
        report.target(Target(what, row["of least"], AT_MOST))
    report.save(options)


def measure(milters: int, ms: float, workers: int, rounds: int) -> Row:
    """One message at a time, so that nothing else is waited for."""
    others = [f"./bench_milter.py:m{number}" for number in range(1, milters)]
    options = ["--workers", str(workers), "--log-level", "warn", *others]
    with serving(MILTERS.format(ms=ms), *options) as server:
        server.settle()
        drive(server, Load(1, messages=1))  # warm
        result = drive(server, Load(1, messages=rounds))
    # Whole milters on each worker, or their CPU time over all cores, whichever is more.
    turns = -(-milters // workers)
    least = max(turns, milters / min(workers, cores())) * ms
    latency = 1000 * result.p50
    return {"workers": workers, "p50 ms": latency, "least ms": least, "of least": latency / least}


if __name__ == "__main__":
    main()
