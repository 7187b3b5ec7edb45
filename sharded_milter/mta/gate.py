"""The gate: decides for each new connection whether it is served or refused.

A refused connection gets 451 as the reply to its first question and to all later ones, so that the
mail is sent again later. The milter protocol has no other way, because a milter may send a reply
only when it is asked. The connection ends when the MTA closes it, or when another connection needs
its place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.logger import Logger

from sharded_milter.alarms import ReactorTime
from sharded_milter.descriptors import MAX_REFUSED, ReservedDescriptor, Shares
from sharded_milter.dispatch.policy import BUSY, NOT_ALLOWED
from sharded_milter.mta.log_limit import LimitedLog
from sharded_milter.mta.peers import ALL_PEERS, Peers, peer_credentials, user_name
from sharded_milter.mta.stream_transport import StreamTransport

# Seconds until a refused connection is closed if others wait for its place and the 451 was not sent
# yet. MTAs negotiate within milliseconds, so a peer that has sent nothing is probably no MTA. One
# that has negotiated may ask its first question later, when a client connects.
SILENT_GRACE = 0.1
NEGOTIATED_GRACE = 1.0

# Seconds between two checks for a free place.
RECHECK_DELAY = 0.01


class GatedConnection(Protocol):
    """A connection, as the gate uses it."""

    @property
    def transport(self) -> StreamTransport: ...
    @property
    def has_negotiated(self) -> bool: ...
    @property
    def refusal_sent(self) -> bool: ...
    def close_unanswered(self) -> None: ...


C = TypeVar("C", bound=GatedConnection)


@dataclass(frozen=True)
class Admission:
    """The peers that may connect, and the shares of the descriptors.

    `shares` is None where another program owns the process.
    """

    peers: Peers = ALL_PEERS
    shares: Shares | None = None


ADMIT_ALL = Admission()


class Gate(Generic[C]):
    """Admits connections up to a limit, and knows all that are open.

    `max_served` is the number that may be served at a time. Refused connections do not count.
    """

    log = Logger()

    def __init__(
        self, max_served: int, admission: Admission, counters: Counter[str], reactor: ReactorTime
    ) -> None:
        self.served: set[C] = set()
        self.reserved = ReservedDescriptor()
        self._max_served = max_served
        self._peers = admission.peers
        self._shares = admission.shares
        self._counters = counters
        self._reactor = reactor
        # Refused connections, each with the time at which it came and its reply.
        self._refused: dict[C, tuple[float, bytes]] = {}
        self._closing: set[C] = set()  # those of them that are being closed
        self._refusals = LimitedLog(self.log.warn, reactor.seconds)

    @property
    def is_empty(self) -> bool:
        """True if no connection is open."""
        return not self.served and not self._refused

    @property
    def connections(self) -> list[C]:
        """All connections, also the refused ones."""
        return [*self.served, *self._refused]

    def admit(self, connection: C) -> bytes:
        """Register a new connection. Return the reply for a refused one; empty if it is served."""
        peer = self._disallowed_peer(connection.transport)
        if peer:
            line = f"refused a connection from {peer}: --allowed-peers does not include it"
            return self._refuse(connection, NOT_ALLOWED, "refused_peers", peer, line)
        reason = self._lack_of_room(connection.transport)
        if reason:
            line = f"refused a connection: {reason}"
            return self._refuse(connection, BUSY, "overload_connections", "", line)
        self.served.add(connection)
        return b""

    def remove(self, connection: C) -> None:
        """Forget a connection that is lost."""
        self.served.discard(connection)
        self._refused.pop(connection, None)
        self._closing.discard(connection)

    def accept_delay(self) -> float:
        """Return the seconds to wait before the next connection is accepted; usually 0.

        The number of refused connections is limited. At the limit, close those that have got their
        reply or used up their time; until one has ended, the kernel holds new connections.
        """
        if not self._refused or len(self._refused) < self._max_refused:
            return 0.0
        now = self._reactor.seconds()
        for connection, (came, reply) in self._refused.items():
            expects_question = connection.has_negotiated and reply is BUSY
            grace = NEGOTIATED_GRACE if expects_question else SILENT_GRACE
            is_done = connection.refusal_sent or now - came >= grace
            if is_done and connection not in self._closing:
                self._closing.add(connection)
                connection.close_unanswered()  # takes effect in the next reactor iteration
        return RECHECK_DELAY

    def _disallowed_peer(self, transport: StreamTransport) -> str:
        """Return the name of a peer that may not connect; empty if it may."""
        peer = transport.getPeer()
        if isinstance(peer, IPv4Address | IPv6Address):
            return "" if self._peers.allows_host(peer.host) else str(peer.host)
        if not self._peers.restricts_users:
            return ""
        user, groups = peer_credentials(transport.getHandle())
        return "" if self._peers.allows_user(user, groups) else user_name(user)

    def _lack_of_room(self, transport: StreamTransport) -> str:
        """Return the reason why no more connections can be served; empty if they can."""
        if len(self.served) >= self._max_served:
            return f"{self._max_served} are open (--max-connections)"
        if self._shares is None:
            return ""
        if transport.fileno() >= self._shares.connections or not self.reserved.refill():
            return (
                f"{len(self.served)} are open, and no file descriptor is left for another one"
                " (ulimit -n, LimitNOFILE=)"
            )
        return ""

    @property
    def _max_refused(self) -> int:
        """The most refused connections at a time; 1 if it takes a reserved descriptor."""
        if self._shares is None:
            return MAX_REFUSED
        return self._shares.refused if self.reserved.refill() else 1

    def _refuse(self, connection: C, reply: bytes, counter: str, topic: str, line: str) -> bytes:
        self._refused[connection] = self._reactor.seconds(), reply
        self._counters[counter] += 1
        self._refusals.write(topic, line)
        return reply
