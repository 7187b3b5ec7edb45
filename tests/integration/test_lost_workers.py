"""A worker that dies costs no mail: the client hears a verdict, and the pool is whole again."""

import concurrent.futures
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from .conftest import serving
from .daemon import Daemon
from .mails import mail, stored, write_milter
from .postfix import Answer, Delivery, Postfix, submit

pytestmark = pytest.mark.integration

SLOW = """
    import os, time
    from sharded_milter import Accept, AddHeader, Milter

    milter = Milter("slow")

    @milter.eom
    def eom(message):
        time.sleep(0.05)
        return Accept(AddHeader("X-Worker", str(os.getpid())))
"""

WORKER = re.compile(rb"^X-Worker: (\d+)\n", re.MULTILINE)


class Flow:
    """Mails on several connections, as long as the `with` lasts; every answer is kept."""

    def __init__(self, postfix: Postfix, connections: int) -> None:
        self.answers: list[Answer] = []
        self._postfix = postfix
        self._stopping = threading.Event()
        self._threads = concurrent.futures.ThreadPoolExecutor(connections)
        self._futures = [self._threads.submit(self._one_connection) for _ in range(connections)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._threads.shutdown()
        for future in self._futures:
            future.result()

    def _one_connection(self) -> None:
        with self._postfix.client("lab") as client:
            while not self._stopping.is_set():
                self.answers.append(submit(client, mail("flowing")))


def workers_of(deliveries: Sequence[Delivery]) -> set[int]:
    """The processes that have marked these mails; a mail without a mark is a failure."""
    marks = [WORKER.search(delivery.raw) for delivery in deliveries]
    assert None not in marks, "a mail was delivered without a verdict"
    return {int(mark[1]) for mark in marks if mark is not None}


def pauses(flow: Flow, seconds: float) -> bool:
    """Whether nothing is answered for so long."""
    before = len(flow.answers)
    time.sleep(seconds)
    return len(flow.answers) == before


def is_whole(daemon: Daemon, size: int, victim: int) -> bool:
    pids = daemon.workers()
    return len(pids) == size and victim not in pids


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 30.0) -> float:
    """Seconds until the condition holds."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout, f"not within {timeout} s: {what}"
        time.sleep(0.005)
    return time.monotonic() - begin


@pytest.fixture
def slow(lab: tuple[str, Path]) -> Iterator[Daemon]:
    listen, folder = lab
    write_milter(folder, "slow.py", SLOW)
    with serving("./slow.py:milter", listen=listen, cwd=folder, workers=3) as daemon:
        yield daemon


def test_a_killed_worker_costs_no_mail_and_is_replaced(postfix: Postfix, slow: Daemon) -> None:
    before = set(slow.workers())
    assert len(before) == 3, slow.log()
    victim = min(before)
    with Flow(postfix, connections=6) as flow:
        wait_until(lambda: len(flow.answers) >= 6, "mails flow")
        os.kill(victim, signal.SIGKILL)
        whole = wait_until(lambda: is_whole(slow, 3, victim), "the pool is whole")
        [new] = set(slow.workers()) - before
        serves = whole + wait_until(lambda: new in workers_of(postfix.deliveries()), "it serves")
    print(
        f"kill -9: 3 processes after {whole:.2f} s, first mail of the new one after {serves:.2f} s"
    )
    assert {(answer.stage, answer.code) for answer in flow.answers} == {("eom", 250)}, slow.log()
    assert "Traceback" not in slow.log()
    assert "warning: " not in postfix.log()
    deliveries = postfix.wait_delivered(len(flow.answers))
    assert {victim, new} <= workers_of(deliveries) <= before | {new}
    messages = {WORKER.sub(b"", delivery.message) for delivery in deliveries}
    assert messages == {stored(mail("flowing"))}
    said = [line for line in slow.log().splitlines() if "SIGKILL" in line or " died " in line]
    assert said, slow.log()
    assert "None" not in "".join(said)


def test_a_pool_that_is_killed_whole_costs_no_mail_either(postfix: Postfix, slow: Daemon) -> None:
    before = set(slow.workers())
    with Flow(postfix, connections=6) as flow:
        wait_until(lambda: len(flow.answers) >= 6, "mails flow")
        # Each has a mail in hand when it dies. Otherwise the mail of the first could go to an idle
        # one that is the next to be killed, and a mail that two have died with is poison.
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        # Soon, because the pool replaces a worker that was stopped for 5 s.
        wait_until(lambda: pauses(flow, 0.3), "all mails wait for the workers")
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        whole = wait_until(lambda: len(set(slow.workers()) - before) == 3, "the pool is whole")
        count = len(flow.answers)
        wait_until(lambda: len(flow.answers) >= count + 6, "mails flow again")
    print(f"kill -9 of all workers: 3 processes after {whole:.2f} s")
    assert {(answer.stage, answer.code) for answer in flow.answers} == {("eom", 250)}, slow.log()
    assert "Traceback" not in slow.log()
    assert "warning: " not in postfix.log()
    assert len(workers_of(postfix.wait_delivered(len(flow.answers)))) > 3


DEADLY = """
    import os, time
    from sharded_milter import Accept, AddHeader, Milter

    milter = Milter("deadly")

    @milter.eom
    def eom(message):
        match message.headers.get("Subject"):
            case "exit":
                os._exit(0)
            case "abort":
                os.abort()
            case "hang":
                while True:
                    pass
        return Accept(AddHeader("X-Seen", "yes"))
"""


@pytest.mark.parametrize("subject", ["exit", "abort", "hang"])
def test_a_mail_that_takes_its_worker_down_is_tempfailed_and_others_pass(
    postfix: Postfix, lab: tuple[str, Path], subject: str
) -> None:
    listen, folder = lab
    write_milter(folder, "deadly.py", DEADLY)
    deadline = ["--eom-deadline", "2"] if subject == "hang" else []
    with serving("./deadly.py:milter", *deadline, listen=listen, cwd=folder) as daemon:
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            deadly = threads.submit(postfix.send, mail(subject), service="lab")
            others = [postfix.send(mail("harmless"), service="lab") for _ in range(5)]
            answer = deadly.result()
        print(f"{subject}: answered after {time.monotonic() - begin:.2f} s")
        assert (answer.stage, answer.code, answer.text[:2]) == ("eom", 451, "4."), daemon.log()
        assert "warning: " not in postfix.log(), "Postfix complains about its milter"
        assert [other.code for other in others] == [250] * 5, daemon.log()
        deliveries = postfix.wait_delivered(5)
        if subject == "hang":
            assert f'File "{folder}/deadly.py", line' in daemon.log(), "nobody knows where it hung"
    assert all(b"\nX-Seen: yes\n" in delivery.raw for delivery in deliveries)


def test_a_mail_for_which_no_worker_is_free_in_time_is_tempfailed(
    postfix: Postfix, lab: tuple[str, Path]
) -> None:
    listen, folder = lab
    write_milter(folder, "slow.py", SLOW.replace("0.05", "3"))
    options = ["./slow.py:milter", "--queue-wait", "0.5"]
    with serving(*options, listen=listen, cwd=folder, workers=1) as daemon:
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            sent = [threads.submit(postfix.send, mail(), service="lab") for _ in range(2)]
            served, busy = sorted((future.result() for future in sent), key=lambda a: a.code)
        log = daemon.log()
    assert (served.code, busy.code, busy.text[:5]) == (250, 451, "4.3.2"), log
    times = [float(time) for time in re.findall(r"\b\w+_ms=(\S+)", log)]
    assert times, log
    assert all(0 <= time < 60_000 for time in times), log
