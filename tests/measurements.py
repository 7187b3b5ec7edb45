"""Measurements that nobody had to wait for."""

from __future__ import annotations

from typing import Any

from sharded_milter.protocol.stages import Stage
from sharded_milter.sizing.measurement import Measurement
from sharded_milter.sizing.processes import Cpu, ResidentMemory
from sharded_milter.testing.load import Result


def measurement(**changed: Any) -> Measurement:
    """100 messages in 10 s: 4 connections wait all the time, one of them at RCPT."""
    facts: dict[str, Any] = {
        "workers": 2,
        "cores": 4,
        "connections": 4,
        "load": Result(
            10.0, [0.1] * 100, {"accept": 97, "reject": 3}, 0.5, {Stage.EOM: 30.0, Stage.RCPT: 10.0}
        ),
        "window": 10.0,
        "cpu": Cpu(1.0, 12.0),
        "others": 2.0,
        "memory": ResidentMemory(50_000_000, 40_000_000),
        "queued": 15.0,
        "scanned": 12.0,
    }
    return Measurement(**{**facts, **changed})
