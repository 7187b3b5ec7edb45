"""How much of all messages is kept, and which messages belong together."""

from __future__ import annotations

import pytest
from one_mta import EVERYTHING, Mta, packed

from sharded_milter.dispatch.policy import NO_ROOM
from sharded_milter.ipc.memory import Memory
from sharded_milter.mta.inflight import Inflight
from sharded_milter.mta.transcript import SPOOL_ABOVE, Refusal, Transcript
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Protocol, Stage

NO_REPLIES = Protocol(sum(bit for name, bit in Protocol.__members__.items()
                          if name.startswith("NR_") and name != "NR_EOM"))  # fmt: skip
CLIENT = commands.Connect("client", "4", 25, "192.0.2.1")
ENVELOPE = [commands.Mail("<A@x>"), commands.Rcpt("<B@x>"), commands.Rcpt("<c@x>")]
CONTENT = [commands.Eoh(), commands.Body(b"x" * 1000), commands.Eom()]


def kept(transcript: Transcript, *packets: Packet) -> Transcript:
    for packet in packets:
        transcript.append(packet.encode())
    return transcript


def test_all_messages_share_the_room() -> None:
    inflight = Inflight(1000)
    one, other = inflight.claim(600), inflight.claim(0)
    assert inflight.claim(401) is None
    assert other is not None
    assert not other.grow(401)
    assert other.grow(400)
    assert inflight.used == 1000
    del one
    assert inflight.used == 400


def test_a_message_for_which_there_is_no_room_gives_back_what_it_had() -> None:
    inflight = Inflight(3000)
    first = kept(Transcript(10_000, inflight), commands.Body(b"x" * 2000))
    second = kept(Transcript(10_000, inflight), commands.Body(b"x" * 500))
    assert inflight.used == 2510
    kept(second, commands.Body(b"x" * 500))
    assert (second.refusal, second.size, inflight.used) == (Refusal.NO_ROOM, 0, 2005)
    kept(second, commands.Body(b"x"))
    assert second.size == 0
    first.clear_message()
    second.clear_message()
    assert (second.refusal, inflight.used) == (None, 0)


def test_a_message_that_is_too_large_takes_no_room() -> None:
    inflight = Inflight(10_000)
    transcript = kept(
        Transcript(1000, inflight), commands.Body(b"x" * 900), commands.Body(b"x" * 99)
    )
    assert (transcript.refusal, inflight.used) == (Refusal.TOO_LARGE, 0)


def test_without_memory_a_message_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(memory: Memory, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    inflight = Inflight(1_000_000)
    early, late = (Transcript(1_000_000, inflight) for _ in range(2))
    kept(late, commands.Body(b"x" * SPOOL_ABOVE), commands.Body(b"x"))
    monkeypatch.setattr(Memory, "append", refuse)
    kept(early, commands.Body(b"x" * SPOOL_ABOVE))
    assert early.refusal is Refusal.NO_MEMORY
    assert late.message_part() == b""
    assert late.refusal is Refusal.NO_MEMORY
    assert inflight.used == 0


def test_a_message_without_room_gets_452_and_others_are_scanned() -> None:
    manifest = Manifest("end", EVERYTHING.actions, NO_REPLIES)
    mta = Mta(CLIENT, *ENVELOPE, *CONTENT, manifest=manifest, max_inflight_bytes=1000)
    assert mta.written() == [NO_ROOM]
    assert mta.pool.counters["refused_no_room"] == 1
    mta.say(*ENVELOPE, commands.Eoh(), commands.Eom())
    assert mta.pool.stages == [Stage.EOM]


def test_a_message_that_finds_no_memory_when_it_is_asked_about_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = Manifest("end", EVERYTHING.actions, NO_REPLIES)
    mta = Mta(CLIENT, *ENVELOPE, commands.Eoh(), manifest=manifest)
    mta.say(commands.Body(b"x" * SPOOL_ABOVE), commands.Body(b"x"))

    def refuse(memory: Memory, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Memory, "append", refuse)
    mta.say(commands.Eom())
    assert mta.written() == [NO_ROOM]
    assert mta.pool.counters["refused_no_memory"] == 1
    assert mta.pool.jobs == []


@pytest.mark.parametrize(
    ("shard_by", "key"),
    [
        ("sender", b"<a@x>"),
        ("recipient", b"<b@x>"),
        ("client", commands.Connect("client", "4", 0, "192.0.2.1").encode()),
        ("nothing", b""),
    ],
)
def test_messages_that_belong_together_have_the_same_key(shard_by: str, key: bytes) -> None:
    transcript = Transcript(10_000, Inflight(10_000))
    assert transcript.key(shard_by) == b""
    transcript.store(CLIENT.encode())
    kept(transcript, *ENVELOPE)
    assert transcript.key(shard_by) == key
    transcript.clear_client()
    assert transcript.key(shard_by) == b""


@pytest.mark.parametrize("shard_by", ["", "sender", "recipient", "client", "session"])
def test_a_job_has_the_key_that_the_milter_wants(shard_by: str) -> None:
    manifest = Manifest("keys", EVERYTHING.actions, NO_REPLIES, shard_by=shard_by)
    mta = Mta(CLIENT, *ENVELOPE, *CONTENT, manifest=manifest)
    assert bool(mta.job.key) == bool(shard_by)
    mta.answer(replies.Continue())
    mta.say(*ENVELOPE, *CONTENT)
    first, second = mta.pool.jobs
    assert first.key == second.key


def test_reading_stops_while_the_mta_does_not_read() -> None:
    mta = Mta(CLIENT)
    mta.connection.pauseProducing()
    assert mta.paused
    mta.connection.resumeProducing()
    assert not mta.paused
    mta.connection.pauseProducing()
    mta.answer(replies.Continue())
    assert mta.paused
    assert mta.written() == [packed(replies.Continue())]
    mta.connection.stopProducing()
