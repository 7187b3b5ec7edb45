"""Which connections are served, and how the others hear that they are not."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from one_mta import CLIENT, HELO, MESSAGE, OFFER, OLD_OFFER, QUIT, Transport, packed
from twisted.internet.address import IPv6Address, UNIXAddress
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from sharded_milter.context import ServerContext
from sharded_milter.descriptors import MAX_REFUSED, Shares
from sharded_milter.dispatch.policy import BUSY, NOT_ALLOWED, Policy
from sharded_milter.limits import Limits
from sharded_milter.mta.connection import CLOSE_GRACE, MilterConnection
from sharded_milter.mta.gate import NEGOTIATED_GRACE, RECHECK_DELAY, SILENT_GRACE, Admission
from sharded_milter.mta.members import Member
from sharded_milter.mta.peers import ALL_PEERS, parse_peers
from sharded_milter.protocol.replies import ReplyCode, parse_reply
from sharded_milter.protocol.wire import packets

SHARES = Shares(1, 100)


class Peer(Transport):
    """A transport with an address, or a UNIX socket, and a descriptor's number."""

    def __init__(self, address: Any = None, number: int = 5) -> None:
        super().__init__()
        self._address = address
        self._number = number
        self._sock = socket.socketpair()

    def getPeer(self) -> Any:
        return self._address or UNIXAddress(None)

    def getHandle(self) -> socket.socket:
        return self._sock[0]

    def fileno(self) -> int:
        return self._number

    def close(self) -> None:
        for sock in self._sock:
            sock.close()


class House(ServerContext):
    """Connections come to it."""

    members: tuple[Member, ...] = ()

    reactor: Any  # a Clock, which the tests advance

    def __init__(
        self, peers: str = "", shares: Shares | None = None, max_connections: int = 100
    ) -> None:
        admission = Admission(parse_peers(peers) if peers else ALL_PEERS, shares)
        limits = Limits(max_connections=max_connections)
        super().__init__(limits, Policy(), Clock(), Counter(), admission=admission)
        self._peers: list[Peer] = []

    def connect(self, peer: Peer | None = None) -> tuple[MilterConnection, Peer]:
        connection, peer = MilterConnection(self), peer or Peer()
        self._peers.append(peer)
        connection.makeConnection(peer)  # type: ignore[no-untyped-call]
        return connection, peer

    def close(self) -> None:
        self.gate.reserved.release()
        for peer in self._peers:
            peer.close()


@pytest.fixture
def house() -> Iterator[House]:
    house = House(shares=SHARES, max_connections=1)
    yield house
    house.close()


def split(answers: bytes) -> list[bytes]:
    """The packets, each with its length."""
    ends = [end for _, _, end in packets(answers)]
    return [answers[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def full(house: House) -> None:
    house.connect()


@pytest.mark.parametrize("offer", [OFFER, OLD_OFFER], ids=["new", "old"])
def test_a_refused_connection_gets_451_at_its_first_question(house: House, offer: Any) -> None:
    full(house)
    connection, peer = house.connect()
    connection.dataReceived(packed(offer))
    assert not connection.refusal_sent
    connection.dataReceived(packed(CLIENT))
    answers = b"".join(peer.writes)
    assert answers.endswith(BUSY)
    assert len(list(packets(answers))) == 2
    assert connection.refusal_sent
    reply = parse_reply(BUSY)
    assert isinstance(reply, ReplyCode)
    assert reply.text.startswith("451 4.3.2 ")
    connection.dataReceived(packed(QUIT))
    assert peer.disconnecting
    connection.connectionLost()
    assert len(house.connections) == 1


def test_its_later_questions_get_the_same_reply(house: House) -> None:
    full(house)
    connection, peer = house.connect()
    connection.dataReceived(packed(OLD_OFFER, CLIENT, HELO, *MESSAGE))
    answers = [packet[4:] for packet in split(b"".join(peer.writes))][1:]
    assert len(answers) > 4
    assert set(answers) == {BUSY[4:]}


def test_its_packets_are_not_stored(house: House) -> None:
    full(house)
    connection, _ = house.connect()
    connection.dataReceived(packed(OFFER, CLIENT, HELO, *MESSAGE[:-1]))
    assert house.inflight.used == 0


def test_its_mistakes_are_not_logged_each_time(house: House) -> None:
    full(house)
    with capturedLogs() as events:
        for _ in range(3):
            connection, peer = house.connect()
            connection.dataReceived(b"GET / HTTP/1.1\r\n\r\n")
            assert peer.disconnecting
    assert len(events) == 1


def test_a_refused_connection_that_sends_nothing_is_closed(house: House) -> None:
    full(house)
    _, peer = house.connect()
    house.reactor.advance(CLOSE_GRACE)
    assert peer.aborted


def test_it_gets_its_reply_too_when_the_service_stops(house: House) -> None:
    full(house)
    connection, peer = house.connect()
    connection.finish()
    assert peer.disconnecting


@pytest.mark.parametrize(
    ("number", "served"), [(SHARES.connections - 1, True), (SHARES.connections, False)]
)
def test_the_number_of_its_descriptor_says_whether_there_is_room(number: int, served: bool) -> None:
    house = House(shares=SHARES)
    with capturedLogs() as events:
        connection, _ = house.connect(Peer(number=number))
    assert (connection in house.gate.served) is served
    lines = [event["log_format"].format(**event) for event in events]
    assert lines == [] if served else "LimitNOFILE=" in lines[0]
    assert house.counters["overload_connections"] == (not served)
    house.close()


def test_without_a_reserved_descriptor_connections_are_refused_one_at_a_time(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.gate.reserved, "refill", lambda: False)
    connection, _ = house.connect()
    assert house.gate.served == set()
    assert house.gate.accept_delay() == RECHECK_DELAY
    connection.connectionLost()
    assert house.gate.accept_delay() == 0.0


# Those that wait for a place


def test_there_are_few_at_a_time_and_each_has_its_chance(house: House) -> None:
    full(house)
    crowd = []
    while not house.gate.accept_delay():
        crowd.append(house.connect())
    assert len(crowd) == SHARES.refused
    house.reactor.advance(SILENT_GRACE)
    assert house.gate.accept_delay() == RECHECK_DELAY
    assert all(peer.disconnecting for _, peer in crowd)
    crowd[0][0].connectionLost()  # as Twisted does in its next turn
    assert house.gate.accept_delay() == 0.0


def test_a_connection_that_has_negotiated_has_more_time(house: House) -> None:
    full(house)
    crowd = [house.connect() for _ in range(SHARES.refused)]
    crowd[0][0].dataReceived(packed(OFFER))
    house.reactor.advance(SILENT_GRACE)
    house.gate.accept_delay()
    assert [peer.disconnecting for _, peer in crowd] == [False] + [True] * (len(crowd) - 1)
    house.reactor.advance(NEGOTIATED_GRACE)
    house.gate.accept_delay()
    assert crowd[0][1].disconnecting


def test_a_refused_connection_that_has_its_reply_is_closed_at_once(house: House) -> None:
    full(house)
    crowd = [house.connect() for _ in range(SHARES.refused)]
    crowd[2][0].dataReceived(packed(OFFER, CLIENT))
    house.gate.accept_delay()
    assert [peer.disconnecting for _, peer in crowd].index(True) == 2
    assert [peer.disconnecting for _, peer in crowd].count(True) == 1


def test_one_that_does_not_read_is_cut_off(house: House) -> None:
    full(house)
    connection, peer = house.connect()
    connection.dataReceived(packed(OFFER, CLIENT))
    connection.pauseProducing()
    for _ in range(SHARES.refused):
        house.connect()
    house.gate.accept_delay()
    assert peer.aborted


def test_no_connection_is_closed_while_there_are_places(house: House) -> None:
    full(house)
    _, peer = house.connect()
    house.reactor.advance(NEGOTIATED_GRACE)
    assert house.gate.accept_delay() == 0.0
    assert not peer.disconnecting


def test_there_is_a_bound_where_descriptors_are_not_ours_to_share() -> None:
    house = House(max_connections=1)
    full(house)
    for _ in range(MAX_REFUSED):
        assert house.gate.accept_delay() == 0.0
        house.connect()
    assert house.gate.accept_delay() == RECHECK_DELAY
    house.close()


# Those that may not connect


@pytest.mark.parametrize(
    ("peers", "peer", "who"),
    [
        ("192.0.2.0/24", Peer(IPv6Address("TCP", "::ffff:192.0.2.9", 25)), ""),
        ("192.0.2.0/24", Peer(IPv6Address("TCP", "2001:db8::1", 25)), "2001:db8::1"),
        ("192.0.2.0/24", Peer(), ""),
        ("user:4294967294", Peer(), "(uid "),
        ("user:4294967294", Peer(IPv6Address("TCP", "2001:db8::1", 25)), ""),
    ],
)
def test_peers_that_are_not_named_hear_451(peers: str, peer: Peer, who: str) -> None:
    house = House(peers)
    with capturedLogs() as events:
        connection, _ = house.connect(peer)
    connection.dataReceived(packed(OFFER, CLIENT))
    lines = [event["log_format"].format(**event) for event in events]
    if who:
        assert peer.writes[-1].endswith(NOT_ALLOWED)
        assert house.counters["refused_peers"] == 1
        (line,) = lines
        assert line.startswith("refused ")
        assert line.endswith(": --allowed-peers does not include it")
        assert who in line
    else:
        assert not peer.writes[-1].endswith(NOT_ALLOWED)
        assert lines == []
    house.close()


def test_they_take_no_place_of_those_who_may() -> None:
    house = House("192.0.2.0/24", max_connections=1)
    house.connect(Peer(IPv6Address("TCP", "2001:db8::1", 25)))
    connection, _ = house.connect()
    assert connection in house.gate.served
    house.close()


def test_a_disallowed_peer_that_has_negotiated_gets_no_more_time() -> None:
    house = House("192.0.2.0/24")
    for _ in range(MAX_REFUSED):
        connection, peer = house.connect(Peer(IPv6Address("TCP", "2001:db8::1", 25)))
        connection.dataReceived(packed(OFFER))
    house.reactor.advance(SILENT_GRACE)
    house.gate.accept_delay()
    assert peer.disconnecting
    house.close()


# Memory of messages


@pytest.mark.parametrize(("memory", "is_there"), [(10_000, True), (0, False)])
def test_messages_get_memory_up_to_their_mark(
    memory: int, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shares, "memory", memory)
    house = House(shares=SHARES)
    if is_there:
        assert house.new_memory().fd < memory
    else:
        with pytest.raises(OSError, match="Too many open files"):
            house.new_memory()
    house.close()
