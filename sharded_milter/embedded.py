"""The milter protocol in your own Twisted program, in libmilter's style.

    reactor.listenTCP(1234, MilterProtocolFactory([FactoryA(), FactoryB()]))

serves the milters of two factories on one connection: flags, actions and macros are merged, all
are asked in parallel, and the MTA gets one answer. They run in the reactor; the same classes run
in worker processes with `sharded-milter mysite:FactoryA`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

from twisted.internet.protocol import ServerFactory

from sharded_milter.alarms import ReactorTime
from sharded_milter.context import ServerContext
from sharded_milter.dialects.libmilter.classes import (
    MacroStages,
    Milter,
    MilterFactory,
    NetworkTypes,
)
from sharded_milter.dialects.libmilter.context import ReturnCodes
from sharded_milter.dialects.loader import Dialect, as_dialect
from sharded_milter.dispatch.policy import Policy
from sharded_milter.in_master import InMaster
from sharded_milter.limits import Limits
from sharded_milter.mta.connection import MilterConnection
from sharded_milter.mta.members import Member

__all__ = [
    "Limits",
    "MacroStages",
    "Milter",
    "MilterFactory",
    "MilterProtocolFactory",
    "NetworkTypes",
    "Policy",
    "ReturnCodes",
]


class MilterProtocolFactory(ServerContext, ServerFactory):
    """Serves milters to every MTA that connects.

    `factories` is one factory or a list. Each is a MilterFactory, a class derived from Milter, or
    a `sharded_milter.Milter` made of functions. `limits` are the limits of times and sizes.
    `policy` has the reply to the MTA if a milter raises. `reactor` is the global reactor by
    default, which this installs if the program has not installed one.
    """

    noisy = False

    def __init__(
        self,
        factories: Any = (),
        *,
        limits: Limits | None = None,
        policy: Policy | None = None,
        reactor: ReactorTime | None = None,
    ) -> None:
        super().__init__(
            limits or Limits(), policy or Policy(), reactor or _global_reactor(), Counter()
        )
        self.members: tuple[Member, ...] = ()
        for factory in factories if isinstance(factories, Iterable) else [factories]:
            self.addMilterFactory(factory)

    def addMilterFactory(self, factory: Any) -> None:
        """Add a milter to each new connection, after all others.

        Raise MilterLoadError if `factory` is not one of the kinds above.
        """
        dialect: Dialect = as_dialect(factory)
        member = InMaster(dialect, self.limits, self.reactor, self.counters)
        self.members = (*self.members, Member(member.manifest, member))

    def buildProtocol(self, addr: object) -> MilterConnection:
        """Return the protocol for a new connection of an MTA."""
        connection = MilterConnection(self)
        connection.factory = self
        return connection


def _global_reactor() -> ReactorTime:
    from twisted.internet import reactor

    return cast("ReactorTime", reactor)
