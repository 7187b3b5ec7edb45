"""Workers that die: the message goes to another one, and the MTA hears nothing of it."""

import os
import random
import signal
from pathlib import Path

import pytest

from .flow import Background, Flow, mail, subject, word
from .server import Server, is_running, until

pytestmark = pytest.mark.integration


def deaths(server: Server) -> int:
    return server.log().count("by SIGKILL")


def test_twenty_workers_killed_at_random_cost_no_mail(tmp_path: Path) -> None:
    rng = random.Random(20261122)
    with Server(tmp_path, workers=4) as server:
        with Flow(server) as flow:
            for number in range(1, 21):
                flow.wait(rng.randint(1, 12))
                os.kill(rng.choice(server.workers()), signal.SIGKILL)
                # The master must know of the death, and what it has cost must be answered: a
                # message that loses two workers is refused as poison.
                until(lambda n=number: deaths(server) == n, "the worker is gone")  # type: ignore[misc]
                flow.settle()
            for pid in server.workers():
                os.kill(pid, signal.SIGKILL)
            flow.settle()
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()
        until(lambda: server.is_whole(4), "four workers run again")
        assert deaths(server) > 20
        assert server.unforeseen() == [], server.log()


def test_mails_that_kill_their_workers_are_poison_and_others_pass(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        with Flow(server) as flow:
            for way in ("exit", "exit3", "segfault", "closeall"):
                bad = mail(way)
                assert Background(server, bad).word() == "tempfail"
                assert server.scans(subject(bad)) == 2
                flow.wait()
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()
        until(server.is_whole, "two workers run again")
        for why in ("exited with code 0", "exited with code 3", "killed by SIGSEGV"):
            assert server.log().count(f"is gone: {why}") == 2, why
        assert server.counters()["poison"] == 4
        assert server.unforeseen() == [], server.log()


def test_exceptions_cost_a_verdict_and_no_worker(tmp_path: Path) -> None:
    limit = str(800 << 20)
    with Server(tmp_path, "--worker-memory-limit", limit) as server:
        before = set(server.workers())
        with Flow(server, words="mail sysexit raise hog") as flow:
            flow.wait(24)
        assert set(flow.verdicts()) == {"accept", "tempfail"}
        for answer in flow.answers:
            ordered = subject(answer.mail).split()[0]
            assert word(answer.outcome) == ("accept" if ordered == "mail" else "tempfail")
        assert "MemoryError" in server.log()
        assert set(server.workers()) == before
        assert server.unforeseen() == [], server.log()


def test_poison_is_not_scanned_again_and_a_copy_is_kept_under_the_quota(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    options = ["--on-poison", "reject", "--keep-dir", str(kept), "--keep-quota", "2000"]
    with Server(tmp_path, *options) as server:
        bad, large = mail("exit"), mail("exit", size=3000)
        with server.client() as client, Flow(server) as flow:
            assert word(client.deliver(bad)) == "reject"
            bad_again = type(bad)(bad.raw, queue_id="ANOTHER")
            assert word(client.deliver(bad_again)) == "reject"
            assert word(client.deliver(large)) == "reject"
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        assert server.scans(subject(bad)) == 2
        counters = server.counters()
        assert counters["poison"] == 2
        assert counters["workers_lost"] == 4
        [copy] = kept.iterdir()
        assert copy.read_bytes().endswith(bad.raw.partition(b"\r\n\r\n")[2])
        assert copy.stat().st_mode & 0o077 == 0
        assert "quota" in server.log()
        assert server.unforeseen() == [], server.log()


def test_without_retries_two_deliveries_make_poison(tmp_path: Path) -> None:
    with (
        Server(tmp_path, "--retries", "0", "--on-poison", "accept") as server,
        server.client() as client,
    ):
        bad = mail("exit")
        assert word(client.deliver(bad)) == "tempfail"
        assert word(client.deliver(bad)) == "continue"
        assert word(client.deliver(bad)) == "continue"
        assert server.scans(subject(bad)) == 2


def test_a_grandchild_that_holds_the_output_delays_nothing_and_ends(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        before = server.descriptors()
        bad = mail("diechild")
        with Flow(server) as flow:
            assert Background(server, bad).word() == "tempfail"
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        until(server.is_whole, "two workers run again")
        until(lambda: server.descriptors() <= before, "what the dead have left open is closed")
        children = server.grandchildren()
        assert children
        until(lambda: not any(map(is_running, children)), "they end with their parents")
