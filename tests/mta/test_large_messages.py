"""Large messages: kept in memory that is shared, bounded, and freed in the end."""

from __future__ import annotations

import gc
import os

import pytest
from one_mta import (
    ABORT,
    AT_THE_END,
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
from sharded_milter.protocol.commands import MAX_HOST, MAX_LINE, MAX_MACROS, MAX_OFFER
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Protocol, Stage


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


ABORT_SIZE = len(packed(ABORT))
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


@pytest.mark.parametrize("method", ["__init__", "append", "seal"])
def test_a_message_without_memory_gets_452(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Memory, method, refuse)
        mta = at_the_end(*ENVELOPE, *LARGE, EOM)
    assert mta.written() == [NO_ROOM]
    assert not mta.closed
    mta.say(*MESSAGE)
    assert content(mta.job.message) == packed(*MESSAGE)


@pytest.mark.parametrize(
    "packet",
    [
        commands.Connect("x" * MAX_HOST, "U"),
        commands.Helo("x" * MAX_HOST),
        commands.Macro("H", (("{x}", "y" * MAX_MACROS),)),
        commands.Unknown("x" * MAX_LINE),
        commands.Mail("<a>", ("x" * MAX_LINE,)),
        commands.Rcpt("<a>", ("x" * MAX_LINE,)),
    ],
    ids=lambda packet: type(packet).__name__,
)
@pytest.mark.parametrize("half", [True, False])
def test_a_command_that_no_mta_sends_ends_the_connection_before_it_has_all_come(
    packet: Packet, half: bool
) -> None:
    mta = Mta(*[] if isinstance(packet, commands.Connect) else [CLIENT], manifest=AT_THE_END)
    if isinstance(packet, commands.Rcpt):
        mta.say(MAIL)
    sent = packed(packet)
    with capturedLogs() as events:
        mta.connection.dataReceived(sent[:10] if half else sent)
    assert mta.closed
    [line] = lines(events, LogLevel.warn)
    assert f"{type(packet).__name__} of {len(sent) - 4} bytes is longer than" in line
    assert mta.inflight.used == 0


def test_the_longest_that_an_mta_says_of_a_client_fits_into_one_box() -> None:
    macros = 2 * [4 + MAX_MACROS]
    assert sum([*macros, *[4 + MAX_HOST] * 2, 4 + MAX_OFFER]) + ABORT_SIZE <= MAX_INLINE
    longest = commands.Helo("x" * (MAX_HOST - 2))
    mta = Mta(CLIENT)
    mta.answer(CONTINUE)
    mta.say(longest)
    assert content(mta.job.connection).endswith(packed(longest))


def test_a_message_up_to_one_box_needs_no_memory() -> None:
    mta = at_the_end(*ENVELOPE, commands.Body(b"x" * (SPOOL_ABOVE - 500)), EOM)
    assert isinstance(mta.job.message, bytes)
