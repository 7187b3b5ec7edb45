"""Sending and reading at once over real socket pairs: nothing is overtaken, lost or waited for."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.testing import StringTransport

from sharded_milter.ipc.sockets import has_sent_all, read_now, send_now


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


def test_a_transport_is_still_while_nothing_waits_in_it() -> None:
    _, transport, peer = pair()
    with transport.sock, peer:
        assert has_sent_all(transport)
        transport.write(b"in the next turn")
        assert not has_sent_all(transport)
        transport.doWrite()  # type: ignore[no-untyped-call]
        assert has_sent_all(transport)
    assert not has_sent_all(None)


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


class Reader:
    """Takes one byte a read from one end of a socket pair, and its end as Twisted's readers do."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.taken = b""
        self.reads = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    def doRead(self) -> object:
        self.reads += 1
        byte = self.sock.recv(1)
        self.taken += byte
        return None if byte else CONNECTION_DONE


def test_what_has_arrived_is_read_at_once_and_what_has_not_is_not_waited_for() -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    readers = [Reader(ours) for ours, _ in pairs]
    pairs[0][1].sendall(b"abc")
    pairs[2][1].sendall(b"d")
    read_now(readers, 9)
    assert [reader.taken for reader in readers] == [b"abc", b"", b"d"]
    assert [reader.reads for reader in readers] == [3, 0, 1]
    close(pairs)


def test_who_sends_without_an_end_is_read_so_often_only() -> None:
    pairs = [socket.socketpair()]
    reader = Reader(pairs[0][0])
    pairs[0][1].sendall(b"abcdef")
    read_now([reader], 4)
    assert reader.taken == b"abcd"
    close(pairs)


def test_behind_the_end_nothing_is_read_but_others_are() -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    readers = [Reader(ours) for ours, _ in pairs]
    pairs[0][1].sendall(b"a")
    pairs[0][1].close()
    pairs[1][1].sendall(b"bcd")
    read_now(readers, 9)
    assert [(reader.taken, reader.reads) for reader in readers] == [(b"a", 2), (b"bcd", 3)]
    close(pairs)


def test_a_reader_that_is_held_is_not_read_on() -> None:
    pairs = [socket.socketpair()]
    reader = Reader(pairs[0][0])
    pairs[0][1].sendall(b"abcdef")
    read_now([reader], 9, lambda: reader.taken == b"ab")
    assert reader.taken == b"ab"
    close(pairs)


def close(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    for pair in pairs:
        for end in pair:
            end.close()
