"""The pool: shards, the jobs they do, and what happens when one of them ends.

It decides nothing about order (that is the schedule) and knows nothing of the protocol. A job
that is submitted is answered exactly once, with replies or with a JobFailed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.errors import (
    CallbackFailed,
    ConfigError,
    DeadlineExceeded,
    MilterError,
    Overloaded,
    SystemRefused,
    WorkerLost,
)
from sharded_milter.jobs import Memory
from sharded_milter.master.limits import Limits
from sharded_milter.master.schedule import Schedule
from sharded_milter.master.shard import Shard, State
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import Stage

# A worker that has served this long was healthy: its end is no sign of a crash loop.
HEALTHY_AFTER = 10.0

# The share of a deadline after which a worker is asked where it hangs.
SOFT_LIMIT = 0.8


@dataclass(eq=False)
class Job:
    """One transcript to be answered at one stage."""

    stage: Stage
    light: bool
    connection: bytes | Memory
    message: bytes | Memory
    about: Callable[[], str]  # what log lines call it
    result: Deferred[bytes] = field(default_factory=Deferred)
    attempts: int = 0
    wanted: bool = True  # somebody waits for the answer
    shard: Shard | None = None
    timer: Any = None
    submitted: float = 0.0
    started: float = 0.0  # when the worker that answered got it
    slot: int = 0  # whose worker answered; 0 for none


@dataclass
class _Slot:
    """A place in the pool and the luck that its workers have had."""

    number: int
    shard: Shard | None = None
    delay: float = 0.0  # before its latest respawn
    ready_at: float = 0.0


class Pool:
    """`size` workers that each serve the milter `spec`."""

    log = Logger()

    def __init__(self, spec: str, size: int, limits: Limits, reactor: Any, env: dict[str, str]):
        self.manifest: Manifest | None = None
        self._spec = spec
        self._limits = limits
        self._reactor = reactor
        self._env = env
        self._slots = [_Slot(number) for number in range(1, size + 1)]
        self._schedule: Schedule[Job, Shard] = Schedule(limits.max_queue, limits.queue_wait)
        self._started: Deferred[Manifest] = Deferred()
        self._stopped: Deferred[None] | None = None

    @property
    def shards(self) -> list[Shard]:
        """The worker processes there are, in the order of their slots."""
        return [slot.shard for slot in self._slots if slot.shard is not None]

    # Starting and stopping

    def start(self) -> Deferred[Manifest]:
        """Fires with the manifest when every worker is READY.

        Fails with MilterLoadError, ConfigError (too slow) or SystemRefused (cannot spawn).
        """
        try:
            for slot in self._slots:
                self._spawn(slot)
        except OSError as error:
            self._start_failed(SystemRefused(f"cannot start a worker: {error.strerror}"))
        return self._started

    def _start_failed(self, error: MilterError) -> None:
        if not self._started.called:
            self._started.errback(Failure(error))

    def stop(self) -> Deferred[None]:
        """Fires when all workers have ended; what they still do is lost."""
        if self._stopped is None:
            self._stopped = Deferred()
            for shard in self.shards:
                if shard.state in (State.STARTING, State.BUSY):
                    shard.kill("the service stops")
                else:
                    shard.drain()
            self._check_stopped()
        return self._stopped

    def _check_stopped(self) -> None:
        if self._stopped is not None and not self.shards and not self._stopped.called:
            self._stopped.callback(None)

    def _spawn(self, slot: _Slot) -> None:
        shard = Shard(slot.number, self._spec, self._reactor, self, self._env)
        shard.start()
        slot.shard = shard
        timeout = self._limits.worker_start_timeout
        self._reactor.callLater(timeout, self._check_ready, shard, timeout)

    def _check_ready(self, shard: Shard, timeout: float) -> None:
        if shard.state is State.STARTING:
            shard.kill(f"it was not ready within {timeout:g} s")

    def _respawn(self, slot: _Slot) -> None:
        if self._stopped is not None or slot.shard is not None:
            return
        try:
            self._spawn(slot)
        except OSError as error:
            self.log.error("cannot start shard {n}: {why}", n=slot.number, why=error.strerror)
            self._respawn_later(slot)

    def _respawn_later(self, slot: _Slot) -> None:
        delay = max(self._limits.respawn_first, 2 * slot.delay)
        slot.delay = min(delay, self._limits.respawn_longest)
        self._reactor.callLater(slot.delay, self._respawn, slot)

    # What shards tell

    def shard_ready(self, shard: Shard) -> None:
        """The milter is imported: the shard gets work."""
        self._slot_of(shard).ready_at = self._reactor.seconds()
        assert shard.manifest is not None  # READY brought it
        self.manifest = self.manifest or shard.manifest
        self.log.info("shard {slot} is ready, pid {pid}", slot=shard.slot, pid=shard.pid)
        everyone = all(slot.shard and slot.shard.manifest for slot in self._slots)
        if everyone and not self._started.called:
            self._started.callback(self.manifest)
        self.shard_idle(shard)

    def shard_idle(self, shard: Shard) -> None:
        """The shard has answered."""
        self._schedule.idle(shard)
        self._assign()

    def shard_deaf(self, shard: Shard) -> None:
        """The shard can be told nothing more; its exit should follow."""
        self._schedule.gone(shard)

    def shard_gone(self, shard: Shard) -> None:
        """The process is reaped: it is replaced, unless the service stops."""
        self._schedule.gone(shard)
        slot = self._slot_of(shard)
        if slot.shard is not shard:  # its start had failed half-way
            return
        slot.shard = None
        if self._stopped is not None:
            self._check_stopped()
            return
        reason = str(shard.load_error or shard.exit_reason)
        if not self._started.called:
            self._start_failed(
                shard.load_error or ConfigError(f"milter {self._spec}: its worker ended, {reason}")
            )
            return
        details = f"\n{shard.load_error.details}" if shard.load_error else ""
        self.log.error("shard {n} is gone: {why}", n=slot.number, why=reason + details)
        served = self._reactor.seconds() - slot.ready_at if shard.manifest else 0.0
        if served >= HEALTHY_AFTER:
            slot.delay = 0.0
        self._respawn_later(slot)

    def _slot_of(self, shard: Shard) -> _Slot:
        return self._slots[shard.slot - 1]

    # Jobs

    def submit(self, job: Job) -> Deferred[bytes]:
        """Fires with the reply packets; fails with a JobFailed."""
        now = self._reactor.seconds()
        eom = job.stage is Stage.EOM
        limit = self._limits.eom_deadline if eom else self._limits.command_deadline
        job.submitted = now
        job.timer = self._reactor.callLater(SOFT_LIMIT * limit, self._warn, job, limit)
        self._queue(job)
        return job.result

    def _queue(self, job: Job) -> None:
        try:
            self._schedule.submit(job, self._reactor.seconds())
        except Overloaded:
            self._fail(job, Failure())
            return
        self._assign()
        if job.shard is None and not job.result.called:
            self._reactor.callLater(self._limits.queue_wait, self._drop_overdue)

    def cancel(self, job: Job) -> None:
        """Nobody waits for the answer; a worker that is on it may finish until the deadline."""
        if self._schedule.withdraw(job):
            self._disarm(job)
        job.wanted = False
        job.result = Deferred()  # whatever comes is for nobody
        job.result.addErrback(lambda _: None)

    def _assign(self) -> None:
        while (pair := self._schedule.next()) is not None:
            self._run(*pair)

    def _run(self, job: Job, shard: Shard) -> None:
        job.shard = shard
        job.slot = shard.slot
        job.started = self._reactor.seconds()
        job.attempts += 1
        shard.label = job.about()
        answer = shard.ask(job.stage, job.connection, job.message)
        answer.addCallbacks(
            lambda replies: self._succeed(job, replies), lambda failure: self._failed(job, failure)
        )

    def _failed(self, job: Job, failure: Failure) -> None:
        shard, job.shard = job.shard, None
        lost = failure.check(WorkerLost)
        if lost and job.wanted and job.timer is not None and job.attempts <= self._limits.retries:
            self.log.warn(
                "{shard} died with {about}; another takes it", shard=shard, about=job.about()
            )
            self._queue(job)
            return
        if not failure.check(CallbackFailed, WorkerLost):
            self.log.failure("a job failed in an unforeseen way", failure)
        self._fail(job, failure)

    def _succeed(self, job: Job, replies: bytes) -> None:
        self._disarm(job)
        if not job.result.called:
            job.result.callback(replies)

    def _fail(self, job: Job, failure: Failure) -> None:
        self._disarm(job)
        if not job.result.called:
            job.result.errback(failure)

    def _disarm(self, job: Job) -> None:
        timer, job.timer = job.timer, None
        if timer is not None and timer.active():
            timer.cancel()

    def _warn(self, job: Job, limit: float) -> None:
        """The soft limit: while it still hangs, the worker shows where."""
        job.timer = self._reactor.callLater((1 - SOFT_LIMIT) * limit, self._expire, job, limit)
        if job.shard is not None:
            self.log.warn(
                "{shard} has not answered {about} for {n:g} s; its stacks follow",
                shard=job.shard,
                about=job.about(),
                n=self._reactor.seconds() - job.started,
            )
            job.shard.dump_stacks()

    def _expire(self, job: Job, limit: float) -> None:
        """The deadline: whoever has it is killed, and the MTA hears at once."""
        if self._schedule.withdraw(job):
            self._fail(job, Failure(Overloaded(f"no worker was free within {limit:g} s")))
        elif job.shard is not None:
            reason = f"{job.about()} was not answered within {limit:g} s"
            job.shard.kill(reason)
            self._fail(job, Failure(DeadlineExceeded(reason)))

    def _drop_overdue(self) -> None:
        for job in self._schedule.overdue(self._reactor.seconds()):
            wait = self._limits.queue_wait
            self._fail(job, Failure(Overloaded(f"no worker was free within {wait:g} s")))
