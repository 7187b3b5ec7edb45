"""The server: sockets, pool and connections under one roof, from start to the last QUIT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from sharded_milter.context import ServerContext
from sharded_milter.dispatch.dispatcher import Dispatcher
from sharded_milter.dispatch.policy import Policy
from sharded_milter.limits import Limits
from sharded_milter.mta.connection import MilterConnection
from sharded_milter.mta.conversation import MessageLog, log_message
from sharded_milter.mta.gate import ALL_MAY, Admission
from sharded_milter.mta.listener import Listener
from sharded_milter.mta.members import Member, workers_members
from sharded_milter.pool.pool import Pool
from sharded_milter.protocol.negotiation import Manifest

# Seconds for the last verdicts to leave the socket buffers of MTAs that read slowly, and for the
# last objects to end.
FLUSH_GRACE = 2.0


class Server(ServerContext):
    """Serves MTAs with the workers of a pool. No state lives outside it.

    `in_master` are milters that run in this process, before those that the workers serve. The
    listeners are bound already; they are served once the workers are ready. Where there are none,
    `bind` makes them, of the socket that the workers' script asks for. `message_log` writes
    the line about each message, `admission` says which connections are served.
    """

    log = Logger()

    def __init__(
        self,
        listeners: Sequence[Listener],
        pool: Pool,
        dispatcher: Dispatcher,
        limits: Limits,
        policy: Policy,
        reactor: Any,
        in_master: Sequence[Member] = (),
        bind: Callable[[str], Sequence[Listener]] | None = None,
        *,
        message_log: MessageLog | None = log_message,
        admission: Admission = ALL_MAY,
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
        self._served: tuple[Manifest, ...] = ()  # by the workers
        self._serving = False
        self._stopping = False
        self._finished = False
        self._emptied = False
        self._grace: Any = None
        self.stopped: Deferred[None] = Deferred()

    def start(self) -> Deferred[None]:
        """Fires when the workers are ready and MTAs are served.

        Fails as Pool.start does, and with what a socket that is bound late cannot be.
        """
        return self.pool.start().addCallback(self._serve)

    @property
    def members(self) -> Sequence[Member]:
        """The milters of a new connection: those in this process, then those that workers serve."""
        manifests = self.pool.manifests
        if manifests is not self._served:  # the pool has reloaded
            self._served = manifests
            self._members = (*self._in_master, *workers_members(manifests, self.dispatcher))
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
        """An MTA has left, perhaps the last one."""
        super().disconnected(connection)
        self._check_stopped()

    def dump(self) -> None:
        """Writes the counters and the stacks of all workers into the log."""
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
        """Takes no more connections; fires when all is over.

        Sessions get `graceful_timeout` to reach their end, or none at all when `quick`, which
        may also be asked for later. Whoever then still waits for an answer is told to try again.
        """
        if not self._stopping:
            self._stopping = True
            for listener in self.listeners:
                listener.close()
            self.gate.spare.give()
            if self._serving:
                self.log.info("stopping, {n} connections are open", n=len(self.connections))
            self._grace = self.reactor.callLater(self.limits.graceful_timeout, self._finish)
        if quick and not self._finished and not self._emptied:
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
        if self._stopping and self.gate.is_empty and not self._emptied:
            self._emptied = True
            if self._grace.active():
                self._grace.cancel()
            # Objects end before their workers do; one that does not holds nobody up for long.
            parted = self.dispatcher.sessions_ended().addTimeout(FLUSH_GRACE, self.reactor)
            parted.addBoth(lambda _: self.pool.stop().chainDeferred(self.stopped))
