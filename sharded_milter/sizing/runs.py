"""Run the real daemon under load and measure it."""

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

# Seconds of load before each measurement. Every connection sends at least one message, so that
# interpreters and caches are warm.
WARM_SECONDS = 0.5

# Lines of the log that are shown if the daemon fails.
_LAST_LINES = 40

_MS = 1000


@dataclass(frozen=True)
class Plan:
    """What to run: the daemon's arguments except --workers, and the load."""

    arguments: tuple[str, ...]
    content: Sequence[Sequence[Packet]]
    connections: int
    cores: int
    seconds: float = float("inf")
    messages: int = load.UNLIMITED

    def done(self, seconds: float, answered: int) -> float:
        """Return the share of a run, 0 to 1, that is over."""
        return min(1.0, max(seconds / self.seconds, answered / self.messages))


def measure(plan: Plan, count: int, on_progress: Callable[[float, int], object]) -> Measurement:
    """Measure one run with `count` workers; `on_progress` is called as by `load.run`.

    Raise StartError if the daemon does not start or fails, or if no message gets a verdict.
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
        # A worker that died in the warm-up may still be missing in the run.
        lost=tuple(lost_workers(everything)),
    )


def _warm_up(plan: Plan, daemon: Daemon) -> None:
    """Send load before the measurement; wait as long as the run would, so slow milters pass too."""
    grace = max(load.GRACE, min(plan.seconds, load.TIMEOUT))
    _check_answered(
        load.run_for(daemon.path, plan.connections, WARM_SECONDS, plan.content, grace), daemon
    )


def _settle(daemon: Daemon) -> None:
    """Wait until the last verdict is in the log.

    The daemon writes that line after the reply, but in the same reactor iteration; so it is there
    when a new connection has got its first reply.
    """
    with load.connect(daemon.path) as sock:
        sock.sendall(OFFER.encode())
        sock.recv(1)


def _check_answered(result: Result, daemon: Daemon) -> None:
    if not result.messages:
        lost = lost_workers(daemon.log_text())
        raise ConfigError(
            f"the milter cannot be measured: {result.unanswered:,} messages were sent and none got"
            " a verdict"
            + f"; {len(lost)} workers died, the last: {''.join(lost[-1:])}"
            * bool(lost)
        )


@contextmanager
def _failures(daemon: Daemon) -> Iterator[None]:
    """Turn errors of the connections into a StartError with the end of the daemon's log."""
    try:
        yield
    except (ConnectionError, TimeoutError) as error:
        last = daemon.log_text().splitlines(keepends=True)[-_LAST_LINES:]
        code = daemon.process.poll()
        what = str(error) if code is None else f"the daemon ended with {code}"
        raise StartError(f"{what} while it was measured", "".join(last)) from None


def middle(rounds: Sequence[Measurement]) -> Measurement:
    """Return the round with the median rate; of an even number, the slower of the middle two."""
    rate = median_low([each.load.rate for each in rounds])
    return next(each for each in rounds if each.load.rate == rate)
