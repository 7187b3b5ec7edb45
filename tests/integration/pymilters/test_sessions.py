"""Objects of a script and the workers that they live in."""

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from ..daemon import Daemon
from ..milter_client import MilterClient
from .scripts import Environment

pytestmark = pytest.mark.integration

SCRIPT = """
import os
import Milter

class Mine(Milter.Base):
    def __init__(self):
        self.id = Milter.uniqueID()
        self.seen = ["init"]

    def connect(self, hostname, family, hostaddr):
        self.seen.append("connect")
        return Milter.CONTINUE

    def header(self, name, value):
        self.seen.append(name)
        return Milter.CONTINUE

    def eom(self):
        self.addheader("X-Seen", f"{self.id} {os.getpid()} {' '.join(self.seen)}")
        return Milter.CONTINUE

    def close(self):
        print(f"closed {self.id}", flush=True)
        return Milter.CONTINUE

Milter.factory = Mine
Milter.runmilter("mine", "unix:" + os.path.abspath("milter.sock"), 60)
print("all is over", flush=True)
"""


def test_each_connection_has_its_object_in_one_worker(
    environment: Environment, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    daemon = Daemon(
        *("--workers", "2", "--pymilter", "mine.py"), cwd=tmp_path, python=str(environment.python)
    )
    found = []
    with daemon, ExitStack() as stack:
        clients = [stack.enter_context(MilterClient(tmp_path / "milter.sock")) for _ in range(6)]
        for client in clients:
            client.negotiate()
        for client in clients:
            change, _ = client.message(b"hello")
            found.append(change[1].split(b"X-Seen\0")[1].rstrip(b"\0").decode().split())
    assert {tuple(words[2:]) for words in found} == {("init", "connect", "Subject")}
    assert len({words[0] for words in found}) == 6
    assert sorted(Counter(words[1] for words in found).values()) == [3, 3]
    log = daemon.log()
    for words in found:
        assert log.count(f"closed {words[0]}\n") == 1, log
    assert log.count("all is over\n") == 2, log
