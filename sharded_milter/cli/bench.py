"""`sharded-milterctl bench`: measure a milter with the real daemon, and find what limits it."""

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

# Seconds of a measurement: long enough for some hundred scans of a slow milter.
SECONDS = 10.0


@click.command()
@with_load_options(SECONDS)
@click.option("--workers", type=Counts(), default=lambda: (usable_cpus(),),
              show_default="one for each usable CPU", metavar="N,N...",
              help="Number of worker processes. Several numbers are measured one after the"
              " other.")  # fmt: skip
def bench(workers: tuple[int, ...], **values: Any) -> int:
    """Send MILTER as many messages as it can answer, and print what limits it.

    MILTER is given as for sharded-milter, which is started with it on a private socket. With no
    milter given, the content scanner is measured. The load client behaves like Postfix and runs on
    this machine too: CPU that it uses is unavailable to the milter, so it is printed.
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
    """Show a progress bar over `runs` runs if standard error is a terminal.

    The context is a function that begins the next run and returns its `on_progress`.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[answered]:,} messages"),
        TimeElapsedColumn(),
    )
    done = -1
    bar = Progress(*columns, console=screen.err, transient=True)
    # Without a terminal the bar is not started: old versions of rich end it with a blank line.
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
    """Print warnings about runs whose figures are distorted by failures."""
    for run in runs:
        with_workers = f"with {some(run.workers)}"
        total = f"of {counted(run.load.messages, 'message')}"
        for line in _disturbances(run):
            screen.warn(f"warning: {with_workers} {line}")
        if run.failed:
            why, times = Counter(_without_queue_id(what) for what in run.failed).most_common(1)[0]
            screen.warn(
                f"warning: {with_workers} the milter failed on {len(run.failed):,} {total}"
                f" ({counted(times, 'time')}: {why}); the figures include these failures"
            )
        elif tempfailed := run.load.verdicts.get("tempfail", 0):
            screen.warn(f"warning: {with_workers} the milter tempfailed {tempfailed:,} {total}")


def _disturbances(run: Measurement) -> Iterator[str]:
    """Yield the reasons why the averages of a run may mislead."""
    if run.lost:
        why, times = Counter(run.lost).most_common(1)[0]
        yield (
            f"{some(len(run.lost))} died during the run ({counted(times, 'time')}: {why}); messages"
            " waited for replacements"
        )
    if run.load.unanswered:
        yield (
            f"{counted(run.load.unanswered, 'message')} had no verdict after {run.window:,.1f} s;"
            " the figures do not include them"
        )
    if run.load.seconds < MIN_SECONDS:
        yield f"only {run.load.seconds:.2g} s were measured: this is too short for exact figures"


def _without_queue_id(what: str) -> str:
    about, separator, why = what.partition(" at ")
    return f"at {why}" if separator else about
