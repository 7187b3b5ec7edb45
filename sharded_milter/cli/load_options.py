"""The options that `bench` and `tune` share: the milter, the messages, the load, the output."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console, RenderableType

from sharded_milter import __version__, descriptors
from sharded_milter.errors import NotWritten, UsageError
from sharded_milter.ops.cpus import usable_cpus
from sharded_milter.ops.option_types import ParamType, Seconds
from sharded_milter.protocol.packets import Packet
from sharded_milter.sizing.bottleneck import counted
from sharded_milter.sizing.measurement import Measurement
from sharded_milter.sizing.runs import Plan
from sharded_milter.testing.dialogue import Mail, transaction
from sharded_milter.testing.generated import generated
from sharded_milter.testing.load import UNLIMITED
from sharded_milter.testing.mail_files import read

# The number of generated messages. They differ, so that a milter with a cache has work to do.
GENERATED = 64

# One has the message that is scanned; the others keep messages waiting, so that no worker is idle.
CONNECTIONS_PER_WORKER = 4

# Columns of output that is not a terminal: the width of the widest table.
WIDTH = 100

# The FILE that means standard output.
STDOUT = Path("-")
STDOUT_DESCRIPTOR = 1

MEGABYTE = 1_000_000

F = TypeVar("F", bound=Callable[..., Any])


class Counts(ParamType):
    """Numbers of workers: `4` or `1,2,4`."""

    name = "counts"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        pieces = [piece.strip() for piece in str(value).split(",")]
        counts = [int(piece) for piece in pieces if piece.isascii() and piece.isdigit()]
        if len(counts) < len(pieces) or 0 in counts:
            self.fail(
                f"{value!r} is not a number of workers, or several separated by commas", param, ctx
            )
        return tuple(dict.fromkeys(counts))


class OutputFile(click.Path):
    """A file that can be written. This is checked before the measurement, which takes minutes.

    `-` is standard output, if `allow_dash`.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if self.allow_dash and path == STDOUT:
            return path
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            self.fail(f"{str(path)!r} cannot be written", param, ctx)
        return path


OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("milters", metavar="[MILTER]...", nargs=-1),
    click.option("--pymilter", type=click.Path(), metavar="FILE",
                 help="Measure an existing pymilter script; the arguments are passed to it."),
    click.option("--in-master", multiple=True, metavar="MILTER",
                 help="A milter that runs in the master, as for sharded-milter."),
    click.option("--config", type=click.Path(), metavar="FILE",
                 help="Configuration file of sharded-milter. Its sockets and its number of"
                 " workers are not used."),
    click.option("--messages", type=click.Path(exists=True, path_type=Path), metavar="PATH",
                 help="Messages to send: a directory of .eml files, a Maildir, an mbox file, or"
                 f" one message. By default {GENERATED} generated messages of 10 KB."),
    click.option("--connections", type=click.IntRange(min=1), metavar="N",
                 help="MTA connections at a time, each with one message after the other. By"
                 f" default {CONNECTIONS_PER_WORKER} for each worker of the largest number."),
    click.option("--count", type=click.IntRange(min=1), metavar="N",
                 help="Number of messages of each measurement, instead of --seconds."),
    click.option("--json", "json_path", type=OutputFile(dir_okay=False, allow_dash=True),
                 metavar="FILE", help="Write all figures to this JSON file. With -, they are"
                 " written to standard output, and the tables to standard error."),
)  # fmt: skip


def with_load_options(seconds: float) -> Callable[[F], F]:
    """Decorate a click command with the options that `plan` takes."""
    of_each = click.option(
        "--seconds",
        type=Seconds(min=0, min_open=True),
        metavar="S",
        help=f"Seconds of each measurement. By default {seconds:g}.",
    )
    return lambda command: reduce(
        lambda decorated, option: option(decorated), reversed((*OPTIONS, of_each)), command
    )


@dataclass(frozen=True)
class Screen:
    """`out` takes the results; `err` takes progress bars and warnings."""

    out: Console
    err: Console

    @classmethod
    def make(cls, json_path: Path | None = None) -> Screen:
        """Return a screen; output that is not a terminal is WIDTH columns wide.

        If the JSON figures go to standard output, the results go to standard error.
        """

        def console(stderr: bool) -> Console:
            made = Console(stderr=stderr, highlight=False, markup=False)
            if not made.is_terminal:
                made.width = WIDTH
            return made

        return cls(console(json_path == STDOUT), console(True))

    def print_line(self, line: str) -> None:
        """Print a line of the result; it is wrapped only on a terminal. Raise NotWritten."""
        self.print(line, soft_wrap=not self.out.is_terminal)

    def print(self, what: RenderableType, *, soft_wrap: bool = False) -> None:
        """Print a part of the result; raise NotWritten."""
        try:
            self.out.print(what, soft_wrap=soft_wrap)
        except OSError as error:
            raise _not_written("standard output", error) from None

    def warn(self, line: str) -> None:
        """Print a warning."""
        self.err.print(line, soft_wrap=not self.err.is_terminal)


def plan(values: dict[str, Any], counts: Sequence[int], seconds: float, screen: Screen) -> Plan:
    """Return what to run, and print a line about it; raise UsageError."""
    if values["count"] and values["seconds"]:
        raise UsageError("--count and --seconds cannot be given together")
    if in_master_only(values) and _is_given("workers"):
        raise UsageError("a milter in the master has no workers; leave out --workers")
    connections = values["connections"] or CONNECTIONS_PER_WORKER * max(counts)
    descriptors.check_limit(connections, max(counts))
    mails = _mails(values["messages"], screen)
    cores = usable_cpus()
    until = values["seconds"] or seconds
    size = sum(len(mail.raw) for mail in mails) / len(mails)
    what = counted(len(mails), f"{'different' if values['messages'] else 'generated'} message")
    screen.print_line(
        f"{what} of {_size(size)} on average over {counted(connections, 'connection')},"
        f" {values['count'] or f'{until:g} s'} each; {counted(cores, 'core')}"
    )
    content: list[list[Packet]] = [transaction(mail) for mail in mails]
    if values["count"]:
        return Plan(_arguments(values), content, connections, cores, messages=values["count"])
    return Plan(_arguments(values), content, connections, cores, until, UNLIMITED)


def in_master_only(values: dict[str, Any]) -> bool:
    """Return True if all milters run in the master."""
    return bool(values["in_master"]) and not values["milters"] and not values["pymilter"]


def _is_given(option: str) -> bool:
    """Return True if the option was given, on the command line or as a variable."""
    return click.get_current_context().get_parameter_source(option) not in (
        ParameterSource.DEFAULT,
        None,
    )


def _size(size: float) -> str:
    return f"{size / 1000:,.1f} KB" if size <= MEGABYTE else f"{size / MEGABYTE:,.1f} MB"


def _mails(path: Path | None, screen: Screen) -> Sequence[Mail]:
    if path is None:
        return [generated(number) for number in range(GENERATED)]
    found = read(path)
    for line in found.skipped:
        screen.warn(line)
    return found.mails


def _arguments(values: dict[str, Any]) -> tuple[str, ...]:
    """Return the arguments of the daemon."""
    options = [f"--{name}={values[name]}" for name in ("config", "pymilter") if values[name]]
    options += [f"--in-master={milter}" for milter in values["in_master"]]
    return (*options, "--", *values["milters"]) if values["milters"] else tuple(options)


def save(
    path: Path | None, made: Plan, runs: Sequence[Measurement], more: dict[str, Any] | None = None
) -> None:
    """Write the figures, and the machine and load that they depend on; nothing without a path."""
    if path is None:
        return
    content = {
        "version": __version__,
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
            "cores": made.cores,
        },
        "arguments": list(made.arguments),
        "connections": made.connections,
        "different_messages": len(made.content),
        "runs": [run.as_json() for run in runs],
        **(more or {}),
    }
    write(path, json.dumps(content, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file, or to standard output; raise NotWritten."""
    try:
        if path == STDOUT:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            path.write_text(text)
    except OSError as error:
        raise _not_written("standard output" if path == STDOUT else str(path), error) from None


def _not_written(where: str, error: OSError) -> NotWritten:
    if where == "standard output":
        # Python writes its buffer again at exit, and must not fail then with a traceback.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), STDOUT_DESCRIPTOR)
    return NotWritten(f"{where}: {error.strerror}")
