"""Packets that are cut short, and those that no MTA sends."""

from __future__ import annotations

import pytest

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol.commands import LONGEST, Body, Helo, Mail, check_length
from sharded_milter.protocol.wire import MAX_PACKET, Framer


@pytest.mark.parametrize("piece", [1, 7, 100, 5_000])
def test_the_rest_of_a_packet_that_was_cut_short_is_dropped_as_it_comes(piece: int) -> None:
    framer, long, after = Framer(), Body(b"x" * 1_000).encode(), Mail("<a>").encode()
    framer.feed(Mail("<b>").encode())
    framer.next()
    framer.feed(long[:400])
    assert framer.head() == (1_001, ord("B"))
    framer.truncate(Body(b"").encode())
    assert framer.next() == Body(b"").encode()
    assert framer.head() is None
    rest = long[400:] + after
    for at in range(0, len(rest), piece):
        framer.feed(rest[at : at + piece])
    assert (framer.next(), framer.next()) == (after, b"")


@pytest.mark.parametrize("letter", LONGEST)
def test_what_is_no_content_has_its_longest_packet(letter: int) -> None:
    check_length(letter, LONGEST[letter])
    with pytest.raises(RemoteProtocolError, match="is longer than"):
        check_length(letter, LONGEST[letter] + 1)


def test_content_may_be_as_long_as_any_packet() -> None:
    check_length(Body.letter[0], MAX_PACKET)
    assert Helo.letter[0] in LONGEST
