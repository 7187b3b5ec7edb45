"""Messages that kill their workers: how long they are remembered, and what identifies them."""

from __future__ import annotations

import pytest

from sharded_milter.dispatch import poison as module
from sharded_milter.dispatch.poison import (
    REMEMBERED_FOR,
    SIZE_TOLERANCE,
    Poison,
    digest,
)
from sharded_milter.protocol.commands import Body, Data, Eoh, Eom, Header, Macro, Mail, Rcpt
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import Reject

MESSAGE: list[Packet] = [
    Macro("M", (("i", "4F1"),)),
    Mail("<a@x>", ("SIZE=10",)),
    Rcpt("<b@x>"),
    Rcpt("<c@x>"),
    Reject(),
    Data(),
    Header("Subject", " hi\n\tthere"),
    Header("X", "no blank"),
    Eoh(),
    Body(b"one\r\n"),
    Eom(b"two\r\n"),
]


def packed(*packets: Packet) -> memoryview:
    return memoryview(b"".join(packet.encode() for packet in packets))


def test_one_death_may_be_the_machines_fault() -> None:
    poison = Poison()
    assert len(poison) == 0
    assert not poison.record(b"m", 10, 0.0)
    assert poison.deaths(b"m", 0.0) == 1
    assert poison.record(b"m", 10, 1.0)
    assert poison.deaths(b"m", 1.0) == 2
    assert poison.deaths(b"other", 1.0) == 0
    assert len(poison) == 1


def test_two_deaths_may_be_told_at_once() -> None:
    assert Poison().record(b"m", 10, 0.0, 2)


def test_poison_is_forgotten_an_hour_after_its_last_death() -> None:
    poison = Poison()
    poison.record(b"m", 10, 0.0)
    poison.record(b"m", 10, 100.0)
    assert poison.deaths(b"m", 100.0 + REMEMBERED_FOR - 1) == 2
    assert poison.deaths(b"m", 100.0 + REMEMBERED_FOR) == 0
    assert len(poison) == 0


def test_the_oldest_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 2)
    poison = Poison()
    for number in range(3):
        poison.record(b"%d" % number, 10, 0.0, 2)
    assert [poison.deaths(b"%d" % n, 0.0) for n in range(3)] == [0, 2, 2]


def test_only_messages_of_about_the_size_of_a_remembered_one_are_likely() -> None:
    poison = Poison()
    assert not poison.is_likely(5000, 0.0)
    poison.record(b"m", 5000, 0.0)
    poison.record(b"n", 5000, 0.0)
    poison.record(b"n", 5000, 1.0)
    likely = [size for size in range(10_000) if poison.is_likely(size, 1.0)]
    assert set(range(5000 - SIZE_TOLERANCE, 5000 + SIZE_TOLERANCE)) <= set(likely)
    assert (min(likely) > 5000 - 2 * SIZE_TOLERANCE, max(likely) < 5000 + 2 * SIZE_TOLERANCE) == (
        True,
        True,
    )
    assert poison.is_likely(5000, REMEMBERED_FOR)  # the other one is remembered yet
    assert not poison.is_likely(5000, REMEMBERED_FOR + 1.0)
    assert poison.sizes == {}


def test_a_message_is_known_by_envelope_and_content() -> None:
    known = digest(packed(*MESSAGE))
    unimportant = [Macro("M", (("i", "other"),)), *MESSAGE[1:]]
    assert digest(packed(*unimportant)) == known
    for number in (1, 2, 6, 7, 9, 10):
        assert digest(packed(*MESSAGE[:number], *MESSAGE[number + 1 :])) != known
