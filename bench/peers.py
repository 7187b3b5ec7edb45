"""How do we compare with every other way to run a milter, under the same load in the same run?

    python -m bench.peers [--connections 1 8 32] [--ms 0] [--seconds 2] [--rounds 3] [--tcp]
                          [--only NAME ...] [--json FILE] [--svg DIR]

A peer that is not installed is skipped by name. `--svg` draws throughput against workers and
latency against connections, which takes some minutes more.

Beside the peers stand two bounds: our milter in the master, without workers, and the least that a
Twisted master with AMP workers costs (`milters/amp_floor.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from bench import curves
from bench.report import Report, Row, Target, arguments, figures, machine, pooled
from bench.server import cores
from bench.subjects import (
    BOUNDS,
    IN_MASTER,
    LIBMILTER,
    OURS,
    PEERS,
    PYMILTER,
    Job,
    Subject,
    in_turn,
    installed,
)
from sharded_milter.sizing import processes
from sharded_milter.testing import load

# Before each measurement: interpreters warm up, thread stacks and buffers grow.
WARM_SECONDS = 0.5

_MICRO = 1e6


@dataclass(frozen=True)
class Goal:
    """How many times the peer's rate ours is to have."""

    times: float
    peer: Subject
    connections: int
    ms: float = 0.0  # of CPU for a scan
    ours: Subject = OURS

    def __str__(self) -> str:
        what = f"{self.ms:g} ms, {self.connections} connections"
        return f"mails/s, {self.ours.name} / {self.peer.name}, {what}"


GOALS = (
    Goal(2.0, PYMILTER, 8),
    Goal(3.0, PYMILTER, 32),
    Goal(1.95, PYMILTER, 8, ms=10.0),
    Goal(3.5, PYMILTER, 8, ours=IN_MASTER),
    Goal(3.0, LIBMILTER, 8, ours=IN_MASTER),
)


@dataclass(frozen=True)
class Measured:
    """One run."""

    load: load.Result
    cpu: processes.Cpu


def measure(
    job: Job, loads: Sequence[int], seconds: float, tcp: bool, subject: Subject
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


def row(subject: Subject, rounds: Sequence[Measured], ours: Sequence[Measured]) -> Row:
    """A line of the table: rates and CPU time of the round in the middle, all latencies."""

    def middle(figure: Callable[[Measured], float]) -> float:
        return median(map(figure, rounds))

    rate = middle(lambda each: each.load.rate)
    return {
        "milter": subject.name + (" (TCP)" if subject.tcp_only else ""),
        "ours/it": median(each.load.rate for each in ours) / rate,
        **figures(pooled([each.load for each in rounds])),
        "mails/s": rate,
        "client µs": middle(lambda each: _MICRO * each.load.client_cpu / each.load.messages),
        "master µs": middle(lambda each: _MICRO * each.cpu.master / each.load.messages),
        "workers µs": middle(lambda each: _MICRO * each.cpu.workers / each.load.messages),
    }


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ms", type=float, nargs="+", default=[0.0], help="CPU time of a scan")
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tcp", action="store_true", help="loopback instead of a UNIX socket")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of these peers")
    parser.add_argument("--svg", type=Path, metavar="DIR", help="draw there")
    return parser.parse_args()


def compare(report: Report, ms: float, connections: int, rows: Sequence[Row]) -> None:
    """Says of the goals that these rows tell about whether they are met."""
    rates = {row["milter"]: row["mails/s"] for row in rows}
    for goal in GOALS:
        measured = goal.ours.name in rates and goal.peer.name in rates
        if measured and (goal.ms, goal.connections) == (ms, connections):
            ratio = rates[goal.ours.name] / rates[goal.peer.name]
            report.target(Target(str(goal), ratio, goal.times, at_least=True))


def main() -> None:
    options = _options()
    report = Report(__doc__)
    others = (*BOUNDS, *PEERS)
    peers = [peer for peer in others if not options.only or peer.name in options.only]
    subjects = installed(peers, report.say)
    for ms in options.ms:
        job = Job(ms, options.workers)
        measured = in_turn(
            subjects,
            options.rounds,
            partial(measure, job, options.connections, options.seconds, options.tcp),
        )
        for connections in options.connections:
            title = f"{connections} connections, scan of {ms:g} ms CPU, {options.workers} workers"
            rounds = {
                name: [each[connections] for each in several] for name, several in measured.items()
            }
            rows = [row(s, rounds[s.name], rounds[OURS.name]) for s in subjects]
            report.table(title, rows)
            compare(report, ms, connections, rows)
    if options.svg is not None:
        where = "{cores} cores, Python {python}".format(**machine())
        drawn = [subject for subject in subjects if subject not in BOUNDS]
        curves.draw(options.svg, drawn, options.seconds, where)
    report.save(options.json)


if __name__ == "__main__":
    main()
