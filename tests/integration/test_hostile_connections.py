"""Connections that never become a conversation end; no other one notices, memory stays flat."""

import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .daemon import Daemon
from .mails import GOOD, write_milter
from .milter_client import OFFER, MilterClient, packet

pytestmark = pytest.mark.integration

#: Long enough for a slow machine to run a whole conversation between two of its own commands.
IDLE_TIMEOUT = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "milter.sock"


@pytest.fixture(scope="module")
def daemon(path: Path) -> Iterator[Daemon]:
    write_milter(path.parent, "good.py", GOOD)
    options = ["--workers", "1", "--listen", f"unix:{path}", "--idle-timeout", str(IDLE_TIMEOUT)]
    with Daemon(*options, "./good.py:milter", cwd=path.parent) as running:
        yield running


def assert_served(path: Path, subject: bytes) -> None:
    with MilterClient(path) as client:
        client.negotiate()
        client.assert_served(subject)


NEGOTIATE = packet(b"O", OFFER)

#: What can never become a conversation, so that waiting for more of it is of no use.
HOPELESS = {
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an SMTP greeting": b"EHLO client.example.test\r\n",
    "2 GB announced": struct.pack("!I", 2**31) + b"B",
    "2 GB less one announced": struct.pack("!I", 2**31 - 1) + b"B" + bytes(1000),
    "4 GB announced": struct.pack("!I", 2**32 - 1),
    "an empty packet": struct.pack("!I", 0),
    "an unknown command": packet(b"\xff", b"?"),
    "a negotiation cut short": packet(b"O", b"\0\0\0\6"),
    "a body before all else": packet(b"B", b"x" * 60_000),
    "2 GB announced after the negotiation": NEGOTIATE + struct.pack("!I", 2**31) + b"B",
    "a second negotiation": NEGOTIATE + NEGOTIATE,
}


@pytest.mark.parametrize("data", HOPELESS.values(), ids=HOPELESS.keys())
def test_a_hopeless_connection_is_ended_at_once_and_no_other(
    daemon: Daemon, path: Path, data: bytes
) -> None:
    with MilterClient(path) as other, MilterClient(path) as bad:
        other.negotiate()
        begin = time.monotonic()
        bad.send(data)
        assert bad.is_closed()
        elapsed = time.monotonic() - begin
        assert elapsed < IDLE_TIMEOUT, "closed by the idle timeout, not for what it has sent"
        other.assert_served(b"undisturbed")
    assert "Traceback" not in daemon.log()


#: What may still become a conversation.
HALVES = {
    "nothing": b"",
    "half a length": b"\0\0",
    "half a negotiation": packet(b"O", bytes(12))[:-1],
    "half a HELO": NEGOTIATE + packet(b"H", bytes(1000))[:500],
}


def test_half_a_packet_is_harmless_and_ended_by_the_idle_timeout(
    daemon: Daemon, path: Path
) -> None:
    with ExitStack() as stack:
        waiting = []
        for data in [*HALVES.values()] * 5:
            client = stack.enter_context(MilterClient(path))
            client.send(data)
            if data.startswith(NEGOTIATE):
                client.read()
            waiting.append(client)
        begin = time.monotonic()
        assert_served(path, b"meanwhile")
        assert all(client.is_open() for client in waiting)
        assert all(client.is_closed() for client in waiting)
        print(f"idle timeout {IDLE_TIMEOUT} s: 20 ended after {time.monotonic() - begin:.1f} s")
    assert_served(path, b"afterwards")
    assert "Traceback" not in daemon.log()


def test_two_hundred_hostile_connections_leave_the_memory_of_the_master_flat(
    daemon: Daemon, path: Path
) -> None:
    assert_served(path, b"before")
    before = daemon.memory()
    largest = before
    for number in range(200):
        with MilterClient(path) as bad:
            bad.send(list(HOPELESS.values())[number % len(HOPELESS)])
            if number % 20 == 0:
                largest = max(largest, daemon.memory())
    with ExitStack() as stack:
        for _ in range(200):
            half = stack.enter_context(MilterClient(path))
            half.send(struct.pack("!I", 65536) + b"B" + bytes(30_000))
        assert_served(path, b"between")
        largest = max(largest, daemon.memory())
    assert_served(path, b"after")
    growth = (max(largest, daemon.memory()) - before) / 2**20
    print(
        f"master: {before / 2**20:.1f} MB, at most {growth:+.1f} MB during 400 hostile connections"
    )
    assert growth < 20
    assert "Traceback" not in daemon.log()


def test_a_client_that_leaves_in_the_middle_of_a_mail_is_forgotten(
    daemon: Daemon, path: Path
) -> None:
    for _ in range(20):
        with MilterClient(path) as client:
            client.negotiate()
            client.send(
                packet(b"C", b"client\x004" + struct.pack("!H", 25) + b"127.0.0.1\0") + packet(b"E")
            )
    assert_served(path, b"afterwards")
    assert "Traceback" not in daemon.log()
