"""Large messages: kept in memory that is shared, bounded, and freed in the end."""

from __future__ import annotations

import gc
import os

import pytest
from one_mta import (
    ABORT,
    CLIENT,
    CONTINUE,
    DATA,
    ENVELOPE,
    EOH,
    EOM,
    EVERYTHING,
    HELO,
    MAIL,
    MESSAGE,
    NO_REPLIES,
    QUEUE_ID,
    QUIT,
    QUIT_NC,
    RCPT,
    UNKNOWN,
    Mta,
    at_the_end,
    content,
    lines,
    packed,
    transcript_of,
)
from twisted.logger import LogLevel, capturedLogs

from sharded_milter.dispatch.policy import NO_ROOM, TOO_LARGE
from sharded_milter.ipc.memory import MAX_INLINE, Memory
from sharded_milter.mta.transcript import SPOOL_ABOVE
from sharded_milter.protocol import commands
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Protocol, Stage


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


LARGE = [commands.Body(bytes([n]) * 60_000) for n in range(4)]


def test_a_large_message_is_sealed_memory_and_freed_in_the_end() -> None:
    before = descriptors()
    mta = at_the_end(*MESSAGE[:-2], *LARGE, EOM)
    memory = mta.job.message
    assert isinstance(memory, Memory)
    assert content(memory) == packed(*MESSAGE[:-2], *LARGE, EOM)
    with pytest.raises(PermissionError):
        os.write(memory.fd, b"x")
    assert descriptors() == before + 1
    mta.answer(CONTINUE)
    mta.pool.jobs.clear()
    del memory
    assert descriptors() == before


@pytest.mark.parametrize("leaving", [ABORT, QUIT, QUIT_NC], ids=repr)
def test_memory_of_a_cancelled_job_lives_until_its_worker_has_answered(leaving: Packet) -> None:
    before = descriptors()
    mta = at_the_end(*ENVELOPE, *LARGE, EOM)
    mta.say(leaving)
    assert descriptors() == before + 1
    assert transcript_of(mta.job).endswith(packed(*LARGE, EOM))
    mta.answer(CONTINUE)
    mta.pool.jobs.clear()
    mta.pool.cancelled.clear()
    mta.hang_up()
    assert descriptors() == before


def test_memory_goes_with_a_connection_that_is_lost_in_a_message() -> None:
    before = descriptors()
    mta = at_the_end(*ENVELOPE, *LARGE)
    assert descriptors() == before + 1
    mta.hang_up()
    assert descriptors() == before


def test_a_too_large_message_is_refused_and_not_kept_and_later_ones_are_fine() -> None:
    before = descriptors()
    mta = at_the_end(*ENVELOPE, max_message_size=100_000)
    with capturedLogs() as events:
        mta.say(*LARGE)
    assert descriptors() == before
    assert mta.written() == []
    assert lines(events, LogLevel.warn) == ["qid=4F1 is refused: it is larger than 100000 bytes"]
    mta.say(EOM)
    assert mta.written() == [TOO_LARGE]
    assert mta.pool.jobs == []
    mta.say(ABORT, *MESSAGE)
    assert content(mta.job.message) == packed(*MESSAGE)
    mta.answer(CONTINUE)
    assert mta.written() == [packed(CONTINUE)]


def test_the_size_that_is_just_right_is_taken() -> None:
    size = len(packed(*MESSAGE))
    assert at_the_end(*MESSAGE, max_message_size=size).pool.stages == [Stage.EOM]
    assert at_the_end(*MESSAGE, max_message_size=size - 1).pool.stages == []


@pytest.mark.parametrize("ending", [[ABORT], [HELO], [QUEUE_ID], [QUIT_NC, CLIENT]], ids=repr)
def test_a_refusal_ends_with_its_message(ending: list[Packet]) -> None:
    mta = at_the_end(*ENVELOPE, *LARGE, max_message_size=100_000)
    mta.say(*ending, *MESSAGE)
    assert mta.pool.stages == [Stage.EOM]


@pytest.mark.parametrize("stage", ["RCPT", "DATA", "EOH", "UNKNOWN"])
def test_a_message_without_room_is_refused_at_the_next_question(stage: str) -> None:
    manifest = Manifest("one", EVERYTHING.actions, NO_REPLIES & ~Protocol[f"NR_{stage}"])
    huge = commands.Macro("M", (("x", "y" * 1000),))
    conversation = [CLIENT, HELO, huge, MAIL, RCPT, DATA, EOH, UNKNOWN]
    mta = Mta(*conversation, manifest=manifest, max_message_size=500)
    assert mta.written() == [TOO_LARGE]
    assert mta.pool.jobs == []


@pytest.mark.parametrize("method", ["__init__", "append"])
def test_a_message_for_which_there_is_no_memory_is_told_to_come_again(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Memory, method, refuse)
        mta = at_the_end(*ENVELOPE, *LARGE, EOM)
    assert mta.written() == [NO_ROOM]
    assert not mta.closed
    mta.say(*MESSAGE)
    assert content(mta.job.message) == packed(*MESSAGE)


@pytest.mark.parametrize("size", [MAX_INLINE, 400_000])
def test_parts_too_large_for_amp_go_as_memory(size: int) -> None:
    before = descriptors()
    mta = Mta(CLIENT, commands.Helo("x" * size))
    mta.answer(CONTINUE)
    assert isinstance(mta.job.connection, Memory)
    mta.answer(CONTINUE)
    unknown = commands.Unknown("y" * size)
    mta.say(unknown)
    command = mta.job.command
    assert isinstance(command, Memory)
    assert content(command) == packed(unknown)
    del command
    mta.hang_up()
    mta.pool.jobs.clear()
    mta.pool.cancelled.clear()
    assert descriptors() == before


def test_a_message_up_to_one_box_needs_no_memory() -> None:
    mta = at_the_end(*ENVELOPE, commands.Body(b"x" * (SPOOL_ABOVE - 500)), EOM)
    assert isinstance(mta.job.message, bytes)
