"""The daemon that is attacked: what it has in hand at rest, what it has logged, how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.server import Server, running

MILTERS = Path(__file__).parents[1] / "milters"

# It comes to rest when its last worker has been replaced: the longest back-off is 30 s.
REST_TIMEOUT = 60.0

# `--graceful-timeout` is 30 s by default, and workers get some seconds more.
END_TIMEOUT = 45.0

# Two looks at a daemon that rests are so far apart.
_PAUSE = 0.3

# What says that we have failed, and not a milter, a worker that was killed or a peer.
_OURS = ("Traceback", "Unhandled", "unforeseen", "got lost", "internal error")

_IN_HAND = re.compile(r" (\d+ connections, \d+ jobs queued, \d+ bytes in flight);")


@dataclass(frozen=True)
class Figures:
    """What it has in hand."""

    memory: float  # MB that are resident in the master
    descriptors: int
    workers: int
    zombies: int
    in_hand: str  # connections, jobs and bytes, in its own words


@contextmanager
def serving(
    arguments: Sequence[str], *, tcp: bool, descriptors: int = 0, python: str = sys.executable
) -> Iterator[Server]:
    """The daemon with these arguments until the block ends; `descriptors` limits all processes."""

    def command(folder: Path, listen: str) -> list[str]:
        limit = ["prlimit", f"--nofile={descriptors}:{descriptors}"] if descriptors else []
        return [
            *limit,
            python,
            "-m",
            "sharded_milter",
            "--allow-root",
            "--listen",
            listen,
            *arguments,
        ]

    with running(command, tcp=tcp) as server:
        yield server


def figures(server: Server) -> Figures:
    """What it has in hand now."""
    children = psutil.Process(server.pid).children()
    states = []
    for child in children:
        with suppress(psutil.NoSuchProcess):
            states.append(child.status())
    dead = states.count(psutil.STATUS_ZOMBIE)
    memory = server.rss() / 2**20
    return Figures(memory, server.descriptors(), len(states) - dead, dead, _in_hand(server))


def _in_hand(server: Server) -> str:
    before = server.log.stat().st_size
    os.kill(server.pid, signal.SIGUSR2)
    deadline = time.monotonic() + REST_TIMEOUT
    while not (found := _IN_HAND.search(server.log_text(before))):
        if time.monotonic() > deadline:
            return "it does not say what it has in hand"
        time.sleep(0.02)
    return found[1]


def at_rest(server: Server, is_rest: Callable[[Figures], bool]) -> Figures:
    """Its figures when they are as they should be, or what they still are after REST_TIMEOUT."""
    deadline = time.monotonic() + REST_TIMEOUT
    while not is_rest(found := figures(server)) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return found


def own_failures(server: Server) -> list[str]:
    """The lines of its log that only a defect of ours can have caused."""
    lines = server.log_text().splitlines()
    return [line for line in lines if any(map(line.__contains__, _OURS))]


def end(server: Server) -> list[str]:
    """Tells it to end; what was wrong with its end."""
    server.process.send_signal(signal.SIGTERM)
    try:
        code = server.process.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        return [f"it still runs {END_TIMEOUT:g} s after SIGTERM"]
    left = [pid for pid in psutil.pids() if _session(pid) == server.pid]
    wrong = [f"exit code {code}"] if code else []
    return wrong + ([f"processes outlive it: {left}"] if left else [])


def _session(pid: int) -> int:
    try:
        return os.getsid(pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else 0
    except (psutil.NoSuchProcess, ProcessLookupError):
        return 0
