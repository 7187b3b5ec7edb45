"""Mistakes that were made once, or nearly: each is put into the real code to see it found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sharded_milter.dispatch import queue
from sharded_milter.dispatch.assignment import Assignment
from sharded_milter.dispatch.job import Attempt, Blame, Job, Loss
from sharded_milter.dispatch.queue import Queue
from sharded_milter.dispatch.shards import Shards
from sharded_milter.ipc.channel import MasterChannel
from sharded_milter.limits import Limits
from sharded_milter.pool import generation, shard, slot
from sharded_milter.pool.shard import Shard
from sharded_milter.pool.table import Cell
from sharded_milter.protocol.stages import Stage

Mutant = Callable[[pytest.MonkeyPatch], None]


def hands_back_to_the_queue(patch: pytest.MonkeyPatch) -> None:
    """What waits behind another goes back to the queue, from where the same shard may get it."""

    def behind_too_long(self: Assignment, attempt: Attempt) -> None:
        attempt.job.attempts.remove(attempt)
        self.shards.withdraw(attempt)
        self.queue.add(attempt.job, requeued=True)
        self.match()

    patch.setattr(Assignment, "_behind_too_long", behind_too_long)


def later_stages_first(patch: pytest.MonkeyPatch) -> None:
    """The end of a message goes before what others have begun."""

    def push(self: Queue[Any, Any], job: Any) -> None:
        rank = 0 if job.stage is Stage.EOM else 1
        self._heaps_of(job).push((rank, job.entry, job))

    patch.setattr(Queue, "_push", push)


def looks_at_the_queue_only(patch: pytest.MonkeyPatch) -> None:
    """A shard that becomes idle takes nothing over."""

    def offer(self: Assignment, job: Job) -> None:
        if self.queue.capacity._idle:
            self.queue.offer(job)
            self.match()

    patch.setattr(Assignment, "offer", offer)


def does_not_look_in_time(patch: pytest.MonkeyPatch) -> None:
    """A shard that is idle already takes nothing over."""

    def offer(self: Assignment, job: Job) -> None:
        self.queue.offer(job)

    patch.setattr(Assignment, "offer", offer)


def blames_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    """What was withdrawn is not blamed for the death that it has caused."""
    real = Shards.remove

    def remove(self: Shards, shard: Any, loss: Loss) -> Any:
        attempts, waiting = real(self, shard, loss)
        hand = [attempt for attempt, _ in attempts if not attempt.withdrawn]
        first = hand[0] if hand and loss.blame is Blame.MESSAGE else None
        return [(attempt, attempt is first) for attempt, _ in attempts], waiting

    patch.setattr(Shards, "remove", remove)


def withdraws_from_objects(patch: pytest.MonkeyPatch) -> None:
    """What an object is told is withdrawn."""

    def supersede(self: Shards, attempt: Attempt) -> None:
        if attempt.pipeline.first is attempt:
            self._timeouts.start_deadline(attempt)
        elif attempt.pipeline.available and not attempt.withdrawn:
            self.withdraw(attempt)

    patch.setattr(Shards, "supersede", supersede)


def closes_descriptors_early(patch: pytest.MonkeyPatch) -> None:
    """A job's memory is closed with the job, though the socket has yet to send it."""
    real = MasterChannel.ask

    def ask(self: MasterChannel, *args: Any) -> None:
        real(self, *args)
        self._sending.clear()

    patch.setattr(MasterChannel, "ask", ask)


def does_not_hear_of_failures(patch: pytest.MonkeyPatch) -> None:
    """A generation does not hear that one of its shards cannot load."""
    table = dict(generation.TRANSITIONS)
    row = dict(table[generation.GenerationState.LOADING])
    row[generation.GenerationEvent.NOT_STARTED] = Cell(generation.GenerationState.LOADING)
    table[generation.GenerationState.LOADING] = row
    patch.setattr(generation, "TRANSITIONS", table)


def forgets_the_reason(patch: pytest.MonkeyPatch) -> None:
    """A shard does not say why it cannot load."""
    table = dict(shard.TRANSITIONS)
    row = dict(table[shard.ShardState.STARTING])
    row[shard.ShardEvent.LOAD_FAILED] = Cell(shard.ShardState.EXITING, "_shut_down")
    table[shard.ShardState.STARTING] = row
    patch.setattr(shard, "TRANSITIONS", table)


def work_is_no_health(patch: pytest.MonkeyPatch) -> None:
    """Answers do not reset the back-off."""
    real = slot.Slot.delay_after_death

    def delay_after_death(self: slot.Slot, shard: Shard, now: float, limits: Limits) -> float:
        shard.answers = 0
        return real(self, shard, now, limits)

    patch.setattr(slot.Slot, "delay_after_death", delay_after_death)


def light_jobs_always_first(patch: pytest.MonkeyPatch) -> None:
    """A light job goes before all others, however long those have waited."""
    patch.setattr(queue, "LIGHT_HEAD_START", 1e6)


# What matters in a crowd, when something starts, when memory is sent, and when processes die.
JOBS = ("connect", "cancel", "answer", "answer_later", "answer_while_the_master_is_busy", "advance")
STARTS = ("ready", "all_ready", "load_fails", "advance", "reload")
SENDING = ("connect", "answer", "cancel", "misbehave", "advance")
DEATHS = ("connect", "answer", "die", "advance", "all_ready")

# With what an example begins and what happens then, so that the mistake shows soon.
MUTANTS: dict[Mutant, tuple[str, tuple[str, ...]]] = {
    hands_back_to_the_queue: ("crowded", JOBS),
    later_stages_first: ("queued", JOBS),
    looks_at_the_queue_only: ("crowded", JOBS),
    does_not_look_in_time: ("crowded", JOBS),
    blames_the_neighbour: ("withdrawn", (*JOBS, "die")),
    withdraws_from_objects: ("objects", JOBS),
    closes_descriptors_early: ("cold", SENDING),
    does_not_hear_of_failures: ("empty", STARTS),
    forgets_the_reason: ("empty", STARTS),
    work_is_no_health: ("cold", DEATHS),
    light_jobs_always_first: ("aged", ("connect", "answer", "advance")),
}
