"""The milters of a service: what each wants, and who answers for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from twisted.internet.defer import Deferred

from sharded_milter.dispatch.affinity import Affinity
from sharded_milter.dispatch.job import Job
from sharded_milter.protocol.negotiation import Manifest


class Server(Protocol):
    """Who answers a milter's jobs: the dispatcher, or a host in this process.

    `submit` returns reply packets, or a Deferred of them that has not fired; it raises a
    JobFailed, or the Deferred fails with one.
    """

    def submit(self, job: Job) -> bytes | Deferred[bytes]: ...
    def cancel(self, job: Job) -> None: ...
    def release(self, affinity: Affinity) -> None: ...


@dataclass(frozen=True)
class Member:
    """A milter as the service knows it: what it wants, who serves it, and by which number."""

    manifest: Manifest
    server: Server
    number: int = 0


def workers_members(manifests: Iterable[Manifest], server: Server) -> list[Member]:
    """The milters that the workers serve."""
    return [Member(manifest, server, number) for number, manifest in enumerate(manifests)]
