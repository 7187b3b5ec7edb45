"""What becomes of a message that was seen before: one that has killed, and one that is repeated.

A message whose scan has killed its process is tried again while `retries` allow; the attempt that
could make it poison runs alone in a fresh process, so that no other message and no leftover is to
blame. Poison fails at once. With --join-retries, a client's repeat of a message waits for the
answer to the first one.
"""

from __future__ import annotations

import threading
from collections import Counter

from twisted.logger import Logger

from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.poison import DEADLY, SLACK, Keep, Poison
from sharded_milter.errors import JobFailed, Poisoned, WorkerLost
from sharded_milter.ipc.memory import Memory, view_of
from sharded_milter.limits import Limits
from sharded_milter.protocol.stages import Stage

# A client that gives up and comes back has waited for minutes; a message that has been in hand for
# this long is worth waiting for instead of starting it again.
JOIN_AFTER = 10.0

# Copies of poison that may wait for a slow disk at a time: each is a message in memory.
MAX_SAVING = 4


class Retries:
    """Remembers messages that have killed, and knows which ones are in hand."""

    log = Logger()

    def __init__(self, limits: Limits, counters: Counter[str], keep: Keep | None) -> None:
        self._limits = limits
        self._counters = counters
        self._keep = keep
        self._saving = threading.BoundedSemaphore(MAX_SAVING)
        self._poison = Poison()
        self._open: dict[Job, None] = {}  # messages in hand, while repeats may join them

    def admit(self, job: Job, now: float) -> None:
        """A new job: raises Poisoned, or says whether it must run alone."""
        if self._poison.sizes and job.stage is Stage.EOM and self._poison.is_likely(job.size, now):
            deaths = self._poison.deaths(job.digest, now)
            if deaths >= DEADLY:
                raise Poisoned("its scan has killed workers before")
            job.solo = deaths + 1 >= DEADLY

    # Deaths

    def given_up(self, job: Job, reason: str, now: float) -> JobFailed:
        """What a job fails with that has killed too often to be tried again."""
        if self.remember(job, job.blamed, now):
            return Poisoned(f"it has killed workers; {reason}")
        return WorkerLost(reason)

    def prepare(self, job: Job, now: float) -> None:
        """Another attempt follows: says whether it must run alone."""
        if job.blamed and job.stage is Stage.EOM:
            before = self._poison.deaths(job.digest, now) if len(self._poison) else 0
            job.solo = before + job.blamed + 1 >= DEADLY

    def remember(self, job: Job, deaths: int, now: float) -> bool:
        """The message has cost processes; whether it is poison now. If so, a copy is kept."""
        if job.stage is not Stage.EOM:
            return False
        if not self._poison.died(job.digest, job.size, now, deaths):
            return False
        self._counters["poison"] += 1
        self.log.error("{about} is poison: its scan has killed workers", about=job.about)
        if self._keep is not None:
            self._save(self._keep, job)
        return True

    def _save(self, keep: Keep, job: Job) -> None:
        if self._saving.acquire(blocking=False):
            name, message = job.digest.hex()[:16], job.message  # which the job lets go soon
            keep.run(lambda: self._write(keep, name, message))
        else:
            self.log.error("cannot keep a copy: {n} are being written", n=MAX_SAVING)

    def _write(self, keep: Keep, name: str, message: bytes | Memory) -> None:
        """May run in a thread of its own."""
        try:
            with view_of(message) as view:
                path = keep.save(name, view)
        except OSError as error:
            self.log.error("cannot keep a copy: {why}", why=str(error))
        else:
            self.log.info("copy kept: {path}", path=path or "no, the quota is used up")
        finally:
            self._saving.release()

    # Repeats

    def leader_of(self, job: Job) -> Job | None:
        """The job in hand whose answer this one may wait for, because it repeats that."""
        if not self._limits.join_retries or job.stage is not Stage.EOM or job.affinity is not None:
            return None
        asked = job.milter, job.manifest, job.client
        for other in self._open:
            if (
                other.submitted <= job.submitted - JOIN_AFTER
                and (other.milter, other.manifest, other.client) == asked
                and abs(other.size - job.size) < SLACK
                and other.digest == job.digest
            ):
                self._counters["joined"] += 1
                self.log.info("{a} waits for the scan of {b}", a=job.about, b=other.about)
                return other
        self._open[job] = None
        return None

    def done(self, job: Job) -> None:
        """The job is not in hand any more."""
        self._open.pop(job, None)

    def replaced(self, job: Job, heir: Job) -> None:
        """The heir is in hand instead of the job."""
        self.done(job)
        self._open[heir] = None
