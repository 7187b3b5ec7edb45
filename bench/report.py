"""What a bench prints: the machine, tables, each figure beside its target; and the same as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.server import cores
from sharded_milter.sizing import tables
from sharded_milter.testing.load import Result

# Of what is not a terminal: the widest table of any bench.
WIDTH = 150

Row = tables.Row


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every bench takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def machine() -> dict[str, Any]:
    """What the figures depend on besides us."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": cores(),
        "load": round(os.getloadavg()[0], 2),
        "commit": _commit(),
    }


def _commit() -> str:
    """What is checked out; empty outside of a checkout or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def figures(result: Result) -> Row:
    """The columns of a run that most benches have."""
    return {
        "mails/s": result.rate,
        "p50 ms": 1000 * result.percentile(0.5),
        "p99 ms": 1000 * result.percentile(0.99),
        "client": f"{result.client_cpu / result.seconds:.0%}",
        "verdicts": " ".join(sorted(result.verdicts)),
    }


def pooled(results: Sequence[Result]) -> Result:
    """Several runs of the same as one."""
    verdicts: Counter[str] = Counter()
    for result in results:
        verdicts.update(result.verdicts)
    return Result(
        sum(result.seconds for result in results),
        [latency for result in results for latency in result.latencies],
        dict(verdicts),
        sum(result.client_cpu for result in results),
    )


@dataclass(frozen=True)
class Target:
    """A figure and what it should be."""

    what: str
    figure: float
    goal: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is as good as it should be."""
        return self.figure >= self.goal if self.at_least else self.figure <= self.goal

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        unit = f" {self.unit}" if self.unit else ""
        word = "met" if self.met else "missed"
        return f"{self.what}: {self.figure:.3g}{unit} (target: {bound} {self.goal:g}{unit}): {word}"


class Report:
    """Prints as it goes; `save` writes everything that was printed."""

    def __init__(self, doc: str | None) -> None:
        self._question = (doc or "").partition("\n")[0]
        self._machine = machine()
        self._tables: dict[str, list[Row]] = {}
        self._targets: list[Target] = []
        self._console = Console(
            width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False
        )
        facts = ", ".join(f"{name} {value}" for name, value in self._machine.items() if value)
        self.say(self._question)
        self.say(facts)

    def say(self, line: str) -> None:
        """Prints a line, in one piece."""
        self._console.print(line, soft_wrap=True)

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Prints rows with the same keys; numbers to the right."""
        self._tables[title] = list(rows)
        self._console.print(tables.table(title, rows))

    def target(self, target: Target) -> None:
        """Prints a figure beside its target."""
        self._targets.append(target)
        self.say(str(target))

    def save(self, path: Path | None) -> None:
        """Writes machine, tables and targets as JSON, if there is a path."""
        if path is None:
            return
        targets = [{**asdict(target), "met": target.met} for target in self._targets]
        content = {
            "question": self._question,
            "machine": self._machine,
            "tables": self._tables,
            "targets": targets,
        }
        path.write_text(json.dumps(content, indent=2) + "\n")
