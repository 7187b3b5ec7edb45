"""Run a click command as a program: an operator's mistake gives one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from sharded_milter.errors import StartError
from sharded_milter.ops.config import ENVIRONMENT_PREFIX, origin_of


def run(command: click.Command, name: str) -> NoReturn:
    """Run a click command as a program, and exit with the code that it returns.

    A StartError is printed as one line, after the author's traceback if it has one; its exit code
    is that of sysexits(3). A usage error has exit code 64, or 78 if the bad value came from a file
    or the environment. Any other exception is a defect of this package and keeps its traceback.
    """
    try:
        code = command.main(
            prog_name=name, standalone_mode=False, auto_envvar_prefix=ENVIRONMENT_PREFIX
        )
    except click.UsageError as error:
        origin = origin_of(error)
        code = os.EX_CONFIG if origin else os.EX_USAGE
        report(name, f"{origin}: " * bool(origin) + error.format_message())
    except StartError as error:
        sys.stderr.write(error.details)
        code = error.exit_code
        report(name, str(error))
    except (click.Abort, KeyboardInterrupt):
        code = 130  # the exit code that a shell gives for SIGINT
    sys.exit(code or 0)


def report(name: str, message: str) -> None:
    """Print one line on standard error."""
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
