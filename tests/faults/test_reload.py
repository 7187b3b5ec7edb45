"""HUP: the new workers serve when they all can, and until then, or for ever, the old ones."""

import os
import signal
import threading
from pathlib import Path

import pytest

from .flow import Flow, mail, marks, word
from .milters import write
from .server import Server, until

pytestmark = pytest.mark.integration

VERSION = """
    import time
    from sharded_milter import Accept, AddHeader, Milter

    milter = Milter("version")
    time.sleep({import_seconds})

    @milter.{stage}
    def eom(message):
        time.sleep(0.03)
        return Accept(
            AddHeader("X-Id", message.headers["Subject"]), AddHeader("X-Version", "{version}")
        )
"""

BROKEN = ("def oops(:\n", "1 / 0\n", "import os; os._exit(3)\n")

OTHER_STAGES = """
    from sharded_milter import Reject

    @milter.rcpt
    def rcpt(recipient, envelope):
        return None
"""


def version(number: int, *, import_seconds: float = 0.0, stage: str = "eom") -> str:
    return VERSION.format(version=number, import_seconds=import_seconds, stage=stage)


def seen(flow: Flow) -> list[str]:
    """The versions that have answered, as they came."""
    return [marks(answer.outcome).get("X-Version", "") for answer in flow.answers]


def test_a_changed_module_serves_after_hup_and_nothing_is_lost(tmp_path: Path) -> None:
    with Server(tmp_path, source=version(1)) as server:
        with Flow(server) as flow:
            flow.wait()
            write(tmp_path, version(2))
            server.signal(signal.SIGHUP)
            server.wait_log("reloaded: 2 new workers serve")
            flow.wait(20)
        assert set(flow.verdicts()) == {"accept"}
        assert set(seen(flow)) == {"1", "2"}
        assert set(seen(flow)[-8:]) == {"2"}
        until(server.is_whole, "the old ones are gone")
        assert server.unforeseen() == [], server.log()


def test_a_broken_module_leaves_the_old_one_serving(tmp_path: Path) -> None:
    with Server(tmp_path, source=version(1)) as server:
        with Flow(server) as flow:
            for number, broken in enumerate(BROKEN, 1):
                write(tmp_path, broken)
                server.signal(signal.SIGHUP)
                until(lambda n=number: server.log().count("reload failed") == n, broken)  # type: ignore[misc]
                flow.wait()
            assert set(seen(flow)) == {"1"}
            write(tmp_path, version(2))
            server.signal(signal.SIGHUP)
            server.wait_log("reloaded: 2 new workers serve")
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        assert "SyntaxError" in server.log()
        assert server.counters()["reloads_failed"] == len(BROKEN)


def test_ten_hups_in_a_second_are_one_reload_and_one_that_is_remembered(tmp_path: Path) -> None:
    # The import is slow enough for all signals to come before the first reload is done.
    with Server(tmp_path, source=version(1, import_seconds=0.8)) as server:
        with Flow(server) as flow:
            server.signal(signal.SIGHUP)
            server.wait_log("reloading the milter")
            for _ in range(9):
                server.signal(signal.SIGHUP)
                server.counters()  # so that no two signals become one; asks for stacks besides
            until(lambda: server.log().count("reloaded: 2") == 2, "both are done")
            flow.wait()
        assert server.log().count("reloading the milter") == 2
        assert "most recent call first" in server.log(), "the stacks of those that serve"
        assert set(flow.verdicts()) == {"accept"}
        until(server.is_whole, "two workers run")
        assert server.unforeseen() == [], server.log()


def test_connections_that_agreed_on_other_stages_hear_421(tmp_path: Path) -> None:
    with Server(tmp_path, source=version(1)) as server:
        with server.client() as old, Flow(server, connections=6) as flow:
            flow.wait()
            write(tmp_path, version(2) + OTHER_STAGES)
            server.signal(signal.SIGHUP)
            server.wait_log("reloaded: 2 new workers serve")
            assert word(old.deliver(mail())) == "421"
            flow.wait(12)
        verdicts = flow.verdicts()
        assert set(verdicts) == {"accept", "421"}, verdicts
        assert verdicts["421"] <= 6
        assert set(seen(flow)[-6:]) == {"2"}
        assert server.unforeseen() == [], server.log()


def test_a_module_that_has_changed_without_hup_replaces_all_workers(tmp_path: Path) -> None:
    with Server(tmp_path, source=version(1)) as server:
        with Flow(server) as flow:
            flow.wait()
            write(tmp_path, version(2) + OTHER_STAGES)
            os.kill(server.workers()[0], signal.SIGKILL)
            server.wait_log("reloaded: 2 new workers serve")
            flow.wait(12)
        assert set(flow.verdicts()) <= {"accept", "421"}
        assert set(seen(flow)[-6:]) == {"2"}
        assert server.unforeseen() == [], server.log()


def test_a_worker_that_starts_too_slowly_is_given_up(tmp_path: Path) -> None:
    # The first workers have to start in this time too, on whatever machine.
    with Server(tmp_path, "--worker-start-timeout", "10", source=version(1)) as server:
        with Flow(server, connections=1) as flow:
            write(tmp_path, version(2, import_seconds=60))
            server.signal(signal.SIGHUP)
            server.wait_log("reload failed, the old workers continue: its worker ended: it was not")
            flow.wait()
        assert set(flow.verdicts()) == {"accept"}
        assert set(seen(flow)) == {"1"}
        until(server.is_whole, "those that were too slow are gone")


LEAVES = """
    import atexit, time
    from sharded_milter import Milter

    milter = Milter("leaves")

    def leave():
        time.sleep(2)
        print("has left", flush=True)

    atexit.register(leave)

    @milter.eom
    def eom(message):
        return None
"""


def test_a_worker_that_is_replaced_has_its_time_to_exit(tmp_path: Path) -> None:
    with Server(tmp_path, source=LEAVES, workers=1) as server:
        server.signal(signal.SIGHUP)
        server.wait_log("has left")
        assert "has left" in server.log()
        assert "killed" not in server.log()


#: Workers are started in the order of their slots, and the last slot is the one that goes.
THE_LAST_IS_SLOW = """
    import os, time
    import psutil
    from sharded_milter import Milter

    milter = Milter("slow")
    while len(workers := psutil.Process(os.getppid()).children()) < 2:
        time.sleep(0.01)
    if os.getpid() == max(worker.pid for worker in workers):
        time.sleep(600)

    @milter.eom
    def eom(message):
        return None
"""


def test_it_is_ready_without_the_last_worker_if_that_is_not_wanted_any_more(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path, source=THE_LAST_IS_SLOW)
    starting = threading.Thread(target=server.start)
    starting.start()
    try:
        until(lambda: "is ready, pid" in server.log(), "the first has loaded the milter")
        server.signal(signal.SIGTTOU)
        starting.join()
        with server.client() as client:
            assert word(client.deliver(mail())) == "continue"
        assert server.is_whole(1)
    finally:
        server.__exit__(None, None, None)


def test_a_worker_that_has_died_does_not_come_back_with_other_code(tmp_path: Path) -> None:
    with Server(tmp_path, source=version(1)) as server:
        with Flow(server) as flow:
            flow.wait()
            write(tmp_path, version(2))
            os.kill(server.workers()[0], signal.SIGKILL)
            server.wait_log("the milter's files have changed: all workers are replaced")
            server.wait_log("reloaded: 2 new workers serve")
            flow.wait(20)
        assert set(flow.verdicts()) == {"accept"}
        versions = seen(flow)
        for answer, answered_by in zip(flow.answers, versions, strict=True):
            # Two answers of one moment come in any order.
            assert answered_by == "2" or "2" not in versions[: answer.after], answer
        assert set(versions[-8:]) == {"2"}
        assert server.unforeseen() == [], server.log()
