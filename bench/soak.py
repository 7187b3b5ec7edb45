"""Does the master grow while workers come and go?

    python -m bench.soak [--messages 200000] [--workers 2] [--max-messages 500] [--connections 8]

Prints the master's memory and descriptors after the first tenth of the messages and at the end.
"""

from __future__ import annotations

import argparse
import platform
import time

from bench.client import Load, drive
from bench.server import Server, cores, serving

MILTER = """
from sharded_milter import Accept, AddHeader, Milter

milter = Milter("soak")

@milter.eom
def eom(message):
    return Accept(AddHeader("X-Soak", "1"))
"""


def settled(server: Server, workers: int) -> tuple[float, int]:
    """Memory in MB and open descriptors, once no worker is on its way in or out."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        before = server.descriptors()
        time.sleep(2.5)  # what dead workers have left open is closed by then
        if len(server.workers()) == workers and server.descriptors() == before:
            break
    return server.rss() / 2**20, server.descriptors()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-messages", type=int, default=500)
    parser.add_argument("--connections", type=int, default=8)
    options = parser.parse_args()
    tenth = options.messages // 10
    arguments = ["--workers", str(options.workers), "--max-messages", str(options.max_messages)]
    with serving(MILTER, *arguments, "--log-level", "warn") as server:
        first = drive(server, Load(options.connections, messages=tenth))
        memory, descriptors = settled(server, options.workers)
        rest = drive(server, Load(options.connections, messages=options.messages - tenth))
        memory_after, descriptors_after = settled(server, options.workers)
    print(f"Python {platform.python_version()}, {cores()} cores, {options.workers} workers,")
    print(f"each replaced after {options.max_messages} messages and more")
    print(f"after {first.messages} messages: {memory:.1f} MB, {descriptors} descriptors")
    total = first.messages + rest.messages
    print(f"after {total} messages: {memory_after:.1f} MB, {descriptors_after} descriptors")
    print(f"growth {memory_after - memory:+.2f} MB; {rest.rate:.0f} messages/s; {rest.verdicts}")
    print(f"latency p50 {1000 * rest.p50:.2f} ms, p99 {1000 * rest.p99:.2f}")


if __name__ == "__main__":
    main()
