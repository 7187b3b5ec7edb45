"""The figures of runs as tables, for a terminal or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from sharded_milter.sizing.measurement import PERCENTILES, Measurement

_MB = 1_000_000

Row = Mapping[str, Any]


def table(title: str, rows: Sequence[Row]) -> Table:
    """Return a table of rows that have the same keys; numbers are right-aligned."""
    made = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1))
    for name, value in rows[0].items():
        justify = "left" if isinstance(value, str) else "right"
        made.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*(cell(value) for value in row.values()))
    return made


def cell(value: Any) -> str:
    """Return a value as text, with at most three significant digits if it is a float."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def tables(runs: Sequence[Measurement]) -> list[Table]:
    """Return tables with a line for each run: latency, CPU time, where messages waited."""
    return [
        table("From MAIL to the verdict, in ms", [_speed(run) for run in runs]),
        table("CPU ms of a message, cores in use", [_cost(run) for run in runs]),
        table("Where messages waited", _waits(runs)),
    ]


def resident(runs: Sequence[Measurement]) -> str:
    """Return a sentence with the resident memory of master and worker."""
    master = max(run.memory.master for run in runs) / _MB
    worker = max(run.memory.worker for run in runs) / _MB
    return f"resident memory: master {cell(master)} MB, each worker {cell(worker)} MB"


def _speed(run: Measurement) -> Row:
    load = run.load
    verdicts = ", ".join(f"{name} {count:,}" for name, count in sorted(load.verdicts.items()))
    latencies = {name: 1000 * load.percentile(share) for name, share in PERCENTILES.items()}
    return {"workers": run.workers, "messages/s": load.rate, **latencies, "verdicts": verdicts}


def _cost(run: Measurement) -> Row:
    use = run.use
    row = {
        "master ms": 1000 * run.master_cpu,
        "workers ms": 1000 * run.workers_cpu,
        "master": f"{use.master:.2f}",
        "all workers": f"{use.computing:.2f}",
        "client": f"{use.client:.2f}",
        "others": f"{use.others:.2f}",
    }
    return {"workers": run.workers, **(dict.fromkeys(row) if use.short else row)}


def _waits(runs: Sequence[Measurement]) -> list[Row]:
    shares = [run.shares() for run in runs]
    names = dict.fromkeys(name for share in shares for name in share)
    return [
        {"workers": run.workers, **{name: f"{share.get(name, 0.0):.0%}" for name in names}}
        for run, share in zip(runs, shares, strict=True)
    ]
