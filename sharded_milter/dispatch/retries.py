"""Retries: messages that have killed a worker, and messages that an SMTP client repeats.

A message whose scan has killed its process is retried up to `retries` times. The attempt that
could make it poison runs alone in a fresh process, so that nothing else can be the cause. Poison
fails at once. With --join-retries, a client's repeat of a message waits for the answer to the
first one.
"""

from __future__ import annotations

import threading
from collections import Counter

from twisted.logger import Logger

from sharded_milter.dispatch.job import Job
from sharded_milter.dispatch.keep_dir import KeepDir
from sharded_milter.dispatch.poison import POISON_DEATHS, SIZE_TOLERANCE, Poison
from sharded_milter.errors import JobFailed, Poisoned, WorkerLost
from sharded_milter.ipc.memory import Memory, view_of
from sharded_milter.limits import Limits
from sharded_milter.protocol.stages import Stage

# Seconds after which a repeat waits for the message that is in hand, instead of being scanned too.
# A client that gives up and repeats has waited for minutes.
JOIN_AFTER = 10.0

# Copies of poison that may wait for a slow disk at one time: each is a message in memory.
MAX_SAVING = 4


class Retries:
    """Records the deaths that messages cause, and finds the job that another one repeats."""

    log = Logger()

    def __init__(self, limits: Limits, counters: Counter[str], keep: KeepDir | None) -> None:
        self._limits = limits
        self._counters = counters
        self._keep = keep
        self._saving = threading.BoundedSemaphore(MAX_SAVING)
        self._poison = Poison()
        self._in_hand: dict[Job, None] = {}  # that repeats may join

    def admit(self, job: Job, now: float) -> None:
        """Set `job.solo` of a new job; raise Poisoned if its message is poison."""
        if self._poison.sizes and job.stage is Stage.EOM and self._poison.is_likely(job.size, now):
            deaths = self._poison.deaths(job.digest, now)
            if deaths >= POISON_DEATHS:
                raise Poisoned("its scan has killed workers before")
            job.solo = deaths + 1 >= POISON_DEATHS

    # Deaths

    def final_error(self, job: Job, reason: str, now: float) -> JobFailed:
        """Return the error for a job that has killed too many workers to be retried."""
        if self.record_deaths(job, job.blamed, now):
            return Poisoned(f"it has killed workers; {reason}")
        return WorkerLost(reason)

    def prepare(self, job: Job, now: float) -> None:
        """Set `job.solo` before another attempt."""
        if job.blamed and job.stage is Stage.EOM:
            before = self._poison.deaths(job.digest, now) if len(self._poison) else 0
            job.solo = before + job.blamed + 1 >= POISON_DEATHS

    def record_deaths(self, job: Job, deaths: int, now: float) -> bool:
        """Record deaths of workers; if the message is poison now, save a copy and return True."""
        if job.stage is not Stage.EOM:
            return False
        if not self._poison.record(job.digest, job.size, now, deaths):
            return False
        self._counters["poison"] += 1
        self.log.error("{about} is poison: its scan has killed workers", about=job.about)
        if self._keep is not None:
            self._save(self._keep, job)
        return True

    def _save(self, keep: KeepDir, job: Job) -> None:
        if self._saving.acquire(blocking=False):
            name, message = job.digest.hex()[:16], job.message  # which the job frees soon
            try:
                keep.run(lambda: self._write(keep, name, message))
            except RuntimeError as error:  # the system allows no thread: the death still counts
                self._saving.release()
                self.log.error("cannot keep a copy: {why}", why=str(error))
        else:
            self.log.error("cannot keep a copy: {n} are being written", n=MAX_SAVING)

    def _write(self, keep: KeepDir, name: str, message: bytes | Memory) -> None:
        """Save a copy; may run in another thread."""
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
        """Return the job that this one repeats and whose answer it can wait for, or None."""
        if not self._limits.join_retries or job.stage is not Stage.EOM or job.affinity is not None:
            return None
        asked = job.milter, job.manifest, job.client
        for other in self._in_hand:
            if (
                other.submitted <= job.submitted - JOIN_AFTER
                and (other.milter, other.manifest, other.client) == asked
                and abs(other.size - job.size) < SIZE_TOLERANCE
                and other.digest == job.digest
            ):
                self._counters["joined"] += 1
                self.log.info("{a} waits for the scan of {b}", a=job.about, b=other.about)
                return other
        self._in_hand[job] = None
        return None

    def forget(self, job: Job) -> None:
        """Let no repeat join the job any more."""
        self._in_hand.pop(job, None)

    def replace(self, job: Job, new_leader: Job) -> None:
        """Let repeats join the new leader instead of the job."""
        self.forget(job)
        self._in_hand[new_leader] = None
