"""What all MTA connections of one program have in common: limits, counts, and alarms."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sharded_milter.alarms import Alarm
from sharded_milter.dispatch.policy import Policy
from sharded_milter.limits import Limits
from sharded_milter.mta.connection import CLOSE_GRACE, MilterConnection
from sharded_milter.mta.inflight import Inflight


class ServerContext:
    """What connections share, but for the milters; `logs_messages`: the log has a line for each."""

    def __init__(
        self,
        limits: Limits,
        policy: Policy,
        reactor: Any,
        counters: Counter[str],
        *,
        logs_messages: bool = True,
    ) -> None:
        self.limits = limits
        self.policy = policy
        self.reactor = reactor
        self.counters = counters
        self.logs_messages = logs_messages
        self.inflight = Inflight(limits.max_inflight_bytes)
        self.idle = Alarm(reactor, limits.idle_timeout, MilterConnection.timed_out)
        self.closing = Alarm(reactor, CLOSE_GRACE, MilterConnection.abort)
        self.progress = Alarm(reactor, limits.progress_interval, MilterConnection.send_progress)
        self.connections: set[MilterConnection] = set()

    @property
    def full(self) -> bool:
        """Whether another MTA connection would be one too many."""
        return len(self.connections) > self.limits.max_connections

    def connected(self, connection: MilterConnection) -> None:
        """An MTA is there."""
        self.connections.add(connection)

    def disconnected(self, connection: MilterConnection) -> None:
        """An MTA has left."""
        self.connections.discard(connection)
