"""Runs that nobody has made."""

from __future__ import annotations

from bench.client import Run
from sharded_milter.sizing.processes import Cpu


def run(rate: float, master_us: float = 0.0) -> Run:
    """A thousand messages at this rate, for so much of the master's CPU each."""
    messages = 1000
    return Run(
        messages=messages,
        seconds=messages / rate,
        p50=0.001,
        p99=0.002,
        longest=0.003,
        client_cpu=0.1 * messages / rate,
        verdicts={"accept": messages},
        cpu=Cpu(master_us * messages / 1e6, 0.0),
    )
