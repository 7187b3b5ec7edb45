"""Does a pymilter script use both cores?

    python -m bench.pymilter_scaling [--ms 10] [--connections 8] [--seconds 4] [--rounds 5]
                                     [--json FILE]

One script that burns CPU time on each message (`milters/pymilter_peer.py`), untouched, under the
same load: with plain pymilter, and with `sharded-milter --pymilter` and as many workers as cores.
"""

from __future__ import annotations

from functools import partial

from bench.client import Load, drive
from bench.report import Report, Target, arguments, costs, figures, rates
from bench.rounds import alternating
from bench.server import cores
from bench.subjects import PYMILTER, WITH_A_SCRIPT, Job, all_serving, installed

# With 2 workers on 2 cores, which leave the master and the client a tenth. By CPU ms of a message.
TIMES_AT_LEAST = {10.0: 1.85}


def ask(report: Report, ms: float, connections: int, seconds: float, rounds: int) -> None:
    """Measures the script both ways."""
    subjects = installed([PYMILTER, WITH_A_SCRIPT], report.say)
    if len(subjects) < 2:
        return
    with all_serving(subjects, Job(ms, cores())) as servers:
        for server in servers.values():
            drive(server, Load(connections, seconds=seconds / 2))  # warm
        measure = partial(drive, wanted=Load(connections, seconds=seconds))
        runs = alternating(servers, rounds, measure)
    ratio = rates(runs[WITH_A_SCRIPT.name]) / rates(runs[PYMILTER.name])
    rows = [{"way": name, **figures(several), **costs(several)} for name, several in runs.items()]
    title = f"{connections} connections, {ms:g} ms a message, {cores()} workers"
    report.table(title, rows)
    if ms in TIMES_AT_LEAST:
        what = f"rate of a pymilter script, ours / plain, {title}"
        report.target(Target.of(what, ratio, TIMES_AT_LEAST[ms], at_least=True))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ms", type=float, nargs="+", default=[10.0], help="CPU of a message")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = Report(__doc__)
    for ms in options.ms:
        ask(report, ms, options.connections, options.seconds, options.rounds)
    report.save(options)


if __name__ == "__main__":
    main()
