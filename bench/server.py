"""Servers for a bench: any command that serves a milter, and ours, each in its own directory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psutil

from sharded_milter.sizing import processes
from sharded_milter.testing import daemon, load

# A milter that adds one header, after as much CPU time as its first argument says.
ADDS_A_HEADER = """
import time
from sharded_milter import Accept, AddHeader, Message, Milter, Verdict

BURN = {ms} / 1000
milter = Milter("bench")

@milter.eom
def scan(message: Message) -> Verdict:
    until = time.thread_time() + BURN
    while BURN and time.thread_time() < until:
        sum(range(1000))
    return Accept(AddHeader("X-Bench", "1"))
"""

# A milter that looks at each body, and does no more than to count its bytes.
COUNTS = """
from sharded_milter import Accept, AddHeader, Message, Milter, Verdict

milter = Milter("counts")

@milter.eom
def scan(message: Message) -> Verdict:
    return Accept(AddHeader("X-Bench", str(sum(map(len, message.chunks)))))
"""

# Interpreters and their imports on a busy machine.
START_TIMEOUT = 30.0

# What would end us without leaving a block. Ctrl-C is an exception already.
_ENDED_BY = (signal.SIGTERM, signal.SIGHUP)

# How often a socket is tried that nobody listens on yet.
_RETRY = 0.02

# Workers that have used no CPU time for so long wait for work.
_REST = 0.3


class Server(daemon.Daemon):
    """A running master, and what it and its workers are at."""

    def rss(self) -> int:
        """Bytes of the master's memory that are resident."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def descriptors(self) -> int:
        """How many the master has open."""
        return psutil.Process(self.process.pid).num_fds()

    def workers(self) -> list[int]:
        """The pids of the worker processes."""
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]

    def settle(self) -> None:
        """Returns when all workers have started: it serves when the first has."""
        deadline = time.monotonic() + START_TIMEOUT
        before = None
        while (now := processes.cpu(self.pid).workers) != before:
            if time.monotonic() > deadline:
                raise SystemExit(f"its workers do not come to rest\n{self.log.read_text()}")
            before = now
            time.sleep(_REST)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def _signals_leave() -> Iterator[None]:
    """Within the block a signal that ends us is an exception, so that nothing is left behind."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)  # as the shell says it

    taken = [each for each in _ENDED_BY if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def running(
    command: Callable[[Path, str], Sequence[str]], *, tcp: bool = False, public: bool = False
) -> Iterator[Server]:
    """Runs what `command` makes of a directory and an address until the block ends.

    The address is spelled as libmilter does. It is serving when the block begins. Other users,
    such as Postfix's, reach a UNIX socket only if it is `public`.
    """
    with _signals_leave(), tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if public:
            folder.chmod(0o755)
        port = free_port() if tcp else 0
        listen, address = (
            (f"inet:{port}@127.0.0.1", f"127.0.0.1:{port}")
            if tcp
            else (f"unix:{folder}/s", f"{folder}/s")
        )
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(folder, listen),
                stdout=output,
                stderr=output,
                cwd=folder,
                start_new_session=True,
                umask=0 if public else -1,
            )
        started = Server(address, process, log)
        try:
            _wait(started)
            yield started
        finally:
            daemon.stop(process)


def _wait(started: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and started.process.poll() is None:
        try:
            load.connect(started.path).close()
        except OSError:
            time.sleep(_RETRY)
        else:
            return
    raise SystemExit(f"it does not serve: {started.process.args!r}\n{started.log.read_text()}")


@contextmanager
def serving(source: str, *options: str, tcp: bool = False) -> Iterator[Server]:
    """Serves the milter `milter` of a module with this source with our own server."""

    def command(folder: Path, listen: str) -> list[str]:
        milter = folder / "bench_milter.py"
        milter.write_text(source)
        arguments = ["--listen", listen, *options, f"{milter}:milter"]
        return [sys.executable, "-m", "sharded_milter", *arguments]

    with running(command, tcp=tcp) as started:
        yield started


def cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
