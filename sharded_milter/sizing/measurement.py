"""The figures of one run of a milter under load. PURE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sharded_milter.protocol.stages import Stage
from sharded_milter.sizing.bottleneck import Use, bottleneck
from sharded_milter.sizing.processes import Cpu, ResidentMemory
from sharded_milter.testing.load import Result

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}

# The parts of the wait for the reply to end of message. The rest is spent in the master, the
# sockets and the load client.
QUEUE, SCAN, REST = "queue", "scan", "rest"


@dataclass(frozen=True)
class Measurement:
    """The figures of one run; times in seconds."""

    workers: int
    cores: int
    connections: int
    load: Result
    window: float  # in which the CPU times were measured; a little longer than the load
    cpu: Cpu
    others: float  # CPU time of everything else on the machine
    memory: ResidentMemory
    queued: float  # all messages together, at end of message
    scanned: float  # likewise
    failed: tuple[str, ...] = ()  # the reason, for each verdict by policy
    lost: tuple[str, ...] = ()  # the reason, for each worker that died

    @property
    def master_cpu(self) -> float:
        """CPU time of the master for one message."""
        return self.cpu.master / self.load.messages

    @property
    def workers_cpu(self) -> float:
        """CPU time of the workers for one message."""
        return self.cpu.workers / self.load.messages

    @property
    def use(self) -> Use:
        """The averages from which `bottleneck` finds the limit."""
        seconds, load = self.window, self.load
        early = sum(wait for stage, wait in load.waits.items() if stage is not Stage.EOM)
        return Use(
            seconds=seconds,
            cores=self.cores,
            workers=self.workers,
            connections=self.connections,
            master=self.cpu.master / seconds,
            computing=self.cpu.workers / seconds,
            client=load.client_cpu / seconds,
            others=self.others / seconds,
            queued=self.queued / seconds,
            asked=(self.scanned + early) / seconds,
            lost=len(self.lost),
            unanswered=load.unanswered,
        )

    def shares(self) -> dict[str, float]:
        """Return where messages waited, as shares of all waiting time.

        The keys are stages; end of message is divided into `queue`, `scan` and `rest`.
        """
        waits = {stage.word: wait for stage, wait in self.load.waits.items()}
        end = waits.pop(Stage.EOM.word, 0.0)
        waits = {stage.word: waits[stage.word] for stage in Stage if stage.word in waits}
        if end:
            rest = max(0.0, end - self.queued - self.scanned)
            parts = {QUEUE: self.queued, SCAN: self.scanned, REST: rest}
            waits |= {f"{Stage.EOM.word} {part}": wait for part, wait in parts.items()}
        total = sum(waits.values()) or 1.0
        return {name: wait / total for name, wait in waits.items()}

    def as_json(self) -> dict[str, Any]:
        """Return all figures for the --json file. These keys are public and do not change."""
        load, use, limit = self.load, self.use, bottleneck(self.use)
        return {
            "workers": self.workers,
            "messages": load.messages,
            "connections": self.connections,
            "seconds": load.seconds,
            "messages_per_second": load.rate,
            "latency_ms": {
                name: 1000 * load.percentile(share) for name, share in PERCENTILES.items()
            },
            "verdicts": load.verdicts,
            "answered_by_policy": len(self.failed),
            "unanswered": load.unanswered,
            "workers_died": len(self.lost),
            "cpu_ms_per_message": {
                "master": 1000 * self.master_cpu,
                "workers": 1000 * self.workers_cpu,
                "client": 1000 * load.client_cpu / load.messages,
            },
            "cores_used": {
                "master": use.master,
                "workers": use.computing,
                "client": use.client,
                "others": use.others,
            },
            "memory_bytes": {"master": self.memory.master, "worker": self.memory.worker},
            "waiting_share": self.shares(),
            "bottleneck": {"limit": limit.limit.value, "why": limit.why},
        }
