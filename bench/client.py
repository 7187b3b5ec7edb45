"""The load client of the benches: `milterload.c`, compiled once in each run of a script.

Where there is no gcc the package's own client takes its place. That one takes five times as much
CPU for a message, and so hides differences between milters; a line says so.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from bench.server import Server
from sharded_milter.sizing import processes
from sharded_milter.testing import load
from sharded_milter.testing.dialogue import transaction
from sharded_milter.testing.generated import BODY_BYTES, generated

SOURCE = Path(__file__).with_name("milterload.c")

_VERDICTS = ("accept", "continue", "reject", "tempfail", "discard")

_MS = 1000


@dataclass(frozen=True)
class Load:
    """What is sent: so many messages, or as many as fit in so many seconds."""

    connections: int
    messages: int | None = None
    seconds: float | None = None
    each: int | None = None  # messages of a connection, which is then closed and another opened
    body: int = BODY_BYTES
    recipients: int = 1
    separate: bool = False  # a write for each packet, as Sendmail does, with Nagle's algorithm on


@dataclass(frozen=True)
class Result:
    """What a run measured; times in seconds."""

    messages: int
    seconds: float
    p50: float
    p99: float
    longest: float
    client_cpu: float
    verdicts: Mapping[str, int]

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.messages / self.seconds


@dataclass(frozen=True)
class Run(Result):
    """What a run measured, and the CPU time that the server took for it."""

    cpu: processes.Cpu

    @property
    def master_cpu(self) -> float:
        """Seconds of the master's CPU for a message."""
        return self.cpu.master / self.messages

    @property
    def workers_cpu(self) -> float:
        """Seconds of all the workers' CPU for a message."""
        return self.cpu.workers / self.messages


def drive(server: Server, wanted: Load) -> Run:
    """Drives a server of ours or another; ends the bench if a message is lost."""
    before = processes.cpu(server.pid)
    result = send(server.path, wanted)
    return Run(**vars(result), cpu=processes.cpu(server.pid) - before)


def send(address: str, wanted: Load) -> Result:
    """The same for any milter; the address is a path or HOST:PORT."""
    program = compiled()
    return _light(program, address, wanted) if program else _own(address, wanted)


@cache
def compiled() -> Path | None:
    """The compiled client; None where there is no gcc."""
    compiler = shutil.which("gcc")
    if compiler is None:
        print("no gcc: the load comes from the package's own client, which takes more CPU")
        return None
    program = Path(_folder().name, "milterload")
    subprocess.run([compiler, "-O2", "-o", program, SOURCE], check=True)
    return program


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="bench-client-")


def _light(program: Path, address: str, wanted: Load) -> Result:
    done = subprocess.run(
        [program, *_options(wanted), address], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, done.args))}: {done.stdout}{done.stderr}")
    return parsed(done.stdout)


def _options(wanted: Load) -> list[str]:
    given = {
        "-c": wanted.connections,
        "-n": wanted.messages,
        "-s": wanted.seconds,
        "-m": wanted.each,
        "-b": wanted.body,
        "-r": wanted.recipients,
    }
    words = [(name, str(value)) for name, value in given.items() if value is not None]
    return [*chain(*words), *(["-w"] if wanted.separate else [])]


def parsed(line: str) -> Result:
    """What the line says that the client prints."""
    figures = dict(word.split("=") for word in line.split())
    return Result(
        messages=int(figures["messages"]),
        seconds=float(figures["seconds"]),
        p50=float(figures["p50_ms"]) / _MS,
        p99=float(figures["p99_ms"]) / _MS,
        longest=float(figures["max_ms"]) / _MS,
        client_cpu=float(figures["cpu"]),
        verdicts={word: int(figures[word]) for word in _VERDICTS if int(figures[word])},
    )


def _own(address: str, wanted: Load) -> Result:
    if wanted.each is not None:
        raise SystemExit("only the client in C closes connections within a run: it needs gcc")
    to = [f"b{number}@example.com" for number in range(wanted.recipients)]
    content = [
        transaction(generated(number, body=wanted.body, recipients=to))
        for number in range(min(wanted.connections, wanted.messages or wanted.connections))
    ]
    result = load.run(
        address,
        wanted.connections,
        wanted.messages or load.UNLIMITED,
        seconds=wanted.seconds or float("inf"),
        content=content,
        coalesced=not wanted.separate,
    )
    if result.unanswered:
        raise SystemExit(f"{result.unanswered} messages were lost")
    return Result(
        messages=result.messages,
        seconds=result.seconds,
        p50=result.percentile(0.5),
        p99=result.percentile(0.99),
        longest=max(result.latencies),
        client_cpu=result.client_cpu,
        verdicts=result.verdicts,
    )
