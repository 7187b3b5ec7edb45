"""Runs of the real daemon under load, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low

from sharded_milter.errors import StartError
from sharded_milter.protocol.packets import Packet
from sharded_milter.sizing.measurement import Measurement
from sharded_milter.sizing.processes import cpu, machine_cpu, memory
from sharded_milter.testing import load
from sharded_milter.testing.server import Server, answered_by_policy, running, summaries

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


def measure(plan: Plan, workers: int, heard: Callable[[float, int], object]) -> Measurement:
    """One run; `heard` is told how far it is, as by `load.run`.

    Raises StartError where the daemon does not start, or fails.
    """
    with running(f"--workers={workers}", *plan.arguments) as server, _failures(server):
        load.run_for(server.path, plan.connections, WARM_SECONDS, plan.content)
        said = len(server.log.read_bytes())
        used, machine = cpu(server.pid), machine_cpu()
        result = load.run(
            server.path,
            plan.connections,
            plan.messages,
            seconds=plan.seconds,
            content=plan.content,
            heard=heard,
        )
        used, machine = cpu(server.pid) - used, machine_cpu() - machine
        resident = memory(server.pid)
        log = server.said(said)
    messages = summaries(log)
    return Measurement(
        workers=workers if resident.worker else 0,
        cores=plan.cores,
        load=result,
        cpu=used,
        others=max(0.0, machine - used.master - used.workers - result.client_cpu),
        memory=resident,
        queued=sum(message.queue_ms for message in messages) / _MS,
        scanned=sum(message.scan_ms for message in messages) / _MS,
        failed=tuple(answered_by_policy(log)),
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
