"""`sharded-milterctl tune`: recommend a number of workers, and find the limit of one master."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from sharded_milter.cli.bench import progress, warn
from sharded_milter.cli.load_options import (
    Counts,
    OutputFile,
    Screen,
    in_master_only,
    plan,
    save,
    with_load_options,
    write,
)
from sharded_milter.errors import UsageError
from sharded_milter.ops.cpus import usable_cpus
from sharded_milter.sizing.bottleneck import NOTABLE_SHARE, Limit, bottleneck, some
from sharded_milter.sizing.measurement import Measurement
from sharded_milter.sizing.plot import curve
from sharded_milter.sizing.recommendation import TOLERANCE, MasterLimit, recommended, rising, sweep
from sharded_milter.sizing.runs import Plan, measure, middle
from sharded_milter.sizing.svg import Chart, Line
from sharded_milter.sizing.tables import tables

# Seconds of each measurement. It is short, because each number is measured in several rounds.
SECONDS = 3.0

# How often each number is measured. A busy minute of the machine disturbs one round of each number
# rather than all rounds of one, and the median of three ignores it.
ROUNDS = 3

# Columns of the curve, also on a wider terminal: the figures must stay close to their bars.
PLOT_WIDTH = 80


@click.command()
@with_load_options(SECONDS)
@click.option(
    "--workers",
    type=Counts(),
    default=lambda: tuple(sweep(usable_cpus())),
    show_default="1 to twice the CPUs",
    metavar="N,N...",
    help="Numbers of worker processes to try.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=ROUNDS,
    show_default=True,
    help="How often each number is measured; the median counts.",
)
@click.option("--svg", type=OutputFile(dir_okay=False), metavar="FILE",
              help="Write the scaling curve to this SVG file.")  # fmt: skip
def tune(workers: tuple[int, ...], rounds: int, svg: Path | None, **values: Any) -> int:
    """Try several numbers of workers with MILTER and recommend one.

    Prints the scaling curve, what limits the recommended number, and the message rate above
    which one master is not enough. MILTER is given as for sharded-milter.
    """
    if in_master_only(values):
        raise UsageError("a milter in the master has no workers, so there is nothing to tune")
    screen = Screen.make(values["json_path"])
    counts = tuple(sorted(workers))
    made = plan(values, counts, SECONDS, screen)
    runs = _sweep(screen, made, counts, rounds)
    rates = {count: run.load.rate for count, run in runs.items()}
    best = recommended(rates)
    limit = MasterLimit.of(runs[best].master_cpu, runs[best].workers_cpu)
    for each in tables(list(runs.values())):
        screen.print(each)
    _plot(screen, rates, best)
    _advise(screen, runs[best], best, limit)
    if rising(rates):
        further = f"{2 * best},{4 * best}"
        screen.print_line(
            f"the rate still rises at the largest number tried; try --workers {further}"
        )
    warn(screen, list(runs.values()))
    _warn_of_others(screen, _others(runs.values()), made.cores)
    if svg is not None:
        write(svg.absolute(), chart(rates, made).svg())
    more = {
        "recommended_workers": best,
        "master_limit_messages_per_second": limit and limit.rate,
    }
    save(values["json_path"], made, list(runs.values()), more)
    return 0


def _sweep(
    screen: Screen, made: Plan, counts: tuple[int, ...], rounds: int
) -> dict[int, Measurement]:
    """Measure each number of workers in several rounds; return the median round of each."""
    every: dict[int, list[Measurement]] = {count: [] for count in counts}
    with progress(screen, made, rounds * len(counts)) as next_run:
        for number in range(rounds):
            for count in counts:
                on_progress = next_run(f"round {number + 1} of {rounds}, {some(count)}")
                every[count].append(measure(made, count, on_progress))
    return {count: middle(several) for count, several in every.items()}


def _plot(screen: Screen, rates: Mapping[int, float], best: int) -> None:
    screen.print_line("messages/s by workers:")
    width = min(screen.out.width, PLOT_WIDTH)
    ascii_only = not screen.out.encoding.lower().startswith("utf")
    for line in curve(rates, width=width, marked=best, ascii_only=ascii_only):
        screen.print_line(line)


def _advise(screen: Screen, run: Measurement, best: int, limit: MasterLimit | None) -> None:
    screen.print_line(
        f"recommended: --workers {best}, the fewest within {TOLERANCE:.0%} of the best rate"
    )
    screen.print_line(f"bottleneck with {some(best)}: {bottleneck(run.use)}")
    if limit is None:
        screen.print_line("the master used too little CPU to compute its limit")
        return
    screen.print_line(
        f"one master becomes the limit at about {limit.rate:,.0f} messages/s of this kind"
        f" ({1000 * run.master_cpu:.2f} ms of one core each; its workers then compute on"
        f" {limit.cores:.1f} cores). For more, run a second service with a socket of its own and"
        " give it a part of the MTAs."
    )


def _others(runs: Iterable[Measurement]) -> float:
    """Return the most cores that other programs used in runs that were limited by the CPU."""
    return max(
        (run.use.others for run in runs if bottleneck(run.use).limit is not Limit.QUEUE),
        default=0.0,
    )


def _warn_of_others(screen: Screen, others: float, cores: int) -> None:
    if others >= NOTABLE_SHARE * cores:
        screen.warn(
            f"warning: other programs used up to {others:.1f} of {cores} cores; this makes more"
            " workers seem better than they are, so tune again when the machine is idle"
        )


def chart(rates: Mapping[int, float], made: Plan) -> Chart:
    """Return a chart of the message rate by number of workers, with linear scaling beside it."""
    first = min(rates)
    ideal = [rates[first] * count / first for count in rates]
    what = " ".join(made.arguments).removeprefix("-- ") or "content scanner"
    note = f"{what}; {made.connections} connections; {made.cores} cores"
    lines = [
        Line("measured", list(rates.values())),
        Line("linear", ideal, flat=True),
    ]
    return Chart("Messages a second", note, "worker processes", list(map(str, rates)), lines)
