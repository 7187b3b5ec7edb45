"""Does a pymilter script use both cores?

    python -m bench.pymilter_scaling [--connections 8] [--messages 96] [--ms 100] [--rounds 3]

One script that burns CPU time on each message, untouched, under the same load: with plain
pymilter, and with `sharded-milter --pymilter` and 1 and 2 workers. pymilter must be installed for
this interpreter; plain pymilter is its compiled half. The rounds take turns, so that a machine
which others use is equally unkind to all; the best of each counts.
"""

from __future__ import annotations

import argparse
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.server import cores
from sharded_milter.testing import load

SCRIPT = """
import sys
import time

import Milter


class Burn(Milter.Base):
    @Milter.noreply
    def body(self, chunk):
        return Milter.CONTINUE

    def eom(self):
        until = time.thread_time() + {ms} / 1000
        while time.thread_time() < until:
            sum(range(1000))
        self.addheader("X-Bench", "1")
        return Milter.CONTINUE


Milter.factory = Burn
Milter.set_flags(Milter.ADDHDRS)
Milter.runmilter("bench", sys.argv[1], 60)
"""

START = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--messages", type=int, default=96, help="in all, each time")
    parser.add_argument("--ms", type=float, default=100.0, help="CPU time of a message")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {cores()} cores; {options.ms:g} ms a message,")
    print(f"{options.connections} connections, {options.messages} messages, UNIX socket")
    ways = {"plain pymilter": 0, "1 worker": 1, "2 workers": 2}
    best: dict[str, load.Result] = {}
    for _ in range(options.rounds):
        for name, workers in ways.items():
            result = measure(workers, options.ms, options.connections, options.messages)
            if name not in best or result.rate > best[name].rate:
                best[name] = result
    print(f"{'':15} {'messages/s':>10} {'ratio':>6} {'p50 ms':>7} {'p99 ms':>7}")
    for name, result in best.items():
        print(
            f"{name:15} {result.rate:10.1f} {result.rate / best['plain pymilter'].rate:6.2f}"
            f" {1000 * result.percentile(0.5):7.1f} {1000 * result.percentile(0.99):7.1f}"
        )


def measure(workers: int, ms: float, connections: int, messages: int) -> load.Result:
    """One server, one load; no workers is plain pymilter."""
    with tempfile.TemporaryDirectory() as folder:
        script, path = Path(folder, "burn.py"), f"{folder}/s"
        script.write_text(SCRIPT.format(ms=ms))
        command = [sys.executable, str(script), f"unix:{path}"]
        if workers:
            ours = ["-m", "sharded_milter", "--workers", str(workers), "--allow-root"]
            command = [sys.executable, *ours, "--pymilter", str(script), "--", f"unix:{path}"]
        with Path(folder, "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(path, server)
            load.run(path, connections, 2 * connections)  # warm
            return load.run(path, connections, messages)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(START)


def wait_for(path: str, server: subprocess.Popen[bytes]) -> None:
    """Returns when somebody listens there."""
    deadline = time.monotonic() + START
    while True:
        try:
            load.connect(path).close()
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(Path(path).with_name("log").read_text()) from None
            time.sleep(0.05)
        else:
            return


if __name__ == "__main__":
    main()
