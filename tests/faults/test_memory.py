"""What MTAs leave behind in the master: nothing, and before that no more than the limit."""

import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.testing.mta import Mail

from .flow import mail, subject, word
from .server import Server, until
from .wire import beginning, end, opened, read, say, scanned, verdict

pytestmark = pytest.mark.integration

MB = 1_000_000

LARGE_ANSWERS = """
    import time
    from sharded_milter import Accept, Milter, ReplaceBody
    milter = Milter("large")

    @milter.eom
    def eom(message):
        print("scans", message.headers["Subject"], flush=True)
        large = message.headers["Subject"].startswith("large")
        return Accept(*[ReplaceBody(b"y" * 5_000_000)] * large)
"""


def in_flight(server: Server) -> int:
    """The bytes that the master counts now."""
    lines = re.compile(r"(\d+) bytes in flight; ")
    before = len(lines.findall(server.log()))
    server.signal(signal.SIGUSR2)
    until(lambda: len(lines.findall(server.log())) > before, "the counters are logged")
    return int(lines.findall(server.log())[-1])


def memory_files(server: Server) -> int:
    """The bytes of the anonymous memory that the master has open."""
    size, folder = 0, f"/proc/{server.pid}/fd"
    for name in os.listdir(folder):
        try:
            if "memfd:" in os.readlink(f"{folder}/{name}"):
                size += os.stat(f"{folder}/{name}").st_size
        except FileNotFoundError:
            pass
    return size


def held(server: Server) -> int:
    """What the master holds itself, beside what it shares with every Python program."""
    memory = psutil.Process(server.pid).memory_info()
    return int(memory.rss - memory.shared) + memory_files(server)


def leave_by(*packets: Packet) -> Callable[[socket.socket], None]:
    return lambda sock: say(sock, packets)


def reset(sock: socket.socket) -> None:
    sock.close()


LEAVE = {
    "close": reset,
    "abort": leave_by(commands.Abort()),
    "quit": leave_by(commands.Quit()),
    "quit-nc": leave_by(commands.QuitNc()),
}

STAGES: dict[str, Callable[[Mail], list[Packet]]] = {
    "in the body": lambda message: [*beginning(message), *end(message)[:-1]],
    "waiting": lambda message: [*beginning(message), *end(message)],
}


@pytest.mark.parametrize("how", LEAVE)
@pytest.mark.parametrize("stage", STAGES)
def test_whoever_leaves_leaves_no_memory_behind(tmp_path: Path, how: str, stage: str) -> None:
    with Server(tmp_path, workers=1) as server:
        busy = scanned(server, "sleep30")
        before = server.descriptors()
        socks = []
        for _ in range(10):
            message = mail(size=5 * MB)
            socks.append(opened(server))
            say(socks[-1], STAGES[stage](message))
        until(lambda: memory_files(server) > 49 * MB, "all is kept")
        assert 49 * MB < in_flight(server) < 51 * MB
        for sock in socks:
            LEAVE[how](sock)
        until(lambda: memory_files(server) == 0, "all is let go")
        for sock in (busy, *socks):
            sock.close()
        until(lambda: server.descriptors() < before, "the connections are closed")
        # The scan runs on, though nobody waits for it.
        assert in_flight(server) < 10_000
        assert server.unforeseen() == [], server.log()


@pytest.mark.parametrize("how", LEAVE)
def test_a_message_counts_until_its_scan_ends_though_its_mta_has_left(
    tmp_path: Path, how: str
) -> None:
    with Server(tmp_path, workers=1) as server:
        sock, message = opened(server), mail("sleep3", size=5 * MB)
        say(sock, [*beginning(message), *end(message)])
        until(lambda: server.scans(subject(message)) == 1, "the scan runs")
        LEAVE[how](sock)
        until(lambda: memory_files(server) == 0, "the master has let go")
        assert in_flight(server) >= 5 * MB
        with server.client() as client:
            assert word(client.deliver(mail())) == "accept"
        until(lambda: in_flight(server) == 0, "the worker has let go")


def test_answers_that_are_not_read_are_bounded_and_their_mtas_aborted(tmp_path: Path) -> None:
    options = "--idle-timeout", "3", "--max-inflight-bytes", str(20 * MB)
    with Server(tmp_path, *options, source=LARGE_ANSWERS) as server:
        before, descriptors = held(server), server.descriptors()
        socks = []
        for _ in range(20):
            message = mail("large")
            socks.append(opened(server))
            say(socks[-1], [*beginning(message), *end(message)])
            until(lambda m=message: server.scans(subject(m)) == 1, "the scan runs")  # type: ignore[misc]
        assert in_flight(server) <= 20 * MB
        # One answer more is in the making.
        assert held(server) - before < 35 * MB  # the buffer for what arrives included
        assert server.counters()["refused_no_room"] >= 10
        until(lambda: server.descriptors() <= descriptors, "the MTAs are aborted")
        assert in_flight(server) == 0
        with server.client() as client:
            assert word(client.deliver(mail())) == "accept"
        assert server.unforeseen() == [], server.log()


def test_half_packets_are_bounded_and_all_messages_come_to_an_end(tmp_path: Path) -> None:
    limit = 10 * MB
    with Server(tmp_path, "--max-inflight-bytes", str(limit)) as server:
        before, chunk = held(server), commands.Body(b"x" * 65_000).encode()
        socks = []
        for _ in range(400):
            socks.append(opened(server))
            say(socks[-1], beginning(mail("none")))
            socks[-1].sendall(chunk[:60_000])
        until(lambda: in_flight(server) > 0.9 * limit, "as much as may be is held")
        assert in_flight(server) < 1.1 * limit
        assert held(server) - before < 1.1 * limit + 400 * 6_000  # idle connections are no mail
        for sock in socks:
            sock.sendall(chunk[60_000:])
            say(sock, [commands.Eom()])
        verdicts = [verdict(sock) for sock in socks]
        words = {v.text[:3] if isinstance(v, replies.ReplyCode) else type(v) for v in verdicts}
        assert words == {"452", replies.Accept}
        assert in_flight(server) == 0
        assert server.unforeseen() == [], server.log()


@pytest.mark.parametrize(
    "packet",
    [
        commands.Helo("x" * 60_000),
        commands.Macro("H", (("{x}", "y" * 60_000),)),
        commands.Macro("C", (("{x}", "y" * 60_000),)),
        commands.Unknown("x" * 60_000),
    ],
    ids=lambda packet: type(packet).__name__,
)
def test_what_no_mta_says_ends_its_connection_with_one_line(tmp_path: Path, packet: Packet) -> None:
    with Server(tmp_path) as server:
        sock = opened(server)
        sock.sendall(packet.encode()[:5_000])
        assert read(sock) == b""
        [line] = [each for each in server.log().splitlines() if "is longer than" in each]
        assert type(packet).__name__ in line
        with server.client() as client:
            assert word(client.deliver(mail())) == "accept"
        assert server.unforeseen() == [], server.log()
