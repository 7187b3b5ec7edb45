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
from sharded_milter.testing.dialogue import OFFER
from sharded_milter.testing.load import Result
from sharded_milter.testing.server import (
    Server,
    answered_by_policy,
    lost_workers,
    running,
    summaries,
    workers,
)

# Before each measurement: every connection sends a message at least, interpreters and caches warm
# up.
WARM_SECONDS = 0.5

# Of the log, where the server has failed: the last of it tells why.
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


def measure(plan: Plan, count: int, heard: Callable[[float, int], object]) -> Measurement:
    """One run with so many workers; `heard` is told how far it is, as by `load.run`.

    Raises StartError where the daemon does not start, or fails, or nothing is answered.
    """
    with running(f"--workers={count}", *plan.arguments) as server, _failures(server):
        _warm_up(plan, server)
        said = len(server.log.read_bytes())
        meter = Meter(server.pid)
        result = load.run(
            server.path,
            plan.connections,
            plan.messages,
            seconds=plan.seconds,
            content=plan.content,
            heard=heard,
            during=meter.running,
        )
        _check_answered(result, server)
        resident = memory(server.pid)
        _settle(server)
        everything, log = server.said(), server.said(said)
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


def _warm_up(plan: Plan, server: Server) -> None:
    """Waits for answers as long as the run would: a milter that is so slow can be measured."""
    grace = max(load.GRACE, min(plan.seconds, load.PATIENCE))
    _check_answered(
        load.run_for(server.path, plan.connections, WARM_SECONDS, plan.content, grace), server
    )


def _settle(server: Server) -> None:
    """Waits for the last line of the log: the MTA has its answer before, in the same turn."""
    with load.connect(server.path) as sock:
        sock.sendall(OFFER.encode())
        sock.recv(1)


def _check_answered(result: Result, server: Server) -> None:
    if not result.messages:
        lost = lost_workers(server.said())
        raise ConfigError(
            f"the milter cannot be measured: {result.unanswered:,} messages were sent and none was"
            " answered" + f"; {len(lost)} workers died, the last: {''.join(lost[-1:])}" * bool(lost)
        )


@contextmanager
def _failures(server: Server) -> Iterator[None]:
    """A daemon that leaves its MTA alone is a StartError with the end of its log."""
    try:
        yield
    except (ConnectionError, TimeoutError) as error:
        last = server.said().splitlines(keepends=True)[-_LAST_LINES:]
        code = server.process.poll()
        what = str(error) if code is None else f"the server ended with {code}"
        raise StartError(f"{what} while it was measured", "".join(last)) from None


def middle(rounds: Sequence[Measurement]) -> Measurement:
    """The round whose rate is in the middle, the slower one of two."""
    rate = median_low([each.load.rate for each in rounds])
    return next(each for each in rounds if each.load.rate == rate)
