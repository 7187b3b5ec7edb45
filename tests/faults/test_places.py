"""Which worker does what, for how long, on which CPU; and the clock it is all measured by."""

import os
import signal
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from sharded_milter.protocol import commands, replies

from .flow import Background, Flow, mail, marks, subject, word
from .server import Server, until
from .wire import negotiated, read, say, scanned, verdict

pytestmark = pytest.mark.integration


def workers_of(flow: Flow) -> list[int]:
    """The processes that have answered, as they came."""
    return [int(marks(answer.outcome)["X-Worker"]) for answer in flow.answers]


def test_recycling_loses_nothing(tmp_path: Path) -> None:
    options = ["--max-messages", "10", "--worker-lifetime", "2"]
    with Server(tmp_path, *options) as server:
        with Flow(server, connections=6) as flow:
            until(lambda: len(set(workers_of(flow))) > 5, "six workers have served")
        assert set(flow.verdicts()) == {"accept"}, flow.verdicts()
        counters = server.counters()
        assert counters["recycled"] >= 3
        assert "worker_restarts" not in counters, "nobody has died"
        until(server.is_whole, "two workers run")
        assert server.unforeseen() == [], server.log()


def test_a_worker_that_has_grown_is_replaced(tmp_path: Path) -> None:
    with Server(tmp_path, "--worker-max-rss", str(150 << 20), workers=1) as server:
        [old] = server.workers()
        with server.client() as client:
            for _ in range(3):
                assert word(client.deliver(mail("grow"))) == "accept"
        with Flow(server, connections=2) as flow:
            until(lambda: old not in server.workers(), "it is replaced", timeout=40)
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        assert server.counters()["recycled"] == 1


def test_workers_have_their_place_and_may_become_more_or_less(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with Server(tmp_path, "--cpu-affinity", "spread", "--nice", "7") as server:
        pinned = [sorted(os.sched_getaffinity(pid)) for pid in server.workers()]
        assert sorted(pinned) == sorted([[cpus[0]], [cpus[1 % len(cpus)]]])
        usual = psutil.Process().nice()
        assert {psutil.Process(pid).nice() for pid in server.workers()} == {usual + 7}
        assert psutil.Process(server.pid).nice() == usual
        with Flow(server) as flow:
            server.signal(signal.SIGTTIN)
            until(lambda: server.is_whole(3), "three run")
            server.wait_log("shard 3 is ready")
            for _ in range(4):
                server.signal(signal.SIGTTOU)
                flow.wait()
            until(lambda: server.is_whole(1), "one runs, and stays")
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        assert server.unforeseen() == [], server.log()


LIGHT = """
    import os, time
    from sharded_milter import Accept, AddHeader, Milter

    milter = Milter("light", shard_by="sender")

    @milter.rcpt(light=True)
    def rcpt(recipient, envelope):
        return None

    @milter.eom
    def eom(message):
        subject = message.headers["Subject"]
        print("scans", subject, flush=True)
        time.sleep(3 if subject.startswith("sleep3") else 0.03)
        return Accept(AddHeader("X-Id", subject), AddHeader("X-Worker", str(os.getpid())))
"""


def test_a_reserved_worker_answers_light_callbacks_during_heavy_scans(tmp_path: Path) -> None:
    source = LIGHT.replace(', shard_by="sender"', "")
    with Server(tmp_path, "--reserve", "1", source=source) as server:
        heavy = [Background(server, mail("sleep3")) for _ in range(2)]
        until(lambda: "scans sleep3" in server.log(), "one is scanned")
        sock = negotiated(server.socket())
        began = time.monotonic()
        say(sock, [commands.Mail("<a@example.org>"), commands.Rcpt("<b@example.com>")])
        assert read(sock) == replies.Continue().encode()
        took = time.monotonic() - began
        assert not any(one.done for one in heavy)
        print(f"a recipient was answered after {1000 * took:.1f} ms, a scan takes 3000")
        assert [one.word() for one in heavy] == ["accept"] * 2


def test_mail_of_one_sender_stays_with_one_worker(tmp_path: Path) -> None:
    with Server(tmp_path, source=LIGHT, workers=3) as server, server.client() as client:
        homes: dict[str, set[str]] = {}
        for number in range(60):
            message = mail()
            sender = f"sender{number % 12}@example.org"
            outcome = client.deliver(type(message)(message.raw, sender, queue_id="Q"))
            homes.setdefault(sender, set()).add(marks(outcome)["X-Worker"])
        assert all(len(pids) == 1 for pids in homes.values())
        assert len(set.union(*homes.values())) > 1


def test_a_repeat_waits_for_the_scan_that_runs(tmp_path: Path) -> None:
    source = LIGHT.replace("else 0.03", 'else 12 if "sleep12" in subject else 0.03')
    source = source.replace(', shard_by="sender"', "")
    with Server(tmp_path, "--join-retries", source=source) as server:
        message = mail("sleep12")
        first = Background(server, message)
        until(lambda: server.scans(subject(message)) == 1, "the scan runs")
        begun = time.monotonic()
        with Flow(server, connections=1) as flow:
            until(lambda: time.monotonic() - begun > 10.5, "it has run for long enough")
            repeat = Background(server, type(message)(message.raw, queue_id="ANOTHER"))
            assert (first.word(), repeat.word()) == ("accept", "accept")
            assert first.outcome
            assert repeat.outcome
            assert marks(first.outcome) == marks(repeat.outcome)
        assert set(flow.verdicts()) == {"accept"}
        assert server.scans(subject(message)) == 1
        assert server.counters()["joined"] == 1


STEPPING = """
    import runpy, time

    real = time.time

    def stepped():
        try:
            with open("step") as file:
                return real() + float(file.read() or 0)
        except FileNotFoundError:
            return real()

    time.time = stepped
    runpy.run_module("sharded_milter", run_name="__main__", alter_sys=True)
"""


def test_a_clock_that_is_set_changes_nothing(tmp_path: Path) -> None:
    program = tmp_path / "stepping.py"
    program.write_text(textwrap.dedent(STEPPING))
    options = ["--eom-deadline", "3", "--worker-lifetime", "3600"]
    with Server(tmp_path, *options, program=[str(program)]) as server:
        with Flow(server) as flow:
            for ready, step in ((2, 7200), (3, -7200)):
                until(lambda n=ready: server.log().count("is ready, pid") == n, "two serve")  # type: ignore[misc]
                before = server.workers()
                hanging, busy = Background(server, mail("loop")), scanned(server, "sleep1")
                (tmp_path / "step.new").write_text(str(step))
                (tmp_path / "step.new").rename(tmp_path / "step")
                assert isinstance(verdict(busy), replies.Accept)
                assert set(before) == set(server.workers()), "nobody is too old"
                assert hanging.word() == "tempfail", "its deadline has come all the same"
                flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        until(server.is_whole, "two workers run again")
        assert server.unforeseen() == [], server.log()
