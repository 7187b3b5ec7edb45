"""How long does the MTA wait more when the worker dies that scans its message?

    python -m bench.faults [--deaths 40] [--workers 4] [--ms 20] [--connections 2]

Each of these messages kills its first worker (SIGKILL) and is scanned by another; other
connections send mail meanwhile. Printed is the time from the death to the verdict without the
scan itself, and the account of all messages.
"""

from __future__ import annotations

import argparse
import platform
import threading
import time
from collections import Counter
from pathlib import Path

from bench.server import Server, cores, serving
from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol import replies
from sharded_milter.testing.mta import Mail, MtaClient, Outcome

MILTER = """
import os, signal, time
from sharded_milter import Accept, AddHeader, Milter

milter = Milter("faults")

@milter.eom
def eom(message):
    subject = message.headers["Subject"]
    if subject.startswith("deadly") and not os.path.exists(subject):
        with open(subject, "w") as file:
            file.write(repr(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    time.sleep({ms} / 1000)
    scan = time.monotonic() - began
    return Accept(AddHeader("X-Id", subject), AddHeader("X-Scan", repr(scan)))
"""

# A worker that dies soon after its start comes back later each time; so no server sees more.
DEATHS_PER_WORKER = 2


class Account:
    """What became of every message."""

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.sent = self.lost = self.wrong = 0

    def deliver(self, client: MtaClient, subject: str) -> Outcome | None:
        """Sends one; its outcome, unless there was none."""
        self.sent += 1
        try:
            outcome = client.deliver(Mail(f"Subject: {subject}\r\n\r\nhello\r\n".encode()))
        except (RemoteProtocolError, OSError):
            self.lost += 1
            return None
        self.verdicts[type(outcome.verdict).__name__] += 1
        # An answer too many would be taken for that of the next message.
        self.wrong += fields(outcome).get("X-Id", subject) != subject
        return outcome


def fields(outcome: Outcome) -> dict[str, str]:
    return {a.name: a.value.strip() for a in outcome.actions if isinstance(a, replies.InsertHeader)}


def traffic(server: Server, account: Account, stop: threading.Event, name: str) -> None:
    with MtaClient.to_path(server.path) as client:
        number = 0
        while not stop.is_set():
            number += 1
            account.deliver(client, f"mail {name} {number}")


def deaths(server: Server, account: Account, count: int, workers: int) -> list[float]:
    """The extra waits of so many messages, one after the other."""
    waits = []
    with MtaClient.to_path(server.path) as client:
        for number in range(count):
            while server.log.read_text().count("is ready, pid") < workers + number:
                time.sleep(0.01)
            subject = f"deadly-{number}"
            outcome = account.deliver(client, subject)
            now = time.monotonic()
            if outcome is not None and "X-Scan" in fields(outcome):
                died = float(Path(server.path).with_name(subject).read_text())
                waits.append(now - died - float(fields(outcome)["X-Scan"]))
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deaths", type=int, default=40)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--ms", type=float, default=20.0, help="what a scan takes")
    parser.add_argument("--connections", type=int, default=2, help="with other mail")
    options = parser.parse_args()
    account, waits = Account(), list[float]()
    while len(waits) + account.lost < options.deaths:
        count = min(options.workers * DEATHS_PER_WORKER, options.deaths - len(waits))
        with serving(MILTER.format(ms=options.ms), "--workers", str(options.workers)) as server:
            stop = threading.Event()
            others = [
                threading.Thread(target=traffic, args=(server, account, stop, str(n)))
                for n in range(options.connections)
            ]
            for thread in others:
                thread.start()
            try:
                waits += deaths(server, account, count, options.workers)
            finally:
                stop.set()
                for thread in others:
                    thread.join()
    waits.sort()
    print(f"Python {platform.python_version()}, {cores()} cores, {options.workers} workers")
    print(f"{len(waits)} deaths; from the death to the verdict, without the scan:")
    print(f"p50 {1000 * waits[len(waits) // 2]:.1f} ms, max {1000 * waits[-1]:.1f} ms")
    print(f"{account.sent} messages, {dict(account.verdicts)}")
    print(f"lost {account.lost}, duplicates {account.wrong}")


if __name__ == "__main__":
    main()
