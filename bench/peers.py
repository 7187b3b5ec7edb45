"""How do we compare with every other way to run a milter, under the same load in the same run?

    python -m bench.peers [--connections 1 8 32] [--ms 0] [--seconds 2] [--rounds 3] [--tcp]
                          [--only NAME ...] [--json FILE] [--svg DIR]

A peer that is not installed is skipped by name. `--svg` draws throughput against workers and
latency against connections, which takes some minutes more.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import curves, load, processes
from bench.report import Report, Row, arguments, machine
from bench.server import cores
from bench.subjects import OURS, PEERS, Job, Subject

# Before each measurement: interpreters warm up, thread stacks and buffers grow.
WARM_SECONDS = 0.5

_MICRO = 1e6


@dataclass(frozen=True)
class Measured:
    """One run."""

    load: load.Result
    cpu: processes.Cpu


# By subject and connections, one for each round.
Everything = dict[tuple[str, int], list[Measured]]


def measure(
    subject: Subject, job: Job, loads: Sequence[int], seconds: float, tcp: bool
) -> dict[int, Measured]:
    """One server, one run for each number of connections."""
    results = {}
    with subject.serving(job, tcp=tcp) as server:
        for connections in loads:
            load.run_for(server.path, connections, WARM_SECONDS)
            before = processes.cpu(server.pid)
            result = load.run_for(server.path, connections, seconds)
            results[connections] = Measured(result, processes.cpu(server.pid) - before)
    return results


def measure_all(subjects: Sequence[Subject], job: Job, options: argparse.Namespace) -> Everything:
    """All subjects in turn, again and again, so that a busy minute hits all of them."""
    everything: Everything = defaultdict(list)
    for _ in range(options.rounds):
        for subject in subjects:
            runs = measure(subject, job, options.connections, options.seconds, options.tcp)
            for connections, measured in runs.items():
                everything[subject.name, connections].append(measured)
    return everything


def row(subject: Subject, rounds: Sequence[Measured], ours: Sequence[Measured]) -> Row:
    """A line of the table: rates and CPU time of the round in the middle, all latencies."""

    def middle(figure: Callable[[Measured], float]) -> float:
        return median(map(figure, rounds))

    result = load.pooled([each.load for each in rounds]).row()
    result["mails/s"] = middle(lambda each: each.load.rate)
    return {
        "milter": subject.name + (" (TCP)" if subject.tcp_only else ""),
        "ours/it": median(each.load.rate for each in ours) / result["mails/s"],
        **result,
        "client µs": middle(lambda each: _MICRO * each.load.client_cpu / each.load.messages),
        "master µs": middle(lambda each: _MICRO * each.cpu.master / each.load.messages),
        "workers µs": middle(lambda each: _MICRO * each.cpu.workers / each.load.messages),
    }


def present(report: Report, only: Sequence[str]) -> list[Subject]:
    """Ours and the peers that can run; says which cannot."""
    subjects = [OURS]
    for peer in PEERS:
        if only and peer.name not in only:
            continue
        if peer.available():
            subjects.append(peer)
        else:
            report.say(f"skipped: {peer.name} ({peer.install})")
    return subjects


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ms", type=float, nargs="+", default=[0.0], help="CPU time of a scan")
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tcp", action="store_true", help="loopback instead of a UNIX socket")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of these peers")
    parser.add_argument("--svg", type=Path, metavar="DIR", help="draw there")
    options = parser.parse_args()
    report = Report(__doc__)
    subjects = present(report, options.only)
    for ms in options.ms:
        job = Job(ms, options.workers)
        measured = measure_all(subjects, job, options)
        for connections in options.connections:
            title = f"{connections} connections, scan of {ms:g} ms CPU, {options.workers} workers"
            ours = measured[OURS.name, connections]
            rows = [row(s, measured[s.name, connections], ours) for s in subjects]
            report.table(title, rows)
    if options.svg is not None:
        where = "{cores} cores, Python {python}".format(**machine())
        curves.draw(options.svg, subjects, options.seconds, where)
    report.save(options.json)


if __name__ == "__main__":
    main()
