"""What does an idle MTA connection cost, and what do many of them cost a new message?

    python bench/idle_connections.py [--connections 10000] [--messages 200]

Needs as many descriptors (ulimit -Hn), here and in the server.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import load
from server import serving

from sharded_milter.protocol import commands
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, VERSION

MILTER = """
from sharded_milter import Accept, AddHeader, Milter

milter = Milter("idle")

@milter.eom
def eom(message):
    return Accept(AddHeader("X-Idle", "1"))
"""

# What an MTA has said when its client has greeted and says nothing more.
GREETING = b"".join(
    command.encode()
    for command in (
        commands.Macro("C", (("j", "mx.example.test"), ("v", "Postfix 3.9.0"))),
        commands.Connect("client.example.test", "4", 25, "192.0.2.1"),
        commands.Helo("client.example.test"),
    )
)


def idle(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.sendall(commands.Negotiate(VERSION, KNOWN_ACTIONS, KNOWN_PROTOCOL).encode())
    sock.recv(4096)
    sock.sendall(GREETING)
    return sock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=200)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with serving(MILTER, "--workers", "2", "--log-level", "warn") as server:
        load.run(server.path, 1, 100)
        before = server.rss()
        alone = load.run(server.path, 1, options.messages)
        sockets = [idle(server.path) for _ in range(options.connections)]
        load.run(server.path, 1, 10)
        each = (server.rss() - before) / options.connections
        among = load.run(server.path, 1, options.messages)
        for sock in sockets:
            sock.close()
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {cores} cores, 2 workers")
    print(f"{options.connections} idle connections: {each / 1024:.2f} KB of the master's each")
    for name, result in (("alone", alone), ("among them", among)):
        print(
            f"a message {name}: p50 {1000 * result.percentile(0.5):.2f} ms,"
            f" p99 {1000 * result.percentile(0.99):.2f}, max {1000 * max(result.latencies):.2f}"
        )


if __name__ == "__main__":
    main()
