"""Are we as fast as we want to be?

    python -m bench.targets [--rounds 7] [--seconds 2] [--json FILE]

Each question is that of a script here, with its load and its target, asked as that script asks it;
at the end stands a table of all. It takes about seven minutes, and needs gcc and pymilter for all
of the figures. What passes a real MTA is asked by `through_postfix.py`.
"""

from __future__ import annotations

import resource
import time

from bench import cpu_scans, large_message, latency, peers, pymilter_scaling, sessions
from bench.report import Report, arguments
from bench.server import cores
from bench.subjects import PYMILTER, Job
from sharded_milter.sizing.processes import machine_cpu

CONNECTIONS = 8
MANY_CONNECTIONS = 32

LARGE_MB = 25.0

# Scans of that many ms are few in a second, and large messages too.
LONGER = 1.5

# For cheap messages pymilter takes three times as much CPU in one round as in another, by where the
# threads of its connections happen to run. So rounds are so many times shorter, and more.
SHORTER = 2


def own_cpu() -> float:
    """Seconds of CPU of this process and of all that it has started and that have ended."""
    ours = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in ours)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a cheap measurement")
    options = parser.parse_args()
    report = Report(__doc__)
    seconds, rounds = options.seconds, options.rounds
    longer = LONGER * seconds
    loads = (CONNECTIONS, MANY_CONNECTIONS)
    began, machine, own = time.perf_counter(), machine_cpu(), own_cpu()
    job = Job(workers=cores())
    peers.ask(report, [PYMILTER], job, loads, seconds / SHORTER, rounds * SHORTER)
    latency.ask(report, [PYMILTER], seconds, rounds)
    for ms in cpu_scans.AT_LEAST:
        cpu_scans.ask(report, ms, loads, cores(), longer, rounds)
    large_message.ask(report, LARGE_MB, tuple(large_message.SPEED_AT_LEAST), longer, rounds)
    sessions.ask(report, CONNECTIONS, seconds, rounds)
    for ms in pymilter_scaling.TIMES_AT_LEAST:
        pymilter_scaling.ask(report, ms, CONNECTIONS, longer, rounds)
    others = machine_cpu() - machine - (own_cpu() - own)
    share = others / cores() / (time.perf_counter() - began)
    report.summary()
    report.say(f"meanwhile {share:.0%} of the cores' time went to others on the machine")
    report.save(options)


if __name__ == "__main__":
    main()
