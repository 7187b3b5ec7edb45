"""How many messages a second does a milter take that adds one header?

    python bench/throughput.py [--workers 2] [--connections 8 32] [--messages 200] [--ms 0 1 10]

`--ms` is the CPU time that the milter burns on each message. The limit is cores / that time.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import load

MILTER = """
import time
from sharded_milter import Accept, AddHeader, Message, Milter, Verdict

BURN = {ms} / 1000
milter = Milter("bench")

@milter.eom
def scan(message: Message) -> Verdict:
    until = time.thread_time() + BURN
    while time.thread_time() < until:
        sum(range(1000))
    return Accept(AddHeader("X-Bench", "1"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--messages", type=int, default=1600, help="in all")
    parser.add_argument("--ms", type=float, nargs="+", default=[0.0, 1.0, 10.0])
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {cores} cores, {options.workers} workers,")
    print(f"messages of {load.HEADERS} headers and {load.BODY_BYTES} bytes, UNIX socket")
    print(
        f"{'ms':>5} {'connections':>11} {'messages/s':>10} {'of limit':>8} {'p50 ms':>7}"
        f" {'p99 ms':>7} {'client CPU':>10}"
    )
    for ms in options.ms:
        for connections in options.connections:
            result = measure(ms, options.workers, connections, options.messages)
            limit = f"{result.rate * ms / 1000 / cores:8.2f}" if ms else f"{'':8}"
            share = result.client_cpu / result.seconds
            print(
                f"{ms:5g} {connections:11} {result.rate:10.0f} {limit}"
                f" {1000 * result.percentile(0.5):7.2f} {1000 * result.percentile(0.99):7.2f}"
                f" {share:10.2f}"
            )


def measure(ms: float, workers: int, connections: int, messages: int) -> load.Result:
    """One server, one load."""
    if ms:
        messages = min(messages, int(5000 / ms) + connections)
    with tempfile.TemporaryDirectory() as folder:
        milter, path = Path(folder, "bench_milter.py"), f"{folder}/s"
        milter.write_text(MILTER.format(ms=ms))
        reader, writer = os.pipe()
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sharded_milter",
                "--listen",
                f"unix:{path}",
                "--ready-fd",
                str(writer),
                "--workers",
                str(workers),
                f"{milter}:milter",
            ],
            pass_fds=(writer,),
            stderr=subprocess.DEVNULL,
        )
        os.close(writer)
        try:
            os.read(reader, 1)
            load.run(path, connections, 10)  # warm
            return load.run(path, connections, max(1, messages // connections))
        finally:
            os.close(reader)
            server.send_signal(signal.SIGTERM)
            server.wait(30)


if __name__ == "__main__":
    main()
