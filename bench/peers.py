"""How do we compare with every other way to run a milter, under the same load in the same run?

    python -m bench.peers [--connections 1 8 32] [--ms 0] [--seconds 1] [--rounds 9] [--tcp]
                          [--only NAME ...] [--json FILE] [--svg DIR]

A peer that is not installed is skipped by name. `--svg` draws throughput against workers and
latency against connections, which takes some minutes more.

Beside the peers stand two bounds: our milter in the master, without workers, and the least that a
Twisted master with AMP workers costs (`milters/amp_floor.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import curves
from bench.client import Load, Run, drive
from bench.report import (
    Report,
    Row,
    Target,
    arguments,
    costs,
    figures,
    machine,
    master_us,
    rates,
)
from bench.rounds import alternating
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
    all_serving,
    installed,
)

# Before the first measurement: interpreters warm up, thread stacks and buffers grow.
WARM_SECONDS = 0.5


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

# Of the master's CPU, for a cheap message at MASTER_CONNECTIONS.
MASTER_US_AT_MOST = 90.0
MASTER_CONNECTIONS = 8

# What each milter has measured, by its name.
Runs = Mapping[str, Sequence[Run]]


def rows(subjects: Sequence[Subject], runs: Runs) -> list[Row]:
    """A line of the table for each: medians of the rounds, and of the ratios of each round."""
    return [
        {
            "milter": subject.name + (" (TCP)" if subject.tcp_only else ""),
            "ours/it": (ratio := rates(runs[OURS.name]) / rates(runs[subject.name])).middle,
            "rounds": ratio.spread,
            **figures(runs[subject.name]),
            **costs(runs[subject.name]),
        }
        for subject in subjects
    ]


def compare(report: Report, ms: float, connections: int, runs: Runs) -> None:
    """Says of the goals that these runs tell about whether they are met."""
    if (ms, connections) == (0.0, MASTER_CONNECTIONS):
        what = f"master's CPU of a cheap message, {connections} connections"
        report.target(Target.of(what, master_us(runs[OURS.name]), MASTER_US_AT_MOST, "µs"))
    for goal in GOALS:
        measured = goal.ours.name in runs and goal.peer.name in runs
        if measured and (goal.ms, goal.connections) == (ms, connections):
            ratio = rates(runs[goal.ours.name]) / rates(runs[goal.peer.name])
            report.target(Target.of(str(goal), ratio, goal.times, at_least=True))


def ask(
    report: Report,
    peers: Sequence[Subject],
    job: Job,
    loads: Sequence[int],
    seconds: float,
    rounds: int,
    tcp: bool = False,
) -> None:
    """Measures ours and these under each number of connections."""
    subjects = [OURS, *installed(peers, report.say)]
    with all_serving(subjects, job, tcp=tcp) as servers:
        for connections in loads:
            for server in servers.values():
                drive(server, Load(connections, seconds=WARM_SECONDS))
            measure = partial(drive, wanted=Load(connections, seconds=seconds))
            runs = alternating(servers, rounds, measure)
            title = f"{connections} connections, scan of {job.ms:g} ms CPU, {job.workers} workers"
            report.table(title, rows(subjects, runs))
            compare(report, job.ms, connections, runs)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ms", type=float, nargs="+", default=[0.0], help="CPU time of a scan")
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tcp", action="store_true", help="loopback instead of a UNIX socket")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of these peers")
    parser.add_argument("--svg", type=Path, metavar="DIR", help="draw there")
    return parser.parse_args()


def main() -> None:
    options = _options()
    report = Report(__doc__)
    others = (*BOUNDS, *PEERS)
    peers = [peer for peer in others if not options.only or peer.name in options.only]
    for ms in options.ms:
        job = Job(ms, options.workers)
        ask(report, peers, job, options.connections, options.seconds, options.rounds, options.tcp)
    if options.svg is not None:
        where = "{cores} cores, Python {python}".format(**machine())
        drawn = [OURS, *(peer for peer in peers if peer not in BOUNDS and peer.available())]
        curves.draw(options.svg, drawn, options.seconds, where)
    report.save(options)


if __name__ == "__main__":
    main()
