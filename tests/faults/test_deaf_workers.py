"""Workers that are stopped, or do not listen while they are idle, are replaced before mail pays."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from .flow import Background, Flow, mail, word
from .milters import OBEDIENT
from .server import Server, until
from .wire import scanned

pytestmark = pytest.mark.integration

#: A milter that answers, and whose worker does not listen any more from then on.
DEAF = (
    OBEDIENT
    + """
    import threading
    from twisted.internet import reactor

    def hold_the_lock():
        def hold():
            time.sleep(0.2)
            ctypes.PyDLL(None).sleep(600)  # which keeps Python's lock
        threading.Thread(target=hold, daemon=True).start()

    def never_answer():
        def forget():
            from sharded_milter.workers.child import Child
            Child.sendBox = lambda self, box: None
        reactor.callLater(0.1, forget)

    ACTS["lock"] = hold_the_lock
    ACTS["block"] = lambda: reactor.callLater(0.1, time.sleep, 600)
    ACTS["dumb"] = never_answer
"""
)


def test_a_stopped_worker_is_replaced_with_what_it_has_in_hand(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        before, descriptors = server.workers(), server.descriptors()
        with Flow(server) as flow:
            flow.wait()
            os.kill(before[0], signal.SIGSTOP)
            until(lambda: before[0] not in server.workers(), "the stopped one is gone")
            flow.wait(20)
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()
        until(server.is_whole, "two workers run again")
        until(lambda: server.descriptors() <= descriptors, "no descriptor is left")
        assert "was stopped by a signal" in server.log()
        assert server.unforeseen() == [], server.log()


def test_all_workers_that_are_stopped_while_idle_cost_no_mail(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        before = server.workers()
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        waiting = [Background(server, mail()) for _ in range(4)]
        assert [one.word() for one in waiting] == ["accept"] * 4
        assert not set(before) & set(server.workers())
        assert server.unforeseen() == [], server.log()


def test_one_that_is_continued_at_once_is_left_alone(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        before = server.workers()
        with Flow(server) as flow:
            for _ in range(5):
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    os.kill(before[0], number)
                flow.wait()
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()
        assert server.workers() == before


@pytest.mark.parametrize("way", ["lock", "block", "dumb"])
def test_a_deaf_worker_is_replaced_before_its_next_mail(tmp_path: Path, way: str) -> None:
    with Server(tmp_path, workers=1, source=DEAF) as server:
        [before] = server.workers()
        with server.client() as client:
            assert word(client.deliver(mail(way))) == "accept"
        until(lambda: before not in server.workers(), "the deaf one is gone")
        with server.client() as client:
            assert word(client.deliver(mail())) == "accept"
        assert "it was idle and has not answered a ping within" in server.log()
        assert "retries" not in server.counters()
        assert server.unforeseen() == [], server.log()


def test_mail_that_a_deaf_worker_has_been_given_goes_on_elsewhere(tmp_path: Path) -> None:
    with Server(tmp_path, source=DEAF) as server:
        for _ in range(2):  # both workers, if it comes so
            with server.client() as client:
                assert word(client.deliver(mail("block"))) == "accept"
        time.sleep(1.2)  # a look has passed
        waiting = [Background(server, mail()) for _ in range(4)]
        assert [one.word() for one in waiting] == ["accept"] * 4
        counters = server.counters()
        assert (counters["attempts_lost"] > 0, "retries" in counters) == (True, False)
        assert server.unforeseen() == [], server.log()


def test_a_master_that_was_stopped_itself_kills_no_worker(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        before = server.workers()
        busy = scanned(server, "sleep3")
        server.signal(signal.SIGSTOP)
        time.sleep(12)  # longer than a deaf worker is left alone
        server.signal(signal.SIGCONT)
        with Flow(server) as flow:
            flow.wait(20)
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()
        assert server.workers() == before
        busy.close()
        assert server.unforeseen() == [], server.log()
