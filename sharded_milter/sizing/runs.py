"""Runs of the real daemon under load, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low

from sharded_milter.errors import ConfigError, StartError
from sharded_milter.protocol.packets import Packet
from sharded_milter.sizing.measurement import Measurement
from sharded_milter.sizing.processes import Meter, memory
from sharded_milter.testing import load
from sharded_milter.testing.daemon import (
    Daemon,
    answered_by_policy,
    lost_workers,
    running,
    summaries,
    workers,
)
from sharded_milter.testing.dialogue import OFFER
from sharded_milter.testing.load import Result

# Before each measurement: every connection sends a message at least, interpreters and caches warm
# up.
WARM_SECONDS = 0.5

# Of the log, where the daemon has failed: the last of it tells why.
_LAST_LINES = 40

_MS = 1000


@dataclass(frozen=True)
class Plan:
    """What is run: the daemon's arguments but for its workers, and what it is sent."""

    arguments: tuple[str, ...]
    content: Sequence[Sequence[Packet]]
    connections: int
    cores: int
    seconds: float = float("inf")
    messages: int = load.UNLIMITED

    def done(self, seconds: float, answered: int) -> float:
        """The share of a run that is over."""
        return min(1.0, max(seconds / self.seconds, answered / self.messages))


def measure(plan: Plan, count: int, on_progress: Callable[[float, int], object]) -> Measurement:
    """One run with so many workers; `on_progress` is told how far it is, as by `load.run`.

    Raises StartError where the daemon does not start, or fails, or nothing is answered.
    """
    with running(f"--workers={count}", *plan.arguments) as daemon, _failures(daemon):
        _warm_up(plan, daemon)
        log_size = len(daemon.log.read_bytes())
        meter = Meter(daemon.pid)
        result = load.run(
            daemon.path,
            plan.connections,
            plan.messages,
            seconds=plan.seconds,
            content=plan.content,
            on_progress=on_progress,
            during=meter.running,
        )
        _check_answered(result, daemon)
        resident = memory(daemon.pid)
        _settle(daemon)
        everything, log = daemon.log_text(), daemon.log_text(log_size)
    messages = summaries(log)
    return Measurement(
        workers=workers(everything),
        cores=plan.cores,
        connections=min(plan.connections, plan.messages),
        load=result,
        window=meter.seconds,
        cpu=meter.cpu,
        others=meter.others(result.client_cpu, plan.cores),
        memory=resident,
        queued=sum(message.queue_ms for message in messages) / _MS,
        scanned=sum(message.scan_ms for message in messages) / _MS,
        failed=tuple(answered_by_policy(log)),
        lost=tuple(lost_workers(everything)),  # who died in the warm-up may be missed for long
    )


def _warm_up(plan: Plan, daemon: Daemon) -> None:
    """Waits for answers as long as the run would: a milter that is so slow can be measured."""
    grace = max(load.GRACE, min(plan.seconds, load.TIMEOUT))
    _check_answered(
        load.run_for(daemon.path, plan.connections, WARM_SECONDS, plan.content, grace), daemon
    )


def _settle(daemon: Daemon) -> None:
    """Waits for the last line of the log: the MTA has its answer before, in the same turn."""
    with load.connect(daemon.path) as sock:
        sock.sendall(OFFER.encode())
        sock.recv(1)


def _check_answered(result: Result, daemon: Daemon) -> None:
    if not result.messages:
        lost = lost_workers(daemon.log_text())
        raise ConfigError(
            f"the milter cannot be measured: {result.unanswered:,} messages were sent and none was"
            " answered" + f"; {len(lost)} workers died, the last: {''.join(lost[-1:])}" * bool(lost)
        )


@contextmanager
def _failures(daemon: Daemon) -> Iterator[None]:
    """A daemon that leaves its MTA alone is a StartError with the end of its log."""
    try:
        yield
    except (ConnectionError, TimeoutError) as error:
        last = daemon.log_text().splitlines(keepends=True)[-_LAST_LINES:]
        code = daemon.process.poll()
        what = str(error) if code is None else f"the daemon ended with {code}"
        raise StartError(f"{what} while it was measured", "".join(last)) from None


def middle(rounds: Sequence[Measurement]) -> Measurement:
    """The round whose rate is in the middle, the slower one of two."""
    rate = median_low([each.load.rate for each in rounds])
    return next(each for each in rounds if each.load.rate == rate)
