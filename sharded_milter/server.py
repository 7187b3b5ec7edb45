"""The server: owns sockets, pool and connections, from its start to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from sharded_milter.alarms import DelayedCall
from sharded_milter.context import ServerContext
from sharded_milter.dispatch.dispatcher import Dispatcher
from sharded_milter.dispatch.policy import Policy
from sharded_milter.limits import Limits
from sharded_milter.mta.accepting import AcceptReactor
from sharded_milter.mta.connection import MilterConnection
from sharded_milter.mta.conversation import MessageLog, log_message
from sharded_milter.mta.gate import ADMIT_ALL, Admission
from sharded_milter.mta.listener import Listener
from sharded_milter.mta.members import Member, worker_members
from sharded_milter.pool.pool import Pool
from sharded_milter.protocol.negotiation import Manifest

# Seconds for slow MTAs to read their last verdicts, and for the last end-of-session jobs.
FLUSH_GRACE = 2.0


class Server(ServerContext):
    """Serves MTAs with the workers of a pool.

    `in_master` are milters that run in this process; they come before those of the workers. The
    listeners are bound already; they are served once the workers are ready. If there are none,
    `bind` returns them for the socket that the workers' pymilter script names. `message_log` writes
    the log line of each message; None: messages get none. `admission` decides which connections
    are served.
    """

    log = Logger()
    reactor: AcceptReactor

    def __init__(
        self,
        listeners: Sequence[Listener],
        pool: Pool,
        dispatcher: Dispatcher,
        limits: Limits,
        policy: Policy,
        reactor: AcceptReactor,
        in_master: Sequence[Member] = (),
        bind: Callable[[str], Sequence[Listener]] | None = None,
        *,
        message_log: MessageLog | None = log_message,
        admission: Admission = ADMIT_ALL,
    ) -> None:
        super().__init__(
            *(limits, policy, reactor, dispatcher.counters),
            message_log=message_log,
            admission=admission,
        )
        self.pool = pool
        self.dispatcher = dispatcher
        self.listeners = listeners
        self._bind = bind
        self._in_master = in_master
        self._members: Sequence[Member] = in_master
        self._served: tuple[Manifest, ...] = ()  # the manifests of the workers' milters
        self._serving = False
        self._stopping = False
        self._finished = False
        self._all_closed = False
        self._grace: DelayedCall | None = None
        self.stopped: Deferred[None] = Deferred()

    def start(self) -> Deferred[None]:
        """Return a Deferred that fires when the workers are ready and MTAs are served.

        It fails as Pool.start does, or with the StartError of a socket that is bound late.
        """
        return self.pool.start().addCallback(self._serve)

    @property
    def members(self) -> Sequence[Member]:
        """The milters of a new connection: those in this process, then those of the workers."""
        manifests = self.pool.manifests
        if manifests is not self._served:  # the pool has reloaded
            self._served = manifests
            self._members = (*self._in_master, *worker_members(manifests, self.dispatcher))
        return self._members

    def _serve(self, _: object) -> None:
        factory: Any = Factory()
        factory.buildProtocol = lambda _: MilterConnection(self)
        factory.noisy = False
        if not self.listeners and self._bind is not None and not self._stopping:
            self.listeners = self._bind(self.pool.socket)
        for listener in self.listeners:
            listener.serve(factory, self.gate, self.reactor)
        self._serving = True

    def disconnected(self, connection: MilterConnection) -> None:
        """Forget a connection that is lost; go on with stopping if it was the last one."""
        super().disconnected(connection)
        self._check_stopped()

    def dump(self) -> None:
        """Log the counters, and the stacks of all workers."""
        counts = sorted(self.dispatcher.counters.items())
        self.log.info(
            "{n} connections, {q} jobs queued, {b} bytes in flight; {counts}",
            n=len(self.connections),
            q=self.dispatcher.queued,
            b=self.inflight.used,
            counts=" ".join(f"{name}={count}" for name, count in counts),
        )
        self.pool.dump_stacks()

    def stop(self, *, quick: bool = False) -> Deferred[None]:
        """Accept no more connections; return a Deferred that fires when all has ended.

        Sessions get `graceful_timeout` seconds to end, or none if `quick`, which may also follow in
        a later call. Questions that are pending after that are answered with 451.
        """
        if not self._stopping:
            self._stopping = True
            for listener in self.listeners:
                listener.close()
            self.gate.reserved.release()
            if self._serving:
                self.log.info("stopping, {n} connections are open", n=len(self.connections))
            self._grace = self.reactor.callLater(self.limits.graceful_timeout, self._finish)
        if quick and self._grace is not None and not self._finished and not self._all_closed:
            self._grace.reset(0)
        self._check_stopped()
        return self.stopped

    def _finish(self) -> None:
        self._finished = True
        for connection in self.connections:
            connection.finish()
        self._grace = self.reactor.callLater(FLUSH_GRACE, self._abort)

    def _abort(self) -> None:
        for connection in self.connections:
            connection.abort()

    def _check_stopped(self) -> None:
        if self._stopping and self.gate.is_empty and not self._all_closed:
            self._all_closed = True
            if self._grace is not None and self._grace.active():
                self._grace.cancel()
            # Objects end before their workers do, but only FLUSH_GRACE is waited for that.
            clock: Any = self.reactor
            ended = self.dispatcher.when_sessions_ended().addTimeout(FLUSH_GRACE, clock)
            ended.addBoth(lambda _: self.pool.stop().chainDeferred(self.stopped))
