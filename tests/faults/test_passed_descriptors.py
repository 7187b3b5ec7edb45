"""Workers that were taken over and pass descriptors, to the master or to themselves.

The service runs as an ordinary user: limits of processes and of descriptors in flight, which are
the user's, do not bind root.
"""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from kernel import required
from ordinary import as_ordinary_user, ordinary_folder

from .flow import Background, mail, word
from .server import Server, until
from .test_lying_workers import TAKEN_OVER, evil

pytestmark = pytest.mark.integration


class Service(Server):
    """The daemon of an ordinary user, whose workers do what a message says."""

    def __init__(self, folder: Path, *options: str, workers: int = 2) -> None:
        super().__init__(folder, *options, source=TAKEN_OVER, workers=workers)
        prefix = as_ordinary_user()
        if prefix:
            self.python, self.program = prefix[0], (*prefix[1:], sys.executable, *self.program)

    def threads(self) -> int:
        return int(psutil.Process(self.pid).num_threads())


@pytest.fixture
def folder() -> Iterator[Path]:
    with ordinary_folder() as folder:
        yield folder


PIPES = "r, w = os.pipe(); send(b'\\0', *[r] * 250); time.sleep(600)"

#: The master finds the descriptors behind so much else that it reads them when the worker is gone.
PIPES_AT_THE_EXIT = """
r, w = os.pipe()
time.sleep(0.5)
sock = channel()
sock.sendall(b'\\0\\2k1\\xff\\xff' + bytes(65535) + b'\\0\\2k2\\xff\\xff' + bytes(65000))
sock.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [r] * 250))])
os._exit(1)
"""


@contextmanager
def no_threads(server: Service) -> Iterator[None]:
    """The master may start no thread and no process. Only its user and root may say so."""
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    for soft in ("1", most):
        command = [*as_ordinary_user(), "prlimit", f"--pid={server.pid}", f"--nproc={soft}:{most}"]
        subprocess.run(command, check=True)
        if soft == "1":
            yield


@pytest.mark.parametrize("at_the_exit", [False, True], ids=["at work", "at its exit"])
def test_they_are_closed_by_a_master_that_may_start_no_thread(
    folder: Path, at_the_exit: bool
) -> None:
    with Service(folder, workers=1) as server, server.client() as client:
        assert word(client.deliver(mail())) == "accept"
        before = server.descriptors()
        with no_threads(server):
            liar = Background(server, evil(PIPES_AT_THE_EXIT if at_the_exit else PIPES))
            if at_the_exit:
                time.sleep(0.3)
                server.signal(signal.SIGSTOP)
                time.sleep(0.5)
                server.signal(signal.SIGCONT)
            server.wait_log(" is gone: ")
        until(lambda: liar.done, "the message has its verdict")
        assert word(client.deliver(mail())) == "accept"
        until(lambda: server.descriptors() <= before + 1, "as many are open as before")
        assert server.unforeseen() == [], server.log()


#: As many on their way as any process of the user may have; they stay until the worker ends.
ON_THEIR_WAY = """
import errno
pairs = []
fd = os.open("/dev/null", 0)
def fill():
    pairs.append(socket.socketpair())
    ours = pairs[-1][0]
    ours.setblocking(False)
    while True:
        numbers = array.array("i", [fd] * 250)
        try:
            ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        except OSError as error:
            return error.errno
while True:
    if fill() == errno.ETOOMANYREFS:
        print("no more can be passed", flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("options", [(), ("--sandbox", "on", "--sandbox-allow", "network")])
def test_who_has_too_many_on_their_way_costs_no_other_worker(
    folder: Path, options: tuple[str, ...]
) -> None:
    if options:
        required()
    with Service(folder, *options) as server, server.client() as client:
        assert word(client.deliver(mail("large"))) == "accept"
        Background(server, evil(ON_THEIR_WAY))
        server.wait_log("no more can be passed")
        for _ in range(3):
            assert word(client.deliver(mail("large"))) == "451"
            assert word(client.deliver(mail())) == "accept"
        server.wait_log("is replaced: it cannot pass its answer on: Too many references")
        assert " is gone: " not in server.log()
        assert server.counters().get("poison", 0) == 0
        assert server.unforeseen() == [], server.log()
        server.kill()


def test_a_sandboxed_worker_has_no_sockets_to_leave_any_in(folder: Path) -> None:
    required()
    with Service(folder, "--sandbox", "on") as server, server.client() as client:
        assert word(client.deliver(evil(ON_THEIR_WAY))) == "tempfail"
        assert "PermissionError" in server.log()
        assert "--sandbox-allow network would allow it" in server.log()
        assert word(client.deliver(mail("large"))) == "accept"
        assert server.unforeseen() == [], server.log()


@contextmanager
def deaf_listener() -> Iterator[int]:
    """The port of one that reads nothing."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        listening.bind(("127.0.0.1", 0))
        listening.listen(1000)
        yield int(listening.getsockname()[1])


LINGERING = """
import struct
kept = []
for _ in range(200):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30000))
    sock.connect(("127.0.0.1", PORT))
    sock.setblocking(False)
    try:
        while True:
            sock.send(bytes(65536))
    except OSError:
        kept.append(sock)
send(b"\\0", *[sock.fileno() for sock in kept])
BEHIND
time.sleep(600)
"""

#: They wait in the channel while the master reads a large answer, and when it closes the channel.
UNREAD = """
fd = memory(bytes((0, 1, 0, 0, 98)) + bytes(65535), 100_000_000)
send(said(fd, 100_000_000), fd)
for _ in range(4):
    send(b"\\0", *[sock.fileno() for sock in kept])
os._exit(1)
"""


@pytest.mark.parametrize("behind", ["", UNREAD], ids=["read", "unread"])
def test_sockets_that_linger_hold_up_neither_the_master_nor_a_thread_each(
    folder: Path, behind: str
) -> None:
    with deaf_listener() as port, Service(folder, workers=1) as server, server.client() as client:
        assert word(client.deliver(mail())) == "accept"
        before, threads = server.descriptors(), server.threads()
        code = LINGERING.replace("PORT", str(port)).replace("BEHIND", behind)
        if behind:
            code = code.replace("send(b", behind.strip() + "\nsend(b", 1)
        liar = Background(server, evil(code))
        until(lambda: liar.done, "the message has its verdict")
        assert word(client.deliver(mail())) == "accept"
        assert server.threads() <= threads
        until(lambda: server.descriptors() <= before + 1, "as many are open as before")
        assert server.unforeseen() == [], server.log()
