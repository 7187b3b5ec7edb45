"""The milters of a service, each with its manifest and its executor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from twisted.internet.defer import Deferred

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Job
from sharded_milter.protocol.negotiation import Manifest


class Executor(Protocol):
    """Executes a milter's jobs: the dispatcher, or the milter in this process.

    `submit` returns reply packets, or a Deferred of them that has not fired. It raises a
    JobFailed, or the Deferred fails with one. `cancel` takes a job back; its Deferred does not
    fire. `release` ends the object of a connection.
    """

    def submit(self, job: Job) -> bytes | Deferred[bytes]: ...
    def cancel(self, job: Job) -> None: ...
    def release(self, affinity: ObjectAffinity) -> None: ...


@dataclass(frozen=True)
class Member:
    """One milter of a service; `number` is its index among the milters of the executor."""

    manifest: Manifest
    executor: Executor
    number: int = 0


def worker_members(manifests: Iterable[Manifest], executor: Executor) -> list[Member]:
    """Return the milters that run in workers, numbered in their order."""
    return [Member(manifest, executor, number) for number, manifest in enumerate(manifests)]
