"""What does one cheap message pass in the master?

    python -m bench.stations [--verbose] [--log-level info] [--messages 200] [--json FILE]

One worker and a milter that only looks at the end of the message and returns None. The messages
come one at a time over one connection, each in one write, as an MTA writes packets that need no
answer. After a warm-up, the calls in the master process are counted and divided by the number of
messages.

- A call is a call of a Python function whose module is in our package. Each time that a generator
  goes on is a call as well. Comprehensions and generator expressions are no calls, but part of the
  function in which they are written.
- A station is a function that takes the message over and passes it on: it is called from outside
  its module, and it calls a function of another of our modules. Who calls is the innermost function
  of ours on the stack; code between the two, as Twisted's, is left out.
- A module counts when it has a function that was called.

Stations and modules are counted over functions that are called at least for every second message,
so that timers do not count.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import counted_daemon
from bench.counted_daemon import PACKAGE, Function
from bench.report import Report, arguments
from bench.server import START_TIMEOUT, Server, running
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.stages import Protocol
from sharded_milter.protocol.wire import LETTER, PAYLOAD, Framer
from sharded_milter.testing import load
from sharded_milter.testing.dialogue import OFFER, exchanges, greeting, transaction
from sharded_milter.testing.generated import generated

MILTER = """
from sharded_milter import Message, Milter

milter = Milter("stations")

@milter.eom
def scan(message: Message) -> None:
    return None
"""

WARM_UP = 100

# A function that is called less often for each message does not belong to its way.
SELDOM = 0.5

# The master has something left to do when the answer is out; after so long it is done.
_REST = 0.2

# The file in the daemon's directory that has its counts.
COUNTS = "counts"

# How often we look whether the master has written its counts.
_RETRY = 0.01

_RECEIVE = 65_536


@dataclass(frozen=True)
class Way:
    """What a message passes."""

    functions: dict[Function, float]  # calls for each message, in the order of the first call
    stations: set[Function]

    @property
    def calls(self) -> float:
        """How many calls a message takes."""
        return sum(self.functions.values())

    @property
    def modules(self) -> set[str]:
        """Those whose functions are called for every message."""
        return {function[0] for function, calls in self.functions.items() if calls >= SELDOM}

    def lines(self) -> Iterator[str]:
        """All functions by module, each module and function in the order of its first call."""
        for module in dict.fromkeys(module for module, _ in self.functions):
            yield module
            for function, calls in self.functions.items():
                if function[0] == module:
                    mark = "*" if function in self.stations else " "
                    yield f"{calls:8.2f} {mark} {function[1]}"


def way(counts: Iterable[tuple[Function | None, Function, int]], messages: int) -> Way:
    """What so many messages have passed, from the calls of one function by another."""
    total: Counter[Function] = Counter()
    entered, passing = set[Function](), set[Function]()
    for caller, called, count in counts:
        total[called] += count
        if count / messages < SELDOM:
            continue
        if caller is None or caller[0] != called[0]:
            entered.add(called)
            if caller is not None:
                passing.add(caller)
    functions = {function: count / messages for function, count in total.items()}
    return Way(functions, entered & passing)


class Mta:
    """An MTA's connection, which sends the same message again and again."""

    def __init__(self, path: str) -> None:
        self._socket = load.connect(path)
        self._framer = Framer()
        self._socket.sendall(OFFER.encode())
        protocol = Protocol(commands.Negotiate.parse(self._answer()[PAYLOAD:]).protocol)
        answered, lead = exchanges(greeting(), protocol)
        for group in answered:
            self._say(group)
        self._socket.sendall(b"".join(lead))
        self._message, _ = exchanges(transaction(generated()), protocol)

    def send(self, messages: int) -> None:
        """Sends so many, each when the one before is answered."""
        for _ in range(messages):
            for group in self._message:
                answer = self._say(group)
            if answer[LETTER] != replies.Continue.letter[0]:
                raise SystemExit(f"the master answers a message with {answer!r}")

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def _say(self, group: Iterable[bytes]) -> bytes:
        self._socket.sendall(b"".join(group))
        return self._answer()

    def _answer(self) -> bytes:
        """The only packet of an answer: the milter of this bench makes no changes."""
        packets: list[bytes] = []
        while not packets:
            data = self._socket.recv(_RECEIVE)
            if not data:
                raise SystemExit("the master has closed the connection")
            packets = self._framer.receive(data)
        (packet,) = packets
        return packet


def counts_of(server: Server) -> list[tuple[Function | None, Function, int]]:
    """The calls in the master since this was asked before."""
    counts = Path(server.path).with_name(COUNTS)
    time.sleep(_REST)
    os.kill(server.pid, counted_daemon.MARK)
    deadline = time.monotonic() + START_TIMEOUT
    while not counts.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"the master writes no counts\n{server.log.read_text()}")
        time.sleep(_RETRY)
    rows = json.loads(counts.read_text())
    counts.unlink()
    return [(caller and tuple(caller), tuple(called), count) for caller, called, count in rows]


def measured(messages: int, *, level: str = "info", warm_up: int = WARM_UP) -> Way:
    """What each of so many messages passes in a master that has warmed up."""

    def command(folder: Path, listen: str) -> list[str]:
        milter = folder / "stations_milter.py"
        milter.write_text(MILTER)
        program = [sys.executable, "-P", counted_daemon.__file__, str(folder / COUNTS)]
        options = ["--listen", listen, "--workers", "1", "--log-level", level]
        return [*program, *options, f"{milter}:milter"]

    with running(command) as server:
        server.settle()
        mta = Mta(server.path)
        try:
            mta.send(warm_up)
            counts_of(server)  # begins to count
            mta.send(messages)
            return way(counts_of(server), messages)
        finally:
            mta.close()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--verbose", action="store_true", help="list the functions, * at stations")
    parser.add_argument("--log-level", default="info", help="of the daemon (default: its own)")
    parser.add_argument("--messages", type=int, default=200, help="that are counted")
    options = parser.parse_args()
    report = Report(__doc__)
    passed = measured(options.messages, level=options.log_level)
    row = {
        f"calls in {PACKAGE}": round(passed.calls, 2),
        "stations": len(passed.stations),
        "modules": len(passed.modules),
    }
    report.table(f"one message, log level {options.log_level}", [row])
    if options.verbose:
        for line in passed.lines():
            report.say(line)
    report.save(options)


if __name__ == "__main__":
    main()
