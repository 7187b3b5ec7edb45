"""Packets that are cut short, and those that no MTA sends."""

from __future__ import annotations

import pytest

from sharded_milter.errors import LocalProtocolError, RemoteProtocolError
from sharded_milter.protocol.commands import LONGEST, Body, Helo, Mail, Rcpt, check_length
from sharded_milter.protocol.negotiation import NO_REPLY_ALL
from sharded_milter.protocol.replies import Continue
from sharded_milter.protocol.session import Session, State
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.wire import MAX_PACKET, Framer

from .strategies import agreement, session_in


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


class Stream:
    """Bytes that are received in pieces."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def receive(self, room: memoryview, most: int) -> int:
        """Write the next `most` bytes, as a socket does."""
        piece, self.data = self.data[:most], self.data[most:]
        room[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize(
    ("longest", "size"),
    [
        (20, 1),
        (20, 7),
        (65_535, 1_000),
        (65_535, 65_535),
        (65_535, 262_144),
        (1_048_575, 10_000),
        (1_048_575, 131_071),
        (1_048_575, 262_144),
    ],
)
def test_packets_are_the_same_in_the_buffer_that_framers_share(longest: int, size: int) -> None:
    lengths = (5, longest, 0, longest // 2, 300, longest, 7)
    sent = [Body(bytes([at]) * length).encode() for at, length in enumerate(lengths)]
    stream, framer, other = Stream(b"".join(sent)), Framer(), Framer()
    found: list[bytes] = []
    while framer.fill(lambda room: stream.receive(room, min(size, len(room)))):
        found += iter(framer.next, b"")
        framer.compact()
        other.fill(lambda room: Stream(b"another's").receive(room, len(room)))
        other.compact()
    assert (found, framer.waiting) == (sent, 0)


def test_a_truncated_packet_is_dropped_from_the_shared_buffer_too() -> None:
    framer, long, after = Framer(), Body(b"x" * 1_000).encode(), Mail("<a>").encode()
    stream = Stream(Mail("<b>").encode() + long + after)
    framer.fill(lambda room: stream.receive(room, 400))
    assert framer.next() == Mail("<b>").encode()
    framer.truncate(Body(b"").encode())
    assert framer.next() == Body(b"").encode()
    while framer.fill(lambda room: stream.receive(room, 300)):
        framer.compact()
    assert (framer.next(), framer.next()) == (after, b"")


def test_what_cannot_be_received_changes_nothing() -> None:
    framer = Framer()
    framer.feed(b"\0\0\0\1")

    def fail(room: memoryview) -> int:
        room[:1] = b"x"
        raise BlockingIOError

    with pytest.raises(BlockingIOError):
        framer.fill(fail)
    assert framer.fill(lambda room: 0) == 0
    framer.feed(b"A")
    assert framer.next() == b"\0\0\0\1A"


@pytest.mark.parametrize("letter", LONGEST)
def test_what_is_no_content_has_its_longest_packet(letter: int) -> None:
    check_length(letter, LONGEST[letter])
    with pytest.raises(RemoteProtocolError, match="is longer than"):
        check_length(letter, LONGEST[letter] + 1)


def test_content_may_be_as_long_as_any_packet() -> None:
    check_length(Body.letter[0], MAX_PACKET)
    assert Helo.letter[0] in LONGEST


def test_a_packet_that_is_longer_than_any_mtas_is_an_error_and_no_part_of_a_run() -> None:
    good, long = Rcpt("<a>").encode(), Rcpt("a" * LONGEST[Rcpt.letter[0]]).encode()
    session = session_in(State.RCPT, agreement(NO_REPLY_ALL))
    run = bytearray(good + long)
    assert session.receive_run(run, 0, len(run)) == (len(good), [good])
    with pytest.raises(RemoteProtocolError, match="is longer than"):
        session.receive(long)
    assert session.state is State.RCPT


def test_nothing_is_decided_before_options_are_agreed() -> None:
    with pytest.raises(LocalProtocolError, match="nothing is negotiated"):
        Session().decide(Stage.MAIL, Continue().encode())


def test_packets_are_seen_ahead_of_their_turn_and_stay() -> None:
    framer, packets = Framer(), [Mail("<a>").encode(), Body(b"x").encode()]
    whole = b"".join(packets)
    framer.feed(whole + packets[0][:-1])
    ends = [(ord("M"), len(packets[0])), (ord("B"), len(whole))]
    assert list(framer.peek(0)) == ends
    assert list(framer.peek(len(packets[0]))) == ends[1:]
    assert list(framer.peek(len(whole) + len(packets[0]) - 3)) == []  # two bytes of a length
    assert framer.next() == packets[0]


@pytest.mark.parametrize("rest", [b"\0\0\0\0", b"\0\0\0\0M", b"\xff\xff\xff\xffM"])
def test_a_length_that_no_packet_has_is_seen_ahead_too(rest: bytes) -> None:
    framer = Framer()
    framer.feed(Body(b"x").encode() + rest)
    ahead = framer.peek(0)
    assert next(ahead) == (ord("B"), 6)
    with pytest.raises(RemoteProtocolError):
        next(ahead)
