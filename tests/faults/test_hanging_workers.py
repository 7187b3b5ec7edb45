"""Workers that hang: a verdict at the deadline, and whoever hangs is killed with its children."""

import socket
from pathlib import Path

import psutil
import pytest

from .flow import Background, Flow, mail, subject, word
from .server import Server, until
from .wire import beginning, end, opened, say

pytestmark = pytest.mark.integration

DEADLINE = ["--eom-deadline", "1"]


@pytest.mark.parametrize(("way", "shown"), [("loop", "in loop"), ("regex", "re/__init__.py")])
def test_a_scan_that_hangs_is_shown_and_ended(tmp_path: Path, way: str, shown: str) -> None:
    with Server(tmp_path, *DEADLINE) as server:
        bad = mail(way, queue_id="HANGS")
        with Flow(server) as flow:
            verdict = Background(server, bad).word()
            flow.wait()
        assert verdict == "tempfail"
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()
        assert server.scans(subject(bad)) == 1
        # The soft limit, in Python as in C: who hangs, with what, and where.
        assert "has not answered qid=HANGS" in server.log()
        assert shown in server.log()
        until(server.is_whole, "two workers run again")
        assert server.is_sound(), server.log()


def test_grandchildren_end_with_the_worker_at_the_deadline(tmp_path: Path) -> None:
    with Server(tmp_path, *DEADLINE) as server:
        with Flow(server) as flow:
            assert Background(server, mail("hangchild")).word() == "tempfail"
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        [said] = [line for line in server.log().splitlines() if "grandchild" in line]
        until(lambda: not is_running(int(said.split()[-1])), "the grandchild is gone")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_all_workers_that_hang_at_once_are_replaced_and_who_waits_is_served(
    tmp_path: Path,
) -> None:
    with Server(tmp_path, "--eom-deadline", "3") as server:
        bad = [Background(server, mail("loop")) for _ in range(2)]
        until(lambda: server.log().count("scans loop") == 2, "both hang")
        with Flow(server) as flow:
            assert [one.word() for one in bad] == ["tempfail"] * 2
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()
        assert server.is_sound(), server.log()


def test_who_waits_too_long_for_a_worker_is_told_to_come_back(tmp_path: Path) -> None:
    options = ["--queue-wait", "0.5", "--max-queue", "2"]
    with Server(tmp_path, *options, workers=1) as server:
        first = Background(server, mail("sleep3"))
        until(lambda: server.log().count("scans sleep3") == 1, "the worker is busy")
        others = [Background(server, mail()) for _ in range(5)]
        assert [one.word() for one in others] == ["451"] * 5
        assert not first.done
        counters = server.counters()
        assert counters["overload_queue_full"] == 3
        assert counters["overload_queue_wait"] == 2
        assert first.word() == "accept"
        with server.client() as client:
            assert word(client.deliver(mail())) == "accept"


def test_an_mta_that_leaves_frees_no_worker_before_it_is_idle(tmp_path: Path) -> None:
    with Server(tmp_path, workers=1) as server:
        leaver = asking(server, "sleep1")
        pids = server.workers()
        leaver.close()
        with Flow(server) as flow:
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        assert server.workers() == pids, "the worker was left to finish"
        assert server.is_sound(), server.log()


def test_a_hanging_scan_that_nobody_waits_for_is_ended_at_its_deadline(tmp_path: Path) -> None:
    with Server(tmp_path, "--eom-deadline", "2", workers=1) as server:
        [pid] = server.workers()
        leaver = asking(server, "loop")
        leaver.close()
        late = Background(server, mail())
        until(lambda: pid not in server.workers(), "the worker is killed")
        assert late.word() in ("accept", "451"), "its own deadline is hardly later"
        with Flow(server, connections=2) as flow:
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        assert server.log().count("scans loop") == 1
        assert server.is_sound(), server.log()


def asking(server: Server, order: str) -> socket.socket:
    """A connection whose message is being scanned."""
    message = mail(order)
    sock = opened(server)
    say(sock, [*beginning(message), *end(message)])
    until(lambda: server.scans(subject(message)) == 1, "the scan runs")
    return sock
