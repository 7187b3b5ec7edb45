"""The milter protocol inside your own Twisted program, in libmilter's style.

    reactor.listenTCP(1234, MilterProtocolFactory([FactoryA(), FactoryB()]))

serves the milters of two factories on one connection: flags, actions and macros are merged, all
are asked side by side, and the MTA hears one answer. They run in the reactor; the same classes
run in worker processes with `sharded-milter mysite:FactoryA`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from twisted.internet.protocol import ServerFactory

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

    `factories` is one or a list of what builds or is a milter: a MilterFactory, a class derived
    from Milter, or a `sharded_milter.Milter` made of functions. `limits` bound times and sizes,
    `policy` is what an MTA hears when a milter raises. `reactor` is the global one if not given,
    which is chosen then if it was not before.
    """

    noisy = False

    def __init__(
        self,
        factories: Any = (),
        *,
        limits: Limits | None = None,
        policy: Policy | None = None,
        reactor: Any = None,
    ) -> None:
        super().__init__(
            limits or Limits(), policy or Policy(), reactor or _global_reactor(), Counter()
        )
        self.members: tuple[Member, ...] = ()
        for factory in factories if isinstance(factories, Iterable) else [factories]:
            self.addMilterFactory(factory)

    def addMilterFactory(self, factory: Any) -> None:
        """One more milter on each connection from now on, the last of them.

        Raises MilterLoadError for what is none.
        """
        dialect: Dialect = as_dialect(factory)
        member = InMaster(dialect, self.limits, self.reactor, self.counters)
        self.members = (*self.members, Member(member.manifest, member))

    def buildProtocol(self, addr: object) -> MilterConnection:
        """A connection of an MTA."""
        connection = MilterConnection(self)
        connection.factory = self
        return connection


def _global_reactor() -> Any:
    from twisted.internet import reactor

    return reactor
