"""Sending at once over a real socket pair: nothing is overtaken, lost or sent twice."""

from __future__ import annotations

import socket
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.abstract import FileDescriptor
from twisted.internet.testing import StringTransport
from twisted.protocols.amp import AmpBox

from sharded_milter.ipc.sending import QuickBoxes, send_now


class Reactor:
    """Notes who wants to write in the next turn."""

    def __init__(self) -> None:
        self.writers: list[FileDescriptor] = []

    def addWriter(self, writer: FileDescriptor) -> None:
        if writer not in self.writers:
            self.writers.append(writer)

    def removeWriter(self, writer: FileDescriptor) -> None:
        self.writers.remove(writer)


class Socket(FileDescriptor):
    """A transport over one end of a socket pair."""

    def __init__(self, reactor: Any, sock: socket.socket) -> None:
        super().__init__(reactor)
        self.sock = sock
        self.connected = 1
        self.calls = 0

    def writeSomeData(self, data: bytes) -> int | Exception:
        self.calls += 1
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            return error


def pair() -> tuple[Reactor, Socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    reactor = Reactor()
    return reactor, Socket(reactor, ours), theirs


def test_what_the_socket_takes_has_left_and_the_reactor_is_not_asked() -> None:
    reactor, transport, peer = pair()
    with transport.sock, peer:
        send_now(transport, b"now")
        assert peer.recv(10) == b"now"
        assert (reactor.writers, transport.calls) == ([], 1)


def test_what_the_socket_does_not_take_leaves_later_and_nothing_overtakes_it() -> None:
    reactor, transport, peer = pair()
    with transport.sock, peer:
        large = bytes(range(256)) * 20_000
        send_now(transport, large)
        send_now(transport, b"behind")
        assert reactor.writers == [transport]
        received = b""
        while len(received) < len(large) + 6:
            transport.doWrite()  # type: ignore[no-untyped-call]
            received += peer.recv(1 << 20)
        assert received == large + b"behind"


def test_a_lost_connection_is_the_reactors_to_find() -> None:
    reactor, transport, peer = pair()
    with transport.sock:
        peer.close()
        send_now(transport, b"to nobody")
        assert reactor.writers == [transport]


def test_a_transport_that_is_closing_or_closed_gets_nothing_past_the_reactor() -> None:
    _, transport, peer = pair()
    with transport.sock, peer:
        transport.disconnecting = True
        send_now(transport, b"late")
        transport.disconnecting, transport.connected = False, 0
        send_now(transport, b"later")
        assert transport.calls == 0


def test_other_transports_are_written_to_as_always() -> None:
    transport = StringTransport()
    send_now(transport, b"data")
    assert transport.value() == b"data"


class Reader(QuickBoxes):
    """Keeps the boxes that it is sent."""

    def __init__(self) -> None:
        self.boxes: list[AmpBox] = []
        self.transport = self
        self.lost = False

    def ampBoxReceived(self, box: AmpBox) -> None:
        self.boxes.append(box)

    def loseConnection(self) -> None:
        self.lost = True


KEYS = st.binary(min_size=1, max_size=255)
BOXES = st.lists(st.dictionaries(KEYS, st.binary(max_size=70), min_size=1, max_size=4), max_size=4)


@given(BOXES, st.lists(st.integers(0, 400)))
def test_boxes_are_read_as_amp_writes_them_in_whatever_pieces(
    boxes: list[dict[bytes, bytes]], cuts: list[int]
) -> None:
    data = b"".join(AmpBox(box).serialize() for box in boxes)
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reader = Reader()
    for start, end in pairwise(places):
        reader.dataReceived(data[start:end])
    assert reader.boxes == boxes
    assert not reader.lost


def test_the_longest_value_is_read() -> None:
    box = AmpBox({b"k": b"x" * 0xFFFF})
    reader = Reader()
    reader.dataReceived(box.serialize())
    assert reader.boxes == [box]


@pytest.mark.parametrize("data", [b"\x01\x00" + b"x" * 256, b"GET / HTTP/1.1\r\n"])
def test_who_sends_something_else_is_not_listened_to(data: bytes) -> None:
    reader = Reader()
    reader.dataReceived(AmpBox({b"k": b"v"}).serialize() + data)
    assert len(reader.boxes) == 1
    assert reader.lost
