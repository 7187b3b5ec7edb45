"""How far is dispatch from the best that is possible without knowing how long a scan takes?

    python -m bench.simulate [--quick] [--only TEXT] [--seed 1] [--json FILE]

A simulation of one master, in simulated time. The queue, the assignment, the dispatcher, the
shards and the pool are the real ones; workers only let time pass. Beside it, with the very same
scans, arrivals and keys, the ideal queue: one for all workers, by age, from which each worker that
is done takes the next job without a gap. With objects it is one queue for each worker, and a
connection belongs to the worker that has the fewest. `--reserve`, deaths and recycling it has not.

Modelled: the master's processor, one message at a time (`MASTER_CPU` for each question and each
answer); the way to a worker and back (`HOP`); that a worker reads all that has arrived before it
begins a job, skips what was withdrawn and says so; that the master reads a worker's answers before
it takes anything over from it; deaths, exits, starts (`START`); recycling; sessions of objects.

Not modelled: that several jobs which leave in one write cost less than as many writes; that
workers share cores with each other and the master; reading of messages; memory; the MTA's own
time; what the master does at once instead of in turn, as timers. A scan takes as long as its law
says, on whatever worker, and light jobs differ in nothing else.

A job's wait is all time from its question's arrival to its answer, but for the scan itself. The
first 5 % of a plan are not counted, nor the first connection of each client, nor what was asked
after the last connection came.
Targets of each scenario:

- rate / ideal rate: at least 0.95;
- p99 of the wait / ideal p99: at most 1.5. Compared where the ideal's p99 is at least `FEW`, or
  ours is longer by more than `BESIDE_IDLE` and a hop;
- longest wait / p99 wait: at most 4, or 1.25 times what the ideal queue has where that is more: a
  heavy tail, or a load at which nearly nobody waits, is no fault of dispatch. Compared where the
  longest is longer than the ideal's by more than `BESIDE_IDLE` and a hop. Where workers die, by
  the start of two processes and a look of the pool besides.

Unfairness is the longest mean wait of a stage, connection or key, as a multiple of the mean wait;
beside it that of the ideal queue. A connection that is short is counted with others.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.ideal_queue import Ideal
from bench.report import Report, Row, Target, arguments
from bench.simulated_loads import Figures, Load, Scans, Scenario, figures, plan
from bench.simulated_master import START, Master
from bench.simulated_time import HOP
from sharded_milter.limits import Limits
from sharded_milter.pool.pool import TICK
from sharded_milter.protocol.stages import Stage

RATE, P99, LONGEST = 0.95, 1.5, 4.0

# What an ideal queue has of this kind by itself may be exceeded by so much.
STRUCTURAL = 1.25

# Waits below this, seconds, are too short for anybody to feel.
FEW = 0.005

# What the rules of dispatch let a job wait, seconds, while a shard is idle.
BESIDE_IDLE = 0.05

# A message that has killed waits for a look of the pool, and for processes to start.
REPLACED = TICK + 2 * START

MS = 0.001
_MESSAGE = (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.HEADER, Stage.EOH, Stage.BODY, Stage.EOM)
_ENVELOPE = (Stage.MAIL, Stage.RCPT, Stage.EOM)


def _fixed(ms: float) -> Scans:
    return Scans(ms * MS)


def _lognormal(ms: float, sigma: float = 1.0) -> Scans:
    return Scans(ms * MS, "lognormal", sigma)


def _pareto(ms: float, alpha: float = 1.5) -> Scans:
    return Scans(ms * MS, "pareto", alpha)


def _slow(ms: float) -> Scans:
    return Scans(ms * MS, slow=True)


# Every size with every mean, and every load with every law; a closed loop has four clients a shard.
_SIZES = [
    Scenario(shards, scans, load=load, jobs=jobs if load else 2 * jobs)
    for shards, jobs in ((2, 3000), (8, 3000), (64, 4000), (512, 7000))
    for scans in (_lognormal(1), _lognormal(10), _lognormal(100), _lognormal(1000))
    for load in (0.8, 0.0)
    if scans.mean * shards < 64 or load
]

_LOADS = [
    Scenario(shards, scans, load=load, jobs=jobs)
    for shards, jobs in ((2, 3000), (8, 5000))
    for scans in (_fixed(1), _fixed(10), _lognormal(10), _pareto(10), _pareto(100))
    for load in (0.5, 0.8, 0.95, 0.0)
    if scans != _lognormal(10) or load not in (0.8, 0.0)  # those are above
]

_SLOW = [
    Scenario(shards, scans, load=load, jobs=5000)
    for shards in (2, 8, 64)
    for scans in (_slow(1), _slow(10))
    for load in (0.5, 0.8, 0.0)
    if shards < 64 or not load
]

_KEYS = [
    Scenario(8, scans, load=load, keys=1000, zipf=zipf, title=title, jobs=4000)
    for scans in (_fixed(1), _lognormal(10), _lognormal(100))
    for load in (0.5, 0.8, 0.0)
    for zipf, title in ((0.0, "keys"), (1.2, "zipf keys"))
    if scans != _lognormal(100) or load == 0.8
]

_PYMILTER = Scenario(
    2, _fixed(10), clients=8, title="pymilter", objects=True, messages=4, stages=_MESSAGE,
    connect=(Stage.CONNECT, Stage.HELO),
)  # fmt: skip

_OBJECTS = [
    _PYMILTER,
    replace(_PYMILTER, title="stateless", objects=False),
    replace(_PYMILTER, scans=_lognormal(10)),
    replace(_PYMILTER, scans=_lognormal(10), shards=8, clients=32),
    replace(_PYMILTER, scans=_lognormal(10), shards=8, clients=0, load=0.5),
    replace(_PYMILTER, scans=_lognormal(10), shards=8, clients=0, load=0.8),
    replace(_PYMILTER, scans=_fixed(1), shards=8, clients=0, load=0.8),
]

_STAGES = Scenario(
    8, _lognormal(1000), load=0.8, title="light", stages=_ENVELOPE, light=1 * MS, jobs=4000
)

_LIGHT = [
    _STAGES,
    replace(_STAGES, title="light, reserve", limits=Limits(reserve=1), load=0.5),
    replace(_STAGES, scans=_lognormal(10), load=0.8),
    replace(_STAGES, scans=_lognormal(100), load=0.95),
    replace(_STAGES, scans=_lognormal(100), load=0.0, clients=32),
    Scenario(8, _lognormal(10), clients=32, title="all stages", stages=_MESSAGE,
             connect=(Stage.CONNECT, Stage.HELO), messages=4),
]  # fmt: skip

_DEATHS = [
    Scenario(8, _lognormal(10), load=0.5, poison=0.0005, title="poison"),
    Scenario(8, _lognormal(10), load=0.5, innocent=0.001, title="innocent"),
    Scenario(8, _lognormal(100), load=0.8, innocent=0.001, title="innocent"),
    Scenario(8, _lognormal(10), load=0.8, limits=Limits(max_messages=200), title="recycling"),
    replace(_PYMILTER, shards=8, clients=0, load=0.5, title="recycling",
            limits=Limits(max_messages=200)),
]  # fmt: skip

SCENARIOS = [*_SIZES, *_LOADS, *_SLOW, *_KEYS, *_OBJECTS, *_LIGHT, *_DEATHS]

QUICK = [
    replace(scenario, jobs=1500)
    for scenario in (
        _LOADS[1],
        _SLOW[1],
        _KEYS[1],
        _PYMILTER,
        _STAGES,
        replace(_DEATHS[0], poison=0.002),
    )
]


@dataclass(frozen=True)
class Outcome:
    """A scenario as the real dispatch and as the ideal queue have done it."""

    scenario: Scenario
    ours: Figures
    ideal: Figures
    counters: dict[str, int]

    @property
    def targets(self) -> list[Target]:
        """Those that have a meaning here."""
        ours, ideal, name = self.ours, self.ideal, self.scenario.name
        grace = BESIDE_IDLE + HOP
        found = [Target(f"{name}: rate / ideal", ours.rate / ideal.rate, RATE, at_least=True)]
        if ideal.p99 >= FEW or ours.p99 - ideal.p99 > grace:
            found.append(Target(f"{name}: p99 / ideal", ours.p99 / ideal.p99, P99))
        if self.scenario.kills:
            grace += REPLACED
        if ours.longest - ideal.longest > grace:
            goal = max(LONGEST, STRUCTURAL * ideal.longest / ideal.p99)
            found.append(Target(f"{name}: longest / p99", ours.longest / ours.p99, goal))
        return found

    @property
    def row(self) -> Row:
        """The table's."""
        ours, ideal = self.ours, self.ideal
        missed = [target.what.rpartition(": ")[2].split()[0] for target in self.targets
                  if not target.met]  # fmt: skip
        return {
            "scenario": self.scenario.name,
            "jobs/s": ours.rate,
            "ratio": ours.rate / ideal.rate,
            "p50": ours.p50 / MS,
            "p99": ours.p99 / MS,
            "ideal": ideal.p99 / MS,
            "longest": ours.longest / MS,
            "ideal's": ideal.longest / MS,
            "failed": ours.failed,
            "missed": " ".join(missed) or "-",
        }

    @property
    def unfairness(self) -> Row:
        """The row of the other table."""
        ours, ideal = self.ours, self.ideal
        return {
            "scenario": self.scenario.name,
            "stages": ours.stages,
            "ideal": ideal.stages,
            "connections": ours.connections,
            "ideal's": ideal.connections,
            "keys": ours.keys,
            "ideal's ": ideal.keys,
        }


def simulated(scenario: Scenario, seed: int) -> Outcome:
    """Runs one scenario on both."""
    random.seed(seed)  # the pool's: it spreads recycling
    asked = plan(scenario, seed)
    master = Master(scenario.shards, scenario.limits, objects=scenario.objects)
    master.questions += [question for each in asked for question in each.questions]
    Load(scenario, master, asked).run()
    again = plan(scenario, seed)
    Load(scenario, Ideal(scenario.shards, objects=scenario.objects), again).run()
    return Outcome(scenario, figures(scenario, asked), figures(scenario, again), master.counters)


def compare(report: Report, scenarios: Iterable[Scenario], seed: int) -> list[Outcome]:
    """Prints a table of all, then each figure that misses its target, and how many do."""
    outcomes = [simulated(scenario, seed) for scenario in scenarios]
    title = "Rate, its ratio to that of the ideal queue, waits in ms and the ideal ones beside them"
    report.table(title, [outcome.row for outcome in outcomes])
    title = "Unfairness: the longest mean wait of one, as a multiple of the mean"
    report.table(title, [outcome.unfairness for outcome in outcomes])
    targets = [target for outcome in outcomes for target in outcome.targets]
    for target in targets:
        report.target(target)
    met = sum(target.met for target in targets)
    report.say(f"{met} of {len(targets)} targets met in {len(outcomes)} scenarios")
    return outcomes


def main() -> None:
    """Runs all scenarios."""
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="a few short scenarios")
    parser.add_argument("--only", default="", metavar="TEXT", help="those whose names have it")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report = Report(__doc__)
    scenarios = [each for each in (QUICK if options.quick else SCENARIOS)
                 if options.only in each.name]  # fmt: skip
    compare(report, scenarios, options.seed)
    report.save(options)


if __name__ == "__main__":
    main()
