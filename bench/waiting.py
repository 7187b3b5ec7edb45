"""Who waits, and for how long, where scans are slow?

    python -m bench.waiting [--json FILE]

Behind slow scans: after short ones, which make the workers be given messages ahead, slow scans and
short ones come together. Each should be scanned once, and all be answered when the slow ones are.

Between stages: eight clients come again and again to a milter that is an object and is asked at
every stage. The first question of a new connection should wait no longer than the last one of
another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from bench.report import Report, Row, Target, arguments
from bench.server import Server, serving
from sharded_milter.testing import load
from sharded_milter.testing.mta import Mail, MtaClient

SHORT = 60  # scans before the slow ones
SLOW = 1.0  # seconds of a slow scan

CLIENTS = 8
SESSIONS = 25  # of each client
SCAN = 0.010  # seconds of an object's scan

# A session of several questions, of which each may wait for those of the other clients.
LONGEST = 4.0

# Messages are sent, answered and scanned beside the slow ones.
AT_MOST = 1.1

SLEEPS = """
import time
from sharded_milter import Accept, Milter

milter = Milter("sleeps")

@milter.eom
def scan(message):
    subject = message.headers["subject"]
    print("scans", subject, flush=True)
    time.sleep(float(subject.split()[0]))
    return Accept()
"""

OBJECT = f"""
import time
from sharded_milter.embedded import Milter

class milter(Milter):
    def xxfi_connect(self, hostname, family, address):
        return self.ReturnCodes.CONTINUE

    def xxfi_helo(self, name):
        return self.ReturnCodes.CONTINUE

    def xxfi_envfrom(self, argv):
        return self.ReturnCodes.CONTINUE

    def xxfi_envrcpt(self, argv):
        return self.ReturnCodes.CONTINUE

    def xxfi_eom(self):
        until = time.thread_time() + {SCAN}
        while time.thread_time() < until:
            sum(range(1000))
        return self.ReturnCodes.CONTINUE
"""


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report(__doc__)
    rows = [behind_slow_scans(workers) for workers in (1, 2)]
    report.table("short scans, then slow ones of 1 s and short ones together", rows)
    for row in rows:
        what = f"{row['workers']} workers: seconds until all are answered, of what the slow take"
        report.target(Target(what, row["of least"], AT_MOST))
        report.target(Target("scans of a message, the most", row["most scans"], 1))
    between = between_stages()
    report.table(f"{CLIENTS} clients of an object, scans of 10 ms, 2 workers", [between])
    report.target(Target("longest session, of the median", between["of median"], LONGEST))
    report.save(options)


def behind_slow_scans(workers: int) -> Row:
    """As many slow scans as two rounds of the workers, a short one behind each."""
    with serving(SLEEPS, "--workers", str(workers)) as server:
        server.settle()
        with _client(server) as client:
            for number in range(SHORT):
                client.deliver(_mail(0, f"short {number}"))
        mails = [_mail(SLOW if turn == 0 else 0, f"{number} {turn}")
                 for number in range(2 * workers) for turn in (0, 1)]  # fmt: skip
        began = time.perf_counter()
        with ThreadPoolExecutor(len(mails)) as threads:
            list(threads.map(lambda mail: _deliver(server, mail), mails))
        seconds = time.perf_counter() - began
        log = server.log.read_text()
        scans = [log.count(f"scans {_subject(mail)}\n") for mail in mails]
        assert min(scans) > 0, log
    least = 2 * SLOW
    return {"workers": workers, "seconds": seconds, "least": least, "of least": seconds / least,
            "most scans": max(scans)}  # fmt: skip


def between_stages() -> Row:
    """Sessions of one mail each: how long they take, from connecting to the verdict."""
    with serving(OBJECT, "--workers", "2", "--log-level", "warn") as server:
        server.settle()
        with ThreadPoolExecutor(CLIENTS) as threads:
            taken = list(threads.map(lambda number: list(_sessions(server)), range(CLIENTS)))
    times = [1000 * seconds for each in taken for seconds in each]
    median, longest = statistics.median(times), max(times)
    return {"sessions": len(times), "median ms": median, "longest ms": longest,
            "of median": longest / median}  # fmt: skip


def _sessions(server: Server) -> Iterator[float]:
    for number in range(SESSIONS):
        began = time.perf_counter()
        _deliver(server, _mail(0, f"session {number}"))
        yield time.perf_counter() - began


def _mail(seconds: float, name: str) -> Mail:
    return Mail(f"Subject: {seconds:g} {name}\r\n\r\ntext\r\n".encode())


def _subject(mail: Mail) -> str:
    return mail.raw.partition(b"\r\n")[0].decode().removeprefix("Subject: ")


def _client(server: Server) -> MtaClient:
    return MtaClient(load.connect(server.path))


def _deliver(server: Server, mail: Mail) -> None:
    with _client(server) as client:
        client.deliver(mail)


if __name__ == "__main__":
    main()
