"""How fast does a large mail pass, and what does it cost the master in memory?

    python -m bench.large_message [--megabytes 25] [--messages 8] [--rounds 3] [--json FILE]

One connection on a UNIX socket; the same with pymilter.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench import load, processes
from bench.messages import message
from bench.report import Report, Row, Target, arguments
from bench.subjects import OURS, PYMILTER, Job, Subject
from sharded_milter.protocol.packets import Packet

# The content crosses to another process and must not be slower for it.
SPEED_AT_LEAST = 1.0

# Content is kept outside of the master's memory; this is room for buffers and for the allocator.
PEAK_AT_MOST_MB = 10.0

_MB = 1_000_000


def measure(subject: Subject, packets: Sequence[Packet], messages: int) -> tuple[float, float]:
    """Seconds for a message, and the master's peak above what it has idle, in MB."""
    with subject.serving(Job()) as server:
        load.run(server.path, 1, 5)  # warm, with small ones
        processes.reset_peak(server.pid)
        before = server.rss()
        result = load.run(server.path, 1, messages, packets=packets)
        return result.percentile(0.5), (processes.peak(server.pid) - before) / _MB


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--megabytes", type=float, default=25.0)
    parser.add_argument("--messages", type=int, default=8, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    report = Report(__doc__)
    size = int(options.megabytes * _MB)
    packets = message(body=size)
    rows: list[Row] = []
    for subject in (OURS, PYMILTER):
        if not subject.available():
            report.say(f"skipped: {subject.name} ({subject.install})")
            continue
        measured = [measure(subject, packets, options.messages) for _ in range(options.rounds)]
        seconds = sorted(each[0] for each in measured)[options.rounds // 2]
        peak = max(each[1] for each in measured)
        rows.append(
            {
                "milter": subject.name,
                "MB/s": size / _MB / seconds,
                "p50 ms": 1000 * seconds,
                "peak MB of the master above idle": peak,
            }
        )
    report.table(f"messages of {options.megabytes:g} MB", rows)
    if len(rows) > 1:
        ratio = rows[0]["MB/s"] / rows[1]["MB/s"]
        report.target(Target("MB/s, ours / pymilter's", ratio, SPEED_AT_LEAST, at_least=True))
    peak = rows[0]["peak MB of the master above idle"]
    report.target(Target("peak of the master above idle", peak, PEAK_AT_MOST_MB, "MB"))
    report.save(options.json)


if __name__ == "__main__":
    main()
