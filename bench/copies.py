"""How often are the bytes of a large body copied, in the master and in the workers?

    python -m bench.copies [--megabytes 25] [--messages 20] [--rounds 5] [--json FILE]

For each MB of a body: ms of CPU in Python and C (user) and in the kernel (system), which copies
where it reads, writes and clears new pages; MB that went through write(2) and read(2), as
/proc/PID/io counts them, which leaves out what is received from a socket (each byte once, in the
master); and MB of pages that the process touched first. A copy into a small buffer that is used
again shows in the user's time alone.

The milter only counts bytes. Beside it stand the floors of `copy_floors.py`, under the same Python
and for the same bodies. A master has to receive a body, into new memory or a buffer of its own, and
to write it where a worker can map it, or to receive it straight into such memory; a worker has to
map it, and to look at each page or to make `bytes` of it.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median

from bench import copy_floors
from bench.client import Load, drive
from bench.report import Report, Row, arguments
from bench.rounds import alternating
from bench.server import Server
from bench.subjects import OURS_COUNTING, Job

# Whose time each floor is to be compared with, and what the floor does.
FLOORS = {
    "master's floor: receive into new memory, write": copy_floors.fresh,
    "master's floor: receive into one buffer, write": copy_floors.again,
    "master's floor: receive into a mapping": copy_floors.straight,
    "worker's floor: map, look": copy_floors.look,
    "worker's floor: map, copy": copy_floors.copy,
}
_RECEIVE = (copy_floors.fresh, copy_floors.again, copy_floors.straight)
MASTER, WORKERS = "the master", "the workers"

_MB = 1_000_000
_MS = 1000
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = resource.getpagesize()

# Where /proc/PID/stat has them, counted behind the name (proc(5)).
_MINOR_FAULTS, _USER, _SYSTEM = 7, 11, 12


@dataclass(frozen=True)
class Used:
    """What processes have used so far, or what they use for a MB."""

    user: float = 0.0  # seconds
    system: float = 0.0
    written: float = 0.0  # bytes
    read: float = 0.0
    touched: float = 0.0

    @classmethod
    def by(cls, pids: Sequence[int]) -> Used:
        """The sum of these processes."""
        sums = [0.0] * len(fields(cls))
        for pid in pids:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            passed = dict(line.split(": ") for line in lines)
            own = (
                int(words[_USER]) / _TICKS,
                int(words[_SYSTEM]) / _TICKS,
                int(passed["wchar"]),
                int(passed["rchar"]),
                int(words[_MINOR_FAULTS]) * _PAGE,
            )
            sums = [a + b for a, b in zip(sums, own, strict=True)]
        return cls(*sums)

    def since(self, before: Used, size: float) -> Used:
        """What was used between the two, for each of so many bytes."""
        names = [field.name for field in fields(self)]
        return Used(*((getattr(self, name) - getattr(before, name)) / size for name in names))

    @property
    def ms_a_mb(self) -> float:
        """CPU."""
        return (self.user + self.system) * _MB * _MS


# For so many bodies, what each of some processes has used.
Measure = Callable[[int], list[Used]]


@contextmanager
def floor(work: copy_floors.Floor, size: int) -> Iterator[Measure]:
    """A process that does that, and what it uses for so many bodies."""
    ours, theirs = socket.socketpair()
    body = bytes(size)
    memory = os.memfd_create("body")
    os.write(memory, body)
    descriptors = (theirs.fileno(), memory)
    command = [sys.executable, copy_floors.__file__, work.__name__, *map(str, descriptors)]
    process = subprocess.Popen([*command, str(size)], pass_fds=descriptors)
    theirs.close()
    os.close(memory)
    said = body if work in _RECEIVE else copy_floors.DONE

    def measure(bodies: int) -> list[Used]:
        before = Used.by([process.pid])
        for _ in range(bodies):
            ours.sendall(said)
            ours.recv(1)
        return [Used.by([process.pid]).since(before, bodies * size)]

    try:
        measure(1)  # it has started
        yield measure
    finally:
        ours.close()
        process.wait()


def ours(server: Server, messages: int, size: int) -> list[Used]:
    """What the master and its workers use for so many messages on one connection."""
    groups = ([server.pid], server.workers())
    before = [Used.by(pids) for pids in groups]
    drive(server, Load(1, messages=messages, body=size))
    return [
        Used.by(pids).since(used, messages * size)
        for pids, used in zip(groups, before, strict=True)
    ]


def row(name: str, rounds: Sequence[Used]) -> Row:
    """A line of the table: medians of the rounds, for each MB."""

    def middle(figure: Callable[[Used], float]) -> float:
        return median(map(figure, rounds))

    return {
        "for each MB": name,
        "CPU ms": middle(lambda each: each.ms_a_mb),
        "user ms": middle(lambda each: _MS * _MB * each.user),
        "system ms": middle(lambda each: _MS * _MB * each.system),
        "written MB": middle(lambda each: each.written),
        "read MB": middle(lambda each: each.read),
        "new pages MB": middle(lambda each: each.touched),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--megabytes", type=float, default=25.0)
    parser.add_argument("--messages", type=int, default=20, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = Report(__doc__)
    size, messages = int(options.megabytes * _MB), options.messages
    with ExitStack() as stack:
        server = stack.enter_context(OURS_COUNTING.serving(Job()))
        floors = {n: stack.enter_context(floor(each, size)) for n, each in FLOORS.items()}
        ours(server, 2, size)  # warm
        sides: dict[str, Measure] = {"ours": partial(ours, server, size=size), **floors}
        runs = alternating(sides, options.rounds, lambda side: side(messages))
    by_part = zip(*runs.pop("ours"), strict=True)
    found = dict(zip((MASTER, WORKERS), by_part, strict=True))
    found |= {name: tuple(used for (used,) in rounds) for name, rounds in runs.items()}
    report.table(f"bodies of {options.megabytes:g} MB", [row(*each) for each in found.items()])
    report.save(options)


if __name__ == "__main__":
    main()
