"""`sharded-milterctl`: the tools beside the daemon."""

from __future__ import annotations

import os

import click

from sharded_milter import __version__
from sharded_milter.cli.bench import bench
from sharded_milter.cli.demo import demo
from sharded_milter.cli.programs import run
from sharded_milter.cli.tune import tune

NAME = "sharded-milterctl"


@click.group(
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name=NAME)
@click.pass_context
def ctl(context: click.Context) -> None:
    """Try, measure and tune sharded-milter."""
    if context.invoked_subcommand is None:
        # click would print the help itself, but stream and exit code depend on its version.
        click.echo(context.get_help(), err=True)
        context.exit(os.EX_USAGE)


for command in (demo, bench, tune):
    ctl.add_command(command)


def main() -> None:
    """Run the program; this is its entry point."""
    run(ctl, NAME)
