"""A daemon that is going to suffer, and what the tests want to know of it."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from integration.daemon import PROGRAM, Daemon

from sharded_milter.testing.mta import MtaClient

from .milters import OBEDIENT, write

#: No test waits for less, and none should ever come near it.
PATIENCE = 30.0


def is_running(pid: int) -> bool:
    """Not gone, and not only waiting for somebody to ask how it ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    """Returns when the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.03)  # many conditions read all of a log, or all of /proc


class Server(Daemon):
    """`with Server(folder, "--workers", "2") as server:` listens on a UNIX socket there."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        workers: int = 2,
        source: str = OBEDIENT,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.path = folder / "s"
        write(folder, source)
        self._sockets: list[socket.socket] = []
        super().__init__(
            "--workers",
            str(workers),
            "--listen",
            f"unix:{self.path}",
            *options,
            "./milter.py:milter",
            cwd=folder,
            program=program,
        )

    def __exit__(self, *exc_info: Any) -> None:
        for sock in self._sockets:
            sock.close()
        if self._process is not None:
            super().__exit__(*exc_info)

    def ends(self) -> None:
        """It was told to, and does, with 0."""
        assert self.process.wait(PATIENCE) == 0, self.log()
        self._process = None

    def socket(self) -> socket.socket:
        """A connection on which nothing was said."""
        sock = socket.socket(socket.AF_UNIX)
        self._sockets.append(sock)
        sock.settimeout(PATIENCE)
        sock.connect(str(self.path))
        return sock

    def client(self) -> MtaClient:
        """A connection that has greeted."""
        return MtaClient(self.socket(), timeout=PATIENCE)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def is_whole(self, workers: int = 2) -> bool:
        return len(self.workers()) == workers

    def counters(self) -> dict[str, int]:
        """What the master has counted until now."""
        lines = re.compile(r" bytes in flight; (.*)")
        before = len(lines.findall(self.log()))
        os.kill(self.pid, signal.SIGUSR2)
        until(lambda: len(lines.findall(self.log())) > before, "the counters are logged")
        pairs = (pair.split("=") for pair in lines.findall(self.log())[-1].split())
        return {name: int(count) for name, count in pairs}

    def descriptors(self) -> int:
        return psutil.Process(self.pid).num_fds()

    def grandchildren(self) -> list[int]:
        """The pids of those that the milter has started."""
        return [int(pid) for pid in re.findall(r" grandchild (\d+)", self.log())]

    def scans(self, subject: str) -> int:
        """How often a scan of the message has begun."""
        return self.log().count(f"scans {subject}\n")

    def unforeseen(self) -> list[str]:
        """What has failed in the master itself; what workers write begins with a bracket."""
        signs = ("Unhandled", "unforeseen", "got lost", "internal error", "Traceback")
        lines = [line for line in self.log().splitlines() if any(map(line.__contains__, signs))]
        return [line for line in lines if " [" not in line]
