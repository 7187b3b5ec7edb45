"""The system refuses descriptors, memory or processes: verdicts, back-off, and no end of it all.

The limits of the running master are lowered from outside (prlimit), as an administrator would.
RLIMIT_NPROC does not bind root, so a spawn is made to fail for want of descriptors (EMFILE).
"""

import os
import resource
import signal
from pathlib import Path

import pytest

from .flow import Flow, mail, subject, word
from .server import Server, until

pytestmark = pytest.mark.integration


class Lowered:
    """A limit of the master, lower for as long as the `with` lasts."""

    def __init__(self, server: Server, limit: int, value: int) -> None:
        self._pid, self._limit, self._value = server.pid, limit, value
        self._before = resource.prlimit(self._pid, limit)

    def __enter__(self) -> None:
        resource.prlimit(self._pid, self._limit, (self._value, self._before[1]))

    def __exit__(self, *exc_info: object) -> None:
        resource.prlimit(self._pid, self._limit, self._before)


def test_a_spawn_that_fails_is_tried_again(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        with Flow(server) as flow:
            flow.wait()
            with Lowered(server, resource.RLIMIT_NOFILE, server.descriptors() + 2):
                os.kill(server.workers()[0], signal.SIGKILL)
                server.wait_log("cannot start a worker")
                flow.wait()
            until(server.is_whole, "two workers run again")
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        assert server.unforeseen() == [], server.log()


def test_a_spawn_that_fails_halfway_leaves_nothing_open(tmp_path: Path) -> None:
    with Server(tmp_path, workers=1) as server:
        before = server.descriptors()
        for number, room in enumerate((3, 5), 1):
            with Lowered(server, resource.RLIMIT_NOFILE, before + room):
                os.kill(server.workers()[0], signal.SIGKILL)
                until(lambda n=number: server.log().count("by SIGKILL") == n, "it is gone")  # type: ignore[misc]
                until(
                    lambda n=number: server.log().count("cannot start") >= n or server.is_whole(1),  # type: ignore[misc]
                    "its successor was tried",
                )
            until(lambda: server.is_whole(1), "a worker runs again")
        with server.client() as client:
            assert word(client.deliver(mail())) == "accept"
        until(lambda: server.descriptors() <= before, "as many are open as before")
        assert server.unforeseen() == [], server.log()


@pytest.mark.parametrize(
    ("limit", "value"),
    [(resource.RLIMIT_FSIZE, 100_000), (resource.RLIMIT_NOFILE, 3)],
    ids=["full", "no descriptor"],
)
def test_a_message_for_which_there_is_no_memory_is_told_to_come_back(
    tmp_path: Path, limit: int, value: int
) -> None:
    with Server(tmp_path) as server:
        with Flow(server) as flow, server.client() as client:
            flow.wait()
            with Lowered(server, limit, value):
                large = mail(size=1_000_000)
                assert word(client.deliver(large)) == "452"
                assert server.scans(subject(large)) == 0
                flow.wait()
            assert word(client.deliver(mail(size=1_000_000))) == "accept"
        assert set(flow.verdicts()) == {"accept"}
        assert server.counters()["refused_no_memory"] == 1
        assert "bytes in flight" in server.log()
        assert " 0 bytes in flight" in server.log()
        assert server.unforeseen() == [], server.log()
