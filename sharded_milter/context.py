"""The server context: limits, counters and alarms that all MTA connections of one program share."""

from __future__ import annotations

import errno
import os
from collections import Counter

from sharded_milter.alarms import Alarm, ReactorTime
from sharded_milter.dispatch.policy import Policy
from sharded_milter.ipc.memory import Memory
from sharded_milter.limits import Limits
from sharded_milter.mta.connection import CLOSE_GRACE, MilterConnection
from sharded_milter.mta.conversation import MessageLog, log_message
from sharded_milter.mta.gate import ADMIT_ALL, Admission, Gate
from sharded_milter.mta.inflight import Inflight


class ServerContext:
    """State that all MTA connections share, except the milters.

    `message_log` writes the log line of each message; None: messages get none. `admission` decides
    which connections are served.
    """

    def __init__(
        self,
        limits: Limits,
        policy: Policy,
        reactor: ReactorTime,
        counters: Counter[str],
        *,
        message_log: MessageLog | None = log_message,
        admission: Admission = ADMIT_ALL,
    ) -> None:
        self.limits = limits
        self.policy = policy
        self.reactor = reactor
        self.counters = counters
        self.message_log = message_log
        self.inflight = Inflight(limits.max_inflight_bytes)
        self.idle = Alarm(reactor, limits.idle_timeout, MilterConnection.idle_timed_out)
        self.closing = Alarm(reactor, CLOSE_GRACE, MilterConnection.unread_timed_out)
        self.progress = Alarm(reactor, limits.progress_interval, MilterConnection.send_progress)
        self.gate: Gate[MilterConnection] = Gate(
            limits.max_connections, admission, counters, reactor
        )
        self._shares = admission.shares

    @property
    def connections(self) -> list[MilterConnection]:
        """All MTA connections, also the refused ones."""
        return self.gate.connections

    def connected(self, connection: MilterConnection) -> bytes:
        """Register a new connection. Return the reply for a refused one; empty if it is served."""
        return self.gate.admit(connection)

    def disconnected(self, connection: MilterConnection) -> None:
        """Forget a connection that is lost."""
        self.gate.remove(connection)

    def new_memory(self) -> Memory:
        """Return memory for a message. Raise OSError if there is none, or no descriptor for it."""
        memory = Memory()
        if self._shares is not None and memory.fd >= self._shares.memory:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return memory
