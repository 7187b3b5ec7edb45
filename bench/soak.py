"""Does the master grow while workers come and go?

    python -m bench.soak [--messages 200000] [--workers 2] [--max-messages 500] [--connections 8]
                         [--json FILE]

Prints the master's memory and descriptors after the first tenth of the messages and at the end.
"""

from __future__ import annotations

import time

from bench.client import Load, drive
from bench.report import Report, Row, arguments, figures
from bench.server import Server, serving

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
    parser = arguments(__doc__)
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-messages", type=int, default=500)
    parser.add_argument("--connections", type=int, default=8)
    options = parser.parse_args()
    report = Report(__doc__)
    tenth = options.messages // 10
    given = ["--workers", str(options.workers), "--max-messages", str(options.max_messages)]
    rows: list[Row] = []
    with serving(MILTER, *given, "--log-level", "warn") as server:
        for messages in (tenth, options.messages - tenth):
            result = drive(server, Load(options.connections, messages=messages))
            memory, descriptors = settled(server, options.workers)
            rows.append(
                {
                    "messages": messages,
                    "MB": memory,
                    "descriptors": descriptors,
                    **figures([result]),
                }
            )
    report.table(f"{options.workers} workers, replaced after {options.max_messages} messages", rows)
    report.save(options)


if __name__ == "__main__":
    main()
