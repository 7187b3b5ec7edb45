"""What all MTA connections of one program have in common: limits, counts, and alarms."""

from __future__ import annotations

import errno
import os
from collections import Counter
from typing import Any

from sharded_milter.alarms import Alarm
from sharded_milter.dispatch.policy import Policy
from sharded_milter.ipc.memory import Memory
from sharded_milter.limits import Limits
from sharded_milter.mta.connection import CLOSE_GRACE, MilterConnection
from sharded_milter.mta.conversation import MessageLog, log_message
from sharded_milter.mta.gate import ALL_MAY, Admission, Gate
from sharded_milter.mta.inflight import Inflight


class ServerContext:
    """What connections share, but for the milters.

    `message_log` writes the line about each message; None: there is none.
    """

    def __init__(
        self,
        limits: Limits,
        policy: Policy,
        reactor: Any,
        counters: Counter[str],
        *,
        message_log: MessageLog | None = log_message,
        admission: Admission = ALL_MAY,
    ) -> None:
        self.limits = limits
        self.policy = policy
        self.reactor = reactor
        self.counters = counters
        self.message_log = message_log
        self.inflight = Inflight(limits.max_inflight_bytes)
        self.idle = Alarm(reactor, limits.idle_timeout, MilterConnection.timed_out)
        self.closing = Alarm(reactor, CLOSE_GRACE, MilterConnection.give_up_unread)
        self.progress = Alarm(reactor, limits.progress_interval, MilterConnection.send_progress)
        self.gate = Gate(limits.max_connections, admission, counters, reactor)
        self._shares = admission.shares

    @property
    def connections(self) -> list[MilterConnection]:
        """All MTA connections, those that are turned away included."""
        return self.gate.everybody

    def connected(self, connection: MilterConnection) -> bytes:
        """An MTA is there: what it is told instead of being served, empty if it is served."""
        return self.gate.enter(connection)

    def disconnected(self, connection: MilterConnection) -> None:
        """An MTA has left."""
        self.gate.leave(connection)

    def new_memory(self) -> Memory:
        """Memory for a message; raises OSError where there is none, or no descriptor for it."""
        memory = Memory()
        if self._shares is not None and memory.fd >= self._shares.memory:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return memory
