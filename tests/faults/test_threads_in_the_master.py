"""What milters in the master start beside it: threads that do not end, children that come back."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .flow import mail, word
from .server import Server

pytestmark = [pytest.mark.integration, pytest.mark.each_python]

#: A milter in the master that starts a thread which never ends, in one of the ways there are.
LIGHT = """
import asyncio, threading, time
from twisted.internet import reactor, threads
from sharded_milter import Milter

milter = Milter("light")
started = []

def never_ends():
    time.sleep(600)

@milter.helo
async def helo(hello):
    if not started:
        started.append(1)
        START
    return None
"""
WAYS = {
    "thread": "threading.Thread(target=never_ends, name='of-the-milter').start()",
    "asyncio": "asyncio.ensure_future(asyncio.to_thread(never_ends))",
    "twisted": "threads.deferToThread(never_ends)",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_service_leaves_after_a_grace_and_names_them(
    tmp_path: Path, way: str, number: signal.Signals
) -> None:
    (tmp_path / "light.py").write_text(LIGHT.replace("START", WAYS[way]))
    with Server(tmp_path, "--in-master", "./light.py:milter", workers=1) as server:
        with server.client() as client:
            assert word(client.deliver(mail())) in ("accept", "continue")
        server.signal(number)
        server.ends()
        assert "threads of milters in the master have not ended within 5 s" in server.log()
        assert "in never_ends, " in server.log()
        assert not server.path.exists()


def test_threads_that_end_in_time_are_waited_for(tmp_path: Path) -> None:
    source = LIGHT.replace("START", WAYS["thread"]).replace("time.sleep(600)", "time.sleep(1)")
    (tmp_path / "light.py").write_text(source)
    with Server(tmp_path, "--in-master", "./light.py:milter", workers=1) as server:
        with server.client() as client:
            assert word(client.deliver(mail())) in ("accept", "continue")
        server.signal(signal.SIGTERM)
        server.ends()
        assert "threads of milters" not in server.log()


#: A milter in the master whose children come back from its callbacks, in both ways there are.
FORKING = """
import asyncio, os
from sharded_milter import Milter

milter = Milter("light")

def ended(pid):
    print("the child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

@milter.helo
def helo(hello):
    pid = os.fork()
    if pid:
        ended(pid)
        return None
    raise SystemExit(7)

@milter.mail
async def mail(sender):
    pid = os.fork()
    if pid:
        ended(pid)
        return None
    await asyncio.sleep(0)
"""


def test_children_that_a_milter_in_the_master_forks_end_where_its_code_ends(
    tmp_path: Path,
) -> None:
    (tmp_path / "light.py").write_text(FORKING)
    with Server(tmp_path, "--in-master", "./light.py:milter", workers=1) as server:
        with server.client() as client:
            for _ in range(3):
                assert word(client.deliver(mail())) in ("accept", "continue")
        assert server.log().count("the child 7") == 1
        assert server.log().count("the child 0") == 3
        assert len(server.workers()) == 1
        assert server.unforeseen() == [], server.log()
