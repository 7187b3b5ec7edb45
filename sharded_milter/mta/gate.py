"""The gate: decides once, when a connection comes, whether it is served.

A connection that is not served is turned away: the first thing that it asks, and all else, is
answered with 451, so that the mail is sent again later. The milter protocol has no other way: a
milter speaks only when it is spoken to. It ends when the MTA leaves, or when another connection
needs its place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.logger import Logger

from sharded_milter.descriptors import OF_TURNED_AWAY, Shares, Spare
from sharded_milter.dispatch.policy import BUSY, NOT_ALLOWED
from sharded_milter.mta.peers import ANYBODY, Peers, credentials, user_name
from sharded_milter.mta.rarely import Rarely

# Seconds that a connection which is turned away has to hear so, once others wait for its place.
# MTAs greet within milliseconds, so one that is silent for longer than the first is probably none;
# the second is for one that has greeted, and may connect at other times.
SILENT_CHANCE = 0.1
GREETED_CHANCE = 1.0

# Seconds until it is looked again whether there is a place.
NEXT_LOOK = 0.01


class Connection(Protocol):
    """What the gate needs of one."""

    transport: Any

    @property
    def has_greeted(self) -> bool: ...
    @property
    def has_heard(self) -> bool: ...
    def let_go(self) -> None: ...


@dataclass(frozen=True)
class Admission:
    """Who may connect, and how the descriptors are shared out; None: they are not ours to share."""

    peers: Peers = ANYBODY
    shares: Shares | None = None


ALL_MAY = Admission()


class Gate:
    """Lets connections in, up to a limit, and knows who is there.

    `most` is how many may be served at a time. Connections that are turned away are no part of
    that.
    """

    log = Logger()

    def __init__(
        self, most: int, admission: Admission, counters: Counter[str], reactor: Any
    ) -> None:
        self.served: set[Any] = set()
        self.spare = Spare()
        self._most = most
        self._peers = admission.peers
        self._shares = admission.shares
        self._counters = counters
        self._reactor = reactor
        self._turned_away: dict[Any, tuple[float, bytes]] = {}  # when it came, what it is to hear
        self._dismissed: set[Any] = set()  # those of them that have had it
        self._refusals = Rarely(self.log.warn, reactor.seconds)

    @property
    def is_empty(self) -> bool:
        """Whether no connection is there."""
        return not self.served and not self._turned_away

    @property
    def everybody(self) -> list[Any]:
        """All connections, those that are turned away included."""
        return [*self.served, *self._turned_away]

    def enter(self, connection: Connection) -> bytes:
        """What a new connection is answered if it is turned away; empty if it is served."""
        stranger = self._stranger(connection.transport)
        why = "" if stranger else self._no_room(connection.transport)
        if stranger:
            line = f"refused {stranger}, whom --allowed-peers does not name"
            return self._turn_away(connection, NOT_ALLOWED, "refused_peers", stranger, line)
        if why:
            line = f"told a connection to come back: {why}"
            return self._turn_away(connection, BUSY, "overload_connections", "", line)
        self.served.add(connection)
        return b""

    def leave(self, connection: Connection) -> None:
        """A connection is gone."""
        self.served.discard(connection)
        self._turned_away.pop(connection, None)
        self._dismissed.discard(connection)

    def wait(self) -> float:
        """Seconds until another connection is to be taken; 0 most of the time.

        Connections that are turned away are few at a time. When there are so many, those that have
        heard so, or have had their chance, are let go, and until then the kernel holds the next.
        """
        if len(self._turned_away) < self._places:
            return 0.0
        now = self._reactor.seconds()
        for connection, (came, answer) in self._turned_away.items():
            expected = connection.has_greeted and answer is BUSY
            chance = GREETED_CHANCE if expected else SILENT_CHANCE
            over = connection.has_heard or now - came >= chance
            if over and connection not in self._dismissed:
                self._dismissed.add(connection)
                connection.let_go()  # which has an effect in the reactor's next turn
        return NEXT_LOOK

    def _stranger(self, transport: Any) -> str:
        """Who it is that may not connect; empty if it may."""
        peer = transport.getPeer()
        if isinstance(peer, IPv4Address | IPv6Address):
            return "" if self._peers.take_host(peer.host) else str(peer.host)
        if not self._peers.names_users:
            return ""
        user, groups = credentials(transport.getHandle())
        return "" if self._peers.take_user(user, groups) else user_name(user)

    def _no_room(self, transport: Any) -> str:
        """Why no other connection can be served; empty if it can."""
        if len(self.served) >= self._most:
            return f"{self._most} are open (--max-connections)"
        if self._shares is None:
            return ""
        if transport.fileno() >= self._shares.connections or not self.spare.refill():
            return (
                f"{len(self.served)} are open, which leaves no file descriptor for another one"
                " (ulimit -n, LimitNOFILE=)"
            )
        return ""

    @property
    def _places(self) -> int:
        """How many may be turned away at a time; one where it uses up a spare descriptor."""
        if self._shares is None:
            return OF_TURNED_AWAY
        return self._shares.turned_away if self.spare.refill() else 1

    def _turn_away(
        self, connection: Connection, answer: bytes, counter: str, about: str, line: str
    ) -> bytes:
        self._turned_away[connection] = self._reactor.seconds(), answer
        self._counters[counter] += 1
        self._refusals.say(about, line)
        return answer
