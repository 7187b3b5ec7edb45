"""What both programs share: every error of the operator is one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from sharded_milter.errors import StartError
from sharded_milter.ops.config import ENVIRONMENT_PREFIX, origin_of


def run(command: click.Command, name: str) -> NoReturn:
    """Runs a click command as a program and exits with its code, by sysexits(3).

    What the command returns is the exit code. A StartError is printed as one line, below the
    author's traceback when it has one; a usage error likewise, with 64, or 78 where the bad value
    came from a file or the environment. Anything else is our bug and keeps its traceback.
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
        code = 130  # as the shell says it of a program ended by SIGINT
    sys.exit(code or 0)


def report(name: str, message: str) -> None:
    """One line on standard error."""
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
