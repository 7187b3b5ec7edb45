"""Do real MTAs with their default time limits wait while all workers are busy for a minute?

    python -m bench.busy_minute [--seconds 60]

One worker is busy with a mail that takes that long; a second mail waits behind it. Needs root and
Debian's postfix and sendmail-bin, as tests/integration does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.integration.daemon import Daemon
from tests.integration.postfix import Postfix, submit
from tests.integration.sendmail import Sendmail

MILTER = """
import time
from sharded_milter import Accept, AddHeader, Message, Milter, Verdict

milter = Milter("busy")


@milter.eom
def scan(message: Message) -> Verdict:
    if message.headers.get("Subject") == "long":
        time.sleep({seconds})
    return Accept(AddHeader("X-Scanned", "yes"))
"""
MAIL = b"From: a@example.org\r\nTo: b@example.com\r\nSubject: %s\r\n\r\nHello.\r\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="busy-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "busy.py").write_text(MILTER.format(seconds=seconds))
        for kind in (Postfix, Sendmail):
            measure(kind, folder / kind.__name__.lower(), folder, seconds)


def measure(kind: Any, home: Path, folder: Path, seconds: float) -> None:
    """Sends the long mail and one behind it; prints when each was answered and delivered."""
    home.mkdir()
    home.chmod(0o755)
    listen = f"unix:{folder}/{kind.__name__}.sock"
    options = ["--workers", "1", "--listen", listen, "--socket-mode", "666"]
    milters = {"milters": [listen]} if kind is Postfix else {"milter": listen}
    with Daemon(*options, f"{folder}/busy.py:milter", cwd=folder), kind(home, **milters) as mta:
        with ThreadPoolExecutor(2) as threads:
            began = time.monotonic()
            first = threads.submit(_timed, mta, b"long", began)
            time.sleep(1.0)  # it must be the first that the worker gets
            second = threads.submit(_timed, mta, b"short", began)
            answers = [first.result(), second.result()]
        delivered = mta.wait_delivered(2)
    scanned = sum(b"X-Scanned: yes" in delivery.raw for delivery in delivered)
    for (answer, after), subject in zip(answers, ("long", "waiting"), strict=True):
        print(f"{kind.__name__}: the {subject} mail was answered {answer} after {after:.1f} s")
    print(f"{kind.__name__}: {len(delivered)} delivered, {scanned} of them scanned; {seconds:g} s")


def _timed(mta: Any, subject: bytes, began: float) -> tuple[str, float]:
    with mta.client() as client:
        client.sock.settimeout(600.0)
        answer = submit(client, MAIL % subject)
    return str(answer), time.monotonic() - began


if __name__ == "__main__":
    main()
