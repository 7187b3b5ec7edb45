"""Deadlines of jobs: the end of a message may take longer than a command before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sharded_milter.alarms import Alarm
from sharded_milter.dispatch.job import Job
from sharded_milter.limits import Limits
from sharded_milter.protocol.stages import Stage


class Deadlines:
    """Calls `ring` with each job that has had `share` of the time that its stage may take."""

    def __init__(
        self, reactor: Any, limits: Limits, ring: Callable[[Job], object], share: float = 1.0
    ) -> None:
        self._at_end = Alarm(reactor, share * limits.deadline(Stage.EOM), ring)
        self._before = Alarm(reactor, share * limits.deadline(None), ring)

    def _alarm(self, job: Job) -> Alarm[Job]:
        return self._at_end if job.stage is Stage.EOM else self._before

    def set(self, job: Job) -> None:
        """Its time begins now."""
        self._alarm(job).set(job)

    def stop(self, job: Job) -> None:
        """It has ended."""
        self._alarm(job).stop(job)
