"""The master's transcript: inline while small, in sealed memory when large."""

from __future__ import annotations

import fcntl
import gc
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.ipc.memory import Memory
from sharded_milter.mta.inflight import Inflight
from sharded_milter.mta.transcript import SPOOL_ABOVE, Transcript
from sharded_milter.protocol import commands
from sharded_milter.protocol.packets import Packet

NEGOTIATED = commands.Negotiate(6, 0, 0).encode()
CLIENT = commands.Connect("client", "U").encode()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def content(part: bytes | Memory) -> bytes:
    return os.pread(part.fd, part.size, 0) if isinstance(part, Memory) else part


def macros(stage: str, **values: str) -> bytes:
    return commands.Macro(stage, tuple(values.items())).encode()


def transcript_of_nothing(max_size: int = 10**9) -> Transcript:
    return Transcript(max_size, Inflight(10**9))


def with_message(*packets: Packet | bytes) -> Transcript:
    transcript = transcript_of_nothing()
    for packet in packets:
        transcript.append(packet if isinstance(packet, bytes) else packet.encode())
    return transcript


def test_the_connections_part_is_in_the_order_of_the_protocol() -> None:
    transcript = transcript_of_nothing()
    slots = [NEGOTIATED, macros("C", j="mx"), CLIENT, macros("H"), commands.Helo("me").encode()]
    assert transcript.connection_part() == b""
    for packet in reversed(slots):
        transcript.store(packet)
    assert transcript.connection_part() == b"".join(slots)
    assert transcript.connection_part() is transcript.connection_part()


def test_a_client_that_repeats_helo_uses_no_more_memory() -> None:
    transcript = transcript_of_nothing()
    for number in range(100):
        transcript.store(commands.Helo(f"client-{number:02}").encode())
    assert transcript.connection_part() == commands.Helo("client-99").encode()


@pytest.mark.parametrize("packet", [commands.Data().encode(), macros("M", i="1"), macros("U")])
def test_nothing_else_is_part_of_a_connection(packet: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="does not belong to the connection"):
        transcript_of_nothing().store(packet)


def test_after_a_client_only_the_negotiation_is_kept() -> None:
    transcript = with_message(commands.Mail("<a@b>"))
    transcript.store(NEGOTIATED)
    transcript.store(CLIENT)
    transcript.clear_client()
    assert transcript.connection_part() == NEGOTIATED
    assert (transcript.message_part(), transcript.size) == (b"", 0)


def test_a_small_message_is_bytes() -> None:
    packets = [commands.Mail("<a@b>").encode(), commands.Body(b"x" * 1000).encode()]
    transcript = with_message(*packets)
    assert transcript.message_part(complete=True) == b"".join(packets)
    assert transcript.size == sum(map(len, packets))


@pytest.mark.parametrize("over", [0, 1])
def test_a_message_moves_to_memory_just_above_the_limit(over: int) -> None:
    packet = commands.Body(b"x" * (SPOOL_ABOVE - 5 + over)).encode()
    part = with_message(packet).message_part()
    assert isinstance(part, Memory) == bool(over)
    assert content(part) == packet


@given(st.lists(st.sampled_from([1, 100, 20_000, SPOOL_ABOVE, 65_535]), max_size=12))
def test_nothing_is_lost_or_reordered_on_the_way_to_memory(sizes: list[int]) -> None:
    packets = [commands.Body(bytes([n]) * size).encode() for n, size in enumerate(sizes)]
    transcript = transcript_of_nothing()
    for count, packet in enumerate(packets, 1):
        transcript.append(packet)
        wanted = b"".join(packets[:count])
        assert transcript.size == len(wanted)
        assert content(transcript.message_part()) == wanted
    assert content(transcript.message_part(complete=True)) == b"".join(packets)


def test_memory_is_sealed_when_the_message_is_complete_and_not_before() -> None:
    transcript = with_message(commands.Body(b"x" * SPOOL_ABOVE))
    part = transcript.message_part()
    assert isinstance(part, Memory)
    assert fcntl.fcntl(part.fd, fcntl.F_GET_SEALS) == 0
    transcript.append(commands.Eom().encode())
    assert transcript.message_part(complete=True) is part
    with pytest.raises(PermissionError):
        os.write(part.fd, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(part.fd, 0)


def test_memory_is_freed_with_the_message() -> None:
    before = descriptors()
    transcript = with_message(commands.Body(b"x" * SPOOL_ABOVE))
    assert descriptors() == before + 1
    transcript.clear_message()
    assert descriptors() == before
    assert transcript.size == 0


def test_memory_that_a_job_has_lives_as_long_as_the_job() -> None:
    before = descriptors()
    packet = commands.Body(b"x" * SPOOL_ABOVE).encode()
    transcript = with_message(packet)
    part = transcript.message_part()
    transcript.clear_message()
    transcript.append(commands.Body(b"other" * SPOOL_ABOVE).encode())
    assert content(part) == packet
    del part, transcript
    assert descriptors() == before


@pytest.mark.parametrize("name", ["i", "{i}"])
def test_the_queue_id_is_the_latest_of_the_message(name: str) -> None:
    transcript = with_message(macros("M", **{name: "old"}), macros("T", x="y"))
    assert (transcript.queue_id, transcript.about) == ("old", "qid=old")
    transcript.append(macros("E", **{name: "new"}))
    assert (transcript.queue_id, transcript.about) == ("new", "qid=new")
    transcript.clear_message()
    assert (transcript.queue_id, transcript.about) == ("", "message without queue id")


@pytest.mark.parametrize("name", ["v", "{v}"])
def test_the_mta_tells_its_name_with_the_client(name: str) -> None:
    transcript = transcript_of_nothing()
    assert transcript.mta() == ""
    transcript.store(macros("C", j="mx", **{name: "Postfix 3.9.0"}))
    assert transcript.mta() == "Postfix 3.9.0"
