"""`sharded-milterctl demo`: send sample mail through the real daemon and print a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sharded_milter.ops.cpus import usable_cpus
from sharded_milter.protocol import replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.testing.daemon import running, summaries
from sharded_milter.testing.mta import Mail, MtaClient, Outcome
from sharded_milter.testing.samples import Sample, samples

RESULT_HEADER = "X-Scan-Result"


@dataclass(frozen=True)
class Row:
    """A sample and its result."""

    sample: Sample
    queue_id: str
    outcome: Outcome

    @property
    def result(self) -> str:
        """The result in the terms of `Sample.expected`; "not scanned" if it has none."""
        match self.outcome.verdict:
            case replies.ReplyCode() | replies.Reject():
                return "rejected"
            case replies.Accept() | replies.Continue():
                return _scan_result(self.outcome) or "not scanned"
        return type(self.outcome.verdict).__name__.lower()

    @property
    def right(self) -> bool:
        """True if the result is the expected one."""
        return self.result == self.sample.expected


def _scan_result(outcome: Outcome) -> str:
    for action in outcome.actions:
        if isinstance(action, replies.InsertHeader) and action.name == RESULT_HEADER:
            return action.value.strip().partition(";")[0]
    return ""


@click.command()
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=usable_cpus,
    help="Number of worker processes; by default one for each usable CPU.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True,
              help="How often each sample is sent.")  # fmt: skip
def demo(workers: int, rounds: int) -> int:
    """Start the content scanner on a private socket and send sample mail through it.

    The exit code is 0 if every verdict is the expected one, else 1.
    """
    console = Console()
    with running("--workers", str(workers)) as daemon:
        rows, seconds = _send_all(console, daemon.path, rounds, connections=2 * workers)
        shards = {summary.queue_id: summary.shard for summary in summaries(daemon.log_text())}
    first_round = rows[: len(samples())]
    console.print(_table(first_round, shards))
    wrong = [row for row in rows if not row.right]
    console.print(
        f"{len(rows)} messages in {seconds:.1f} s with {workers} workers:"
        f" {len(rows) / seconds:.0f} messages/s; {len(wrong)} unexpected verdicts"
    )
    return 1 if wrong else 0


def _send_all(
    console: Console, path: str, rounds: int, connections: int
) -> tuple[list[Row], float]:
    """Send each sample `rounds` times; return the results and the seconds that it took."""
    chosen = samples()
    work = [(n, sample) for n, sample in enumerate(chosen * rounds)]
    started = time.perf_counter()
    with (
        Progress(console=console, transient=True) as progress,
        ThreadPoolExecutor(connections) as pool,
    ):
        task = progress.add_task("Sending sample mail", total=len(work))
        shares = [work[n::connections] for n in range(connections)]
        results = [
            row
            for rows in pool.map(
                lambda share: _send(path, share, lambda: progress.advance(task)), shares
            )
            for row in rows
        ]
    seconds = time.perf_counter() - started
    return sorted(results, key=lambda row: int(row.queue_id[4:])), seconds


def _send(path: str, share: Sequence[tuple[int, Sample]], advance: Callable[[], None]) -> list[Row]:
    rows = []
    with MtaClient.to_path(path) as mta:
        for number, sample in share:
            queue_id = f"DEMO{number}"
            rows.append(Row(sample, queue_id, mta.deliver(Mail(sample.raw, queue_id=queue_id))))
            advance()
    return rows


def _table(rows: Sequence[Row], shards: dict[str, str]) -> Table:
    table = Table("message", "size", "verdict", "actions", "ms", "shard", "right")
    for row in rows:
        table.add_row(
            row.sample.name,
            f"{len(row.sample.raw):,}",
            _verdict_text(row.outcome),
            "\n".join(map(_action_text, row.outcome.actions)),
            f"{row.outcome.seconds * 1000:.1f}",
            shards.get(row.queue_id, "?"),
            "yes" if row.right else f"no: {row.sample.expected}",
        )
    return table


def _verdict_text(outcome: Outcome) -> str:
    verdict = outcome.verdict
    if isinstance(verdict, replies.ReplyCode):
        return verdict.text
    return type(verdict).__name__.lower()


def _action_text(action: Packet) -> str:
    match action:
        case replies.InsertHeader(name=name, value=value):
            return f"{name}:{value.partition(';')[0]}"
        case replies.Quarantine():
            return "quarantine"
    return type(action).__name__
