"""`sharded-milterctl`: everything around the daemon."""

from __future__ import annotations

import click

from sharded_milter import __version__
from sharded_milter.cli.bench import bench
from sharded_milter.cli.demo import demo
from sharded_milter.cli.programs import run
from sharded_milter.cli.tune import tune

NAME = "sharded-milterctl"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=NAME)
def ctl() -> None:
    """Try and look after sharded-milter."""


for command in (demo, bench, tune):
    ctl.add_command(command)


def main() -> None:
    """The console script."""
    run(ctl, NAME)
