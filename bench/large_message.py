"""How fast does a large mail pass, and what does it cost the master in memory?

    python -m bench.large_message [--megabytes 25] [--messages 8] [--rounds 3] [--json FILE]

One connection on a UNIX socket; the same with pymilter.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from bench import peak
from bench.report import Report, Row, Target, arguments
from bench.subjects import PYMILTER, Job, Subject, in_turn, installed
from sharded_milter.protocol.packets import Packet
from sharded_milter.testing import load
from sharded_milter.testing.dialogue import transaction
from sharded_milter.testing.generated import generated

# The content crosses to another process.
SPEED_AT_LEAST = 0.7

# Of the message: content is kept outside of the master's memory.
PEAK_AT_MOST = 1.2

_MB = 1_000_000


def measure(subject: Subject, packets: Sequence[Packet], messages: int) -> tuple[float, float]:
    """Seconds for a message, and the master's peak above what it has idle, in MB."""
    with subject.serving(Job()) as server:
        load.run(server.path, 1, 5)  # warm, with small ones
        peak.reset(server.pid)
        before = server.rss()
        result = load.run(server.path, 1, messages, content=[packets])
        return result.percentile(0.5), (peak.of(server.pid) - before) / _MB


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--megabytes", type=float, default=25.0)
    parser.add_argument("--messages", type=int, default=8, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    report = Report(__doc__)
    size = int(options.megabytes * _MB)
    packets = transaction(generated(body=size))
    subjects = installed([PYMILTER], report.say)
    measured = in_turn(
        subjects, options.rounds, lambda subject: measure(subject, packets, options.messages)
    )
    rows: list[Row] = [
        {
            "milter": name,
            "MB/s": size / _MB / median(seconds for seconds, _ in rounds),
            "p50 ms": 1000 * median(seconds for seconds, _ in rounds),
            "master's peak MB": max(peak for _, peak in rounds),
        }
        for name, rounds in measured.items()
    ]
    report.table(f"messages of {options.megabytes:g} MB", rows)
    if len(rows) > 1:
        ratio = rows[0]["MB/s"] / rows[1]["MB/s"]
        report.target(Target("MB/s, ours / pymilter's", ratio, SPEED_AT_LEAST, at_least=True))
    peak = rows[0]["master's peak MB"]
    most = PEAK_AT_MOST * options.megabytes
    report.target(Target("peak of the master above idle", peak, most, "MB"))
    report.save(options.json)


if __name__ == "__main__":
    main()
