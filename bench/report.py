"""What a bench prints: the machine, tables, each figure beside its target; and the same as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from bench.client import Result, Run
from bench.rounds import Rounds
from bench.server import cores
from sharded_milter.sizing import tables

# Of what is not a terminal: the widest table of any bench.
WIDTH = 150

# The options that name files for what is printed.
_FILES = {"--json", "--markdown"}

_MS = 1e3
_MICRO = 1e6

Row = tables.Row


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every bench takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="add a section for bench/README.md there"
    )
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


def figures(rounds: Sequence[Result]) -> Row:
    """The columns of a side that most benches have: the medians of its rounds."""
    return {
        "mails/s": median(each.rate for each in rounds),
        "p50 ms": _MS * median(each.p50 for each in rounds),
        "p99 ms": _MS * median(each.p99 for each in rounds),
        "client": f"{median(each.client_cpu / each.seconds for each in rounds):.0%}",
        "verdicts": " ".join(sorted({word for each in rounds for word in each.verdicts})),
    }


def costs(rounds: Sequence[Run]) -> Row:
    """Columns of CPU time for a message: the medians of the rounds."""
    return {
        "client µs": _MICRO * median(each.client_cpu / each.messages for each in rounds),
        "master µs": _MICRO * median(each.master_cpu for each in rounds),
        "workers µs": _MICRO * median(each.workers_cpu for each in rounds),
    }


def rates(rounds: Sequence[Result]) -> Rounds:
    """Messages a second."""
    return Rounds([each.rate for each in rounds])


def p50_ms(rounds: Sequence[Result]) -> Rounds:
    """Median latencies in ms."""
    return Rounds([_MS * each.p50 for each in rounds])


def master_us(rounds: Sequence[Run]) -> Rounds:
    """Microseconds of the master's CPU for a message."""
    return Rounds([_MICRO * each.master_cpu for each in rounds])


@dataclass(frozen=True)
class Target:
    """A figure and what it should be: of one measurement, or the median of rounds."""

    what: str
    figure: float
    goal: float
    unit: str = ""
    at_least: bool = False
    rounds: str = ""  # the least and the most

    @classmethod
    def of(
        cls, what: str, rounds: Rounds, goal: float, unit: str = "", *, at_least: bool = False
    ) -> Target:
        """The median of the rounds."""
        return cls(what, rounds.middle, goal, unit, at_least, rounds.spread)

    @property
    def met(self) -> bool:
        """Whether the figure is as good as it should be."""
        return self.figure >= self.goal if self.at_least else self.figure <= self.goal

    @property
    def _unit(self) -> str:
        return f" {self.unit}" if self.unit else ""

    @property
    def _bound(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.goal:g}{self._unit}"

    @property
    def _word(self) -> str:
        return "met" if self.met else "missed"

    def row(self) -> Row:
        """A line of the table of all targets."""
        now = f"{self.figure:.3g}{self._unit}"
        return {
            "figure": self.what,
            "now": now,
            "rounds": self.rounds,
            "target": self._bound,
            "": self._word,
        }

    def __str__(self) -> str:
        rounds = f" (rounds {self.rounds})" if self.rounds else ""
        now = f"{self.figure:.3g}{self._unit}{rounds}"
        return f"{self.what}: {now} (target: {self._bound}): {self._word}"


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
        self.say(self._question)
        self.say(self._facts)

    @property
    def _facts(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._machine.items() if value)

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

    def summary(self) -> None:
        """Prints all targets so far as a table."""
        self._console.print(tables.table("targets", [target.row() for target in self._targets]))

    def save(self, options: argparse.Namespace) -> None:
        """Writes machine, tables and targets to the files that are named."""
        if options.json is not None:
            options.json.write_text(json.dumps(self._content(), indent=2) + "\n")
        if options.markdown is not None:
            with options.markdown.open("a") as file:
                file.write(self._section())

    def _content(self) -> dict[str, Any]:
        return {
            "question": self._question,
            "machine": self._machine,
            "tables": self._tables,
            "targets": [{**asdict(target), "met": target.met} for target in self._targets],
        }

    def _section(self) -> str:
        """What was printed, in Markdown, under the name of the script."""
        script = Path(sys.argv[0])
        if script.stem == "__main__":
            script = script.parent
        given = [
            word
            for before, word in pairwise(["", *sys.argv[1:]])
            if not _FILES.intersection((before, word))
        ]
        command = shlex.join(["python", "-m", f"bench.{script.stem}", *given])
        parts = [f"### {script.name}", f"`{command}`: {self._facts}."]
        for title, rows in self._tables.items():
            parts += [f"{title}:", _markdown(rows)]
        if self._targets:
            parts.append(_markdown([target.row() for target in self._targets]))
        return "".join(f"{part}\n\n" for part in parts)


def _markdown(rows: Sequence[Row]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[tables.cell(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
