"""Messages behind one that turns out slow: each is scanned once, and none is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from .flow import Background, mail, subject, word
from .milters import OBEDIENT
from .server import Server, until

pytestmark = pytest.mark.integration

#: So many short scans, one at a time, that the worker is given more than one message after them.
WARM = 60

#: What a message hears that is to be delivered: an object and a chain let it go on.
GOOD = {"accept", "continue"}

#: The same milter in other ways to write one, with scans that take no time or 0.3 s.
QUICK = OBEDIENT.replace("time.sleep(0.03)", "None").replace("time.sleep(1)", "time.sleep(0.3)")
assert QUICK.count("None") > OBEDIENT.count("None")
KEYED = QUICK.replace('Milter("obedient")', 'Milter("obedient", shard_by="sender")')
CHAIN = (
    QUICK
    + """
    other = Milter("other")

    @other.eom
    def look(message):
        return None
"""
)
OBJECT = (
    QUICK.split("    @milter.eom")[0]
    + """
    from sharded_milter.embedded import Milter as Object

    class milter(Object):
        replayable = True

        def xxfi_header(self, name, value):
            self.subject = value.strip()
            return self.ReturnCodes.CONTINUE

        def xxfi_eom(self):
            print("scans", self.subject, flush=True)
            ACTS.get(self.subject.split()[0], lambda: None)()
            self.smfi_addheader("X-Id", self.subject)
            return self.ReturnCodes.CONTINUE
"""
)


def warmed(server: Server) -> None:
    with server.client() as client:
        for _ in range(WARM):
            assert word(client.deliver(mail())) in GOOD


def in_hand(counters: dict[str, int]) -> int:
    """The attempts that have not ended."""
    ends = ("answered", "lost", "superseded", "withdrawn")
    return counters["attempts"] - sum(counters.get(f"attempts_{end}", 0) for end in ends)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("source", "options"),
    [(QUICK, ()), (KEYED, ()), (CHAIN, ("./milter.py:other",)), (OBJECT, ())],
    ids=["functions", "keys", "chain", "objects"],
)
def test_each_message_behind_slow_ones_is_scanned_once(
    tmp_path: Path, workers: int, source: str, options: tuple[str, ...]
) -> None:
    with Server(tmp_path, *options, workers=workers, source=source) as server:
        warmed(server)
        words = ["sleep1", "mail"] * (2 * workers)
        waiting = [Background(server, mail(each)) for each in words]
        assert {message.word() for message in waiting} <= GOOD
        assert [server.scans(subject(message.mail)) for message in waiting] == [1] * len(words)
        assert server.counters().get("workers_lost", 0) == 0
        until(lambda: in_hand(server.counters()) == 0, "every attempt has ended")
        assert server.unforeseen() == [], server.log()


def test_a_death_before_them_costs_those_behind_it_no_scan(tmp_path: Path) -> None:
    with Server(tmp_path, workers=1, source=QUICK) as server:
        warmed(server)
        slow = Background(server, mail("sleep3"))
        until(lambda: server.scans(subject(slow.mail)) == 1, "the slow one is scanned")
        behind = [Background(server, mail()) for _ in range(3)]
        os.kill(server.workers()[0], signal.SIGKILL)
        assert [message.word() for message in behind] == ["accept"] * 3
        assert [server.scans(subject(message.mail)) for message in behind] == [1] * 3
        assert slow.word() == "accept"
        assert server.scans(subject(slow.mail)) == 2
        assert server.counters()["workers_lost"] == 1
        assert server.unforeseen() == [], server.log()
