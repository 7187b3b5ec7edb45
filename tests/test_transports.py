"""Transports over real sockets: what is read, written and lost, and when a connection ends."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from sharded_milter.closing import CLOSING
from sharded_milter.transports import PassingTransport, UnixTransport, adopt


class Reactor(Clock):
    """Knows who wants to read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def addWriter(self, writer: Any) -> None:
        self.writers.add(writer)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)


class Recorder(Protocol):
    """Keeps what it is given; `then` is called with each piece of data."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.buffer = bytearray(100)
        self.size = 0
        self.then: Callable[[], object] = lambda: None

    def dataReceived(self, data: bytes) -> None:
        self.given.append(data)
        self.then()

    def fill(self, receive: Callable[[memoryview], int]) -> int:
        with memoryview(self.buffer) as view:
            self.size = receive(view)
        return self.size

    def filled(self) -> None:
        self.dataReceived(bytes(self.buffer[: self.size]))

    def fileDescriptorReceived(self, descriptor: int) -> None:
        self.given.append(os.fstat(descriptor).st_ino)
        os.close(descriptor)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.given.append("lost")


class Ends:
    """Both ends of a socket pair; ours has a transport."""

    def __init__(self, kind: type[Any]) -> None:
        self.reactor = Reactor()
        self.protocol = Recorder()
        ours, self.theirs = socket.socketpair()
        ours.setblocking(False)
        self.transport = kind(ours, self.protocol, "", None, 0, self.reactor)
        self.protocol.makeConnection(self.transport)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.theirs.close()
        if self.transport.connected:
            self.transport.connectionLost(Failure(CONNECTION_DONE))


@pytest.fixture(params=[UnixTransport, PassingTransport])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    ends = Ends(request.param)
    yield ends
    ends.close()


@pytest.fixture
def passing() -> Iterator[Ends]:
    ends = Ends(PassingTransport)
    yield ends
    ends.close()


@pytest.fixture
def plain() -> Iterator[Ends]:
    ends = Ends(UnixTransport)
    yield ends
    ends.close()


def test_what_arrives_is_passed_on(ends: Ends) -> None:
    ends.theirs.send(b"abc")
    assert ends.transport.doRead() is None
    assert ends.transport.doRead() is None  # nothing is there
    assert ends.protocol.given == [b"abc"]


def test_the_end_of_the_stream_ends_the_connection(ends: Ends) -> None:
    ends.theirs.close()
    assert ends.transport.doRead() is CONNECTION_DONE


def test_a_socket_that_fails_has_lost_the_connection(ends: Ends) -> None:
    ends.transport.socket.close()
    assert ends.transport.doRead() is CONNECTION_LOST
    assert ends.transport.writeSomeData(b"x") is CONNECTION_LOST
    ends.transport.connected = False


def test_what_the_socket_takes_is_written(ends: Ends) -> None:
    assert ends.transport.writeSomeData(b"abc") == 3
    assert ends.theirs.recv(10) == b"abc"
    while ends.transport.writeSomeData(bytes(65_536)):
        pass  # until it is full


def test_the_kernel_closes_descriptors_where_none_are_expected(plain: Ends) -> None:
    read, write = os.pipe()
    socket.send_fds(plain.theirs, [b"x"], [write])
    os.close(write)
    assert plain.transport.doRead() is None
    assert plain.protocol.given == [b"x"]
    assert os.read(read, 1) == b""  # no other process has its end
    os.close(read)


def test_descriptors_come_before_the_bytes_beside_them(passing: Ends) -> None:
    with open(os.devnull) as file:
        socket.send_fds(passing.theirs, [b"x"], [file.fileno(), file.fileno()])
        passing.transport.doRead()
        inode = os.fstat(file.fileno()).st_ino
    assert passing.protocol.given == [inode, inode, b"x"]
    assert passing.transport.descriptors_lost == 0


def test_where_the_protocol_fails_no_descriptor_of_the_read_stays_open(
    passing: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        os.close(descriptor)
        raise ValueError("a defect")

    monkeypatch.setattr(passing.protocol, "fileDescriptorReceived", fail)
    read, write = os.pipe()
    socket.send_fds(passing.theirs, [b"x"], [write] * 9)
    os.close(write)
    with pytest.raises(ValueError, match="a defect"):
        passing.transport.doRead()
    assert os.read(read, 1) == b""  # nothing else has its other end
    os.close(read)


def test_descriptors_leave_with_the_first_bytes(passing: Ends) -> None:
    with open(os.devnull) as file:
        passing.transport.sendFileDescriptor(file.fileno())
        assert passing.transport.writeSomeData(b"xy") == 2
        data, descriptors, *_ = socket.recv_fds(passing.theirs, 1, 4)
        assert (data, [os.fstat(fd).st_ino for fd in descriptors]) == (
            b"x",
            [os.fstat(file.fileno()).st_ino],
        )
    for fd in descriptors:
        os.close(fd)


class Refusing:
    """A socket of a user who has too many descriptors on their way."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendmsg(self, *arguments: Any) -> int:
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))


def test_descriptors_that_the_system_does_not_pass_are_an_error_and_no_end(passing: Ends) -> None:
    passing.transport.socket = Refusing(passing.transport.socket)
    passing.transport.sendFileDescriptor(0)
    with pytest.raises(OSError, match="Too many references"):
        passing.transport.writeSomeData(b"with it")
    assert passing.transport.writeSomeData(b"without") == 7
    assert passing.theirs.recv(99) == b"without"


def test_bytes_that_waited_leave_without_descriptors_that_are_not_passed(passing: Ends) -> None:
    passing.transport.socket = Refusing(passing.transport.socket)
    passing.transport.sendFileDescriptor(0)
    passing.transport.write(b"a box")
    assert passing.transport.doWrite() is None
    assert passing.theirs.recv(99) == b"a box"
    assert passing.transport.connected


def test_what_an_end_had_sent_before_it_was_closed_is_read_though_it_is_written_to(
    passing: Ends,
) -> None:
    passing.theirs.send(b"answer")
    passing.theirs.close()
    assert passing.transport.writeSomeData(b"question") == 8
    passing.transport.sendFileDescriptor(0)
    passing.transport.write(b"another")
    assert passing.transport.doWrite() is None
    assert passing.transport.doRead() is None
    assert passing.protocol.given == [b"answer"]
    assert passing.transport.doRead() is CONNECTION_DONE


def test_a_full_socket_takes_no_descriptors(passing: Ends) -> None:
    while passing.transport.writeSomeData(bytes(65_536)):
        pass
    passing.transport.sendFileDescriptor(0)
    assert passing.transport.writeSomeData(b"x") == 0
    assert passing.transport._sendmsgQueue == [0]


def test_reads_with_which_the_kernel_drops_descriptors_are_counted(passing: Ends) -> None:
    socket.send_fds(passing.theirs, [b"x"], [0])
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        passing.transport.doRead()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    passing.theirs.send(b"y")
    passing.transport.doRead()
    assert (passing.protocol.given, passing.transport.descriptors_lost) == ([b"x", b"y"], 1)


def test_a_protocol_that_closes_where_all_is_written_ends_at_once(plain: Ends) -> None:
    plain.protocol.then = plain.transport.loseConnection
    plain.theirs.send(b"x")
    assert plain.transport.doRead() is CONNECTION_DONE
    assert plain.transport.disconnecting
    assert plain.reactor.writers == set()


def test_what_waits_to_be_written_leaves_before_the_end(plain: Ends) -> None:
    def answer_and_close() -> None:
        plain.transport.write(b"answer")
        plain.transport.loseConnection()

    plain.protocol.then = answer_and_close
    plain.theirs.send(b"x")
    assert plain.transport.doRead() is None
    assert plain.transport.doWrite() is CONNECTION_DONE
    assert plain.theirs.recv(10) == b"answer"


def test_one_with_a_producer_waits_for_that(plain: Ends) -> None:
    class Producer:
        def resumeProducing(self) -> None:
            """It has something left."""

        def stopProducing(self) -> None:
            """It ends."""

    plain.transport.registerProducer(Producer(), False)
    plain.protocol.then = plain.transport.loseConnection
    plain.theirs.send(b"x")
    assert plain.transport.doRead() is None
    assert plain.transport.disconnecting


def test_outside_of_a_read_the_end_comes_with_the_next_write(plain: Ends) -> None:
    plain.transport.loseConnection()
    assert plain.transport in plain.reactor.writers
    assert plain.transport.doWrite() is CONNECTION_DONE


def test_its_socket_is_closed_by_the_thread_that_may_wait(
    passing: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors that were never read are closed with it."""
    left: list[int] = []
    monkeypatch.setattr(CLOSING, "close", left.append)
    fd = passing.transport.fileno()
    passing.transport.connectionLost(Failure(CONNECTION_DONE))
    assert left == [fd]
    assert passing.theirs.recv(1) == b""  # it is shut down at once
    os.close(fd)


def test_what_the_protocol_raises_is_the_reactors(plain: Ends) -> None:
    def fail() -> None:
        raise ValueError("a defect")

    plain.protocol.then = fail
    plain.theirs.send(b"x")
    with pytest.raises(ValueError, match="a defect"):
        plain.transport.doRead()
    plain.transport.loseConnection()
    assert plain.transport in plain.reactor.writers  # no read is under way any more


@pytest.mark.parametrize(
    ("family", "host", "address"),
    [
        (socket.AF_INET, "127.0.0.1", IPv4Address),
        (socket.AF_INET6, "::1", IPv6Address),
        (socket.AF_UNIX, "", UNIXAddress),
    ],
)
def test_an_accepted_connection_knows_its_peer(
    family: int, host: str, address: type[Any], tmp_path: Any
) -> None:
    name = str(tmp_path / "s") if family == socket.AF_UNIX else (host, 0)
    protocol, reactor = Recorder(), Reactor()
    factory: Any = Factory.forProtocol(lambda: protocol)
    with socket.socket(family) as listening, socket.socket(family) as client:
        listening.bind(name)
        listening.listen()
        client.connect(listening.getsockname())
        adopt(*listening.accept(), factory, reactor)
        transport: Any = protocol.transport
        assert isinstance(transport.getPeer(), address)
        assert isinstance(transport.getHost(), address)
        assert not transport.socket.getblocking()
        client.send(b"x")
        transport.doRead()
        transport.connectionLost(Failure(CONNECTION_DONE))
    assert protocol.given == [b"x", "lost"]
    assert "Recorder" in repr(transport)
