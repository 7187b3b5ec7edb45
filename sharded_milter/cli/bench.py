"""`sharded-milterctl bench`: how fast a milter is on the real pool, and what limits it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sharded_milter.cli.load_options import Counts, Screen, plan, save, with_load_options
from sharded_milter.ops.cpus import usable_cpus
from sharded_milter.sizing.bottleneck import MIN_SECONDS, bottleneck, counted, some
from sharded_milter.sizing.measurement import Measurement
from sharded_milter.sizing.runs import Plan, measure
from sharded_milter.sizing.tables import resident, tables

# Long enough for some hundred scans of a slow milter.
SECONDS = 10.0


@click.command()
@with_load_options(SECONDS)
@click.option("--workers", type=Counts(), default=lambda: (usable_cpus(),),
              show_default="the CPUs it may use", metavar="N,N...",
              help="Worker processes; several numbers are measured in turn.")  # fmt: skip
def bench(workers: tuple[int, ...], **values: Any) -> int:
    """Send MILTER as many messages as it takes, and say what limits it.

    MILTER is named as for sharded-milter, which is started with it on a private socket; without
    one the content scanner is measured. The client behaves as Postfix and runs on this machine
    too: what it takes of the CPU is printed.
    """
    screen = Screen.make(values["json_path"])
    made = plan(values, workers, SECONDS, screen)
    with progress(screen, made, len(workers)) as next_run:
        runs = [measure(made, count, next_run(some(count))) for count in workers]
    for each in tables(runs):
        screen.print(each)
    screen.print_line(resident(runs))
    for run in runs:
        screen.print_line(f"bottleneck with {some(run.workers)}: {bottleneck(run.use)}")
    warn(screen, runs)
    save(values["json_path"], made, runs)
    return 0


@contextmanager
def progress(
    screen: Screen, made: Plan, runs: int
) -> Iterator[Callable[[str], Callable[[float, int], None]]]:
    """On a terminal a bar over so many runs; gives what announces the next one.

    That returns what is told how far this run is.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[answered]:,} messages"),
        TimeElapsedColumn(),
    )
    done = -1
    bar = Progress(*columns, console=screen.err, transient=True)
    # Elsewhere it is not even started: older versions of rich end a disabled bar with a blank line.
    with bar if screen.err.is_terminal else nullcontext():
        task = bar.add_task("", total=runs, answered=0)

        def next_run(name: str) -> Callable[[float, int], None]:
            nonlocal done
            done += 1
            bar.update(task, description=name, completed=done, answered=0)

            def on_progress(seconds: float, answered: int) -> None:
                share = made.done(seconds, answered)
                bar.update(task, completed=done + share, answered=answered)

            return on_progress

        yield next_run


def warn(screen: Screen, runs: Sequence[Measurement]) -> None:
    """Says which of the figures are those of failures."""
    for run in runs:
        with_workers = f"with {some(run.workers)}"
        total = f"of {counted(run.load.messages, 'message')}"
        for line in _disturbances(run):
            screen.warn(f"warning: {with_workers} {line}")
        if run.failed:
            why, times = Counter(_without_queue_id(what) for what in run.failed).most_common(1)[0]
            screen.warn(
                f"warning: {with_workers} the milter failed on {len(run.failed):,} {total}"
                f" ({counted(times, 'time')}: {why}); their figures are those of failures"
            )
        elif tempfailed := run.load.verdicts.get("tempfail", 0):
            screen.warn(
                f"warning: {with_workers} {tempfailed:,} {total} were tempfailed by the milter"
            )


def _disturbances(run: Measurement) -> Iterator[str]:
    """What makes the averages of a run mean less than they seem to."""
    if run.lost:
        why, times = Counter(run.lost).most_common(1)[0]
        yield (
            f"{some(len(run.lost))} died during the run ({counted(times, 'time')}: {why}); messages"
            " waited for replacements"
        )
    if run.load.unanswered:
        yield (
            f"{counted(run.load.unanswered, 'message')} had no answer after {run.window:,.1f} s;"
            " the figures are those of the others"
        )
    if run.load.seconds < MIN_SECONDS:
        yield (
            f"only {run.load.seconds:.2g} s were measured: figures of so short a run mean little"
        )


def _without_queue_id(what: str) -> str:
    about, separator, why = what.partition(" at ")
    return f"at {why}" if separator else about
