"""Workers that hang: a verdict at the deadline, and whoever hangs is killed with its children."""

from pathlib import Path

import pytest

from .flow import Background, Flow, mail, subject, word
from .server import Server, is_running, until
from .wire import scanned

pytestmark = pytest.mark.integration


def test_scans_that_hang_are_shown_and_ended_with_their_descendants(tmp_path: Path) -> None:
    with Server(tmp_path, "--eom-deadline", "2", workers=3) as server:
        with Flow(server) as flow:
            # In Python, in C, and with a child that holds the output.
            for way in ("loop", "regex", "hangchild"):
                bad = mail(way, queue_id=f"BAD{way}")
                assert Background(server, bad).word() == "tempfail"
                assert server.scans(subject(bad)) == 1
                flow.wait()
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()
        for shown in ("has been scanning qid=BADloop", "in loop", "re/__init__.py"):
            assert shown in server.log()
        [pid] = server.grandchildren()
        until(lambda: not is_running(pid), "the grandchild is gone")
        until(lambda: server.is_whole(3), "three workers run again")
        assert server.unforeseen() == [], server.log()


def test_all_workers_that_hang_at_once_are_replaced_and_who_waits_is_served(
    tmp_path: Path,
) -> None:
    with Server(tmp_path, "--eom-deadline", "3") as server:
        bad = [Background(server, mail("loop")) for _ in range(2)]
        until(lambda: server.log().count("scans loop") == 2, "both hang")
        with Flow(server) as flow:
            assert [one.word() for one in bad] == ["tempfail"] * 2
            flow.wait(20)
        # Those that came with the first have waited as long, and may have had enough too.
        assert set(flow.verdicts()) <= {"accept", "451"}, flow.verdicts()
        assert flow.verdicts()["accept"] >= 8
        assert server.unforeseen() == [], server.log()


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


def test_an_mta_that_leaves_frees_no_worker_before_it_is_idle_or_killed(tmp_path: Path) -> None:
    with Server(tmp_path, "--eom-deadline", "2", workers=1) as server:
        [pid] = server.workers()
        scanned(server, "sleep1").close()
        with server.client() as client:
            assert word(client.deliver(mail())) == "accept"
            assert server.workers() == [pid], "the worker was left to finish"
            scanned(server, "loop").close()
            until(lambda: pid not in server.workers(), "the worker is killed at the deadline")
            # A mail that finds no worker waits no longer than --eom-deadline for one to start.
            until(lambda: server.log().count("is ready, pid") == 2, "another one serves")
            assert word(client.deliver(mail())) == "accept"
        assert server.log().count("scans loop") == 1
        assert "answered by policy" not in server.log(), "nobody was"
        assert server.unforeseen() == [], server.log()
