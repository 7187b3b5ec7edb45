"""What does an idle MTA connection cost, and what do many of them cost a new message?

    python -m bench.idle_connections [--connections 10000] [--messages 200] [--json FILE]

Needs as many descriptors (ulimit -Hn), here and in the server.
"""

from __future__ import annotations

import resource
import socket

from bench.client import Load, drive
from bench.report import Report, arguments, figures
from bench.server import serving
from sharded_milter.testing.dialogue import OFFER, greeting

MILTER = """
from sharded_milter import Accept, AddHeader, Milter

milter = Milter("idle")

@milter.eom
def eom(message):
    return Accept(AddHeader("X-Idle", "1"))
"""

# What an MTA has said when its client has greeted and says nothing more.
GREETED = b"".join(command.encode() for command in greeting())


def idle(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.sendall(OFFER.encode())
    sock.recv(4096)
    sock.sendall(GREETED)
    return sock


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=200)
    options = parser.parse_args()
    report = Report(__doc__)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with serving(MILTER, "--workers", "2", "--log-level", "warn") as server:
        drive(server, Load(1, messages=100))  # warm
        before = server.rss()
        alone = drive(server, Load(1, messages=options.messages))
        sockets = [idle(server.path) for _ in range(options.connections)]
        drive(server, Load(1, messages=10))  # when it is answered, the greetings are read
        each = (server.rss() - before) / options.connections
        among = drive(server, Load(1, messages=options.messages))
        for sock in sockets:
            sock.close()
    rows = [
        {"a message": name, **figures([result])}
        for name, result in (("alone", alone), ("among them", among))
    ]
    report.table("2 workers, one busy connection", rows)
    memory = {"idle connections": options.connections, "KB of the master each": each / 1024}
    report.table("memory", [memory])
    report.save(options)


if __name__ == "__main__":
    main()
